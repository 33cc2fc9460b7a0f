"""Perturbations of one denoiser at once, one inside another: each branch has its own, however rows are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guided_runs import close
from peft import LoraConfig, inject_adapter_in_model
from zoo import CASES, run

import trimtab

PERTURBING: dict[str, dict[str, Any]] = {
    "pag": {"layers": "auto"},
    "seg": {"layers": "auto"},
    "slg": {"layers": "auto", "start": 0.0, "stop": 1.0},
    "autoguidance": {"adapters": "all"},
}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_batched_is_sequential(name: str) -> None:
    pipe = trimtab.guide(CASES[name].build())
    with torch.random.fork_rng():
        torch.manual_seed(2)
        lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
        inject_adapter_in_model(lora, getattr(pipe, CASES[name].denoiser), "style")
    stock = run(pipe, CASES[name])
    for plugin, parameters in PERTURBING.items():
        pipe.add_guidance(plugin, **parameters)
    joined = run(pipe, CASES[name])
    assert pipe.last_guided_run.forward_calls == 3 * CASES[name].calls
    assert pipe.last_guided_run.evaluations == 3 * (CASES[name].rows * CASES[name].calls + 4)
    for rows in ("batched", "sequential"):
        pipe.guidance_rows = rows
        close(run(pipe, CASES[name]), joined, 2e-5)
    pipe.clear_guidance()
    assert torch.equal(run(pipe, CASES[name]), stock)


def test_the_terms_add_up() -> None:
    pipe, kept = trimtab.guide(CASES["sd15"].build()), []
    call = {"num_inference_steps": 1}  # of one step, the output is a linear function of the prediction
    stock = run(pipe, CASES["sd15"], **call)
    parts = {plugin: PERTURBING[plugin] for plugin in ("pag", "seg", "slg")} | {"sag": {}}
    for plugin, parameters in parts.items():
        with pipe.guidance(plugin, **parameters):
            kept.append(run(pipe, CASES["sd15"], **call) - stock)
    for plugin, parameters in parts.items():
        pipe.add_guidance(plugin, **parameters)
    assert sum(kept, torch.zeros_like(stock)).abs().max() > 1e-3 * stock.abs().max()
    close(run(pipe, CASES["sd15"], **call), sum(kept, stock), 2e-6)
