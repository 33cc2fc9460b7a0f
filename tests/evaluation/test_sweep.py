"""`trimtab sweep`: the grid, its cost, the front, and going on after it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_programs as programs
import pytest
import torch
from PIL import Image
from processes import finish, start, together
from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

from trimtab import cli
from trimtab.evaluation import sweep
from trimtab.evaluation.evaluate import HIGHER, LOWER, Evaluation
from trimtab.guidance.errors import ParameterError
from trimtab.pipelines.generate import batch, options

COUNT = 4

pytestmark = pytest.mark.usefixtures("one_thread")


def command(model: str, folder: Path, *more: str, steps: int = 2) -> list[str]:
    making = ["--model", model, "--device", "cpu", "--steps", str(steps), "--class-balanced", str(COUNT)]
    grid = ["--guidance", "cfg:scale=2..4:2", "--guidance", "pag:scale=1,3,layers=mid"]
    return ["sweep", *making, *grid, "--repetitions", "40", "-o", str(folder), *more]


def results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["cells"]
    return found


# -- the grid ----------------------------------------------------------------------------------------------------------
def test_values_and_ranges_make_every_combination() -> None:
    found = options.variations("cfg:scale=1,2..3:0.5,stop=0.5,1")
    assert [(vars(one)["scale"], one.stop) for one in found] == [
        (scale, stop) for scale in (1.0, 2.0, 2.5, 3.0) for stop in (0.5, 1.0)
    ]


def test_a_value_with_a_comma_stands_in_quotes() -> None:
    found = options.variations('perp_neg:negative_prompt="dark, blurry",grey')
    assert [one.parameters["negative_prompt"] for one in found] == ["dark, blurry", "grey"]


@pytest.mark.parametrize("text", ["cfg:scale=3..1", "cfg:scale=1..3:0", "cfg:scale=0..1000:0.1"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match=r"rising range FIRST..LAST:STEP of at most 100"):
        options.variations(text)


def test_equal_values_are_one_cell() -> None:
    found = sweep.cells(["cfg:scale=2,2.0,1..2"], {})
    assert [cell.label for cell in found] == ["no guidance", "cfg scale=2", "cfg scale=1"]


# -- the front ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("direction", "expected"), [(LOWER, [True, False, True, False]), (HIGHER, [True, True, False, False])]
)
def test_the_front_is_what_nothing_beats(direction: str, expected: list[bool]) -> None:
    assert sweep.pareto([(1, 5.0), (2, 6.0), (2, 4.0), (3, 5.0)], direction) == expected


def test_equal_cells_are_both_on_the_front() -> None:
    assert sweep.pareto([(1, 5.0), (1, 5.0)], LOWER) == [True, True]


# -- the command -------------------------------------------------------------------------------------------------------
def test_a_sweep_measures_every_cell_against_its_cost(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command(model, tmp_path)) == 0
    written = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert written == ["sweep.json", "sweep.png", "sheet.png"]
    cells = results(tmp_path)
    assert [cell["label"] for cell in cells] == ["no guidance"] + [
        f"cfg scale={a}, pag scale={b} layers=mid" for a in (2, 4) for b in (1, 3)
    ]
    assert [cell["evaluations"] for cell in cells] == [2, 6, 6, 6, 6]
    assert cells[0]["pareto"] and all(cell["measures"]["accuracy"]["low"] <= 1 for cell in cells)
    assert Image.open(tmp_path / "sweep.png").size == (1100, 640)
    assert Image.open(tmp_path / "sheet.png").height > 5 * 96
    # A cell is a folder that `trimtab evaluate` measures the same.
    assert cli.main(["evaluate", str(tmp_path / cells[1]["folder"]), "--repetitions", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measures"] == cells[1]["measures"]

    # Again, with one more value: only its cells are made and measured.
    made, measured = [], []
    generate, of = batch.generate, Evaluation.__call__
    monkeypatch.setattr(batch, "generate", lambda pipe, one: made.append(one.seed) or generate(pipe, one))
    monkeypatch.setattr(Evaluation, "__call__", lambda self, images: measured.append(images) or of(self, images))
    assert cli.main([*command(model, tmp_path), "--guidance", "rescale:phi=0.5"]) == 0
    assert len(made) == 4 * COUNT and len(measured) == 4
    assert cli.main([*command(model, tmp_path), "--guidance", "rescale:phi=0.5"]) == 0
    assert len(made) == 4 * COUNT and len(measured) == 4


def test_a_killed_sweep_continues_in_other_processes_to_the_same_numbers(model: str, tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    # Within the second of five cells.
    killed = ("between its file and its row", COUNT + 2, *command(model, parts))
    assert finish(start(1, programs.killed, tmp_path / "one", *killed), tmp_path / "one") == [None]
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*/*.png")}
    assert len(before) == COUNT + 2 and not (parts / "sweep.json").exists()

    assert together(2, programs.run, tmp_path / "two", *command(model, parts)) == [0, 0]
    assert cli.main(command(model, whole)) == 0
    assert results(parts) == results(whole)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert len(list(parts.glob("*/*.png"))) == 5 * COUNT


def test_processes_that_share_branches_find_the_numbers_of_one(model: str, tmp_path: Path) -> None:
    alone, sharing = tmp_path / "alone", tmp_path / "sharing"
    assert together(2, programs.run, tmp_path / "two", *command(model, sharing, "--branch-parallel", "2")) == [0, 0]
    assert cli.main(command(model, alone)) == 0
    for one, other in zip(results(sharing), results(alone), strict=True):
        assert one["label"] == other["label"] and one["evaluations"] == other["evaluations"]
        for name, measure in one["measures"].items():  # to rounding: a pixel may have another of 256 values
            assert measure == pytest.approx(other["measures"][name], abs=1e-3)


def train(network: Path, seed: int) -> None:
    torch.manual_seed(seed)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(network)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(network)


def test_a_cell_is_measured_anew_by_a_network_that_was_trained_anew(tmp_path: Path) -> None:
    network, images, real = (tmp_path / name for name in ("network", "images", "real"))
    for folder in (images, real):
        folder.mkdir()
        for index in range(8):
            Image.effect_noise((16, 16), 20.0 + index).save(folder / f"{index}.png")

    def measured(seed: int) -> dict[str, Any]:
        train(network, seed)
        evaluation = Evaluation(real, str(network), repetitions=5)
        return sweep.measured_cell(evaluation, images, sorted(images.glob("*.png")))["measures"]

    first = measured(0)
    assert measured(0) == first
    assert measured(1)["kernel_distance"] != first["kernel_distance"]


def test_a_network_that_is_trained_anew_while_images_are_made_is_not_taken_for_the_one_that_measured(
    tmp_path: Path,
) -> None:
    network, images, real = (tmp_path / name for name in ("network", "images", "real"))
    for folder in (images, real):
        folder.mkdir()
        for index in range(8):
            Image.effect_noise((16, 16), 20.0 + index).save(folder / f"{index}.png")
    files = sorted(images.glob("*.png"))

    train(network, 0)
    evaluation = Evaluation(real, str(network), repetitions=5)
    train(network, 1)
    before = sweep.measured_cell(evaluation, images, files)["measures"]
    after = sweep.measured_cell(Evaluation(real, str(network), repetitions=5), images, files)["measures"]
    assert after["kernel_distance"] != before["kernel_distance"]


def noise(file: Path, seed: int) -> None:
    """Of the same size in bytes whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (16, 16), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(file, compress_level=0)


@pytest.mark.parametrize("changed", ["images", "reference", "pairs"])
def test_a_cell_is_measured_anew_where_an_image_has_another_content(changed: str, tmp_path: Path) -> None:
    for folder in ("images", "reference", "pairs"):
        (tmp_path / folder).mkdir()
        for index in range(8):
            noise(tmp_path / folder / f"{index}.png", index)

    def measured() -> dict[str, Any]:
        evaluation = Evaluation(tmp_path / "reference", pairs=tmp_path / "pairs" / "0.png", repetitions=5)
        return sweep.measured_cell(evaluation, tmp_path / "images", sorted((tmp_path / "images").glob("*.png")))

    before = measured()["measures"]
    file = tmp_path / changed / "0.png"
    size = file.stat().st_size
    noise(file, 99)
    assert file.stat().st_size == size
    name = "kernel_distance" if changed == "reference" else "psnr"
    assert measured()["measures"][name] != before[name]


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"asked": 1}', "[" * 100_000, b"\xff"])
def test_a_cell_whose_measures_cannot_be_read_is_measured_again(content: str | bytes, tmp_path: Path) -> None:
    for index in range(2):
        noise(tmp_path / f"{index}.png", index)
    pairs, files = tmp_path / "0.png", sorted(tmp_path.glob("*.png"))
    found = sweep.measured_cell(Evaluation(pairs=pairs, repetitions=5), tmp_path, files)
    kept = (tmp_path / sweep.CELL).read_bytes()
    (tmp_path / sweep.CELL).write_bytes(content.encode() if isinstance(content, str) else content)
    assert sweep.measured_cell(Evaluation(pairs=pairs, repetitions=5), tmp_path, files) == found
    assert (tmp_path / sweep.CELL).read_bytes() == kept


def test_cells_of_one_image_are_drawn_without_intervals(model: str, tmp_path: Path) -> None:
    assert cli.main(command(model, tmp_path, "--class-balanced", "1", "--quality", "confidence")) == 0
    assert all(cell["measures"]["confidence"].keys() == {"value"} for cell in results(tmp_path))
    assert Image.open(tmp_path / "sweep.png").size == (1100, 640)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--quality", "beauty"], "'beauty' is no measure; allowed: kernel_distance"),
        (["--quality", "psnr"], "--quality: psnr needs --pairs; give it too."),
        (["--quality", "coverage"], "--quality: coverage needs --reference; give it too."),
        (["--quality", "istd"], "istd cannot be taken of these images; what will be measured: accuracy, confidence"),
        (["--pairs", "."], "--pairs: . is a folder, but the images of each cell have names of their own; allowed: one"),
        (["--features", "judge"], "--features: judge compares images with those of --reference or --pairs"),
        (["--branch-parallel", "2"], "this is the only process"),
        (["--guidance", "cfg:scale=1"], "cfg is given twice"),
        (["--guidance", "slg:scale=x,1"], "scale='x' cannot be read"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    model: str, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(model, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_few_images_for_the_references_are_refused_before_any_is_made(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for index in range(8):
        Image.effect_noise((16, 16), 20.0 + index).save(real / f"{index}.png")
    assert cli.main(command(model, tmp_path / "out", "--reference", str(real))) == 2
    assert f"--reference: the {COUNT} images of {tmp_path / 'out'} are too few" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/**/*.png"))
