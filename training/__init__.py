"""The loop that every `trimtab train` command runs: Accelerate, resumable, averaged weights, one set of options.

A method brings its model, its data and its loss; what is the same for all of them is here. Under `accelerate launch`
each process sees its own part of the data, and the gradients are averaged.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)
from diffusers.optimization import get_scheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..guidance.errors import ParameterError
from ..once import by_main
from .checkpoints import alone, check_same, resume, save
from .log import PLAIN, append, keep
from .state import Average, Progress

Batch = Any


Loss = Callable[[Any, Batch, torch.Generator], torch.Tensor]
"""The loss of a batch: of the model, the batch, and the generator of all its noise: a resumed run then repeats it."""


def option(default: Any, doc: str) -> Any:
    """One training setting: a dataclass field that the command line shows with `doc`."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings that all trainings share; subclass it for those of one method."""

    output: str = option(
        "runs/model", "folder for the model, its checkpoints and its log; a stopped run continues there"
    )
    steps: int = option(4000, "optimizer steps")
    batch_size: int = option(128, "samples a step and process")
    accumulate: int = option(1, "batches whose gradients make one step")
    learning_rate: float = option(8e-4, "its highest value")
    warmup: int = option(200, "steps until it is reached")
    weight_decay: float = option(1e-3, "of AdamW")
    ema_decay: float = option(0.9995, "of the averaged weights; 0 for none")
    mixed_precision: str = option("no", "no, bf16 or fp16")
    seed: int = option(0, "of the weights, the order of the data and the noise")
    checkpoint_every: int = option(250, "steps")
    validate_every: int = option(250, "steps")
    minutes: float = option(0.0, "stop after so long, to continue later; 0 for no limit")

    def to_store(self) -> dict[str, Any]:
        """What is stored beside the weights: everything but where files lie and how a run was cut into pieces."""
        hidden = {"output", "data", "minutes"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in hidden}

    def to_compare(self) -> dict[str, Any]:
        """What a run that goes on must have been begun with."""
        return {k: v for k, v in self.to_store().items() if k not in ("checkpoint_every", "validate_every")}

    def command(self, name: str) -> str:
        """The command that repeats this training."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {key: value for key, value in self.to_store().items() if value != defaults[key]}
        options = (f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in given.items())
        return " ".join([f"trimtab train {name}", *options])


def processes() -> PartialState:
    """The processes that were launched together; on CPUs too, which Accelerate must be told."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def end_processes() -> None:
    """End what was launched together, after the last of what may be several trainings."""
    processes().destroy_process_group()


def train(
    name: str,
    model: nn.Module,
    data: Dataset[Any],
    loss: Loss,
    settings: TrainingSettings,
    export: Callable[[nn.Module], None],
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> bool:
    """Train the parameters of `model` that require gradients, or continue from the last checkpoint.

    Args:
        name: what the progress bar says.
        model: built after `torch.manual_seed(settings.seed)`, so that all processes start alike.
        data: a map-style data set.
        loss: of one batch.
        settings: of this run.
        export: writes the finished model; given the model with the averaged weights, on the main process only.
        validate: numbers of the model with the averaged weights, for the log; called on all processes.

    Returns:
        whether all steps were taken (`settings.minutes` may end a run before).

    Raises:
        ParameterError: there are too few samples for a batch a process, or another command trains in the folder.
    """
    output, what = Path(settings.output), f"train {name}"
    processes()  # on the devices that this training is for
    with ExitStack() as stack:
        by_main(lambda: stack.enter_context(alone(output, what)))
        return _train(what, model, data, loss, settings, export, validate)


def _train(
    what: str,
    model: nn.Module,
    data: Dataset[Any],
    loss: Loss,
    settings: TrainingSettings,
    export: Callable[[nn.Module], None],
    validate: Callable[[nn.Module], dict[str, float]] | None,
) -> bool:
    output = Path(settings.output)
    accelerator = Accelerator(
        cpu=processes().device.type == "cpu",
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(settings.accumulate, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
        project_config=ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = Average(trained, settings.ema_decay)
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=settings.warmup, num_training_steps=settings.steps)
    loader = DataLoader(data, settings.batch_size, shuffle=True, drop_last=True)
    if len(loader) < accelerator.num_processes:
        raise ParameterError(
            f"{what}: batch_size={settings.batch_size}: the data make {len(loader)} whole batches for "
            f"{accelerator.num_processes} processes; give a smaller one, or more data."
        )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    average.to(accelerator.device)
    progress = Progress()
    accelerator.register_for_checkpointing(average, schedule, progress)
    with processes().main_process_first():
        check_same(output / "settings.json", settings.to_compare(), what)
    resume(accelerator, output)
    if accelerator.is_main_process:
        keep(output, progress.step)

    @contextmanager
    def averaged() -> Iterator[nn.Module]:
        with average.in_place_of(trained):
            yield accelerator.unwrap_model(model)

    def finish() -> None:
        if accelerator.is_main_process:
            with averaged() as finished:
                export(finished)
        accelerator.wait_for_everyone()

    bar = tqdm(total=settings.steps, initial=progress.step, desc=what, disable=not accelerator.is_main_process)
    batches = _endless(loader, progress.step * settings.accumulate)
    deadline = time.monotonic() + 60 * settings.minutes if settings.minutes else float("inf")
    model.train()
    while progress.step < settings.steps and not _is_over(deadline, accelerator):
        started = time.perf_counter()
        losses = []
        for part in range(settings.accumulate):
            with accelerator.accumulate(model):
                # Noise depends on the step's number alone, so that a resumed run sees what an unbroken one would.
                number = (settings.seed * settings.steps + progress.step) * settings.accumulate + part
                seed = number * accelerator.num_processes + accelerator.process_index
                value = loss(model, next(batches), torch.Generator(accelerator.device).manual_seed(seed))
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(value.detach())
        schedule.step()
        average.step(trained)
        progress.step += 1
        row: dict[str, Any] = {"step": progress.step, "loss": torch.stack(losses).mean().item()}
        row |= {"lr": schedule.get_last_lr()[0], "seconds": time.perf_counter() - started}
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.4f}")
        if validate is not None and _due(progress.step, settings.validate_every, settings.steps):
            with averaged() as candidate, torch.no_grad():
                candidate.eval()
                row |= validate(candidate)
                candidate.train()
            bar.write(f"step {progress.step}: " + ", ".join(f"{k} {v:.5g}" for k, v in row.items() if k not in PLAIN))
        if accelerator.is_main_process:
            append(output, row)
        if _due(progress.step, settings.checkpoint_every, settings.steps):
            save(accelerator)
            finish()
    bar.close()
    done = progress.step >= settings.steps
    if not done:
        save(accelerator)
        finish()
    return done


def _is_over(deadline: float, accelerator: Accelerator) -> bool:
    """Whether the time is up in any process: one that went on alone would wait for the others for ever."""
    if deadline == float("inf"):
        return False
    over = torch.tensor(float(time.monotonic() >= deadline), device=accelerator.device)
    return bool(accelerator.reduce(over, "sum"))


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _endless(loader: Any, start: int) -> Iterator[Batch]:
    epoch, skip = divmod(start, len(loader))
    while True:
        # Each epoch's order depends on its number alone, so that a resumed run sees what an unbroken one would.
        loader.set_epoch(epoch)
        for index, batch in enumerate(loader):
            if index >= skip:
                yield batch
        epoch, skip = epoch + 1, 0
