"""Every command that the README and the documentation show runs, in the order and folder of who reads them.

The folder has what a reader has: images, prompts, and Hub repositories, which are tiny models in folders of their
names. Batches are smaller, sampling and training shorter, in one process; several have tests of their own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from npm_archives import write_archives, write_packed
from transformers import CLIPImageProcessorPil, CLIPProcessor
from zoo import CASES, picture

import trimtab
from trimtab import cli, parser
from trimtab.adapters.smooth.train import SmoothTraining, written
from trimtab.adapters.weights import save_weights
from trimtab.benchmarks import controls
from trimtab.guidance import registry
from trimtab.guidance.parameters import fields_of
from trimtab.pipelines.emoji import pairs
from trimtab.pipelines.emoji.clip import build_pair
from trimtab.pipelines.emoji.text import clip_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [
    (page.name, line.split("#")[0].strip())
    for page in PAGES
    for block in re.findall(r"```(?:console|sh)\n(.*?)```", page.read_text().replace("\\\n", ""), flags=re.DOTALL)
    for line in block.splitlines()
]
HERE = [(page, line) for page, line in COMMANDS if re.match(r"(TRIMTAB_\w+=\S+ )?(trimtab|python -m) ", line)]
ELSEWHERE = {
    r"pip install \.|make (demo|test)": "the check from a clean checkout",
    r"pip install efficientnet.*": "the extra `test`, which has them",
    r"cd my-guidance|pip install --editable.*|pytest": "tests/scaffold/test_scaffold.py",
}
"""What runs these: they install or test something."""


def test_no_command_is_left_out() -> None:
    assert len(COMMANDS) > 40
    for page, line in COMMANDS:
        assert ((page, line) in HERE) != any(re.fullmatch(pattern, line) for pattern in ELSEWHERE), line


def arguments_of(line: str) -> list[str]:
    words = shlex.split(line)
    return words[words.index("trimtab") + 1 :]


TRIMTAB = [(page, line) for page, line in HERE if "python -m" not in line]


@pytest.mark.parametrize(("page", "line"), TRIMTAB, ids=[f"{page}-{i}" for i, (page, _) in enumerate(TRIMTAB)])
def test_every_command_has_options_that_exist_as_it_stands(page: str, line: str) -> None:
    args = parser.build_parser().parse_args(arguments_of(line))
    if args.command == "train":
        cli.training_of(args)
    for text in getattr(args, "guidance", None) or ():
        plugin, _, parameters = text.partition(":")
        assert set(re.findall(r"(?:^|,)([a-z]\w*)=", parameters)) <= fields_of(registry.find(plugin)).keys(), text


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has got from elsewhere before the first command."""
    folder = tmp_path_factory.mktemp("reader")
    for name, case in (("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"), ("MODEL", "sd15")):
        CASES[case].build().save_pretrained(folder / name)
    unet = CASES["sd15"].build().unet
    save_weights(folder / "smooth_lora.safetensors", written(SmoothTraining(unet, 2).loras))
    tokenizer = clip_tokenizer(["a lighthouse"])
    crop = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    for part in (build_pair(tokenizer, 32), CLIPProcessor(crop, tokenizer)):
        part.save_pretrained(folder / "openai/clip-vit-base-patch32")
    (folder / "prompts.txt").write_text("a lighthouse\na boat\n")
    for name, count in (("real-images", 12), ("restored", 2), ("originals", 2)):
        (folder / name).mkdir()
        for number in range(count):
            picture(32).rotate(7 * number).save(folder / name / f"{number}.png")
    for name in ("KNOWN.png", "MASK.png"):
        picture(32).convert("L").save(folder / name)
    for name in ("a.png", "b.png"):
        picture(32).save(folder / name)
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("cfg", scale=2.0)
    pipe.save_guidance(folder)
    archives = tmp_path_factory.mktemp("archives")
    (folder / "runs").mkdir()
    write_packed(write_archives(archives), folder / "runs" / "emoji.safetensors")
    for name in ("emoji-sd", "emoji-flux"):
        (folder / "runs" / name).mkdir()
        (folder / "runs" / name / "model").symlink_to(ROOT / "models" / name)
    return folder


SMALLER = {r"--class-balanced \d+": "--class-balanced 8", "--seeds 0-[79]": "--seeds 0-1", r" --steps \d+": "",
           r" --(processes|branch-parallel) \d+": "", r" --batch-size \d+": ""}  # fmt: skip
SAMPLING = r"trimtab (generate|sweep|interpolate|evaluate --(recipe|guidance))"
SHORTER = {"trimtab generate --like": "", SAMPLING: " --steps 2", "trimtab train": " --steps 1 --batch-size 2",
           "benchmarks.controls": " --count 4 --ways 2 --steps 2 --images ."}  # fmt: skip
MADE = {"out/FILE.png": "out/*.png", r"trimtab-trace/\S*\.json": "trimtab-trace/*.json"}
"""Files whose names depend on the settings and the time, by what is shown."""


@pytest.mark.parametrize("page", sorted({page for page, _ in HERE}))
def test_the_commands_of_a_page_run(
    page: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    for entry in shelf.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    for line in (line for shown, line in HERE if shown == page):
        for pattern, smaller in SMALLER.items():
            line = re.sub(pattern, smaller, line)
        line += next((text for pattern, text in SHORTER.items() if re.search(pattern, line)), "")
        for shown, files in MADE.items():
            if re.search(shown, line):
                line = re.sub(shown, str(sorted(tmp_path.glob(files))[0]), line)
        monkeypatch.setenv("TRIMTAB_TRACE", "1" if line.startswith("TRIMTAB_TRACE=1") else "0")
        run(line)


def run(line: str) -> None:
    """In this process: what importing torch takes, once for all commands."""
    programs = {"trimtab.pipelines.emoji.pairs": pairs.main, "benchmarks.controls": controls.main}
    if line.startswith("python -m "):
        _, _, program, *arguments = shlex.split(line)
        programs[program](arguments)
    else:
        assert cli.main(arguments_of(line)) == 0, line
