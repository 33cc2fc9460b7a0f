"""What the evidence table compares, by plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WEAK = "{weak}"
"""Stands for `--weak` in a setting."""


@dataclass(frozen=True)
class Comparison:
    """One row: guidances as `--guidance` takes them, and those that they are compared with."""

    guidances: tuple[str, ...]
    before: tuple[str, ...] = ()


STRONG = ("cfg:scale=5",)
COMPARISONS: Mapping[str, Comparison] = {
    "autoguidance": Comparison((f"autoguidance:scale=1,weak={WEAK}",)),
    "cfg": Comparison(("cfg:scale=2",)),
    "cfg_pp": Comparison(("cfg_pp:scale=0.6",)),
    "dynamic_threshold": Comparison((*STRONG, "dynamic_threshold"), STRONG),
    "guider": Comparison(("guider:guider=TangentialClassifierFreeGuidance",), ("cfg:scale=7.5",)),
    "interval": Comparison(("interval:scale=5",), STRONG),
    "pag": Comparison(("pag:scale=1",)),
    "perp_neg": Comparison(("perp_neg:scale=2,negative_prompt=a photo",), ("cfg:scale=2",)),
    "rescale": Comparison((*STRONG, "rescale:phi=0.7"), STRONG),
    "sag": Comparison(("sag:scale=0.75",)),
    "seg": Comparison(("seg:scale=1",)),
    "slg": Comparison(("slg:scale=1,start=0,stop=1",)),
}
"""By plug-in. Those that need a network or weights of their own have benchmarks of their own; see the page."""
OF_WORDS: Mapping[str, Comparison] = {
    "cfg": Comparison(("cfg:scale=3",)),
    "pag": Comparison(("pag:scale=1,layers=up",)),
    "perp_neg": Comparison(("perp_neg:scale=3,negative_prompt=face",), ("cfg:scale=3,negative_prompt=face",)),
}
"""Those that are set otherwise on a model that takes text. What Perp-Neg improves on is the same negative prompt in
classifier-free guidance, which takes apart what a prompt has in common with it."""


def comparisons(words: bool, unet: bool) -> Mapping[str, Comparison]:
    """Those of a model.

    Args:
        words: it takes text.
        unet: its denoiser is a UNet; other denoisers have no layers called `up`.
    """
    found = {**COMPARISONS, **(OF_WORDS if words else {})}
    return found if unet else {**found, "pag": COMPARISONS["pag"]}
