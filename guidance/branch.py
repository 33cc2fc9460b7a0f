"""What a guidance asks the denoiser for: a branch is one prediction, described by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompt:
    """A condition of the guidance's own: the pipeline's call with this text in place of its prompt."""

    text: str


Condition = str | Prompt
"""`"cond"` (what the user asked for), `"uncond"` (the empty or negative prompt, the null class), or a `Prompt`."""


@dataclass(frozen=True)
class AttentionTokens:
    """Where the image tokens lie in an attention's sequence; the others are text."""

    start: int
    stop: int


@dataclass(frozen=True)
class Perturbation:
    """A change of the attention map in some layers; subclass it and write `attention`.

    Two perturbations that compare equal (same class, same layers, same fields) are computed once.

    Args:
        layers: full names of the attention modules, in the order in which the denoiser calls them.
    """

    layers: tuple[str, ...]

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: AttentionTokens,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        """The layer's attention output, instead of `softmax(scale Q K^T + mask) V`.

        Args:
            query, key, value: `[batch, heads, tokens, head_dim]`, after norm and rotary embedding.
            tokens: which of them are image tokens.
            mask: what the layer adds to its logits (or a boolean mask), broadcastable to
                `[batch, heads, tokens, tokens]`, or `None`.
            scale: the factor on the logits; `None` stands for `1 / sqrt(head_dim)`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Branch:
    """One prediction of the denoiser: which condition, under which perturbation."""

    condition: Condition = "cond"
    perturbation: Perturbation | None = None

    def __str__(self) -> str:
        condition = f"prompt {self.condition.text!r}" if isinstance(self.condition, Prompt) else self.condition
        return condition if self.perturbation is None else f"{condition} perturbed"


COND = Branch("cond")
UNCOND = Branch("uncond")

Predictions = Mapping[Branch, torch.Tensor]
"""Predictions by branch, each `[batch, ...]` in the scheduler's own parametrisation and shape."""
