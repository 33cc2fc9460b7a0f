"""How a pipeline encodes its prompts: by which methods, what these returned in a run, and the same for another prompt.

A method is one that the pipeline's own call uses: `encode_prompt`, its variants for other inputs, or a private one such
as `_encode_prompt`. It is watched and called again, never re-implemented. Older ones return both prompts as rows of one
tensor, which are taken apart here, so that nobody else need know.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..guidance.branch import Condition, Prompt
from ..guidance.errors import UnsupportedPipelineError
from .interception import tap_method
from .source import joined_names, returned_names

_PRIVATE = re.compile(r"_?encode(_text|_prior)?_prompt")
_CFG = "do_classifier_free_guidance"


def encoders_of(kind: type) -> list[str]:
    """The methods of a pipeline class by which its call encodes a text prompt."""
    names = ["encode_prompt"] if hasattr(kind, "encode_prompt") else []
    call = inspect.unwrap(kind.__call__)
    if "prompt" not in inspect.signature(call).parameters:
        return names
    called = getattr(getattr(call, "__code__", None), "co_names", ())
    names += [name for name in called if name.startswith("encode_prompt_") and hasattr(kind, name)]
    return names + [name for name in called if _PRIVATE.fullmatch(name) and name not in names and hasattr(kind, name)]


@dataclass(frozen=True)
class Encoding:
    """One call of an encoding method: what it was given, and its tensors by the names in its return statement.

    Args:
        tells_roles: whether the tensors tell a row that carries the prompt from one that does not; where further rows
            have the negative prompt as well (InstructPix2Pix), or another text, they do not.
    """

    arguments: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]
    tells_roles: bool = True

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

    @property
    def batch(self) -> int:
        """How many prompts were encoded, before each becomes as many rows as there are images of it."""
        return _prompts_in(self.arguments) or next(iter(self.tensors.values())).shape[0]


def beside_prompts(given: Mapping[str, Any]) -> Encoding:
    """What a call was given beside its prompts both for them and for the negative ones, as Kandinsky's embeddings."""
    tensors: dict[str, torch.Tensor] = {}
    for name in given:
        pair = given[name], given.get(f"negative_{name}")
        found = [tensor for one in pair if (tensor := _as_tensor(one)) is not None]
        if "prompt" not in name and len(found) == 2:
            tensors.update({name: found[0], f"negative_{name}": found[1]})
    return Encoding({}, tensors)


class Encoder:
    """One encoding method of one pipeline, watched in a run.

    Args:
        given: the arguments of the pipeline's call.
    """

    def __init__(self, pipe: Any, name: str, given: Mapping[str, Any], stack: ExitStack) -> None:
        self.name = name
        self.encodings: list[Encoding] = []
        self._given = _lists_kept(given)
        self._method = getattr(pipe, name)
        self._signature = inspect.signature(self._method)
        written = getattr(type(pipe), name)
        self._names = returned_names(written)
        self._joined = {} if any(name.startswith("negative") for name in self._names) else joined_names(written)
        self._made: dict[Condition, dict[str, torch.Tensor]] = {}
        tap_method(stack, pipe, name, self._watch)

    def _watch(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.arguments = _lists_kept(bound.arguments)
        result = original(*args, **kwargs)
        self.encodings.append(self._encoding(bound, result))
        return result

    def _encoding(self, bound: inspect.BoundArguments, result: Any) -> Encoding:
        bound.apply_defaults()
        values = result if isinstance(result, (tuple, list)) else (result,)
        names = self._names if len(self._names) == len(values) else [f"output_{i}" for i in range(len(values))]
        tensors: dict[str, torch.Tensor] = {}
        tells = True
        for name, value in zip(names, values, strict=True):
            if isinstance(value, torch.Tensor):
                parts = self._taken_apart(name, value, bound.arguments)
                tensors.update(_named(name, parts) if parts else {name: value})
                tells &= len(parts) in (0, 2)
            elif isinstance(value, list):  # one tensor a prompt, each as long as its text
                tensors.update({f"{name}.{i}": item for i, item in enumerate(value) if isinstance(item, torch.Tensor)})
        return Encoding(dict(bound.arguments), tensors, tells)

    def _taken_apart(
        self, name: str, value: torch.Tensor, arguments: Mapping[str, Any]
    ) -> list[tuple[str, torch.Tensor]]:
        """The parts of which a tensor was joined, with their roles; none where it was not."""
        if not arguments.get(_CFG) or not value.ndim:
            return []
        each = next((n for key, n in arguments.items() if key.startswith("num_") and key.endswith("_per_prompt")), 1)
        orders, count = self._joined.get(name, []), _prompts_in(arguments)
        for order in orders:
            if len(value) == count * each * len(order) if count else len(orders) == 1:
                roles = ["cond" if part == name else "uncond" for part in order]
                return list(zip(roles, value.chunk(len(order)), strict=True))
        return []

    def other(self, condition: Condition) -> dict[str, torch.Tensor]:
        """What takes the place of the prompt's tensors for rows of another condition, by the same names."""
        if condition not in self._made:
            with torch.no_grad():
                self._made[condition] = self._encode_other(condition)
        return self._made[condition]

    def _encode_other(self, condition: Condition) -> dict[str, torch.Tensor]:
        first = self.encodings[0]
        arguments = dict(first.arguments)
        # Of what the call was given, the negatives are meant, unless the branch has a prompt of its own.
        if isinstance(condition, Prompt):
            negatives: dict[str, Any] = {"prompt": condition.text}
        else:
            given = self._given.items()
            negatives = {name.removeprefix("negative_"): v for name, v in given if name.startswith("negative_")}
            if arguments.get(_CFG, True) and first.negative():
                return first.negative()
        if _CFG in arguments and ("negative_prompt" in arguments or condition == "uncond"):
            return self._as_negative(arguments, negatives, first.batch)
        return self._as_prompt(arguments, negatives, first.batch)

    def _as_negative(self, arguments: dict[str, Any], given: Mapping[str, Any], count: int) -> dict[str, torch.Tensor]:
        """Another prompt in place of the negative one, which a method encodes beside the prompt."""
        text = given.get("prompt")
        if not isinstance(arguments.get("prompt"), str):
            text = _each(text, count)
        arguments.update({name: None for name in arguments if name.startswith("negative_")})
        arguments.update({f"negative_{n}": v for n, v in given.items() if f"negative_{n}" in arguments})
        arguments.update({_CFG: True} | ({"negative_prompt": text} if "negative_prompt" in arguments else {}))
        return self._encode_again(arguments).negative()

    def _as_prompt(self, arguments: dict[str, Any], given: Mapping[str, Any], count: int) -> dict[str, torch.Tensor]:
        """Another prompt in place of the prompt, where a method encodes one at a time, or has no negative one."""
        if _CFG in arguments:
            arguments[_CFG] = False
        for name in arguments:
            if given.get(name) is not None and name != "prompt":
                arguments[name] = _each(given[name], count)
            elif _is_encoded(name):
                arguments[name] = None
            elif name == "prompt" or (name.startswith("prompt_") and isinstance(arguments[name], (str, list))):
                text = given.get("prompt") or ""
                arguments[name] = self._within_more(arguments[name], text) or _each(text, count)
        return self._encode_again(arguments).positive()

    def _within_more(self, encoded: Any, text: Any) -> list[str]:
        """Another text in place of the call's own, where its prompts are encoded within more, as between pictures.

        Raises:
            UnsupportedPipelineError: a prompt is found there more than once.
        """
        asked = self._given.get("prompt")
        before, after, whole = ([one] if isinstance(one, str) else one or [] for one in (asked, text, encoded))
        if len(before) != len(whole) or not all(a and a in b and a != b for a, b in zip(before, whole, strict=True)):
            return []
        if any(b.count(a) > 1 for a, b in zip(before, whole, strict=True)):
            raise UnsupportedPipelineError(
                f"{self.name}: where the prompt {asked!r} lies in {whole[0]!r} is not known, so another cannot take "
                "its place. Use the pipeline's own guidance_scale and negative_prompt."
            )
        others = after * len(before) if len(after) == 1 else after
        return [b.replace(a, other) for a, b, other in zip(before, whole, others, strict=True)]

    def _encode_again(self, arguments: dict[str, Any]) -> Encoding:
        kwargs = arguments.pop("kwargs", {})
        bound = self._signature.bind(**arguments, **kwargs)
        return self._encoding(bound, self._method(*bound.args, **bound.kwargs))


def _lists_kept(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they are, although a pipeline may put other texts into their lists (Z-Image)."""
    return {name: [*value] if type(value) is list else value for name, value in arguments.items()}


def _prompts_in(arguments: Mapping[str, Any]) -> int:
    """How many prompts an encoding method was given; 0 where it was given something else."""
    given = (arguments.get("prompt"), arguments.get("prompt_embeds"))
    if isinstance(given[0], str):
        return 1
    return next((len(one) for one in given if isinstance(one, (list, tuple, torch.Tensor))), 0)


def _is_encoded(name: str) -> bool:
    """Whether an argument of an encoding method holds what would be encoded, encoded already."""
    if name.startswith(("pooled", "text_model_output", "text_attention_mask")):
        return True
    return name.startswith("prompt") and ("embeds" in name or "mask" in name)


def _as_tensor(value: Any) -> torch.Tensor | None:
    """A tensor, or several as one; nothing else."""
    several = isinstance(value, list) and bool(value) and all(isinstance(one, torch.Tensor) for one in value)
    return torch.cat(value) if several else value if isinstance(value, torch.Tensor) else None


def _named(name: str, parts: Sequence[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parts of a joined tensor as a method that returns them apart would name them."""
    by_role = dict(reversed(parts))
    return {name: by_role["cond"], f"negative_{name}": by_role["uncond"]}


def _each(value: Any, count: int) -> Any:
    """A text once for each prompt; anything else as it is."""
    return [value] * count if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
