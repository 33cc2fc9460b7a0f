"""What branch parallelism saves: a model in units of one row through the denoiser, and what a run has shown."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...guidance.branch import Branch
from ..layout import Layout
from .branches import Measured
from .shares import load, shares


@dataclass(frozen=True)
class StepCost:
    """One step, in rows: a row that runs through the whole denoiser is 1, and rows of one call cost each the same.

    Args:
        alone: what one process computes.
        loads: what each process computes, a tuple for each time that all of them wait for each other.
        exchanges: exchanges of predictions.
    """

    alone: float
    loads: tuple[tuple[float, ...], ...]
    exchanges: int

    def shared(self, row_seconds: Sequence[float] | None = None) -> float:
        """How long the processes take together: in rows; in seconds, where it is known what each takes for a row.

        All wait for the last one, which is that with the most to do, or a slower one with less.
        """
        if row_seconds is None:
            return sum(map(max, self.loads))
        return sum(max(map(operator.mul, loads, row_seconds)) for loads in self.loads)


def step_cost(
    blocks: int, processes: int, calls: Sequence[Layout], separate: Sequence[Branch], images: int, repeats: int = 1,
    whole: bool = False,
) -> StepCost:  # fmt: skip
    """The cost of a step.

    Args:
        blocks: outer blocks of the denoiser.
        calls: the rows of each denoiser call of the pipeline.
        separate: branches that are calls of their own.
        images: rows of a branch.
        repeats: how often the step is evaluated.
        whole: whether the pipeline's calls stay whole in every process.
    """
    alone, exchanges = 0.0, 0
    loads: list[tuple[float, ...]] = []
    for layout in calls:
        total = load(layout, range(layout.total), blocks)
        alone += total
        if whole or layout.total == 1:
            loads.append((total,) * processes)
        else:
            loads.append(tuple(load(layout, rows, blocks) for rows in shares(layout, processes, blocks)))
            exchanges += 1
    alone += len(separate) * images
    for depth in {len(branch.lineage) for branch in separate}:
        count = sum(len(branch.lineage) == depth for branch in separate)
        loads.append(tuple(float(len(range(process, count, processes)) * images) for process in range(processes)))
        exchanges += count > 1
    return StepCost(alone * repeats, tuple(loads) * repeats, exchanges * repeats if processes > 1 else 0)


def notes(processes: int, seen: Measured, steps: Sequence[StepCost], whole: int) -> tuple[str, ...]:
    """What the plan says of branch parallelism.

    Args:
        processes: that share branches.
        seen: in the last run.
        steps: of the run.
        whole: steps whose gradient goes through the denoiser, which every process computes.
    """
    alone, exchanges = sum(step.alone for step in steps), sum(step.exchanges for step in steps)
    shared = sum(step.shared() for step in steps)
    lines = [
        f"branch parallel, {processes} processes: {alone:.4g} rows take the time of {shared:.4g}, at most "
        f"{alone / max(shared, 1e-9):.2f} times as fast"
    ]
    if whole:
        lines.append(f"  {whole} steps with a gradient through the denoiser are computed whole in every process")
    if not exchanges or shared >= alone:
        return (*lines, "  it does not pay: no step has branches to share")
    lines.append(f"  it pays while an exchange takes less time than {(alone - shared) / exchanges:.3g} rows")
    if seen.rows:
        lines += _measured(seen, alone, steps, exchanges)
    return tuple(lines)


def _measured(seen: Measured, alone: float, steps: Sequence[StepCost], exchanges: int) -> Iterator[str]:
    """What the last run says; it pays where the processes together are faster than the fastest of them alone."""
    known = [pace for pace in seen.row_seconds if pace]
    fastest, slowest = min(known), max(known)
    paces = [pace or slowest for pace in seen.row_seconds]  # of one that computed no row nothing better is known
    exchange, waiting = (seconds / seen.exchanges for seconds in (seen.exchanging, seen.waiting))
    gain = alone * fastest / (sum(step.shared(paces) for step in steps) + exchanges * exchange)
    yield (
        f"  in the last run a row took {1e3 * fastest:.3g} ms in the fastest process, {1e3 * slowest:.3g} ms in the "
        f"slowest, and an exchange {1e3 * exchange:.3g} ms after {1e3 * waiting:.3g} ms of waiting"
    )
    yield (
        f"  so they are {gain:.2f} times as fast as the fastest alone: it {'pays' if gain > 1.0 else 'does not pay'}"
    )
