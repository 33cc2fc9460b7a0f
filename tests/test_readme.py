"""Every Python block of the README and the documentation runs; repositories that it names are tiny models here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import unicon_case
from PIL import Image
from zoo import CASES, picture

from trimtab import cli
from trimtab.adapters.weights import save_weights
from trimtab.guidance import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- (?:from the Hub|in two processes) -->\n)?```python\n(.*?)```", flags=re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """What the page says above it of where it runs, and the block."""
    return [(mark, block) for mark, block in BLOCK.findall(page.read_text())]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, and what a block registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    for name, plugin in registry.plugins().items():
        if plugin.origin == "registered":
            registry.unregister(name)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path) -> None:
    """One after the other, as they are read: a block may use what those before it define."""
    names: dict[str, Any] = {"__name__": page.stem}
    for mark, block in blocks(page):
        code = compile(block, page.name, "exec", dont_inherit=True)
        if not mark:
            names["image"] = None
            exec(code, names)
            assert names["image"] is None or names["image"].size == size_of(names["pipe"])


def size_of(pipe: Any) -> tuple[int, int]:
    """Of the images that it makes unless told otherwise."""
    side = pipe.unet.config.sample_size * getattr(pipe, "vae_scale_factor", 1)
    return side, side


REPOSITORIES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "black-forest-labs/FLUX.1-dev": "flux",
}
"""By name: the tiny pipeline of the same class that lies in a folder of that name, so nothing comes from the Hub."""


def marked(place: str) -> list[str]:
    """The blocks that run there."""
    return sorted({block for page in PAGES for mark, block in blocks(page) if place in mark})


FROM_THE_HUB = marked("from the Hub")


@pytest.mark.parametrize("block", FROM_THE_HUB, ids=range(len(FROM_THE_HUB)))
def test_blocks_that_load_from_the_hub_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = (name for name in REPOSITORIES if name in block)
    tiny = CASES[REPOSITORIES[name]].build()
    tiny.save_pretrained(tmp_path / name)
    for file in re.findall(r"(\w+\.png)", block):
        picture(16).save(file)
    if "./unicon" in block:
        monkeypatch.setattr(unicon_case, "WIDTH", tiny.unet.config.cross_attention_dim)
        widths = unicon_case.blocks_of(tiny.unet)
        save_weights(tmp_path / "unicon/depth/model.safetensors", unicon_case.posts("depth", widths))
        for kind in ("xy_lora", "yx_lora", "y_lora"):
            lora = unicon_case.lora("depth", kind, widths)
            save_weights(tmp_path / "unicon/depth" / kind / "pytorch_lora_weights.safetensors", lora)
    names: dict[str, Any] = {"image": None}
    exec(compile(block, name, "exec", dont_inherit=True), names)
    assert names["image"] is None or names["image"].size == (32, 32)


def test_the_plugin_of_the_tutorial_has_at_most_thirty_lines() -> None:
    first = blocks(ROOT / "docs" / "writing-a-plugin.md")[0]
    assert len(first[1].splitlines()) <= 30


@pytest.mark.parametrize("block", marked("in two processes"), ids=range(len(marked("in two processes"))))
def test_programs_of_several_processes_run(block: str, tmp_path: Path) -> None:
    (name,) = (name for name in REPOSITORIES if name in block)
    CASES[REPOSITORIES[name]].build().save_pretrained(tmp_path / name)
    (tmp_path / "program.py").write_text(block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for file in re.findall(r"save\(\"(\S+)\"\)", block):
        assert Image.open(tmp_path / file).size == (32, 32)


def entry_points(page: Path) -> dict[str, str]:
    """Those of the page's TOML."""
    (block,) = re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)
    return tomllib.loads(block)["project"]["entry-points"]["trimtab.guidance"]


def test_the_entry_point_of_the_readme_names_the_guidance_that_it_defines() -> None:
    page = ROOT / "README.md"
    ((_, place),) = entry_points(page).items()
    assert any(f"class {place.split(':')[1]}(" in block for _, block in blocks(page))


def test_the_entry_point_of_the_tutorial_is_the_one_that_is_written_for_a_new_package(tmp_path: Path) -> None:
    assert cli.main(["plugins", "new", "my-guidance"]) == 0
    written = tomllib.loads((tmp_path / "my-guidance" / "pyproject.toml").read_text())
    shown = entry_points(ROOT / "docs" / "writing-a-plugin.md")
    assert shown == written["project"]["entry-points"]["trimtab.guidance"]
