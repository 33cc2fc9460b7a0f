"""Every model of emoji trains a step and comes out in the format that its users load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import training_programs as programs
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from PIL import Image
from processes import together
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPModel, CLIPProcessor

import trimtab
from trimtab.pipelines.cards import HEIGHT, WIDTH
from trimtab.pipelines.emoji.autoencoder import AutoencoderSettings, psnr, train_autoencoder
from trimtab.pipelines.emoji.clip import PairSettings, train_pair
from trimtab.pipelines.emoji.data import CATEGORIES, STYLES, EmojiData, to_unit
from trimtab.pipelines.emoji.flux import FluxSettings, train_flux
from trimtab.pipelines.emoji.judges import JudgeSettings, train_judge
from trimtab.pipelines.emoji.latents import Drawings, copies_of
from trimtab.pipelines.emoji.sd import SDSettings, train_sd
from trimtab.pipelines.emoji.text import LENGTH, clip_tokenizer, t5_tokenizer
from trimtab.training.log import read_log

STEP: dict[str, Any] = {"steps": 1, "batch_size": 2, "warmup": 0}


@pytest.fixture(scope="module")
def autoencoder(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("autoencoder")
    return train_autoencoder(AutoencoderSettings(output=str(output), data=str(packed), width=8, **STEP))


def test_the_autoencoder_gives_latents_of_unit_variance(autoencoder: Path, packed: Path) -> None:
    model = AutoencoderKL.from_pretrained(autoencoder)
    latents = Drawings(EmojiData(packed), model).latents
    assert latents.shape[2:] == (4, 16, 16)
    assert latents.std() == pytest.approx(1.0, abs=0.1)
    assert psnr(model, to_unit(EmojiData(packed, held_out=True).images)) > 0


def test_a_drawing_comes_in_all_its_tones_and_some_captions_are_empty(autoencoder: Path, packed: Path) -> None:
    drawings = Drawings(EmojiData(packed), AutoencoderKL.from_pretrained(autoencoder))
    hand = next(i for i, group in enumerate(EmojiData(packed).drawings) if len(group) == 2)
    latents, captions = drawings.draw(torch.full((64,), hand), 0.25, torch.Generator().manual_seed(0))
    assert latents.shape == (64, 4, 16, 16)
    assert len({caption for caption in captions if caption}) == 2
    assert 4 < captions.count("") < 32


def test_copies_are_moved_and_every_second_one_is_mirrored_unless_its_caption_names_a_side() -> None:
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    images[:, :, 20:30, 10:20] = 0  # left of the middle
    data = SimpleNamespace(images=images, captions=["red square, noto style", "hand pointing rightwards, noto style"])
    first, mirrored, moved = copies_of(cast(EmojiData, data), 3)
    assert torch.equal(first, to_unit(images))
    middle = [(copy < 0).any(1).any(1).float().argmax(1).tolist() for copy in (mirrored, moved)]
    assert middle[0][0] > 40 > 13 > middle[0][1] and max(middle[1]) < 13
    assert all(((copy < 0).sum((1, 2, 3)) == 300).all() for copy in (mirrored, moved)), "on white, nothing is lost"
    assert not torch.equal(moved, first)


def test_a_sample_is_one_of_the_copies(autoencoder: Path, packed: Path) -> None:
    drawings = Drawings(EmojiData(packed), AutoencoderKL.from_pretrained(autoencoder), copies=3)
    latents, _ = drawings.draw(torch.full((64,), 1), 0.0, torch.Generator().manual_seed(0))
    assert len(torch.unique(latents, dim=0)) == 3
    assert drawings.latents.shape[:2] == (3, len(drawings.captions))


@pytest.mark.parametrize(
    ("train", "settings", "kind"),
    [(train_sd, SDSettings, StableDiffusionPipeline), (train_flux, FluxSettings, FluxPipeline)],
)
def test_a_denoiser_is_a_pipeline_that_can_be_guided(
    train: Callable[..., Path], settings: Any, kind: type, autoencoder: Path, packed: Path, tmp_path: Path
) -> None:
    folder = train(settings(output=str(tmp_path), data=str(packed), autoencoder=str(autoencoder), **STEP))
    assert isinstance(DiffusionPipeline.from_pretrained(folder), kind)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert size < 25e6
    pipe = trimtab.GuidedPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.add_guidance("pag", scale=1.0)
    call = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "pt"}
    image = pipe("red square, noto style", generator=torch.Generator().manual_seed(0), **call).images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
    assert read_log(tmp_path)[-1]["validation_loss"] > 0
    card = (folder / "README.md").read_text()
    assert "--steps 1 " in card and "seed 0" in card
    assert all(word in card for word in ("CC-BY 4.0", "Apache-2.0", "validation loss", "training.png"))
    assert Image.open(folder / "training.png").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("train", "settings", "denoiser"),
    [
        (train_sd, partial(SDSettings, width=16, inner_width=16), "unet"),
        (train_flux, partial(FluxSettings, width=64, double_blocks=1, single_blocks=1), "transformer"),
    ],
)
def test_a_training_goes_on_from_a_trained_model(
    train: Callable[..., Path], settings: Any, denoiser: str, autoencoder: Path, packed: Path, tmp_path: Path
) -> None:
    """At a learning rate of zero the weights, the words and the autoencoder are those of the first model."""
    common = {"data": str(packed), **STEP}
    first = train(settings(output=str(tmp_path / "first"), autoencoder=str(autoencoder), **common))
    changed = {"output": str(tmp_path / "second"), "learning_rate": 0.0, "seed": 1, "compile": 1}
    changed["categories"] = "Symbols, People & Body"
    with torch.compiler.set_stance("force_eager"):
        second = train(settings(start=str(first), **changed, **common))
    before, after = DiffusionPipeline.from_pretrained(first), DiffusionPipeline.from_pretrained(second)
    for part in (denoiser, "vae", "text_encoder"):
        old, new = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert all(torch.equal(tensor, new[name]) for name, tensor in old.items()), part
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert "held-out emoji: psnr" in (second / "vae" / "README.md").read_text()
    card = (second / "README.md").read_text()
    assert f"--start {first}" in card and card.count("`trimtab train") == 2 and "Here, in the last run, 1 steps" in card
    assert "--categories 'Symbols, People & Body'" in card and "categories only: Symbols, People & Body." in card


@pytest.mark.parametrize(("target", "labels"), [("category", CATEGORIES), ("style", STYLES)])
def test_a_classifier_loads_with_its_processor(
    target: str, labels: tuple[str, ...], packed: Path, tmp_path: Path
) -> None:
    folder = train_judge(JudgeSettings(output=str(tmp_path), data=str(packed), target=target, width=8, **STEP))
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert tuple(model.config.id2label.values()) == labels
    processor, picture = AutoImageProcessor.from_pretrained(folder), EmojiData(packed).images[:1]
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert torch.allclose(pixels, to_unit(picture), atol=1e-2)
    assert model(pixels).logits.shape == (1, len(labels))
    assert 0 <= read_log(tmp_path)[-1]["held_out_accuracy"] <= 1


def test_a_noise_aware_classifier_takes_latents(autoencoder: Path, packed: Path, tmp_path: Path) -> None:
    places = {"output": str(tmp_path), "data": str(packed), "autoencoder": str(autoencoder)}
    model = AutoModelForImageClassification.from_pretrained(
        train_judge(JudgeSettings(noisy=1, width=8, **places, **STEP))
    )
    assert model(torch.zeros(1, 4, 16, 16)).logits.shape == (1, len(CATEGORIES))


def test_an_unknown_target_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed: category, style"):
        train_judge(JudgeSettings(output=str(tmp_path), data=str(packed), target="mood"))


def test_the_pair_compares_images_and_captions(packed: Path, tmp_path: Path) -> None:
    folder = train_pair(PairSettings(output=str(tmp_path), data=str(packed), width=32, **STEP))
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(
        text=["red hand", "blue square"], images=EmojiData(packed).images[:3], return_tensors="pt", padding="max_length"
    )
    assert model(**inputs).logits_per_image.shape == (3, 2)


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_a_tokenizer_knows_the_words_of_the_captions(make: Callable[[list[str]], Any]) -> None:
    captions = [f"{colour} {shape}, noto style" for colour in ("red", "blue") for shape in ("apple", "heart")] * 20
    tokenizer = make(captions)
    ids = tokenizer(captions[0]).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == captions[0].replace(" ", "")
    assert tokenizer.unk_token_id not in ids[1:-1] and len(ids) < LENGTH


def test_two_processes_resume_every_training_to_the_same_losses_and_weights(
    autoencoder: Path, packed: Path, tmp_path: Path
) -> None:
    """Gradients of two batches, bfloat16."""
    latents = {"autoencoder": str(autoencoder), "data": str(packed)}
    more: dict[str, dict[str, Any]] = {
        "emoji-autoencoder": {"data": str(packed), "width": 8},
        "emoji-sd": {**latents, "width": 16, "inner_width": 16},
        "emoji-flux": {**latents, "width": 64, "double_blocks": 1, "single_blocks": 1},
        "emoji-judge": {"data": str(packed), "width": 8},
        "emoji-clip": {"data": str(packed), "width": 32, "batch_size": 2},
    }
    programs.check(together(2, programs.resume, tmp_path / "two", str(tmp_path), more, seconds=600))
