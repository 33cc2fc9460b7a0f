"""Time of one image on two processes that share its branches, against one process, as a ratio.

    python -m benchmarks.branches
    python -m benchmarks.branches --processes 3 --side 512

CFG and PAG on a denoiser of SD1.5's size with random weights, from prompt embeddings to latents. One process with one
thread and with as many as there are processes, and the processes with one thread each, take turns, so that whatever
else the machine does meets all of them. Every process of the group holds the whole denoiser: 3.4 GB in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from tqdm.auto import tqdm

from benchmarks.speed import ARCHITECTURES, build
from trimtab.pipelines.cards import machine


def main() -> None:
    """Measure, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--note", default="", help="a sentence for the page, on what else the machine did")
    parser.add_argument("--output", type=Path, default=Path("runs/branches"), help="writes OUTPUT.json and OUTPUT.md")
    given = parser.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS=str(given.processes))
    store = given.output.with_suffix(".store")
    store.parent.mkdir(parents=True, exist_ok=True)
    store.unlink(missing_ok=True)
    multiprocessing.spawn(_process, (given, str(store.absolute())), given.processes)


def _process(rank: int, given: argparse.Namespace, store: str) -> None:
    """One process of the group; the first also measures what it takes alone, while the others wait."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=given.processes)
    one = ARCHITECTURES[given.architecture]
    _, pipe, _ = build(one, "cpu", torch.float32)
    pipe.add_guidance("pag")
    generator = torch.Generator()
    embeddings = {
        f"{sign}{name}": torch.randn(1, *shape, generator=generator.manual_seed(1))
        for name, shape in one.text.items()
        for sign in ("", "negative_")
    }
    call: dict[str, Any] = {**embeddings, "num_inference_steps": given.steps, "output_type": "latent"}
    call |= {"height": given.side, "width": given.side, "guidance_scale": 5.0}

    def seconds(threads: int, shared: bool) -> float:
        torch.set_num_threads(threads)
        if shared != (pipe.branch_parallel is not None):
            _ = pipe.enable_branch_parallel() if shared else pipe.disable_branch_parallel()
        distributed.barrier()
        began = time.perf_counter()
        if shared or rank == 0:
            results[shared] = pipe(generator=generator.manual_seed(0), **call).images
        took = time.perf_counter() - began
        distributed.barrier()
        return took

    results: dict[bool, torch.Tensor] = {}
    ways = {
        "1 process, 1 thread": (1, False),
        f"1 process, {given.processes} threads": (given.processes, False),
        f"{given.processes} processes, 1 thread each": (1, True),
    }
    turns: dict[str, list[float]] = {name: [] for name in ways}
    bar = tqdm(total=(given.repeats + 1) * len(ways), desc="branches", disable=rank > 0)
    for turn in range(given.repeats + 1):
        for name, way in ways.items():
            took = seconds(*way)
            bar.update()
            if turn:  # the first warms up
                turns[name].append(took)
    bar.close()
    if rank == 0:
        parallel = pipe.branch_parallel
        plan = pipe.explain_guidance(num_inference_steps=given.steps, guidance_scale=5.0)
        difference = float((results[True] - results[False]).abs().max() / results[False].abs().max())
        report(given, turns, difference, plan.notes, parallel.measured)


PAGE = """# Branch parallelism measured

Made by

    {command}

on {machine}, torch {torch}: CFG and PAG on a denoiser of the size of {architecture} with random weights, one image of
{side} x {side}, {steps} steps, {repeats} turns. Every turn takes each way once.

{note}| way | seconds, median of the turns |
| --- | --- |
{seconds}

| {together} against | times as fast: median (least to most) |
| --- | --- |
{ratios}

The results differ by {difference:.1g} of the largest number. What the plan says of this run:

```text
{plan}
```

The plan counts the denoiser's rows. What every process does by itself, such as decoding, and what processes on one
machine take from each other are not in it.
"""


def page(result: Mapping[str, Any]) -> str:
    """The page for what was measured."""
    *alone, together = result["seconds"]
    ratios = {name: result["times as fast"][name] for name in alone}
    return PAGE.format(
        **{name: result[name] for name in ("command", "machine", "torch", "architecture", "side", "steps", "repeats")},
        note=f"{result['note']}\n\n" if result["note"] else "",
        seconds="\n".join(f"| {name} | {statistics.median(turns):.2f} |" for name, turns in result["seconds"].items()),
        together=together,
        ratios="\n".join(f"| {name} | {_spread(turns)} |" for name, turns in ratios.items()),
        difference=result["difference"],
        plan="\n".join(result["plan"]),
    )


def _spread(turns: Sequence[float]) -> str:
    return f"{statistics.median(turns):.3f} ({min(turns):.3f} to {max(turns):.3f})"


def report(
    given: argparse.Namespace, turns: dict[str, list[float]], difference: float, notes: Sequence[str], measured: Any
) -> None:
    """Write all that was measured, and the page; print that."""
    *alone, together = turns
    result: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "difference": difference}
    result |= {name: getattr(given, name) for name in ("architecture", "side", "steps", "processes", "repeats", "note")}
    result |= {"command": shlex.join(["python", "-m", "benchmarks.branches", *sys.argv[1:]])}
    result |= {"seconds": turns, "plan": list(notes), "measured": vars(measured)}
    result["times as fast"] = {
        name: [a / b for a, b in zip(turns[name], turns[together], strict=True)] for name in alone
    }
    given.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    given.output.with_suffix(".md").write_text(page(result))
    given.output.with_suffix(".store").unlink(missing_ok=True)
    print(page(result))


if __name__ == "__main__":
    main()
