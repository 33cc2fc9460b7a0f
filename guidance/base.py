"""The hook interface: what a guidance is.

| phase | hook | may do |
| --- | --- | --- |
| 1 setup | `setup(run)` | encode a condition, resolve layers, install weights through the run's exit stack |
| 2 branches | `branches(step)` | declare the predictions that it needs |
| 3 delta | `delta(step, predictions)` | return a term that is added to the prediction |
| 4 project | `project(step, prediction, predictions)` | reshape the sum |
| 5 clean | `guide_x0(step, x0)` or `loss(step, x0)` | edit the clean estimate, or give a loss whose gradient edits it |
| 5 clean | `renoise(step, noise, predictions)` | choose the noise that the scheduler's step adds back to it |
| 6 sample | `after_step(step, sample)` | edit the sample after the scheduler |
| 7 teardown | `teardown(run)` | release; always called |

All hooks are optional. Deltas commute; phases 4 to 6 run in registration order unless `before`/`after` say otherwise.
Three more say how a step is computed: `repeats(step)` evaluates it several times over (recurrence),
`with_respect_to(step)` and `reshape_gradient(step, gradient)` concern the gradient of `loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from .branch import Branch, Predictions
from .errors import ParameterError
from .parameters import check_value, fields_of, parameter, unknown_parameter
from .run import Run, Step
from .wording import shown

API_VERSION = "1.0"


@dataclass(kw_only=True)
class Guidance:
    """Base class of all guidances. Subclass it as a dataclass whose fields are made with `parameter(...)`.

    Class attributes:
        name: the plug-in's public name.
        exclusive: a slot that only one attached guidance may claim, such as `"cfg"`.
        before, after: names of guidances that phases 4 to 6 of this one must precede or follow.
        needs: of `"attention"`, `"gradient"`, `"level"` (known noise levels): what pipeline and scheduler must offer.
        differentiate: `"x0"` if `loss` is differentiated with respect to the clean estimate only, `"x_t"` if through
            the denoiser, `"sample"` if it is a loss of `step.sample` as it stands.
        deprecated: what to use instead, in a sentence; creating it then warns.
        repeatable: whether it may act in a step that another guidance has evaluated several times; not if its
            `after_step` moves something of its own.
    """

    name: ClassVar[str] = ""
    api_version: ClassVar[str] = API_VERSION
    exclusive: ClassVar[str | None] = None
    before: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    differentiate: ClassVar[str] = "x0"
    deprecated: ClassVar[str] = ""
    repeatable: ClassVar[bool] = True

    start: float = parameter(
        0.0, "First part of the run in which it acts, as a fraction of the noise levels.", ge=0, le=1
    )
    stop: float = parameter(1.0, "End of that part: it acts while start <= index / count < stop.", ge=0, le=1)
    sigma_max: float = parameter(
        math.inf, "It acts only while sigma / alpha is at most this.", ge=0, unit="noise per signal", finite=False
    )
    sigma_min: float = parameter(
        0.0, "It acts only while sigma / alpha is at least this.", ge=0, unit="noise per signal"
    )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__repr__" not in vars(cls):
            # Else the dataclass makes one that prints whole tensors; mypy knows no assignment of methods.
            cls.__repr__ = Guidance.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={shown(value)}" for name, value in self.parameters.items())
        return f"{type(self).__qualname__}({values})"

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in fields_of(type(self)):
            raise unknown_parameter(self.label, name, type(self))
        object.__setattr__(self, name, check_value(self.label, type(self), name, value))

    def __post_init__(self) -> None:
        self.validate()

    @property
    def label(self) -> str:
        """The name that messages use."""
        return type(self).name or type(self).__name__

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters and their values."""
        return {name: getattr(self, name) for name in fields_of(type(self))}

    def validate(self) -> None:
        """Check what concerns several parameters at once; called when built and before each run.

        Raises:
            ParameterError: naming the parameters and what is allowed.
        """
        for low, high in (("start", "stop"), ("sigma_min", "sigma_max")):
            if getattr(self, low) > getattr(self, high):
                raise ParameterError(
                    f"{self.label}: {low}={getattr(self, low):g} lies after {high}={getattr(self, high):g}; "
                    f"allowed: {low} <= {high}."
                )

    def pinned(self) -> Self:
        """This guidance as a recipe keeps it: with the commit or the hash of each file that it loads; see `pins.py`."""
        return self

    def acts(self, step: Step) -> bool:
        """Whether the step lies in this guidance's window; outside it, it costs nothing."""
        inside = self.start <= step.index / step.count < self.stop
        if (self.sigma_min, self.sigma_max) == (0.0, math.inf):
            return inside  # at a level that nobody knows as well
        return inside and self.sigma_min <= step.level.ratio <= self.sigma_max

    def companions(self, step: Step) -> int:
        """Images that ride along beside the pipeline's own in each evaluation of this step, such as a partner.

        Not in those of branches whose perturbation is `solitary`.
        """
        return 0

    def companions_apart(self, step: Step) -> int:
        """Images that are predicted in a call of their own, under each condition of the pipeline's own predictions."""
        return 0

    # -- hooks -----------------------------------------------------------------------------------------------------
    def setup(self, run: Run) -> None:
        """Phase 1: prepare `run.state`."""

    def branches(self, step: Step) -> Sequence[Branch]:
        """Phase 2: the predictions that this step needs; none where the guidance is switched off."""
        return ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        """Phase 3: the term `[batch, ...]` to add to the prediction."""
        return None

    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        """Phase 4: the reshaped prediction `[batch, ...]`."""
        return prediction

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        """Phase 5: the edited clean estimate `[batch, ...]`."""
        return x0

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor | None:
        """Phase 5: a loss `[batch]`; the clean estimate moves against its gradient."""
        return None

    def renoise(self, step: Step, noise: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        """Phase 5: the noise `[batch, ...]` that the scheduler's step adds back to the clean estimate.

        The scheduler is given the x_t and the prediction that are made of that clean estimate and this noise. Only for
        schedulers whose step depends on nothing else.
        """
        return noise

    def with_respect_to(self, step: Step) -> str:
        """Phase 5: what `loss` is differentiated with respect to in this step; see `differentiate`."""
        return self.differentiate

    @property
    def shares_backward(self) -> bool:
        """Whether the gradient of `loss` may be taken together with those of others, in one backward pass."""
        return not self.overrides("reshape_gradient")

    def reshape_gradient(self, step: Step, gradient: torch.Tensor) -> torch.Tensor:
        """Phase 5: what is taken off the clean estimate, given the gradient `[batch, ...]` of this `loss`."""
        return gradient

    def repeats(self, step: Step) -> int:
        """How often the step is evaluated; between two evaluations its outcome is noised back to x_t."""
        return 1

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        """Phase 6: the edited next sample `[batch, ...]`."""
        return sample

    def teardown(self, run: Run) -> None:
        """Phase 7: release what setup took; called on every path."""

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether this class defines a hook of its own."""
        return getattr(cls, hook) is not getattr(Guidance, hook)
