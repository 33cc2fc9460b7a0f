"""`trimtab train ppap`: experts for a network of clean images, without any data.

The pipeline generates the images x_0. Expert after expert learns, on timesteps of its own range, to see in `x_t` what
the frozen network, the teacher, sees in `x_0`:

    KL( softmax(teacher(x_0) / 0.25) || softmax(student(x_t)) )       or, for depth, |student(x_t) - teacher(x_0)|^2

Each expert begins where the one before ended, with a learning rate that rises and falls to zero by a cosine anew. Its
LoRA and its norms are trained; the biases of other layers, and the last layer, stay the teacher's. A stopped run
continues: images that are made are kept, experts that are done are skipped, and the one at work goes on from its last
checkpoint.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from ...guidance.errors import ParameterError, UnsupportedPipelineError
from ...guidance.image_processor import of_processor
from ...guidance.images import Preprocessing
from ...guidance.networks import LOADERS, load_network, tensor_of
from ...training import TrainingSettings, option, processes, train
from ...training.checkpoints import check_same
from ..weights import load_weights, save_weights
from .agreement import agreement
from .experts import Experts
from .noise import check_timesteps, noised

SETTINGS = (
    "pipeline", "teacher", "kind", "prompts", "images", "inference_steps", "experts", "rank", "alpha", "steps",
    "batch_size", "learning_rate", "weight_decay", "warmup", "seed",
)  # fmt: skip
"""What experts depend on."""
TEMPERATURE = 0.25
SEEN = 500
"""Images on which the report compares the experts with the teacher."""


@dataclass(frozen=True, kw_only=True)
class PPAPSettings(TrainingSettings):
    """What a training of experts is made of; stored beside the weights."""

    output: str = option("runs/ppap", "folder for images, experts, checkpoints and logs; a stopped run continues there")
    pipeline: str = option("trimtab/fashion", "a pipeline of pixels, a folder or Hub repository")
    teacher: str = option("", "a transformers network of clean images, a folder or Hub repository")
    kind: str = option("classification", "classification, depth or segmentation")
    prompts: str = option("", "text file with a prompt a line, for a pipeline that takes prompts")
    images: int = option(5000, "images that the pipeline generates")
    inference_steps: int = option(25, "of each image")
    experts: int = option(5, "number of noise ranges")
    rank: int = option(16, "of the LoRAs")
    alpha: float = option(8.0, "of the LoRAs")
    steps: int = option(2000, "optimizer steps of each expert")
    batch_size: int = option(64, "images a step and process")
    learning_rate: float = option(1e-4, "its highest value")
    weight_decay: float = option(0.05, "of AdamW")
    warmup: int = option(50, "steps until the learning rate is reached")
    ema_decay: float = option(0.0, "of the averaged weights; 0 for none")


def train_ppap(settings: PPAPSettings) -> Path:
    """Train, or continue where the last run in `settings.output` stopped; returns the experts' file."""
    from ...pipelines.loading import GuidedPipeline

    if settings.kind not in LOADERS or not settings.teacher:
        wrong = f"kind={settings.kind!r}" if settings.kind not in LOADERS else "teacher is missing"
        raise ParameterError(f"train ppap: {wrong}; allowed: a teacher, and a kind of {', '.join(LOADERS)}.")
    for name in ("experts", "rank", "images", "inference_steps"):
        if (value := getattr(settings, name)) < 1:
            raise ParameterError(f"train ppap: {name}={value}; allowed: a whole number >= 1.")
    teacher, processor = load_network(settings.teacher, None, "train ppap", settings.kind, "teacher")
    channels = getattr(teacher.config, "num_channels", None)
    preprocessing = (
        Preprocessing(channels=channels) if processor is None else of_processor(processor, channels, "train ppap")
    )
    return train_experts(GuidedPipeline.from_pretrained(settings.pipeline), teacher, preprocessing, settings)


def train_experts(
    pipe: Any,
    teacher: nn.Module,
    preprocessing: Preprocessing,
    settings: PPAPSettings,
    images: torch.Tensor | None = None,
) -> Path:
    """The same for a pipeline and a network that are there; `images` `[n, ...]` in -1..1 are made if not given."""
    if getattr(pipe, "vae", None) is not None:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} works on latents, which a network of images cannot see; give a pipeline of pixels."
        )
    check_timesteps(pipe.scheduler)
    output = Path(settings.output)
    torch.manual_seed(settings.seed)
    teacher = teacher.eval().requires_grad_(False)
    timesteps = int(pipe.scheduler.config.num_train_timesteps)
    experts = Experts(teacher, settings.experts, settings.rank, settings.alpha, timesteps=timesteps)
    if images is None:
        with processes().main_process_first():
            images = generated(pipe, settings)
        torch.manual_seed(settings.seed)  # whatever was drawn to make them, or not, as they were there
    given = {name: getattr(settings, name) for name in SETTINGS}
    with processes().main_process_first():
        check_same(output / "settings.json", given, "train ppap")
    file = output / "ppap.safetensors"
    for index in range(settings.experts):
        done = output / f"expert_{index}.safetensors"
        if not done.exists():
            if index:
                experts.copy_expert(index - 1, index)
            _train_one(experts, index, teacher, images, pipe.scheduler, preprocessing, settings, done)
            if not done.exists():  # stopped by settings.minutes
                return done
        _take_over(experts, load_weights(done).tensors, index)
    share = f"{experts.trainable_share:.2%}"
    if not processes().is_main_process:
        return file
    experts.save(file, {"trainable_share": share, "command": settings.command("ppap")})
    rows = agreement(experts, teacher, images[:SEEN], pipe.scheduler, preprocessing, settings.kind)
    report = {**settings.to_store(), "trainable_share": experts.trainable_share, "base_parameters": experts.base_size,
              "agreement": rows}  # fmt: skip
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    each = f"{experts.trainable_share / settings.experts:.2%}"
    print(f"{settings.experts} experts of {each} hold {share} of the network's {experts.base_size:,} parameters")
    return file


def _take_over(experts: Experts, tensors: dict[str, torch.Tensor], index: int) -> None:
    for name, parameter in experts.parameters_of(index).items():
        parameter.data.copy_(tensors[name])


def _train_one(
    experts: Experts, index: int, teacher: nn.Module, images: torch.Tensor, scheduler: Any,
    preprocessing: Preprocessing, settings: PPAPSettings, done: Path,
) -> None:  # fmt: skip
    low, high = experts.bounds(index)
    experts.train_only(index)

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        x0 = batch[0].to(generator.device)
        t = torch.randint(low, high, (len(x0),), generator=generator, device=generator.device)
        noise = torch.randn(x0.shape, generator=generator, device=generator.device)
        with torch.no_grad():
            wanted = tensor_of(teacher.to(generator.device)(preprocessing(x0))).float()
        found = model(preprocessing(noised(scheduler, x0, noise, t)), t).float()
        return distance(found, wanted, settings.kind)

    def export(model: Any) -> None:
        save_weights(output / "unfinished.safetensors", model.parameters_of(index))

    output = Path(settings.output) / f"expert_{index}"
    if train(f"expert {index}", experts, TensorDataset(images), loss,
             dataclasses.replace(settings, output=str(output)), export):  # fmt: skip
        state = processes()
        if state.is_main_process:
            (output / "unfinished.safetensors").replace(done)
        state.wait_for_everyone()


def distance(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> torch.Tensor:
    """Between what the student sees in noisy images and the teacher in clean ones."""
    if kind == "depth":
        return F.mse_loss(found, wanted)
    target = (wanted / TEMPERATURE).log_softmax(1)
    each = F.kl_div(found.log_softmax(1), target, log_target=True, reduction="none").sum(1)
    return each.mean()


def generated(pipe: Any, settings: PPAPSettings) -> torch.Tensor:
    """Images of the pipeline `[n, channels, height, width]` in -1..1; kept in files of a batch each."""
    folder = Path(settings.output) / "images"
    named = ("pipeline", "prompts", "images", "inference_steps", "batch_size", "seed")
    check_same(folder / "settings.json", {name: getattr(settings, name) for name in named}, "train ppap")
    lines = Path(settings.prompts).read_text().splitlines() if settings.prompts else [""]
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for number in tqdm(range(math.ceil(settings.images / settings.batch_size)), desc="images"):
        file = folder / f"{number:06d}.safetensors"
        if not file.exists():
            first = number * settings.batch_size
            indices = range(first, min(first + settings.batch_size, settings.images))
            pixels = pipe(
                **_arguments(pipe, indices, lines),
                generator=[torch.Generator().manual_seed(settings.seed + index) for index in indices],
                num_inference_steps=settings.inference_steps,
                output_type="np",
            ).images
            made = torch.as_tensor(pixels).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)
            save_weights(file, {"images": made})
        parts.append(load_file(file)["images"])
    return torch.cat(parts).float() / 127.5 - 1


def _arguments(pipe: Any, indices: range, prompts: list[str]) -> dict[str, Any]:
    taken = inspect.signature(type(pipe).__call__).parameters
    if hasattr(pipe, "null_class"):
        return {"class_labels": [None] * len(indices)}
    if "prompt" in taken:
        return {"prompt": [prompts[index % len(prompts)] for index in indices]}
    return {"batch_size": len(indices)}
