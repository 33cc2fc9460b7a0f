"""`"trimtab/NAME"` is a folder of this package, wherever a source is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.guidance import source as sources
from trimtab.guidance.shipped import EMBEDDED, FOLDER, located


def test_every_folder_of_models_is_found_by_its_name() -> None:
    names = [folder.name for folder in FOLDER.iterdir() if folder.is_dir()]
    assert {"fashion", "emoji-sd"} <= set(names)
    for name in names:
        assert located(f"trimtab/{name}") == FOLDER / name


def test_the_embedded_model_is_the_one_that_is_meant_where_none_is_named() -> None:
    assert located("trimtab/embedded") == located(EMBEDDED) == FOLDER / "emoji-sd"


@pytest.mark.parametrize("source", ["trimtab/other", "trimtab/..", "trimtab/", "trimtab", "someone/fashion", "a/b/c"])
def test_any_other_source_stays_as_it_is(source: str) -> None:
    assert located(source) == source
    assert located(Path(source)) == Path(source)


def test_its_files_are_taken_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hf_hub_download", pytest.fail)
    monkeypatch.setattr(sources, "HfApi", pytest.fail)
    assert not sources.is_repository("trimtab/fashion")
    assert sources.fetch("trimtab/fashion", "model_index.json") == FOLDER / "fashion" / "model_index.json"
    assert sources.find("trimtab/fashion", "guidance.json") is None
    assert "unet/config.json" in sources.list_files("trimtab/fashion", ".json")
