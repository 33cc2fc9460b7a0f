"""What a `conftest.py` holds: parameters and pipelines for the built-in plug-ins whose defaults do not do."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from fixtures import easycontrol_case

from trimtab.adapters.weights import save_weights
from trimtab.conformance import Example, Stage
from trimtab.conformance.tiny import assemble

AUTOGUIDANCE, CFG_PP, EASYCONTROL, GUIDER = "autoguidance", "cfg_pp", "easycontrol", "guider"
SAG, SLG = "sag", "slg"


def pytest_trimtab_example(name: str, pipe: Any) -> Example | None:
    """Parameters, and what a formula cannot pass."""
    if name == AUTOGUIDANCE:
        return Example({"weak": weaker(pipe.components.get("unet") or pipe.components["transformer"])})
    if name == "classifier":
        return Example({"classifier": Brightness(), "target": 1, "scale": 3.0})
    if name == "tfg":
        return Example({"energy": brightness, "rho": 1.0, "mu": 0.5, "iterations": 1, "smoothing": 0.0})
    if name == CFG_PP:
        return Example(exempt={"identity": "it takes the noise from the unconditional prediction at every scale"})
    if name == EASYCONTROL:
        return Example(
            {
                "weights": str(loras()),
                "image": easycontrol_case.picture(easycontrol_case.SPATIAL),
                "cond_size": easycontrol_case.COND_SIZE,
                "lora_index": 0,  # the file holds one
            }
        )
    if name == GUIDER:
        return Example(exempt={"identity": "which parameter of a guider switches it off is the guider's own matter"})
    if name == SAG:
        return Example(exempt={"agreement": "it subtracts predictions at two points, which are noise in the paper"})
    if name == SLG:
        return Example({"start": 0.0, "stop": 1.0})  # by default it acts on none of two steps
    return None


def brightness(images: torch.Tensor) -> torch.Tensor:
    """An energy that dark images have."""
    return 5.0 * images.flatten(1).mean(1)


class Brightness(torch.nn.Module):
    """Dark or bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = 20.0 * images.flatten(1).mean(1)
        return torch.stack([-mean, mean], dim=1)


def pytest_trimtab_stages(name: str) -> Sequence[Stage] | None:
    """Flux, for what works on nothing else."""
    if name != EASYCONTROL:
        return None
    call = {
        **easycontrol_case.prompt(),
        "height": easycontrol_case.HEIGHT,
        "width": easycontrol_case.BREADTH,
        "num_inference_steps": 2,
        "guidance_scale": easycontrol_case.GUIDANCE,
        "output_type": "latent",
    }
    return [Stage("flux", functools.partial(assemble, flux), call)]


def weaker(denoiser: torch.nn.Module) -> torch.nn.Module:
    """The denoiser with a little noise on its weights."""
    module = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(0.1 * parameter.std(unbiased=False) * noise)
    return module


@functools.cache
def loras() -> Path:
    """A file with a published-format LoRA of the tiny Flux."""
    path = Path(tempfile.mkdtemp()) / "spatial.safetensors"
    save_weights(path, easycontrol_case.lora(easycontrol_case.SPATIAL))
    return path


def flux() -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**easycontrol_case.SCHEDULER),
        vae=easycontrol_case.filled(diffusers.AutoencoderKL(**easycontrol_case.VAE), "vae"),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=easycontrol_case.filled(diffusers.FluxTransformer2DModel(**easycontrol_case.TRANSFORMER), "flux"),
    )
