"""Steered diffusion: measurements are kept exactly, losses move as the paper says, in pixels, latents and flows."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from guided_runs import built
from PIL import Image
from zoo import CASES, mask, picture
from zoo import run as run_case

import trimtab
from trimtab import Guidance, Step, parameter
from trimtab.guidance import recipe, registry
from trimtab.guidance.losses import Content, EmbeddingCosine, SemanticMap, Term
from trimtab.guidance.noise import Level, noise_algebra
from trimtab.guidance.operators import LinearOperator, luminance, resampling
from trimtab.guidance.parameters import same
from trimtab.guidance.plugins.steered import Steered
from trimtab.pipelines.interception import tap_method
from trimtab.pipelines.latents import ImageSpace
from trimtab.pipelines.meter import GraphMeter

from ...zoo.class_conditional import class_conditional
from .gaussian_run import noise, pipeline

GREY = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
HOLE = torch.zeros(1, 1, 8, 8)
HOLE[..., 2:6, 3:] = 1


@dataclass
class Spy(Guidance):
    """Keeps the last sample."""

    samples: list = parameter([], "All samples.")

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        self.samples.append(sample)
        return sample


def grey(steps: int = 4, **parameters: Any) -> torch.Tensor:
    pipe = trimtab.guide(class_conditional(["one", "two"]))
    if parameters:
        pipe.add_guidance("steered", **parameters)
    generator = torch.Generator().manual_seed(0)
    return pipe(0, num_inference_steps=steps, generator=generator, output_type="pt").images


@pytest.mark.parametrize("recurrence", [1, 2])
def test_inpainting_keeps_the_known_pixels_to_the_bit(recurrence: int) -> None:
    images = grey(task="inpainting", image=GREY, mask=HOLE, recurrence=recurrence)
    assert torch.equal(images[HOLE == 0], GREY[HOLE == 0])
    assert not torch.equal(images[HOLE == 1], grey()[HOLE == 1])


@pytest.mark.parametrize("low", [(4, 4), (3, 3), (2, 4), (1, 1), (7, 5)])
def test_super_resolution_is_the_small_image_when_made_small(low: tuple[int, int]) -> None:
    small = resampling((8, 8), low).forward(GREY)
    # Clipped, as every file of it is.
    images = grey(task="super_resolution", image=small).clamp(-1, 1)
    torch.testing.assert_close(resampling((8, 8), low).forward(images), small, atol=1e-3, rtol=0)


def test_colourisation_keeps_the_luminance() -> None:
    pipe, spy, photograph = built("ddpm"), Spy(), picture(16)
    with pipe.guidance("steered", task="colourisation", image=photograph), pipe.guidance(spy, name="spy"):
        run_case(pipe, CASES["ddpm"])
    wanted = torch.from_numpy(np.array(photograph.convert("L"))).float() / 127.5 - 1
    image = spy.samples[-1].clamp(-1, 1)
    torch.testing.assert_close(luminance().forward(image)[0, 0], wanted, atol=1e-5, rtol=0)


def test_any_operator() -> None:
    mean = LinearOperator(lambda x: x.mean((-2, -1), keepdim=True), lambda y: y.expand(-1, -1, 8, 8))
    images = grey(operator=mean, image=torch.full((1, 1, 1, 1), 0.25))
    assert images.mean().item() == pytest.approx(0.25, abs=1e-5)


def test_a_flow_model_is_steered_as_well() -> None:
    pipe = pipeline([0.3], [0.5], flow=True)
    known, hole = torch.tensor([[[[0.9, 0.0, -0.4, 0.0]]]]), torch.tensor([[[[0.0, 1.0, 0.0, 1.0]]]])
    stock = pipe(noise(), 10)
    pipe.add_guidance("steered", task="inpainting", image=known, mask=hole)
    out = pipe(noise(), 10)
    assert torch.equal(out[hole == 0], known[hole == 0])
    torch.testing.assert_close(out[hole == 1], stock[hole == 1], atol=1e-5, rtol=0)  # independent pixels


TARGET = torch.tensor([0.9, -0.4, 0.1, -0.8])


def quadratic(image: torch.Tensor) -> torch.Tensor:
    return 0.5 * (image - TARGET).square().flatten(1).sum(1)


def test_losses_move_the_estimate_as_the_paper_says_each_in_its_window() -> None:
    """x_0 <- x_0 - sqrt(1 - abar) grad_{x_t} sum_k w_k L_k, and the noise anew; on a Gaussian dx_0/dx_t is k."""
    mean, variance, steps = 0.3, 0.5, 5
    pipe = pipeline([mean], [variance])
    terms = (Term(quadratic, 0.3), Term(lambda image: -image.flatten(1).sum(1), 0.2, start=0.4, stop=0.8))
    pipe.add_guidance("steered", losses=terms, scale=0.9)
    guided = pipe(noise(), steps)
    levels = [*noise_algebra(pipe.scheduler).levels(), Level(1.0, 0.0)]
    x_t = noise()
    for index, (t, s) in enumerate(pairwise(levels)):
        k = t.alpha * variance / (t.sigma**2 + t.alpha**2 * variance)
        x0 = mean + k * (x_t - t.alpha * mean)
        gradient = k * (0.3 * (x0 - TARGET) - 0.2 * (0.4 <= index / steps < 0.8))
        x0 = x0 - 0.9 * t.sigma * gradient
        x_t = s.alpha * x0 + s.sigma * (x_t - t.alpha * x0) / t.sigma
    torch.testing.assert_close(guided, x_t, atol=2e-4, rtol=1e-3)
    plan = pipe.explain_guidance(steps)
    assert [step.gradient for step in plan.steps] == [True] * 5


def test_a_text_edits_through_the_towers_of_clip() -> None:
    """The image comes nearer to a text in the space that both towers share."""
    towers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "projection_dim": 8}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seeing = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**towers, image_size=16, patch_size=8)
        )
        reading = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**towers, vocab_size=40))
    with torch.no_grad():
        text = reading.eval()(torch.tensor([[1, 7, 12, 2]])).text_embeds
    loss, pipe, spy = EmbeddingCosine(seeing, text), built("ddpm"), Spy()

    def distance(**parameters: Any) -> float:
        with pipe.guidance("steered", losses=(loss,), **parameters), pipe.guidance(spy, name="spy"):
            run_case(pipe, CASES["ddpm"])
        with torch.no_grad():
            return float(loss(spy.samples[-1]).mean())

    assert distance(scale=20.0) < distance(scale=0.0) - 0.05


def test_outside_their_windows_losses_cost_nothing() -> None:
    pipe = pipeline([0.3], [0.5])
    pipe.add_guidance("steered", losses=(Term(quadratic, start=0.5),))
    assert [step.gradient for step in pipe.explain_guidance(4).steps] == [False, False, True, True]


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("latent", ["encode", "gradient"])
def test_latents_come_nearer_to_what_was_measured(name: str, latent: str) -> None:
    """What an untrained autoencoder can reach: `gradient` a good deal, `encode` where it restores what it is given."""
    pipe, case = built(name), CASES[name]
    space = ImageSpace(pipe, case.call, GraphMeter())
    side = space.decode(run_case(pipe, case)).shape[-1]

    def distance(sample: torch.Tensor) -> float:
        wanted = torch.from_numpy(np.array(picture(side))).permute(2, 0, 1).float() / 127.5 - 1
        return float((space.decode(sample) - wanted)[..., side // 2 :].square().mean())

    before = distance(run_case(pipe, case))
    with pipe.guidance("steered", task="inpainting", image=picture(side), mask=mask(side), latent=latent):
        after = distance(run_case(pipe, case))
    assert after < (0.7 if latent == "gradient" else 1.0) * before


@pytest.mark.parametrize("name", ["sd15", "flux", "fashion"])
def test_classifier_pag_cfg_and_steered_run_in_one_stack(name: str) -> None:
    """In the order in which they were attached, phase after phase, and at the cost that is declared."""
    classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.LazyLinear(3))
    if name == "fashion":
        pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
        call: dict[str, Any] = {"class_labels": "Bag", "num_inference_steps": 3, "output_type": "pt"}
        image: Any = Image.new("L", (8, 8), 90)
    else:
        pipe, call = trimtab.guide(CASES[name].build()), CASES[name].call
        image = picture(32 if name == "sd15" else 16)
    classifier(torch.zeros(1, 1 if name == "fashion" else 3, 8, 8))
    pipe.add_guidance("classifier", classifier=classifier, target=1, scale=3.0)
    pipe.add_guidance("pag", scale=2.0)
    pipe.add_guidance("cfg", scale=3.0)
    pipe.add_guidance(
        "steered", losses=(lambda x: x.square().flatten(1).mean(1),), task="super_resolution", image=image
    )
    plan = pipe.explain_guidance(**call)
    assert [row.name for row in plan.rows] == ["classifier", "pag", "cfg", "steered"]
    asked: list[tuple[str, str]] = []
    with ExitStack() as stack:
        for guidance in pipe.guidances.values():
            for hook in ("delta", "loss", "guide_x0", "after_step"):
                if guidance.overrides(hook):
                    tap_method(stack, guidance, hook, noting(asked, guidance.label, hook))
        pipe(**call, generator=torch.Generator().manual_seed(0))
    done = pipe.last_guided_run
    assert (done.evaluations, done.forward_calls) == (plan.evaluations, plan.calls)
    assert plan.evaluations == 3 * 3
    assert sum(step.gradient for step in plan.steps) == 3
    once = [("pag", "delta"), ("cfg", "delta"), ("classifier", "loss"), ("steered", "loss"), ("steered", "guide_x0"),
            ("classifier", "after_step"), ("steered", "after_step")]  # fmt: skip
    assert asked == once * 3


def noting(asked: list[tuple[str, str]], name: str, hook: str) -> Any:
    """Writes down that a hook was asked."""

    def around(original: Any, *args: Any) -> Any:
        asked.append((name, hook))
        return original(*args)

    return around


@pytest.mark.parametrize(
    ("image", "hole"),
    [
        (GREY, HOLE),
        (Image.new("L", (8, 8), 90), Image.new("1", (8, 8), 1)),
        ([Image.new("L", (8, 8), 90), "picture.png"], (HOLE[0], HOLE[0])),
    ],
)
def test_what_was_measured_is_part_of_the_recipe(tmp_path: Path, image: Any, hole: Any) -> None:
    written = registry.create("steered", task="inpainting", image=image, mask=hole)
    recipe.save(tmp_path, {"steered": written})
    read = recipe.read(tmp_path)["steered"].parameters
    assert all(same(value, read[name]) for name, value in written.parameters.items())


def test_switched_off_it_is_the_stock_run() -> None:
    assert torch.equal(grey(task="inpainting", image=GREY, mask=HOLE, scale=0.0), grey())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "nothing to steer to"),
        ({"task": "inpainting"}, "image is missing"),
        ({"task": "inpainting", "image": GREY}, "mask is missing"),
        ({"losses": (3,)}, "losses holds 3; allowed: functions of images"),
        ({"task": "inpainting", "image": "no-such.png", "mask": HOLE}, "image='no-such.png' cannot be read"),
    ],
)
def test_what_is_missing_is_said_when_it_is_attached(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(trimtab.ParameterError, match=message):
        trimtab.guide(class_conditional(["one"])).add_guidance("steered", **parameters)


MEAN = LinearOperator(lambda x: x.mean((-2, -1), keepdim=True), lambda y: y.expand(-1, -1, 8, 8))
ANYWHERE = SemanticMap(torch.nn.Conv2d(1, 2, 1), torch.zeros(1, 8, 8).long())
UNFITTING: list[tuple[dict[str, Any], str]] = [
    (
        {"task": "inpainting", "image": GREY[..., :4], "mask": HOLE[..., :4]},
        "steered: image and mask are 4 x 8 pixels, but the pipeline makes 8 x 8 pixels; needed: that size, such as "
        "image.resize((8, 8)).",
    ),
    (
        {"task": "super_resolution", "image": torch.zeros(1, 1, 16, 16)},
        "steered: image is 16 x 16 pixels, but the pipeline makes 8 x 8 pixels; needed: at most that size, such as "
        "image.resize((8, 8)).",
    ),
    (
        {"task": "super_resolution", "image": Image.new("RGB", (4, 4))},
        "steered: image has 3 channels, but the pipeline's images have 1; convert it: image.convert('L').",
    ),
    (
        {"task": "colourisation", "image": GREY},
        "steered: task='colourisation' needs a pipeline of colour images; this one's have 1 channel.",
    ),
    (
        {"task": "super_resolution", "image": [GREY[0]] * 3},
        "steered: image holds 3 images, but the denoiser is called with 1 rows; give one, or one for each image that "
        "is made.",
    ),
    (
        {"operator": MEAN, "image": GREY},
        "steered: image is [1, 1, 8, 8], but operator measures the pipeline's images [1, 1, 8, 8] as [1, 1, 1, 1]; "
        "give an image of that shape.",
    ),
    (
        {"operator": dataclasses.replace(MEAN, right_inverse=lambda y: y), "image": GREY[..., :1, :1]},
        "steered: operator's right_inverse makes [1, 1, 1, 1] of [1, 1, 1, 1]; needed: the shape of the pipeline's "
        "images, [1, 1, 8, 8].",
    ),
    (
        {"losses": (ANYWHERE, Content(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1)), ["0"], GREY[..., :4]))},
        "steered: losses[1], Content, does not take the pipeline's images [1, 1, 8, 8]: The size of tensor a (8) must "
        "match the size of tensor b (4) at non-singleton dimension 3 Make its target fit, or give it a Preprocessing.",
    ),
]


@pytest.mark.parametrize(("parameters", "message"), UNFITTING)
def test_sizes_that_do_not_fit_are_an_error_before_the_first_denoiser_call(
    parameters: dict[str, Any], message: str
) -> None:
    pipe, calls = trimtab.guide(class_conditional(["one", "two"])), []
    pipe.add_guidance("steered", **parameters)
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(trimtab.ParameterError) as raised:
        pipe(0, num_inference_steps=2)
    assert str(raised.value) == message
    assert not calls
    pipe.guidances["steered"].scale = 0.0
    pipe(0, num_inference_steps=2)


def test_a_pipeline_that_can_make_another_size_is_said_to() -> None:
    pipe, large = built("flux"), {"task": "super_resolution", "image": picture(96)}
    with pytest.raises(trimtab.ParameterError) as raised, pipe.guidance("steered", **large):
        run_case(pipe, CASES["flux"])
    assert str(raised.value).endswith("image.resize((16, 16)), or call the pipeline with height=96 and width=96.")


VIDEO = "steered: task='super_resolution' measures images, but the pipeline makes videos of 5 frames; give an operator "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux_kontext", "steered: image is 96 x 96 pixels, but the pipeline makes 16 x 16 pixels; needed: at most"),
        ("z_image", "steered: image is 96 x 96 pixels, but the pipeline makes 16 x 16 pixels; needed: at most"),
        ("wan", VIDEO),
    ],
)
def test_sizes_are_known_before_also_where_the_input_holds_more_or_is_a_list_or_a_video(
    name: str, message: str
) -> None:
    pipe, calls = built(name), []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    large = pipe.guidance("steered", task="super_resolution", image=picture(96))
    with handle, pytest.raises(trimtab.ParameterError) as raised, large:
        run_case(pipe, CASES[name])
    assert str(raised.value).startswith(message)
    assert not calls


def test_videos_are_measured_by_an_operator_that_takes_them() -> None:
    """Of Wan's five frames, the first: a step of descent brings it nearer to black."""
    distances: list[float] = []

    def first(video: torch.Tensor) -> torch.Tensor:
        distances.append(float((video.detach()[:, :, 0] + 1).square().mean()))
        return video[:, :, 0]

    operator = LinearOperator(first, lambda y: torch.cat([y[:, :, None]] + 4 * [0 * y[:, :, None]], dim=2))
    black = torch.full((1, 3, 64, 64), -1.0)
    with built("wan").guidance("steered", operator=operator, image=black, latent="gradient", latent_steps=2):
        run_case(built("wan"), CASES["wan"], num_inference_steps=1)
    _, before, _, after = distances  # the first was the check's
    assert after < 0.95 * before


@pytest.mark.parametrize(("latent", "each"), [("encode", 1), ("gradient", 6)])
def test_latents_are_decoded_once_for_each_projection_and_once_to_check(latent: str, each: int) -> None:
    pipe, decoded = built("sd15"), []
    image = {"task": "inpainting", "image": picture(32), "mask": mask(32), "latent": latent}
    with pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(1)), pipe.guidance("steered", **image):
        run_case(pipe, CASES["sd15"])
    assert len(decoded) == each * CASES["sd15"].call["num_inference_steps"] + 1


def test_a_loss_and_a_measurement_decode_what_each_of_them_sees() -> None:
    """The loss sees the estimate, the measurement what the loss made of it."""
    pipe, decoded = built("sd15"), []
    both = {"task": "inpainting", "image": picture(32), "mask": mask(32), "losses": (lambda x: x.flatten(1).mean(1),)}
    with pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(1)), pipe.guidance("steered", **both):
        run_case(pipe, CASES["sd15"])
    assert len(decoded) == 2 * CASES["sd15"].call["num_inference_steps"] + 1


@pytest.mark.parametrize("mask", [HOLE, torch.cat([HOLE, HOLE.flip(-1)])])
def test_each_of_several_measurements_is_that_of_the_images_made_for_it(mask: torch.Tensor) -> None:
    """Two measurements for four images: the first two are of the first."""
    pipe, wanted = trimtab.guide(class_conditional(["one", "two"])), torch.cat([GREY, GREY.flip(-1)])
    pipe.add_guidance("steered", task="inpainting", image=wanted, mask=mask)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "generator": generators, "output_type": "pt"}
    images = pipe([0, 1], **call).images
    known = mask.expand(2, -1, -1, -1).repeat_interleave(2, 0) == 0
    torch.testing.assert_close(images[known], wanted.repeat_interleave(2, 0)[known])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"losses": (abs,), "image": GREY}, "image is given without a task or an operator that says what was measured"),
        ({"losses": (abs,), "mask": HOLE}, "mask is given without task='inpainting'"),
        ({"task": "super_resolution", "image": GREY, "mask": HOLE}, "mask is given without task='inpainting'"),
        (
            {"task": "inpainting", "image": 255 * GREY.abs(), "mask": HOLE},
            "image holds values from .*; needed: -1 to 1",
        ),
        ({"task": "inpainting", "image": GREY.byte(), "mask": HOLE}, "image is a tensor of torch.uint8; needed"),
    ],
)
def test_what_would_be_measured_otherwise_than_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(trimtab.ParameterError, match=f"steered: {message}"):
        trimtab.guide(class_conditional(["one"])).add_guidance("steered", **given)


@pytest.mark.parametrize("mask", [HOLE.bool(), HOLE.byte(), HOLE[0, 0]])
def test_a_mask_may_be_of_truth_values_or_numbers(mask: torch.Tensor) -> None:
    assert torch.equal(grey(task="inpainting", image=GREY, mask=mask), grey(task="inpainting", image=GREY, mask=HOLE))


def test_a_larger_scale_makes_losses_stronger_and_keeps_what_was_measured() -> None:
    measured = {"task": "inpainting", "image": GREY, "mask": HOLE}
    losses = (lambda x: 0.1 * x.flatten(1).sum(1),)
    once, strong = (grey(**measured, losses=losses, scale=scale) for scale in (1.0, 50.0))
    for image in (once, strong):
        torch.testing.assert_close(image[HOLE == 0], GREY[HOLE == 0])
    assert strong[HOLE == 1].sum() < once[HOLE == 1].sum()


def test_what_was_measured_is_kept_whichever_is_attached_first() -> None:
    pipe = trimtab.guide(class_conditional(["one", "two"]))
    pipe.add_guidance("steered", task="inpainting", image=GREY, mask=HOLE)
    pipe.add_guidance("tfg", preset="mpgd", mu=5.0, energy=lambda x: x.square().flatten(1).sum(1))
    generator = torch.Generator().manual_seed(0)
    image = pipe(0, num_inference_steps=4, generator=generator, output_type="pt").images
    torch.testing.assert_close(image[HOLE == 0], GREY[HOLE == 0])


@pytest.mark.parametrize("last", ["inpainting", "super_resolution"])
def test_of_several_measurements_the_last_is_exact(last: str) -> None:
    small = torch.full((1, 1, 4, 4), 0.7)
    given: dict[str, dict[str, Any]] = {
        "inpainting": {"image": GREY, "mask": HOLE},
        "super_resolution": {"image": small},
    }
    pipe = trimtab.guide(class_conditional(["one", "two"]))
    for task in sorted(given, key=lambda task: task == last):
        pipe.add_guidance("steered", name=task, task=task, **given[task])
    image = pipe(0, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    off = {
        "inpainting": (image - GREY)[HOLE == 0].abs().max(),
        "super_resolution": (resampling((8, 8), (4, 4)).forward(image) - small).abs().max(),
    }
    assert off.pop(last) < 1e-3 < off.popitem()[1]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: x.mean(), r"<lambda> returned <float32 tensor \[\]>; needed: one number an image, a tensor \[1\]"),
        (lambda x: None, "<lambda> returned None; needed: one number an image"),
        (lambda x: x.detach().flatten(1).mean(1), "<lambda> does not depend on the images that it is given"),
    ],
)
def test_a_loss_that_is_none_is_an_error_by_name_also_beside_another(loss: Any, message: str) -> None:
    with pytest.raises(trimtab.GuidanceRuntimeError, match=f"steered: {message}"):
        grey(losses=(lambda x: x.flatten(1).mean(1), loss))


def test_latents_are_never_led_away_from_what_was_measured() -> None:
    """However flat the decoder is, where Polyak's length is without bound."""
    pipe, misfits = trimtab.guide(CASES["sd15"].build()), []

    @dataclass
    class Watched(Steered):
        def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
            moved = super().guide_x0(step, x0)
            misfits.append([float(self._misfit(step, z)) for z in (x0, moved)])
            return moved

    image = {"image": picture(32), "mask": mask(32), "latent": "gradient", "latent_steps": 8}
    with torch.no_grad(), pipe.guidance(Watched(task="inpainting", **image)):
        run_case(pipe, CASES["sd15"])
    assert misfits and all(after < before for before, after in misfits)


GIVEN_TWICE: list[tuple[dict[str, Any], str]] = [
    (
        {"image": [GREY[0], GREY[0, :, :4]]},
        r"image holds images of \[1, 8, 8\] and \[1, 4, 8\] \(channels, height, width\)",
    ),
    (
        {"image": [Image.new("L", (8, 8)), Image.new("RGB", (8, 8))]},
        r"image holds images of \[1, 8, 8\] and \[3, 8, 8\]",
    ),
    ({"mask": [HOLE[0], HOLE[0, :, :4]]}, "mask holds images of"),
    ({"image": GREY[:0]}, r"image is an empty tensor \[0, 1, 8, 8\]; give at least one image"),
    ({"mask": HOLE[:0]}, "mask is an empty tensor"),
]


@pytest.mark.parametrize(("given", "message"), GIVEN_TWICE)
def test_images_of_two_sizes_or_none_are_refused_by_the_name_of_the_parameter(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(trimtab.ParameterError, match=f"steered: {message}"):
        grey(**{"task": "inpainting", "image": GREY, "mask": HOLE, **given})


def test_a_mask_of_another_size_than_the_image_is_refused_when_it_is_attached() -> None:
    with pytest.raises(trimtab.ParameterError, match=r"mask is 4 x 8 pixels, but image is 8 x 8 pixels; needed: one"):
        trimtab.guide(class_conditional(["one"])).add_guidance(
            "steered", task="inpainting", image=GREY, mask=HOLE[..., :4]
        )
