"""Named guidable classes of the common families, for imports and for `custom_pipeline=`.

    from trimtab.pipelines.named import GuidedStableDiffusionXLPipeline
    pipe = GuidedStableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")

Each lies in a file of its own, which plain Diffusers can load:
`DiffusionPipeline.from_pretrained(repo, custom_pipeline=trimtab.pipelines.named.path("stable_diffusion_xl"))`.
`trimtab.guide(pipe)` does the same to any pipeline of any class.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any, ClassVar, cast

from ..guided import guide

FILES = {
    "GuidedDiTPipeline": "dit",
    "GuidedFluxPipeline": "flux",
    "GuidedPixArtSigmaPipeline": "pixart_sigma",
    "GuidedQwenImagePipeline": "qwenimage",
    "GuidedStableDiffusion3Pipeline": "stable_diffusion_3",
    "GuidedStableDiffusionPipeline": "stable_diffusion",
    "GuidedStableDiffusionXLPipeline": "stable_diffusion_xl",
    "GuidedWanPipeline": "wan",
}


class NamedPipeline:
    """Base of the named classes: an instance becomes the guidable form of its stock class as soon as it is built.

    So it saves, pickles and passes through `AutoPipeline...from_pipe` under the stock name.
    """

    guided_stock: ClassVar[type]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock: Any = next(base for base in cls.__bases__ if base is not NamedPipeline)

        @functools.wraps(stock.__init__)
        def initialise(self: Any, *args: Any, **options: Any) -> None:
            stock.__init__(self, *args, **options)
            guide(self)

        cls.guided_stock, named = stock, cast(Any, cls)
        named.__init__ = initialise


def path(family: str) -> str:
    """The file of a family, to be passed to Diffusers as `custom_pipeline`.

    Raises:
        ValueError: no such family; the message lists them.
    """
    if family not in FILES.values():
        raise ValueError(f"No named pipeline {family!r}; there are {', '.join(sorted(FILES.values()))}.")
    return str(Path(__file__).parent / f"{family}.py")


def __getattr__(name: str) -> Any:
    if name in FILES:
        return getattr(importlib.import_module(f"{__name__}.{FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
