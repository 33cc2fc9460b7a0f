"""A batch: the same images from one process or many, nothing lost or doubled whenever it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_programs as programs
import psutil
import pytest
from processes import finish, start, together
from safetensors.torch import load_file, save_file
from zoo.class_conditional import class_conditional

from trimtab import cli
from trimtab.pipelines.generate import batch
from trimtab.pipelines.generate.manifest import FILE, Manifest
from trimtab.pipelines.generate.request import Request, RequestError

COUNT = 7

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    class_conditional(["Cat", "Sea lion"], side=16, prediction_type="v_prediction").save_pretrained(folder)
    return str(folder)


def options(model: str, folder: Path, *more: str, steps: int = 2) -> list[str]:
    settings = ["--model", model, "--device", "cpu", "--steps", str(steps), "--guidance", "cfg:scale=2"]
    return ["generate", *settings, "--class-balanced", str(COUNT), "-o", str(folder), *more]


def command(model: str, folder: Path, *more: str, steps: int = 2) -> list[str]:
    return [sys.executable, "-m", "trimtab", *options(model, folder, *more, steps=steps)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def until(there: Callable[[], Any]) -> None:
    """Wait for something that another process makes."""
    deadline = time.monotonic() + 120
    while not there() and time.monotonic() < deadline:
        time.sleep(0.02)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


# -- processes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_several_processes_make_what_one_makes_and_name_it_in_order(model: str, tmp_path: Path, processes: int) -> None:
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert cli.main(options(model, alone)) == 0
    result = subprocess.run(
        command(model, many, "--processes", str(processes)),
        check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    rows = listed(many)
    assert contents(many) == contents(alone) and rows == listed(alone)
    assert [row["index"] for row in rows] == [row["seed"] for row in rows] == list(range(COUNT))
    assert [row["subject"] for row in rows[:3]] == ["class Cat", "class Sea lion", "class Cat"]
    assert [Path(line).name for line in result.stdout.splitlines()] == [row["file"] for row in rows]
    assert f"{COUNT}/{COUNT}" in result.stderr  # the bar of the first process counts the images of all


def test_the_launcher_of_accelerate_starts_processes_that_share_a_batch(model: str, tmp_path: Path) -> None:
    alone, many = tmp_path / "alone", tmp_path / "many"
    launcher = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), "--main_process_port", "0"]
    assert cli.main(options(model, alone)) == 0
    result = subprocess.run(
        [*launch, "-m", "trimtab", *options(model, many)],
        check=True, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert contents(many) == contents(alone) and listed(many) == listed(alone)
    # Two that knew nothing of each other would both name all of them.
    assert [Path(line).name for line in result.stdout.splitlines()] == [row["file"] for row in listed(many)]


def test_a_fast_process_makes_what_a_slow_one_does_not_come_to(model: str, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "together"
    assert cli.main(options(model, alone)) == 0
    fast, slow = together(2, programs.uneven, tmp_path / "two", *options(model, shared))
    assert fast + slow == COUNT and slow <= 2
    assert contents(shared) == contents(alone) and listed(shared) == listed(alone)


def test_a_killed_batch_continues_and_nothing_is_lost_or_doubled(model: str, tmp_path: Path) -> None:
    whole, parts, steps = tmp_path / "whole", tmp_path / "parts", 60
    running = subprocess.Popen(
        command(model, parts, "--processes", "2", steps=steps),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    until(lambda: len(list(parts.glob("*.png"))) >= 2)
    victim = psutil.Process(running.pid).children(recursive=True)[-1]
    os.kill(victim.pid, signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode != 0 and "SIGKILL; the same command continues" in said
    before = contents(parts)
    assert 2 <= len(before) < COUNT

    assert cli.main(options(model, parts, steps=steps)) == 0
    assert cli.main(options(model, whole, steps=steps)) == 0
    assert contents(parts) == contents(whole) and len(contents(parts)) == COUNT
    assert listed(parts) == listed(whole)
    assert before.items() <= contents(parts).items()


def test_an_image_that_stands_twice_in_a_batch_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"class_label": "Cat", "seed": 1}\n{"class_label": "Sea lion", "seed": 1}\n' * 2)
    told = ["generate", "--model", model, "--steps", "2", "--prompts", str(prompts), "-o", str(tmp_path / "out")]
    assert cli.main(told) == 2
    assert "images 1 and 3 of the batch are one and the same: class Cat, seed 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2 -m trimtab"
TORCHRUN = [sys.executable, *LAUNCH.split()]


@pytest.mark.parametrize("launcher", ["--processes", "torchrun"])
def test_a_killed_launcher_takes_its_processes_along_and_any_number_of_them_continues(
    model: str, launcher: str, tmp_path: Path
) -> None:
    """Also the launcher of others, which does not end what it has started."""
    parts, whole, steps = tmp_path / "parts", tmp_path / "whole", 60
    told = command(model, parts, "--processes", "2", steps=steps)
    running = subprocess.Popen(
        told if launcher == "--processes" else [*TORCHRUN, *options(model, parts, steps=steps)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
    )  # fmt: skip
    until(lambda: list(parts.glob("*.png")))
    workers = psutil.Process(running.pid).children(recursive=True)
    assert len(workers) >= 2
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert not alive
    before = contents(parts)
    assert together(3, programs.run, tmp_path / "three", *options(model, parts, steps=steps)) == [0] * 3
    assert cli.main(options(model, whole, steps=steps)) == 0
    assert contents(parts) == contents(whole) and listed(parts) == listed(whole)
    assert before.items() <= contents(parts).items()


def test_of_two_commands_in_one_folder_the_second_is_refused_in_one_line(model: str, tmp_path: Path) -> None:
    """By both of its processes."""
    with batch.alone(tmp_path):
        second = subprocess.run(
            command(model, tmp_path, "--processes", "2"), capture_output=True, text=True, env=ENVIRONMENT, timeout=120
        )
    assert second.returncode == 2
    assert second.stderr.splitlines() == [
        f"trimtab: error: {tmp_path}: another command makes images there; wait for it, or give another folder: "
        "-o FOLDER."
    ]


@pytest.mark.parametrize("moment", programs.MOMENTS)
def test_at_whatever_moment_a_process_is_killed_nothing_is_lost_or_doubled(
    model: str, tmp_path: Path, moment: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    killed, other = start(2, programs.killed, tmp_path / "two", moment, 2, *options(model, parts))
    killed.join(60)
    other.kill()  # as the launcher does
    assert finish([killed, other], tmp_path / "two") == [None, None] and killed.exitcode == -signal.SIGKILL
    before = contents(parts)
    assert 1 <= len(before) < COUNT
    unfinished = list(parts.glob(".*.tmp"))
    assert moment != "within its file" or unfinished
    for path in unfinished:
        os.utime(path, (0, 0))  # as if a minute had passed

    assert cli.main(options(model, parts)) == 0
    assert cli.main(options(model, whole)) == 0
    assert not list(parts.glob(".*.tmp"))
    assert contents(parts) == contents(whole) and len(contents(parts)) == COUNT
    assert listed(parts) == listed(whole)
    assert before.items() <= contents(parts).items()


def test_what_is_there_is_not_made_again(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(options(model, tmp_path)) == 0
    first = sorted(tmp_path.glob("*.png"))[0]
    first.unlink()
    made: list[int] = []
    real = batch.generate
    monkeypatch.setattr(batch, "generate", lambda pipe, request: made.append(request.seed) or real(pipe, request))
    assert cli.main(options(model, tmp_path)) == 0
    assert len(made) == 1 and len(contents(tmp_path)) == COUNT


def test_an_image_whose_file_was_emptied_or_truncated_is_made_again(model: str, tmp_path: Path) -> None:
    assert cli.main(options(model, tmp_path)) == 0
    before = contents(tmp_path)
    emptied, truncated, *_ = tmp_path.glob("*.png")
    emptied.write_bytes(b"")
    truncated.write_bytes(before[truncated.name][:-100])
    assert cli.main(options(model, tmp_path)) == 0
    assert contents(tmp_path) == before and len(listed(tmp_path)) == COUNT


def test_an_image_that_failed_and_is_there_by_now_has_not_failed(model: str, tmp_path: Path) -> None:
    """Made by another command, say."""
    assert cli.main(options(model, tmp_path)) == 0
    before = listed(tmp_path)
    Manifest(tmp_path).append({**before[2], "status": "failed", "error": "RuntimeError: out of memory"})
    assert cli.main(options(model, tmp_path)) == 0
    assert listed(tmp_path) == before


def test_a_folder_that_has_the_name_of_an_image_is_noted_as_its_failure(model: str, tmp_path: Path) -> None:
    assert cli.main(options(model, tmp_path)) == 0
    taken = tmp_path / listed(tmp_path)[2]["file"]
    taken.unlink()
    taken.mkdir()
    assert cli.main(options(model, tmp_path)) == 2
    assert [row["status"] for row in listed(tmp_path)] == ["done", "done", "failed", *["done"] * 4]
    assert f"{taken}: a folder is where this file should be; remove or rename it." in listed(tmp_path)[2]["error"]


def test_images_of_a_model_that_was_trained_anew_under_the_same_path_are_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    class_conditional(["Cat", "Sea lion"], side=16, prediction_type="v_prediction").save_pretrained(folder)
    assert cli.main(options(str(folder), tmp_path / "images")) == 0
    first = contents(tmp_path / "images")
    trained(folder)
    assert cli.main(options(str(folder), tmp_path / "images")) == 0
    again = contents(tmp_path / "images")
    assert len(again) == 2 * COUNT and first.items() <= again.items()
    assert {row["file"] for row in listed(tmp_path / "images")} == again.keys() - first.keys()


def test_images_guided_by_a_network_that_was_trained_anew_are_made_anew(model: str, tmp_path: Path) -> None:
    weak = tmp_path / "weak"
    shutil.copytree(model, weak)
    guided = ["--guidance", f"autoguidance:scale=1,weak={weak}"]
    assert cli.main(options(model, tmp_path / "images", *guided)) == 0
    trained(weak)
    assert cli.main(options(model, tmp_path / "images", *guided)) == 0
    assert len(contents(tmp_path / "images")) == 2 * COUNT


def trained(folder: Path) -> None:
    """Other weights in the same files."""
    file = next((folder / "unet").glob("*.safetensors"))
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_an_image_that_fails_is_noted_and_the_batch_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = batch.generate

    def failing(pipe: Any, request: Request) -> Any:
        if request.seed == 2:
            raise RuntimeError("out of\nmemory")
        return real(pipe, request)

    monkeypatch.setattr(batch, "generate", failing)
    assert cli.main(options(model, tmp_path)) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == COUNT - 1
    assert "1 of 7 images failed" in said.err and "class Cat, seed 2: RuntimeError: out of memory" in said.err
    assert [row["status"] for row in listed(tmp_path)] == ["done", "done", "failed", *["done"] * 4]
    monkeypatch.setattr(batch, "generate", real)
    assert cli.main(options(model, tmp_path)) == 0
    assert {row["status"] for row in listed(tmp_path)} == {"done"}


def test_an_image_that_fails_among_several_processes_is_noted_and_made_by_the_next_command(
    model: str, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert together(2, programs.failing, tmp_path / "two", *options(model, shared)) == [2, 0]  # the first says it
    assert [row["status"] for row in listed(shared)] == ["done", "done", "failed", *["done"] * 4]
    assert listed(shared)[2]["error"] == "RuntimeError: out of memory"
    assert cli.main(options(model, shared)) == cli.main(options(model, alone)) == 0
    assert contents(shared) == contents(alone) and listed(shared) == listed(alone)


# -- the manifest ------------------------------------------------------------------------------------------------------
def test_a_line_that_was_cut_off_is_closed_and_left_out(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.append({"index": 0, "file": "a", "status": "done"})
    with manifest.path.open("a") as file:
        file.write('{"index": 1, "fi')
    manifest.append({"index": 2, "file": "c", "status": "failed"})
    assert list(manifest.rows()) == [0, 2]


def test_rows_of_other_files_and_failures_are_dropped_and_the_order_is_that_of_the_batch(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for index, file in ((2, "c"), (0, "other"), (1, "b")):
        manifest.append({"index": index, "file": file, "status": "done"})
    manifest.keep({0: "a", 1: "b", 2: "c"})
    assert [row["index"] for row in listed(tmp_path)] == [1, 2]


# -- what a batch is made of -------------------------------------------------------------------------------------------
def test_two_commands_do_not_share_a_folder(model: str, tmp_path: Path) -> None:
    with (
        batch.alone(tmp_path),
        pytest.raises(RequestError, match="another command makes images there"),
        batch.alone(tmp_path),
    ):
        pass
    with batch.alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare"], "--compare makes one sheet"),
        (["--prompts", "p.txt"], "--prompts and --class-balanced: give one of them"),
        (["--seeds", "0-3"], "give the first one only"),
        (["--class", "cat"], "--class and --class-balanced: give one of them"),
    ],
)
def test_options_that_contradict_each_other(
    model: str,
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a fox\n")
    assert cli.main(options(model, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.rglob("*.png"))
