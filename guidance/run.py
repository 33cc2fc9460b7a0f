"""What a guidance sees of one call of the pipeline: the run, a step of it, and calls of the denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from .branch import Branch, ScaledAdapters
from .errors import GuidanceRuntimeError
from .noise import Level, NoiseAlgebra

CLEAN = Level(1.0, 0.0)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class DenoiserCall(Protocol):
    """One forward call of the denoiser, the rows of branches that ride along included.

    Attributes:
        module: the denoiser.
        rows: the branch that each row predicts; the pipeline's own rows come first, and the rows of further branches
            follow in their order. `None` where it is not known; empty where nothing is.
    """

    module: torch.nn.Module

    @property
    def rows(self) -> tuple[Branch | None, ...]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's own forward."""

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments, all by name."""

    def apart(self, *args: Any, **kwargs: Any) -> Any:
        """The same forward, without gradient and unseen by step caches and perturbations: for other inputs."""


AroundDenoiser = Callable[["Step", DenoiserCall, tuple[Any, ...], Mapping[str, Any]], Any]
"""`around(step, call, args, kwargs)` returns what `call(*args, **kwargs)` would, its own rows where they were."""


class Run(Protocol):
    """What a guidance sees of one call of the pipeline. `state` belongs to this guidance and to this run alone.

    Attributes:
        exit_stack: undoes what is pushed on it, on every path; what asks is told the run's exception.
        dry: true while a plan is only explained; then download nothing, and keep nothing.
        own: the branches that the pipeline computes by itself.
        pictures: whether x_t is laid out as `[batch, channels, height, width]`, and not packed into tokens.
        pipeline: the pipeline, to be read only.
        arguments: of its call, defaults included.
    """

    state: SimpleNamespace
    exit_stack: ExitStack
    dry: bool
    own: tuple[Branch, ...]
    pictures: bool
    pipeline: Any
    arguments: Mapping[str, Any]

    def attention_layers(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        """Names of the self-attentions that `"auto"`, a name, a block or an anchored pattern stands for."""

    def skippable_blocks(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        """Names of the blocks that can be left out, by the same words."""

    def adapters(self, names: str | Sequence[str]) -> ScaledAdapters:
        """The perturbation that switches off loaded adapters (LoRA), by name, or `"all"`."""

    def prepare_denoiser(self, source: str | nn.Module) -> None:
        """Have the denoiser that branches name by `source` loaded, checked, and where the pipeline's is."""

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object until the run ends; then it is put back if it is still this one."""

    def fresh_scheduler(self) -> Any:
        """A copy of the pipeline's scheduler with this run's timesteps, at their beginning, for samples of one's own.

        It is to be had from the first denoiser call on; before, the timesteps are not set.
        """

    def around_denoiser(self, around: AroundDenoiser) -> None:
        """Put something around every call of the denoiser in this run; what was put there last is outermost."""

    def check_step(self, check: Callable[[Step], None]) -> None:
        """Have `check(step)` called before the first denoiser call, to refuse what does not fit this run.

        `step` is the run's first, with a blank sample: zero, of the run's shape, its rows the images or a multiple of
        them. `step.decode(step.sample)` is a blank image as large as the run's, at the cost of a decoding. Where the
        shape cannot be told before that call, nothing is called.
        """

    def attachment(self, kind: str) -> Any:
        """What attaches this kind of learned weights to the pipeline's denoiser: one for all guidances of a run.

        It is found by the denoiser's class through the entry-point group `trimtab.attachments`, where
        `"kind.DenoiserClass"` names a class that is built with `(run, denoiser)`.

        Raises:
            UnsupportedPipelineError: there is none for this denoiser; the message lists those that there are.
        """


@dataclass(frozen=True)
class Step:
    """One noise level of a run, as a guidance sees it.

    Args:
        index: 0 for the first, noisiest level.
        count: number of noise levels of the run.
        timestep: what the scheduler calls this level.
        level: alpha and sigma of `x_t = alpha x_0 + sigma n`.
        sample: x_t `[batch, ...]`; `None` where only the plan is made.
        own: the prediction that the pipeline arrived at by itself, its own CFG included; `None` likewise.
        state: this guidance's state in this run.
        algebra: converts predictions; `None` where the scheduler is not understood and nothing needs it.
        points: where those branches were evaluated that were not at x_t, each like `sample`.
        evaluation: 0 for the first call of the scheduler at this level, 1 for the second of a Heun pair.
        next_level: where the scheduler's step leads; alpha 1 and sigma 0 after the last one.
        decode: the image `[batch, channels, height, width]`, about -1..1, of a clean sample; differentiable, and one
            tensor is decoded once for all guidances. The identity where the pipeline has no autoencoder.
        encode: the clean sample of an image.
    """

    index: int
    count: int
    timestep: float
    level: Level
    sample: torch.Tensor | None = None
    own: torch.Tensor | None = None
    state: SimpleNamespace = dataclasses.field(default_factory=SimpleNamespace)
    evaluation: int = 0
    next_level: Level = CLEAN
    decode: Callable[[torch.Tensor], torch.Tensor] = _itself
    encode: Callable[[torch.Tensor], torch.Tensor] = _itself
    algebra: NoiseAlgebra | None = None
    points: Mapping[Branch, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def in_pixels(self) -> bool:
        """Whether a sample is an image as it is: the pipeline has no autoencoder."""
        return self.decode is _itself

    def x0(self, prediction: torch.Tensor) -> torch.Tensor:
        """The clean estimate that a prediction at x_t stands for; the plug-in's `needs` must hold `"level"`."""
        algebra, sample = self._noise_view()
        return algebra.x0(prediction, sample, self.level)

    def epsilon(self, prediction: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """The noise that a prediction stands for, at x_t or at another point; the plug-in needs `"level"` as well."""
        algebra, sample = self._noise_view()
        return algebra.epsilon(prediction, sample if at is None else at, self.level)

    def from_epsilon(self, noise: torch.Tensor) -> torch.Tensor:
        """The prediction at x_t that stands for a noise; the plug-in needs `"level"` as well."""
        algebra, sample = self._noise_view()
        return algebra.from_epsilon(noise, sample, self.level)

    def _noise_view(self) -> tuple[NoiseAlgebra, torch.Tensor]:
        if self.algebra is None or self.sample is None:
            raise GuidanceRuntimeError(
                "x_t and its noise level are not known here; declare needs = frozenset({'level'}) on the plug-in."
            )
        return self.algebra, self.sample
