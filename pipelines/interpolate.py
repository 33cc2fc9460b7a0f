"""`trimtab interpolate`: images on the way from one to another, as a strip and as an animation.

Noises are interpolated on the sphere, `slerp(a, b; w) = (sin((1-w) theta) a + sin(w theta) b) / sin theta` with theta
the angle between them, prompts by their embeddings on a straight line. A real image is first turned into its noise by
the deterministic path backwards (DDIM inversion, arXiv:2010.02502).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from PIL import Image

from ..guidance import pins, recipe
from ..guidance.errors import ParameterError, UnsupportedPipelineError
from ..guidance.files import replacing
from .generate import jobs, pictures
from .generate.jobs import Job
from .generate.request import LARGEST_SEED, RequestError
from .generate.samples import call_arguments
from .guided import stock_class
from .latents import ImageSpace
from .meter import GraphMeter


@dataclass(frozen=True)
class End:
    """One end of the way.

    Args:
        seed: of its noise, where there is no image.
        prompt: for a model that takes text.
        image: a real image to begin from.
    """

    seed: int = 0
    prompt: str | None = None
    image: Image.Image | None = None


@dataclass(frozen=True)
class Interpolation:
    """The images, the first and the last end included, and how evenly they change."""

    frames: Sequence[Image.Image]

    @property
    def istd(self) -> float:
        """The standard deviation of the steps, see `istd`."""
        return istd(self.frames)

    def save(self, folder: Path, stem: str, milliseconds: int = 120, **settings: Any) -> tuple[Path, Path]:
        """Write `stem.png`, all frames side by side, and `stem.gif`, there and back; returns both paths.

        Args:
            folder, stem: where.
            milliseconds: of each frame of the animation.
            **settings: what the strip's file says beside its number of frames.
        """
        width, height = self.frames[0].size
        strip = Image.new("RGB", (width * len(self.frames), height))
        for index, frame in enumerate(self.frames):
            strip.paste(frame.convert("RGB"), (index * width, 0))
        paths = folder / f"{stem}.png", folder / f"{stem}.gif"
        pictures.save(strip, paths[0], {**settings, "frames": len(self.frames)})
        first, *others = [frame.convert("RGB") for frame in (*self.frames, *self.frames[-2:0:-1])]
        with replacing(paths[1]) as file:
            first.save(file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
        return paths


def slerp(a: torch.Tensor, b: torch.Tensor, w: float) -> torch.Tensor:
    """The point at share w of the arc from a to b, each `[batch, ...]`; on the line where they are parallel."""
    flat_a, flat_b = a.flatten(1).cpu().double(), b.flatten(1).cpu().double()  # not every device has doubles
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b).clamp(-1, 1)
    theta = cosine.arccos()[:, None]
    parallel = theta.sin().abs() < 1e-6
    sine = torch.where(parallel, 1.0, theta.sin())
    on_arc = (((1 - w) * theta).sin() * flat_a + (w * theta).sin() * flat_b) / sine
    return torch.where(parallel, (1 - w) * flat_a + w * flat_b, on_arc).to(a).view_as(a)


def istd(frames: Sequence[Image.Image]) -> float:
    """Interpolation standard deviation: of the L2 distances between neighbours, pixels in 0 to 1; 0 is even.

    Guo et al., arXiv:2312.04410, average it over pairs of noises. It depends on size and number of the images, so that
    only equal ones can be compared.
    """
    if len(frames) < 3:
        raise ParameterError(f"{len(frames)} frames; the evenness of steps needs 3 or more.")
    return spread_of_steps(torch.stack([torch.from_numpy(np.array(frame.convert("RGB"))) for frame in frames]))


def spread_of_steps(frames: torch.Tensor) -> float:
    """The same of frames in bytes, `[frames, ...]`."""
    steps = (frames.double() / 255).flatten(1).diff(dim=0).norm(dim=1)
    return float(steps.std(correction=0))


def interpolate(pipe: Any, ends: Sequence[End], count: int, **call: Any) -> Interpolation:
    """Images from the first end to the second, with the guidances that are attached.

    Args:
        pipe: a pipeline whose call takes `latents`, and `prompt_embeds` where the prompts differ.
        ends: two.
        count: images, both ends included.
        **call: further arguments of the pipeline's call.

    Raises:
        UnsupportedPipelineError: the pipeline's call takes no latents, it has no UNet, or no embeddings to interpolate.
        ParameterError: less than 2 images.
    """
    if count < 2:
        raise ParameterError(f"frames={count}; allowed: a whole number >= 2.")
    takes = inspect.signature(type(pipe).__call__).parameters
    if "latents" not in takes:
        raise UnsupportedPipelineError(f"{type(pipe).__name__} takes no latents, so its noise cannot be interpolated.")
    if getattr(pipe, "unet", None) is None or getattr(pipe, "vae", None) is None:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__}: the shape of its noise is not known; needed is a pipeline with a UNet and an "
            "autoencoder, such as Stable Diffusion or SDXL."
        )
    shape = _shape(pipe, call)
    first, last = (_noise(pipe, end, shape, call) for end in ends)
    if ends[0].prompt == ends[1].prompt:
        texts = [{"prompt": ends[0].prompt} if "prompt" in takes else {}] * 2
    else:
        negative = call.pop("negative_prompt", None)
        texts = [_text(pipe, end.prompt, negative, takes) for end in ends]
    frames = []
    with _deterministic(pipe, any(end.image is not None for end in ends)):
        for w in torch.linspace(0, 1, count).tolist():
            text = {
                name: torch.lerp(value, texts[1][name], w) if isinstance(value, torch.Tensor) else value
                for name, value in texts[0].items()
            }
            generator = torch.Generator().manual_seed(ends[0].seed)
            frames.append(pipe(**{**call, **text}, latents=slerp(first, last, w), generator=generator).images[0])
    return Interpolation(frames)


def invert(pipe: Any, image: Image.Image, prompt: str | None, **call: Any) -> torch.Tensor:
    """The noise `[1, ...]` from which the deterministic sampler makes an image, without any guidance."""
    height, width = (side * pipe.vae_scale_factor for side in _shape(pipe, call)[2:])
    pixels = pipe.image_processor.preprocess(image, height=height, width=width)
    with torch.no_grad():
        latents = ImageSpace(pipe, {}, GraphMeter()).encode(pixels.to(pipe._execution_device)).to(pipe.unet.dtype)
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMInverseScheduler.from_config(scheduler.config, clip_sample=False)
    try:
        same = {name: call[name] for name in ("num_inference_steps", "height", "width") if call.get(name)}
        given = {"prompt": prompt or "", "guidance_scale": 1.0, "output_type": "latent", **same}
        return stock_class(type(pipe)).__call__(pipe, latents=latents, **given).images
    finally:
        pipe.scheduler = scheduler


def _shape(pipe: Any, call: dict[str, Any]) -> tuple[int, int, int, int]:
    sample, scale = pipe.unet.config.sample_size, pipe.vae_scale_factor
    height, width = (call[name] // scale if call.get(name) else sample for name in ("height", "width"))
    return (1, pipe.vae.config.latent_channels, height, width)


def _noise(pipe: Any, end: End, shape: tuple[int, ...], call: dict[str, Any]) -> torch.Tensor:
    if end.image is not None:
        return invert(pipe, end.image, end.prompt, **call)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(end.seed))
    return noise.to(pipe._execution_device, pipe.unet.dtype)


def _text(pipe: Any, prompt: str | None, negative: str | None, takes: Any) -> dict[str, Any]:
    """The embeddings of a prompt, by the names of the call's arguments."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    if not hasattr(pipe, "encode_prompt") or names[1] not in takes:
        kind = type(pipe).__name__
        raise UnsupportedPipelineError(f"{kind} takes no embeddings of a prompt, so prompts cannot be interpolated.")
    options = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        encoded = pipe.encode_prompt(prompt=prompt or "", negative_prompt=negative, **options)
    return dict(zip(names, encoded, strict=False))


@contextmanager
def _deterministic(pipe: Any, needed: bool) -> Iterator[None]:
    """The sampler that inversion runs backwards, where there are real images."""
    scheduler = pipe.scheduler
    if needed:
        # Latents are not in -1..1, to which the scheduler's own default would clip them.
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    try:
        yield
    finally:
        pipe.scheduler = scheduler


def make(
    job: Job,
    folder: Path,
    count: int,
    prompt: str | None = None,
    images: Sequence[Path | None] = (None, None),
    pipe: Any = None,
    anew: bool = True,
) -> tuple[Path, Path, float]:
    """What `trimtab interpolate` does: the paths of the strip and the animation, and their ISTD.

    Args:
        job: its first prompt and its first two seeds are the ends; the guidances act on the way.
        folder: where the files go.
        count: images, both ends included.
        prompt: of the second end; `None` for that of the first.
        images: real images at either end.
        pipe: the job's pipeline, where it is loaded already.
        anew: make also what is there already.

    Raises:
        RequestError: a single seed that no other follows.
    """
    seeds = [*job.seeds, job.seeds[-1] + 1][:2]
    if seeds[1] > LARGEST_SEED:
        raise RequestError(
            f"--seeds: from {seeds[0]}, the largest, there is no next one to go to; give two seeds, both ends."
        )
    pipe, _, (request, *_), files = jobs.prepare(job, pipe=pipe)
    recipe.write_files(folder, files)
    given = (None if path is None else pins.fingerprint(path) for path in images)
    stem = request.file_stem([*seeds, count, prompt, *given])
    strip, animation = (folder / f"interpolation-{stem}.{kind}" for kind in ("png", "gif"))
    if not anew and pictures.whole(strip) and pictures.whole(animation):
        return strip, animation, istd(_frames(pictures.load(strip)[0], count))
    real = [None if path is None else Image.open(path).convert("RGB") for path in images]
    prompts = request.prompt, request.prompt if prompt is None else prompt
    ends = [End(*one) for one in zip(seeds, prompts, real, strict=True)]
    call = {name: value for name, value in call_arguments(pipe, request).items() if name != "prompt"}
    pipe.set_progress_bar_config(disable=True)
    made = interpolate(pipe, ends, count, **call)
    settings = {**dataclasses.asdict(request), "seeds": seeds, "prompt_to": prompts[1]}
    return (*made.save(folder, strip.stem, **settings), made.istd)


def _frames(strip: Image.Image, count: int) -> list[Image.Image]:
    """The images that stand side by side."""
    width = strip.width // count
    return [strip.crop((width * index, 0, width * (index + 1), strip.height)) for index in range(count)]
