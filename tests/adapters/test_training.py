"""Training of adapters on tiny models: what is trained, what is written, and that a resumed run is an unbroken one."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import training_programs as programs
from fixtures.weights import noise
from PIL import Image
from processes import together
from safetensors.torch import load_file
from zoo import CASES
from zoo import run as zoo_run

import trimtab
from trimtab.adapters.easycontrol.checkpoint import written
from trimtab.adapters.easycontrol.shapes import drawn_shape, turned
from trimtab.adapters.easycontrol.train import (
    EasyControlSettings,
    EasyControlTraining,
    flow_matching_loss,
    train_easycontrol,
)
from trimtab.adapters.pairs import Pairs, crop_and_resize, unsquashed
from trimtab.adapters.smooth.train import SmoothSettings
from trimtab.adapters.unicon.checkpoint import save
from trimtab.adapters.unicon.train import (
    UniConSettings,
    UniConTraining,
    min_snr_weight,
    pair_loss,
    pairs_of,
    text_mask,
    train_unicon,
)
from trimtab.adapters.weights import save_weights
from trimtab.cli import main
from trimtab.guidance.errors import ParameterError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of pictures, as a folder and as a JSONL file."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("source", "target"):
        (folder / name).mkdir()
        for index in range(2):
            pixels = (noise(f"{name}.{index}", 20, 24, 3).sigmoid() * 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{index}.png")
    captions = [{"file": f"{index}.png", "caption": f"picture {index}"} for index in range(2)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    rows = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "caption": f"picture {i}"} for i in range(2)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    CASES["flux"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    CASES["sd15"].build().save_pretrained(folder)
    return folder


def control_settings(flux: Path, data: Path, output: Path, **override: Any) -> EasyControlSettings:
    values: dict[str, Any] = {
        "base": str(flux), "data": str(data), "output": str(output), "rank": 4, "cond_size": 16, "smallest": 16,
        "largest": 24, "steps": 4, "batch_size": 2, "warmup": 1, "max_sequence_length": 16, "learning_rate": 1e-2,
        "validation_steps": 1, "validate_every": 4, "checkpoint_every": 2,
    }  # fmt: skip
    return EasyControlSettings(**{**values, **override})


def partner_settings(sd: Path, data: Path, output: Path, **override: Any) -> UniConSettings:
    values: dict[str, Any] = {
        "base": str(sd), "data": str(data), "output": str(output), "rank": 4, "size": 16, "steps": 4,
        "batch_size": 2, "warmup": 1, "learning_rate": 1e-2, "validate_every": 4, "checkpoint_every": 2,
    }  # fmt: skip
    return UniConSettings(**{**values, **override})


def first_of(data: Pairs) -> dict[str, Any]:
    """A batch of the first pair."""
    return {name: [value] if name == "caption" else value[None] for name, value in data[0].items()}


# -- data --------------------------------------------------------------------------------------------------------------
def test_a_folder_and_a_file_hold_the_same_pairs(data: Path) -> None:
    folder, file = Pairs(str(data), 16), Pairs(str(data / "pairs.jsonl"), 16)
    assert len(folder) == len(file) == 2
    for one, other in zip(folder, file, strict=True):
        assert one["caption"] == other["caption"]
        assert torch.equal(one["source"], other["source"])
        assert one["target"].shape == (3, 16, 16)


def test_a_row_without_a_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"source": "a.png", "caption": "x"}')
    with pytest.raises(ParameterError, match="line 1 lacks target"):
        Pairs(str(tmp_path / "rows.jsonl"), 16)


def test_source_and_target_are_cut_alike() -> None:
    images = torch.arange(16.0).expand(1, 3, 16, 16)
    cut = crop_and_resize(images, 12, 6)
    assert cut.shape == (1, 3, 12, 6)
    assert cut.mean().item() == pytest.approx(images.mean().item(), abs=1e-4)


def test_an_image_stays_whole_whatever_its_shape_and_is_cut_only_to_that_of_another(data: Path) -> None:
    whole = Pairs(str(data), 24, whole=True)[0]  # of 20 by 24 pixels
    assert whole["target"].shape == whole["source"].shape == (3, 24, 24)
    assert whole["aspect"] == pytest.approx(20 / 24)
    across = torch.linspace(-1, 1, 24).expand(1, 3, 24, 24)
    aspects = torch.tensor([2.0])  # half as wide as it is high
    for aspect, size, share in ((2.0, (32, 16), 1.0), (1.0, (16, 16), 1.0), (4.0, (32, 8), 0.5)):
        part = unsquashed(across, aspects, aspect, size)
        assert part.shape[2:] == size
        assert (part[0, 0, 0, -1] - part[0, 0, 0, 0]).item() == pytest.approx(2 * share, abs=0.2)
    down = across.mT
    part = unsquashed(down, aspects, 1.0, (16, 16))  # of the height, the middle half
    assert (part[0, 0, -1, 0] - part[0, 0, 0, 0]).item() == pytest.approx(1.0, abs=0.1)
    assert part.mean().item() == pytest.approx(0.0, abs=1e-5)


# -- EasyControl -------------------------------------------------------------------------------------------------------
def test_easycontrol_is_trained_and_resumed_and_its_lora_attaches(flux: Path, data: Path, tmp_path: Path) -> None:
    whole = train_easycontrol(control_settings(flux, data, tmp_path / "whole"))
    parts = broken_off(tmp_path / "whole", tmp_path / "parts")
    (parts / "easycontrol.safetensors").unlink()
    assert main(["train", "easycontrol", *options(control_settings(flux, data, parts))]) == 0
    resumed = load_file(parts / "easycontrol.safetensors")
    for name, tensor in load_file(whole).items():
        assert torch.equal(resumed[name], tensor)
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(whole).items() if "up" in name)
    assert len(list((tmp_path / "whole" / "validation").glob("*.png"))) == 1
    pipe = trimtab.guide(CASES["flux"].build())
    plain = zoo_run(pipe, CASES["flux"])
    pipe.add_guidance("easycontrol", weights=str(whole), image=Image.open(data / "source" / "0.png"), cond_size=16)
    assert not torch.allclose(zoo_run(pipe, CASES["flux"]), plain, atol=1e-4)


def broken_off(output: Path, target: Path) -> Path:
    """A copy of a finished run as it was after the checkpoint at half its steps."""
    shutil.copytree(output, target)
    shutil.rmtree(target / "checkpoints" / "checkpoint_1")
    return target


def options(settings: Any) -> list[str]:
    """A run's settings as options of the command line."""
    values = {**settings.to_store(), "output": settings.output, "data": settings.data}
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_gradient_checkpointing_gives_the_same_gradient(flux: Path, data: Path, tmp_path: Path) -> None:
    settings = control_settings(flux, data, tmp_path)
    batch = first_of(Pairs(str(data), 24, whole=True))
    gradients = []
    for checkpointing in (False, True):
        pipe = CASES["flux"].build()
        torch.manual_seed(0)
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        model = EasyControlTraining(pipe.transformer, 4, "spatial")
        with torch.no_grad():  # at first B is 0, and A has no gradient
            for index, weight in enumerate(model.weights):
                weight.copy_(noise(f"weight.{index}", *weight.shape) / 4)
        flow_matching_loss(model, pipe, batch, settings, torch.Generator().manual_seed(0)).backward()
        gradients.append([weight.grad for weight in model.weights])
        assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None and checkpointed is not None
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-7)
        assert plain.abs().max() > 0


def watch(module: torch.nn.Module) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """The named arguments and the prediction of each call from now on."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    module.register_forward_hook(lambda module, args, given, out: calls.append((given, out[0])), with_kwargs=True)
    return calls


def test_the_trained_transformer_predicts_what_the_guided_pipeline_predicts(tmp_path: Path) -> None:
    trained = CASES["flux"].build().transformer
    model = EasyControlTraining(trained, 4, "spatial")
    with torch.no_grad():
        for index, weight in enumerate(model.weights):
            weight.copy_(noise(f"weight.{index}", *weight.shape) / 4)
    save_weights(tmp_path / "lora.safetensors", {name: t.detach() for name, t in written(model.layers).items()})
    pipe = trimtab.guide(CASES["flux"].build())
    picture = Image.fromarray((noise("picture", 16, 16, 3).sigmoid() * 255).to(torch.uint8).numpy())
    pipe.add_guidance("easycontrol", weights=str(tmp_path / "lora.safetensors"), image=picture, cond_size=16)
    calls = watch(pipe.transformer)
    zoo_run(pipe, CASES["flux"])
    (fill, _), (given, expected) = calls[:2]
    names = ("encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids")
    predicted = model(given["hidden_states"], fill["hidden_states"], **{name: given[name] for name in names})
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for weight in model.weights:
            weight.zero_()
    without = model(given["hidden_states"], fill["hidden_states"], **{name: given[name] for name in names})
    assert not torch.allclose(without, expected, atol=1e-2)


def test_captions_are_left_out(flux: Path, data: Path, tmp_path: Path) -> None:
    pipe = CASES["flux"].build()
    model = EasyControlTraining(pipe.transformer, 4, "spatial")
    batch = first_of(Pairs(str(data), 24, whole=True))

    def loss(dropout: float, caption: str) -> float:
        settings = control_settings(flux, data, tmp_path, caption_dropout=dropout)
        given = {**batch, "caption": [caption]}
        return flow_matching_loss(model, pipe, given, settings, torch.Generator().manual_seed(0)).item()

    assert loss(1.0, "a fox") == loss(0.0, " ") != loss(0.0, "a fox")


def test_a_batch_has_the_shape_of_one_of_its_images_and_its_size_is_drawn() -> None:
    def drawn(aspects: list[float], widest: float) -> set[tuple[float, tuple[int, int]]]:
        seeds = (torch.Generator().manual_seed(seed) for seed in range(50))
        return {drawn_shape(torch.tensor(aspects), (32, 64), widest, 4, generator) for generator in seeds}

    shapes = drawn([0.75, 1.25], 4 / 3)
    assert {round(aspect, 2) for aspect, _ in shapes} == {0.75, 1.25}
    sizes = [size for _, size in shapes]
    assert len(set(sizes)) > 10
    assert all(32 <= max(size) <= 64 and size[0] % 4 == size[1] % 4 == 0 for size in sizes)
    assert all((height < width) == (aspect < 1) for aspect, (height, width) in shapes)
    assert {aspect for aspect, _ in drawn([3.0], 2.0)} == {2.0}
    assert all(height == width for _, (height, width) in drawn([0.75, 1.25], 1.0))


def test_a_subject_is_mirrored_and_turned_and_what_comes_in_is_grey() -> None:
    subjects = torch.full((200, 3, 32, 32), -1.0)
    subjects[:, :, :, 24:] = 1.0  # white on the right
    found = turned(subjects, torch.Generator().manual_seed(0))
    on_the_left = (found[:, 0, 12:20, 2:6].mean((1, 2)) > 0).float().mean().item()
    assert on_the_left == pytest.approx(0.7, abs=0.1)
    assert found[:, :, 0, 0].abs().min() == 0.0 and found[:, :, 0, 0].abs().max() > 0.5  # some turned far, some hardly
    torch.testing.assert_close(found[:, :, 14:18, 14:18], torch.full((200, 3, 4, 4), -1.0))
    assert len({tuple(image.flatten().tolist()) for image in found[:20, 0, :8, 8:16]}) == 20


@pytest.mark.parametrize(("kind", "varies"), [("spatial", False), ("subject", True)])
def test_only_subjects_are_turned(kind: str, varies: bool, flux: Path, data: Path, tmp_path: Path) -> None:
    pipe = diffusers.FluxPipeline.from_pretrained(flux)
    settings = control_settings(flux, data, tmp_path, kind=kind, smallest=24)
    batch = first_of(Pairs(str(data), 24, whole=True, padded=kind == "subject"))
    given: list[torch.Tensor] = []

    def encoded(pixels: torch.Tensor) -> Any:
        given.append(pixels)
        return encode(pixels)

    encode, pipe.vae.encode = pipe.vae.encode, encoded
    for seed in (0, 1):
        flow_matching_loss(
            lambda tokens, *_, **more: tokens, pipe, batch, settings, torch.Generator().manual_seed(seed)
        )
    images, conditions = given[0::2], given[1::2]
    assert torch.equal(*images)
    assert torch.equal(*conditions) != varies
    assert images[0].shape[2:] == (20, 24)  # whole: 5 by 6 patches of 4 pixels


# -- UniCon ------------------------------------------------------------------------------------------------------------
def test_unicon_is_trained_and_resumed_and_its_model_attaches(sd: Path, data: Path, tmp_path: Path) -> None:
    whole = train_unicon(partner_settings(sd, data, tmp_path / "whole"))
    parts = broken_off(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(parts / "model")
    assert main(["train", "unicon", *options(partner_settings(sd, data, parts))]) == 0
    for name in ("model.safetensors", "xy_lora/pytorch_lora_weights.safetensors"):
        for key, tensor in load_file(whole / name).items():
            assert torch.equal(load_file(parts / "model" / name)[key], tensor)
    pipe = trimtab.guide(CASES["sd15"].build())
    plain = zoo_run(pipe, CASES["sd15"])
    joint = pipe.add_guidance("joint", weights=str(whole), mode="joint")
    assert not torch.allclose(zoo_run(pipe, CASES["sd15"]), plain, atol=1e-4)
    assert joint.partner.shape == plain.shape


def test_unicon_trains_with_gradient_checkpointing_and_without_mixing(sd: Path, data: Path, tmp_path: Path) -> None:
    settings = partner_settings(sd, data, tmp_path, gradient_checkpointing=1, mixing=0, partner_lora=0, steps=2)
    model = train_unicon(settings)
    assert not (model / "y_lora").exists()
    assert all(tensor.abs().max() > 0 for tensor in load_file(model / "model.safetensors").values())


def test_unicons_gradient_checkpointing_gives_the_same_gradient(data: Path, tmp_path: Path) -> None:
    settings, gradients = partner_settings(tmp_path, data, tmp_path), []
    for checkpointing in (False, True):
        pipe = CASES["sd15"].build()
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            pipe.unet.train()
        model = UniConTraining(pipe.unet, settings)
        with torch.no_grad():
            for index, weight in enumerate(model.weights):
                weight.copy_(noise(f"weight.{index}", *weight.shape) / 8)
        scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        batch = first_of(pairs_of(settings))
        pair_loss(model, pipe, scheduler, batch, settings, torch.Generator().manual_seed(0)).backward()
        gradients.append([weight.grad for weight in model.weights])
        assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None and checkpointed is not None
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-7)
        assert plain.abs().max() > 0


def test_the_loss_of_an_sdxl_pair_reaches_all_of_the_joint_attention(data: Path, tmp_path: Path) -> None:
    pipe = CASES["sdxl"].build()
    settings = partner_settings(tmp_path, data, tmp_path)
    model = UniConTraining(pipe.unet, settings)
    with torch.no_grad():  # at first the post projections are 0, and nothing before them has a gradient
        for index, weight in enumerate(model.weights):
            weight.copy_(noise(f"weight.{index}", *weight.shape) / 8)
    batch = first_of(pairs_of(settings))
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    pair_loss(model, pipe, scheduler, batch, settings, torch.Generator().manual_seed(0)).backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.weights)


def test_a_text_that_is_left_out_is_left_out_of_sdxls_pooled_text_too(data: Path, tmp_path: Path) -> None:
    pipe, seen = CASES["sdxl"].build(), []

    def model(sample: torch.Tensor, t: torch.Tensor, text: torch.Tensor, added_cond_kwargs: Any) -> torch.Tensor:
        seen.append((text.abs().sum((1, 2)) > 0, added_cond_kwargs["text_embeds"].abs().sum(1) > 0))
        return sample

    settings = partner_settings(tmp_path, data, tmp_path, text_dropout=0.3)
    batch = first_of(pairs_of(settings))
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for seed in range(8):
        pair_loss(model, pipe, scheduler, batch, settings, torch.Generator().manual_seed(seed))
    assert all(torch.equal(text, pooled) for text, pooled in seen)
    assert {bool(kept) for text, _ in seen for kept in text} == {True, False}


def test_an_autoencoder_that_overflows_in_float16_encodes_in_float32(data: Path, tmp_path: Path) -> None:
    settings = partner_settings(tmp_path, data, tmp_path)
    batch = first_of(pairs_of(settings))
    given: dict[torch.dtype, torch.Tensor] = {}

    def model(sample: torch.Tensor, t: torch.Tensor, text: torch.Tensor, **more: Any) -> torch.Tensor:
        given[sample.dtype] = sample.float()
        return sample

    for dtype in (torch.float32, torch.float16):
        pipe = CASES["sdxl"].build()
        first = pipe.vae.encoder.conv_in
        with torch.no_grad():  # beyond what float16 holds; the group norm that follows brings it back
            first.weight.mul_(3e4 / first.weight.abs().max())
            first.bias.fill_(6e4)
        pipe.vae.register_to_config(force_upcast=True)
        pipe.to(dtype)
        scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        assert pair_loss(model, pipe, scheduler, batch, settings, torch.Generator().manual_seed(0)).isfinite()
        assert pipe.vae.dtype == dtype
    assert given[torch.float16].isfinite().all()


def test_the_trained_unet_predicts_what_the_guided_pipeline_predicts(tmp_path: Path) -> None:
    model = UniConTraining(CASES["sd15"].build().unet, UniConSettings(rank=4))
    with torch.no_grad():
        for index, weight in enumerate(model.weights):
            weight.copy_(noise(f"weight.{index}", *weight.shape) / 8)
    save(tmp_path / "edge", copy.deepcopy(model.blocks))
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("joint", weights=str(tmp_path), model="edge", image=Image.new("RGB", (32, 32)))
    calls = watch(pipe.unet)
    zoo_run(pipe, CASES["sd15"])
    given, expected = calls[0]
    arguments = {name: given[name] for name in ("sample", "timestep")}
    assert given["timestep"].unique().numel() == 2  # either side's own
    predicted = model(**arguments, text=given["encoder_hidden_states"])
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)


def test_the_two_sides_are_noised_independently(sd: Path, data: Path, tmp_path: Path) -> None:
    pipe, times = CASES["sd15"].build(), []

    def model(noised: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        times.append(t)
        return noised

    settings = partner_settings(sd, data, tmp_path)
    batch = first_of(pairs_of(settings))
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for seed in range(60):
        pair_loss(model, pipe, scheduler, batch, settings, torch.Generator().manual_seed(seed))
    both = torch.stack(times).float()
    assert both.shape == (60, 2) and (both[:, 0] != both[:, 1]).float().mean() > 0.9
    assert torch.corrcoef(both.T)[0, 1].abs() < 0.4
    assert (both.amin(0) < 150).all() and (both.amax(0) > 850).all()


@pytest.mark.parametrize(("crop", "different"), [(0.75, 4), (0.0, 2)], ids=["a random part", "the middle"])
def test_both_images_of_a_pair_are_cut_and_mirrored_alike_and_otherwise_at_each_step(
    crop: float, different: int, data: Path, tmp_path: Path
) -> None:
    pipe = CASES["sd15"].build()
    settings = partner_settings(tmp_path, data, tmp_path, crop=crop, aspect=1.0)
    batch = torch.utils.data.default_collate(list(pairs_of(settings)))
    batch["source"] = batch["target"]
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    given: list[torch.Tensor] = []

    def encoded(pixels: torch.Tensor) -> Any:
        given.append(pixels)
        return encode(pixels)

    def loss(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return pair_loss(lambda noised, t, text: noised, pipe, scheduler, batch, settings, generator).item()

    encode, pipe.vae.encode = pipe.vae.encode, encoded
    losses = [loss(seed) for seed in range(4)]
    assert loss(3) == losses[3]  # of the step's generator alone, so that a resumed run sees the same
    x, y = given[0::2], given[1::2]
    assert all(torch.equal(*sides) for sides in zip(x, y, strict=True))
    assert torch.equal(x[3], x[4])
    assert len({tuple(images.flatten().tolist()) for images in x}) == different  # the middle is mirrored at most


def test_any_pair_of_folders(sd: Path, data: Path, tmp_path: Path) -> None:
    for name, other in (("source", "lines"), ("target", "photographs")):
        shutil.copytree(data / name, tmp_path / "data" / other)
    names = {"source": "lines", "target": "photographs", "steps": 1, "validate_every": 1}
    assert train_unicon(partner_settings(sd, tmp_path / "data", tmp_path / "out", **names)).is_dir()
    with pytest.raises(ParameterError, match=r"source='source' is no folder in .* there are: lines, photographs"):
        train_unicon(partner_settings(sd, tmp_path / "data", tmp_path / "none", steps=1))
    next((tmp_path / "data" / "lines").iterdir()).unlink()
    with pytest.raises(ParameterError, match="is missing, the other of the pair with"):
        train_unicon(partner_settings(sd, tmp_path / "data", tmp_path / "none", **names))


@pytest.mark.parametrize(
    ("settings", "wrong", "message"),
    [
        (UniConSettings, {"crop": 1.5}, r"train unicon: crop=1\.5; allowed: 0 to 1"),
        (UniConSettings, {"flip": -0.1}, r"train unicon: flip=-0\.1; allowed: 0 to 1"),
        (UniConSettings, {"text_dropout": 0.5}, r"train unicon: text_dropout=0\.5; allowed: 0 to 0\.333"),
        (UniConSettings, {"aspect": 0.5}, r"train unicon: aspect=0\.5; allowed: 1 or more"),
        (EasyControlSettings, {"kind": "edges"}, r"train easycontrol: kind='edges'; allowed: spatial, subject"),
        (EasyControlSettings, {"caption_dropout": 2.0}, r"train easycontrol: caption_dropout=2\.0; allowed: 0 to 1"),
        (EasyControlSettings, {"smallest": 2048}, r"train easycontrol: smallest=2048; allowed: 1 to 1024"),
        (SmoothSettings, {"crop": -1.0}, r"train smooth: crop=-1\.0; allowed: 0 to 1"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        settings(**wrong)


def test_texts_are_left_out_of_either_side_and_of_both() -> None:
    kept = text_mask(20_000, 0.1, torch.Generator().manual_seed(0))
    alone_x, alone_y = ((~kept[:, i] & kept[:, 1 - i]).float().mean().item() for i in (0, 1))
    both = (~kept).all(dim=1).float().mean().item()
    assert (alone_x, alone_y, both) == pytest.approx((0.1, 0.1, 0.1), abs=0.01)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_weight_is_that_of_min_snr(prediction: str) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    t = torch.tensor([0, 300, 999])
    alpha_bar = scheduler.alphas_cumprod[t]
    snr = alpha_bar / (1 - alpha_bar)
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + (prediction == "v_prediction"))
    torch.testing.assert_close(min_snr_weight(scheduler, t, 5.0), expected, rtol=1e-4, atol=1e-6)
    assert min_snr_weight(scheduler, t, 0.0).tolist() == [1.0, 1.0, 1.0]


# -- several processes -------------------------------------------------------------------------------------------------
def test_two_processes_resume_to_the_same_losses_and_weights(flux: Path, sd: Path, data: Path, tmp_path: Path) -> None:
    """Gradients of two batches, bfloat16."""
    more: dict[str, dict[str, Any]] = {
        "easycontrol": {"base": str(flux), "data": str(data), "rank": 4, "cond_size": 16, "smallest": 16, "largest": 16,
                        "max_sequence_length": 16, "validation_steps": 1},
        "smooth": {"base": str(sd), "data": str(data), "size": 32},
        "unicon": {"base": str(sd), "data": str(data), "rank": 4, "size": 16},
    }  # fmt: skip
    programs.check(together(2, programs.resume, tmp_path / "two", str(tmp_path), more, seconds=600))


def test_a_command_runs_under_accelerate_launch(sd: Path, data: Path, tmp_path: Path) -> None:
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [
        "--module",
        "trimtab",
        "train",
        "unicon",
        *options(partner_settings(sd, data, tmp_path, batch_size=1, steps=1)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *command], check=True, env=environment, capture_output=True)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    # Two processes were one run: each has a random state of its own in the checkpoint.
    assert len(list((tmp_path / "checkpoints" / "checkpoint_0").glob("random_states_*"))) == 2
