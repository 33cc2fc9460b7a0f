"""The tiny pipeline whose images are measured here, and the tiny CLIP that some are measured by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPProcessor
from zoo.class_conditional import class_conditional

from trimtab.pipelines.emoji.clip import build_pair
from trimtab.pipelines.emoji.text import clip_tokenizer
from trimtab.pipelines.fashion.data import CLASS_NAMES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    class_conditional(list(CLASS_NAMES), side=16, prediction_type="v_prediction").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer(["a red fox", "a blue boat"])
    torch.manual_seed(0)
    sides = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    for part in (build_pair(tokenizer, 32), CLIPProcessor(CLIPImageProcessorPil(**sides), tokenizer)):
        part.save_pretrained(folder)
    return folder
