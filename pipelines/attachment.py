"""Which class attaches a kind of learned weights to a pipeline's denoiser: found by the denoiser's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from ..guidance.errors import UnsupportedPipelineError
from .families import Family

GROUP = "trimtab.attachments"


def find_attachment(
    kind: str, families: Sequence[Family], pipeline: str, asked_by: str
) -> tuple[Callable[..., Any], nn.Module]:
    """The attachment for the first denoiser that has one, and that denoiser; nothing else is imported.

    Args:
        kind: of the weights, such as `"easycontrol"`.
        families: the pipeline's denoisers.
        pipeline: its class, for the message.
        asked_by: the guidance, for the message.

    Raises:
        UnsupportedPipelineError: there is none; the message lists the denoisers that have one.
    """
    known = {point.name.partition(".")[2]: point for point in entry_points(group=GROUP) if _kind(point.name) == kind}
    for family in families:
        for base in type(family.module).__mro__:
            if base.__name__ in known:
                return known[base.__name__].load(), family.module
    found = ", ".join(type(family.module).__name__ for family in families)
    raise UnsupportedPipelineError(
        f"{asked_by} cannot be attached to the denoiser of {pipeline}, {found}; it can be to: "
        f"{', '.join(sorted(known)) or 'none'}."
    )


def _kind(name: str) -> str:
    return name.partition(".")[0]
