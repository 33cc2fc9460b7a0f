"""Conditions: which rows carry the prompt, which the negative one, and how to ask the denoiser for another.

The pipeline's own `encode_prompt` is watched, not re-implemented. What it returned is recognised in the denoiser's
arguments, which tells the roles of the rows; and for a branch with another prompt the same method is called again and
its results take the place of the first ones. Class-conditional denoisers are handled by their `class_labels`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..guidance.branch import Condition, Prompt
from ..guidance.errors import UnsupportedPipelineError
from .controls import Controls
from .interception import tap_method
from .own_cfg import has_cfg
from .rows import map_tensors
from .source import returned_names


@dataclass(frozen=True)
class Encoding:
    """One call of `encode_prompt`: what it was given, and its tensors by the names in its return statement."""

    arguments: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]

    def positive(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.tensors.items() if not name.startswith("negative")}

    def negative(self) -> dict[str, torch.Tensor]:
        """The negative tensors under the names of their positive twins."""
        return {name.removeprefix("negative_"): v for name, v in self.tensors.items() if name.startswith("negative")}

    def keep_in(self, joined: torch.Tensor) -> None:
        """Keep tensors as rows of `joined`, where they are, so that no copy stays that the pipeline has let go of."""
        for name, tensor in self.tensors.items():
            if tensor.ndim and tensor.shape[1:] == joined.shape[1:] and tensor.dtype == joined.dtype:
                parts = (part for part in joined.split(len(tensor)) if torch.equal(part, tensor))
                self.tensors[name] = next(parts, tensor)


class Conditions:
    """The conditions of one run of one pipeline."""

    def __init__(self, pipe: Any, call_arguments: Mapping[str, Any], stack: ExitStack) -> None:
        self._pipe = pipe
        self._call_arguments = call_arguments
        self._encodings: list[Encoding] = []
        self._made: dict[Condition, dict[str, torch.Tensor]] = {}
        self._controls = Controls(pipe, stack)
        self._encode = getattr(pipe, "encode_prompt", None)
        if self._encode is not None:
            self._signature = inspect.signature(self._encode)
            self._names = returned_names(type(pipe).encode_prompt)
            tap_method(stack, pipe, "encode_prompt", self._watch)

    @property
    def perturbs_attention(self) -> bool:
        """Whether the pipeline has perturbed attention of its own."""
        return hasattr(self._pipe, "pag_scale")

    def _watch(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._encodings.append(self._encoding(self._signature.bind(*args, **kwargs), result))
        return result

    def _encoding(self, bound: inspect.BoundArguments, result: Any) -> Encoding:
        bound.apply_defaults()
        values = result if isinstance(result, (tuple, list)) else (result,)
        names = self._names if len(self._names) == len(values) else [f"output_{i}" for i in range(len(values))]
        tensors: dict[str, torch.Tensor] = {}
        for name, value in zip(names, values, strict=True):
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, list):  # one tensor a prompt, each as long as its text
                tensors.update({f"{name}.{i}": item for i, item in enumerate(value) if isinstance(item, torch.Tensor)})
        return Encoding(dict(bound.arguments), tensors)

    # -- roles -----------------------------------------------------------------------------------------------------
    def roles(self, module: Any, kwargs: Mapping[str, Any], rows: int) -> list[str] | None:
        """The role of each row, where the denoiser's arguments tell it beyond doubt; otherwise `None`."""
        labels = kwargs.get("class_labels")
        null = self._null_class(module)
        if isinstance(labels, torch.Tensor) and labels.shape == (rows,) and null is not None:
            missing = (labels == null).tolist()
            return ["cond"] * rows if all(missing) else ["uncond" if none else "cond" for none in missing]
        if self._encode is None:
            return None if getattr(self._pipe, "do_classifier_free_guidance", False) else ["cond"] * rows
        known = [(role, tensor) for role, tensors in self._known() for tensor in tensors.values()]
        found: list[list[str]] = []

        def compare(tensor: torch.Tensor, name: str) -> torch.Tensor:
            if tensor.ndim and tensor.shape[0] == rows:
                roles = [_roles_of(row, known) for row in tensor]
                if self._are_both(roles, known):  # the prompt is the negative one: either half may be called either
                    roles = [{"uncond"}] * (rows // 2) + [{"cond"}] * (rows // 2)
                if all(len(one) == 1 for one in roles):
                    found.append([role for one in roles for role in one])
                    for encoding in self._encodings:
                        encoding.keep_in(tensor)
            return tensor

        map_tensors(dict(kwargs), compare)
        return found[0] if found else None

    def _are_both(self, roles: Sequence[set[str]], known: Sequence[tuple[str, torch.Tensor]]) -> bool:
        """Whether prompt and negative prompt are one, in a call that holds both."""
        prompts = next((len(tensor) for role, tensor in known if role == "cond" and tensor.ndim), 0)
        return (
            has_cfg(self._pipe, self._call_arguments)
            and len(roles) == 2 * prompts
            and all(one == {"cond", "uncond"} for one in roles)
        )

    def _known(self) -> list[tuple[str, dict[str, torch.Tensor]]]:
        known: list[tuple[str, dict[str, torch.Tensor]]] = []
        for position, encoding in enumerate(self._encodings):
            known.append(("cond" if position == 0 else "uncond", encoding.positive()))
            known.append(("uncond", encoding.negative()))
        return known

    # -- other conditions ------------------------------------------------------------------------------------------
    def substitute(self, condition: Condition, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of rows that carry the prompt, with another condition in its place, and its controls.

        Raises:
            UnsupportedPipelineError: the pipeline has no such condition, or its embeddings are not among the arguments.
        """

        def prompted(model: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return self._prompted(condition, model, args, kwargs)

        return self._controls.of_other_prompt(condition, prompted(module, args, kwargs), self.roles, prompted)

    def controlled_at(self, args: Any, kwargs: Any, batch: int, sample: Any, x_t: Any) -> tuple[Any, Any]:
        """The arguments at another x_t, with the controls that belong to it; see `Controls.of_other_sample`."""
        return self._controls.of_other_sample((args, kwargs), batch, sample, x_t)

    def visiting(self) -> AbstractContextManager[None]:
        """See `Controls.visiting`."""
        return self._controls.visiting()

    def _prompted(self, condition: Condition, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with another condition in place of the prompt."""
        kind = type(self._pipe).__name__
        if isinstance(kwargs.get("class_labels"), torch.Tensor) and not isinstance(condition, Prompt):
            null = self._null_class(module)
            if null is None:
                raise UnsupportedPipelineError(f"{kind}: its denoiser has class labels but no null class.")
            return args, {**kwargs, "class_labels": torch.full_like(kwargs["class_labels"], null)}
        if self._encode is None or not self._encodings:
            raise UnsupportedPipelineError(
                f"{kind}: there is no {condition!s} branch, because this pipeline has neither prompts nor a null class."
            )
        if condition not in self._made:
            self._made[condition] = self._encode_other(condition)
        pairs = [
            (v, self._made[condition][n])
            for n, v in self._encodings[0].positive().items()
            if n in self._made[condition]
        ]
        replaced = []

        def swap(tensor: torch.Tensor, name: str) -> torch.Tensor:
            for old, new in pairs:
                each = tensor.shape[0] // old.shape[0] if tensor.ndim == old.ndim and old.ndim else 1
                if each > 1:  # a video pipeline repeats the prompt for each frame
                    old, new = old.repeat_interleave(each, 0), new.repeat_interleave(each, 0)
                if tensor.shape == old.shape and torch.equal(tensor, old.to(tensor)):
                    replaced.append(name)
                    return new.to(tensor)
            return tensor

        args, kwargs = map_tensors((args, dict(kwargs)), swap)
        if not replaced:
            raise UnsupportedPipelineError(
                f"{kind}: what encode_prompt returned is not found among the denoiser's arguments, so a branch with "
                "another prompt cannot be made. Use the pipeline's own guidance_scale and negative_prompt."
            )
        return args, kwargs

    def _encode_other(self, condition: Condition) -> dict[str, torch.Tensor]:
        first = self._encodings[0]
        arguments = dict(first.arguments)
        # Of what the call was given, the negatives are meant, unless the branch has a prompt of its own.
        if isinstance(condition, Prompt):
            negatives: dict[str, Any] = {"prompt": condition.text}
        else:
            given = self._call_arguments.items()
            negatives = {name.removeprefix("negative_"): v for name, v in given if name.startswith("negative_")}
            if arguments.get("do_classifier_free_guidance", True) and first.negative():
                return first.negative()
        text, count = negatives.get("prompt"), _batch_of(first)
        with torch.no_grad():
            if "do_classifier_free_guidance" in arguments:
                if not isinstance(arguments.get("prompt"), str):
                    text = _each(text, count)
                arguments.update({name: None for name in arguments if name.startswith("negative_")})
                arguments.update({f"negative_{n}": v for n, v in negatives.items() if f"negative_{n}" in arguments})
                arguments.update(do_classifier_free_guidance=True, negative_prompt=text)
                return self._encode_again(arguments).negative()
            for name in arguments:
                if negatives.get(name) is not None and name != "prompt":
                    arguments[name] = _each(negatives[name], count)
                elif name.startswith("pooled") or (name.startswith("prompt") and ("embeds" in name or "mask" in name)):
                    arguments[name] = None
                elif name == "prompt" or (name.startswith("prompt_") and isinstance(arguments[name], (str, list))):
                    arguments[name] = _each(text or "", count)
            return self._encode_again(arguments).positive()

    def _encode_again(self, arguments: dict[str, Any]) -> Encoding:
        assert self._encode is not None
        kwargs = arguments.pop("kwargs", {})
        bound = self._signature.bind(**arguments, **kwargs)
        return self._encoding(bound, self._encode(*bound.args, **bound.kwargs))

    def _null_class(self, module: Any) -> int | None:
        if hasattr(self._pipe, "null_class"):
            return int(self._pipe.null_class)
        embeddings = getattr(getattr(module, "config", None), "num_embeds_ada_norm", None)
        # A DiT trained with label dropout holds its null class after the last one.
        return int(embeddings) if embeddings is not None and hasattr(self._pipe, "get_label_ids") else None


def _roles_of(row: torch.Tensor, known: Sequence[tuple[str, torch.Tensor]]) -> set[str]:
    return {
        role
        for role, tensor in known
        if tensor.shape[1:] == row.shape and any(torch.equal(row, other.to(row)) for other in tensor)
    }


def _each(value: Any, count: int) -> Any:
    """A text once for each prompt; anything else as it is."""
    return [value] * count if isinstance(value, str) else list(value) if isinstance(value, tuple) else value


def _batch_of(encoding: Encoding) -> int:
    """How many prompts were encoded, before each becomes as many rows as there are images of it."""
    prompt, embeds = encoding.arguments.get("prompt"), encoding.arguments.get("prompt_embeds")
    if isinstance(prompt, str):
        return 1
    given = next((one for one in (prompt, embeds) if isinstance(one, (list, tuple, torch.Tensor))), None)
    return len(given) if given is not None else next(iter(encoding.tensors.values())).shape[0]
