"""Which tokens of an attention are image tokens: seen by what a poisoned image taints.

Architectures join text and image in orders of their own: in the denoiser, before a block, inside an attention, among
the queries or among the keys only. But between two attentions every token is on its own. So the denoiser is entered
once with NaN for its sample and with attentions that let nothing pass from token to token; a layer's queries and keys
that are NaN then are those of image tokens. The call is left at the last layer that is asked for, and as only the taint
matters, no projection is computed: it costs no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..guidance.branch import AttentionTokens
from ..guidance.errors import UnsupportedPipelineError
from .families import Family
from .interception import cache_hooks, outer_contexts_kept, tap_forward
from .prediction import sample_argument
from .processors import Replaced, stand_in
from .rows import map_tensors, tensors_in


@dataclass(frozen=True)
class Places:
    """Where the image tokens lie in one attention: among its queries, and among its keys (`None`: not at all)."""

    queries: AttentionTokens
    keys: AttentionTokens | None


def may_hold_others(family: Family, layers: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether other tokens than the image's may take part in these layers of a denoiser called like this.

    Not where text comes in by cross-attention alone, nor where nothing that could be tokens comes in at all.
    """
    if family.has_cross_attention and not any(family.is_joined(name) for name in layers):
        return False
    sample = sample_argument(args, kwargs)
    others = [
        *(value for index, value in enumerate(args) if index != sample),
        *(value for name, value in kwargs.items() if name != sample),
    ]
    return any(tensor.ndim >= 2 and tensor.is_floating_point() for tensor in tensors_in(others))


def locate(
    apart: Apart, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Places]:
    """Where the image tokens lie in each of the wanted layers, for a denoiser call with these arguments.

    Raises:
        UnsupportedPipelineError: they cannot be told from others, or lie apart.
    """
    key = sample_argument(args, kwargs)
    args = [_poisoned(value) if index == key else value for index, value in enumerate(args)]
    kwargs = {name: _poisoned(value) if name == key else value for name, value in kwargs.items()}
    module: Any = apart.family.module
    with ExitStack() as stack:
        for name, attention in apart.family.attentions.items():
            tap_forward(stack, attention, apart.watch(name))
        stack.enter_context(outer_contexts_kept(module))
        if cache_hooks(module) and hasattr(module, "cache_context"):
            stack.enter_context(module.cache_context("trimtab_tokens"))
        stack.enter_context(torch.no_grad())
        # Compiled parts run eagerly: neither traced with these attentions nor left in mid-graph.
        stance: Any = torch.compiler.set_stance
        stack.enter_context(stance("force_eager"))
        # Only inside: what guidances do around the call, such as encoding their condition, is as ever.
        tap_forward(stack, module, apart.inside)
        with suppress(_Seen):
            original(*args, **kwargs)
    return apart.all_found()


class _Seen(Exception):
    """All layers that were asked for have been seen."""


class Apart(TorchFunctionMode):
    """Attention in which no token sees another; notes whose queries and keys are tainted.

    Args:
        family: of the denoiser.
        wanted: the attentions asked for.

    Attributes:
        paused: whether attention is as ever, for a call inside that is no part of the denoiser's.
    """

    def __init__(self, family: Family, wanted: Sequence[str]) -> None:
        super().__init__()
        self.family, self.paused = family, False
        self._found: dict[str, Places] = {}
        self._wanted = set(wanted)
        self._layer = ""
        self._called = self._leaked = False

    def inside(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The wrapper of the denoiser's forward."""
        if self.paused:
            return original(*args, **kwargs)
        with self:
            return original(*args, **kwargs)

    def watch(self, name: str) -> Callable[..., Any]:
        """The wrapper of the attention `name`."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.paused:
                return original(*args, **kwargs)
            self._layer, self._called = name, False
            attention = self.family.attentions[name]
            # Its attention may be computed by other means than the common function: in slices, by another backend.
            other = stand_in(attention)
            with nullcontext() if other is None else Replaced(attention, other, self._attend):
                output = original(*args, **kwargs)
            # Tokens have met in a way that is not seen here, so what is tainted later says nothing.
            self._leaked |= not self._called
            self._layer = ""
            if self._wanted <= set(self._found):
                raise _Seen
            return output

        return forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        # A sharded projection is computed, since what follows wants its kind of tensor; taint spreads there as well.
        if func is F.linear and type(args[0]) is torch.Tensor:
            return self._linear(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value"), args[:3], strict=False)), **kwargs}
        return self._attend(func, given["query"], given["key"], given["value"])

    def _attend(self, stock: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        self._called = True
        taint = _taint(query)
        if self._layer in self._wanted:
            self._note(taint[..., 0].isnan(), _taint(key)[..., 0].isnan())
        return taint.to(value.dtype).repeat_interleave(value.shape[-1], dim=-1)

    def _linear(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A projection, of which only the taint matters; any clean values do that no norm divides by zero."""
        clean = torch.linspace(-1.0, 1.0, weight.shape[0], dtype=states.dtype, device=states.device)
        return clean + _taint(states)

    def all_found(self) -> dict[str, Places]:
        """The places in every wanted layer."""
        for name in self._wanted - set(self._found):
            raise self._refusal(name, "holds no image tokens")
        return self._found

    def _note(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if not bool(queries.any()):
            return
        found = Places(self._span(queries), self._span(keys) if bool(keys.any()) else None)
        before = self._found.get(self._layer)
        # A further attention inside the same layer, onto a condition alone, is none among image tokens.
        if before is None or before.keys is None:
            self._found[self._layer] = found

    def _span(self, tainted: torch.Tensor) -> AttentionTokens:
        """The tainted tokens of `[rows, heads, tokens]`."""
        rows = tainted.flatten(0, -2)
        where = rows[0].nonzero().flatten().tolist()
        if not bool((rows == rows[0]).all()):
            raise self._refusal(self._layer, "has its image tokens in another place for every prompt of the batch")
        if where[-1] + 1 - where[0] != len(where):
            raise self._refusal(self._layer, "has its image tokens in several places")
        if self._leaked and len(where) == rows.shape[-1]:
            raise self._refusal(self._layer, "follows a layer whose attention is not scaled_dot_product_attention")
        return AttentionTokens(where[0], where[-1] + 1)

    def _refusal(self, layer: str, reason: str) -> UnsupportedPipelineError:
        return UnsupportedPipelineError(
            f"{type(self.family.module).__name__}: {layer} {reason}, so it cannot be perturbed on image tokens only."
        )


def _taint(states: torch.Tensor) -> torch.Tensor:
    """NaN for each token of `[..., tokens, channels]` that has one, 0 for the others `[..., tokens, 1]`."""
    # A maximum of NaN and anything is NaN; this reads the states once and writes next to nothing.
    tainted = states.amax(dim=-1, keepdim=True).isnan()
    return torch.zeros_like(tainted, dtype=states.dtype).masked_fill(tainted, float("nan"))


def _poisoned(sample: Any) -> Any:
    return map_tensors(sample, lambda tensor, _: torch.full_like(tensor, float("nan")))
