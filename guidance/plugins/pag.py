"""Perturbed-attention guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..base import Guidance
from ..branch import COND, AttentionTokens, Branch, Perturbation, Predictions
from ..parameters import parameter
from ..run import Run, Step


@dataclass(frozen=True)
class IdentityAttention(Perturbation):
    """Each image token attends to itself (and to all text tokens, where text and image attend jointly).

    Without text tokens the attention map is the identity, and the output is `V`. Text tokens attend as ever, and so do
    all tokens to those of a learned condition.
    """

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: AttentionTokens,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        length, keys = query.shape[-2], key.shape[-2]
        if tokens.stop - tokens.start == length == keys:
            return value
        image = slice(tokens.start, tokens.stop)
        identity = query.new_zeros(length, keys)
        identity[image, image] = float("-inf")
        identity[image, image].fill_diagonal_(0)
        if mask is not None:
            identity = identity + (torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=identity.to(query.dtype), scale=scale)


@dataclass
class PAG(Guidance):
    """Perturbed-attention guidance: away from what the model predicts when it cannot see its own structure.

    $$ \\tilde\\epsilon = \\epsilon_c + s\\,(\\epsilon_c - \\hat\\epsilon_c) $$

    where `\\hat\\epsilon_c` is the conditional prediction with the self-attention maps of some layers replaced by the
    identity. With classifier-free guidance the same term is added to its result. Ahn et al., "Self-Rectifying Diffusion
    Sampling with Perturbed-Attention Guidance", ECCV 2024, arXiv:2403.17377.

    Cost: one more evaluation a step, none before its first perturbed layer; none at scale 0 and outside its window.
    """

    name: ClassVar[str] = "pag"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    scale: float = parameter(3.0, "Strength s; 0 switches it off. (The paper's code counts w = s + 1.)", ge=0, off=0.0)
    layers: str | tuple[str, ...] = parameter(
        "auto", "Perturbed self-attentions: 'auto', 'mid', 'd2', a block or attention by name or pattern, or a list."
    )
    adaptive_scale: float = parameter(
        0.0, "Decrease of the scale by timestep, s(t) = max(0, s - a (1000 - t)), as in Diffusers' PAG pipelines.", ge=0
    )

    def setup(self, run: Run) -> None:
        run.state.perturbed = Branch("cond", IdentityAttention(run.attention_layers(self.layers)))

    def scale_at(self, step: Step) -> float:
        """s(t)."""
        return max(0.0, self.scale - self.adaptive_scale * (1000.0 - step.timestep))

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, step.state.perturbed) if self.scale_at(step) > 0 else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        if self.scale_at(step) == 0:
            return None
        return self.scale_at(step) * (predictions[COND] - predictions[step.state.perturbed])
