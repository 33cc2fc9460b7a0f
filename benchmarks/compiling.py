"""What `torch.compile` costs, with and without guidance: seconds until the first result, and graphs, plan by plan.

    python -m benchmarks.compiling
    python -m benchmarks.compiling --way blocks --width 64

A UNet with Stable Diffusion 1.5's blocks and layers, as many and in the same order, but narrow: how long a compiler
works depends on the number of operations, not on their size. Nothing that an earlier process compiled is reused.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.flops import SD15
from benchmarks.speed import ARCHITECTURES, build

PLANS: Sequence[tuple[str, ...]] = ((), ("pag",), ("pag", "seg"), ("pag",), ())
"""Guidances in the order in which they are attached and run; the last two return to what is compiled already."""

WAYS: dict[str, Callable[[Any], None]] = {
    "whole": lambda unet: unet.compile(),
    "blocks": lambda unet: unet.compile_repeated_blocks(),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan in a compiled denoiser.

    Args:
        plan: guidances attached.
        first, second: seconds of its first run and of one more.
        graphs: compiled in the first; the second must compile none.
    """

    plan: str
    first: float
    second: float
    graphs: int


def narrow(width: int) -> dict[str, Any]:
    """Stable Diffusion 1.5's configuration with `width` channels where it has 320."""
    return SD15 | {"block_out_channels": (width, 2 * width, 4 * width, 4 * width), "cross_attention_dim": 4 * width}


def measure(way: str, width: int = 32, plans: Sequence[Sequence[str]] = PLANS, side: int = 128) -> list[Row]:
    """Run the plans one after the other in one pipeline whose denoiser is compiled in this way."""
    torch.compiler.reset()
    torch.compiler.config.force_disable_caches = True
    one = dataclasses.replace(ARCHITECTURES["sd15"], config=narrow(width))
    _, pipe, _ = build(one, "cpu", torch.float32)
    WAYS[way](pipe.unet)
    embeddings = {name: torch.randn(1, 77, 4 * width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call = {**embeddings, "num_inference_steps": 2, "height": side, "width": side, "output_type": "latent"}

    def run() -> tuple[float, int]:
        before, began = counters["stats"]["unique_graphs"], time.perf_counter()
        pipe(guidance_scale=5.0, generator=torch.Generator().manual_seed(0), **call)
        return time.perf_counter() - began, counters["stats"]["unique_graphs"] - before

    rows = []
    for plan in plans:
        pipe.clear_guidance()
        for name in plan:
            pipe.add_guidance(name)
        first, graphs = run()
        second, more = run()
        assert not more, f"the second run of {plan} made {more} graphs"
        rows.append(Row(" + ".join(plan) or "nothing attached", first, second, graphs))
    return rows


def main() -> None:
    """Print a table for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help="by default both")
    parser.add_argument("--width", type=int, default=32, help="channels where Stable Diffusion 1.5 has 320")
    given = parser.parse_args()
    print("| compiled | attached, one after the other | graphs made | first run, seconds | one more |")
    print("| --- | --- | --- | --- | --- |")
    for way in [given.way] if given.way else WAYS:
        for row in measure(way, given.width):
            print(f"| {way} | {row.plan} | {row.graphs} | {row.first:.1f} | {row.second:.2f} |", flush=True)


if __name__ == "__main__":
    main()
