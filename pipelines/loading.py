"""Loading a pipeline that is guidable from the start."""

from __future__ import annotations

import os
from typing import Any

from diffusers import DiffusionPipeline

from ..guidance import recipe
from ..guidance.errors import UnsupportedPipelineError
from .embedded import MODEL_FOLDER, REPOSITORY, ClassConditionalPipeline, is_class_conditional
from .guided import guide


class GuidedPipeline:
    """Loads any Diffusers pipeline as a guidable one."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Any:
        """Load from the Hub, a folder, or `"trimtab/embedded"`, the small model that ships with this package.

        Args:
            source: repository, folder, or `"trimtab/embedded"`.
            **options: whatever `DiffusionPipeline.from_pretrained` takes. `use_safetensors` is true unless given:
                weights in other formats are pickles, which run code when loaded.

        A recipe (`guidance.json`) in a local folder is attached.

        Raises:
            UnsupportedPipelineError: weights that are not safetensors, or nothing that guidance could hold on to.
            RecipeError: see `load_guidance`.
        """
        if str(source) == REPOSITORY:
            source = MODEL_FOLDER
        kind = ClassConditionalPipeline if is_class_conditional(source) else DiffusionPipeline
        options.setdefault("use_safetensors", True)
        try:
            pipe = guide(kind.from_pretrained(source, **options))
        except OSError as error:
            if options["use_safetensors"] and "safetensors" in str(error):
                raise UnsupportedPipelineError(
                    f"{source}: only weights in safetensors format are loaded, and some are missing. {error} Weights "
                    "in other formats (.bin, .pt, .ckpt) are pickles, which run code when they are loaded. If you "
                    "trust their author, convert them once: load with use_safetensors=None, which Diffusers takes as "
                    "leave to fall back on them, then save_pretrained(...)."
                ) from error
            raise
        if os.path.isfile(os.path.join(source, recipe.FILE)):
            pipe.load_guidance(source)
        return pipe

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Use GuidedPipeline.from_pretrained(...), or trimtab.guide(pipe) for a pipeline you have.")
