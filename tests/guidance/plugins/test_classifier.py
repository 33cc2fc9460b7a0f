"""Classifier guidance: EluCD's step by hand, the exact conditional at x_t, costs, targets, preprocessing."""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)  # fmt: skip
from guided_runs import built
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from zoo import CASES
from zoo import run as run_case

import trimtab
from trimtab.guidance.images import Preprocessing
from trimtab.guidance.plugins.classifier import Classifier
from trimtab.pipelines.fashion import ClassConditionalPipeline

from ...zoo.class_conditional import class_conditional
from .gaussian_run import noise, pipeline

NAMES = ["Red", "Green", "Blue"]


class Linear(nn.Module):
    """Three classes of grey 8x8 images, by one matrix behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.ReLU())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.head = nn.Linear(64, 3)
            nn.init.normal_(self.head.weight, std=0.3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


def tiny(**scheduler: Any) -> ClassConditionalPipeline:
    return trimtab.guide(class_conditional(NAMES, **scheduler))


def run(pipe: Any, labels: Any = 0, steps: int = 4, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(labels, num_inference_steps=steps, generator=generator, output_type="pt", **call).images


# -- EluCD -------------------------------------------------------------------------------------------------------------
def test_the_mean_of_the_next_sample_moves_by_the_papers_step() -> None:
    """mean <- mean + (beta_t + gamma v_max sin(pi t / T)) g, at DDPM's own step, softplus, both temperatures."""
    scale, beta, tau1, tau2, gamma, steps = 0.7, 4.0, 0.9, 0.4, 0.3, 5
    network, pipe = Linear(), tiny()
    pipe.scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="epsilon")
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    class Watching(Classifier):
        def after_step(self, step: Any, sample: torch.Tensor) -> torch.Tensor:
            seen.append((sample, step.sample, step.index))
            return sample

        def loss(self, step: Any, x0: torch.Tensor) -> torch.Tensor | None:
            seen.append((x0.detach(), step.own, step.index))
            return super().loss(step, x0)

    pipe.add_guidance(
        Watching(classifier=network, target="Green", labels=tuple(NAMES), scale=scale, beta=beta, tau1=tau1, tau2=tau2,
                 gamma=gamma)
    )  # fmt: skip
    run(pipe, steps=steps)
    pipe.scheduler.set_timesteps(steps)
    power = [*(float(pipe.scheduler.alphas_cumprod[t]) for t in pipe.scheduler.timesteps), 1.0]
    largest = 0.0
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 1, 8, 8, generator=generator)
    for index in range(steps):
        (x0, own, _), (following, x_t, _) = seen[2 * index : 2 * index + 2]
        leaf = x0.clamp(-1, 1).requires_grad_(True)
        logits = network.head(F.softplus(leaf.flatten(1), beta))
        (tau1 * logits[:, 1] - torch.logsumexp(tau2 * logits, 1)).sum().backward()
        assert leaf.grad is not None
        variance = 1 - power[index] / power[index + 1]
        largest = max(largest, variance)
        size = variance + gamma * largest * math.sin(math.pi * (steps - 1 - index) / steps)
        plain = pipe.scheduler.step(own, pipe.scheduler.timesteps[index], x_t, generator=generator).prev_sample
        moved = scale * size * leaf.grad
        torch.testing.assert_close(following - plain, moved, atol=1e-3 * moved.abs().max().item(), rtol=0)


TWICE = {
    "pndm": PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "heun": HeunDiscreteScheduler(),
    "flow": FlowMatchHeunDiscreteScheduler(),
    "ancestral": KDPM2AncestralDiscreteScheduler(),
}
"""Schedulers that evaluate a level twice."""


@pytest.mark.parametrize("name", TWICE)
def test_the_weight_is_that_of_the_level_where_a_scheduler_evaluates_it_twice(name: str) -> None:
    pipe, weights = tiny(), []
    pipe.scheduler = TWICE[name]

    class Watching(Classifier):
        def weight(self, step: Any) -> float:
            weights.append((step.level.ratio, super().weight(step)))
            return weights[-1][1]

    pipe.add_guidance(Watching(classifier=Linear(), target=1, gamma=0.3))
    run(pipe, steps=6)
    assert len(weights) > 6
    assert all(0 < weight < 15 for ratio, weight in weights if math.isfinite(ratio)), weights
    of_level: dict[float, list[float]] = {}
    for ratio, weight in weights:
        of_level.setdefault(round(ratio, 5), []).append(weight)
    assert max(map(len, of_level.values())) > 1 or name == "ancestral"  # which goes through levels in between
    assert all(found == pytest.approx([found[0]] * len(found), rel=1e-4) for found in of_level.values())


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_the_weight_stays_that_of_its_neighbours_where_two_levels_differ_by_rounding(steps: int) -> None:
    pipe, weights = tiny(), []
    pipe.scheduler = KDPM2AncestralDiscreteScheduler()

    class Watching(Classifier):
        def weight(self, step: Any) -> float:
            weights.append(super().weight(step))
            return weights[-1]

    pipe.add_guidance(Watching(classifier=Linear(), target=1, gamma=0.0))
    run(pipe, steps=steps)
    assert all(after < before * (1 + 1e-3) for before, after in pairwise(weights)), "less noise, a smaller weight"


@pytest.mark.parametrize("plugin", ["classifier", "tfg"])
def test_a_first_sample_with_a_millionth_of_signal_is_pure_noise(plugin: str) -> None:
    """Where its weight would be a million."""
    given: dict[str, dict[str, Any]] = {
        "classifier": {"classifier": Linear(), "target": 1, "estimate": "x_t"},
        "tfg": {"preset": "lgd", "energy": lambda images: images.square().flatten(1).mean(1)},
    }
    pipe = tiny()
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    stock = run(pipe, steps=4)
    pipe.add_guidance(plugin, **given[plugin])
    guided = run(pipe, steps=4)
    assert 0 < (guided - stock).abs().max() < stock.abs().max()


def test_the_network_serves_others_unsoftened() -> None:
    pipe, network = tiny(), Linear()

    def image(*further: Any) -> torch.Tensor:
        pipe.clear_guidance()
        pipe.add_guidance("classifier", name="noisy", classifier=network, target=1, estimate="x_t", scale=3.0)
        for guidance in further:
            pipe.add_guidance(guidance)
        return run(pipe)

    assert torch.equal(image(), image(Classifier(classifier=network, target=1, scale=0.0)))


def test_an_edm_gradient_that_is_not_finite_names_plug_in_and_step() -> None:
    class Broken(Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().forward(images)
            return logits * torch.inf if images.requires_grad else logits

    pipe = tiny()
    pipe.add_guidance("classifier", classifier=Broken(), target=0, estimate="edm")
    with pytest.raises(trimtab.GuidanceRuntimeError, match=r"classifier: .* gradient is not finite at step 0"):
        run(pipe, steps=3)


def nodes(tensor: torch.Tensor) -> set[Any]:
    """Every node of the autograd graph behind a tensor."""
    found: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize(("estimate", "through"), [("x0", False), ("x_t", False), ("denoiser", True)])
def test_no_backward_pass_goes_through_the_denoiser(estimate: str, through: bool) -> None:
    """The graph of the loss has as many nodes as the classifier's own, some steps of preparation apart, and that of
    the denoiser none; with one through the denoiser its layers are counted."""
    pipe, network, counts = tiny(), Linear(), []
    alone = len(nodes(network(torch.zeros(1, 1, 8, 8, requires_grad=True))))
    graphs: list[int] = []
    pipe.unet.register_forward_hook(lambda module, args, output: graphs.append(len(nodes(output.sample))))

    class Watching(Classifier):
        def loss(self, step: Any, x0: torch.Tensor) -> torch.Tensor | None:
            loss = super().loss(step, x0)
            assert loss is not None
            counts.append(len(nodes(loss)))
            return loss

        def with_respect_to(self, step: Any) -> str:
            return "x_t" if through else super().with_respect_to(step)

    pipe.add_guidance(Watching(classifier=network, target=1, estimate="x_t" if estimate == "x_t" else "x0"))
    run(pipe)
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in pipe.unet.modules())
    assert min(graphs) > layers if through else max(graphs) == 0
    assert max(counts) < alone + 25


class Convolutional(nn.Module):
    """A classifier of the Fashion-MNIST model's images, 50,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            stages += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 16, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


class Operations(TorchDispatchMode):
    """Counts floating-point operations; `FlopCounterMode` cannot be used around `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


def evaluations(plugin: str, **parameters: Any) -> float:
    """Floating-point operations of a guided step of the Fashion-MNIST model, in evaluations of its denoiser."""
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
    pipe.set_progress_bar_config(disable=True)

    def count() -> int:
        with Operations() as counter:
            pipe(0, num_inference_steps=1, output_type="pt")
        return counter.total

    stock = count()
    pipe.add_guidance(plugin, **parameters)
    return count() / stock


def test_it_costs_at_most_a_tenth_of_an_evaluation() -> None:
    assert 1.0 < evaluations("classifier", classifier=Convolutional(), target=0) <= 1.1
    assert 1.0 < evaluations("classifier", classifier=Convolutional(), target=0, estimate="x_t") <= 1.1


def test_through_the_denoiser_a_classifier_costs_at_most_three_and_a_fifth() -> None:
    network = Convolutional()
    cost = evaluations("tfg", preset="dps", energy=lambda image: -network(image).log_softmax(1)[:, 0])
    assert 2.0 < cost <= 3.2


# -- at x_t ------------------------------------------------------------------------------------------------------------
MEANS, VARIANCES, WEIGHTS = [-1.0, 1.5], [0.3, 0.1], [0.7, 0.3]


class Exact(nn.Module):
    """The exact `p(component | x_t)` of a mixture, from x_t at unit variance and the timestep."""

    def __init__(self, power: torch.Tensor) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        power = self.power[timestep[0].long()]
        mean, variance, weight = (torch.tensor(value) for value in (MEANS, VARIANCES, WEIGHTS))
        total = 1 - power + power * variance
        return weight.log() - 0.5 * total.log() - (x.flatten(1) - power.sqrt() * mean).square() / (2 * total)


@pytest.mark.parametrize("component", [0, 1])
def test_the_exact_gradient_samples_the_exact_conditional(component: int) -> None:
    pipe = pipeline(MEANS, VARIANCES, WEIGHTS)
    exact = Exact(pipe.scheduler.alphas_cumprod)
    start = noise(width=1, batch=10_000)
    both = pipe(start, 250)
    assert both.mean().item() == pytest.approx(0.7 * -1 + 0.3 * 1.5, abs=0.03)
    pipe.add_guidance("classifier", classifier=exact, target=component, estimate="x_t")
    out = pipe(start, 250)
    # Sampling error of mean and variance, and that of 250 steps of a first-order solver.
    spread = math.sqrt(VARIANCES[component] / len(start))
    assert out.mean().item() == pytest.approx(MEANS[component], abs=3 * spread + 0.01)
    assert out.var().item() == pytest.approx(VARIANCES[component], rel=0.05)


def test_a_noise_aware_classifier_means_the_same_on_every_scheduler() -> None:
    pipe = pipeline(MEANS, VARIANCES, WEIGHTS)
    exact = Exact(pipe.scheduler.alphas_cumprod)
    pipe.add_guidance("classifier", classifier=exact, target=1, estimate="x_t")
    start = noise(width=1, batch=2000)
    ddim = pipe(start, 50)
    pipe.scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    pipe.scheduler.set_timesteps(50)
    sigma = float(pipe.scheduler.sigmas[0])
    euler = pipe(start * math.hypot(1, sigma), 50)
    assert (ddim - euler).abs().mean() < 0.02


def test_the_edm_variant_moves_the_next_sample_by_a_normed_gradient() -> None:
    pipe, network, m, a = tiny(), Linear(), 0.02, 0.3
    seen: list[torch.Tensor] = []

    class Watching(Classifier):
        def after_step(self, step: Any, sample: torch.Tensor) -> torch.Tensor:
            moved = super().after_step(step, sample)
            seen.append(((moved - sample).square().mean() / sample.square().mean()).sqrt())
            return moved

    pipe.add_guidance(Watching(classifier=network, target=0, estimate="edm", max_guidance=m, added=a))
    run(pipe, steps=4)
    expected = [m * (5 - i) / 5 + m * a * math.sin(math.pi * i / 4) for i in (1, 2, 3)]
    torch.testing.assert_close(torch.stack(seen), torch.tensor([*expected, 0.0]), rtol=1e-4, atol=1e-7)


def test_in_a_heun_pair_the_edm_variant_moves_only_the_sample_that_ends_the_level() -> None:
    pipe, network, m, a, steps = tiny(), Linear(), 0.02, 0.3, 3
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    seen: list[tuple[int, int, float]] = []

    class Watching(Classifier):
        def after_step(self, step: Any, sample: torch.Tensor) -> torch.Tensor:
            moved = super().after_step(step, sample)
            share = ((moved - sample).square().mean() / sample.square().mean()).sqrt()
            seen.append((step.index, step.evaluation, float(share)))
            return moved

    pipe.add_guidance(Watching(classifier=network, target=0, estimate="edm", max_guidance=m, added=a))
    plan = pipe.explain_guidance(steps)
    run(pipe, steps=steps)
    assert pipe.last_guided_run.evaluations == plan.evaluations == 2 * steps - 1
    expected = [m * (steps + 1 - i) / (steps + 1) + m * a * math.sin(math.pi * i / steps) for i in (1, 2)]
    wanted = [(0, 0, 0.0), (0, 1, expected[0]), (1, 0, 0.0), (1, 1, expected[1]), (2, 0, 0.0)]
    assert [row[:2] for row in seen] == [row[:2] for row in wanted]
    assert [row[2] for row in seen] == pytest.approx([row[2] for row in wanted], rel=1e-3, abs=1e-6)


# -- the classifier ----------------------------------------------------------------------------------------------------
def test_the_network_is_put_back_as_it_was() -> None:
    pipe, network = tiny(), Linear().train()
    relu = network.body[1]
    pipe.add_guidance("classifier", classifier=network, target=0)
    run(pipe)
    assert network.body[1] is relu and network.training and network.head.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_targets_by_name_index_image_and_call() -> None:
    def images(labels: Any = (0, 0), **parameters: Any) -> torch.Tensor:
        pipe = tiny()
        if parameters:
            pipe.add_guidance("classifier", classifier=Linear(), labels=tuple(NAMES), scale=3.0, **parameters)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(list(labels), num_inference_steps=3, generator=generators, output_type="pt").images

    one, two, stock = images(target="blue"), images(target=("blue", None)), images()
    assert torch.equal(one, images(target=2))
    torch.testing.assert_close(two[0], one[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(two[1], stock[1], atol=1e-5, rtol=0)
    assert torch.equal(images(("Blue", 0), target=(2, 0)), images(("Blue", 0), target=None))
    with pytest.raises(trimtab.ParameterError, match=r"target='bleu' is no class.* Did you mean 'blue'\?"):
        images(target="bleu")
    with pytest.raises(trimtab.ParameterError, match="classifier is missing"):
        tiny().add_guidance("classifier", target=0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"target": 3}, "classifier: target=3 is out of range; allowed: 0 to 2."),
        ({"target": (0, -1)}, "classifier: target=(0, -1) is out of range; allowed: 0 to 2."),
        ({"target": 3, "estimate": "x_t"}, "classifier: target=3 is out of range; allowed: 0 to 2."),
        ({"target": 3, "estimate": "edm"}, "classifier: target=3 is out of range; allowed: 0 to 2."),
        (
            {"target": (0, 1, 2)},
            "classifier: target names 3 classes for 2 images; allowed: one, or one for each image.",
        ),
    ],
)
def test_targets_that_the_classifier_does_not_know_are_an_error_before_the_first_denoiser_call(
    parameters: dict[str, Any], message: str
) -> None:
    """Also of a plain module, which does not say how many classes it has: it sees one blank image."""
    pipe, calls = tiny(), []
    pipe.add_guidance("classifier", classifier=Linear(), **parameters)
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(trimtab.ParameterError) as raised:
        run(pipe, [0, 0])
    assert str(raised.value) == message
    assert not calls
    pipe.guidances["classifier"].scale = 0.0
    run(pipe, [0, 0])


@pytest.mark.parametrize("estimate", ["x0", "x_t", "edm"])
def test_logits_of_another_number_of_images_are_an_error_before_the_first_denoiser_call(estimate: str) -> None:
    class First(Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().forward(images)
            return logits[:1]

    pipe, calls = tiny(), []
    pipe.add_guidance("classifier", classifier=First(), target=0, estimate=estimate)
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(trimtab.ParameterError, match=r"classifier: classifier, First, returns \[1, 3\] for 2 images"):
        run(pipe, [0, 0])
    assert not calls


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_target_out_of_range_is_seen_in_latents_as_well(name: str) -> None:
    """At x_t the classifier sees latents, of which only the pipeline knows the shape."""
    pipe, calls = built(name), []
    network = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(6), nn.Linear(6, 3))
    handle = getattr(pipe, CASES[name].denoiser).register_forward_pre_hook(lambda *_: calls.append(1))
    wrong = pipe.guidance("classifier", classifier=network, target=7, estimate="x_t")
    with handle, pytest.raises(trimtab.ParameterError, match="target=7 is out of range; allowed: 0 to 2"), wrong:
        run_case(pipe, CASES[name])
    assert not calls


def test_preprocessing() -> None:
    images = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    prepared = Preprocessing((4, 4), True, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), channels=3)(images)
    assert prepared.shape == (2, 3, 4, 4)
    half = F.interpolate(images, (4, 4), mode="bilinear", antialias=True)[:, 0] / 2 + 0.5
    torch.testing.assert_close(prepared[:, 2], (half - 0.3) / 0.2)
    assert Preprocessing()(images) is images


def test_a_checkpoint_that_wants_to_bring_code_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would ask, and take a "y" from whatever is typed next."""
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    named = {"AutoConfig": "net.Config", "AutoModelForImageClassification": "net.Net"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never-heard-of", "auto_map": named}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 3))
    pipe = tiny()
    pipe.add_guidance("classifier", classifier=str(tmp_path), target=0)
    with pytest.raises(trimtab.SourceError, match="classifier="):
        run(pipe)
    assert not (tmp_path / "ran").exists()


def test_a_transformers_checkpoint_brings_names_and_preprocessing(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3)
    processor.save_pretrained(tmp_path)
    pipe = tiny()
    stock = run(pipe)
    pipe.add_guidance("classifier", classifier=str(tmp_path), target="green", scale=20.0)
    assert not torch.equal(run(pipe), stock)
    seen: list[tuple[int, ...]] = []

    class Watching(Classifier):
        def logits(self, step: Any, image: torch.Tensor) -> torch.Tensor:
            prepared = step.state.preprocessing
            seen.append((*prepared.size, prepared.channels, prepared.mean[0], prepared.unit_range))
            return super().logits(step, image)

    pipe.clear_guidance()
    pipe.add_guidance(Watching(classifier=str(tmp_path), target="green"))
    run(pipe)
    assert seen[0] == (16, 16, 3, 0.5, True)


def test_switched_off_it_is_the_stock_run() -> None:
    pipe = tiny()
    stock = run(pipe)
    pipe.add_guidance("classifier", classifier=Linear(), target=1, scale=0.0)
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": ()}, r"target=\(\) names no class"),
        ({"beta": 0.0}, "beta=0 is no softplus; allowed: > 0, or None"),
        ({"std": (0.5, 0.0)}, r"std=\(0.5, 0.0\); allowed: a number above 0 for each channel"),
        ({"estimate": "edm", "grad_norm": "clip"}, "grad_norm='clip' with estimate='edm', which norms the gradient"),
    ],
)
def test_what_makes_no_sense_together_is_refused_when_it_is_attached(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(trimtab.ParameterError, match=f"classifier: {message}"):
        tiny().add_guidance("classifier", **{"classifier": Linear(), "target": 0, **changed})


class Timed(nn.Module):
    def forward(self, images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


class Nothing(nn.Module):
    def forward(self, images: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("estimate", ["x0", "x_t"])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(48, 3)), r"classifier, Sequential, does not take what it is"),
        (nn.Conv2d(3, 2, 1), r"classifier, Conv2d, does not take what it is shown, \[1, 1, 8, 8\]"),
        (Timed(), r"classifier, Timed, does not take what it is shown.*missing 1 required"),
        (Nothing(), "classifier, Nothing, does not take what it is shown.* it returned a NoneType; needed: a tensor"),
        (nn.Conv2d(1, 3, 1), r"returns \[1, 3, 8, 8\] for 1 images; needed: logits \[batch, classes\]"),
    ],
)
def test_a_network_of_other_images_is_an_error_before_the_first_denoiser_call(
    network: nn.Module, message: str, estimate: str
) -> None:
    pipe, calls = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.add_guidance("classifier", classifier=network, target=0, estimate=estimate)
    with pytest.raises(trimtab.ParameterError, match=message):
        run(pipe)
    assert not calls


def test_the_memory_of_the_edm_variant_is_weighed() -> None:
    pipe = tiny()
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.add_guidance("classifier", classifier=Linear(), target=0, estimate="edm")
    run(pipe)
    assert pipe.last_guided_run.graph_bytes >= 64 * 4


def test_a_checkpoint_is_shown_what_its_processor_makes(tmp_path: Path) -> None:
    """Blue first, from 0 to 1, at another size."""
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3, num_channels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    transformers.MobileViTImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path)
    seen: list[torch.Tensor] = []

    class Watching(Classifier):
        def loss(self, step: Any, x0: torch.Tensor) -> None:
            red = torch.cat([torch.ones(1, 1, 8, 8), -torch.ones(1, 2, 8, 8)], 1)
            seen.append(step.state.preprocessing(red))

    pipe = tiny()
    pipe.add_guidance(Watching(classifier=str(tmp_path), target=0))
    run(pipe, steps=1)
    assert seen[0].shape == (1, 3, 16, 16)
    assert seen[0].mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def test_a_classifier_of_noisy_images_may_call_its_timesteps_so() -> None:
    seen: list[float] = []

    class Noisy(Linear):
        def forward(self, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            seen.extend(timesteps.tolist())
            return super().forward(images)

    pipe = tiny()
    pipe.add_guidance("classifier", classifier=Noisy(), target=0, estimate="x_t")
    run(pipe, steps=2)
    assert seen[-2:] == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("estimate", ["x0", "x_t", "edm"])
def test_a_classifier_that_gives_no_gradient_is_an_error_before_the_first_denoiser_call(estimate: str) -> None:
    class Deaf(Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).detach()

    pipe, calls = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.add_guidance("classifier", classifier=Deaf(), target=0, estimate=estimate)
    with pytest.raises(trimtab.ParameterError, match="classifier: classifier, Deaf, gives no gradient"):
        run(pipe)
    assert not calls
