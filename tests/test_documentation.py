"""The documentation builds without a warning, has a page for every plug-in, and quotes messages that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.guidance import listing, registry

ROOT = Path(__file__).parents[1]
BUILT_IN = [name for name in registry.plugins() if listing.status(name)["distribution"] == "trimtab"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_plug_in_has_a_page_with_all_its_parameters(site: Path, name: str) -> None:
    text = (site / "plugins" / name / "index.html").read_text()
    for parameter in listing.details(name)["parameters"]:
        assert f"<code>{parameter['name']}</code>" in text
    assert "Cost" in text and f'href="{name}/"' in (site / "plugins" / "index.html").read_text().replace("../", "")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_page_shows_its_plug_in_or_says_how(site: Path, name: str) -> None:
    text = (site / "plugins" / name / "index.html").read_text()
    shown, promised = f'src="../../images/{name}.png"' in text, "No picture yet: " in text
    assert shown != promised
    if shown:
        # The sheet of learned controls has nine rows of eight drawings in colour.
        most = 250_000 if name in ("easycontrol", "joint", "smooth") else 60_000
        assert (site / "images" / f"{name}.png").stat().st_size < most


def test_a_page_says_where_its_plug_in_acts(site: Path) -> None:
    assert (
        "only on: <code>FluxTransformer2DModel</code>" in (site / "plugins" / "easycontrol" / "index.html").read_text()
    )
    assert "self-attention that can be perturbed" in (site / "plugins" / "seg" / "index.html").read_text()
    for name in BUILT_IN:
        text = (site / "plugins" / name / "index.html").read_text()
        assert ("only on: " in text) != ("on every pipeline that can be guided" in text), name


def test_equations_are_drawn_by_the_browser_itself(site: Path) -> None:
    page = (site / "plugins" / "pag" / "index.html").read_text()
    assert "<math" in page and "$$" not in page and "arithmatex" not in page
    for name in BUILT_IN:
        assert not re.search(r"<code>[^<]*\\[a-z]", (site / "plugins" / name / "index.html").read_text()), name


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.findall(r'<(?:script|img)[^>]+src="(https?:[^"]+)"|<link[^>]+stylesheet[^>]+href="(https?:[^"]+)"',
                        (site / "index.html").read_text())  # fmt: skip
    assert not loaded


def test_every_message_of_the_troubleshooting_page_is_one_of_the_package() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    folders = ("guidance", "pipelines", "adapters")
    sources = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    # Messages are written as several literals, one after the other.
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    assert len(quoted) > 12
    for message in quoted:
        assert message in joined, message
