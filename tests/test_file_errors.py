"""Files that are corrupt, unsafe or need what is not there: one clear error, and nothing is half written or changed."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from zoo import CASES

import trimtab
from trimtab import Guidance, GuidedPipeline, RecipeError, Step, UnsupportedPipelineError


@pytest.fixture(scope="module")
def shared() -> Any:
    return CASES["sd15"].build()


@pytest.fixture
def pipe(shared: Any) -> Any:
    return trimtab.guide(copy.copy(shared))


@dataclass
class Pull(Guidance):
    """A guidance that is not registered."""

    name: ClassVar[str] = "test.pull"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return x0.square().flatten(1).sum(1)


def test_a_recipe_that_is_corrupt_or_needs_what_is_not_there(pipe: Any, tmp_path: Path) -> None:
    pipe.add_guidance("pag", scale=1.0)
    pipe.save_guidance(tmp_path)
    recipe = tmp_path / "guidance.json"
    good = recipe.read_text()
    bad = {
        good[:-30]: "is not JSON",
        "[]": "The recipe is a list, not an object.",
        good.replace('"scale": 1.0', '"scale": -1.0'): "scale=-1.0 is out of range; allowed: >= 0.",
        good.replace('"scale"', '"skale"'): "pag: no parameter 'skale'. Did you mean 'scale'?",
        good.replace('"plugin": "pag"', '"plugin": "acme.pag"'): "needs the plug-in 'acme.pag'",
    }
    for text, message in bad.items():
        recipe.write_text(text)
        with pytest.raises(RecipeError, match=re.escape(message)):
            pipe.load_guidance(tmp_path)
        assert pipe.guidances["pag"].scale == 1.0


def test_a_recipe_that_cannot_be_written_leaves_the_old_one(pipe: Any, tmp_path: Path) -> None:
    pipe.add_guidance("pag")
    pipe.save_guidance(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pipe.add_guidance(Pull())
    with pytest.raises(
        RecipeError, match=r"'test\.pull' is a Pull, which is not a registered plug-in.*trimtab\.register"
    ):
        pipe.save_guidance(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pipeline_whose_recipe_cannot_be_written_is_not_saved_by_half(pipe: Any, tmp_path: Path) -> None:
    pipe.add_guidance(Pull())
    with pytest.raises(RecipeError):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["ddpm", "sd15"])
def test_weights_that_are_not_safetensors(name: str, tmp_path: Path) -> None:
    CASES[name].build().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UnsupportedPipelineError) as raised:
        GuidedPipeline.from_pretrained(tmp_path)
    assert str(raised.value).startswith(
        f"{tmp_path}: only weights in safetensors format are loaded, and some are missing. "
    )
    assert "use_safetensors=None" in str(raised.value)
    GuidedPipeline.from_pretrained(tmp_path, use_safetensors=None).save_pretrained(tmp_path / "converted")
    assert isinstance(GuidedPipeline.from_pretrained(tmp_path / "converted"), DiffusionPipeline)


def test_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model_index\.json"):
        GuidedPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"})[:-5])
    with pytest.raises((OSError, ValueError)):
        GuidedPipeline.from_pretrained(tmp_path)
