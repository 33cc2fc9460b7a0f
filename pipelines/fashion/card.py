"""The model card that training writes beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...training import TrainingSettings
from ...training.log import summary
from ..cards import machine
from .data import CLASS_NAMES

CARD = """---
license: mit
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [trimtab, class-conditional, fashion-mnist]
---

# A small class-conditional diffusion model of Fashion-MNIST

{parameters:,} parameters, 32x32 grey images, ten classes ({classes})
and a null class, so that it serves as its own unconditional model. It predicts velocity under a linear
variance-preserving schedule of 1000 levels. Made to try guidance on within seconds on any machine; no use for anything
else.

```python
import trimtab

pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
pipe.add_guidance("cfg", scale=2.0)
pipe("Sneaker", num_inference_steps=25).images[0]
```

Plain Diffusers loads it too, with the folder that holds `pipeline.py` as `custom_pipeline`:
`DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(trimtab.pipelines.fashion.PIPELINE_FOLDER))`.

## Data

Fashion-MNIST: 60,000 training images, 28x28, padded with background to 32x32 (Zalando SE, 2017, MIT licence; Xiao,
Rasul and Vollgraf, arXiv:1708.07747). The 10,000 test images were never trained on.

## Training

`{command}`

{steps:,} steps of {batch_size} images ({epochs:.1f} passes over the data), AdamW, learning rate {learning_rate:g} with
warm-up and cosine decay, {label_dropout:.0%} label dropout, averaged weights (decay {ema_decay:g}), mixed precision
`{mixed_precision}`, seed {seed}. Loss at the end: {loss:.4f} on training batches (mean of the last 100),
{validation_loss:.4f} on 1,000 test images. {hours:.1f} hours on {machine}.
The weights are stored in half precision.

## Licence

MIT for the data; the weights are under the licence of this package, Apache-2.0.
"""


def write_card(folder: Path, settings: TrainingSettings, log: Sequence[Mapping[str, Any]], parameters: int) -> None:
    """Write `README.md` into a model folder from what the training log says.

    Args:
        folder: the model.
        settings: of the training.
        log: the training log, one row a step.
        parameters: of the denoiser.
    """
    text = CARD.format(
        **settings.to_store(),
        **{"validation_loss": float("nan"), **summary(log)},
        parameters=parameters,
        classes=", ".join(CLASS_NAMES),
        command=settings.command("base"),
        epochs=settings.steps * settings.batch_size / 60_000,
        machine=machine(),
    )
    (folder / "README.md").write_text(text)
