"""The emoji data set: every drawing with its exact mask, and a split in which no test emoji was ever drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from npm_archives import COLOURS, emoji_json

from trimtab.adapters.pairs import Pairs
from trimtab.guidance.errors import ParameterError
from trimtab.pipelines.emoji.data import CATEGORIES, STYLES, EmojiData, edges, in_held_out, pack, to_unit
from trimtab.pipelines.emoji.pairs import CONDITIONS, drawing_pairs, main


def test_a_missing_archive_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        pack(tmp_path, tmp_path / "emoji.safetensors")
    with pytest.raises(FileNotFoundError, match=r"trimtab\.pipelines\.emoji\.pack"):
        EmojiData(tmp_path / "emoji.safetensors")


def test_every_emoji_is_there_in_every_style_with_its_skin_tones(packed: Path) -> None:
    data = EmojiData(packed, held_out=None)
    assert len(data) == 3 * (24 + 8)
    assert {row["style"] for row in data.rows} == set(STYLES)
    assert {row["category"] for row in data.rows} == {"People & Body", "Symbols"}
    assert len(data.drawings) == 3 * 24 and {len(group) for group in data.drawings} == {1, 2}


def test_categories_can_be_chosen_by_name(packed: Path) -> None:
    data = EmojiData(packed, held_out=None, categories="Symbols, Flags")
    assert len(data) == 3 * 16 and {row["category"] for row in data.rows} == {"Symbols"}
    with pytest.raises(ParameterError, match=r"categories='Symbol': Symbol: no category; allowed: Smileys & Emotion, "):
        EmojiData(packed, categories="Symbol")


def test_an_emoji_is_held_out_in_every_style_and_tone_or_in_none(packed: Path) -> None:
    train, test = EmojiData(packed), EmojiData(packed, held_out=True)
    parents = [{row["parent"] for row in split.rows} for split in (train, test)]
    assert parents[0] and parents[1] and not parents[0] & parents[1]
    assert parents[1] == {str(row["unified"]).lower() for row in emoji_json() if in_held_out(str(row["unified"]))}


def test_the_split_depends_on_the_code_points_alone() -> None:
    share = sum(in_held_out(f"{number:X}") for number in range(0x1F300, 0x1F300 + 4000)) / 4000
    assert 0.08 < share < 0.12
    assert in_held_out("1F600") == in_held_out("1F600")


def test_a_drawing_lies_on_white_and_its_mask_is_exact(packed: Path) -> None:
    data = EmojiData(packed, held_out=None)
    for style in STYLES:
        i = next(i for i, row in enumerate(data.rows) if row["style"] == style and row["name"].startswith("red"))
        inside = data.images[i][:, 32, 32]
        assert data.images[i][:, 2, 2].tolist() == [255, 255, 255]
        assert (inside.int() - torch.tensor(COLOURS["red"])).abs().max() <= 1
        assert data.masks[i, 0, 32, 32] == 255 and data.masks[i, 0, 2, 2] == 0
        assert data.images[i].shape == (3, 64, 64)


def test_captions_and_labels_say_what_is_drawn(packed: Path) -> None:
    data = EmojiData(packed)
    for caption, category, style, row in zip(data.captions, data.categories, data.styles, data.rows, strict=True):
        assert caption.endswith(f", {row['style']} style") and row["name"].split()[0] in caption
        assert CATEGORIES[category] == row["category"] and STYLES[style] == row["style"]
    assert any("medium skin" in caption for caption in data.captions)


def test_edges_are_where_the_drawing_ends() -> None:
    image = torch.ones(1, 3, 16, 16)
    image[..., 8:] = -1
    found = edges(image)
    assert found.shape == (1, 1, 16, 16)
    assert (found[..., 7:9] > 0.9).all() and (found[..., :6] == 0).all() and (found[..., 10:] == 0).all()


def test_bytes_become_numbers_between_minus_one_and_one() -> None:
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_pairs_are_written_as_the_trainings_of_controls_read_them(packed: Path, tmp_path: Path, condition: str) -> None:
    main([str(packed), str(tmp_path), "--condition", condition])
    for folder, held_out in (("train", False), ("held-out", True)):
        data = EmojiData(packed, held_out=held_out)
        written, made = Pairs(str(tmp_path / folder), 64), drawing_pairs(data, condition)
        assert len(written) == len(made) == len(data.drawings)
        for index in range(len(made)):
            assert written[index]["caption"] == made.captions[index]
            torch.testing.assert_close(written[index]["target"], made.targets[index], atol=1 / 127.5, rtol=0)
            torch.testing.assert_close(written[index]["source"], made.sources[index], atol=1 / 127.5, rtol=0)
    assert made.sources[0, :, 2, 2].tolist() == [1.0, 1.0, 1.0]  # white, as the ground of the drawings
    assert made.sources.min() < 0
