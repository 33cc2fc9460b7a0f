"""Interpolation: the arc, the evenness of steps, inversion of real images, and the files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import CASES, picture

import trimtab
from trimtab.cli import main
from trimtab.guidance.errors import ParameterError, UnsupportedPipelineError
from trimtab.pipelines.generate.jobs import Job
from trimtab.pipelines.generate.request import LARGEST_SEED, Request, RequestError
from trimtab.pipelines.interpolate import End, interpolate, invert, istd, make, slerp

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}


def test_slerp_walks_the_arc_at_constant_speed() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for w in (0.0, 0.25, 0.5, 1.0):
        expected = torch.tensor([[math.cos(w * math.pi / 2), math.sin(w * math.pi / 2)]])
        torch.testing.assert_close(slerp(a, b, w), expected)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    noises = torch.randn(2, 1, 4, 8, 8)
    torch.testing.assert_close(slerp(*noises, 0.0), noises[0])
    torch.testing.assert_close(slerp(*noises, 1.0), noises[1])


def flat(level: int) -> Image.Image:
    return Image.fromarray(np.full((4, 5, 3), level, dtype=np.uint8))


def test_istd_is_0_for_even_steps_and_the_deviation_of_others() -> None:
    assert istd([flat(level) for level in (0, 51, 102, 153)]) == pytest.approx(0.0, abs=1e-12)
    pixels = math.sqrt(4 * 5 * 3)
    steps = np.array([0.2, 0.4, 0.6]) * pixels
    assert istd([flat(level) for level in (0, 51, 153, 0)]) == pytest.approx(steps.std())
    with pytest.raises(ParameterError, match="3 or more"):
        istd([flat(0), flat(1)])


def test_its_ends_are_the_images_of_their_noises_and_prompts() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    made = interpolate(pipe, [End(0, "a fox"), End(1, "a whale")], 3, **CALL)
    for end, frame in ((End(0, "a fox"), made.frames[0]), (End(1, "a whale"), made.frames[-1])):
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(end.seed))
        alone = pipe(prompt=end.prompt, latents=noise, **CALL).images[0]
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(alone)).max() <= 1
    assert made.istd >= 0.0


def test_an_inverted_image_comes_back() -> None:
    pipe = CASES["sd15"].build()
    pipe.unet.conv_out.weight.data *= 1e-3  # a denoiser that hardly moves makes the inversion exact
    pipe.unet.conv_out.bias.data *= 0
    stock = pipe.scheduler
    noise = invert(pipe, picture(32), "a fox", num_inference_steps=10)
    assert pipe.scheduler is stock
    again = pipe(prompt="a fox", latents=noise, guidance_scale=1.0, num_inference_steps=10, output_type="latent").images
    pixels = pipe.image_processor.preprocess(picture(32), height=32, width=32)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert (again - latents).abs().max() < 0.05 * latents.abs().max()


def test_an_autoencoder_that_overflows_in_half_precision_encodes_in_float32() -> None:
    """As the one of Stable Diffusion XL does."""
    noises = []
    for factor in (1.0, 1e3):
        pipe = trimtab.guide(CASES["sd15"].build())
        with torch.no_grad():
            pipe.vae.encoder.conv_in.weight.mul_(factor)
            pipe.vae.encoder.conv_in.bias.mul_(factor)
        pipe.vae.half()
        pipe.vae.register_to_config(force_upcast=True)
        noises.append(invert(pipe, picture(32), "a fox", num_inference_steps=2))
    assert torch.isfinite(noises[1]).all() and not torch.equal(*noises)


def test_an_image_is_inverted_without_the_guidances_that_are_attached() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    alone = invert(pipe, picture(32), "a fox", num_inference_steps=2)
    pipe.add_guidance("pag", scale=3.0)
    assert torch.equal(invert(pipe, picture(32), "a fox", num_inference_steps=2), alone)


def test_a_pipeline_without_a_unet_is_refused() -> None:
    with pytest.raises(UnsupportedPipelineError, match="FluxPipeline: the shape of its noise is not known"):
        interpolate(CASES["flux"].build(), [End(0), End(1)], 3)


def test_a_pipeline_without_latents_is_refused() -> None:
    with pytest.raises(UnsupportedPipelineError, match="DDPMPipeline takes no latents"):
        interpolate(CASES["ddpm"].build(), [End(0), End(1)], 3)


def test_the_command_writes_a_strip_and_an_animation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["sd15"].build().save_pretrained(tmp_path / "sd")
    picture(32).save(tmp_path / "real.png")
    command = ["interpolate", "a fox", "--prompt-to", "a whale", "--image", str(tmp_path / "real.png"), "--frames", "4"]
    options = ["--model", str(tmp_path / "sd"), "--steps", "2", "--seeds", "0,1", "-o", str(tmp_path / "out")]
    assert main([*command, *options]) == 0
    output = capsys.readouterr()
    strip, animation = map(Path, output.out.split())
    assert Image.open(strip).size == (4 * 32, 32)
    assert Image.open(animation).n_frames == 6  # there and back
    assert "ISTD" in output.err


def test_the_largest_seed_alone_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    job = Job([Request(model=str(tmp_path / "no model"), prompt="a fox")], [LARGEST_SEED], {})
    with pytest.raises(RequestError, match=f"--seeds: from {LARGEST_SEED}, the largest, there is no next one to go to"):
        make(job, tmp_path / "out", 3)
    assert not list(tmp_path.iterdir())


def test_what_is_there_and_whole_is_not_made_again_and_what_was_truncated_is(tmp_path: Path) -> None:
    CASES["sd15"].build().save_pretrained(tmp_path / "sd")
    job = Job([Request(model=str(tmp_path / "sd"), device="cpu", prompt="a fox", steps=1)], [0, 1], {})
    strip, animation, _ = make(job, tmp_path / "out", 3, anew=False)
    written, when = strip.read_bytes(), strip.stat().st_mtime_ns
    moving = animation.read_bytes()
    make(job, tmp_path / "out", 3, anew=False)
    assert strip.stat().st_mtime_ns == when
    for path, content in ((strip, written[:-100]), (animation, moving[:-1]), (animation, b"")):
        path.write_bytes(content)
        make(job, tmp_path / "out", 3, anew=False)
        assert strip.read_bytes() == written and animation.read_bytes() == moving
