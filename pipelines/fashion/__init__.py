"""The Fashion-MNIST model: a small class-conditional diffusion model that ships with the package."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ...guidance.shipped import FOLDER
from .pipeline import ClassConditionalPipeline

__all__ = ["MODEL_FOLDER", "PIPELINE_FOLDER", "REPOSITORY", "ClassConditionalPipeline", "is_class_conditional"]

REPOSITORY = "trimtab/fashion"
"""The name under which it loads, without a network."""
PIPELINE_FOLDER = Path(__file__).parent
"""What plain Diffusers takes as `custom_pipeline` to load it."""
MODEL_FOLDER = FOLDER / "fashion"


def is_class_conditional(folder: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a pipeline of this package's own class."""
    index = Path(folder) / "model_index.json"
    return index.is_file() and json.loads(index.read_text()).get("_class_name") == ClassConditionalPipeline.__name__
