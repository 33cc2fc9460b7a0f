"""Which components of a pipeline matter to guidance: its candidate denoisers and its schedulers."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import nn

from ..guidance.branch import Branch, Prompt
from ..guidance.errors import UnsupportedPipelineError

_BESIDE = ("ControlNet", "Adapter", "Encoder", "Connectors", "Upsampler", "SafetyChecker", "Vocoder")


def may_denoise(kind: type) -> bool:
    """Whether models of a class may be a denoiser: no autoencoder, and nothing that stands beside one."""
    return not hasattr(kind, "decode") and not any(word in kind.__name__ for word in _BESIDE)


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """The models that may be the denoiser, each once; which of them is shows at `scheduler.step`."""
    found: dict[int, nn.Module] = {}
    for component in pipe.components.values():
        inner = getattr(component, "_orig_mod", component)
        if isinstance(inner, ModelMixin) and may_denoise(type(inner)):
            found.setdefault(id(component), component)
    return list(found.values())


def stages_of(pipe: Any) -> list[DiffusionPipeline]:
    """The pipelines that a combined one calls in turn; itself if it is none."""
    return [part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline)] or [pipe]


def schedulers_of(pipe: Any) -> list[Any]:
    """The schedulers, each once."""
    schedulers = [component for component in pipe.components.values() if isinstance(component, SchedulerMixin)]
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
    present = ", ".join(name for name, component in pipe.components.items() if component is not None) or "nothing"
    if not any(hasattr(scheduler, "step") for scheduler in schedulers_of(pipe)):
        raise UnsupportedPipelineError(
            f"{kind} cannot be guided: it has no scheduler with a step that guidance could join; it holds {present}."
        )
    if not denoisers_of(pipe):
        raise UnsupportedPipelineError(
            f"{kind} cannot be guided: it has no denoiser (a Diffusers model whose prediction goes to the scheduler); "
            f"it holds {present}."
        )


def check_condition(pipe: Any, branch: Branch, asked_by: str) -> None:
    """Refuse a branch whose condition this pipeline can never have.

    Raises:
        UnsupportedPipelineError: an unconditional or other prompt is asked of a pipeline that takes no prompt, and no
            class that could be left out.
    """
    if branch.condition == "cond" or hasattr(pipe, "encode_prompt"):
        return
    kind = type(pipe).__name__
    if "prompt" in inspect.signature(type(pipe).__call__).parameters:
        encodes = f"{kind} encodes its prompts without a method encode_prompt, so another cannot be made"
        if isinstance(branch.condition, Prompt):
            raise UnsupportedPipelineError(f"{asked_by}: prompt {branch.condition.text!r}: {encodes}.")
        if not hasattr(pipe, "do_classifier_free_guidance") and not hasattr(pipe, "guidance_scale"):
            raise UnsupportedPipelineError(
                f"{asked_by} needs an unconditional prediction beside the conditional one, but {encodes}. Use the "
                "pipeline's own guidance_scale and negative_prompt, or a guidance that needs none, such as 'pag'."
            )
        return
    if isinstance(branch.condition, Prompt):
        raise UnsupportedPipelineError(
            f"{asked_by}: prompt {branch.condition.text!r} cannot be given to {kind}, which takes no prompts."
        )
    labelled = hasattr(pipe, "null_class") or hasattr(pipe, "get_label_ids")
    if not labelled and not hasattr(pipe, "do_classifier_free_guidance") and not hasattr(pipe, "guidance_scale"):
        raise UnsupportedPipelineError(
            f"{asked_by} needs an unconditional prediction beside the conditional one, but {kind} has only one: it "
            "takes neither a prompt nor a class that could be left out. Use a guidance that needs no condition, such "
            "as 'pag'."
        )
