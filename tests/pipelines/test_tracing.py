"""A traced run computes the same, and says of each step what each guidance changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recorder import recorded
from zoo import CASES, run

import trimtab
from trimtab.guidance.errors import ParameterError
from trimtab.guidance.trace import Trace


def test_a_trace_measures_each_delta_and_changes_nothing(tmp_path: Path) -> None:
    pipe = CASES["sd15"].build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("pag", scale=2.0, layers="mid", stop=0.6)
    plain = run(pipe, CASES["sd15"])
    own = dict(vars(pipe.guidances["pag"]))
    with pipe.trace_guidance() as traces:
        assert torch.equal(run(pipe, CASES["sd15"]), plain)
    assert vars(pipe.guidances["pag"]) == own
    (trace,) = traces
    uncond, cond, perturbed = record.steps[0].forwards[0].output
    delta, unguided = 2.0 * (cond - perturbed), uncond + 5.0 * (cond - uncond)
    change = trace.steps[0].contributions["pag"]["delta"].change
    assert change is not None
    assert change.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert change.relative == pytest.approx(float(delta.norm() / unguided.norm()), rel=1e-4)
    cosine = torch.cosine_similarity(delta.flatten(), unguided.flatten(), dim=0)
    assert change.cosine == pytest.approx(float(cosine), abs=1e-4)
    assert [step.evaluations for step in trace.steps] == [3, 3, 2]
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    trace.plot(tmp_path / "trace.png")
    assert "pag" in str(trace) and (tmp_path / "trace.png").stat().st_size > 1000


def test_the_environment_writes_one_file_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TRACE", str(tmp_path))
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("pag")
    run(pipe, CASES["sd15"])
    (file,) = tmp_path.glob("*.json")
    assert len(Trace.load(file).steps) == 3


def test_another_file_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ParameterError, match="no trace"):
        Trace.load(tmp_path / "a.json")


def test_a_damaged_number_is_named_and_a_trace_is_not_drawn_over_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_TRACE", str(tmp_path))
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("pag")
    run(pipe, CASES["sd15"])
    (file,) = tmp_path.glob("*.json")
    with pytest.raises(ParameterError, match=r"needed: a name that ends in \.png"):
        Trace.load(file).plot(file)
    whole = json.loads(file.read_text())
    for name, value in (("seconds", "x"), ("timestep", None), ("seconds", 1e308)):
        damaged = tmp_path / "damaged.json"
        damaged.write_text(json.dumps({**whole, "steps": [{**whole["steps"][0], name: value}]}))
        with pytest.raises(ParameterError, match=f"no trace that trimtab wrote: {name}="):
            Trace.load(damaged)
