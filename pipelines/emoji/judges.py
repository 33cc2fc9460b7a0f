"""`trimtab train emoji-judge`: classifiers of emoji by category or by style, in the format of transformers.

Loss: cross-entropy. Trained with two seeds, one guides and the other judges, so that nothing is judged by what guided
it. With `noisy` the classifier sees latents `alpha_t z + sigma_t n` of all levels instead of images: it is noise-aware,
and serves at x_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from ...training import TrainingSettings, option, train
from .card import write_card
from .data import CATEGORIES, SIZE, STYLES, EmojiData, to_unit
from .latents import Drawings, load_autoencoder
from .sd import build_scheduler

USAGE = """from transformers import AutoModelForImageClassification

classifier = AutoModelForImageClassification.from_pretrained("FOLDER")"""

LABELS = {"category": CATEGORIES, "style": STYLES}


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(TrainingSettings):
    """What a training run of a classifier is made of."""

    output: str = option("runs/emoji-judge", "folder for the model, its checkpoints and its log")
    data: str = option("runs/emoji.safetensors", "the packed data set")
    autoencoder: str = option("runs/emoji-autoencoder/model", "folder of the trained autoencoder, if noisy")
    target: str = option("category", "what it tells: category or style")
    noisy: int = option(0, "1 for a classifier of noisy latents, 0 for one of images")
    steps: int = option(4000, "optimizer steps")
    batch_size: int = option(64, "images a step and process")
    weight_decay: float = option(5e-2, "of AdamW")
    ema_decay: float = option(0.995, "of the averaged weights; 0 for none")
    width: int = option(32, "channels at the highest resolution")


def build_classifier(labels: tuple[str, ...], channels: int, width: int) -> ResNetForImageClassification:
    """A residual network; images are halved twice before its first block, latents are not."""
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[2, 2, 2],
        layer_type="basic",
        downsample_in_first_stage=channels == 3,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)


def train_judge(settings: JudgeSettings) -> Path:
    """Train, or continue; returns the folder of the classifier, with its processor.

    Raises:
        ValueError: a target that is neither category nor style.
    """
    if settings.target not in LABELS:
        raise ValueError(f"target={settings.target!r} is not known; allowed: {', '.join(LABELS)}.")
    torch.manual_seed(settings.seed)
    folder, labels = Path(settings.output) / "model", LABELS[settings.target]
    splits: dict[str, TensorDataset] = {}
    for split, held_out in (("train", False), ("test", True)):
        data = EmojiData(settings.data, held_out)
        inputs = Drawings(data, load_autoencoder(settings.autoencoder)).latents[0] if settings.noisy else data.images
        answers = data.categories if settings.target == "category" else data.styles
        splits[split] = TensorDataset(inputs, answers)
    scheduler = build_scheduler()

    def shown(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What the classifier sees: a shifted image, or a latent at a random level."""
        if settings.noisy:
            noise = torch.randn(inputs.shape, generator=generator, device=inputs.device)
            t = torch.randint(1000, (len(inputs),), generator=generator, device=inputs.device)
            return scheduler.add_noise(inputs, noise, t)
        padded = F.pad(to_unit(inputs), (4, 4, 4, 4), value=1.0)
        top, left = torch.randint(9, (2,), generator=generator, device=inputs.device).tolist()
        return padded[..., top : top + SIZE, left : left + SIZE]

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        return F.cross_entropy(model(shown(batch[0], generator)).logits.float(), batch[1], label_smoothing=0.05)

    def validate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        generator, right = torch.Generator(device).manual_seed(0), 0
        for inputs, answers in zip(*(tensor.split(128) for tensor in splits["test"].tensors), strict=True):
            seen = shown(inputs.to(device), generator) if settings.noisy else to_unit(inputs.to(device))
            right += int((model(seen).logits.argmax(1).cpu() == answers).sum())
        return {"held_out_accuracy": right / len(splits["test"])}

    def export(model: nn.Module) -> None:
        assert isinstance(model, ResNetForImageClassification)
        model.save_pretrained(folder)
        if not settings.noisy:
            size = {"height": SIZE, "width": SIZE}
            ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
        seen = "noisy latents of 16x16x4 at all levels" if settings.noisy else "images of 64x64"
        write_card(
            folder, model, settings, "emoji-judge", title=f"Classifier of emoji by {settings.target}",
            about=f"Tells {', '.join(labels)} from {seen}.", usage=USAGE, task="image-classification",
        )  # fmt: skip

    classifier = build_classifier(labels, 4 if settings.noisy else 3, settings.width)
    train("emoji-judge", classifier, splits["train"], loss, settings, export, validate)
    return folder
