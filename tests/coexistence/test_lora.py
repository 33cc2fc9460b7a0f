"""A LoRA loaded, scaled or fused: one model, guided alike however the LoRA is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from configured import check_configured
from peft import LoraConfig
from zoo import CASES, run

import trimtab

PARTS = {"sd15": "unet", "flux": "transformer"}


def loaded(pipe: Any, weight: float = 1.0) -> Any:
    """Adapt the denoiser with weights that depend on nothing but the code; returns it."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    torch.manual_seed(1)
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=projections, init_lora_weights=False), "style")
    denoiser.set_adapters(["style"], [weight])
    return denoiser


def scaled(pipe: Any) -> None:
    loaded(pipe, 0.5)


def fused(name: str, weight: float) -> Callable[..., torch.Tensor]:
    """The guided result with the LoRA added to the weights, which is a model without a LoRA."""

    def expected(plugin: str, parameters: Any) -> torch.Tensor:
        pipe = trimtab.guide(CASES[name].build())
        loaded(pipe, weight)
        pipe.fuse_lora(components=[PARTS[name]])
        with pipe.guidance(plugin, **parameters):
            return run(pipe, CASES[name])

    return expected


def fused_in(pipe: Any) -> None:
    loaded(pipe)
    pipe.fuse_lora(components=["unet" if hasattr(pipe, "unet") else "transformer"])


@pytest.mark.parametrize(("configure", "weight"), [(loaded, 1.0), (scaled, 0.5), (fused_in, 1.0)])
@pytest.mark.parametrize("name", PARTS)
def test_a_lora_beside_the_weights_is_guided_as_one_within_them(name: str, configure: Any, weight: float) -> None:
    """To rounding, as the products are added up in another order."""
    check_configured(name, configure, fused(name, weight), tolerance=3e-5)
