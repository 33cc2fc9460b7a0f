"""What a guidance asks the denoiser for: a branch is one prediction, described by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .run import Step


@dataclass(frozen=True)
class Prompt:
    """A condition of the guidance's own: the pipeline's call with this text in place of its prompt."""

    text: str


Condition = str | Prompt
"""`"cond"` (what the user asked for), `"uncond"` (the empty or negative prompt, the null class), or a `Prompt`."""


@dataclass(frozen=True)
class AttentionTokens:
    """Where the image tokens lie in an attention's sequence; the others are text.

    Args:
        start, stop: the image tokens.
        grid: `(height, width)`, or `(frames, height, width)`, of the picture that they are, row by row; `None` where
            the denoiser's arguments do not tell.
    """

    start: int
    stop: int
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Perturbation:
    """A change in some layers of the denoiser: of their attention maps, if you subclass it and write `attention`.

    Two perturbations that compare equal (same class, same layers, same fields) are computed once. `SkippedBlocks` and
    `ScaledAdapters` are those that change no attention.

    Args:
        layers: full names of the modules, in the order in which the denoiser calls them.
    """

    layers: tuple[str, ...]

    @property
    def solitary(self) -> bool:
        """Whether its rows make a call of their own, without the companions that ride along beside others."""
        return False

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
            query, key, value: `[batch, heads, tokens, head_dim]`, after norm and rotary embedding. Key and value may
                have more tokens than the query, at their end: those of a learned condition, which all tokens attend to.
            tokens: which of them are image tokens.
            mask: what the layer adds to its logits (or a boolean mask), broadcastable to
                `[batch, heads, tokens, tokens]`, or `None`.
            scale: the factor on the logits; `None` stands for `1 / sqrt(head_dim)`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SkippedBlocks(Perturbation):
    """The blocks `layers` are left out: each hands on what it was given."""


@dataclass(frozen=True)
class ScaledAdapters(Perturbation):
    """Low-rank adapters (LoRA) loaded into `layers` act with another strength.

    Args:
        adapters: their names.
        factor: times the strength that they have been given; 0 is the model without them.
    """

    adapters: tuple[str, ...] = ()
    factor: float = 0.0


@dataclass(frozen=True)
class Point:
    """Another x_t at which a branch is evaluated; subclass it and write `sample`.

    Points are values: two that compare equal are computed once. A branch at another point is a denoiser call of its
    own, made when the parent's prediction is known.

    Args:
        parent: the branch whose prediction it is made from.
        layers: attentions to watch while that branch is computed.
    """

    parent: Branch
    layers: tuple[str, ...] = ()

    def sample(self, step: Step, prediction: torch.Tensor, watched: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The point `[batch, ...]`, shaped like `step.sample`.

        Args:
            step: with x_t, and `step.x0` and `step.epsilon` to read the prediction.
            prediction: the parent's.
            watched: by layer, what `watch` made of the parent's attention.
        """
        raise NotImplementedError

    def watch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        tokens: AttentionTokens,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        """What to keep of a watched layer's attention, `[batch, ...]`; the arguments are `Perturbation.attention`'s."""
        raise NotImplementedError


@dataclass(frozen=True)
class Branch:
    """One prediction: under which condition, under which perturbation, of which denoiser, at which point.

    Args:
        condition: `"cond"`, `"uncond"` or a `Prompt`.
        perturbation: what is changed inside the denoiser; `None` for nothing.
        denoiser: another one in place of the pipeline's: a checkpoint by folder, `repository` or
            `repository@revision`, or a module. Have it ready in `setup` by `run.prepare_denoiser`.
        point: where it is evaluated; `None` for x_t.
    """

    condition: Condition = "cond"
    perturbation: Perturbation | None = None
    denoiser: str | nn.Module | None = None
    point: Point | None = None

    @property
    def lineage(self) -> tuple[Branch, ...]:
        """What must be predicted before this branch, and last the branch itself."""
        return (self,) if self.point is None else (*self.point.parent.lineage, self)

    @property
    def apart(self) -> bool:
        """Whether it can only be a denoiser call of its own."""
        return self.denoiser is not None or self.point is not None or self.solitary

    @property
    def solitary(self) -> bool:
        """Whether no companions ride along beside it; see `Guidance.companions`."""
        return self.perturbation is not None and self.perturbation.solitary

    def __str__(self) -> str:
        words = [f"prompt {self.condition.text!r}" if isinstance(self.condition, Prompt) else self.condition]
        words += ["perturbed"] if self.perturbation is not None else []
        if self.denoiser is not None:
            words.append(f"by {self.denoiser if isinstance(self.denoiser, str) else type(self.denoiser).__name__}")
        words += [f"at {type(self.point).__name__}"] if self.point is not None else []
        return " ".join(words)


COND = Branch("cond")
UNCOND = Branch("uncond")

Predictions = Mapping[Branch, torch.Tensor]
"""Predictions by branch, each `[batch, ...]` in the scheduler's own parametrisation and shape."""
