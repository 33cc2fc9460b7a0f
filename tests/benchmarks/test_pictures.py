"""The pictures of the plug-ins' pages: the commands make all that are shown, and each shows a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trimtab.adapters.ppap.experts import Experts
from trimtab.benchmarks import pictures
from trimtab.benchmarks.guides import Guide
from trimtab.guidance import listing, registry

BUILT_IN = [name for name in registry.plugins() if listing.status(name)["distribution"] == "trimtab"]
SHOWN = {path.stem for path in pictures.FOLDER.glob("*.png")} & set(BUILT_IN)
OF_CONTROLS = {"easycontrol", "joint", "smooth"}
"""Drawn by `benchmarks.controls`."""


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Fashion-MNIST model, worse."""
    folder = tmp_path_factory.mktemp("weak")
    pipe = pictures.pipeline.__wrapped__("trimtab/fashion")
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter *= 0.9
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guide and its experts, untrained."""
    folder = tmp_path_factory.mktemp("classifiers")
    guide = Guide()
    save_file(guide.state_dict(), folder / "guide.safetensors")
    Experts(guide, 5, 2, 2.0).save(folder / "ppap-5" / "ppap.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(weak: Path, classifiers: Path) -> dict[str, pictures.Picture]:
    return {**pictures.pictures([0], 2), **pictures.trained(weak, classifiers)}


def test_the_commands_make_what_the_pages_show(found: dict[str, pictures.Picture]) -> None:
    assert found.keys() == SHOWN - OF_CONTROLS


@pytest.mark.parametrize("name", sorted(SHOWN - OF_CONTROLS))
def test_a_picture_has_a_row_for_each_guidance_and_they_differ(found: dict[str, pictures.Picture], name: str) -> None:
    assert any(name in guidances for guidances in found[name].rows.values())
    rows = [row[0].tobytes() for row in pictures.made(found[name], [0], 2).values()]
    assert len(set(rows)) == len(rows) == len(found[name].rows) + len(found[name].given or {})
    assert not pictures.pipeline(found[name].model).guidances


def test_the_command_writes_a_file_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "SEEDS", range(2))
    monkeypatch.setattr(pictures, "STEPS", 2)
    pictures.main(["sag", "slg", "-o", str(tmp_path)])
    grey, coloured = (Image.open(tmp_path / f"{name}.png") for name in ("sag", "slg"))
    assert grey.mode == "L" and coloured.mode == "P"
    assert min(grey.width, coloured.width) > 2 * 96


def test_a_picture_that_cannot_be_made_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pictures.main(["ppap", "--classifiers", str(tmp_path), "-o", str(tmp_path)])
    assert "ppap: there is no picture" in capsys.readouterr().err
