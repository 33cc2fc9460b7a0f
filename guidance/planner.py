"""The planner: which predictions a step needs, shared between guidances, and what a run will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers.guiders import BaseGuidance

from .base import Guidance
from .branch import COND, UNCOND, Branch
from .guiders import describe
from .run import Step
from .wording import shown

HOOKS = ("branches", "delta", "project", "guide_x0", "loss", "renoise", "after_step")


def wanted_branches(acting: Mapping[str, Guidance], steps: Mapping[str, Step]) -> tuple[Branch, ...]:
    """The branches that the acting guidances ask for, each once, in registration order after what they follow from.

    Args:
        acting: the guidances whose window holds the step, by name.
        steps: each guidance's view of the step, by the same names.
    """
    wanted: dict[Branch, None] = {}
    for name, guidance in acting.items():
        for branch in guidance.branches(steps[name]):
            wanted.update(dict.fromkeys(branch.lineage))
    return tuple(wanted)


def repeats_of(acting: Mapping[str, Guidance], steps: Mapping[str, Step]) -> int:
    """How often a step is evaluated: the most that an acting guidance asks for.

    The further calls of a solver at one noise level go on from the first, so only that one is repeated.
    """
    return max((g.repeats(steps[name]) for name, g in acting.items() if steps[name].evaluation == 0), default=1)


@dataclass(frozen=True)
class PlannedStep:
    """What one call of `scheduler.step` costs.

    Args:
        index: noise level.
        acting: names of the guidances that act.
        own: branches that the pipeline computes by itself.
        extra: branches computed for the guidances.
        calls: forward calls of the denoiser in one evaluation.
        repeats: how often the step is evaluated.
        gradient: backward passes through the denoiser in one evaluation, for losses that are differentiated so.
        companions: images that ride along in each evaluation, but in solitary ones.
        apart: images that are predicted in a call of their own, under each condition of the pipeline's own.
    """

    index: int
    acting: tuple[str, ...]
    own: tuple[Branch, ...]
    extra: tuple[Branch, ...]
    calls: int
    repeats: int = 1
    gradient: int = 0
    companions: int = 0
    apart: int = 0

    @property
    def evaluations(self) -> int:
        """Predictions computed for each image, those of its companions included."""
        solitary = sum(branch.solitary for branch in self.extra)
        accompanied = len(self.own) + len(self.extra) - solitary
        return self.repeats * (accompanied * (1 + self.companions) + solitary + len(self.own) * self.apart)


@dataclass(frozen=True)
class Row:
    """One guidance in the plan's table.

    Args:
        name: under which it is attached.
        plugin: of which kind it is.
        phases: the hooks that it has.
        window: where it acts, as fractions of the noise levels.
        steps: number of scheduler steps on which it acts.
        extra: predictions that it asks for beside the pipeline's own, a step.
        layers: the layers that it perturbs.
        watched: the attentions that it watches.
        parameters: those of the plug-in itself, without the window.
    """

    name: str
    plugin: str
    phases: tuple[str, ...]
    window: str
    steps: int
    extra: str
    layers: tuple[str, ...]
    watched: tuple[str, ...]
    parameters: Mapping[str, object]


@dataclass(frozen=True, repr=False)
class Plan:
    """The plan of a run, made before anything is computed; printed, it is a table.

    Args:
        pipeline, scheduler: class names.
        steps: one for each call of the scheduler.
        rows: one for each guidance.
        graph_bytes: what the gradient graph of one step kept in the pipeline's last guided run; `None` before one.
        notes: further lines, such as what several processes save.
    """

    pipeline: str
    scheduler: str
    steps: tuple[PlannedStep, ...]
    rows: tuple[Row, ...]
    graph_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def evaluations(self) -> int:
        """Predictions per image over the whole run."""
        return sum(step.evaluations for step in self.steps)

    @property
    def own_evaluations(self) -> int:
        """Those that the pipeline computes without any guidance of ours."""
        return sum(len(step.own) for step in self.steps)

    @property
    def calls(self) -> int:
        """Forward calls of the denoiser over the whole run."""
        return sum(step.calls * step.repeats for step in self.steps)

    @property
    def backward_passes(self) -> int:
        """Gradients through the denoiser over the whole run, each about two evaluations."""
        return sum(step.repeats * step.gradient for step in self.steps)

    def __repr__(self) -> str:
        return f"<Plan of {self.pipeline}: {len(self.steps)} scheduler steps, {self.evaluations} evaluations>"

    def __str__(self) -> str:
        steps = len(self.steps)
        lines = [f"{self.pipeline} with {self.scheduler}, {steps} scheduler steps"]
        table = [("guidance", "plug-in", "window", "acts on", "phases", "evaluations")]
        for row in self.rows:
            plugin = row.plugin if row.plugin != row.name else ""
            each = f"{row.extra} a step" if row.steps else "none"
            table.append((row.name, plugin, row.window, f"{row.steps}/{steps} steps", ", ".join(row.phases), each))
        kept = [column for column in range(len(table[0])) if any(line[column] for line in table[1:])]
        widths = {column: max(len(line[column]) for line in table) for column in kept}
        drawn = ["  " + "  ".join(line[c].ljust(widths[c]) for c in kept).rstrip() for line in table]
        lines.append(drawn[0] if self.rows else "  no guidance attached")
        for row, line in zip(self.rows, drawn[1:], strict=True):
            lines.append(line)
            settings = [f"{name}={_in_short(value)}" for name, value in row.parameters.items() if value is not None]
            lines += ["    " + ", ".join(settings)] if settings else []
            for does, layers in (("perturbs", row.layers), ("watches", row.watched)):
                lines += [f"    {does} {layer}" for layer in layers[:4]]
                lines += [f"    and {len(layers) - 4} more layers"] if len(layers) > 4 else []
        most = max((step.evaluations for step in self.steps), default=0)
        least = min((step.evaluations for step in self.steps), default=0)
        each = f"{most}" if most == least else f"{least} to {most}"
        lines.append(
            f"  evaluations an image: {each} a step, {self.evaluations} in total, of which {self.own_evaluations} are "
            f"the pipeline's own; {self.calls} forward calls of the denoiser"
        )
        return "\n".join([*lines, *self._gradient_lines(), *(f"  {note}" for note in self.notes)])

    def _gradient_lines(self) -> list[str]:
        repeated = [step.repeats for step in self.steps if step.repeats > 1]
        lines = [f"  {len(repeated)} steps are evaluated up to {max(repeated)} times"] if repeated else []
        if self.backward_passes:
            lines.append(
                f"  gradient through the denoiser: {self.backward_passes} backward passes, each about two evaluations"
            )
        if any("loss" in row.phases and row.steps for row in self.rows):
            known = "to be seen after a run" if self.graph_bytes is None else f"{self.graph_bytes / 2**20:.1f} MiB"
            lines.append(f"  memory of the gradient graph, in the last run: {known}")
        return lines


def _in_short(value: object) -> str:
    return describe(value) if isinstance(value, BaseGuidance) else shown(value)


def extra_of(wanted: Sequence[Branch], own: Sequence[Branch]) -> tuple[Branch, ...]:
    """The wanted branches that the pipeline does not compute by itself."""
    return tuple(branch for branch in wanted if branch not in own)


def own_branches(has_cfg: bool, others: int = 0) -> tuple[Branch, ...]:
    """What the pipeline computes by itself.

    Args:
        has_cfg: whether an unconditional prediction is among it.
        others: predictions of its own that no guidance can ask for.
    """
    return (COND, *((UNCOND,) if has_cfg else ()), *(Branch(f"own {number}") for number in range(others)))
