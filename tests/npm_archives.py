"""Three small archives as npm packs them, and the data set made of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from trimtab.pipelines.emoji.data import PACKAGES, STYLES, archive_name, in_held_out, pack

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "grey": (120, 120, 120)}
TONE = "1F3FD"


def emoji_json() -> list[dict[str, object]]:
    """Two dozen squares and hands, some of which are held out."""
    rows: list[dict[str, object]] = []
    for number in range(24):
        code, colour = f"1F{number:03X}", list(COLOURS)[number % 4]
        hand = number % 3 == 0
        rows.append(
            {
                "name": f"{colour} {'hand' if hand else 'square'} {number}".upper(),
                "short_name": f"s{number}",
                "unified": code,
                "category": "People & Body" if hand else "Symbols",
                "skin_variations": {TONE: {"unified": f"{code}-{TONE}"}} if hand else {},
            }
        )
    return [*rows, {"name": "TONE", "short_name": "tone", "unified": TONE, "category": "Component"}]


def drawing(colour: str, size: int, file_format: str) -> bytes:
    """A filled square of half the side, on nothing."""
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] = (*COLOURS[colour], 255)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    return file.getvalue()


def write_archives(folder: Path) -> Path:
    """One archive a style."""
    listed = emoji_json()
    for style in STYLES:
        with tarfile.open(folder / archive_name(style), "w:gz") as archive:

            def add(name: str, content: bytes, archive: tarfile.TarFile = archive) -> None:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

            add("package/emoji.json", json.dumps(listed).encode())
            for row in listed[:-1]:
                size, file_format = (96, "WEBP") if style == "fluent" else (64, "PNG")
                colour = str(row["name"]).split()[0].lower()
                codes = [row["unified"], *(v["unified"] for v in row["skin_variations"].values())]  # type: ignore[attr-defined]  # JSON
                for code in codes:
                    add(PACKAGES[style][2].format(code=str(code).lower()), drawing(colour, size, file_format))
    return folder


def write_packed(archives: Path, file: Path) -> Path:
    """The data set of these archives, of which some is held out."""
    pack(archives, file)
    assert any(in_held_out(str(row["unified"])) for row in emoji_json())
    return file
