"""Every Python block of the README, the documentation and the examples runs, except those that load from the Hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab import parser
from trimtab.guidance import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- from the Hub -->\n)?(?:<!-- needs (\w+) -->\n)?```python\n(.*?)```", flags=re.DOTALL)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Whether it loads from the Hub, as the page says above it, and the block."""
    return [(bool(mark), block) for mark, _, block in BLOCK.findall(page.read_text())]


def needed(page: Path) -> list[str]:
    """Packages that blocks of the page need, as it says above them, and this package does not."""
    return [package for _, package, _ in BLOCK.findall(page.read_text()) if package]


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
    for package in needed(page):
        pytest.importorskip(package, reason=f"a block of {page.name} needs {package}: pip install {package}")
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


COMMANDS = [
    (page.name, line.split("#")[0].strip())
    for page in PAGES
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for line in block.splitlines()
    if re.match(r"(TRIMTAB_\w+=\S+ )?trimtab ", line)
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_every_command_shown_is_one_that_the_program_takes(page: str, line: str) -> None:
    """What it does is tested elsewhere; some of these load from the Hub, or name a file of the reader's."""
    words = shlex.split(line)
    arguments = words[words.index("trimtab") + 1 :]
    assert parser.build_parser().parse_args(arguments).command


def test_commands_are_shown() -> None:
    assert len(COMMANDS) > 12
