"""Branch parallelism in real processes: the result of one, whoever is slow, and one outcome for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import branch_programs as programs
import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start, together
from zoo import CASES
from zoo.class_conditional import class_conditional

import trimtab
from trimtab.guidance.errors import ParameterError
from trimtab.pipelines.generate.manifest import FILE
from trimtab.pipelines.parallel.lockstep import _fingerprint

WHOLE = {"another point", "a step cache"}
"""What every process computes for itself."""
FEWER = {"rows of one call", "seven branches", "the pipeline's own CFG alone", "other denoisers"}
"""Settings that are run by three processes as well."""

Seen = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return together(2, programs.compare, tmp_path_factory.mktemp("two"), *programs.SETTINGS)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return together(3, programs.compare, tmp_path_factory.mktemp("three"), *sorted(FEWER))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any] | None]:
    folder = tmp_path_factory.mktemp("disturbed")
    return finish(start(3, programs.disturb, folder), folder)


# -- the same result ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", programs.SETTINGS)
def test_two_processes_make_what_one_makes(two: Seen, name: str) -> None:
    one, other = (seen[name] for seen in two)
    assert torch.equal(one["output"], other["output"])
    assert one["difference"] < 1e-5 and one["undone"] and other["undone"]
    assert one["counted"] and other["counted"]
    assert (one["measured"].exchanges == 0) == (name in WHOLE)


@pytest.mark.parametrize("name", sorted(FEWER))
def test_three_processes_make_what_one_makes_also_of_two_branches(three: Seen, name: str) -> None:
    assert all(torch.equal(seen[name]["output"], three[0][name]["output"]) for seen in three)
    assert all(seen[name]["difference"] < 1e-5 and seen[name]["counted"] for seen in three)


# -- what it saves -----------------------------------------------------------------------------------------------------
def test_the_plan_says_what_can_be_saved_and_after_a_run_whether_it_pays(two: Seen, three: Seen) -> None:
    before, after = two[0]["rows of one call"]["notes"], two[0]["rows of one call"]["after"]
    # PAG in the middle of seven blocks costs 4/7 beside its parent: 2.57 rows a step, 1.57 where it is computed.
    assert before == (
        "branch parallel, 2 processes: 7.714 rows take the time of 4.714, at most 1.64 times as fast",
        "  it pays while an exchange takes less time than 1 rows",
    )
    assert after[:2] == before and "in the last run a row took" in after[2] and after[3].endswith(("pays", "pay"))
    assert two[1]["rows of one call"]["after"] == after
    assert "7.714 rows take the time of 3, at most 2.57 times" in three[0]["rows of one call"]["notes"][0]


def test_the_plan_says_what_stays_whole(two: Seen) -> None:
    for name in WHOLE:
        assert two[0][name]["notes"][-1] == "  it does not pay: no step has branches to share"
    gradient = two[0]["a gradient through the denoiser"]["notes"]
    assert "  3 steps with a gradient through the denoiser are computed whole in every process" in gradient


def test_what_was_measured_is_what_was_planned(two: Seen) -> None:
    for name in ("rows of one call", "a learned variance", "calls of their own", "the pipeline's own CFG alone"):
        measured = two[0][name]["measured"]
        assert f" {measured.rows:.4g} rows take the time" in two[0][name]["notes"][0]
        assert two[1][name]["measured"] == measured
        assert len(measured.row_seconds) == 2 and min(measured.row_seconds) > 0


# -- one outcome -------------------------------------------------------------------------------------------------------
def test_a_slow_process_is_waited_for(disturbed: list[dict[str, Any] | None]) -> None:
    assert disturbed[0] is not None and disturbed[0]["slow"] < 1e-5
    assert disturbed[0]["waited"] > 0.9  # two processes waited for half a second


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_in_one_process_is_an_error_in_all_that_names_it(
    disturbed: list[dict[str, Any] | None], rank: int
) -> None:
    seen = disturbed[rank]
    assert seen is not None
    assert seen["errors"]["failed"] == (
        "GuidanceRuntimeError: branch parallel: process 1 failed, which ends processes 0, 1, 2: "
        "LookupError: no such file"
    )
    for name in ("other seed", "other prompt", "fewer steps", "other guidance"):
        assert "processes 0, 1, 2 do not make the same image" in seen["errors"][name]
    assert seen["after errors"] < 1e-5


def test_where_one_has_too_little_memory_all_make_calls_of_their_own(disturbed: list[dict[str, Any] | None]) -> None:
    assert disturbed[0] is not None and disturbed[0]["out of memory"] < 1e-5
    assert disturbed[0]["further calls"] > 0


def test_where_one_has_less_memory_all_make_smaller_calls_from_then_on(
    disturbed: list[dict[str, Any] | None],
) -> None:
    """Of six rows each process has two; these do not fit once, in one process."""
    one, other = disturbed[0], disturbed[2]
    assert one is not None and other is not None
    assert one["half the memory"] < 1e-5
    assert one["rows"] == other["rows"] == [2, 1, 1, 1, 1]


def test_all_processes_have_one_memory_budget_however_a_call_ends(tmp_path: Path) -> None:
    one, other = together(2, programs.limits, tmp_path / "limits")
    assert one == other == [(None, 4, False), ("AmbiguousRowsError", 4, False), ("OutOfMemoryError", 4, False)]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_process_that_ends_ends_the_others_at_once(disturbed: list[dict[str, Any] | None], rank: int) -> None:
    seen = disturbed[rank]
    assert disturbed[1] is None and seen is not None
    assert "one of the processes 0, 1, 2 has ended; its own output says why" in seen["errors"]["ended"]
    assert seen["noticed"] < 10.0 and seen["lost"]
    assert "in an earlier run" in seen["errors"]["ended before"]
    assert seen["alone"]


def test_a_process_that_hangs_is_not_waited_for_longer_than_its_limit(tmp_path: Path) -> None:
    waiting, _ = together(2, programs.hang, tmp_path / "hang")
    assert "did not answer for 1 s" in waiting["errors"]["hung"]
    assert 1.0 <= waiting["noticed"] < 4.0


def test_an_interrupted_process_lets_nobody_wait(tmp_path: Path) -> None:
    waiting, interrupted = together(2, programs.interrupt, tmp_path / "interrupt")
    assert "one of the processes 0, 1 has ended" in waiting["errors"]["interrupted"]
    assert waiting["noticed"] < 10.0 and interrupted["errors"] == {} and interrupted["lost"]


# -- what is sent ------------------------------------------------------------------------------------------------------
def test_numbers_in_host_memory_are_not_sent_by_what_joins_devices(tmp_path: Path) -> None:
    assert together(1, programs.elsewhere, tmp_path / "elsewhere") == [[[1.0, 2.0]]]


def test_the_places_that_are_compared_lie_in_tensors_of_any_size() -> None:
    many = torch.zeros(20 * 2**20, dtype=torch.bool)  # float32 rounds the last index up to the size
    many[-1] = True
    assert _fingerprint(many) != _fingerprint(torch.zeros_like(many))


def test_what_would_not_fit_together_is_not_alike() -> None:
    rows = torch.ones(4, 8)
    assert _fingerprint(rows) == _fingerprint(rows.clone()) != _fingerprint(rows[:3])


# -- beside data parallelism -------------------------------------------------------------------------------------------
def test_a_mesh_of_two_by_two_makes_the_images_of_one_process(tmp_path: Path) -> None:
    class_conditional(["Cat", "Sea lion"], side=16, prediction_type="v_prediction").save_pretrained(tmp_path / "model")
    model, mesh, alone = (str(tmp_path / name) for name in ("model", "mesh", "alone"))
    told, *silent = together(4, programs.make, tmp_path / "four", model, mesh, 5, 2)
    made = programs.make(model, alone, 5, 1)
    assert told == made and len(made) == 5 and silent == [[], [], []]
    for name in made:
        one, other = (np.asarray(Image.open(Path(folder) / name), dtype=int) for folder in (mesh, alone))
        assert abs(one - other).max() <= 1  # a rounding may end in another of 256 values
    rows = [json.loads(line) for line in (Path(mesh) / FILE).read_text().splitlines()]
    assert [(row["index"], row["status"]) for row in rows] == [(index, "done") for index in range(5)]


def test_a_process_has_its_own_device_before_a_pipeline_is_loaded_onto_it(tmp_path: Path) -> None:
    class_conditional(["Cat"], side=16).save_pretrained(tmp_path / "model")
    assert together(2, programs.load, tmp_path / "load", str(tmp_path / "model")) == [True, True]


# -- refused -----------------------------------------------------------------------------------------------------------
PROGRAM = """
import atexit, os
from torch import distributed
atexit.register(lambda: open(os.environ["RANK"], "w").write(str(distributed.is_initialized())))  # runs last
import trimtab
from trimtab.conformance.tiny import assemble, sd15
trimtab.guide(assemble(sd15)).enable_branch_parallel()
assert distributed.is_initialized()
"""


def test_a_program_that_ends_lets_go_of_the_processes_that_were_joined_for_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False", "False"]


def test_one_process_cannot_share() -> None:
    with pytest.raises(ParameterError, match="this is the only process"):
        trimtab.guide(CASES["sd15"].build()).enable_branch_parallel()


def test_groups_of_a_size_that_does_not_divide_the_processes_are_refused(tmp_path: Path) -> None:
    for said in together(2, programs.refuse, tmp_path / "refuse"):
        given = [text.split("enable_branch_parallel: ")[1].split(";")[0] for text in said]
        assert given == ["processes=3", "processes=0", "processes=True", "timeout=0"]
        assert all("a divisor of the 2 processes that there are: 1, 2" in text for text in said[:3])
