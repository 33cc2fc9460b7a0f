"""Time, memory and FLOPs of guidance against what people do today, on denoisers of real size with random weights.

    python -m benchmarks.speed sd15 sdxl sd3 --json docs/speed.json --page docs/speed.md --plot docs/images/speed.png
    python -m benchmarks.speed sdxl --device cuda --dtype bfloat16 --compile

All ways of one architecture share the denoiser's weights, run in one process and take turns, so that whatever else the
machine does meets all of them. Each way runs whole pipelines, from given prompt embeddings to latents.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

import trimtab
from benchmarks.flops import SD3_MEDIUM, SD15, SDXL
from benchmarks.speed_plot import Ratio, plot
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


@dataclass
class Way:
    """One way to sample, and what was measured of it."""

    name: str
    run: Callable[[], Any] = field(repr=False)
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    peak: int = 0


def build(one: Architecture, device: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The stock pipeline, a guidable one and Diffusers' PAG pipeline, which share one denoiser."""
    torch.manual_seed(0)
    denoiser = one.denoiser(**one.config).to(device, dtype).eval().requires_grad_(False)
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


def ways_of(one: Architecture, side: int, steps: int, device: str, dtype: torch.dtype, compiled: bool) -> list[Way]:
    """All ways of one architecture; the first is the stock pipeline with classifier-free guidance."""
    stock, guided, pag = build(one, device, dtype)
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

    return [
        Way("stock pipeline, CFG", run(stock)),
        Way("guidable, nothing attached, CFG", ours([])),
        Way("CFG + PAG", ours(["pag"])),
        Way("CFG + PAG, one plain batch", ours(["pag"], rows="batched")),
        Way("CFG + PAG, Diffusers' PAG pipeline", run(pag, pag_scale=3.0)),
        Way("CFG + PAG, a call each, as guiders do", ours(["pag"], rows="sequential")),
        Way("PAG alone", ours(["pag"], scale=1.0)),
        Way("PAG alone, Diffusers' PAG pipeline", run(pag, scale=1.0, pag_scale=3.0)),
        Way("CFG + PAG + SEG", ours(["pag", "seg"])),
        Way("CFG + PAG + SEG, a call each, as guiders do", ours(["pag", "seg"], rows="sequential")),
    ]


COMPARED = (
    ("guidable, nothing attached, CFG", "stock pipeline, CFG"),
    ("CFG + PAG", "CFG + PAG, Diffusers' PAG pipeline"),
    ("CFG + PAG", "CFG + PAG, one plain batch"),
    ("CFG + PAG", "CFG + PAG, a call each, as guiders do"),
    ("PAG alone", "PAG alone, Diffusers' PAG pipeline"),
    ("CFG + PAG + SEG", "CFG + PAG + SEG, a call each, as guiders do"),
)
"""Which way is divided by which."""


def measure(ways: Sequence[Way], repeats: int, device: str) -> None:
    """Fill in what the ways cost; each first runs once, which counts its FLOPs and warms it up."""
    with tqdm(total=len(ways) * (repeats + 1), desc="speed") as bar:
        for way in ways:
            with FlopCounterMode(display=False) as counter:
                way.run()
            way.flops = counter.get_total_flops()
            bar.update()
        for _ in range(repeats):
            for way in ways:
                gc.collect()
                _reset_peak(device)
                started = time.perf_counter()
                way.run()
                if device != "cpu":
                    torch.cuda.synchronize()
                way.seconds.append(time.perf_counter() - started)
                way.peak = max(way.peak, _peak(device))
                bar.update()


def _reset_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int:
    """The highest use of memory since the last reset, in bytes: of the process, or allocated on the GPU."""
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def ratio(ways: Sequence[Way], this: str, that: str) -> Ratio:
    """Those of time, turn by turn, and that of the FLOPs."""
    by_name = {way.name: way for way in ways}
    one, other = by_name[this], by_name[that]
    turns = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
    return Ratio(f"{this} : {that}", turns, one.flops / other.flops)


def drawing(results: dict[str, dict[str, Any]]) -> Image.Image:
    """The ratios as a picture."""
    groups = {name: _ways(result) for name, result in results.items()}
    return plot({name: [ratio(ways, *pair) for pair in COMPARED] for name, ways in groups.items()})


def _ways(result: dict[str, Any]) -> list[Way]:
    return [Way(**{**way, "run": lambda: None}) for way in result["ways"]]


def page(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown page."""
    lines = [
        "# Speed", "",
        "Made by `python -m benchmarks.speed`: random weights, one process, the ways take turns, so that whatever else",
        "the machine does meets all of them. All figures are in `speed.json`.", "",
        "![Ratios of time](images/speed.png)", "",
    ]  # fmt: skip
    for name, result in results.items():
        ways = _ways(result)
        about, unit = result["about"], ways[0]
        lines += [
            f"## {name}", "",
            f"{about['side']} x {about['side']} pixels, {about['steps']} steps, {about['dtype']}, {about['machine']}, "
            f"torch {about['torch']}, Diffusers {about['diffusers']}; {len(unit.seconds)} turns.", "",
            "| way | FLOPs, stock CFG = 1 | seconds (median) | peak memory, GB |", "| --- | --- | --- | --- |",
        ]  # fmt: skip
        for way in ways:
            seconds, flops = statistics.median(way.seconds), way.flops / unit.flops
            lines.append(f"| {way.name} | {flops:.3f} | {seconds:.2f} | {way.peak / 1e9:.2f} |")
        lines += ["", "| time of | divided by that of | median of turns (least to most) | FLOPs |"]
        lines.append("| --- | --- | --- | --- |")
        for this, that in COMPARED:
            found = ratio(ways, this, that)
            spread = f"{statistics.median(found.turns):.3f} ({min(found.turns):.3f} to {max(found.turns):.3f})"
            lines.append(f"| {this} | {that} | {spread} | {found.flops:.3f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure the named architectures; what `--json` holds of others is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "architectures", nargs="*", help=f"of {', '.join(ARCHITECTURES)}; none only draws what is there"
    )
    parser.add_argument("--side", type=int, help="pixels; by default 512")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("runs/speed.json"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    results = json.loads(given.json.read_text()) if given.json.exists() else {}
    for name in given.architectures:
        one = ARCHITECTURES[name]
        side = given.side or one.side
        ways = ways_of(one, side, given.steps, given.device, getattr(torch, given.dtype), given.compile)
        measure(ways, given.repeats, given.device)
        about = {
            "side": side, "steps": given.steps, "dtype": given.dtype, "device": given.device, "machine": machine(),
            "compiled": given.compile, "torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        }  # fmt: skip
        kept = [{key: value for key, value in vars(way).items() if key != "run"} for way in ways]
        results[f"{name}, {given.device}" + (", compiled" if given.compile else "")] = {"about": about, "ways": kept}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=2) + "\n")
        del ways
        gc.collect()
    text = page(results)
    print(text)
    if given.page:
        given.page.write_text(text)
    if given.plot:
        drawing(results).save(given.plot, optimize=True)


if __name__ == "__main__":
    main()
