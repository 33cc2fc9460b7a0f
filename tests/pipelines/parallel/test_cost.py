"""What branch parallelism saves: in rows before a run, and after one by what each process took for a row."""

from __future__ import annotations

import pytest

from trimtab.guidance.branch import Branch
from trimtab.pipelines.layout import Layout
from trimtab.pipelines.parallel.branches import Measured
from trimtab.pipelines.parallel.cost import StepCost, notes, step_cost

BLOCKS = 8
PAIR = Layout(2, (0, 1))
"""An unconditional and a conditional row, of which each of two processes computes one."""


def run(*row_seconds: float, exchanging: float = 0.0) -> Measured:
    """What a run of one exchange measured, in processes that took so long for a row."""
    return Measured(
        exchanges=2.0, rows=2.0, computing=sum(row_seconds), exchanging=2 * exchanging, row_seconds=row_seconds
    )


def test_a_step_takes_as_long_as_the_process_with_the_most_rows() -> None:
    step = step_cost(BLOCKS, 2, [PAIR], [Branch("cond", denoiser=str(n)) for n in range(3)], images=1)
    assert step == StepCost(5.0, ((1.0, 1.0), (2.0, 1.0)), 2)
    assert step.shared() == 3.0
    assert step_cost(BLOCKS, 2, [PAIR], [], images=1, whole=True).shared() == 2.0


def test_with_measured_seconds_it_takes_as_long_as_the_process_that_is_done_last() -> None:
    step = StepCost(3.0, ((2.0, 1.0),), 1)
    assert step.shared((1.0, 1.0)) == 2.0
    assert step.shared((1.0, 1.5)) == 2.0, "slower, and done before the other, which has more to do"
    assert step.shared((1.0, 3.0)) == 3.0


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (run(1.0, 1.0), "2.00 times as fast as the fastest alone: it pays"),
        (run(1.0, 1.6), "1.25 times as fast as the fastest alone: it pays"),
        (run(2.5, 1.0), "0.80 times as fast as the fastest alone: it does not pay"),
        (run(1.0, 1.5, exchanging=1.0), "0.80 times as fast as the fastest alone: it does not pay"),
        (run(1.0, 0.0), "2.00 times as fast"),
    ],
)
def test_whether_it_pays_depends_on_the_slowest_process(seen: Measured, said: str) -> None:
    step = step_cost(BLOCKS, 2, [PAIR], [], images=1)
    *_, paces, gain = notes(2, seen, [step, step], 0)
    assert said in gain
    slowest = max(seen.row_seconds)
    assert f"1e+03 ms in the fastest process, {1e3 * slowest:.3g} ms in the slowest" in paces


def test_one_branch_is_nothing_to_share() -> None:
    assert notes(2, run(1.0, 1.0), [step_cost(BLOCKS, 2, [Layout(1, (0,))], [], images=1)], 0)[-1] == (
        "  it does not pay: no step has branches to share"
    )
