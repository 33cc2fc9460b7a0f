"""Which components of a pipeline matter to guidance: its candidate denoisers and its schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import nn

from ..guidance.branch import Branch, Prompt
from ..guidance.errors import UnsupportedPipelineError
from .encoding import encoders_of
from .inline_encoding import encodes_inline

_BESIDE = ("ControlNet", "Adapter", "Encoder", "Connectors", "Upsampler", "SafetyChecker", "Vocoder")


def may_denoise(kind: type) -> bool:
    """Whether models of a class may be a denoiser: no autoencoder, and nothing that stands beside one."""
    # A UNet that a ControlNet-XS is grown into is one model with it.
    beside = any(word in kind.__name__ for word in _BESIDE) and not kind.__name__.startswith("UNet")
    return not hasattr(kind, "decode") and not beside


def parts_of(pipe: Any) -> dict[str, Any]:
    """The components by name, those included that a pipeline may be made without: `pipe.components` leaves them out."""
    # Not by `getattr`: Diffusers warns where a setting of its configuration is read as an attribute.
    registered = {name: vars(pipe).get(name) for name in getattr(pipe, "config", {})}
    made = {name: part for name, part in registered.items() if isinstance(part, (nn.Module, SchedulerMixin))}
    return {**made, **pipe.components}


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """The models that may be the denoiser, each once; which of them is shows at `scheduler.step`."""
    found: dict[int, nn.Module] = {}
    for component in parts_of(pipe).values():
        inner = getattr(component, "_orig_mod", component)
        if isinstance(inner, ModelMixin) and may_denoise(type(inner)):
            found.setdefault(id(component), component)
    return list(found.values())


def stages_of(pipe: Any) -> list[DiffusionPipeline]:
    """The pipelines that a combined one calls in turn; itself if it is none."""
    return [part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline)] or [pipe]


def schedulers_of(pipe: Any) -> list[Any]:
    """The schedulers, each once."""
    schedulers = [component for component in parts_of(pipe).values() if isinstance(component, SchedulerMixin)]
    return list({id(scheduler): scheduler for scheduler in schedulers}.values())


def check_guidable(pipe: Any) -> None:
    """Refuse a pipeline that has nothing to hold on to.

    Raises:
        UnsupportedPipelineError: it is no Diffusers pipeline, has no denoiser, or no scheduler with a `step`.
    """
    kind = pipe.__name__ if isinstance(pipe, type) else type(pipe).__name__
    if not isinstance(pipe, DiffusionPipeline):
        what = "a class, not a pipeline; load one first" if isinstance(pipe, type) else "not a Diffusers pipeline"
        raise UnsupportedPipelineError(
            f"{kind} cannot be guided: it is {what}. Needed: an instance of a DiffusionPipeline subclass, such as "
            "DiffusionPipeline.from_pretrained(...) returns."
        )
    present = ", ".join(name for name, component in parts_of(pipe).items() if component is not None) or "nothing"
    if not any(hasattr(scheduler, "step") for scheduler in schedulers_of(pipe)):
        raise UnsupportedPipelineError(
            f"{kind} cannot be guided: it has no scheduler with a step that guidance could join; it holds {present}."
        )
    if not denoisers_of(pipe):
        raise UnsupportedPipelineError(
            f"{kind} cannot be guided: it has no denoiser (a Diffusers model whose prediction goes to the scheduler); "
            f"it holds {present}."
        )


def check_condition(pipe: Any, branch: Branch, own: Sequence[Branch], asked_by: str) -> None:
    """Refuse a branch whose condition this pipeline can never have.

    Args:
        own: the branches that the pipeline computes by itself; those of their conditions can be had from these.

    Raises:
        UnsupportedPipelineError: an unconditional or other prompt is asked of a pipeline that takes no prompt, or of
            one that encodes it where it cannot be encoded again, and no class that could be left out.
    """
    kind: Any = type(pipe)
    if branch.condition in {known.condition for known in own} | {"cond"} or encoders_of(kind) or encodes_inline(pipe):
        return
    prompted = "prompt" in inspect.signature(kind.__call__).parameters
    labelled = hasattr(pipe, "null_class") or hasattr(pipe, "get_label_ids")
    guided = hasattr(pipe, "do_classifier_free_guidance") or hasattr(pipe, "guidance_scale")
    if isinstance(branch.condition, Prompt):
        why = f"because {_encodes(pipe)}" if prompted else "which takes no prompts"
        raise UnsupportedPipelineError(
            f"{asked_by}: prompt {branch.condition.text!r} cannot be given to {kind.__name__}, {why}."
        )
    if prompted and not guided:
        raise UnsupportedPipelineError(
            f"{asked_by} needs an unconditional prediction beside the conditional one, which {kind.__name__} does not "
            f"compute in this call, and which cannot be made, because {_encodes(pipe)}. Use the pipeline's own "
            "guidance_scale and negative_prompt, or a guidance that needs none, such as 'pag'."
        )
    if not labelled and not guided and not prompted:
        raise UnsupportedPipelineError(
            f"{asked_by} needs an unconditional prediction beside the conditional one, but {kind.__name__} has only "
            "one: it takes neither a prompt nor a class that could be left out. Use a guidance that needs no "
            "condition, such as 'pag'."
        )


def _encodes(pipe: Any) -> str:
    """Why a pipeline that takes a prompt cannot be asked to encode another."""
    inner = [name for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)]
    if inner:
        return (
            f"it hands its prompt to pipelines of its own ({', '.join(inner)}), of which the later are given what the "
            "earlier made of it; guide these by themselves"
        )
    return (
        "it makes of its prompt what its denoiser is given in the midst of its call, by no method or text encoder that "
        "could be called again for another"
    )
