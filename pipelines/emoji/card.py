"""The model cards of the emoji models, with their training curves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ...training import TrainingSettings
from ...training_log import read_log, summary
from ..cards import curve, machine
from .data import PACKAGES

CARD = """---
license: apache-2.0
library_name: {library}
pipeline_tag: {task}
tags: [trimtab, emoji]
---

# {title}

{parameters:,} parameters. {about} Made to try guidance on within seconds on any machine.

```python
{usage}
```

## Data

Drawings of emoji at 64x64 on white, from three npm packages, with the emoji's name and the style as the caption, such
as "red apple, noto style":

| style | package | drawings by |
| --- | --- | --- |
{packages}

One emoji in ten is held out, in all styles and skin tones: what is tested was never drawn in training.

## Training

{commands}

{steps:,} steps of {samples} samples, AdamW, learning rate {learning_rate:g} with warm-up and cosine decay, averaged
weights (decay {ema_decay:g}), mixed precision `{mixed_precision}`, seed {seed}{last}.{state} {hours:.1f} hours on {machine}.
Loss, mean of the last 100 steps: {loss:.4f}. {validated}

![Loss and validation over the steps](training.png)
{more}
## Licence

The drawings are under the licences above; the weights are under the licence of this package, Apache-2.0. Drawings by
Twitter and contributors are used under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/).
"""

MORE = """
On a GPU `make models` trains with batches of 128 for 40,000 steps at a greater width, which this machine did not
allow: finer shapes, and more of the rare words of the captions.
"""

MAKERS = {
    "noto": "Google, Noto Emoji, Apache-2.0",
    "twemoji": "Twitter and contributors, Twemoji, CC-BY 4.0",
    "fluent": "Microsoft, Fluent Emoji, MIT",
}


def write_card(
    folder: Path,
    model: nn.Module,
    settings: TrainingSettings,
    command: str,
    *,
    title: str,
    about: str,
    usage: str,
    library: str = "transformers",
    task: str = "text-to-image",
) -> None:
    """Write `README.md`, `training.png` and `training.json` into a model's folder.

    Args:
        folder: the model.
        model: what was trained.
        settings: of the training; its log is read.
        command: the name after `trimtab train`.
        title: the card's.
        about: what the model is, in sentences.
        usage: Python that uses it, with FOLDER for the model's.
        library: that loads it.
        task: as the Hub names it.
    """
    commands = [*commands_before(settings), settings.command(command)]
    (folder / "training.json").write_text(json.dumps({**settings.to_store(), "commands": commands}, indent=2) + "\n")
    log = read_log(settings.output)
    curve(log).save(folder / "training.png")
    numbers, done = summary(log), log[-1]["step"]
    hidden = {"loss", "hours"}
    validated = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items() if name not in hidden]
    last = " in the last run" if len(commands) > 1 else ""
    unfinished = f" The run was stopped after {done:,} of them." if done < settings.steps else ""
    small = not torch.cuda.is_available() and task == "text-to-image"
    text = CARD.format(
        **settings.to_store(),
        loss=numbers["loss"],
        hours=numbers["hours"],
        title=title,
        about=about,
        usage=usage.replace("FOLDER", folder.as_posix()),
        library=library,
        task=task,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        packages="\n".join(
            f"| {style} | {name} {version} | {MAKERS[style]} |" for style, (name, version, _) in PACKAGES.items()
        ),
        commands="\n\n".join(f"`{line}`" for line in commands),
        samples=settings.batch_size * settings.accumulate,
        last=last,
        state=unfinished,
        machine=machine(),
        validated=f"On held-out emoji: {', '.join(validated)}." if validated else "",
        more=MORE if small else "",
    )  # fmt: skip
    (folder / "README.md").write_text(text)


def commands_before(settings: TrainingSettings) -> list[str]:
    """The commands that made the model that a training went on from, the oldest first."""
    start = getattr(settings, "start", "")
    before: list[str] = json.loads((Path(start) / "training.json").read_text())["commands"] if start else []
    return before
