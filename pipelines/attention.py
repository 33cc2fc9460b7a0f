"""The attention function of one layer, replaced or watched while the layer's own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..guidance.branch import AttentionTokens, Perturbation, Point
from .tokens import Places


def why_not(name: str, attention: nn.Module, kind: str, passed_by: bool) -> str:
    """Why a perturbation or a watching point of this kind did not act in an attention."""
    if passed_by:
        return (
            f"{name}: its queries attend to further keys, so there is no map among image tokens for {kind} to change."
        )
    return (
        f"{name}: its processor {type(attention.processor).__name__} does not call scaled_dot_product_attention, "
        f"so {kind} cannot act. Use the default processors: pipe.unet.set_default_attn_processor(), or no attention "
        "slicing and the 'native' attention backend."
    )


class AttentionReplaced(TorchFunctionMode):
    """Replaces or watches the self-attention function; attention onto something of another length stays.

    Args:
        perturbation: in place of the function; `None` to watch only.
        kept: where each point puts what it watches.
        places: where the image tokens are; `None` if there are no others.
        on_grid: adds to image tokens where they lie in the picture.
        processor: of the attention. It may say `appended_keys`, how many keys at the end are no part of the sequence
            but of a learned condition, and `crosses`, that it attends to another sequence just now.
    """

    def __init__(
        self, perturbation: Perturbation | None, kept: Mapping[Point, list[torch.Tensor]],
        places: Places | None, on_grid: Callable[[AttentionTokens], AttentionTokens], processor: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.perturbation, self.kept = perturbation, kept
        self.places, self.on_grid, self.processor = places, on_grid, processor
        self.acted = self.passed_by = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        def attend() -> torch.Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        if getattr(self.processor, "crosses", False):
            return attend()
        appended = getattr(self.processor, "appended_keys", 0)
        length, further = query.shape[-2], key.shape[-2] - appended - query.shape[-2]
        tokens = self._tokens(length, further)
        if tokens is None:
            self.passed_by = True
            return attend()
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
        tokens = self.on_grid(tokens)
        for point, kept in self.kept.items():
            kept.append(point.watch(square, keys, tokens, mask, scale))
        if self.perturbation is None:
            return attend()
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
