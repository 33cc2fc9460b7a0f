"""A folder is one set of images: of one size, made alike or its reader is told, and of bytes on white."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import putchunk

from trimtab.evaluation.features import EvaluationError
from trimtab.evaluation.folders import read, read_folder
from trimtab.pipelines.generate import pictures


def fill(folder: Path, *settings: dict[str, Any]) -> Path:
    for index, one in enumerate(settings):
        pictures.save(Image.new("L", (8, 8), 30 * index), folder / f"{index}.png", one)
    return folder


def test_images_that_differ_in_seed_and_subject_are_one_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, {"seed": 0, "prompt": "a fox", "steps": 4}, {"seed": 1, "prompt": "a cat", "steps": 4})
    Image.new("L", (8, 8)).save(tmp_path / "foreign.jpg")
    assert len(read_folder(tmp_path)) == 3 and not caplog.records


def test_images_of_several_settings_are_announced_with_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = {"seed": 0, "steps": 4, "guidance": {"guidances": []}}
    fill(tmp_path, one, {**one, "guidance": {"guidances": [{"name": "pag"}]}}, {**one, "steps": 8})
    read_folder(tmp_path)
    (record,) = caplog.records
    assert "made with several settings (guidance, steps): they are measured as one set" in record.getMessage()


def test_only_the_process_that_speaks_for_all_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, {}, {})
    read_folder(tmp_path)
    assert f"look into {tmp_path.name}" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    read_folder(tmp_path)
    assert not capsys.readouterr().err


def test_a_folder_is_known_by_the_content_of_its_files_and_not_by_their_sizes(tmp_path: Path) -> None:
    for level in (10, 20):
        (tmp_path / str(level)).mkdir()
        Image.new("L", (8, 8), level).save(tmp_path / str(level) / "0.png", compress_level=0)
    one, other = (read_folder(tmp_path / str(level)) for level in (10, 20))
    assert one.files[0].stat().st_size == other.files[0].stat().st_size
    assert one.fingerprint == read_folder(one.folder).fingerprint != other.fingerprint


# -- pixels ------------------------------------------------------------------------------------------------------------
def test_grey_of_16_bits_is_that_of_8_bits_and_no_white(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey * np.uint16(257)).save(tmp_path / "16.png")
    fine, coarse = read([tmp_path / "16.png", tmp_path / "8.png"]).images
    assert torch.equal(fine, coarse) and torch.equal(coarse[0], torch.from_numpy(grey))


def test_a_transparent_grey_of_16_bits_is_on_white_and_its_neighbour_is_not(tmp_path: Path) -> None:
    """In bytes both are one grey."""
    Image.fromarray(np.array([[0x8012, 0x8013]], dtype=np.uint16)).save(tmp_path / "a.png", transparency=0x8012)
    (found,) = read([tmp_path / "a.png"]).images
    assert found[0].tolist() == [[0xFF, 0x80]]


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path: Path) -> None:
    """Pillow writes none, so the file is put together of its chunks."""
    header, pixel = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), struct.pack(">HHH", 0x8012, 0x8012, 0x8012)
    with (tmp_path / "a.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in (
            (b"IHDR", header), (b"tRNS", pixel), (b"IDAT", zlib.compress(b"\0" + pixel)), (b"IEND", b""),
        ):  # fmt: skip
            putchunk(file, name, data)
    with pytest.raises(
        EvaluationError, match=r"a\.png: a colour of 16 bits a channel is transparent; save it with alpha"
    ):
        read([tmp_path / "a.png"])


def test_pixels_that_are_no_bytes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "depth.png"
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(file, format="TIFF")
    with pytest.raises(EvaluationError, match=r"depth.png: its pixels are of 32 bits; allowed: 8 or 16 bits a channel"):
        read([file])


def test_what_is_transparent_is_on_white(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (found,) = read([tmp_path / "image.png"]).images
    alpha = pixels[..., 3:] / 255
    expected = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round()
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
