"""Attention processors of a Flux transformer: one that records a condition's keys and values, one that attends to them.

Both repeat Diffusers' own processor; what differs from it is marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, _get_qkv_projections

from ..low_rank import LowRank

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
"""After norm and rotary embedding, each `[fills, tokens, heads, head_dim]`."""


class FillProcessor(FluxAttnProcessor):
    """A condition's tokens attend to themselves, with the LoRA; their keys and values are kept in `recorded`.

    Args:
        loras: by projection.
        weight: of the LoRA.
        last: whether nothing after this attention matters.
    """

    def __init__(self, loras: Mapping[str, LowRank], weight: float, last: bool) -> None:
        super().__init__()
        self.loras, self.weight, self.last = loras, weight, last
        self.recorded: KeysAndValues | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> Any:
        query, key, value = _get_qkv_projections(attn, hidden_states)[:3]
        # The LoRA, which text and image never see.
        query, key, value = (
            (states + self.weight * self.loras[name](hidden_states)).unflatten(-1, (-1, attn.head_dim))
            for name, states in (("q", query), ("k", key), ("v", value))
        )
        key = apply_rotary_emb(attn.norm_k(key), image_rotary_emb, sequence_dim=1)
        self.recorded = key, value
        if self.last:
            return torch.zeros_like(hidden_states)
        query = apply_rotary_emb(attn.norm_q(query), image_rotary_emb, sequence_dim=1)
        states = _attend(self, query, key, value, None)
        if encoder_hidden_states is None:
            return states
        states = attn.to_out[0](states)
        # It acts on the projection's output, bias included; no common LoRA does.
        states = states + self.weight * self.loras["proj"](states)
        return attn.to_out[1](states), encoder_hidden_states


class StepProcessor(FluxAttnProcessor):
    """Text and image attend to the conditions as well, whose keys and values are appended to their own.

    Attributes:
        memory: keys and values of the conditions that act.
        biases: `log s` of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: Sequence[KeysAndValues] = ()
        self.biases: Sequence[float] = ()

    @property
    def appended_keys(self) -> int:
        """Keys of the conditions, after those of text and image; what perturbs attention asks for it."""
        return sum(keys.shape[1] for keys, _ in self.memory)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        fills: tuple[torch.Tensor, ...] | None = None,
    ) -> Any:
        """`fills` says for each acting condition and each row which of its fills belongs to it; `None`: none acts."""
        if fills is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        states = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in states[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text = [part.unflatten(-1, (-1, attn.head_dim)) for part in states[3:]]
            query = torch.cat([attn.norm_added_q(text[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(text[1]), key], dim=1)
            value = torch.cat([text[2], value], dim=1)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        # The conditions.
        own = key.shape[1]
        chosen = [[_rows(part, index, key) for part in one] for one, index in zip(self.memory, fills, strict=True)]
        mask = self._mask(own, [keys.shape[1] for keys, _ in chosen], query)
        key = torch.cat([key, *(keys for keys, _ in chosen)], dim=1)
        value = torch.cat([value, *(values for _, values in chosen)], dim=1)

        attended = _attend(self, query, key, value, mask)
        if encoder_hidden_states is None:
            return attended
        written, seen = attended.split_with_sizes([own - hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](seen.contiguous())), attn.to_add_out(written.contiguous())

    def _mask(self, own: int, lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor | None:
        """`[1, 1, 1, keys]` with the biases on the conditions' columns; `None` where all are 0."""
        if not any(self.biases):
            return None
        parts = [like.new_full((n,), bias) for n, bias in zip(lengths, self.biases, strict=True)]
        return torch.cat([like.new_zeros(own), *parts])[None, None, None]


def _rows(states: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The fill of each row, where the layer computes; one fill for all rows is not copied."""
    states = states.to(like.device, non_blocking=True)
    return states.expand(len(index), *states.shape[1:]) if states.shape[0] == 1 else states[index]


def _attend(
    processor: FluxAttnProcessor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention `[batch, tokens, heads * head_dim]` by the backend that the transformer is set to."""
    states = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return states.flatten(2, 3).to(query.dtype)
