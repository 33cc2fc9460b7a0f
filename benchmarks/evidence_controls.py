"""`python -m benchmarks.evidence_controls`: what the learned controls cost, for the evidence page.

What they do is measured by `benchmarks.controls`; here a few images of held-out captions are made with each control and
without any, in turns side by side, and the plan is asked for the evaluations of the denoiser.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from trimtab.pipelines.emoji.data import SIZE
from trimtab.pipelines.emoji.pairs import DrawingPairs, picture
from trimtab.pipelines.generate.samples import length_of_text

from .controls_edges import TRIGGER
from .emoji import Attach, Sampler, of_held_out
from .evidence_data import KNOWN
from .rows import Rows

SD, FLUX = Path("trimtab/emoji-sd"), Path("trimtab/emoji-flux")


@dataclass(frozen=True)
class Costs:
    """Times the shipped controls on the shipped models, each set as in `benchmarks.controls`.

    Args:
        args: the command's.
    """

    args: argparse.Namespace

    @cached_property
    def pairs(self) -> DrawingPairs:
        """The drawings whose captions and edges are used."""
        return of_held_out(self.args.data, KNOWN, self.args.count)

    @cached_property
    def ways(self) -> Mapping[str, tuple[Sampler, Attach]]:
        """By plug-in: the model, and how the control is attached to it."""
        sizes = (self.args.guidance, self.args.steps, self.args.count)
        sd, flux = Sampler(SD, "guidance_scale", *sizes), Sampler(FLUX, "true_cfg_scale", *sizes)
        edges = [picture(one) for one in self.pairs.sources]
        line = "models/emoji-easycontrol/easycontrol.safetensors"
        lora = "models/emoji-smooth/smooth_lora.safetensors"
        return {
            "easycontrol": (flux, lambda pipe, _: pipe.add_guidance(
                "easycontrol", weights=line, image=edges, cond_size=SIZE
            )),
            "joint": (sd, lambda pipe, _: pipe.add_guidance(
                "joint", weights="trimtab/emoji-unicon", mode="condition", image=edges, trigger=TRIGGER
            )),
            "smooth": (sd, lambda pipe, _: pipe.add_guidance("smooth", weights=lora)),
        }  # fmt: skip

    def __call__(self, name: str) -> dict[str, Any]:
        """The evaluations of an image and the ratios of times, one a turn."""
        sampler, attach = self.ways[name]
        both: tuple[Attach, Attach] = (lambda pipe, numbers: None, attach)
        evaluations = [self._evaluations(sampler, way) for way in both]
        ratios = []
        for _ in tqdm(range(1 + self.args.turns), desc=name, leave=False):
            before, after = (self._seconds(sampler, way) for way in both)
            ratios.append(after / before)
        return {"evaluations": evaluations, "times": ratios[1:]}  # the first turn warms up

    def _evaluations(self, sampler: Sampler, attach: Attach) -> int:
        sampler.pipe.clear_guidance()
        attach(sampler.pipe, ())
        call = {sampler.scale: sampler.guidance, "num_inference_steps": sampler.steps, "height": SIZE, "width": SIZE}
        texts = {"prompt": self.pairs.captions, "negative_prompt": [""] * len(self.pairs)}
        plan = sampler.pipe.explain_guidance(**texts, **call, **length_of_text(sampler.pipe))
        return int(plan.evaluations)

    def _seconds(self, sampler: Sampler, attach: Attach) -> float:
        started = time.process_time()
        sampler(self.pairs, attach, "images")
        return time.process_time() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence_controls", description=__doc__)
    parser.add_argument("names", nargs="*", help="controls to time anew: easycontrol, joint, smooth")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji.safetensors"), help="the packed data set")
    parser.add_argument("--count", type=int, default=10, help="images of a turn")
    parser.add_argument("--turns", type=int, default=5, help="whose times are taken")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance")
    parser.add_argument("--output", type=Path, default=Path("docs/evidence-controls.json"), help="the file")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    settings = {name: getattr(args, name) for name in ("count", "turns", "steps", "guidance")}
    rows, costs = Rows(args.output, settings), Costs(args)
    if unknown := set(args.names) - set(costs.ways):
        parser.error(f"{', '.join(sorted(unknown))}: no control; allowed: {', '.join(costs.ways)}.")
    for name in args.names or [name for name in costs.ways if name not in rows]:
        command = shlex.join(["python", "-m", "benchmarks.evidence_controls", name, *given[len(args.names) :]])
        rows[name] = {**costs(name), "command": command}
        print(name, rows[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
