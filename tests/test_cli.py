"""The `trimtab` command on a tiny model with random weights."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import CASES
from zoo.class_conditional import class_conditional

import trimtab
from trimtab import cli, parser
from trimtab.guidance import listing, recipe, registry
from trimtab.pipelines.generate import pictures
from trimtab.pipelines.generate.samples import length_of_text
from trimtab.training import TrainingSettings

GUIDANCES = ("--guidance", "cfg:scale=3", "--guidance", "pag:scale=2,layers=mid")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a class-conditional model of two classes and 16x16 pixels."""
    folder = tmp_path_factory.mktemp("model")
    class_conditional(["Cat", "Sea lion"], side=16, prediction_type="v_prediction").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a stock Stable Diffusion pipeline of tiny size."""
    folder = tmp_path_factory.mktemp("text-model")
    CASES["sd15"].build().save_pretrained(folder)
    return str(folder)


class Command:
    """Runs `trimtab generate` in this process and returns the files that it names."""

    def __init__(self, model: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.folder, self.capsys = model, folder, capsys
        self.stderr = ""

    def __call__(self, *arguments: str | Path, model: bool = True) -> list[Path]:
        options = ["--model", self.model, "--steps", "3", "--device", "cpu"] if model else []
        assert cli.main(["generate", *options, *map(str, arguments), "-o", str(self.folder)]) == 0
        output = self.capsys.readouterr()
        self.stderr = output.err
        return [Path(line) for line in output.out.splitlines()]


@pytest.fixture
def generate(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(model, tmp_path / "out", capsys)


def pixels(path: Path) -> bytes:
    return pictures.load(path)[0].tobytes()


# -- images ------------------------------------------------------------------------------------------------------------
def test_one_image_a_class_and_seed_each_in_its_own_file(generate: Command) -> None:
    files = generate("--class", "cat", "--class", "1", "--seeds", "0,2-3")
    assert len({pixels(path) for path in files}) == 6
    assert [(pictures.load(path)[1]["class_label"], pictures.load(path)[1]["seed"]) for path in files] == [
        (label, seed) for label in ("cat", "1") for seed in (0, 2, 3)
    ]
    assert sorted(generate.folder.iterdir()) == sorted(files)


def test_an_image_is_the_one_that_the_pipeline_makes_from_its_seed(generate: Command, model: str) -> None:
    (path,) = generate("--class", "Sea lion", "--seeds", "5")
    stock = trimtab.ClassConditionalPipeline.from_pretrained(model)
    generator = torch.Generator("cpu").manual_seed(5)
    expected = stock(class_labels=[1], num_inference_steps=3, generator=generator).images[0]
    assert pixels(path) == expected.tobytes()


def test_an_image_does_not_depend_on_the_others_of_the_command(generate: Command) -> None:
    together = generate("--class", "0", "--class", "1", "--seeds", "0-2", *GUIDANCES)
    (alone,) = generate("--class", "1", "--seeds", "2", *GUIDANCES)
    assert pixels(alone) == pixels(together[-1])


def test_other_settings_never_overwrite_an_image(generate: Command) -> None:
    files = [generate("--class", "0"), generate("--class", "0", "--guidance", "pag"), generate("--class", "none")]
    assert len({path for (path,) in files}) == 3
    assert len({pixels(path) for (path,) in files}) == 3


def test_the_file_records_all_that_the_image_depends_on(generate: Command, model: str) -> None:
    (path,) = generate("--class", "cat", "--seeds", "7", *GUIDANCES)
    settings = pictures.load(path)[1]
    assert {
        key: settings[key] for key in ("model", "class_label", "prompt", "seed", "steps", "scheduler", "dtype")
    } == {
        "model": model,
        "class_label": "cat",
        "prompt": None,
        "seed": 7,
        "steps": 3,
        "scheduler": "DDIMScheduler",
        "dtype": "float32",
    }
    assert settings["size"] == [16, 16]
    assert settings["versions"]["trimtab"] == trimtab.__version__
    guidances = recipe.load(settings["guidance"])
    assert {name: guidance.parameters["scale"] for name, guidance in guidances.items()} == {"cfg": 3.0, "pag": 2.0}


def test_a_recipe_file_does_what_the_options_do(generate: Command, tmp_path: Path) -> None:
    guidances = {"cfg": registry.create("cfg", scale=3.0), "pag": registry.create("pag", scale=2.0, layers="mid")}
    path = recipe.save(tmp_path / "mine.json", guidances)
    (first,), (second,) = generate("--class", "0", *GUIDANCES), generate("--class", "0", "--recipe", path)
    assert first == second and pictures.load(first)[1]["guidance"] == recipe.dump(guidances)


def test_the_recipe_of_a_saved_pipeline_acts_and_is_recorded(generate: Command, model: str, tmp_path: Path) -> None:
    pipe = trimtab.GuidedPipeline.from_pretrained(model)
    pipe.add_guidance("pag", scale=2.0)
    pipe.save_pretrained(tmp_path / "saved")
    (path,) = generate("--class", "0", "--model", tmp_path / "saved")
    (expected,) = generate("--class", "0", "--guidance", "pag:scale=2")
    assert pixels(path) == pixels(expected)
    assert list(recipe.load(pictures.load(path)[1]["guidance"])) == ["pag"]


def test_a_text_model_takes_a_prompt_and_the_pipelines_own_options(
    text_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Command(text_model, tmp_path / "out", capsys)
    options = ("--negative-prompt", "bad", "--guidance-scale", "3", "--height", "32", "--width", "64")
    (path,) = generate("a red bicycle", *options, "--guidance", "pag:scale=2")
    image, settings = pictures.load(path)
    assert image.size == (64, 32)
    assert (settings["prompt"], settings["negative_prompt"], settings["guidance_scale"]) == (
        "a red bicycle",
        "bad",
        3.0,
    )
    (again,) = generate("--like", path, model=False)
    assert pixels(again) == pixels(path)


# -- repeating ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_like_repeats_an_image_bit_for_bit_and_says_so(generate: Command, scheduler: str) -> None:
    (path,) = generate("--class", "cat", "--seeds", "3", "--scheduler", scheduler, *GUIDANCES)
    original = pixels(path)
    (again,) = generate("--like", path, model=False)
    assert again == path and pixels(again) == original
    assert "the same as" in generate.stderr and "bit for bit" in generate.stderr


def test_like_with_another_option_changes_that_alone(generate: Command) -> None:
    (path,) = generate("--class", "cat", "--seeds", "3", *GUIDANCES)
    changed = generate("--like", path, "--seeds", "3,4", "--guidance", "pag", model=False)
    before, *after = (pictures.load(file)[1] for file in (path, *changed))
    assert [settings["seed"] for settings in after] == [3, 4]
    differing = {key for key in before if before[key] != after[0][key]}
    assert differing == {"guidance"}
    assert "bit for bit" not in generate.stderr


def test_like_warns_when_the_image_comes_out_differently(generate: Command, tmp_path: Path) -> None:
    (path,) = generate("--class", "cat")
    image, settings = pictures.load(path)
    settings["versions"]["torch"] = "1.0"
    altered = pictures.save(image.point(lambda value: 255 - value), tmp_path / "altered.png", settings)
    generate("--like", altered, model=False)
    assert "warning: differs from" in generate.stderr and "torch 1.0 then" in generate.stderr


@pytest.fixture
def inpainting(generate: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image whose recipe holds two others, made in a folder in which they no longer lie."""
    (known,) = generate("--class", "cat", "--seeds", "9")
    monkeypatch.chdir(generate.folder)
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 16))
    mask.save("mask-of-mine.png")
    (path,) = generate(
        "--class", "1", "--guidance", f"steered:task=inpainting,image={known.name},mask=mask-of-mine.png"
    )
    known_pixels = np.asarray(pictures.load(known)[0])
    assert (np.asarray(pictures.load(path)[0])[:, :8] == known_pixels[:, :8]).all()
    known.unlink()
    Path("mask-of-mine.png").unlink()
    return path


def test_like_repeats_an_image_that_others_guided_wherever_it_is_copied(
    inpainting: Path, generate: Command, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(inpainting.parent, tmp_path / "elsewhere")) / inpainting.name
    generate.folder = tmp_path / "again"
    (again,) = generate("--like", copied, model=False)
    assert pixels(again) == pixels(inpainting) and "bit for bit" in generate.stderr
    assert sorted(path.name for path in again.parent.iterdir()) == sorted(path.name for path in copied.parent.iterdir())


def test_like_refuses_an_image_whose_own_images_were_exchanged(
    inpainting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mask,) = inpainting.parent.glob("mask-*.png")
    Image.new("L", (16, 16), 255).save(mask)
    assert cli.main(["generate", "--like", str(inpainting), "-o", str(tmp_path / "again")]) == 2
    assert f"the file '{mask.name}' is not the one that was recorded" in capsys.readouterr().err
    mask.unlink()
    assert cli.main(["generate", "--like", str(inpainting), "-o", str(tmp_path / "again")]) == 2
    assert f"There is no file '{mask.name}'" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


# -- sheets ------------------------------------------------------------------------------------------------------------
def test_a_comparison_has_a_row_for_none_each_and_all_and_a_column_a_seed(generate: Command) -> None:
    (path,) = generate("--class", "cat", "--seeds", "0-2", "--compare", *GUIDANCES)
    sheet, settings = pictures.load(path)
    assert settings["rows"] == ["no guidance", "cfg scale=3", "pag scale=2 layers=mid", "all together"]
    assert settings["seeds"] == [0, 1, 2]
    assert sheet.width > 3 * 96 and sheet.height > 4 * 96


def test_one_guidance_has_no_row_for_all_together(generate: Command) -> None:
    (path,) = generate("--class", "cat", "--compare", "--guidance", "pag:scale=2")
    assert pictures.load(path)[1]["rows"] == ["no guidance", "pag scale=2"]


def test_each_cell_is_the_image_that_its_settings_make_alone(generate: Command) -> None:
    (path,) = generate("--class", "cat", "--seeds", "4", "--compare", *GUIDANCES)
    canvas = np.asarray(pictures.load(path)[0].convert("L"))
    for options in ((), GUIDANCES[:2], GUIDANCES[2:], GUIDANCES):
        (single,) = generate("--class", "cat", "--seeds", "4", *options)
        cell = np.kron(np.asarray(pictures.load(single)[0]), np.ones((6, 6), np.uint8))
        windows = np.lib.stride_tricks.sliding_window_view(canvas, cell.shape)
        corners = np.argwhere(windows[:, :, 0, 0] == cell[0, 0])
        assert any((windows[y, x] == cell).all() for y, x in corners)


def test_like_repeats_a_sheet(generate: Command) -> None:
    (path,) = generate("--class", "cat", "--seeds", "0,2", "--compare", *GUIDANCES)
    assert generate("--like", path, model=False) == [path]
    assert "bit for bit" in generate.stderr


# -- looking -----------------------------------------------------------------------------------------------------------
def test_show_prints_the_settings(generate: Command, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = generate("--class", "cat", "--seeds", "3")
    assert cli.main(["show", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == pictures.load(path)[1]


def test_a_trace_is_written_on_demand_and_drawn(
    generate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_TRACE", str(tmp_path / "traces"))
    generate("--class", "cat", *GUIDANCES)
    (file,) = (tmp_path / "traces").glob("*.json")
    assert cli.main(["trace", str(file), "-o", str(tmp_path / "trace.png")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(tmp_path / "trace.png")]
    assert all(f"{name}       delta" in said.err for name in ("cfg", "pag"))
    assert Image.open(tmp_path / "trace.png").width == 1100


def test_what_is_no_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.json").write_text("{}")
    assert cli.main(["trace", str(tmp_path / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err


def test_explain_prints_the_plan_and_makes_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "--model", model, "--class", "cat", "--steps", "7", *GUIDANCES]) == 0
    output = capsys.readouterr().out
    assert "7 scheduler steps" in output and "cfg" in output and "pag" in output
    assert list(tmp_path.iterdir()) == []


def test_plugins_are_listed_with_their_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "STATUS", "PHASES", "COST", "FROM", "ORIGIN"]
    assert {"cfg", "pag"} <= {line.split()[0] for line in lines if line.split()[1] == "ok"}
    assert cli.main(["plugins", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [listing.status(name) for name in registry.plugins()]


def test_a_plugin_is_described_with_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "info", "pag", "--json"]) == 0
    described = {one["name"]: one for one in json.loads(capsys.readouterr().out)["parameters"]}
    assert described.keys() == registry.create("pag").parameters.keys()
    assert (described["scale"]["default"], described["scale"]["allowed"]) == (3.0, ">= 0")
    assert described["sigma_max"]["default"] == "inf"
    assert cli.main(["plugins", "info", "pag"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}: " in text for name in described)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a plug-in whose module cannot be imported."""
    plugin = registry.Plugin("test.broken", "no_such_module:Thing", "test-broken", "0.1")
    monkeypatch.setattr(registry, "_discovered", {**registry.plugins(), "test.broken": plugin})
    return plugin.name


def test_a_broken_plugin_is_shown_with_its_traceback(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "list"]) == 0
    assert "test.broken is broken:\nTraceback" in capsys.readouterr().out
    assert cli.main(["plugins", "info", broken]) == 1
    assert "test.broken (test-broken 0.1)\n\nbroken:\nTraceback" in capsys.readouterr().out


def test_a_check_of_a_blocked_plugin_by_name_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_PLUGINS_BLOCKED", "pag")
    assert cli.main(["plugins", "check", "pag"]) == 1


def test_a_check_fails_for_a_broken_plugin_only(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "check", "cfg", "pag"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["cfg: ok", "pag: ok"]
    assert cli.main(["plugins", "check"]) == 1
    assert "No module named 'no_such_module'" in capsys.readouterr().out
    assert cli.main(["plugins", "check", broken, "--json"]) == 1
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["status"], one["advice"]) == ("broken", [])
    assert cli.main(["plugins", "check", "pagg"]) == 2
    assert "Did you mean 'pag'" in capsys.readouterr().err


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"needs a class: --class NAME or INDEX, one of 0 'Cat', 1 'Sea lion'"),
        (["a cat"], r"takes a class, not a prompt: --class .*'Sea lion'"),
        (["--class", "sea lino"], r"no class 'sea lino'\. Did you mean 'Sea lion'\?"),
        (["--class", "2"], r"no class '2'"),
        (["--class", "0", "--negative-prompt", "x"], r"--negative-prompt: .* has no such option"),
        (["--class", "0", "--height", "64"], r"--height: .* has no such option"),
        (
            ["--class", "0", "--scheduler", "EulerDiscreteSchedular"],
            r"Did you mean 'EulerDiscreteScheduler'\?.*DDIMSch",
        ),
        (["--class", "0", "--guidance", "pagg"], r"Did you mean 'pag'"),
        (["--class", "0", "--guidance", "pag:scal=2"], r"pag: no parameter 'scal'\. Did you mean 'scale'"),
        (["--class", "0", "--guidance", "pag:scale=-1"], r"pag: scale=-1\.0 is out of range; allowed: >= 0"),
        (["--class", "0", "--guidance", "pag:layers=nowhere"], r"nowhere"),
        (["--class", "0", "--dtype", "int8"], r"--dtype: 'int8' is not one of float32, bfloat16, float16"),
        (["--class", "0", "--device", "abacus"], r"--device: 'abacus' cannot be used here"),
        (["--class", "0", "--seeds", "x"], r"--seeds: 'x' is neither a seed nor a range"),
        (["--class", "0", "--steps", "0"], r"--steps: 0 is not allowed; allowed: whole numbers from 1"),
        (["--class", "0", "--compare"], r"--compare: no guidance is given"),
        (["--class", "0", "--recipe", "absent.json"], r"absent\.json"),
        (["--like", "absent.png"], r"absent\.png: no such file"),
        (["--like", __file__], r"is not a PNG file"),
        (
            ["--class", "0", "--guidance", "ppap:classifier=./absent,weights=a,target=1"],
            r"'\./absent' .*\(guidance 'ppap'",
        ),
        (["--class", "0", "--model", "./absent"], r"There is no folder './absent', and no repository can have that"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_makes_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    capsys.readouterr()
    assert cli.main(["generate", "--model", model, *arguments, "-o", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    (line,) = [line for line in output.err.splitlines() if line.startswith("trimtab: error: ")]
    assert output.err.endswith(line + "\n") and "Traceback" not in output.err
    assert re.search(message, line), line
    assert output.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--class", "cat"], "takes a prompt, not a class"), ([], "needs a prompt")]
)
def test_a_text_model_says_what_it_takes(
    text_model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["generate", "--model", text_model, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["generate", "--frob"], ["generate", "--steps", "x"], ["paint"]])
def test_an_unknown_option_or_command_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trimtab: error: ") and "--help" in line


def test_the_debug_variable_lets_the_traceback_through(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(ValueError, match="no class 'dog'"):
        cli.main(["generate", "--model", model, "--class", "dog"])


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m trimtab plugins info pag | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_the_package_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "trimtab", "--help"], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("generate", "explain", "show", "plugins", "train"))


# -- training ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", parser.TRAININGS)
def test_every_training_explains_its_options(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", what, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(TrainingSettings))


def test_an_unknown_training_lists_what_can_be_trained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "bass"])
    assert stop.value.code == 2 and "base" in capsys.readouterr().err


def test_a_trained_model_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, values: Any) -> None:
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (tmp_path / name).write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))

    for split in ("train", "t10k"):
        write(f"{split}-images-idx3-ubyte.gz", np.random.default_rng(0).integers(0, 256, (4, 28, 28)))
        write(f"{split}-labels-idx1-ubyte.gz", np.arange(4))
    options = ["--output", str(tmp_path / "run"), "--data", str(tmp_path), "--steps", "1", "--batch-size", "2"]
    assert cli.main(["train", "base", *options]) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    (path,) = Command(folder, tmp_path / "out", capsys)("--class", "bag")
    assert Image.open(path).size == (32, 32)


def test_a_prompt_is_padded_to_no_more_tokens_than_the_model_was_made_for() -> None:
    flux, sd = CASES["flux"].build(), CASES["sd15"].build()
    flux.tokenizer_2.model_max_length = 12
    assert length_of_text(flux) == {"max_sequence_length": 12}
    flux.tokenizer_2.model_max_length = 512
    assert length_of_text(flux) == length_of_text(sd) == {}


def test_the_models_that_ship_are_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, subject in (
        ("trimtab/fashion", ["--class", "sneaker"]),
        ("trimtab/emoji-sd", ["red apple, noto style"]),
    ):
        (path,) = Command(model, tmp_path, capsys)(*subject, "--steps", "2", model=False)
        assert pictures.load(path)[1]["model"] == model
        assert np.asarray(Image.open(path)).std() > 0
