"""What the measurement of the emoji models calls near to the drawings, and a fitting caption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import CASES

from trimtab.benchmarks import text_models
from trimtab.benchmarks.emoji import Sampler
from trimtab.benchmarks.text_models_page import page
from trimtab.evaluation.features import FeatureNetwork
from trimtab.evaluation.folders import Batch
from trimtab.pipelines.emoji.pairs import DrawingPairs

CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("fox", "boat", "pear", "moon", "hat")]
NETWORK = FeatureNetwork("colour", "mean colours", lambda images: images.float().mean((2, 3)))


def fit(batch: Batch) -> dict[str, torch.Tensor]:
    """Images fit long prompts."""
    return {"clip_score": torch.tensor([float(len(settings["prompt"])) for settings in batch.settings])}


@pytest.fixture(scope="module")
def pairs() -> DrawingPairs:
    targets = torch.rand(len(CAPTIONS), 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return DrawingPairs(targets, targets, CAPTIONS)


def test_the_drawings_themselves_are_at_no_distance_and_others_are_further(pairs: DrawingPairs) -> None:
    same, darker = (text_models.quality(images, pairs, NETWORK, fit) for images in (pairs.targets, pairs.targets - 0.5))
    assert same["frechet"][0] == pytest.approx(0, abs=1e-6)
    assert darker["frechet"][0] > 100


def test_the_score_is_that_of_each_image_with_its_own_caption_and_with_the_next_one(pairs: DrawingPairs) -> None:
    seen: list[tuple[str, ...]] = []

    def record(batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(tuple(settings["prompt"] for settings in batch.settings))
        return fit(batch)

    row = text_models.quality(pairs.targets, pairs, NETWORK, record)
    assert seen == [tuple(CAPTIONS), (*CAPTIONS[1:], CAPTIONS[0])]
    assert row["score"][0] == pytest.approx(sum(map(len, CAPTIONS)) / len(CAPTIONS))


def test_the_sheet_has_a_line_a_prompt_and_the_page_a_line_a_scale(tmp_path: Path, pairs: DrawingPairs) -> None:
    CASES["sd15"].build().save_pretrained(tmp_path / "emoji-sd")
    sampler = Sampler(tmp_path / "emoji-sd", "guidance_scale", 2.0, steps=1, batch=8)
    drawn = text_models.drawn(sampler)
    assert drawn.height >= 64 * len(text_models.PROMPTS) and drawn.width >= 64 * len(text_models.SEEDS)
    rows = {f"sd {scale}": text_models.quality(pairs.targets, pairs, NETWORK, fit) for scale in (1, 2)}
    text = page(["sd"], rows, "COMMAND", {"count": 10, "steps": 1, "guidance": 2.0})
    assert all(f"\n| {scale} | " in text for scale in (1, 2)) and "\n| 3 | " not in text
    assert "emoji-sd.png" in text and "emoji-flux.png" not in text and "COMMAND" in text


def test_without_judge_and_pair_there_are_sheets_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES["sd15"].build().save_pretrained(tmp_path / "emoji-sd")
    monkeypatch.setattr(text_models, "PROMPTS", text_models.PROMPTS[:1])
    places = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "emoji")]
    text_models.main(["--sd", str(tmp_path / "emoji-sd"), "--steps", "1", *places])
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["emoji-sd.png"]
    text = (tmp_path / "emoji.md").read_text()
    assert "emoji-sd.png" in text and "| scale |" not in text and "Fréchet" not in text
