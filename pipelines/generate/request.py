"""A request: everything that one image depends on, as it stands in the image's file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import Image

from ...guidance import recipe
from ...guidance.errors import TrimtabError
from ...guidance.shipped import EMBEDDED

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SEED = 2**64 - 1
"""PyTorch's generators are seeded with 64 bits."""
_RANGES = {"steps": (1, math.inf), "height": (1, math.inf), "width": (1, math.inf), "seed": (0, LARGEST_SEED)}
_OPTIONS = {"prompt": "PROMPT", "class_label": "--class", "seed": "--seeds"}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_RECORDED_PACKAGES = ("trimtab", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "pillow")


class RequestError(TrimtabError, ValueError):
    """Something asked for that this model cannot do."""


def option(name: str) -> str:
    """What is typed for a field of a request, such as `--guidance-scale`."""
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class Request:
    """All that one image depends on.

    Args:
        model: a Hub repository, a folder, or a model that ships, such as `"trimtab/fashion"`.
        revision: commit, branch or tag of a Hub repository.
        dtype: one of `DTYPES`.
        device: where the model runs; the noise is always drawn on the CPU.
        scheduler: class name of a Diffusers scheduler; `None` keeps the model's own.
        steps, height, width, guidance_scale: the pipeline's own arguments; `None` keeps its defaults.
        prompt, negative_prompt: for a model that takes text.
        class_label: name or index of a class, or `"none"`, for a model that takes a class.
        seed: of this image.
        guidance: the recipe, as `recipe.dump` gives it.
        files: fingerprints of what is loaded from this machine, by `model` or by plug-in and parameter; see `local.py`.
    """

    model: str = EMBEDDED
    revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    scheduler: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: str | None = None
    guidance_scale: float | None = None
    seed: int = 0
    guidance: Mapping[str, Any] = field(default_factory=lambda: recipe.dump({}))
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RequestError(f"--dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}.")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and least <= value <= most):
                allowed = f"whole numbers from {least}" + ("" if most == math.inf else f" to {most}")
                raise RequestError(f"{option(name)}: {value!r} is not allowed; allowed: {allowed}.")
        for name in ("prompt", "negative_prompt", "class_label"):
            value = getattr(self, name)
            if isinstance(value, str) and (half := _HALF_CHARACTER.search(value)):
                raise RequestError(
                    f"{option(name)}: {value[:80]!r} is not allowed; allowed: text that can be written as UTF-8, which "
                    f"{half[0]!r}, half of a character, cannot."
                )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Request:
        """The request that a file records.

        Raises:
            RequestError: the record is not one of this version.
        """
        names = {one.name for one in dataclasses.fields(cls)}
        found = {name: value for name, value in metadata.items() if name in names}
        if missing := names - {"files"} - found.keys():  # which earlier versions did not record
            raise RequestError(f"The file's settings lack {', '.join(sorted(missing))}.")
        return cls(**found)

    def metadata(self, image: Image.Image) -> dict[str, Any]:
        """What goes into the image's file: the request, the image's size, and the versions of what made it."""
        return {**dataclasses.asdict(self), "size": list(image.size), "versions": dict(installed_versions())}

    @property
    def subject(self) -> str:
        """What the image shows, in words."""
        return self.prompt if self.prompt is not None else f"class {self.class_label}"

    def file_stem(self, more: Sequence[int | str | None] = ()) -> str:
        """A file name for this request alone: other settings or versions give another name.

        Args:
            more: what the file depends on beside it, such as the seeds of a sheet.
        """
        record = json.dumps([dataclasses.asdict(self), installed_versions(), list(more)], sort_keys=True)
        words = re.sub(r"[^a-z0-9]+", "-", (self.prompt or self.class_label or "image").lower()).strip("-")[:40]
        return f"{words or 'image'}-{self.seed}-{hashlib.sha256(record.encode()).hexdigest()[:8]}"


@functools.cache  # to look them up takes longer than all else of a file's name
def installed_versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that an image depends on."""
    found = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
