"""The attention function of one layer, replaced or watched while the layer's own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..guidance.branch import AttentionTokens, Perturbation, Point


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
        tokens: the image tokens in a query of some length.
        processor: of the attention. It may say `appended_keys`, how many keys at the end are no part of the sequence
            but of a learned condition, and `crosses`, that it attends to another sequence just now.
    """

    def __init__(
        self, perturbation: Perturbation | None, kept: Mapping[Point, list[torch.Tensor]],
        tokens: Callable[[int], AttentionTokens], processor: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.processor = processor
        self.perturbation, self.kept, self.tokens = perturbation, kept, tokens
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
        if query.shape[-2] != key.shape[-2] - getattr(self.processor, "appended_keys", 0):
            self.passed_by = True
            return attend()
        self.acted = True
        keys, values = key, value
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            keys, values = (tensor.repeat_interleave(repeats, dim=-3) for tensor in (key, value))
        tokens = self.tokens(query.shape[-2])
        for point, kept in self.kept.items():
            kept.append(point.watch(query, keys, tokens, attn_mask, scale))
        if self.perturbation is None:
            return attend()
        return self.perturbation.attention(query, keys, values, tokens, attn_mask, scale)
