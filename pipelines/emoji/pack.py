"""`python -m trimtab.pipelines.emoji.pack ARCHIVES FILE`: the data set in one file, from the archives of `npm pack`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .data import EmojiData, pack

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archives", type=Path, metavar="ARCHIVES")
    parser.add_argument("file", type=Path, metavar="FILE")
    given = parser.parse_args()
    pack(given.archives, given.file)
    train, test = EmojiData(given.file), EmojiData(given.file, held_out=True)
    print(f"{given.file}: {len(train)} images to train on, {len(test)} held out")
