"""Every Python block of the README runs, except those that load from the Hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.pipelines.embedded import MODEL_FOLDER

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_first_block_names_what_exists() -> None:
    """The Hub cannot be reached from tests; the calls it makes are the same as below."""
    assert "stabilityai/" in BLOCKS[0] and "add_guidance" in BLOCKS[0]


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MODEL_FOLDER.is_dir()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    assert names["image"].size == (32, 32)  # type: ignore[attr-defined]
