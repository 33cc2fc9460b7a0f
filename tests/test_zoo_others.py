"""Classes that are of no further kind, and whose tiny components are made here: what guidance promises on each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from fingerprint import of_pipeline
from known_delta import adding, known
from recorder import Record, SchedulerStep, recorded
from zoo.others import OTHERS, Case

import trimtab
from trimtab.guidance.noise import split_variance

REACH = Path(__file__).parents[1] / "docs" / "reach.md"
GUIDED = [name for name, case in OTHERS.items() if not case.refused]
REFUSED = [name for name, case in OTHERS.items() if case.refused]


@dataclass
class Other:
    """A guidable pipeline after a stock run: what that gave and gave its schedulers, and what every object was like."""

    case: Case
    pipe: Any
    record: Record
    output: torch.Tensor
    steps: list[SchedulerStep]
    frame: dict[str, str]

    def run(self) -> tuple[torch.Tensor, list[SchedulerStep]]:
        self.record.steps.clear()
        self.record.pending.clear()
        return self.case.run(self.pipe), self.record.steps.copy()

    def check_as_stock(self) -> None:
        """Every object is as after the stock run, and the pipeline's output and its steps, bit for bit."""
        self.pipe.clear_guidance()
        assert frame_of(self.pipe, self.case) == self.frame
        output, steps = self.run()
        assert torch.equal(output, self.output)
        for ours, theirs in zip(steps, self.steps, strict=True):
            assert torch.equal(ours.model_output, theirs.model_output) and torch.equal(ours.sample, theirs.sample)


def frame_of(pipe: Any, case: Case) -> dict[str, str]:
    return of_pipeline(pipe, values=False, identity=not case.renewed)


@pytest.fixture(scope="module", params=GUIDED)
def other(request: pytest.FixtureRequest) -> Iterator[Other]:
    case = OTHERS[request.param]
    pipe = case.build()
    assert type(pipe) is getattr(diffusers, request.param)
    record = recorded(pipe, *case.denoisers)
    output = case.run(pipe)
    assert torch.isfinite(output).all() and len(record.steps) > case.first
    steps = record.steps.copy()
    trimtab.guide(pipe)
    yield Other(case, pipe, record, output, steps, frame_of(pipe, case))


def test_with_nothing_attached_it_is_the_stock_pipeline(other: Other) -> None:
    other.check_as_stock()


def test_a_known_delta_arrives_as_itself(other: Other) -> None:
    first = other.case.first
    with other.pipe.guidance(adding(other.record, first)):
        _, steps = other.run()
    stock = other.steps[first]
    own = split_variance(stock.model_output, stock.sample)[0]
    expected = other.case.arrives(stock, known(own))
    arrived = split_variance(steps[first].model_output, stock.sample)[0]
    torch.testing.assert_close(arrived, expected, rtol=0, atol=2e-6 * max(expected.abs().max().item(), 1.0))
    other.check_as_stock()


def test_pag_acts_and_costs_what_it_declares_or_says_why_not(other: Other) -> None:
    if other.case.unmapped:
        refused = pytest.raises(trimtab.TrimtabError, match=other.case.unmapped)
        other.record.steps.clear()
        other.record.pending.clear()
        with refused, other.pipe.guidance("pag", scale=3.0):
            other.case.run(other.pipe)
        # Where the image tokens lie is seen by calls with NaN.
        made = [forward for forward in other.record.pending if forward.output.isfinite().any()]
        assert not other.record.steps and len(made) == other.case.tried
        return other.check_as_stock()
    with other.pipe.guidance("pag", scale=3.0):
        plan = other.pipe.explain_guidance(**{"num_inference_steps": other.case.steps, **other.case.call})
        output, steps = other.run()
    assert torch.isfinite(output).all() and not torch.equal(output, other.output)
    moved = [(a.model_output - b.model_output).abs().max() / b.model_output.abs().max()
             for a, b in zip(steps, other.steps, strict=True)]  # fmt: skip
    assert max(moved) > 1e-5
    counted, own = (sum(f.rows for step in each for f in step.forwards) for each in (steps, other.steps))
    made = counted - other.case.unwanted
    assert plan.evaluations + other.case.undeclared == other.pipe.last_guided_run.evaluations == made
    assert plan.own_evaluations <= own < counted
    assert not other.case.undeclared or "at least so many" in str(plan)
    other.check_as_stock()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(name: str) -> None:
    case = OTHERS[name]
    pipe = case.build()
    assert type(pipe) is getattr(diffusers, name)
    output = case.run(pipe)
    frame = of_pipeline(pipe, values=False)
    with pytest.raises(trimtab.TrimtabError, match=case.refused):
        trimtab.guide(pipe)
        with pipe.guidance(adding(Record(), case.first)):
            case.run(pipe)
    assert of_pipeline(pipe, values=False) == frame
    assert torch.equal(case.run(pipe), output)


@pytest.mark.parametrize("name", OTHERS)
def test_its_row_is_in_the_documentation(name: str) -> None:
    assert f"\n| {name} |" in REACH.read_text()
