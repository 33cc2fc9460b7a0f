"""Prompts that a pipeline encodes in the midst of its call, as the first did (LDM): by a tokenizer and a text model.

Both are watched. The text of the call's own prompt tells which of their calls is the one to make again for another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from ..guidance.branch import Condition, Prompt
from .encoding import Encoding
from .interception import tap_call
from .prediction import primary
from .taps import set_attribute

_EMBEDS = "text_embeds"


def encodes_inline(pipe: Any) -> bool:
    """Whether a pipeline without an encoding method has a tokenizer and a text model, which its call can only use."""
    kind: Any = type(pipe)
    if "prompt" not in inspect.signature(kind.__call__).parameters:
        return False
    inner = any(isinstance(part, DiffusionPipeline) for part in vars(pipe).values())
    return not inner and callable(getattr(pipe, "tokenizer", None)) and bool(_text_models(pipe))


def _text_models(pipe: Any) -> list[nn.Module]:
    """Models of Transformers that may read text: those that embed tokens."""
    models = [part for part in pipe.components.values() if isinstance(part, PreTrainedModel)]
    return [model for model in models if any(isinstance(part, nn.Embedding) for part in model.modules())]


@dataclass(frozen=True)
class _Tokenized:
    """A call of the tokenizer."""

    text: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Read:
    """A call of a text model with what the tokenizer made of a text, and the states that it returned."""

    tokenized: _Tokenized
    original: Callable[..., Any]
    ids: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: torch.Tensor


class InlineEncoder:
    """The tokenizer and the text models of one pipeline, watched in a run; see `Encoder`, as which it serves."""

    name = "its text encoder"

    def __init__(self, pipe: Any, given: Mapping[str, Any], stack: ExitStack) -> None:
        self._given = given
        self._tokenizer = pipe.tokenizer
        self._tokenized: _Tokenized | None = None
        self._read: list[_Read] = []
        self._made: dict[Condition, dict[str, torch.Tensor]] = {}
        set_attribute(stack, pipe, "tokenizer", _Watched(pipe.tokenizer, self._watch_tokenizer))
        for model in _text_models(pipe):
            tap_call(stack, model, self._watch_model)

    @property
    def encodings(self) -> list[Encoding]:
        """That of the prompt and of its negative, once the prompt was read."""
        prompt, negative = self._call_of(self._given.get("prompt")), self._call_of(self._negative)
        if prompt is None:
            return []
        beside = {} if negative is None else {f"negative_{_EMBEDS}": negative.states}
        return [Encoding({}, {_EMBEDS: prompt.states, **beside})]

    def other(self, condition: Condition) -> dict[str, torch.Tensor]:
        """What takes the place of the prompt's states for rows of another condition."""
        known = {} if isinstance(condition, Prompt) else self.encodings[0].negative()
        if known:
            return known
        if condition not in self._made:
            text = condition.text if isinstance(condition, Prompt) else self._negative
            self._made[condition] = {_EMBEDS: self._states_of(text)}
        return self._made[condition]

    @property
    def _negative(self) -> Any:
        return self._given.get("negative_prompt") or ""

    def _call_of(self, text: Any) -> _Read | None:
        """The last call with a text, given once for all prompts or for each."""
        wanted = [text] if isinstance(text, str) else list(text or [])
        for read in reversed(self._read):
            seen = read.tokenized.text
            texts = [seen] if isinstance(seen, str) else list(seen)
            if texts in (wanted, wanted * len(texts)):
                return read
        return None

    def _states_of(self, text: Any) -> torch.Tensor:
        read = self._call_of(self._given.get("prompt"))
        assert read is not None
        count = len(read.states)
        texts = [text] * count if isinstance(text, str) else list(text)
        ids = self._tokenizer(texts, *read.tokenized.args, **read.tokenized.kwargs)["input_ids"].to(read.ids)
        with torch.no_grad():
            return primary(read.original(ids, *read.args, **read.kwargs))

    def _watch_tokenizer(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str) or (isinstance(text, (list, tuple)) and all(isinstance(one, str) for one in text)):
            self._tokenized = _Tokenized(text, args, kwargs)
        return self._tokenizer(text, *args, **kwargs)

    def _watch_model(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self._tokenized is not None and args and isinstance(args[0], torch.Tensor) and args[0].ndim == 2:
            read = _Read(self._tokenized, original, args[0], tuple(args[1:]), dict(kwargs), primary(output))
            self._tokenized = None
            self._read.append(read)
        return output


class _Watched:
    """A tokenizer whose calls go by another way; all else is its own."""

    def __init__(self, tokenizer: Any, call: Callable[..., Any]) -> None:
        self._tokenizer = tokenizer
        self._call = call

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(text, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
