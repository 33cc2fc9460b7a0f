"""`smooth`: the published LoRA on the stock UNet, and its training by variation regularisation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from fingerprint import fingerprint
from fixtures.weights import noise
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from zoo import CASES, run

import trimtab
from trimtab.adapters.smooth.train import (
    SmoothSettings,
    SmoothTraining,
    cut,
    pictures_of,
    smooth_loss,
    train_smooth,
    variation,
    written,
)
from trimtab.adapters.weights import save_weights
from trimtab.guidance.errors import ParameterError, WeightsError

SD = CASES["sd15"]


def lora(unet: nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA in the published format, with numbers that depend on nothing but the names."""
    model = SmoothTraining(unet, 4)
    return {name: noise(name, *tensor.shape) / 8 for name, tensor in written(model.loras).items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("smooth") / "smooth.safetensors", lora(SD.build().unet))


def test_it_is_the_unet_with_the_lora_merged_into_its_weights(weights: Path) -> None:
    merged = SD.build()
    tensors = load_file(weights)
    for name in {key.removesuffix(".down.weight").removesuffix(".up.weight") for key in tensors}:
        attention, _, projection = name.partition(".processor.")
        place = projection.removesuffix("_lora").replace("to_out", "to_out.0")
        linear = merged.unet.get_submodule(f"{attention}.{place}")
        linear.weight.data += 0.7 * tensors[f"{name}.up.weight"] @ tensors[f"{name}.down.weight"]
    pipe = trimtab.guide(SD.build())
    plain = run(pipe, SD)
    before = fingerprint(pipe.unet)
    smooth = pipe.add_guidance("smooth", weights=str(weights), scale=0.7)
    expected = run(merged, SD)
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(run(pipe, SD), expected, rtol=1e-4, atol=1e-4)
    assert fingerprint(pipe.unet) == before
    smooth.scale = 0.0
    assert torch.equal(run(pipe, SD), plain)
    smooth.scale, smooth.stop = 0.7, 0.5
    windowed = run(pipe, SD)
    assert not torch.allclose(windowed, plain, atol=1e-4) and not torch.allclose(windowed, expected, atol=1e-4)
    pipe.clear_guidance()
    assert torch.equal(run(pipe, SD), plain)


def test_it_composes_with_pag(weights: Path) -> None:
    results = []
    for rows in ("auto", "sequential"):
        pipe = trimtab.guide(SD.build())
        pipe.guidance_rows = rows
        pipe.add_guidance("smooth", weights=str(weights))
        pipe.add_guidance("pag", scale=2.0)
        results.append(run(pipe, SD))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_fused_projections_are_refused(weights: Path) -> None:
    pipe = trimtab.guide(SD.build())
    pipe.fuse_qkv_projections()
    with (
        pipe.guidance("smooth", weights=str(weights)),
        pytest.raises(trimtab.UnsupportedPipelineError, match=r"smooth: .*projections are fused"),
    ):
        run(pipe, SD)


def test_weights_that_do_not_fit_are_one_clear_error(weights: Path, tmp_path: Path) -> None:
    pipe = trimtab.guide(SD.build())
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("to_q_lora.up.weight"))
    path = save_weights(tmp_path / "wide.safetensors", {**tensors, name: torch.cat([tensors[name]] * 2)})
    with pytest.raises(WeightsError, match=r"wide\.safetensors: .*to_q\.lora\.up has shape .* needs"):
        pipe.add_guidance("smooth", weights=str(path))
    first = next(iter(tensors))
    other = {"nan.safetensors": {**tensors, first: tensors[first] * float("nan")}, "half.safetensors": dict(tensors)}
    attention = first.partition(".processor.")[0]
    other["few.safetensors"] = {n: t for n, t in tensors.items() if not n.startswith(attention)}
    other["half.safetensors"].pop(first)
    other["rank.safetensors"] = {**tensors, name: tensors[name][:, :2]}
    other["flat.safetensors"] = {**tensors, first: torch.tensor(1.0)}
    messages = [
        "not finite",
        "only one of its two matrices",
        f"lacks .*{attention}",
        r"shape \(8, 2\), .* \(8, 4\)",
        r"\(\), but a matrix",
    ]
    for (file, changed), message in zip(other.items(), messages, strict=True):
        save_weights(tmp_path / file, changed)
        with pytest.raises(WeightsError, match=rf"{file}.*{message}"):
            pipe.add_guidance("smooth", weights=str(tmp_path / file))
    (tmp_path / "short.safetensors").write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"short\.safetensors is no safetensors file"):
        pipe.add_guidance("smooth", weights=str(tmp_path / "short.safetensors"))
    with pytest.raises(ParameterError, match="weights is missing"):
        pipe.add_guidance("smooth")
    assert not pipe.guidances


# -- training ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_variation_of_a_linear_model_is_its_closed_form(prediction: str) -> None:
    """For a prediction `c x_t`, x0_hat is linear in the noise, so that r = |k| sqrt(1 - abar) |v| / sqrt(n)."""
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    clean, noise_, v = torch.randn(3, 2, 4, 5, 5)
    noise_.requires_grad_(True)
    t, c = torch.tensor([100, 700]), 0.3
    noised = scheduler.add_noise(clean, noise_, t)
    r = variation(scheduler, c * noised, noised, noise_, v, t)
    alpha_bar = scheduler.alphas_cumprod[t]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    k = (1 - sigma * c) / alpha if prediction == "epsilon" else alpha - sigma * c
    expected = (k * sigma).abs() * sigma * v.flatten(1).norm(dim=1) / 100**0.5
    torch.testing.assert_close(r, expected, rtol=1e-4, atol=1e-6)


def test_the_regularisation_reaches_the_lora_and_its_mean_is_kept() -> None:
    pipe = SD.build()
    torch.manual_seed(0)
    model = SmoothTraining(pipe.unet, 4)
    batch = {"target": torch.rand(2, 3, 32, 32) * 2 - 1, "caption": ["a fox", ""]}
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    gradients = []
    for weight in (0.0, 1.0):
        model.zero_grad()
        smooth_loss(model, pipe, scheduler, batch, weight, torch.Generator().manual_seed(0)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.weights if p.grad is not None]))
    assert not torch.allclose(*gradients)
    assert model.mean_variation > 0
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def logged(output: Path) -> list[tuple[int, float]]:
    """Number and loss of each step."""
    rows = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize(("crop", "moves"), [(1.0, True), (0.0, False)])
def test_of_an_oblong_image_a_square_at_a_random_place_is_seen_or_its_middle(
    crop: float, moves: bool, tmp_path: Path
) -> None:
    """Of an image twice as wide as it is high, which is brighter to the right."""
    (tmp_path / "target").mkdir()
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 32, 64).permute(1, 2, 0)
    Image.fromarray(ramp.numpy()).save(tmp_path / "target" / "0.png")
    settings = SmoothSettings(data=str(tmp_path), size=32, crop=crop)
    batch = torch.utils.data.default_collate(list(pictures_of(settings)))
    seen = [cut(batch, settings, torch.Generator().manual_seed(seed))["target"] for seed in range(5)]
    assert all(images.shape == (1, 3, 32, 32) for images in seen)
    means = [round((images.mean().item() + 1) * 127.5) for images in seen]
    assert (len(set(means)) > 1) == moves and all(15 <= mean <= 48 for mean in means)
    spread = (seen[0][0, 0, 0, -1] - seen[0][0, 0, 0, 0]).item() * 127.5
    assert spread == pytest.approx(31, abs=2)  # half of the width, undistorted


def test_it_is_trained_and_its_lora_attaches(tmp_path: Path) -> None:
    (tmp_path / "data" / "target").mkdir(parents=True)
    for index in range(2):
        pixels = (noise(f"target.{index}", 20, 24, 3).sigmoid() * 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "data" / "target" / f"{index}.png")
    SD.build().save_pretrained(tmp_path / "sd")
    values: dict[str, Any] = {
        "base": str(tmp_path / "sd"), "data": str(tmp_path / "data"), "output": str(tmp_path / "out"), "size": 32,
        "steps": 2, "batch_size": 2, "accumulate": 1, "warmup": 1, "checkpoint_every": 1, "learning_rate": 1e-2,
    }  # fmt: skip
    file = train_smooth(SmoothSettings(**values))
    assert len(logged(tmp_path / "out")) == 2
    whole, losses = load_file(file), logged(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint_1")
    file.unlink()
    train_smooth(SmoothSettings(**values))  # continues after the first step, running mean included
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(file).items())
    assert logged(tmp_path / "out") == losses
    pipe = trimtab.guide(SD.build())
    plain = run(pipe, SD)
    pipe.add_guidance("smooth", weights=str(file))
    assert not torch.allclose(run(pipe, SD), plain, atol=1e-5)
