"""PNG files that say how they were made, and sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trimtab.pipelines.generate import pictures
from trimtab.pipelines.generate.pictures import PictureError, Row


def grey(size: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8), mode="L")


def test_a_saved_picture_comes_back_with_every_pixel_and_every_setting(tmp_path: Path) -> None:
    settings = {"prompt": "Grüße, 世界", "seed": 2**62, "scale": 0.1, "guidance": {"guidances": []}, "steps": None}
    path = pictures.save(grey(), tmp_path / "new" / "a.png", settings)
    image, found = pictures.load(path)
    assert found == settings
    assert image.mode == "L" and image.tobytes() == grey().tobytes()


def test_a_rewritten_picture_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    for seed in (0, 1):
        pictures.save(grey(seed=seed), tmp_path / "a.png", {"seed": seed})
    assert pictures.load(tmp_path / "a.png")[1] == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file_whole_and_no_other(tmp_path: Path) -> None:
    pictures.save(grey(), tmp_path / "a.png", {"seed": 0})
    with pytest.raises(OSError, match="cannot write mode"):
        pictures.save(grey().convert("HSV"), tmp_path / "a.png", {"seed": 1})
    assert pictures.load(tmp_path / "a.png")[1] == {"seed": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.png: no such file"):
        pictures.load(tmp_path / "nothing.png")


def test_a_picture_is_whole_if_it_was_written_to_its_end(tmp_path: Path) -> None:
    path = pictures.save(grey(), tmp_path / "a.png", {"seed": 0})
    written = path.read_bytes()
    assert pictures.whole(path)
    for damaged in (b"", written[:5], written[:-1], written[:-400], written[:-400] + bytes(400), bytes(len(written))):
        path.write_bytes(damaged)
        assert not pictures.whole(path)
    assert not pictures.whole(tmp_path) and not pictures.whole(tmp_path / "absent.png")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_png_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(PictureError, match=r"a\.png is not a PNG file"):
        pictures.load(tmp_path / "a.png")


def test_a_truncated_png_is_refused(tmp_path: Path) -> None:
    path = pictures.save(grey(), tmp_path / "a.png", {"seed": 0})
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(PictureError, match=r"a\.png is not a PNG file"):
        pictures.load(path)


def test_a_png_of_another_program_is_refused(tmp_path: Path) -> None:
    grey().save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="carries no settings"):
        pictures.load(tmp_path / "a.png")


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ("[1]", "a list, not a JSON object")])
def test_settings_that_are_no_json_object_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    chunk = pictures.PngImagePlugin.PngInfo()
    chunk.add_text(pictures.KEY, text)
    grey().save(tmp_path / "a.png", pnginfo=chunk)
    with pytest.raises(PictureError, match=reason):
        pictures.load(tmp_path / "a.png")


def cells(sheet: Image.Image, image: Image.Image, factor: int) -> int:
    """How often an image, enlarged without smoothing, is found on a sheet."""
    wanted = np.kron(np.asarray(image), np.ones((factor, factor), np.uint8))
    canvas = np.asarray(sheet.convert("L"))
    height, width = wanted.shape
    corners = np.argwhere(canvas[: -height + 1 or None, : -width + 1 or None] == wanted[0, 0])
    return sum(bool((canvas[y : y + height, x : x + width] == wanted).all()) for y, x in corners)


def test_a_sheet_shows_every_image_once_enlarged_to_96_pixels_with_its_pixels_kept() -> None:
    images = [[grey(seed=3 * row + column) for column in range(3)] for row in range(2)]
    rows = [Row("no guidance", images[0]), Row("pag scale=3 layers=mid", images[1])]
    sheet = pictures.sheet("class 7, 25 steps", ["seed 0", "seed 1", "seed 2"], rows)
    assert all(cells(sheet, image, factor=3) == 1 for row in images for image in row)


def test_a_sheet_labels_its_rows_its_columns_and_itself() -> None:
    white = Image.new("L", (32, 32), 255)
    blank = pictures.sheet(" ", [" "], [Row(" ", [white])])
    assert np.asarray(blank).min() == 255
    for title, column, row in (("title", " ", " "), (" ", "seed 0", " "), (" ", " ", "pag")):
        assert np.asarray(pictures.sheet(title, [column], [Row(row, [white])])).min() == 0


def test_no_label_covers_an_image_however_long_it_is() -> None:
    white = Image.new("L", (32, 32), 255)
    sheet = pictures.sheet(
        "title " * 30, ["a very long column label"] * 2, [Row("parameter=value " * 20, [white] * 2)] * 2
    )
    assert cells(sheet, grey(), factor=3) == 0
    assert cells(sheet, white, factor=3) >= 4


def test_large_images_are_shrunk_to_512_pixels() -> None:
    sheet = pictures.sheet("title", ["seed 0"], [Row("none", [Image.new("RGB", (2048, 1024))])])
    assert 512 < sheet.width < 1024 and 256 < sheet.height < 512


def test_a_ragged_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="'none' has 1 images for 2 columns"):
        pictures.sheet("title", ["seed 0", "seed 1"], [Row("none", [grey()])])
