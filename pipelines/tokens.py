"""Which tokens of an attention are image tokens: seen by what a poisoned image taints.

Architectures join text and image in orders of their own: in the denoiser, before a block, inside an attention, among
the queries or among the keys only. But between two attentions every token is on its own. So the denoiser is entered
once with NaN for its sample and with attentions that let nothing pass from token to token; a layer's queries and keys
that are NaN then are those of image tokens. The call is left at the last layer that is asked for, and as only the taint
matters, no projection is computed: it costs no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..guidance.branch import AttentionTokens
from ..guidance.errors import UnsupportedPipelineError
from .families import Family
from .interception import outer_contexts_kept, tap_forward
from .prediction import sample_argument
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
    family: Family, layers: Sequence[str], original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Places]:
    """Where the image tokens lie in each of `layers`, for a denoiser call with these arguments.

    Raises:
        UnsupportedPipelineError: they cannot be told from others, or lie apart.
    """
    key = sample_argument(args, kwargs)
    args = [_poisoned(value) if index == key else value for index, value in enumerate(args)]
    kwargs = {name: _poisoned(value) if name == key else value for name, value in kwargs.items()}
    attentions = _Apart(family, set(layers))
    with ExitStack() as stack:
        for name, attention in family.attentions.items():
            tap_forward(stack, attention, attentions.watch(name))
        module: Any = family.module
        if getattr(module, "is_cache_enabled", False):
            stack.enter_context(outer_contexts_kept(module))
            stack.enter_context(module.cache_context("trimtab_tokens"))
        stack.enter_context(torch.no_grad())
        # Compiled parts run eagerly: neither traced with these attentions nor left in mid-graph.
        stance: Any = torch.compiler.set_stance
        stack.enter_context(stance("force_eager"))
        stack.enter_context(attentions)
        with suppress(_Seen):
            original(*args, **kwargs)
    return attentions.found


class _Seen(Exception):
    """All layers that were asked for have been seen."""


class _Apart(TorchFunctionMode):
    """Attention in which no token sees another; notes whose queries and keys are tainted."""

    def __init__(self, family: Family, wanted: set[str]) -> None:
        super().__init__()
        self.found: dict[str, Places] = {}
        self._family = family
        self._wanted = wanted
        self._layer = ""
        self._called = self._leaked = False

    def watch(self, name: str) -> Callable[..., Any]:
        """The wrapper of the attention `name`."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._layer, self._called = name, False
            output = original(*args, **kwargs)
            # Tokens have met in a way that is not seen here, so what is tainted later says nothing.
            self._leaked |= not self._called
            self._layer = ""
            if self._wanted <= set(self.found):
                raise _Seen
            return output

        return forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value"), args[:3], strict=False)), **kwargs}
        query, key, value = given["query"], given["key"], given["value"]
        self._called = True
        tainted = query.isnan().any(dim=-1)
        if self._layer in self._wanted:
            self._note(tainted, key.isnan().any(dim=-1))
        apart = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=value.dtype, device=value.device)
        return apart.masked_fill(tainted[..., None], float("nan"))

    def _linear(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A projection, of which only the taint matters; any clean values do that no norm divides by zero."""
        clean = torch.linspace(-1.0, 1.0, weight.shape[0], dtype=states.dtype, device=states.device)
        tainted = states.isnan().any(dim=-1, keepdim=True)
        return clean.expand(*states.shape[:-1], -1).masked_fill(tainted, float("nan"))

    def _note(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        found = Places(self._span(queries), self._span(keys) if bool(keys.any()) else None)
        before = self.found.get(self._layer)
        # A further attention inside the same layer, onto a condition alone, is none among image tokens.
        if before is None or before.keys is None:
            self.found[self._layer] = found

    def _span(self, tainted: torch.Tensor) -> AttentionTokens:
        """The tainted tokens of `[rows, heads, tokens]`."""
        rows = tainted.flatten(0, -2)
        where = rows[0].nonzero().flatten().tolist()
        span = AttentionTokens(where[0], where[-1] + 1) if where else AttentionTokens(0, 0)
        length = rows.shape[-1]
        kind, reason = type(self._family.module).__name__, ""
        if not where:
            reason = "holds no image tokens"
        elif span.stop - span.start != len(where):
            reason = "has its image tokens in several places"
        elif not bool((rows == rows[0]).all()):
            reason = "has its image tokens in another place for every prompt of the batch; guide one prompt at a time"
        elif self._leaked and len(where) == length:
            reason = "follows a layer whose attention is not scaled_dot_product_attention, so image tokens are not told"
        if reason:
            raise UnsupportedPipelineError(f"{kind}: {self._layer} {reason}, so it cannot be perturbed.")
        return span


def _poisoned(sample: Any) -> Any:
    return map_tensors(sample, lambda tensor, _: torch.full_like(tensor, float("nan")))
