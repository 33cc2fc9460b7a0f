"""Tensors and images in parameters lie beside the recipe, and come back only if they are what was recorded."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paint import Paint, full, gradient
from PIL import Image
from zoo import CASES

import trimtab
from trimtab import Guidance, ParameterError, RecipeError, SourceError, register, unregister
from trimtab.guidance import recipe
from trimtab.guidance.parameters import same


@pytest.fixture(autouse=True)
def paint() -> Iterator[None]:
    register(Paint)
    yield
    unregister("test.paint")


def assert_same(one: Guidance, other: Guidance) -> None:
    for name, value in one.parameters.items():
        assert same(value, other.parameters[name]), name


# -- round trip --------------------------------------------------------------------------------------------------------
def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    written = recipe.save(tmp_path, {"a": full()})
    assert_same(recipe.read(tmp_path)["a"], full())
    assert_same(recipe.read(written)["a"], full())
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in files[1:]] == ["layers", "layers", "mask", "table", "table", "target"]
    assert [Path(name).suffix for name in files].count(".png") == 3


def test_the_recipe_names_each_file_with_its_hash(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    data = recipe.dump({"a": Paint(mask=gradient())}, files)
    (name,) = files
    digest = data["guidances"][0]["parameters"]["mask"]["sha256"]
    assert data["guidances"][0]["parameters"]["mask"] == {"file": name, "sha256": digest}
    assert len(digest) == 64 and name == f"mask-{digest[:12]}.png"


def test_equal_values_share_a_file_and_a_second_save_adds_none(tmp_path: Path) -> None:
    both = {"a": Paint(mask=gradient()), "b": Paint(mask=gradient())}
    recipe.save(tmp_path, both)
    before = sorted(tmp_path.iterdir())
    recipe.save(tmp_path, both)
    assert sorted(tmp_path.iterdir()) == before and len(before) == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16"])
def test_every_kind_of_image_that_png_holds(tmp_path: Path, mode: str) -> None:
    image = Image.new("I;16", (3, 2), 40_000) if mode == "I;16" else gradient(mode)
    recipe.save(tmp_path, {"a": Paint(mask=image)})
    assert same(recipe.read(tmp_path)["a"].parameters["mask"], image)


@pytest.mark.parametrize("value", [Image.new("CMYK", (2, 2)), Image.new("F", (2, 2)), Image.new("P", (2, 2))])
def test_an_image_that_would_not_come_back_is_refused(value: Image.Image) -> None:
    with pytest.raises(RecipeError, match=r"mask=<\w+ image 2x2> cannot be stored in a recipe"):
        recipe.dump({"a": Paint(mask=value)}, {})


def test_without_files_a_tensor_is_refused_and_a_failure_gives_none() -> None:
    with pytest.raises(RecipeError, match=r"target=<float32 tensor \[2\]> cannot be stored"):
        recipe.dump({"a": Paint(target=torch.zeros(2))})
    data = recipe.dump({"a": Paint(mask=gradient())}, {})
    with pytest.raises(RecipeError, match=r"came without its file 'mask-"):
        recipe.load(data)


def test_a_pipeline_carries_them(tmp_path: Path) -> None:
    pipe = trimtab.guide(CASES["ddpm"].build())
    pipe.add_guidance(full())
    pipe.save_pretrained(tmp_path / "model")
    assert_same(trimtab.GuidedPipeline.from_pretrained(tmp_path / "model").guidances["test.paint"], full())
    assert_same(copy.deepcopy(pipe).guidances["test.paint"], full())


# -- ranges ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([0.0, 2.0]), r"target=<float32 tensor \[2\]> has values out of range; allowed: -1 to 1"),
        (torch.tensor([float("nan")]), "holds what is not a number"),
        (torch.tensor([float("inf")]), "holds infinity"),
        (gradient(), r"target=<L image 6x4> is "),
    ],
)
def test_a_tensor_is_checked_like_a_number(value: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Paint(target=value)


# -- what is refused ---------------------------------------------------------------------------------------------------
class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def changed(folder: Path, **reference: str) -> Path:
    """A saved recipe whose reference to the mask says something else."""
    path = recipe.save(folder, {"a": Paint(mask=gradient())})
    data = json.loads(path.read_text())
    data["guidances"][0]["parameters"]["mask"] |= reference
    path.write_text(json.dumps(data))
    return path


def test_a_file_that_is_another_one_is_refused(tmp_path: Path) -> None:
    path = recipe.save(tmp_path, {"a": Paint(mask=gradient())})
    (mask,) = tmp_path.glob("*.png")
    gradient("RGB").save(mask)
    with pytest.raises(RecipeError, match=r"'mask-\w+\.png' is not the one that was recorded: its SHA-256 is"):
        recipe.read(path)
    mask.unlink()
    with pytest.raises(RecipeError, match=r"no file 'mask-"):
        recipe.read(path)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "sub/secret.png", "..\\secret.png", "C:secret.png"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    gradient().save(tmp_path / "secret.png")
    with pytest.raises(RecipeError, match="is no name of a file beside the recipe"):
        recipe.read(changed(tmp_path / "inner", file=name))


@pytest.mark.parametrize("name", ["mask.pt", "mask.bin", "mask.pkl", "mask", "mask.safetensors"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    path = changed(tmp_path, file=name)
    (tmp_path / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(RecipeError, match=r"does not fit; allowed: \.safetensors for a tensor, \.png for an image"):
        recipe.read(path)
    assert not mark.exists()


def test_what_is_no_image_or_unpacks_to_too_many_pixels_is_refused(tmp_path: Path) -> None:
    for content, message in ((b"GIF89a", "does not hold an image"), (bomb(), "9000x9000 pixels, more than")):
        (tmp_path / "mask.png").write_bytes(content)
        path = changed(tmp_path, file="mask.png", sha256=hashlib.sha256(content).hexdigest())
        with pytest.raises(RecipeError, match=message):
            recipe.read(path)


def bomb() -> bytes:
    """A small PNG of 81 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, format="PNG")
    assert len(buffer.getvalue()) < 20_000
    return buffer.getvalue()


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe.save(tmp_path, {"a": Paint(mask=gradient())})
    monkeypatch.setitem(recipe.LARGEST, ".png", 10)
    with pytest.raises(RecipeError, match=r"bytes; allowed: at most 10"):
        recipe.read(path)


def test_a_reference_for_a_parameter_that_takes_no_file_is_its_value(tmp_path: Path) -> None:
    path = recipe.save(tmp_path, {"a": Paint()})
    data = json.loads(path.read_text())
    data["guidances"][0]["parameters"]["start"] = {"file": "x.png", "sha256": "0"}
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=r"start=\{.*\} is a dict, not float"):
        recipe.read(path)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(SourceError, match="No recipe can be read"):
        recipe.read("./nowhere")
