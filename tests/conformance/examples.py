"""What a `conftest.py` holds: parameters and pipelines for the built-in plug-ins whose defaults do not do."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fixtures.weights import noise
from zoo import CASES, picture

from trimtab.adapters.easycontrol.checkpoint import projections_of, written
from trimtab.adapters.low_rank import LowRank
from trimtab.adapters.ppap.experts import Experts
from trimtab.adapters.smooth.train import SmoothTraining
from trimtab.adapters.smooth.train import written as written_smooth
from trimtab.adapters.unicon.checkpoint import save
from trimtab.adapters.unicon.train import UniConSettings, UniConTraining
from trimtab.adapters.weights import save_weights
from trimtab.conformance import Example, Stage
from trimtab.conformance.stages import STAGES
from trimtab.conformance.tiny import sd15

AUTOGUIDANCE, CFG_PP, EASYCONTROL, GUIDER, JOINT = "autoguidance", "cfg_pp", "easycontrol", "guider", "joint"
SLG, SMOOTH = "slg", "smooth"


def pytest_trimtab_example(name: str, pipe: Any) -> Example | None:
    """Parameters, and what a formula cannot pass."""
    if name == AUTOGUIDANCE:
        return Example({"weak": weaker(pipe.components.get("unet") or pipe.components["transformer"])})
    if name == "ppap":
        return Example({"classifier": Pooled(), "target": 1, "scale": 3.0, "weights": experts()})
    if name == "classifier":
        return Example({"classifier": Brightness(), "target": 1, "scale": 3.0})
    if name == "tfg":
        return Example({"energy": brightness, "rho": 1.0, "mu": 0.5, "iterations": 1, "smoothing": 0.0})
    if name == "steered":
        return Example({"losses": (brightness,), "scale": 3.0})
    if name == CFG_PP:
        return Example(exempt={"identity": "it takes the noise from the unconditional prediction at every scale"})
    if name == EASYCONTROL:
        return Example(
            {
                "weights": str(loras()),
                "image": picture(16),
                "cond_size": 16,
                "lora_index": 0,  # the file holds one
            },
            exempt={"batch": "the images of one prompt share its condition, drawn with the first one's generator"},
        )
    if name == JOINT:
        return Example({"weights": str(partner()), "image": picture(16), "mode": "condition"})
    if name == GUIDER:
        return Example(exempt={"identity": "which parameter of a guider switches it off is the guider's own matter"})
    if name == SMOOTH:
        return Example({"weights": str(smooth())})
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


class Pooled(torch.nn.Module):
    """A classifier with a linear layer to adapt, for samples of any number of channels."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.head = torch.nn.Linear(16, 8), torch.nn.Linear(8, 2)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool1d(samples.flatten(1)[:, None], 16)[:, 0]
        return self.head(self.first(pooled).tanh())


@functools.cache
def experts() -> str:
    """Two untrained experts in a file."""
    file = Path(tempfile.mkdtemp()) / "ppap.safetensors"
    return str(Experts(Pooled(), 2, rank=2).save(file))


def pytest_trimtab_stages(name: str) -> Sequence[Stage] | None:
    """A pipeline of one's own, for what works on few."""
    if name == EASYCONTROL:
        case = CASES["flux"]
        return [Stage("flux", case.build, {**case.call, "num_inference_steps": 2})]
    if name in (JOINT, SMOOTH):
        return STAGES[:1]
    return None


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
    layers: dict[str, dict[str, LowRank]] = {}
    for layer, projection, width_in, width_out in projections_of(CASES["flux"].build().transformer):
        down, up = noise(f"down.{layer}.{projection}", 4, width_in), noise(f"up.{layer}.{projection}", width_out, 4)
        layers.setdefault(layer, {})[projection] = LowRank(down / 4, up / 4)
    return save_weights(path, written(layers))


@functools.cache
def partner() -> Path:
    """A folder with a published-format model of the kit's tiny UNet."""
    folder = Path(tempfile.mkdtemp())
    unet = sd15().unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UniConTraining(unet, UniConSettings(rank=4))
        with torch.no_grad():
            for weight in model.weights:
                weight.copy_(0.1 * torch.randn(weight.shape))
    return save(folder, model.blocks)


@functools.cache
def smooth() -> Path:
    """A file with a published-format LoRA of the kit's tiny UNet."""
    loras = written_smooth(SmoothTraining(sd15().unet, 4).loras)
    tensors = {name: noise(name, *tensor.shape) / 8 for name, tensor in loras.items()}
    return save_weights(Path(tempfile.mkdtemp()) / "smooth.safetensors", tensors)
