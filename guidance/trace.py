"""What a traced run did: for each step, what each guidance changed, what it cost, and what all of them came to.

A change is measured against what it changes: a delta and a reshaped prediction against the prediction that the pipeline
arrived at by itself, an edit of the clean estimate or of the sample against that. Numbers are means over the images.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ParameterError

FORMAT = 1


@dataclass(frozen=True)
class Change:
    """How far and in which direction something was moved.

    Args:
        norm: Euclidean norm of the change.
        relative: that over the norm of what was changed.
        cosine: of the angle between the change and what was changed; 0 where there was no change.
    """

    norm: float
    relative: float
    cosine: float

    @classmethod
    def between(cls, before: torch.Tensor, after: torch.Tensor) -> Change:
        """From `before` to `after`, both `[batch, ...]`."""
        return cls.of((after.float() - before.float()), before)

    @classmethod
    def of(cls, change: torch.Tensor, changed: torch.Tensor) -> Change:
        """A change of `changed`, both `[batch, ...]`."""
        # Not every device has doubles.
        moved, origin = (tensor.detach().flatten(1).cpu().double() for tensor in (change, changed))
        norm, size = moved.norm(dim=1), origin.norm(dim=1)
        relative = norm / size.clamp_min(1e-300)
        cosine = (moved * origin).sum(1) / (norm * size).clamp_min(1e-300)
        return cls(float(norm.mean()), float(relative.mean()), float(cosine.mean()))


@dataclass(frozen=True)
class Contribution:
    """What one hook of one guidance did at one step.

    Args:
        change: what it changed; `None` for a loss, whose effect is part of the step's total.
        loss: the loss that it returned.
        seconds: spent in the hook, without the denoiser.
    """

    change: Change | None
    loss: float | None
    seconds: float


@dataclass(frozen=True)
class TracedStep:
    """One call of `scheduler.step`.

    Args:
        index: noise level, 0 for the first.
        timestep: as the scheduler calls it.
        sigma: noise per signal; `None` where it is not known or infinite.
        evaluations: predictions computed for each image.
        asked: those that each guidance asked for beside the pipeline's own; shared ones count for each.
        seconds: since the step before ended (for the first, since the denoiser was first called).
        total: from the pipeline's own prediction to what the scheduler was given.
        contributions: by guidance and hook.
    """

    index: int
    timestep: float
    sigma: float | None
    evaluations: int
    asked: Mapping[str, int]
    seconds: float
    total: Change | None
    contributions: Mapping[str, Mapping[str, Contribution]]


@dataclass
class Trace:
    """One run. Printed, it is a table; `save` writes JSON, `plot` a picture.

    Args:
        pipeline, scheduler: their classes.
        setup: seconds that each guidance's `setup` took.
        steps: in order; fewer than planned where the run was broken off.
    """

    pipeline: str
    scheduler: str
    setup: dict[str, float] = field(default_factory=dict)
    steps: list[TracedStep] = field(default_factory=list)

    @property
    def evaluations(self) -> int:
        """Predictions computed for each image."""
        return sum(step.evaluations for step in self.steps)

    @property
    def seconds(self) -> float:
        """From the first denoiser call to the end of the last step."""
        return sum(step.seconds for step in self.steps)

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """Guidance and hook of all contributions, in the order of their first."""
        found = [(name, hook) for step in self.steps for name, hooks in step.contributions.items() for hook in hooks]
        return tuple(dict.fromkeys(found))

    def series(self, name: str, hook: str) -> list[Contribution | None]:
        """What one hook did at each step."""
        return [step.contributions.get(name, {}).get(hook) for step in self.steps]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON, to be read again by `Trace.load` and `trimtab trace`."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what `save` wrote.

        Raises:
            ParameterError: it is not such a file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError(f"another format than {FORMAT}")
            return cls(**{**data, "steps": [_step(step) for step in data["steps"]]})
        except KeyError as missing:
            raise ParameterError(f"{str(path)!r} is no trace that trimtab wrote: it lacks {missing}.") from missing
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ParameterError(f"{str(path)!r} is no trace that trimtab wrote: {error}.") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the trace: size and direction of each change, evaluations and seconds, over the steps; a PNG."""
        from .trace_plot import draw

        if Path(path).suffix.lower() != ".png":
            raise ParameterError(f"{str(path)!r}: a trace is drawn as a PNG; needed: a name that ends in .png.")
        draw(self).save(path, format="PNG")

    def __str__(self) -> str:
        title = (
            f"{self.pipeline} with {self.scheduler}: {len(self.steps)} steps, {self.evaluations} evaluations an image, "
            f"{self.seconds:.2f} s"
        )
        return "\n\n".join([title, _table(self._summary()), _table(self._by_step())])

    def _summary(self) -> list[Sequence[str]]:
        rows: list[Sequence[str]] = [
            ("guidance", "hook", "steps", "size", "largest", "direction", "loss", "asked for", "seconds")
        ]
        for name, hook in self.lines:
            acted = [(step, one) for step, one in zip(self.steps, self.series(name, hook), strict=True) if one]
            changes = [one.change for _, one in acted if one.change is not None]
            losses = [one.loss for _, one in acted if one.loss is not None]
            largest = max(
                ((one.change.relative, step.index) for step, one in acted if one.change is not None), default=None
            )
            rows.append((
                name, hook, str(len(acted)),
                f"{_mean([change.relative for change in changes]):.3f}" if changes else "",
                f"{largest[0]:.3f} at {largest[1]}" if largest else "",
                f"{_mean([change.cosine for change in changes]):+.2f}" if changes else "",
                f"{losses[0]:.4g} to {losses[-1]:.4g}" if losses else "",
                str(sum(step.asked.get(name, 0) for step in self.steps)),
                f"{sum(one.seconds for _, one in acted):.3f}",
            ))  # fmt: skip
        return rows

    def _by_step(self) -> list[Sequence[str]]:
        rows: list[Sequence[str]] = [
            ("step", "timestep", "sigma", "evaluations", "seconds", "all", *(f"{n} {h}" for n, h in self.lines))
        ]
        for step in self.steps:
            found = [step.contributions.get(name, {}).get(hook) for name, hook in self.lines]
            rows.append((
                str(step.index), f"{step.timestep:g}", "" if step.sigma is None else f"{step.sigma:.3g}",
                str(step.evaluations), f"{step.seconds:.3f}", _cell(step.total),
                *("" if one is None else _cell(one.change, one.loss) for one in found),
            ))  # fmt: skip
        return rows


def finite(value: float) -> float | None:
    """The number, or `None` for one that JSON cannot hold."""
    return value if math.isfinite(value) else None


def _cell(change: Change | None, loss: float | None = None) -> str:
    if change is None:
        return "" if loss is None else f"loss {loss:.4g}"
    return f"{change.relative:.3f} ({change.cosine:+.2f})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    kept = [column for column in range(len(rows[0])) if len(rows) == 1 or any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in kept}
    return "\n".join("  " + "  ".join(row[c].ljust(widths[c]) for c in kept).rstrip() for row in rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _step(data: dict[str, Any]) -> TracedStep:
    for name in ("index", "timestep", "evaluations", "seconds"):
        if not isinstance(data[name], (int, float)) or not abs(data[name]) < 1e12:
            raise ValueError(f"{name}={data[name]!r} is no number that it can be")
    contributions = {
        name: {hook: Contribution(**{**one, "change": _change(one["change"])}) for hook, one in hooks.items()}
        for name, hooks in data["contributions"].items()
    }
    return TracedStep(**{**data, "total": _change(data["total"]), "contributions": contributions})


def _change(data: dict[str, float] | None) -> Change | None:
    return None if data is None else Change(**data)
