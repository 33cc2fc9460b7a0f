"""Guidances that act in every phase and raise in one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import trimtab
from trimtab import COND, AttentionTokens, Branch, Guidance, Perturbation, Predictions, Run, Step, parameter


class Boom(Exception):
    """What fails on purpose here."""


@dataclass(frozen=True)
class FailingAttention(Perturbation):
    """Raises where it should attend."""

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: AttentionTokens,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        raise Boom("attention")


@dataclass(frozen=True)
class Passing(FailingAttention):
    """Changes nothing that matters: values instead of attention."""

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        return value


@dataclass
class Failing(Guidance):
    """Acts in every phase and raises in one of them, at the second step."""

    name: ClassVar[str] = "test.failing"
    log: ClassVar[list[str]] = []

    where: str = parameter("", "The hook that raises.")

    def reach(self, hook: str, step: Step | None = None) -> None:
        if hook == self.where and (step is None or (step.index > 0 and not step.state.dry)):
            raise Boom(hook)

    def setup(self, run: Run) -> None:
        run.state.dry = run.dry
        layers = run.attention_layers("auto")
        run.state.branch = Branch("cond", (FailingAttention if self.where == "attention" else Passing)(layers))
        if not run.dry:
            self.log.append("setup")
            self.reach("setup")

    def branches(self, step: Step) -> Sequence[Branch]:
        self.reach("branches", step)
        return (COND, step.state.branch)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        self.reach("delta", step)
        return predictions[COND] - predictions[step.state.branch]

    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        self.reach("project", step)
        return 0.5 * prediction

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        self.reach("guide_x0", step)
        return 0.5 * x0

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        self.reach("loss", step)
        return x0.square().flatten(1).sum(1)

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        self.reach("after_step", step)
        return 0.5 * sample

    def teardown(self, run: Run) -> None:
        if not run.state.dry:
            self.log.append("teardown")
            self.reach("teardown")


@dataclass
class FailingThroughTheDenoiser(Failing):
    """The same with a gradient graph kept through the denoiser."""

    name: ClassVar[str] = "test.failing_gradient"
    differentiate: ClassVar[str] = "x_t"


@contextmanager
def fails() -> Iterator[None]:
    """Before Python 3.11 an exception takes no note, so the one from a hook is the cause of one of ours."""
    with pytest.raises((Boom, trimtab.GuidanceRuntimeError)) as raised:
        yield
    assert isinstance(raised.value, Boom) or isinstance(raised.value.__cause__, Boom)
