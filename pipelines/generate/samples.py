"""One image from one request.

Images are made one at a time, each with its own seed. A batch would be faster on a large device, but matrix products
may round differently in another batch, and then a file could not be repeated bit for bit.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from transformers.utils import logging as transformers_logging

from ...guidance.base import Guidance
from ...guidance.errors import did_you_mean
from ...guidance.source import is_repository
from ..launch import launched
from ..loading import GuidedPipeline
from .request import Request, RequestError


def load_pipeline(request: Request) -> Any:
    """The request's model on its device, with its scheduler, and with the guidances that its own folder lists, if any.

    Raises:
        RequestError: no such device or scheduler.
        OSError: the Hub has no such repository, or cannot be reached.
    """
    options = {} if request.revision is None else {"revision": request.revision}
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    if launched():
        PartialState(cpu=request.device == "cpu")  # "cuda" is another one for each process from here on
    pipe = GuidedPipeline.from_pretrained(request.model, dtype=getattr(torch, request.dtype), **options)
    try:
        pipe.to(request.device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"--device: {request.device!r} cannot be used here: {error}") from error
    if request.scheduler is not None and request.scheduler != type(pipe.scheduler).__name__:
        pipe.scheduler = _scheduler(request.scheduler, pipe)
    return pipe


def resolve(request: Request, pipe: Any) -> Request:
    """The request with the model's defaults filled in, so that a later default does not change a repeated image.

    Raises:
        RequestError: an option that this model does not take; the message names what it takes instead.
    """
    takes = inspect.signature(pipe.__call__).parameters
    if "class_labels" in takes and request.prompt is not None:
        raise RequestError(f"{request.model} takes a class, not a prompt: {_classes(pipe)}")
    if "class_labels" in takes and request.class_label is None:
        raise RequestError(f"{request.model} needs a class: {_classes(pipe)}")
    if "class_labels" not in takes and request.class_label is not None:
        raise RequestError(f"--class: {request.model} takes a prompt, not a class: trimtab generate 'a red bicycle'")
    if "class_labels" not in takes and request.prompt is None:
        raise RequestError(f"{request.model} needs a prompt: trimtab generate 'a red bicycle'")
    for name in ("negative_prompt", "guidance_scale", "height", "width"):
        if getattr(request, name) is not None and name not in takes:
            raise RequestError(
                f"--{name.replace('_', '-')}: {request.model} ({type(pipe).__name__}) has no such option; leave it out."
            )
    filled: dict[str, Any] = {"scheduler": type(pipe.scheduler).__name__, "revision": _commit(request)}
    if Path(request.model).is_dir():
        filled["model"] = str(Path(request.model).resolve())
    if request.steps is None and "num_inference_steps" in takes:
        filled["steps"] = takes["num_inference_steps"].default
    if request.class_label is not None:
        _class(pipe, request.class_label)
    return dataclasses.replace(request, **filled)


def attach(pipe: Any, guidances: Mapping[str, Guidance]) -> None:
    """Give the pipeline these guidances and no others."""
    pipe.clear_guidance()
    for name, guidance in guidances.items():
        pipe.add_guidance(guidance, name=name)


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """The arguments of the pipeline's call, all but the generator."""
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None} | length_of_text(pipe)
    if request.class_label is not None:
        arguments["class_labels"] = [_class(pipe, request.class_label)]
    return arguments


def length_of_text(pipe: Any) -> dict[str, int]:
    """`max_sequence_length`, where the model was made for fewer tokens than its pipeline pads a prompt to."""
    taken = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    tokenizer = pipe.components.get("tokenizer_2") or pipe.components.get("tokenizer")
    longest = getattr(tokenizer, "model_max_length", None)
    if taken is None or longest is None or not longest < taken.default:
        return {}
    return {"max_sequence_length": int(longest)}


def generate(pipe: Any, request: Request) -> Image.Image:
    """One image, with the guidances that are attached to the pipeline.

    Args:
        pipe: from `load_pipeline`.
        request: from `resolve`.
    """
    generator = torch.Generator("cpu").manual_seed(request.seed)
    image = pipe(generator=generator, **call_arguments(pipe, request)).images[0]
    if not isinstance(image, Image.Image):
        raise RequestError(f"{request.model} ({type(pipe).__name__}) makes no image files.")
    return image


def _scheduler(name: str, pipe: Any) -> Any:
    known = sorted(word for word in dir(diffusers) if word.endswith("Scheduler") and not word.startswith("Flax"))
    if name not in known:
        own = type(pipe.scheduler).__name__
        fitting = sorted({kind.__name__ for kind in getattr(pipe.scheduler, "compatibles", ())} | {own})
        raise RequestError(
            f"--scheduler: Diffusers has no {name!r}.{did_you_mean(name, known)} "
            f"Those that share {own}'s settings: {', '.join(fitting)}."
        )
    return getattr(diffusers, name).from_config(pipe.scheduler.config)


def _commit(request: Request) -> str | None:
    """The commit that a Hub model was loaded from, so that the record stays exact when a branch moves on."""
    if not is_repository(request.model):
        return request.revision
    cached = try_to_load_from_cache(request.model, "model_index.json", revision=request.revision)
    return Path(cached).parent.name if isinstance(cached, str) else request.revision


def class_names(pipe: Any) -> dict[str, int]:
    """The model's classes: index by name; empty for a model without any."""
    if hasattr(pipe, "class_names"):
        return {name: index for index, name in enumerate(pipe.class_names)}
    return {str(name): int(index) for name, index in getattr(pipe, "labels", {}).items()}


def _class(pipe: Any, label: str) -> int | None:
    """A class given by name (any case) or index; `none` is no class, where the model knows that."""
    names = {name.lower(): index for name, index in class_names(pipe).items()}
    if label.lower() in names:
        return names[label.lower()]
    if label.isdecimal() and (int(label) in names.values() or not names):
        return int(label)
    if label.lower() == "none" and hasattr(pipe, "null_class"):
        return None
    raise RequestError(f"--class: no class {label!r}.{did_you_mean(label, class_names(pipe))} {_classes(pipe)}")


def _classes(pipe: Any) -> str:
    names = class_names(pipe)
    if not names:
        return "--class INDEX."
    listed = [f"{index} {name!r}" for name, index in names.items()]
    return f"--class NAME or INDEX, one of {', '.join(listed[:20])}{', ...' if len(listed) > 20 else ''}."
