"""The model cards of the emoji models, with their training curves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ...training import TrainingSettings
from ...training.log import read_log, summary
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

One emoji in ten is held out, in all styles and skin tones: what is tested was never drawn in training.{only}

## Training

{runs}

Here, {last}{done:,} steps of {samples} samples, AdamW, learning rate {learning_rate:g} with warm-up and cosine decay
over {steps:,}, averaged weights (decay {ema_decay:g}), mixed precision `{mixed_precision}`, seed {seed}. {hours:.1f}
hours on {machine}. Loss, mean of the last 100 steps: {loss:.4f}. {validated}

![Loss and validation over the steps](training.png)
{more}
## Licence

The drawings are under the licences above; the weights are under the licence of this package, Apache-2.0. Drawings by
Twitter and contributors are used under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/).
"""

ONLY = """
Drawn are emoji of these categories only: {}."""

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
    log = read_log(settings.output)
    curve(log).save(folder / "training.png")
    numbers, done = summary(log), log[-1]["step"]
    hidden = {"loss", "hours"}
    validated = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items() if name not in hidden]
    unfinished = f", stopped after {done:,} steps" if done < settings.steps else ""
    runs = [*runs_before(settings), f"`{settings.command(command)}`{unfinished}"]
    (folder / "training.json").write_text(json.dumps({**settings.to_store(), "runs": runs}, indent=2) + "\n")
    categories = getattr(settings, "categories", "")
    small = not torch.cuda.is_available() and task == "text-to-image"
    text = CARD.format(
        **settings.to_store(),
        done=done,
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
        only=ONLY.format(categories) if categories else "",
        runs="\n\n".join(runs),
        samples=settings.batch_size * settings.accumulate,
        last="in the last run, " if len(runs) > 1 else "",
        machine=machine(),
        validated=f"On held-out emoji: {', '.join(validated)}." if validated else "",
        more=MORE if small else "",
    )  # fmt: skip
    (folder / "README.md").write_text(text)


def runs_before(settings: TrainingSettings) -> list[str]:
    """The commands that made the model that a training went on from, the oldest first."""
    start = getattr(settings, "start", "")
    before: list[str] = json.loads((Path(start) / "training.json").read_text())["runs"] if start else []
    return before
