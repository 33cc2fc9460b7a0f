"""The attention function of one layer, replaced or watched while the layer's own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..guidance.branch import AttentionTokens, Perturbation, Point
from ..guidance.errors import UnsupportedPipelineError
from .grids import Grid, grid_of
from .processors import Replaced
from .tokens import Places


def why_not(name: str, attention: nn.Module, kind: str, passed_by: bool) -> str:
    """Why a perturbation or a watching point of this kind did not act in an attention."""
    if passed_by:
        return (
            f"{name}: its queries attend to further keys, so there is no map among image tokens for {kind} to change."
        )
    return f"{name}: its processor {type(attention.processor).__name__} computed no attention, so {kind} cannot act."


def no_stand_in(name: str, attention: nn.Module, kind: str) -> str:
    """Why a perturbation or a watching point of this kind cannot act in an attention."""
    return (
        f"{name}: its processor {type(attention.processor).__name__} calls neither scaled_dot_product_attention nor "
        f"dispatch_attention_fn, so {kind} cannot act. Name other layers, use 'slg', which leaves whole blocks out, "
        "or, if you have set this processor, put back the one that the model was built with."
    )


def _split(attention: nn.Module, query: torch.Tensor) -> bool:
    """Whether only some of an attention's heads are in its queries, and the others in other processes."""
    weight = getattr(getattr(attention, "to_q", None), "weight", None)
    return isinstance(weight, DTensor) and weight.shape[0] > query.shape[-3] * query.shape[-1]


class AttentionReplaced(Replaced):
    """Replaces or watches the self-attention function; attention onto something of another length stays.

    Args:
        attention: the layer.
        processor: the stand-in of its processor. It may say `appended_keys`, how many keys at the end are no part of
            the sequence but of a learned condition, and `crosses`, that it attends to another sequence just now.
        perturbation: in place of the function; `None` to watch only.
        kept: where each point puts what it watches.
        places: where the image tokens are; `None` if there are no others.
        grids: the shapes that the picture of image tokens may have.
    """

    def __init__(
        self, attention: nn.Module, processor: Any, perturbation: Perturbation | None,
        kept: Sequence[tuple[Point, list[torch.Tensor]]], places: Places | None, grids: tuple[Grid, ...],
    ) -> None:  # fmt: skip
        super().__init__(attention, processor, self._attend)
        self.perturbation, self.kept = perturbation, kept
        self.places, self.grids = places, grids
        self.acted = self.passed_by = False

    def _attend(
        self, stock: Callable[[], torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attn_mask: torch.Tensor | None, scale: float | None, enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        if getattr(self.processor, "crosses", False):
            return stock()
        appended = getattr(self.processor, "appended_keys", 0)
        length, further = query.shape[-2], key.shape[-2] - appended - query.shape[-2]
        tokens = self._tokens(length, further)
        if tokens is None:
            self.passed_by = True
            return stock()
        self.acted = True
        keys, values, mask, square = key, value, attn_mask, query
        if further:
            # The image tokens attend to further keys. With a query for each of those, dropped again, the map is square.
            beside = (0, 0, tokens.start, length + further - tokens.stop)
            square = F.pad(query, beside)
            if mask is not None and mask.shape[-2] == length:
                mask = F.pad(mask, beside)
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            keys, values = (tensor.repeat_interleave(repeats, dim=-3) for tensor in (key, value))
        tokens = replace(tokens, grid=grid_of(tokens.stop - tokens.start, self.grids))
        if self.kept and _split(self._attention, query):
            raise UnsupportedPipelineError(
                "sag, or another guidance that watches attention: the heads of the denoiser's attentions are split "
                "over processes (tensor parallel), so none of them sees a whole map; allowed: attentions that each "
                "process computes whole, such as those of fully_shard."
            )
        for point, kept in self.kept:
            kept.append(point.watch(square, keys, tokens, mask, scale))
        if self.perturbation is None:
            return stock()
        output = self.perturbation.attention(square, keys, values, tokens, mask, scale)
        return output[..., tokens.start : tokens.stop, :] if further else output

    def _tokens(self, length: int, further: int) -> AttentionTokens | None:
        """The image tokens among the keys, for each of which there is a query; `None` if there are no such."""
        if self.places is None:
            return AttentionTokens(0, length) if not further else None
        queries, keys = self.places.queries, self.places.keys
        if keys is None or keys.stop - keys.start != queries.stop - queries.start:
            return None
        if not further:
            return keys if keys == queries else None
        return keys if further > 0 and queries == AttentionTokens(0, length) else None
