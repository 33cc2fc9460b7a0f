"""`trimtab train emoji-clip`: a small pair of image and text encoders, for text guidance and for a score.

Loss: the symmetric cross-entropy of CLIP (Radford et al., 2021) over the batch's images and captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig

from ...training import TrainingSettings, option, train
from .card import write_card
from .data import SIZE, EmojiData, to_unit
from .text import clip_encoder, clip_tokenizer, kept

USAGE = """from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")"""


@dataclass(frozen=True, kw_only=True)
class PairSettings(TrainingSettings):
    """What a training run of the pair is made of."""

    output: str = option("runs/emoji-clip", "folder for the model, its checkpoints and its log")
    data: str = option("runs/emoji.safetensors", "the packed data set")
    steps: int = option(6000, "optimizer steps")
    batch_size: int = option(256, "pairs a step and process")
    weight_decay: float = option(5e-2, "of AdamW")
    ema_decay: float = option(0.995, "of the averaged weights; 0 for none")
    width: int = option(192, "of both encoders")


def build_pair(tokenizer: Any, width: int) -> CLIPModel:
    """Untrained encoders: 8x8 patches of 64x64 images, and the captions' words."""
    text = clip_encoder(tokenizer, width).config.to_dict()
    vision = CLIPVisionConfig(
        image_size=SIZE, patch_size=8, hidden_size=width, intermediate_size=3 * width, projection_dim=128,
        num_hidden_layers=6, num_attention_heads=width // 32,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=128))


def train_pair(settings: PairSettings) -> Path:
    """Train, or continue; returns the folder of the pair, with its processor."""
    torch.manual_seed(settings.seed)
    folder = Path(settings.output) / "model"
    data, held_out = EmojiData(settings.data), EmojiData(settings.data, held_out=True)
    tokenizer = kept(Path(settings.output) / "tokenizer", CLIPTokenizer, clip_tokenizer, data.captions)

    def tokens(captions: list[str]) -> torch.Tensor:
        ids: torch.Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids

    pairs = TensorDataset(data.images, tokens(data.captions))

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        padded = F.pad(to_unit(batch[0]), (4, 4, 4, 4), value=1.0)
        top, left = torch.randint(9, (2,), generator=generator, device=padded.device).tolist()
        found: torch.Tensor = model(
            pixel_values=padded[..., top : top + SIZE, left : left + SIZE], input_ids=batch[1], return_loss=True
        ).loss
        return found

    def validate(model: nn.Module) -> dict[str, float]:
        """How often the right caption of 100 is the nearest, on drawings that were never seen."""
        device, neutral = next(model.parameters()).device, [group[0] for group in held_out.drawings]
        hits = []
        for start in range(0, len(neutral) - 99, 100):
            chosen = neutral[start : start + 100]
            answer = model(
                pixel_values=to_unit(held_out.images[chosen]).to(device),
                input_ids=tokens([held_out.captions[i] for i in chosen]).to(device),
            )
            hits.append((answer.logits_per_image.argmax(1).cpu() == torch.arange(100)).float().mean())
        return {"held_out_match_of_100": float(torch.stack(hits).mean()) if hits else float("nan")}

    def export(model: nn.Module) -> None:
        assert isinstance(model, CLIPModel)
        model.save_pretrained(folder)
        size = {"height": SIZE, "width": SIZE}
        images = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        CLIPProcessor(images, tokenizer).save_pretrained(folder)
        write_card(
            folder, model, settings, "emoji-clip", title="Encoders of emoji and their captions",
            about="A small CLIP.", usage=USAGE, task="zero-shot-image-classification",
        )  # fmt: skip

    train("emoji-clip", build_pair(tokenizer, settings.width), pairs, loss, settings, export, validate)
    return folder
