"""Every case of the zoo builds, runs, and does so the same way twice; its row and call counts are as declared."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from zoo import CASES, pag_twin, run


@pytest.mark.parametrize("name", CASES)
def test_runs_are_finite_and_bit_equal(name: str) -> None:
    case = CASES[name]
    first = run(case.build(), case)
    second = run(case.build(), case)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


def denoiser_rows(name: str) -> list[list[int]]:
    """Rows of each denoiser call, one list per scheduler step."""
    case = CASES[name]
    pipe = case.build()
    pending: list[int] = []
    steps: list[list[int]] = []

    def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sample = args[0] if args else kwargs[next(iter(kwargs))]
        pending.append(len(sample))

    getattr(pipe, case.denoiser).register_forward_hook(record, with_kwargs=True)
    original = pipe.scheduler.step

    @wraps(original)  # pipelines read the signature of `step`
    def step(*args: Any, **kwargs: Any) -> Any:
        steps.append(pending.copy())
        pending.clear()
        return original(*args, **kwargs)

    pipe.scheduler.step = step
    run(pipe, case)
    return steps


@pytest.mark.parametrize("name", CASES)
def test_each_step_makes_the_declared_calls_with_the_declared_rows(name: str) -> None:
    case = CASES[name]
    assert denoiser_rows(name)[0] == [case.rows] * case.calls


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
