"""Every Python block of the README, the documentation and the examples runs, except those that load from the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.guidance import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- from the Hub -->\n)?```python\n(.*?)```", flags=re.DOTALL)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Whether it loads from the Hub, as the page says above it, and the block."""
    return [(bool(mark), block) for mark, block in BLOCK.findall(page.read_text())]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, and what a block registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    for name, plugin in registry.plugins().items():
        if plugin.origin == "registered":
            registry.unregister(name)


def test_the_first_block_names_what_exists() -> None:
    """The Hub cannot be reached from tests; the calls it makes are the same as below."""
    hub, first = blocks(PAGES[0])[0]
    assert hub and "stabilityai/" in first and "add_guidance" in first


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path) -> None:
    """One after the other, as they are read: a block may use what those before it define."""
    names: dict[str, object] = {"__name__": page.stem}
    for hub, block in blocks(page):
        code = compile(block, page.name, "exec", dont_inherit=True)
        if not hub:
            names["image"] = None
            exec(code, names)
            assert names["image"] is None or names["image"].size == (32, 32)  # type: ignore[attr-defined]


def test_the_plugin_of_the_tutorial_has_at_most_thirty_lines() -> None:
    first = blocks(ROOT / "docs" / "writing-a-plugin.md")[0]
    assert len(first[1].splitlines()) <= 30
