"""Conditions: which rows carry the prompt, which the negative one, and how to ask the denoiser for another.

What the pipeline's own method encoded (`encoding.py`) is recognised in the denoiser's arguments, which tells the roles
of the rows; and for a branch with another prompt what that method makes of it takes the place of the first results. So
does what the call was given as negative beside its prompts (`negative_image_embeds`). Class-conditional denoisers are
handled by their `class_labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from ..guidance.branch import Condition, Prompt
from ..guidance.errors import UnsupportedPipelineError
from .controls import Controls
from .encoding import Encoder, beside_prompts, encoders_of
from .inline_encoding import InlineEncoder, encodes_inline
from .own_cfg import has_cfg
from .rows import map_tensors


class Conditions:
    """The conditions of one run of one pipeline."""

    def __init__(self, pipe: Any, call_arguments: Mapping[str, Any], stack: ExitStack) -> None:
        self._pipe = pipe
        self._call_arguments = call_arguments
        self._controls = Controls(pipe, stack)
        self._encoders: list[Encoder | InlineEncoder] = [
            Encoder(pipe, name, call_arguments, stack) for name in encoders_of(type(pipe))
        ]
        if not self._encoders and encodes_inline(pipe):
            self._encoders.append(InlineEncoder(pipe, call_arguments, stack))
        self._beside = beside_prompts(call_arguments)

    @property
    def perturbs_attention(self) -> bool:
        """Whether the pipeline has perturbed attention of its own."""
        return hasattr(self._pipe, "pag_scale")

    # -- roles -----------------------------------------------------------------------------------------------------
    def roles(self, module: Any, kwargs: Mapping[str, Any], rows: int) -> list[str] | None:
        """The role of each row, where the denoiser's arguments tell it beyond doubt; otherwise `None`."""
        labels = kwargs.get("class_labels")
        null = self._null_class(module)
        if isinstance(labels, torch.Tensor) and labels.shape == (rows,) and null is not None:
            missing = (labels == null).tolist()
            return ["cond"] * rows if all(missing) else ["uncond" if none else "cond" for none in missing]
        if not self._encoders and not self._beside.tensors:
            return None if has_cfg(self._pipe, self._call_arguments) else ["cond"] * rows
        known = [(role, tensor) for role, tensors in self._known() for tensor in tensors.values()]
        found: list[list[str]] = []

        def compare(tensor: torch.Tensor, name: str) -> torch.Tensor:
            if tensor.ndim and tensor.shape[0] == rows:
                roles = [_roles_of(row, known) for row in tensor]
                if self._are_both(roles, known):  # the prompt is the negative one: either half may be called either
                    roles = [{"uncond"}] * (rows // 2) + [{"cond"}] * (rows // 2)
                if all(len(one) == 1 for one in roles):
                    found.append([role for one in roles for role in one])
                    for encoding in (one for encoder in self._encoders for one in encoder.encodings):
                        encoding.keep_in(tensor)
            return tensor

        map_tensors(dict(kwargs), compare)
        return found[0] if found else None

    def roles_in_list(self, values: Sequence[Any], rows: int) -> list[str] | None:
        """The role of each row, where one of these is a list of what was encoded for each."""
        known = [(role, tensor[None]) for role, tensors in self._known() for tensor in tensors.values()]
        for value in values:
            if isinstance(value, list) and len(value) == rows and all(isinstance(one, torch.Tensor) for one in value):
                roles = [_roles_of(row, known) for row in value]
                if all(len(one) == 1 for one in roles):
                    return [role for one in roles for role in one]
        return None

    def _are_both(self, roles: Sequence[set[str]], known: Sequence[tuple[str, torch.Tensor]]) -> bool:
        """Whether prompt and negative prompt are one, in a call that holds both."""
        prompts = next((len(tensor) for role, tensor in known if role == "cond" and tensor.ndim), 0)
        return (
            has_cfg(self._pipe, self._call_arguments)
            and len(roles) == 2 * prompts
            and all(one == {"cond", "uncond"} for one in roles)
        )

    def _known(self) -> list[tuple[str, dict[str, torch.Tensor]]]:
        known = [("cond", self._beside.positive()), ("uncond", self._beside.negative())]
        for encoder in self._encoders:
            for position, encoding in enumerate(one for one in encoder.encodings if one.tells_roles):
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
        kind, labels, null = type(self._pipe).__name__, kwargs.get("class_labels"), self._null_class(module)
        if isinstance(labels, torch.Tensor) and not isinstance(condition, Prompt) and null is not None:
            return args, {**kwargs, "class_labels": torch.full_like(labels, null)}
        replaced, encoded = False, [encoder for encoder in self._encoders if encoder.encodings]
        if encoded or not isinstance(condition, Prompt):  # where nothing is a prompt, no text can take its place
            args, kwargs, found = _exchanged(args, kwargs, self._beside.positive(), self._beside.negative())
            replaced = found and not isinstance(condition, Prompt)
        for encoder in encoded:
            old = encoder.encodings[0].positive()
            if _exchanged(args, kwargs, old, old)[2]:
                args, kwargs, replaced = *_exchanged(args, kwargs, old, encoder.other(condition))[:2], True
        if replaced:
            return args, kwargs
        if not encoded:
            why = "it has neither prompts nor a null class"
            raise UnsupportedPipelineError(
                f"{kind}: there is no {condition!s} branch, because "
                f"{'nothing that it encodes was seen to be its prompt' if self._encoders else why}."
            )
        raise UnsupportedPipelineError(
            f"{kind}: what {encoded[0].name} returned is not found among the denoiser's arguments, so a branch with "
            "another prompt cannot be made. Use the pipeline's own guidance_scale and negative_prompt."
        )

    def _null_class(self, module: Any) -> int | None:
        if hasattr(self._pipe, "null_class"):
            return int(self._pipe.null_class)
        embeddings = getattr(getattr(module, "config", None), "num_embeds_ada_norm", None)
        # A DiT trained with label dropout holds its null class after the last one.
        return int(embeddings) if embeddings is not None and hasattr(self._pipe, "get_label_ids") else None


def _roles_of(row: torch.Tensor, known: Sequence[tuple[str, torch.Tensor]]) -> set[str]:
    return {role for role, tensor in known if any(_is_padded(other, row) for other in tensor)}


def _is_padded(encoded: torch.Tensor, row: torch.Tensor) -> bool:
    """Whether a row is what was encoded, lengthened with zeros where it is joined with a longer text."""
    if encoded.shape == row.shape:
        return torch.equal(row, encoded.to(row))
    if not row.ndim == encoded.ndim > 0 or row.shape[1:] != encoded.shape[1:] or len(encoded) >= len(row):
        return False
    return torch.equal(row[: len(encoded)], encoded.to(row)) and not row[len(encoded) :].any()


def _exchanged(
    args: Any, kwargs: Any, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]
) -> tuple[Any, Any, bool]:
    """Arguments with the tensors that equal one of `old` replaced, and whether one was; masks alone do not count.

    A mask that is not found may have been lengthened, as for the tokens of the image (Qwen-Image 2.1), and there is
    none for texts of one length.
    """
    found: dict[str, str] = {}

    def swap(tensor: torch.Tensor, name: str) -> torch.Tensor:
        for key, before, after in ((key, old[key], new[key]) for key in old if key in new):
            each = tensor.shape[0] // before.shape[0] if tensor.ndim == before.ndim and before.ndim else 1
            if each > 1:  # a video pipeline repeats the prompt for each frame
                before, after = before.repeat_interleave(each, 0), after.repeat_interleave(each, 0)
            if tensor.shape == before.shape and torch.equal(tensor, before.to(tensor)):
                found[key] = name
                return after.to(tensor)
        return tensor

    def lengthen(tensor: torch.Tensor, name: str) -> torch.Tensor:
        for key in (key for key in old if key in new and key not in found):
            before, after = old[key], new[key]
            if tensor.ndim != 2 or "mask" not in name or (tensor.dtype, len(tensor)) != (before.dtype, len(before)):
                continue
            length = before.shape[1] if before.ndim == 2 else tensor.shape[1]
            if length < tensor.shape[1] and torch.equal(tensor[:, :length], before.to(tensor)):
                return torch.cat([after.to(tensor), tensor[:, length:]], dim=1)
        return tensor

    args, kwargs = map_tensors((args, dict(kwargs)), swap)
    replaced = any(old[key].is_floating_point() for key in found)
    if replaced:
        args, kwargs = map_tensors((args, kwargs), lengthen)
        kwargs.update(_masks_of_other_length(kwargs, old, new, found))
    return args, kwargs, replaced


def _masks_of_other_length(
    kwargs: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any], found: Mapping[str, str]
) -> dict[str, Any]:
    """The masks that belong to only one of two prompts, as the other one's texts are all of one length.

    Args:
        found: the arguments in which the first prompt's tensors were, by their names.
    """
    masks = {f"{argument}_mask": f"{key}_mask" for key, argument in found.items()}
    return {name: new.get(key) for name, key in masks.items() if name in kwargs and (key in old) != (key in new)}
