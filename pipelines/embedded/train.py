"""`trimtab train base`: train the embedded model.

Loss: velocity prediction of a variance-preserving diffusion, `|| v_theta(x_t, t, y) - v ||^2` with
`x_t = alpha_t x_0 + sigma_t n` and `v = alpha_t n - sigma_t x_0` (Salimans & Ho, 2022), t uniform over 1000 levels, the
label replaced by the null class with probability `label_dropout`, and an exponential moving average of the weights.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from .card import write_card
from .data import CLASS_NAMES, load
from .pipeline import ClassConditionalPipeline


@dataclass(frozen=True)
class TrainingConfig:
    """What a training run is made of; stored beside the weights."""

    output: str = "runs/base"
    data: str | None = None
    steps: int = 4000
    batch_size: int = 128
    learning_rate: float = 8e-4
    warmup: int = 200
    label_dropout: float = 0.1
    ema_decay: float = 0.9995
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 250
    validate_every: int = 250


def build_unet() -> UNet2DModel:
    """The embedded denoiser: three resolutions, self-attention at 16x16 and 8x8, ten classes and the null class."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=len(CLASS_NAMES) + 1,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of training; no clipping, because it would keep the unclipped epsilon and break guidance."""
    return DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")


def train(config: TrainingConfig) -> Path:
    """Train, or continue where the last checkpoint in `config.output` stopped; returns the finished model's folder."""
    output = Path(config.output)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        project_config=ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2),
    )
    set_seed(config.seed)
    unet, scheduler = build_unet(), build_scheduler()
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    loader = DataLoader(TensorDataset(*load("train", config.data)), config.batch_size, shuffle=True, drop_last=True)
    validation = load("t10k", config.data)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    ema.to(accelerator.device)
    progress = _Progress()
    accelerator.register_for_checkpointing(ema, schedule, progress)
    if (output / "checkpoints").is_dir() and any((output / "checkpoints").iterdir()):
        accelerator.load_state()
        newest = max(int(path.name.rsplit("_", 1)[1]) for path in (output / "checkpoints").iterdir())
        accelerator.project_configuration.iteration = newest + 1

    bar = tqdm(total=config.steps, initial=progress.step, desc="train base", disable=not accelerator.is_main_process)
    batches = _endless(loader, start=progress.step)
    unet.train()
    while progress.step < config.steps:
        started = time.perf_counter()
        images, labels = next(batches)
        # Noise depends on the step's number alone, so that a resumed run sees what an unbroken one would.
        noise_seed = (
            config.seed * config.steps + progress.step
        ) * accelerator.num_processes + accelerator.process_index
        generator = torch.Generator(accelerator.device).manual_seed(noise_seed)
        loss = _loss(unet, scheduler, images, labels, config.label_dropout, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(unet.parameters())
        progress.step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        row: dict[str, Any] = {"step": progress.step, "loss": loss.item(), "lr": schedule.get_last_lr()[0]}
        row["seconds"] = time.perf_counter() - started
        if progress.step % config.validate_every == 0 or progress.step == config.steps:
            row["validation_loss"] = _validate(accelerator, unet, ema, scheduler, validation)
            accelerator.print(f"step {progress.step}: validation loss {row['validation_loss']:.5f}")
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if progress.step % config.checkpoint_every == 0:
            accelerator.save_state()
            _export(accelerator, unet, ema, scheduler, config)
    bar.close()
    return _export(accelerator, unet, ema, scheduler, config)


def _loss(
    unet: Any,
    scheduler: DDIMScheduler,
    x0: torch.Tensor,
    labels: torch.Tensor,
    dropout: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared velocity error of one batch `[batch, 1, 32, 32]`."""
    count, device = len(x0), x0.device
    noise = torch.randn(x0.shape, generator=generator, device=device)
    t = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator, device=device)
    dropped = torch.rand(count, generator=generator, device=device) < dropout
    v = unet(scheduler.add_noise(x0, noise, t), t, class_labels=labels.masked_fill(dropped, len(CLASS_NAMES))).sample
    return torch.nn.functional.mse_loss(v.float(), scheduler.get_velocity(x0, noise, t))


@torch.no_grad()
def _validate(accelerator: Accelerator, unet: Any, ema: EMAModel, scheduler: DDIMScheduler, data: Any) -> float:
    """The averaged weights' loss on 1,000 held-out images, always with the same noise and levels."""
    images, labels = (tensor[:1000].to(accelerator.device) for tensor in data)
    parameters = list(unet.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    generator = torch.Generator(accelerator.device).manual_seed(0)
    losses = [
        _loss(unet, scheduler, x, y, 0.0, generator) for x, y in zip(images.split(250), labels.split(250), strict=True)
    ]
    ema.restore(parameters)
    return torch.stack(losses).mean().item()


def _export(
    accelerator: Accelerator, unet: Any, ema: EMAModel, scheduler: DDIMScheduler, config: TrainingConfig
) -> Path:
    """Write the averaged weights, in half precision, as an ordinary Diffusers folder."""
    folder = Path(config.output) / "model"
    if accelerator.is_main_process:
        model = build_unet()
        ema.copy_to(model.parameters())
        pipe = ClassConditionalPipeline(model.half(), scheduler, CLASS_NAMES)
        pipe.save_pretrained(folder)
        settings = {name: value for name, value in asdict(config).items() if name not in ("output", "data")}
        (folder / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
        log = Path(config.output) / "log.jsonl"
        write_card(folder, settings, asdict(TrainingConfig()), log, sum(p.numel() for p in model.parameters()))
    accelerator.wait_for_everyone()
    return folder


def _endless(loader: Any, start: int) -> Any:
    epoch, skip = divmod(start, len(loader))
    while True:
        # Each epoch's order depends on its number alone, so that a resumed run sees what an unbroken one would.
        loader.set_epoch(epoch)
        for index, batch in enumerate(loader):
            if index >= skip:
                yield batch
        epoch, skip = epoch + 1, 0


class _Progress:
    """The number of optimizer steps taken, as a checkpointable object."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
