"""Time, memory and FLOPs of guidance against what people do today, on denoisers of real size with random weights.

    python -m benchmarks.speed sd15 sdxl sd3 --json docs/speed.json --page docs/speed.md --plot docs/images/speed.png
    python -m benchmarks.speed sdxl --side 1024 --ways pag --repeats 2
    python -m benchmarks.speed sdxl --device cuda --side 1024 --compile

All ways of one architecture share the denoiser's weights, run in one process and take turns, so that whatever else the
machine does meets all of them. Each way runs whole pipelines, from given prompt embeddings to latents. A first run of
each counts its FLOPs and the memory that it allocates beside the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.guiders import BaseGuidance

import trimtab
from benchmarks.flops import SD3_MEDIUM, SD15, SDXL
from benchmarks.guiders import BothPerturbed, modular, perturbed
from benchmarks.speed_page import drawing, page
from benchmarks.ways import Way, measure
from trimtab.pipelines.cards import machine


@dataclass(frozen=True)
class Architecture:
    """One denoiser and the pipelines around it.

    Args:
        denoiser, config: its class and configuration.
        component: what the pipelines call it.
        stock, pag: the stock pipeline's class, and that of Diffusers' PAG pipeline.
        layers: the same perturbed layers, as Diffusers' PAG pipeline names them.
        text: shapes of the prompt embeddings, by argument name, without the batch.
        side: default size of the image in pixels.
    """

    denoiser: Any
    config: dict[str, Any]
    component: str
    stock: str
    pag: str
    layers: str
    text: dict[str, tuple[int, ...]]
    side: int


ARCHITECTURES = {
    "sd15": Architecture(
        UNet2DConditionModel, SD15, "unet", "StableDiffusionPipeline", "StableDiffusionPAGPipeline", "mid",
        {"prompt_embeds": (77, 768)}, 512,
    ),
    "sdxl": Architecture(
        UNet2DConditionModel, SDXL, "unet", "StableDiffusionXLPipeline", "StableDiffusionXLPAGPipeline", "mid",
        {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}, 512,
    ),
    "sd3": Architecture(
        SD3Transformer2DModel, SD3_MEDIUM, "transformer", "StableDiffusion3Pipeline", "StableDiffusion3PAGPipeline",
        r"blocks\.13\.", {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}, 512,
    ),
}  # fmt: skip


def build(one: Architecture, device: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The stock pipeline, a guidable one and Diffusers' PAG pipeline, which share one denoiser."""
    torch.manual_seed(0)
    with _default(dtype):  # no copy in float32 beside it
        denoiser = one.denoiser(**one.config).to(device).eval().requires_grad_(False)
    latent_channels = denoiser.config.in_channels
    blocks = 4  # three halvings: eight pixels a latent
    vae = AutoencoderKL(
        block_out_channels=(8,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, latent_channels=latent_channels, norm_num_groups=4,
    ).to(device, dtype)  # fmt: skip
    flow = one.component == "transformer"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else EulerDiscreteScheduler()

    def pipeline(kind: str, **more: Any) -> Any:
        owner = getattr(diffusers, kind)
        parts = dict.fromkeys(owner._get_signature_keys(owner)[0]) | {"vae": vae, "scheduler": scheduler}
        parts[one.component] = denoiser
        optional = {"requires_safety_checker": False} if kind.startswith(("StableDiffusionP",)) else {}
        pipe = owner(**parts, **optional, **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipeline(one.stock), trimtab.guide(pipeline(one.stock)), pipeline(one.pag, pag_applied_layers=one.layers)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    outer = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(outer)


def ways_of(
    one: Architecture, stock: Any, guided: Any, pag: Any, side: int, steps: int, dtype: torch.dtype, compiled: bool
) -> list[Way]:
    """All ways of one architecture; the first is the stock pipeline with classifier-free guidance.

    Args:
        stock, guided, pag: its pipelines, from `build`.
    """
    device = stock.device
    if compiled:
        for pipe in (stock, guided, pag):
            setattr(pipe, one.component, torch.compile(getattr(pipe, one.component)))
    # Drawn one after the other: where the two conditions are equal, no row is the unconditional one for sure.
    generator = torch.Generator(device).manual_seed(1)
    embeddings = {
        f"{sign}{name}": torch.randn(1, *shape, generator=generator, device=device, dtype=dtype)
        for name, shape in one.text.items()
        for sign in ("", "negative_")
    }
    call = {**embeddings, "num_inference_steps": steps, "height": side, "width": side, "output_type": "latent"}

    def run(pipe: Any, scale: float = 5.0, **more: Any) -> Callable[[], Any]:
        return lambda: pipe(guidance_scale=scale, generator=generator.manual_seed(0), **call, **more).images

    def ours(names: Sequence[str], scale: float = 5.0, rows: str = "auto") -> Callable[[], Any]:
        def guidedly() -> Any:
            guided.clear_guidance()
            for name in names:
                guided.add_guidance(name)
            guided.guidance_rows = rows
            return run(guided, scale)()

        return guidedly

    def by_guider(guider: BaseGuidance) -> Callable[[], Any]:
        pipe = modular(stock.unet, stock.scheduler, guider)
        given = {name: value for name, value in call.items() if name != "output_type"}
        return lambda: pipe(**given, generator=generator.manual_seed(0), output="latents")

    ways = [
        Way("stock pipeline, CFG", run(stock)),
        Way("guidable, nothing attached, CFG", ours([])),
        Way("CFG + PAG", ours(["pag"])),
        Way("CFG + PAG, one plain batch", ours(["pag"], rows="batched")),
        Way("CFG + PAG, Diffusers' PAG pipeline", run(pag, pag_scale=3.0)),
        Way("CFG + PAG, a call each, as guiders do", ours(["cfg", "pag"], scale=1.0, rows="sequential")),
        Way("PAG alone", ours(["pag"], scale=1.0)),
        Way("PAG alone, Diffusers' PAG pipeline", run(pag, scale=1.0, pag_scale=3.0)),
        Way("CFG + PAG + SEG", ours(["pag", "seg"])),
        Way("CFG + PAG + SEG, a call each, as guiders do", ours(["cfg", "pag", "seg"], scale=1.0, rows="sequential")),
    ]
    if one.stock == "StableDiffusionXLPipeline" and not compiled:
        ways.append(Way("CFG + PAG, Diffusers' guider", by_guider(perturbed(stock.unet))))
        ways.append(Way("CFG + PAG + SEG, a guider of Diffusers' parts", by_guider(BothPerturbed(stock.unet))))
    return ways


PAG = ("CFG + PAG", "CFG + PAG, Diffusers' PAG pipeline")
SEG = (
    "CFG + PAG + SEG", "CFG + PAG + SEG, a call each, as guiders do", "CFG + PAG + SEG, a guider of Diffusers' parts"
)  # fmt: skip
GOALS = ("stock pipeline, CFG", *PAG, "CFG + PAG, Diffusers' guider", *SEG)
CHOICES = {"all": None, "goals": GOALS, "pag": PAG}
"""Which ways to measure; not all of them where that takes hours."""


def overhead(guided: Any, calls: int = 1000) -> float:
    """Seconds that a guidable pipeline with nothing attached spends before the stock call."""
    guided.clear_guidance()
    return min(timeit.repeat(lambda: guided._guided_call(lambda pipe: None), number=calls)) / calls


def main() -> None:
    """Measure the named architectures; what `--json` holds of others is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "architectures", nargs="*", help=f"of {', '.join(ARCHITECTURES)}; none only draws what is there"
    )
    parser.add_argument("--side", type=int, help="pixels; by default 512")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--ways", default="all", choices=CHOICES, help="only those that the goals are about, or PAG")
    parser.add_argument("--note", default="", help="what the page says of the circumstances")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("runs/speed.json"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    results = json.loads(given.json.read_text()) if given.json.exists() else {}
    for name in given.architectures:
        one = ARCHITECTURES[name]
        side = given.side or one.side
        dtype = getattr(torch, given.dtype)
        pipes = build(one, given.device, dtype)
        about = {"overhead": overhead(pipes[1]), "note": given.note and f"; {given.note}"}
        ways = ways_of(one, *pipes, side, given.steps, dtype, given.compile)
        chosen = CHOICES[given.ways]
        ways = [way for way in ways if chosen is None or way.name in chosen]
        measure(ways, given.repeats, given.device)
        about |= {
            "side": side, "steps": given.steps, "dtype": given.dtype, "device": given.device, "machine": machine(),
            "compiled": given.compile, "torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        }  # fmt: skip
        kept = [{key: value for key, value in vars(way).items() if key != "run"} for way in ways]
        title = f"{name}, {side} pixels, {given.device}" + (", compiled" if given.compile else "")
        results[title] = {"about": about, "ways": kept}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=2) + "\n")
        del ways, pipes
        gc.collect()
    text = page(results)
    print(text)
    if given.page:
        given.page.write_text(text)
    if given.plot:
        drawing(results).save(given.plot, optimize=True)


if __name__ == "__main__":
    main()
