"""Losses: one decoding and one backward for all, nothing left on the parameters, errors that name the guidance."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from guided_runs import built, close
from zoo import CASES, run
from zoo.class_conditional import class_conditional

import trimtab
from trimtab import Guidance, GuidanceRuntimeError, Step, parameter
from trimtab.guidance.operators import resampling
from trimtab.pipelines import clean
from trimtab.pipelines.latents import ImageSpace
from trimtab.pipelines.meter import GraphMeter


@dataclass
class Brightness(Guidance):
    """`weight mean(image)`."""

    weight: float = parameter(1.0, "Factor.", finite=False)
    seen: ClassVar[list[torch.dtype]] = []

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        image = step.decode(x0)
        self.seen.append((image @ image.transpose(-1, -2)).dtype)
        return self.weight * image.flatten(1).mean(1)


@dataclass
class Through(Brightness):
    """The same, through the denoiser."""

    differentiate: ClassVar[str] = "x_t"


@dataclass
class Clipped(Through):
    """The same with a gradient of its own."""

    def reshape_gradient(self, step: Step, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-1e-4, 1e-4)


@dataclass
class OfTheSample(Guidance):
    """`weight |x_t|^2 / 2`, whose gradient is `weight x_t`."""

    differentiate: ClassVar[str] = "sample"

    weight: float = parameter(0.1, "Factor.")

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        assert step.sample is not None and not x0.requires_grad
        return self.weight * step.sample.square().flatten(1).sum(1) / 2


def outputs(name: str, *guidances: Guidance, **call: Any) -> torch.Tensor:
    pipe = built(name)
    for index, guidance in enumerate(guidances):
        pipe.add_guidance(guidance, name=f"{type(guidance).__name__}{index}")
    try:
        return run(pipe, CASES[name], **call)
    finally:
        pipe.clear_guidance()


class Counter:
    """Counts forward and backward passes of modules."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.forward = self.backward = 0
        self._handles = [module.register_forward_hook(self._on_forward) for module in modules]

    def _on_forward(self, module: Any, args: Any, output: Any) -> None:
        self.forward += 1
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if tensor.requires_grad:
            tensor.register_hook(self._on_backward)

    def _on_backward(self, gradient: torch.Tensor) -> None:
        self.backward += 1

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("kind", [Brightness, Through])
def test_several_losses_share_one_decoding_and_one_backward(kind: type[Brightness]) -> None:
    pipe = built("sd15")
    with Counter(pipe.vae.decoder) as decoder, Counter(pipe.unet) as unet:
        apart = outputs("sd15", kind(weight=20.0), kind(weight=30.0))
    steps = CASES["sd15"].call["num_inference_steps"]
    assert (decoder.forward, decoder.backward) == (steps, steps)
    assert (unet.forward, unet.backward) == (steps, steps if kind is Through else 0)
    close(apart, outputs("sd15", kind(weight=50.0)))


@dataclass
class Softened(Guidance):
    """`log sum exp` of the softplus, whose nodes save what they return; a backward pass needs it."""

    left: ClassVar[list[weakref.ref[torch.Tensor]]] = []

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        softened = torch.nn.functional.softplus(x0.flatten(1))
        value = softened.logsumexp(1)
        self.left.extend([weakref.ref(softened), weakref.ref(value)])
        return value


@pytest.mark.parametrize("through", ["x0", "x_t"])
def test_no_graph_outlives_its_step(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Softened, "differentiate", through)
    monkeypatch.setattr(Softened, "left", [])
    outputs("sd15", Softened())
    assert len(Softened.left) > 2
    gc.collect()
    assert not [one for one in Softened.left if one() is not None]


def test_a_reshaped_gradient_is_taken_alone() -> None:
    pipe = built("sd15")
    with Counter(pipe.vae.decoder) as decoder, Counter(pipe.unet) as unet:
        both = outputs("sd15", Through(weight=20.0), Clipped(weight=30.0), num_inference_steps=1)
    assert (decoder.forward, unet.backward) == (1, 2)
    parts = [outputs("sd15", g, num_inference_steps=1) for g in (Through(weight=20.0), Clipped(weight=30.0))]
    stock = outputs("sd15", num_inference_steps=1)
    close(both - stock, sum((part - stock for part in parts), torch.zeros(())), 1e-3)


def test_through_the_denoiser_it_is_the_gradient_of_the_whole_step() -> None:
    """Against autograd by hand, on a pixel model whose scheduler predicts epsilon: x_0 <- x_0 - dL/dx_t."""
    pipe = CASES["ddpm"].build()
    sample = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    timestep = torch.tensor(600)
    alpha = pipe.scheduler.alphas_cumprod[600] ** 0.5
    sigma = (1 - alpha**2) ** 0.5
    x_t = sample.clone().requires_grad_(True)
    x0 = (x_t - sigma * pipe.unet(x_t, timestep).sample) / alpha
    gradient = torch.autograd.grad(40.0 * x0.mean(), x_t)[0]
    expected = (sample - alpha * (x0 - gradient)) / sigma

    class Once(type(pipe)):  # type: ignore[misc]
        @torch.no_grad()
        def __call__(self) -> Any:
            self.scheduler.set_timesteps(timesteps=[600])
            given = self.unet(sample, timestep).sample
            return self.scheduler.step(given, timestep, sample, generator=torch.Generator().manual_seed(0))

    pipe.__class__ = Once
    guided = trimtab.guide(pipe)
    guided.add_guidance(Through(weight=40.0))
    wanted = CASES["ddpm"].build().scheduler
    wanted.set_timesteps(timesteps=[600])
    by_hand = wanted.step(expected.detach(), timestep, sample, generator=torch.Generator().manual_seed(0))
    close(guided().prev_sample, by_hand.prev_sample, 1e-4)


def test_a_loss_of_the_sample_moves_against_its_own_gradient_without_the_denoiser() -> None:
    with Counter(built("sd15").unet) as unet:
        moved = outputs("sd15", OfTheSample(), num_inference_steps=1)
    assert unet.backward == 0

    @dataclass
    class ByHand(Guidance):
        def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
            assert step.sample is not None
            return x0 - 0.1 * step.sample

    close(moved, outputs("sd15", ByHand(), num_inference_steps=1))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_parameters_never_collect_gradients_and_are_left_as_they_were(name: str) -> None:
    pipe = built(name)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    wanting = [parameter.requires_grad for module in modules for parameter in module.parameters()]
    assert any(wanting)
    outputs(name, Through(weight=5.0))
    with pytest.raises(GuidanceRuntimeError):
        outputs(name, Through(weight=float("inf")))
    parameters = [parameter for module in modules for parameter in module.parameters()]
    assert [parameter.requires_grad for parameter in parameters] == wanting
    assert all(parameter.grad is None for parameter in parameters)


def test_a_gradient_that_is_not_finite_names_the_guidance_and_the_step() -> None:
    @dataclass
    class Root(Guidance):
        def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
            return (x0 - x0.detach()).square().flatten(1).sum(1).sqrt()

    with pytest.raises(GuidanceRuntimeError, match=r"^Root1: the gradient is not finite at step 0 of 3"):
        outputs("sd15", Brightness(), Root())
    with pytest.raises(GuidanceRuntimeError, match=r"^Brightness0: the gradient is not finite"):
        outputs("sd15", Brightness(weight=float("inf")), Root())


def test_a_loss_without_a_way_to_the_estimate_is_an_error() -> None:
    @dataclass
    class Deaf(Guidance):
        def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
            return x0.detach().flatten(1).sum(1)

    with pytest.raises(GuidanceRuntimeError, match="Deaf0: the loss does not depend on"):
        outputs("sd15", Deaf())


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    pipe = built("sd15")
    plain = outputs("sd15", Through(weight=20.0))
    kept = pipe.last_guided_run.graph_bytes
    pipe.guidance_checkpointing = True
    try:
        close(outputs("sd15", Through(weight=20.0)), plain)
    finally:
        del pipe.guidance_checkpointing
    assert 0 < pipe.last_guided_run.graph_bytes < 0.7 * kept
    assert not any(getattr(module, "gradient_checkpointing", False) for module in pipe.unet.modules())


def test_the_plan_shows_backward_passes_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance(Through(weight=20.0))
    plan = pipe.explain_guidance(**CASES["sd15"].call)
    assert "3 backward passes" in str(plan) and "to be seen after a run" in str(plan)
    run(pipe, CASES["sd15"])
    plan = pipe.explain_guidance(**CASES["sd15"].call)
    assert f"{pipe.last_guided_run.graph_bytes / 2**20:.1f} MiB" in str(plan)


def test_losses_are_computed_in_float32_under_autocast() -> None:
    Brightness.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        outputs("sd15", Brightness())
    assert set(Brightness.seen) == {torch.float32}


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_edits_of_the_sample_are_computed_in_its_own_precision_under_autocast(scheduler: Any) -> None:
    """A measurement that is put in after the last step holds as exactly as without autocast.

    The Euler schedulers return samples in the prediction's type, which autocast makes that of half precision.
    """
    small = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipe = trimtab.guide(class_conditional(["one", "two"]))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.add_guidance("steered", task="super_resolution", image=small)
    with torch.autocast("cpu", torch.bfloat16):
        images = pipe(0, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(resampling((8, 8), (3, 3)).forward(images), small, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "qwenimage", "ddpm"])
def test_a_sample_decodes_to_the_pipelines_own_image_and_back(name: str) -> None:
    case, pipe = CASES[name], built(name)
    space = ImageSpace(pipe, case.call, GraphMeter())
    pixels = run(pipe, case, output_type="pt" if name != "ddpm" else "np", num_inference_steps=1)
    if name == "ddpm":
        sample = pixels.permute(0, 3, 1, 2) * 2 - 1
    else:
        sample, expected = run(pipe, case, num_inference_steps=1), pixels
        close((space.decode(sample) / 2 + 0.5).clamp(0, 1), expected)
    assert space.encode(space.decode(sample)).shape == sample.shape


def test_packing_that_is_not_known_is_refused() -> None:
    pipe = built("ltx")
    sample = run(pipe, CASES["ltx"])
    with pytest.raises(trimtab.UnsupportedPipelineError, match="packed in a way that is not known"):
        ImageSpace(pipe, CASES["ltx"].call, GraphMeter()).decode(sample.reshape(1, -1, 4))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_in_half_precision_the_change_is_that_of_float32(name: str) -> None:
    """The loss and its gradient are float32 islands, so that only the networks' own rounding is left."""

    def change(dtype: torch.dtype) -> torch.Tensor:
        pipe = trimtab.guide(CASES[name].build().to(dtype))
        stock = run(pipe, CASES[name]).float()
        pipe.add_guidance(Through(weight=2000.0))
        Brightness.seen.clear()
        moved = run(pipe, CASES[name]).float() - stock
        assert set(Brightness.seen) == {torch.float32}
        return moved

    exact, half = change(torch.float32), change(torch.bfloat16)
    similarity = torch.nn.functional.cosine_similarity(exact.flatten(), half.flatten(), dim=0)
    assert similarity > 0.9 and half.norm() == pytest.approx(exact.norm().item(), rel=0.2)


@dataclass
class Faint(Through):
    """The same, of a loss a billion times smaller."""

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return super().loss(step, x0) * 1e-9

    def reshape_gradient(self, step: Step, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1e9


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_gradient_of_a_faint_loss_survives_float16(name: str) -> None:
    """Without its autoencoder's and its denoiser's products at a size of about one, all of it would be zero."""
    pipe = trimtab.guide(CASES[name].build().to(torch.float16))
    stock = run(pipe, CASES[name]).float()
    moved = []
    for guidance in (Through(weight=2000.0), Faint(weight=2000.0)):
        pipe.clear_guidance()
        pipe.add_guidance(guidance)
        moved.append(run(pipe, CASES[name]).float() - stock)
    assert moved[0].norm() > 0.01 * stock.norm()
    assert (moved[1] - moved[0]).norm() < 0.1 * moved[0].norm()


def test_an_autoencoder_that_overflows_in_half_precision_is_run_in_float32_and_left_as_it_is() -> None:
    pipe = CASES["sd15"].build()
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = ImageSpace(pipe, {}, GraphMeter()).decode(sample)
    pipe.vae.half()
    pipe.vae.register_to_config(force_upcast=True)
    weights = {name: parameter.data_ptr() for name, parameter in pipe.vae.named_parameters()}
    space = ImageSpace(pipe, {}, GraphMeter())
    close(space.decode(sample), expected, 5e-3)
    assert space.encode(space.decode(sample)).dtype == torch.float32
    assert all(p.data_ptr() == weights[name] and p.dtype == torch.half for name, p in pipe.vae.named_parameters())


def test_the_plan_counts_each_backward_pass_through_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    counted = clean.through_denoiser
    monkeypatch.setattr(clean, "through_denoiser", lambda *given: passes.append(1) or counted(*given))
    pipe, case = trimtab.guide(CASES["sd15"].build()), CASES["sd15"]
    for guidances, each in (((Through(), Through()), 1), ((Through(), Clipped()), 2), ((Clipped(), Clipped()), 2)):
        pipe.clear_guidance()
        for index, guidance in enumerate(guidances):
            pipe.add_guidance(guidance, name=f"g{index}")
        plan = pipe.explain_guidance(**case.call)
        passes.clear()
        run(pipe, case)
        assert plan.backward_passes == len(passes) == each * len(plan.steps)
