"""`python -m trimtab.pipelines.emoji.pairs FILE FOLDER`: pairs of a drawing and what it is controlled by.

FOLDER gets a folder `train` and a folder `held-out`, each as `trimtab train easycontrol` and `trimtab train unicon`
read it: `target` (the drawings), `source` (their edges or masks, dark on white as the drawings are) and
`captions.jsonl`. Of a drawing with skin tones there is the one without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from .data import EmojiData, edges, to_unit

CONDITIONS = ("edges", "masks")


@dataclass(frozen=True)
class DrawingPairs:
    """Drawings with their conditions, both `[n, 3, 64, 64]` in -1..1, and their captions."""

    targets: torch.Tensor
    sources: torch.Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, chosen: Sequence[int]) -> DrawingPairs:
        """Those with these numbers."""
        rows = list(chosen)
        return DrawingPairs(self.targets[rows], self.sources[rows], [self.captions[i] for i in rows])


def drawing_pairs(data: EmojiData, condition: str) -> DrawingPairs:
    """One pair a drawing.

    Args:
        data: one split.
        condition: `"edges"` or `"masks"`.

    Raises:
        ValueError: another condition.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition={condition!r}; allowed: {', '.join(CONDITIONS)}.")
    chosen = [group[0] for group in data.drawings]
    targets = to_unit(data.images[chosen])
    sources = edges(targets) if condition == "edges" else data.masks[chosen].float() / 255
    return DrawingPairs(targets, (1 - 2 * sources).expand_as(targets), [data.captions[i] for i in chosen])


def picture(image: torch.Tensor) -> Image.Image:
    """An image `[3, height, width]` in -1..1 as a file would hold it."""
    pixels = image.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def write(folder: Path, pairs: DrawingPairs) -> None:
    """Write pairs as a folder for training."""
    sides = {"target": pairs.targets, "source": pairs.sources}
    for name in sides:
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, caption in enumerate(tqdm(pairs.captions, f"write {folder}")):
        file = f"{number:05d}.png"
        for name, images in sides.items():
            picture(images[number]).save(folder / name / file)
        rows.append(json.dumps({"file": file, "caption": caption}, ensure_ascii=False))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.pipelines.emoji.pairs", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the packed data set")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--condition", choices=CONDITIONS, default="edges")
    parser.add_argument("--categories", default="", help="with commas between; all, if none is named")
    args = parser.parse_args(arguments)
    for name, held_out in (("train", False), ("held-out", True)):
        data = EmojiData(args.file, held_out=held_out, categories=args.categories)
        write(args.folder / name, drawing_pairs(data, args.condition))


if __name__ == "__main__":
    main()
