"""The rows of a call: whose they are, from which they are made, and where they begin to differ."""

from __future__ import annotations

import pytest

from trimtab.guidance.branch import COND, UNCOND, Branch, Perturbation, Point, Prompt
from trimtab.pipelines.layout import Layout, Segment, lay_out, may_join
from trimtab.pipelines.rows import AmbiguousRowsError

EARLY, LATE = Perturbation(("blocks.1",)), Perturbation(("blocks.6",))
BLUE = Branch(Prompt("blue"))


def joins_at(perturbation: Perturbation) -> int:
    return int(perturbation.layers[0].removeprefix("blocks."))


def test_further_prompts_come_first_and_perturbed_rows_in_the_order_in_which_they_join() -> None:
    late, early = Branch("cond", LATE), Branch("cond", EARLY)
    layout, sources = lay_out([UNCOND, UNCOND, COND, COND], [late, BLUE, early], joins_at)
    assert layout == Layout(
        total=10,
        parents=(0, 1, 2, 3, 4, 5, 2, 3, 2, 3),
        segments=(Segment(6, 8, EARLY, 1), Segment(8, 10, LATE, 6)),
        branches=(UNCOND, UNCOND, COND, COND, BLUE, BLUE, early, early, late, late),
    )
    assert sources == {BLUE: [2, 3], early: [2, 3], late: [2, 3]}
    assert layout.rows_of(late) == slice(8, 10)


def test_without_a_shared_prefix_perturbed_rows_differ_from_the_entry_on() -> None:
    layout, _ = lay_out([None, COND], [Branch("cond", LATE)])
    assert layout.segments == (Segment(2, 3, LATE, -1),) and layout.active(0) == 3


def test_a_perturbed_branch_joins_no_call_without_rows_of_its_condition() -> None:
    lost = Branch(Prompt("blue"), EARLY)
    assert may_join(Branch("cond", EARLY), [UNCOND, COND]) and may_join(BLUE, [UNCOND, COND])
    assert not may_join(lost, [UNCOND, COND]) and not may_join(Branch("uncond", EARLY), [COND])
    assert not may_join(Branch("cond", point=Point(COND)), [COND])
    with pytest.raises(AmbiguousRowsError, match="no rows of"):
        lay_out([UNCOND, COND], [lost], joins_at)
