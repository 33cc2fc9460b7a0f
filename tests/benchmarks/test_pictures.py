"""The pictures of the plug-ins' pages: one command makes all that are shown, and each shows a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import trimtab
from trimtab.benchmarks import pictures
from trimtab.benchmarks.images import to_bytes
from trimtab.guidance import listing, registry

BUILT_IN = [name for name in registry.plugins() if listing.status(name)["distribution"] == "trimtab"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/embedded")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def found(pipe: Any) -> dict[str, pictures.Picture]:
    return pictures.pictures(pipe, [0], 2)


def test_the_command_makes_what_the_pages_show(found: dict[str, pictures.Picture]) -> None:
    shown = {path.stem for path in pictures.FOLDER.glob("*.png")} & set(BUILT_IN)
    assert found.keys() == shown


@pytest.mark.parametrize("name", [name for name in BUILT_IN if (pictures.FOLDER / f"{name}.png").is_file()])
def test_a_picture_has_a_row_for_each_guidance_and_they_differ(
    pipe: Any, found: dict[str, pictures.Picture], name: str
) -> None:
    assert any(name in guidances for guidances in found[name].rows.values())
    rows = [to_bytes(row).numpy().tobytes() for row in pictures.made(pipe, found[name], [0], 2).values()]
    assert len(set(rows)) == len(rows) == len(found[name].rows) + len(found[name].given or {})
    assert not pipe.guidances


def test_the_command_writes_a_file_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "SEEDS", range(2))
    monkeypatch.setattr(pictures, "STEPS", 2)
    pictures.main(["pag", "-o", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name == "pag.png" and Image.open(path).width > 2 * 96
