"""Every kind of pipeline: what the zoo declares of it, and what guidance promises on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from fingerprint import of_pipeline
from known_delta import adding, known
from recorder import Enough, Record, SchedulerStep, recorded
from zoo import CASES, Case, pag_twin, run

import trimtab
from trimtab.guidance.noise import split_variance
from trimtab.pipelines.families import Family

REACH = Path(__file__).parents[1] / "docs" / "reach.md"


@pytest.mark.parametrize("name", CASES)
def test_runs_are_finite_and_bit_equal(name: str) -> None:
    case = CASES[name]
    first = run(case.build(), case)
    second = run(case.build(), case)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", CASES)
def test_each_step_makes_the_declared_calls_with_the_declared_rows(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    record = recorded(pipe, case.denoiser, steps=1)
    with suppress(Enough):
        run(pipe, case)
    assert [forward.rows for forward in record.steps[0].forwards] == [case.rows] * case.calls


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sd35", "pixart"])
def test_the_pag_twin_at_scale_zero_is_the_stock_pipeline(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    twin = pag_twin(pipe)
    assert torch.equal(run(twin, case, pag_scale=0.0), run(pipe, case))
    assert not torch.equal(run(twin, case, pag_scale=3.0), run(pipe, case))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "prompt" in case.call])
def test_the_prompt_reaches_the_output(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    assert not torch.allclose(run(pipe, case), run(pipe, case, prompt="two blue boats"), atol=1e-4)


def test_a_build_and_a_run_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    run(CASES["sd15"].build(), CASES["sd15"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35", "flux", "wan", "qwenimage"])
def test_a_saved_case_loads_and_runs_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.build()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    # Loaded weights may be laid out differently in memory, which changes the rounding.
    torch.testing.assert_close(run(loaded, case), run(pipe, case), atol=1e-4, rtol=0)


# -- what guidance promises on every kind ------------------------------------------------------------------------------
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "prior_prior")


@dataclass
class Kind:
    """A guidable pipeline after a stock run: what that gave and gave its schedulers, and what every object was like."""

    case: Case
    pipe: Any
    record: Record
    output: torch.Tensor
    steps: list[SchedulerStep]
    frame: dict[str, str]

    def run(self) -> tuple[torch.Tensor, list[SchedulerStep]]:
        self.record.steps.clear()
        return run(self.pipe, self.case), self.record.steps.copy()

    def check_as_stock(self) -> None:
        """Every object is as after the stock run, and the pipeline's output, bit for bit."""
        self.pipe.clear_guidance()
        assert of_pipeline(self.pipe, values=False) == self.frame
        assert torch.equal(self.run()[0], self.output)


@pytest.fixture(scope="module", params=CASES)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    case = CASES[request.param]
    pipe = case.build()
    record = recorded(pipe, *(name for name in DENOISERS if pipe.components.get(name) is not None))
    output = run(pipe, case)
    trimtab.guide(pipe)
    yield Kind(case, pipe, record, output, record.steps.copy(), of_pipeline(pipe, values=False))


def with_delta(kind: Kind, step: SchedulerStep) -> torch.Tensor:
    """What the scheduler should be given: the delta added, before the pipeline's own rescale where it has one."""
    own = split_variance(step.model_output, step.sample)[0]
    if kind.case.kind == "rows_converted":  # the first frame is given
        return torch.cat([own[:, :, :1], (own + known(own))[:, :, 1:]], dim=2)
    if kind.case.kind != "norm_rescaled":
        return own + known(own)
    cond, uncond = (forward.output for forward in step.forwards)
    total = uncond + kind.case.call["true_cfg_scale"] * (cond - uncond) + known(own)
    return total * cond.norm(dim=-1, keepdim=True) / total.norm(dim=-1, keepdim=True)


def test_with_nothing_attached_it_is_the_stock_pipeline(kind: Kind) -> None:
    output, steps = kind.run()
    assert torch.equal(output, kind.output)
    assert len(steps) == len(kind.steps)
    for ours, theirs in zip(steps, kind.steps, strict=True):
        assert torch.equal(ours.model_output, theirs.model_output) and torch.equal(ours.sample, theirs.sample)


def test_a_known_delta_arrives_as_itself_at_every_step(kind: Kind) -> None:
    first, each = {"sound_beside": (0, 2), "rows_converted": (1, 2)}.get(kind.case.kind, (0, 1))
    for at in range(first, len(kind.steps), each):
        with kind.pipe.guidance(adding(kind.record, at)):
            _, steps = kind.run()
        for ours, theirs in zip(steps[:at], kind.steps[:at], strict=True):
            assert torch.equal(ours.model_output, theirs.model_output)
        expected, stock = with_delta(kind, kind.steps[at]), kind.steps[at]
        arrived = split_variance(steps[at].model_output, stock.sample)[0]
        torch.testing.assert_close(arrived, expected, rtol=0, atol=2e-6 * max(expected.abs().max().item(), 1.0))
        if kind.case.kind == "sound_beside":
            assert torch.equal(steps[at + 1].model_output, kind.steps[at + 1].model_output)
    kind.check_as_stock()


NO_MAPS = {"sana_sprint": "SanaLinearAttnProcessor2_0 calls neither", "anyflow_far": "attend to further keys"}
"""Kinds that have no attention map among image tokens, and what is said of them."""
WHOLE_CALLS = ("animatediff", "z_image")
"""Kinds whose arguments do not split into rows: each branch is a call with all rows, of which the wanted are taken."""


def test_pag_acts_and_costs_what_it_declares(kind: Kind) -> None:
    if kind.case.name in NO_MAPS:
        refused = pytest.raises(trimtab.TrimtabError, match=NO_MAPS[kind.case.name])
        with refused, kind.pipe.guidance("pag", scale=3.0):
            kind.run()
        return kind.check_as_stock()
    with kind.pipe.guidance("pag", scale=3.0):
        plan = kind.pipe.explain_guidance(**kind.case.call)
        output, steps = kind.run()
    assert torch.isfinite(output).all() and not torch.equal(output, kind.output)
    assert all(torch.isfinite(step.model_output).all() for step in steps)
    # A prior of embeddings has no map to perturb; the first step that Cosmos makes only converts.
    first = {"kandinsky_combined": 2, "cosmos_video2world": 1}.get(kind.case.name, 0)
    moved = steps[first].model_output - kind.steps[first].model_output
    assert moved.abs().max() > 1e-5 * kind.steps[first].model_output.abs().max()
    counted, own = (sum(f.rows for step in each for f in step.forwards) for each in (steps, kind.steps))
    if kind.case.name in WHOLE_CALLS:
        counted -= (kind.case.rows - 1) * len(steps)
    assert counted == plan.evaluations == kind.pipe.last_guided_run.evaluations > own == plan.own_evaluations
    kind.check_as_stock()


def test_its_auto_layers_are_those_of_the_documentation(kind: Kind) -> None:
    family = Family(next(getattr(kind.pipe, n) for n in DENOISERS if kind.pipe.components.get(n) is not None))
    layers = ", ".join(f"`{name}`" for name in family.auto)
    names = f"{kind.case.name} | {type(kind.pipe).__name__} | {type(family.module).__name__}"
    row = f"| {names} | {family.name} | {layers} |"
    assert family.auto
    assert row in REACH.read_text().splitlines(), f"docs/reach.md lacks: {row}"
