"""PPAP: experts by half-open noise ranges, trained from a pipeline and a teacher alone, saved, loaded, guiding."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import training_programs as programs
import transformers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from processes import together
from torch import nn
from zoo.class_conditional import class_conditional

import trimtab
from trimtab import cli
from trimtab.adapters.ppap.agreement import agreement
from trimtab.adapters.ppap.experts import Experts, load_experts
from trimtab.adapters.ppap.guidance import PPAP
from trimtab.adapters.ppap.noise import check_timesteps, noised
from trimtab.adapters.ppap.train import PPAPSettings, distance, train_experts
from trimtab.adapters.weights import load_weights
from trimtab.guidance.errors import WeightsError
from trimtab.guidance.images import Preprocessing
from trimtab.guidance.networks import tensor_of


class Teacher(nn.Module):
    """Three classes of grey 8x8 images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.body = nn.Sequential(
                nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()
            )
            self.head = nn.Linear(width * 36, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 3 * self.head(self.body(images).flatten(1))


class Dense(nn.Module):
    """A map of the size of the image: depth, or logits of classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.last(self.first(images).tanh())
        return found[:, 0] if found.shape[1] == 1 else found


def pipe() -> Any:
    return trimtab.guide(class_conditional(["one", "two", "three"]))


def settings(folder: Path, **changed: Any) -> PPAPSettings:
    small = PPAPSettings(output=str(folder), images=24, inference_steps=2, experts=2, rank=4, steps=3, batch_size=8,
                         warmup=0, checkpoint_every=1, learning_rate=1e-2)  # fmt: skip
    return dataclasses.replace(small, **changed)


def images() -> torch.Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_ranges_are_half_open_and_cover_everything() -> None:
    experts = Experts(Teacher(), 5, rank=2)
    assert [experts.bounds(index) for index in range(5)] == [(0, 200), (200, 400), (400, 600), (600, 800), (800, 1000)]
    assert [experts.route(t) for t in (0, 199, 199.9, 200, 999, 1000)] == [0, 0, 0, 1, 4, 4]
    odd = Experts(Teacher(), 3, rank=2)
    assert all(odd.route(t) == index for index in range(3) for t in range(*odd.bounds(index)))


def test_untrained_experts_are_the_network_and_a_few_per_cent_of_it() -> None:
    network = Teacher(width=64)
    experts = Experts(network, 2, rank=1)
    for t in (0, 900):
        assert torch.equal(experts(images(), torch.tensor([t])), network(images()))
    assert 0.01 < experts.trainable_share < 0.1
    assert network.body[0].__class__ is nn.Conv2d and all(p.requires_grad for p in network.parameters())


def test_each_image_is_seen_by_the_expert_of_its_own_timestep() -> None:
    experts = Experts(Teacher(), 2, rank=2)
    for parameter in experts.parameters_of(1).values():
        parameter.data.add_(0.1)
    both = experts(images(), torch.tensor([10, 600, 10, 600]))
    low, high = (experts(images(), torch.tensor([t])) for t in (10, 600))
    assert not torch.allclose(low, high)
    torch.testing.assert_close(both, torch.stack([low[0], high[1], low[2], high[3]]))


class Normed(nn.Module):
    """With a batch norm, and names of which one ends like another."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.a = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.b_a = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten())
            self.head = nn.Linear(8 * 16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.b_a(self.a(images)))


def test_a_network_of_one_layer_has_nothing_to_adapt() -> None:
    with pytest.raises(trimtab.ParameterError, match="ppap: Linear has no convolution or linear layer below its last"):
        Experts(nn.Linear(4, 2), 1)


def test_norms_are_an_experts_own_and_layers_are_those_that_are_named(tmp_path: Path) -> None:
    network = Normed().eval()
    experts = Experts(network, 2, rank=1)
    assert experts.layers == ("a.0",)  # not b_a.0, which has groups, though its name ends alike
    named = experts.parameters_of(1)
    assert sorted(named) == ["a.0.lora_A.weight", "a.0.lora_B.weight", "a.1.bias",
                             "a.1.weight"]  # fmt: skip
    assert experts.trainable_share == pytest.approx(2 * (9 + 8 + 16) / sum(p.numel() for p in network.parameters()))
    assert torch.equal(experts(images(), torch.tensor([900])), network(images()))
    named["a.1.bias"].data += 1
    assert torch.equal(experts(images(), torch.tensor([10])), network(images()))
    changed = experts(images(), torch.tensor([900]))
    assert not torch.equal(changed, network(images()))
    again = load_experts(network, load_weights(experts.save(tmp_path / "experts.safetensors")))
    assert torch.equal(again(images(), torch.tensor([900])), changed)
    assert isinstance(network.a[1], nn.BatchNorm2d)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_experts(pipe(), Teacher(), Preprocessing(), settings(tmp_path_factory.mktemp("ppap")))


def test_training_reports_its_share_and_trains_every_expert(trained: Path) -> None:
    report = json.loads((trained.parent / "report.json").read_text())
    experts = load_experts(Teacher(), load_weights(trained))
    assert report["trainable_share"] == pytest.approx(experts.trainable_share)
    for index in range(2):
        moved = {name: p for name, p in experts.parameters_of(index).items() if "lora_B" in name}
        assert all(parameter.abs().max() > 0 for parameter in moved.values())
    assert not torch.equal(experts(images(), torch.tensor([1])), experts(images(), torch.tensor([999])))


def test_a_stopped_run_ends_where_an_unbroken_one_does(trained: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    calls: list[int] = []

    class Stopping(Teacher):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            if len(calls) == 9:  # teacher and student, once a step each: within the second expert
                raise Stop
            return super().forward(images)

    with pytest.raises(Stop):
        train_experts(pipe(), Stopping(), Preprocessing(), settings(tmp_path))
    assert (tmp_path / "expert_0.safetensors").exists() and not (tmp_path / "expert_1.safetensors").exists()
    resumed = train_experts(pipe(), Teacher(), Preprocessing(), settings(tmp_path))
    whole, again = load_weights(trained).tensors, load_weights(resumed).tensors
    assert whole.keys() == again.keys()
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], atol=1e-6, rtol=0)


def test_what_was_made_with_other_settings_is_not_taken_for_ones_own(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.parent, folder)
    given = settings(folder)
    for name, value in {"steps": given.steps + 1, "seed": given.seed + 1, "batch_size": given.batch_size + 1}.items():
        with pytest.raises(trimtab.ParameterError, match=rf"train ppap: {name}={value}, but .* made with {name}="):
            train_experts(pipe(), Teacher(), Preprocessing(), dataclasses.replace(given, **{name: value}))
    assert train_experts(pipe(), Teacher(), Preprocessing(), given).exists()


OTHERWISE = {
    "edm": lambda: EDMEulerScheduler(),
    "continuous": lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    "from 0 to 1": lambda: IPNDMScheduler(),
    "upside down": lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_scheduler_without_timesteps_to_route_by_is_refused(name: str, trained: Path, tmp_path: Path) -> None:
    guided = pipe()
    guided.scheduler = OTHERWISE[name]()
    refusal = f"ppap: {type(guided.scheduler).__name__}, as it is configured, has no timesteps that noise ranges could"
    with pytest.raises(trimtab.UnsupportedPipelineError, match=refusal):
        train_experts(guided, Teacher(), Preprocessing(), settings(tmp_path))
    with pytest.raises(trimtab.UnsupportedPipelineError, match=refusal):
        guided.add_guidance("ppap", classifier=Teacher(), weights=str(trained), target=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(use_karras_sigmas=True), EulerDiscreteScheduler(), HeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
)  # fmt: skip
def test_schedulers_whose_timesteps_mean_the_noise_of_training_are_taken(scheduler: Any) -> None:
    check_timesteps(scheduler, 1000)


def test_experts_of_another_number_of_timesteps_are_refused(trained: Path) -> None:
    guided = pipe()
    guided.scheduler = DDIMScheduler(num_train_timesteps=100)
    guided.add_guidance("ppap", classifier=Teacher(), weights=str(trained), target=0)
    with pytest.raises(trimtab.UnsupportedPipelineError, match="are parts of 1000 timesteps, but DDIMScheduler has"):
        guided(0, num_inference_steps=2)


def test_experts_are_compared_with_the_teacher_wherever_a_training_left_them() -> None:
    # Another type stands for another device, which need not be here.
    experts, teacher = Experts(Teacher(), 2, 4).double(), Teacher().double()
    rows = agreement(experts, teacher, images(), pipe().scheduler, Preprocessing(), bins=2)
    assert all(row["untaught"] == row["experts"] for row in rows)


def test_students_come_to_see_in_noise_what_the_teacher_sees_without(tmp_path: Path) -> None:
    guided, network = pipe(), Teacher()
    file = train_experts(guided, network, Preprocessing(), settings(tmp_path, steps=60, experts=1, images=64))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["timesteps"] for row in report["agreement"]] == [[100 * i, 100 * i + 100] for i in range(10)]
    assert sum(row["experts"] - row["untaught"] for row in report["agreement"]) > 0
    experts = load_experts(network, load_weights(file))
    generator = torch.Generator().manual_seed(5)
    x0 = guided([None] * 32, num_inference_steps=2, generator=generator, output_type="pt").images.clamp(-1, 1)
    t = torch.randint(300, 900, (32,), generator=generator)
    noisy = noised(guided.scheduler, x0, torch.randn(x0.shape, generator=generator), t)
    untaught = distance(network(noisy), network(x0), "classification")
    assert distance(experts(noisy, t), network(x0), "classification") < 0.8 * untaught


def test_noise_is_at_unit_variance_on_straight_paths_as_well() -> None:
    x0, noise = (torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mixed = noised(FlowMatchEulerDiscreteScheduler(), x0, noise, torch.tensor([400]))
    assert mixed.var().item() == pytest.approx(1.0, abs=0.02)


def test_it_guides_with_the_expert_of_each_step(trained: Path) -> None:
    guided, seen = pipe(), []
    stock = guided(0, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images

    class Watching(PPAP):
        def logits(self, step: Any, image: torch.Tensor) -> torch.Tensor:
            seen.append(step.state.network.route(step.timestep))
            return super().logits(step, image)

    guided.add_guidance(Watching(classifier=Teacher(), weights=str(trained.parent / trained.name), target=1))
    image = guided(0, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    check = [1]  # of the target, before the first step
    assert seen == [*check, 1, 1, 0, 0] and not torch.equal(image, stock)


@pytest.mark.parametrize(("kind", "channels"), [("depth", 1), ("segmentation", 3)])
def test_depth_and_segmentation(kind: str, channels: int, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Dense(channels)
    file = train_experts(pipe(), network, Preprocessing(), settings(tmp_path, kind=kind, experts=1))
    wanted = torch.full((1, 8, 8), 1.0 if kind == "depth" else 2)

    def score(scale: float) -> float:
        guided = pipe()
        guided.add_guidance("ppap", classifier=network, weights=str(file), kind=kind, wanted=wanted, scale=scale)
        image = guided(0, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt").images
        found = network(image)
        return float((found - wanted).square().mean() if kind == "depth" else -found.log_softmax(1)[:, 2].mean())

    assert score(20.0) < score(0.0)


def test_a_map_that_does_not_fit_is_an_error_before_the_first_denoiser_call(tmp_path: Path) -> None:
    for kind, network in {"depth": Dense(1), "segmentation": Dense(3)}.items():
        file = Experts(network, 1, rank=1).save(tmp_path / f"{kind}.safetensors")
        unfitting = {torch.ones(1, 4, 8): "wanted is [1, 4, 8], but the network's map is 8 high and 8 wide",
                     torch.ones(3, 8, 8): "[1, 8, 8], or as many maps as images",
                     torch.ones(8, 8): "wanted is [8, 8]"}  # fmt: skip
        if kind == "segmentation":
            unfitting[torch.full((1, 8, 8), 3)] = "ppap: wanted holds classes from 3 to 3; allowed: 0 to 2."
        for wanted, message in unfitting.items():
            guided, calls = pipe(), []
            guided.unet.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            guided.add_guidance("ppap", classifier=network, weights=str(file), kind=kind, wanted=wanted)
            with pytest.raises(trimtab.ParameterError, match=re.escape(message)):
                guided([0, 1], num_inference_steps=2)
            assert not calls


def test_what_does_not_fit_is_an_error_that_says_so(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the network needs"):
        load_experts(Teacher(width=4), load_weights(trained))
    with pytest.raises(WeightsError, match=r"adapt 'body.0', which Dense has not"):
        load_experts(Dense(1), load_weights(trained))
    with pytest.raises(trimtab.ParameterError, match="ppap: weights is missing"):
        pipe().add_guidance("ppap", classifier=Teacher(), target=1)
    with pytest.raises(trimtab.ParameterError, match="kind='depth' needs wanted, a map"):
        pipe().add_guidance("ppap", classifier=Teacher(), weights=str(trained), kind="depth")


@pytest.mark.parametrize("labels", [("Zero", "One", "Two"), ()])
def test_a_target_goes_by_name(trained: Path, labels: tuple[str, ...]) -> None:
    network = Teacher()
    network.config = SimpleNamespace(id2label={0: "Zero", 1: "One", 2: "Two"})

    def image(target: int | str) -> torch.Tensor:
        guided = pipe()
        guided.add_guidance("ppap", classifier=network, weights=str(trained), target=target, labels=labels)
        return guided(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    assert torch.equal(image("one"), image(1)) and not torch.equal(image("two"), image(1))
    with pytest.raises(trimtab.ParameterError, match="ppap: target='four' is no class of the classifier"):
        image("four")


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and a transformers classifier of its images, in folders."""
    folder = tmp_path_factory.mktemp("saved")
    class_conditional(["one", "two", "three"]).save_pretrained(folder / "pipe")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ResNetForImageClassification(config).save_pretrained(folder / "teacher")
    return folder


def command(saved: Path, output: Path, steps: int, batch: int) -> list[str]:
    return ["train", "ppap", "--pipeline", str(saved / "pipe"), "--teacher", str(saved / "teacher"), "--output",
            str(output), "--images", "16", "--inference-steps", "2", "--experts", "2", "--rank", "1", "--steps",
            str(steps), "--batch-size", str(batch), "--warmup", "0"]  # fmt: skip


def test_the_command_trains_and_its_experts_guide_with_the_checkpoint(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(saved, tmp_path, steps=3, batch=8)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    said = capsys.readouterr().out
    assert f"hold {report['trainable_share']:.2%} of the network's {report['base_parameters']:,} parameters" in said
    guided = trimtab.GuidedPipeline.from_pretrained(saved / "pipe")
    stock = guided(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    guided.add_guidance("ppap", classifier=str(saved / "teacher"), weights=str(tmp_path / "ppap.safetensors"), target=1)
    image = guided(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert not torch.equal(image, stock)
    assert cli.main(["train", "ppap", "--output", str(tmp_path / "other")]) == 2
    assert "train ppap: teacher is missing" in capsys.readouterr().err


def test_two_processes_share_the_work_and_resume_to_the_same_losses_and_weights(saved: Path, tmp_path: Path) -> None:
    """Gradients of two batches, bfloat16."""
    ppap = {"pipeline": str(saved / "pipe"), "teacher": str(saved / "teacher"), "images": 8, "inference_steps": 2,
            "experts": 2, "rank": 1}  # fmt: skip
    programs.check(together(2, programs.resume, tmp_path / "two", str(tmp_path), {"ppap": ppap}, seconds=600))
    report = json.loads((tmp_path / "ppap-whole" / "report.json").read_text())
    teacher = transformers.AutoModelForImageClassification.from_pretrained(saved / "teacher")
    experts = load_experts(teacher, load_weights(tmp_path / "ppap-whole" / "ppap.safetensors"))
    assert report["trainable_share"] == pytest.approx(experts.trainable_share)
    moved = [p.abs().max() for i in range(2) for n, p in experts.parameters_of(i).items() if "lora_B" in n]
    assert min(moved) > 0


DENSE: dict[str, Any] = {
    "depth": lambda: transformers.DPTForDepthEstimation(
        transformers.DPTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
                               image_size=16, patch_size=8, neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4,
                               backbone_out_indices=[0, 1, 2, 3], reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False)
    ),
    "segmentation": lambda: transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(num_channels=1, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1],
                                     hidden_sizes=[4, 8], patch_sizes=[3, 3], strides=[2, 2],
                                     num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8, num_labels=3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DENSE)
def test_a_checkpoint_of_depth_or_segmentation_is_taught_by_the_command_and_guides(
    kind: str, saved: Path, tmp_path: Path
) -> None:
    side = 16 if kind == "depth" else 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DENSE[kind]().eval()
    network.save_pretrained(tmp_path / "net")
    colours = 3 if kind == "depth" else 1
    transformers.ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=[0.5] * colours, image_std=[0.5] * colours
    ).save_pretrained(tmp_path / "net")
    assert cli.main([*command(saved, tmp_path / "out", steps=2, batch=8), "--kind", kind, "--teacher",
                     str(tmp_path / "net")]) == 0  # fmt: skip
    seen = tensor_of(network(torch.zeros(1, colours, side, side)))
    guided = trimtab.GuidedPipeline.from_pretrained(saved / "pipe")

    def image(scale: float) -> torch.Tensor:
        guided.clear_guidance()
        guided.add_guidance(
            "ppap", classifier=str(tmp_path / "net"), weights=str(tmp_path / "out" / "ppap.safetensors"), kind=kind,
            wanted=torch.zeros(1, *seen.shape[-2:]), scale=scale,
        )  # fmt: skip
        return guided(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    assert not torch.equal(image(50.0), image(0.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--experts", "0"], "train ppap: experts=0; allowed: a whole number >= 1."),
        (["--rank", "0"], "train ppap: rank=0; allowed: a whole number >= 1."),
        (["--teacher", "nowhere/at-all"], "train ppap: teacher='nowhere/at-all' gives no transformers network for"),
        (["--kind", "depths"], "train ppap: kind='depths'; allowed: a teacher, and a kind of classification, depth, "),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_is_made(
    wrong: list[str],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it asks for minutes, without network
    assert cli.main([*command(saved, tmp_path, steps=1, batch=8), *wrong]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
