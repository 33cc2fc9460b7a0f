"""`trimtab evaluate` of images that it makes itself, and in several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_programs as programs
import pytest
from PIL import Image
from processes import together
from zoo import CASES
from zoo.class_conditional import class_conditional

import trimtab
from trimtab import cli
from trimtab.evaluation.folders import read_folder
from trimtab.pipelines import interpolate
from trimtab.pipelines.interpolate import istd

COUNT = 20

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("recipe")
    pipe = trimtab.guide(class_conditional(["Cat"], side=16))
    pipe.add_guidance("cfg", scale=2.0)
    pipe.save_guidance(folder)
    return str(folder)


def making(model: str, recipe: str, folder: Path) -> list[str]:
    options = ["--model", model, "--device", "cpu", "--steps", "2", "--class-balanced", str(COUNT)]
    return [*options, "--recipe", recipe, "-o", str(folder)]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", *arguments, "--repetitions", "40", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_recipe_is_measured_as_its_folder_is_and_in_processes_alike(
    model: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, alone, split = tmp_path / "reference", tmp_path / "alone", tmp_path / "split"
    # More than one batch, so that both processes have something to read.
    assert cli.main(["generate", *making(model, recipe, reference), "--class-balanced", "60"]) == 0
    against = ["--reference", str(reference)]
    straight = evaluated(capsys, *making(model, recipe, alone), *against)
    assert straight["about"]["recipe"]["guidances"][0]["plugin"] == "cfg"
    assert straight["about"]["evaluations"] == 4 and straight["about"]["count"] == COUNT
    assert evaluated(capsys, str(alone), *against)["measures"] == straight["measures"]

    two = [*making(model, recipe, split), *against, "--repetitions", "40"]
    for found in together(2, programs.evaluate, tmp_path / "two", *two):
        assert found["measures"] == straight["measures"]
    assert len(list(split.glob("*.png"))) == COUNT


def test_only_what_was_asked_for_is_measured(
    model: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other images in the folder are somebody else's."""
    before = evaluated(capsys, *making(model, recipe, tmp_path))
    for file in list(read_folder(tmp_path).files):
        (tmp_path / f"copy-of-{file.name}").write_bytes(file.read_bytes())
    assert evaluated(capsys, *making(model, recipe, tmp_path)) == before


def test_interpolations_are_made_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    CASES["sd15"].build().save_pretrained(tmp_path / "sd")
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n")
    options = ["--model", str(tmp_path / "sd"), "--steps", "2", "--seeds", "0-3", "--frames", "3"]
    found = evaluated(capsys, *options, "--prompts", str(file), "-o", str(tmp_path / "out"))
    assert list(found["measures"]) == ["istd"] and found["about"]["count"] == 2
    opened = [Image.open(path) for path in (tmp_path / "out").glob("*.png")]
    strips = [[strip.crop((32 * i, 0, 32 * i + 32, 32)) for i in range(3)] for strip in opened]
    assert found["measures"]["istd"]["value"] == pytest.approx(sum(map(istd, strips)) / 2)
    # Again, where one of them was not finished: that one is made, and nothing else.
    next((tmp_path / "out").glob("*.gif")).unlink()
    made: list[int] = []
    real = interpolate.interpolate
    monkeypatch.setattr(
        interpolate, "interpolate", lambda pipe, ends, *a, **k: made.append(ends[0].seed) or real(pipe, ends, *a, **k)
    )
    assert evaluated(capsys, *options, "--prompts", str(file), "-o", str(tmp_path / "out")) == found
    assert len(made) == 1
    evaluated(capsys, *options, "--prompts", str(file), "-o", str(tmp_path / "out"), "--frames", "4")
    assert len(made) == 3, "strips of another length are others"
    split = [*options, "--prompts", str(file), "-o", str(tmp_path / "split"), "--repetitions", "40"]
    assert [one["measures"] for one in together(2, programs.evaluate, tmp_path / "two", *split)] == [
        found["measures"]
    ] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "3", "--seeds", "0-3", "--class-balanced", "4"], "--class-balanced: strips are not made so"),
        (["--frames", "3", "--seeds", "0-3", "--branch-parallel", "2"], "--branch-parallel: strips are not made so"),
        (["--frames", "3", "--seeds", "0-2"], "give an even number of seeds"),
        (["--class-balanced", "2", "--branch-parallel", "2"], "this is the only process"),
        (["--class-balanced", "2", "--features", "judge"], "--features: judge compares images with those of"),
    ],
)
def test_no_option_is_passed_over(
    model: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", model, "--device", "cpu", "--steps", "2", "-o", str(tmp_path), *options]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


def test_a_set_of_too_few_images_is_refused_before_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert cli.main(["evaluate", str(tmp_path), "--reference", str(tmp_path)]) == 2
    assert f"the 3 images of {tmp_path} are too few to be compared as a set" in capsys.readouterr().err


# -- before images are made --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frames", ["abc", "1", "2"])
def test_strips_without_an_evenness_of_steps_are_refused(
    frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "--frames", frames, "--seeds", "0-1", "-o", str(tmp_path)])
    assert f"--frames: {frames} is not allowed; allowed: whole numbers from 3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_images_of_prompts_with_nothing_to_measure_them_by_are_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES["sd15"].build().save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    making = ["--model", str(tmp_path / "sd"), "--steps", "2", "--prompts", str(tmp_path / "prompts.txt")]
    for command in (["evaluate"], ["sweep", "--guidance", "cfg:scale=2"]):
        assert cli.main([*command, *making, "-o", str(tmp_path / "out")]) == 2
        assert "nothing to measure: give --reference FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_that_have_no_pair_are_not_made(
    model: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, pairs, again = tmp_path / "made", tmp_path / "pairs", tmp_path / "again"
    assert cli.main(["generate", *making(model, recipe, made)]) == 0
    pairs.mkdir()
    for file in sorted(made.glob("*.png"))[1:]:
        (pairs / file.name).write_bytes(file.read_bytes())
    assert cli.main(["evaluate", *making(model, recipe, again), "--pairs", str(pairs)]) == 2
    assert f"--pairs: {pairs} holds no" in capsys.readouterr().err and not again.exists()
    found = evaluated(capsys, *making(model, recipe, again), "--pairs", str(made))
    assert found["measures"]["psnr"]["value"] == 100.0
