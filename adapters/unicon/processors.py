"""Attention of a transformer block in which each row has several entries: the image, then its partners.

Self-attention and joint attention share the base projections; the joint attention of a pair is

    h_x += w post(attn(Q from x; K, V from y)),    h_y += w post(attn(Q from y; K, V from x))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn import functional as F

from .checkpoint import Loras


@dataclass(frozen=True)
class Pair:
    """One model between two entries, in one block.

    Args:
        x, y: the entries.
        x_loras, y_loras: of the joint attention, on either side's tokens.
        post: of its output.
        weight: w.
    """

    x: int
    y: int
    x_loras: Loras
    y_loras: Loras
    post: torch.Tensor
    weight: float


class JointProcessor(AttnProcessor2_0):
    """In place of `AttnProcessor2_0`; the same as that one until it is called with `joined`.

    Args:
        own: the LoRAs of each entry in this attention; empty for an image.
        pairs: of a block's self-attention; none for its cross-attention.

    Attributes:
        crosses: whether it attends from one side to the other just now; a perturbation leaves that alone.
    """

    def __init__(self, own: Sequence[Loras], pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.own, self.pairs = own, pairs
        self.crosses = False

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        joined: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`joined` `[rows]` says which rows' entries attend to each other; `None`: rows are single images."""
        if joined is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = {"to_q": hidden_states, "to_k": seen, "to_v": seen}
        base = {name: attn.get_submodule(name)(states) for name, states in inputs.items()}
        query, key, value = (self._with_loras(base[name], inputs[name], name, len(joined)) for name in inputs)
        mask = _for_heads(attn, attention_mask, seen, len(hidden_states))
        attended = _attend(attn, query, key, value, mask)
        output = self._with_loras(attn.to_out[0](attended), attended, "to_out.0", len(joined))
        rows = joined.nonzero().flatten().to(hidden_states.device)
        if self.pairs and len(rows):
            entries = len(hidden_states) // len(joined)
            output = output.unflatten(0, (len(joined), entries)).clone()
            parts = {n: s.unflatten(0, (len(joined), entries))[rows] for n, s in {**base, "in": hidden_states}.items()}
            for pair in self.pairs:
                both = self._joint(attn, pair, parts)
                for entry, states in zip((pair.x, pair.y), both, strict=True):
                    output[rows, entry] += pair.weight * states
            output = output.flatten(0, 1)
        return attn.to_out[1](output)

    def _with_loras(self, output: torch.Tensor, given: torch.Tensor, name: str, rows: int) -> torch.Tensor:
        """A projection's output with what each entry's own LoRA adds to it."""
        if not any(self.own):
            return output
        output, given = (states.unflatten(0, (rows, len(self.own))) for states in (output.clone(), given))
        for entry, loras in enumerate(self.own):
            if loras:
                output[:, entry] += loras[name](given[:, entry])
        return output.flatten(0, 1)

    def _joint(self, attn: Any, pair: Pair, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The joint attention's output on x and on y, each `[rows, tokens, width]`."""
        sides = ((pair.x, pair.x_loras), (pair.y, pair.y_loras))
        query, key, value = (
            [parts[name][:, entry] + loras[name](parts["in"][:, entry]) for entry, loras in sides]
            for name in ("to_q", "to_k", "to_v")
        )
        self.crosses = True
        try:
            attended = _attend(attn, torch.cat(query), torch.cat(key[::-1]), torch.cat(value[::-1]), None)
        finally:
            self.crosses = False
        output = attn.to_out[0](attended).chunk(2)
        x, y = (
            states + loras["to_out.0"](given)
            for states, given, (_, loras) in zip(output, attended.chunk(2), sides, strict=True)
        )
        post = pair.post.to(x)
        if post.shape[0] == x.shape[-1]:
            return F.linear(x, post), F.linear(y, post)
        x, y = F.linear(torch.cat([x, y], dim=-1), post).chunk(2, dim=-1)
        return x, y


def _for_heads(attn: Any, mask: torch.Tensor | None, seen: torch.Tensor, rows: int) -> torch.Tensor | None:
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask, seen.shape[1], rows)
    return mask.view(rows, attn.heads, -1, mask.shape[-1])


def _attend(
    attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of `[rows, tokens, width]`, before the output projection."""
    query, key, value = (states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in (query, key, value))
    states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return states.transpose(1, 2).flatten(2).to(query.dtype)
