"""The manifest is one line an image, true for every process that reads it, whatever was killed while writing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trimtab.pipelines.generate.manifest import Manifest


def row(index: int, status: str = "done") -> dict[str, object]:
    return {"index": index, "file": f"{index}.png", "status": status}


def test_rows_come_in_the_order_of_the_batch_and_the_last_of_one_image_counts(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    assert manifest.rows() == {}
    for one in (row(2), row(0, "failed"), row(1), row(0)):
        manifest.append(one)
    assert list(manifest.rows().items()) == [(0, row(0)), (1, row(1)), (2, row(2))]


def test_a_process_sees_what_another_appends(tmp_path: Path) -> None:
    mine, other = Manifest(tmp_path), Manifest(tmp_path)
    for index in range(3):
        other.append(row(index))
        assert mine.rows() == {i: row(i) for i in range(index + 1)}
        assert mine.count() == index + 1
    other.append(row(0))
    assert mine.count() == 3, "images, not lines"


def test_a_line_that_a_killed_process_left_unfinished_is_no_row_and_hides_none(tmp_path: Path) -> None:
    mine, other = Manifest(tmp_path), Manifest(tmp_path)
    mine.append(row(0))
    with mine.path.open("ab") as file:
        file.write(json.dumps(row(1)).encode()[:-5])
    assert mine.rows() == {0: row(0)}
    other.append(row(2))
    assert mine.rows() == other.rows() == {0: row(0), 2: row(2)}


@pytest.mark.parametrize(
    "damaged",
    [
        b"[1]",
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"index": "0", "file": "0.png", "status": "done"}',
        b'{"index": 0, "status": "done"}',
        b'{"index": 0, "file": "0.png"}',
        b'{"index": 0, "file": "0.png", "status": "odd"}',
    ],
    ids=lambda damaged: damaged[:50],
)
def test_what_is_no_row_is_passed_over(tmp_path: Path, damaged: bytes) -> None:
    manifest = Manifest(tmp_path)
    manifest.path.write_bytes(damaged + b"\n" + json.dumps(row(3)).encode() + b"\n")
    assert manifest.rows() == {3: row(3)}
    manifest.keep({3: "3.png"})
    assert [json.loads(line) for line in manifest.path.read_bytes().splitlines()] == [row(3)]


def test_a_row_may_say_whatever_an_error_says(tmp_path: Path) -> None:
    """Also of a file whose name is no UTF-8, which Python spells with halves of characters."""
    manifest = Manifest(tmp_path)
    file = os.fsdecode(b"gr\xfc\xdfe")
    failed = {**row(0, "failed"), "error": f"no {file}: Grüße, 世界\nand \ud83d"}
    manifest.append(failed)
    manifest.append(row(1))
    manifest.keep({0: "0.png", 1: "1.png"})
    assert Manifest(tmp_path).rows() == {0: failed, 1: row(1)}
    assert "Grüße, 世界" in manifest.path.read_text(encoding="utf-8")


def test_failures_are_kept_unless_they_are_no_longer_true(tmp_path: Path) -> None:
    manifest, files = Manifest(tmp_path), {0: "0.png", 1: "1.png"}
    for one in (row(1), row(0, "failed")):
        manifest.append(one)
    manifest.keep(files)
    assert Manifest(tmp_path).rows() == {0: row(0, "failed"), 1: row(1)}
    manifest.keep(files, failed=False)
    assert Manifest(tmp_path).rows() == manifest.rows() == {1: row(1)}


def test_a_file_that_is_gone_has_no_rows_and_one_in_its_place_has_its_own(tmp_path: Path) -> None:
    mine, other = Manifest(tmp_path), Manifest(tmp_path)
    for index in range(3):
        mine.append(row(index))
    assert len(other.rows()) == 3
    mine.path.unlink()
    assert other.rows() == {}
    mine.append(row(7))
    assert other.rows() == {7: row(7)}


def test_rows_that_were_dropped_are_gone_for_a_process_that_had_read_them(tmp_path: Path) -> None:
    mine, other = Manifest(tmp_path), Manifest(tmp_path)
    for index in (1, 0, 2):
        mine.append(row(index))
    assert len(other.rows()) == 3
    mine.keep({0: "0.png", 1: "another.png", 2: "2.png"})
    assert other.rows() == mine.rows() == {0: row(0), 2: row(2)}
    mine.append(row(1))
    assert list(other.rows()) == [0, 1, 2]
