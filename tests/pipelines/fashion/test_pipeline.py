"""The class-conditional pipeline is an ordinary Diffusers pipeline: it samples, saves, loads without this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from zoo.class_conditional import class_conditional

import trimtab
from trimtab.pipelines import fashion
from trimtab.pipelines.fashion import ClassConditionalPipeline

NAMES = ["circle", "square", "Cross"]


@pytest.fixture
def pipe() -> ClassConditionalPipeline:
    return class_conditional(NAMES, prediction_type="v_prediction")


def sample(pipe: DiffusionPipeline, labels: object, seed: int = 0, **options: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(labels, num_inference_steps=3, generator=generator, output_type="pt", **options).images


def test_labels_may_be_indices_or_names_and_none_is_the_null_class(pipe: ClassConditionalPipeline) -> None:
    assert torch.equal(sample(pipe, 1), sample(pipe, "SQUARE"))
    assert torch.equal(sample(pipe, None), sample(pipe, pipe.null_class))
    assert not torch.equal(sample(pipe, 1), sample(pipe, None))


@pytest.mark.parametrize("label", [-1, 4, "triangle"])
def test_an_unknown_class_is_refused_with_the_list(pipe: ClassConditionalPipeline, label: int | str) -> None:
    with pytest.raises(ValueError, match=r"class_labels: no class .*'circle', 1 'square', 2 'Cross', and None"):
        sample(pipe, label)


def test_an_image_does_not_depend_on_its_batch(pipe: ClassConditionalPipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = pipe([0, 2], num_inference_steps=3, generator=generators, output_type="pt").images
    assert torch.allclose(both[1:], sample(pipe, 2, seed=6), atol=1e-5)


def test_output_types_agree(pipe: ClassConditionalPipeline) -> None:
    tensor = sample(pipe, 0)
    array = pipe(0, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    picture = pipe(0, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.allclose(array[0, ..., 0], (tensor[0, 0] / 2 + 0.5).clamp(0, 1).numpy(), atol=1e-6)
    assert picture.mode == "L" and picture.size == (8, 8)
    assert np.array_equal(np.asarray(picture), (array[0, ..., 0] * 255).round().astype("uint8"))


def test_latents_of_the_wrong_shape_are_refused(pipe: ClassConditionalPipeline) -> None:
    with pytest.raises(ValueError, match=r"latents: shape \(1, 1, 4, 4\) given, \(1, 1, 8, 8\) needed"):
        sample(pipe, 0, latents=torch.zeros(1, 1, 4, 4))


def test_a_callback_may_replace_the_latents(pipe: ClassConditionalPipeline) -> None:
    zero = lambda pipe, index, timestep, tensors: {"latents": tensors["latents"] * 0}  # noqa: E731
    assert torch.equal(sample(pipe, 0, callback_on_step_end=zero), torch.zeros(1, 1, 8, 8))


def test_plain_diffusers_loads_what_it_saves(
    pipe: ClassConditionalPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe.save_pretrained(tmp_path / "model")
    plain = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    plain.set_progress_bar_config(disable=True)
    assert type(plain).__name__ == "ClassConditionalPipeline" and not isinstance(plain, ClassConditionalPipeline)
    assert torch.allclose(sample(plain, 1), sample(pipe, 1), atol=1e-6)


def test_guided_pipeline_loads_it_with_its_recipe(pipe: ClassConditionalPipeline, tmp_path: Path) -> None:
    trimtab.guide(pipe).add_guidance("cfg", scale=2.0)
    guided = sample(pipe, 1)
    pipe.save_pretrained(tmp_path)
    again = trimtab.GuidedPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.guidances["cfg"].scale == 2.0
    assert torch.allclose(sample(again, 1), guided, atol=1e-6)


def test_cfg_is_the_combination_of_class_and_null_class(pipe: ClassConditionalPipeline) -> None:
    """One DDIM step from t to 0 by hand."""
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    trimtab.guide(pipe).add_guidance("cfg", scale=3.0)
    step = type(pipe.scheduler).step

    class Recording(type(pipe.scheduler)):  # type: ignore[misc]
        def step(self, model_output: torch.Tensor, *args: object, **kwargs: object) -> object:
            seen.append(model_output)
            return step(self, model_output, *args, **kwargs)

    pipe.scheduler.__class__ = Recording
    sample(pipe, 1, latents=latents)
    pipe.scheduler.set_timesteps(3)
    timestep = pipe.scheduler.timesteps[0]
    given = pipe.scheduler.scale_model_input(latents * pipe.scheduler.init_noise_sigma, timestep)
    with torch.no_grad():
        c, u = (pipe.unet(given, timestep, class_labels=torch.tensor([label])).sample for label in (1, 3))
    assert torch.allclose(seen[0], u + 3.0 * (c - u), atol=1e-5)


def test_the_shipped_model_loads_by_name_and_through_plain_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ours = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
    plain = DiffusionPipeline.from_pretrained(
        fashion.MODEL_FOLDER, custom_pipeline=str(fashion.PIPELINE_FOLDER), trust_remote_code=True
    )
    for loaded in (ours, plain):
        loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(sample(ours, "Bag"), sample(plain, "Bag"), atol=1e-6)


def test_the_shipped_model_is_small_and_its_card_complete() -> None:
    files = [path for path in fashion.MODEL_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    card = (fashion.MODEL_FOLDER / "README.md").read_text()
    assert all(f"## {part}" in card for part in ("Data", "Training", "Quality", "Licence"))
