"""Autoguidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import nn

from ..base import Guidance
from ..branch import COND, Branch, Predictions
from ..errors import ParameterError
from ..parameters import parameter
from ..pins import check_listing, commit, listing_sha256
from ..run import Run, Step


@dataclass
class AutoGuidance(Guidance):
    """Autoguidance: away from what a worse version of the model predicts, under the same condition.

    $$ \\tilde\\epsilon = \\epsilon_1 + s\\,(\\epsilon_1 - \\epsilon_0) $$

    with the model's conditional prediction `\\epsilon_1` and that of a weaker one, `\\epsilon_0`: an earlier
    checkpoint, a smaller sibling, or the same weights without a LoRA. With classifier-free guidance the same term is
    added to its result. Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024,
    arXiv:2406.02507.

    Cost: one evaluation of the weaker model a step; none at scale 0 and outside its window. A weaker checkpoint is held
    in memory beside the model while the guidance is in use.
    """

    name: ClassVar[str] = "autoguidance"

    scale: float = parameter(1.0, "Strength s; 0 switches it off. (The paper counts w = s + 1.)", ge=0, off=0.0)
    weak: str | nn.Module | None = parameter(
        None,
        "The weaker denoiser: a folder or a repository on the Hub (of a model, or a pipeline with one), or a module.",
    )
    revision: str | None = parameter(None, "Branch, tag or commit of the repository.")
    files_sha256: str | None = parameter(None, "What the listing of a folder's files must hash to; recipes note it.")
    adapters: str | tuple[str, ...] | None = parameter(
        None, "In place of it: the LoRA to switch off, by adapter name, a list of names, or 'all'."
    )

    def pinned(self) -> Self:
        named = self.weak if isinstance(self.weak, str) else None
        found = self.files_sha256 or listing_sha256(named)
        return replace(self, revision=commit(named, self.revision), files_sha256=found)

    def setup(self, run: Run) -> None:
        if (self.weak is None) == (self.adapters is None):
            given = "neither" if self.weak is None else "both"
            raise ParameterError(
                f"{self.label}: {given} of weak and adapters given; allowed: one of them, weak='folder or repository "
                "of a weaker denoiser', or adapters='all' to switch a loaded LoRA off."
            )
        if isinstance(self.weak, str):
            if not run.dry:
                check_listing(self.weak, self.files_sha256, self.label)
            named = self.weak if self.revision is None else f"{self.weak}@{self.revision}"
            run.prepare_denoiser(named)
            run.state.weak = Branch("cond", denoiser=named)
        elif self.weak is not None:
            run.prepare_denoiser(self.weak)
            run.state.weak = Branch("cond", denoiser=self.weak)
        else:
            assert self.adapters is not None
            run.state.weak = Branch("cond", run.adapters(self.adapters))

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, step.state.weak) if self.scale > 0 else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        if self.scale == 0:
            return None
        return self.scale * (predictions[COND] - predictions[step.state.weak])
