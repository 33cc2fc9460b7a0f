"""Every Python block of the README and the documentation runs; repositories that it names are tiny models here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import unicon_case
from zoo import CASES, picture

import trimtab
from trimtab import cli, parser
from trimtab.adapters.weights import save_weights
from trimtab.guidance import registry
from trimtab.guidance.parameters import fields_of

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


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path) -> None:
    """One after the other, as they are read: a block may use what those before it define."""
    for package in needed(page):
        pytest.importorskip(package, reason=f"a block of {page.name} needs {package}: pip install {package}")
    names: dict[str, Any] = {"__name__": page.stem}
    for hub, block in blocks(page):
        code = compile(block, page.name, "exec", dont_inherit=True)
        if not hub:
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
FROM_THE_HUB = sorted({block for page in PAGES for hub, block in blocks(page) if hub})


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


COMMANDS = [
    (page.name, line.split("#")[0].strip())
    for page in PAGES
    for block in re.findall(r"```(?:console|sh)\n(.*?)```", page.read_text().replace("\\\n", ""), flags=re.DOTALL)
    for line in block.splitlines()
    if re.match(r"(TRIMTAB_\w+=\S+ )?trimtab ", line)
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_every_command_shown_is_one_that_the_program_takes(page: str, line: str) -> None:
    """What it does is tested elsewhere; some of these load from the Hub, or name a file of the reader's."""
    args = parser.build_parser().parse_args(arguments_of(line))
    assert args.command
    if args.command == "train":
        cli.training_of(args)
    for text in getattr(args, "guidance", None) or ():
        plugin, _, parameters = text.partition(":")
        assert set(re.findall(r"(?:^|,)([a-z]\w*)=", parameters)) <= fields_of(registry.find(plugin)).keys(), text


def arguments_of(line: str) -> list[str]:
    words = shlex.split(line)
    return words[words.index("trimtab") + 1 :]


# Those that make no images, and name nothing of the reader's.
COMPLETE = [
    line for _, line in COMMANDS
    if re.match(r"trimtab (explain|plugins|models)\b", line) and not re.search(r"\b[A-Z]{3,}\b|--model|acme|my-", line)
]  # fmt: skip


@pytest.mark.parametrize("line", sorted(set(COMPLETE)))
def test_commands_that_need_nothing_run(line: str) -> None:
    assert cli.main(arguments_of(line)) == 0


# Of the others, those that take from the Hub, from another package, or from the reader, more than a picture.
ELSEWHERE = r"stabilityai|openai|MODEL|efficientnet|smooth|prompts\.txt|plugins new|--image "
SMALLER = {r"--class-balanced \d+": "--class-balanced 8", "--seeds 0-7": "--seeds 0-1", r" --steps \d+": "",
           r" --(processes|branch-parallel) \d+": ""}  # fmt: skip


@pytest.mark.parametrize("page", sorted({page for page, line in COMMANDS if "generate" in line}))
def test_commands_run_in_the_order_in_which_a_page_shows_them(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer images, in two steps and one process, which have tests of their own."""
    for name, count in (("real-images", 12), ("restored", 2), ("originals", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            picture(32).rotate(7 * number).save(tmp_path / name / f"{number}.png")
    for name in ("KNOWN.png", "MASK.png"):
        picture(32).convert("L").save(name)
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("cfg", scale=2.0)
    pipe.save_guidance(tmp_path)
    run = 0
    for line in (line for shown, line in COMMANDS if shown == page and not re.search(ELSEWHERE, line)):
        for pattern, smaller in SMALLER.items():
            line = re.sub(pattern, smaller, line)
        making = re.search(r"trimtab (generate|sweep|evaluate --recipe)", line) and "--like" not in line
        monkeypatch.setenv("TRIMTAB_TRACE", "1" if line.startswith("TRIMTAB_TRACE=1") else "0")
        for file, made in (("out/FILE.png", "out/*.png"), (r"trimtab-trace/\S*\.json", "trimtab-trace/*.json")):
            if re.search(file, line):
                line = re.sub(file, str(sorted(tmp_path.glob(made))[0]), line)
        assert cli.main(arguments_of(line + " --steps 2" * bool(making))) == 0, line
        run += 1
    assert run > 1


def test_commands_are_shown() -> None:
    assert len(COMMANDS) > 12
