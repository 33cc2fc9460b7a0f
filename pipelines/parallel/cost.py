"""What branch parallelism saves: a model in units of one row through the denoiser, and what a run has shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...guidance.branch import Branch
from ..layout import Layout
from .branches import BranchParallel
from .shares import load, shares


@dataclass(frozen=True)
class StepCost:
    """One step, in rows: a row that runs through the whole denoiser is 1, and rows of one call cost each the same.

    Args:
        alone: what one process computes.
        shared: what the process with the most to do computes.
        exchanges: exchanges of predictions.
    """

    alone: float
    shared: float
    exchanges: int


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
    alone = shared = 0.0
    exchanges = 0
    for layout in calls:
        total = load(layout, range(layout.total), blocks)
        alone += total
        if whole or layout.total == 1:
            shared += total
        else:
            shared += max(load(layout, rows, blocks) for rows in shares(layout, processes, blocks))
            exchanges += 1
    alone += len(separate) * images
    for depth in {len(branch.lineage) for branch in separate}:
        count = sum(len(branch.lineage) == depth for branch in separate)
        shared += -(-count // processes) * images
        exchanges += count > 1
    return StepCost(alone * repeats, shared * repeats, exchanges * repeats if processes > 1 else 0)


def notes(parallel: BranchParallel, steps: Sequence[StepCost], whole: int) -> tuple[str, ...]:
    """What the plan says of branch parallelism.

    Args:
        steps: of the run.
        whole: steps whose gradient goes through the denoiser, which every process computes.
    """
    alone, shared, exchanges = (sum(getattr(step, name) for step in steps) for name in ("alone", "shared", "exchanges"))
    lines = [
        f"branch parallel, {parallel.size} processes: {alone:.4g} rows take the time of {shared:.4g}, at most "
        f"{alone / max(shared, 1e-9):.2f} times as fast"
    ]
    if whole:
        lines.append(f"  {whole} steps with a gradient through the denoiser are computed whole in every process")
    if not exchanges or shared >= alone:
        return (*lines, "  it does not pay: no step has branches to share")
    lines.append(f"  it pays while an exchange takes less time than {(alone - shared) / exchanges:.3g} rows")
    seen = parallel.measured
    if seen.rows:
        row, exchange, waiting = (
            seen.computing / seen.rows,
            *(s / seen.exchanges for s in (seen.exchanging, seen.waiting)),
        )
        gain = alone * row / (shared * row + exchanges * exchange)
        lines.append(
            f"  in the last run a row took {1e3 * row:.3g} ms, an exchange {1e3 * exchange:.3g} ms after "
            f"{1e3 * waiting:.3g} ms of waiting for the slowest process: {gain:.2f} times as fast, "
            f"it {'pays' if gain > 1.0 else 'does not pay'}"
        )
    return tuple(lines)
