"""Emoji drawn by three design teams, as images with captions, from npm packages.

| style | package | licence of the drawings |
| --- | --- | --- |
| `noto` | emoji-datasource-google 16.0.0 | Noto Emoji, Google, Apache-2.0 |
| `twemoji` | emoji-datasource-twitter 16.0.0 | Twemoji, Twitter and contributors, CC-BY 4.0 |
| `fluent` | @lobehub/fluent-emoji-3d 1.1.0 | Fluent Emoji, Microsoft, MIT |

`npm pack NAME@VERSION` fetches a package as one archive without installing anything; the archives are read as they are.
An emoji belongs to the held-out split in every style or in none, its skin tones with it: what is tested was never drawn
in training.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ...guidance.errors import ParameterError

SIZE = 64
HELD_OUT = 0.1
PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0", "package/img/google/64/{code}.png"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/{code}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/{code}.webp"),
}
STYLES = tuple(PACKAGES)
CATEGORIES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects", "Symbols", "Flags",
)  # fmt: skip
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


@dataclass(frozen=True)
class Emoji:
    """One emoji of the index, or one of its skin tones.

    Args:
        code: its code points.
        parent: those of the emoji whose skin tone it is, or its own.
        name: in words.
        category: one of `CATEGORIES`.
        held_out: whether it is tested on.
    """

    code: str
    parent: str
    name: str
    category: str
    held_out: bool


def index(archive: tarfile.TarFile) -> Iterator[Emoji]:
    """All emoji that the package's `emoji.json` lists, skin tones included."""
    listed = archive.extractfile("package/emoji.json")
    assert listed is not None
    for entry in json.load(listed):
        if entry["category"] not in CATEGORIES:
            continue
        name, held_out = caption_of(entry), in_held_out(entry["unified"])
        parent = entry["unified"].lower()
        yield Emoji(parent, parent, name, entry["category"], held_out)
        for tones, variant in entry.get("skin_variations", {}).items():
            words = " and ".join(dict.fromkeys(TONES[tone] for tone in tones.split("-")))
            yield Emoji(variant["unified"].lower(), parent, f"{name}, {words} skin", entry["category"], held_out)


def caption_of(entry: dict[str, Any]) -> str:
    """The emoji's name in words: of the short name and the Unicode name, the one that says more."""
    short = entry["short_name"].replace("_", " ").replace("-", " ")
    name = (entry["name"] or short).lower().replace("-", " ")
    return name if len(name) >= len(short) else short


def in_held_out(code: str) -> bool:
    """Whether an emoji is tested on, by a hash of its code points, so that it never depends on an order."""
    return int.from_bytes(hashlib.sha256(code.encode()).digest()[:8], "big") / 2**64 < HELD_OUT


def archive_name(style: str) -> str:
    """The file name that `npm pack` gives to the package of a style."""
    package, version, _ = PACKAGES[style]
    return f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def pack(archives: Path, output: Path) -> None:
    """Read the three archives and write one safetensors file: each image as lossless WebP, and what it shows.

    Args:
        archives: folder with the archives of `npm pack`.
        output: the file.

    Raises:
        FileNotFoundError: naming the command that fetches the archive.
    """
    for style in STYLES:
        if not (archives / archive_name(style)).is_file():
            package, version, _ = PACKAGES[style]
            raise FileNotFoundError(
                f"{archives / archive_name(style)} is missing: run `npm pack {package}@{version}` in {archives}."
            )
    with tarfile.open(archives / archive_name("noto")) as archive:
        emoji = {entry.code: entry for entry in index(archive)}
    files: list[bytes] = []
    rows: list[dict[str, Any]] = []
    for style in STYLES:
        pattern = PACKAGES[style][2]
        names = {pattern.format(code=code): entry for code, entry in emoji.items()}
        with tarfile.open(archives / archive_name(style)) as archive:
            for member in tqdm(archive, desc=f"pack {style}"):
                entry = names.get(member.name)
                if entry is None:
                    continue
                drawing = archive.extractfile(member)
                assert drawing is not None
                files.append(_resized(drawing.read()))
                rows.append({**asdict(entry), "style": style})
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["code"], rows[i]["style"]))
    output.parent.mkdir(parents=True, exist_ok=True)
    content = torch.frombuffer(bytearray(b"".join(files[i] for i in order)), dtype=torch.uint8)
    lengths = torch.tensor([len(files[i]) for i in order])
    described = json.dumps([rows[i] for i in order])
    save_file({"content": content, "lengths": lengths}, output, metadata={"rows": described})


def _resized(content: bytes) -> bytes:
    """An image file at 64x64 with its exact alpha mask, as lossless WebP."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (SIZE, SIZE))
        canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = canvas
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).transpose(2, 0, 1).copy()


class EmojiData:
    """The packed data set.

    Args:
        file: written by `pack`.
        held_out: which split; `None` for both.
        categories: those of `CATEGORIES` that are wanted, with commas between; all, if it is empty.

    Raises:
        FileNotFoundError: with the command that makes the file.
        ParameterError: a category that there is not.
    """

    def __init__(self, file: str | Path, held_out: bool | None = False, categories: str = "") -> None:
        wanted = [name.strip() for name in categories.split(",")] if categories else list(CATEGORIES)
        if unknown := set(wanted) - set(CATEGORIES):
            raise ParameterError(
                f"categories={categories!r}: {', '.join(sorted(unknown))}: no category; allowed: "
                f"{', '.join(CATEGORIES)}."
            )
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"{file} is missing: `python -m trimtab.pipelines.emoji.pack ARCHIVES {file}` makes it."
            )
        with safe_open(file, "pt") as saved:
            content, lengths = saved.get_tensor("content").numpy().tobytes(), saved.get_tensor("lengths").tolist()
            rows = json.loads(saved.metadata()["rows"])
        ends = list(itertools.accumulate(lengths))
        split = [i for i, row in enumerate(rows) if held_out is None or row["held_out"] == held_out]
        chosen = [i for i in split if rows[i]["category"] in wanted]
        self.rows: list[dict[str, Any]] = [rows[i] for i in chosen]
        files = (content[ends[i] - lengths[i] : ends[i]] for i in chosen)
        self._rgba = torch.stack([torch.from_numpy(_pixels(file)) for file in tqdm(files, "read emoji", len(chosen))])

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def images(self) -> torch.Tensor:
        """On white, `[n, 3, 64, 64]` bytes."""
        alpha = self._rgba[:, 3:].float() / 255
        return (self._rgba[:, :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)

    @property
    def masks(self) -> torch.Tensor:
        """The drawings' alpha, `[n, 1, 64, 64]` bytes."""
        return self._rgba[:, 3:]

    @cached_property
    def captions(self) -> list[str]:
        """A caption an image: the emoji's name and its style, such as "red apple, noto style"."""
        return [f"{row['name']}, {row['style']} style" for row in self.rows]

    @cached_property
    def drawings(self) -> list[list[int]]:
        """The images grouped by emoji and style: one drawing, in all its skin tones."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault((row["parent"], row["style"]), []).append(i)
        return list(groups.values())

    @cached_property
    def categories(self) -> torch.Tensor:
        """Indices into `CATEGORIES`, `[n]`."""
        return torch.tensor([CATEGORIES.index(row["category"]) for row in self.rows])

    @cached_property
    def styles(self) -> torch.Tensor:
        """Indices into `STYLES`, `[n]`."""
        return torch.tensor([STYLES.index(row["style"]) for row in self.rows])


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers in -1..1."""
    return images.float() / 127.5 - 1


def edges(images: torch.Tensor) -> torch.Tensor:
    """Edge maps in 0..1, `[n, 1, h, w]`: the length of Sobel's gradient of the luminance, 1 where it is steepest.

    Args:
        images: `[n, 3, h, w]` in -1..1.
    """
    luminance = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    sobel = images.new_tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    kernels = torch.stack([sobel, sobel.T]).unsqueeze(1)
    padded = torch.nn.functional.pad(luminance, (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.conv2d(padded, kernels).square().sum(1, keepdim=True).sqrt().clamp(0, 1)
