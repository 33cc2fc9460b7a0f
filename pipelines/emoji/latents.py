"""What both denoisers of emoji are trained on: latents of all drawings, with their captions."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from .data import EmojiData, to_unit


class Drawings:
    """Latents `[n, 4, 16, 16]` of unit variance and captions; one sample is a drawing in one of its skin tones.

    Args:
        data: the images.
        autoencoder: trained.
    """

    def __init__(self, data: EmojiData, autoencoder: AutoencoderKL) -> None:
        config: Any = autoencoder.config
        with torch.no_grad():
            batches = tqdm(to_unit(data.images).split(128), desc="encode emoji")
            modes = [autoencoder.encode(batch.to(autoencoder.device)).latent_dist.mode().cpu() for batch in batches]
        self.latents = (torch.cat(modes) - config.shift_factor) * config.scaling_factor
        self.captions = data.captions
        counts = torch.tensor([len(group) for group in data.drawings])
        self._members = torch.nn.utils.rnn.pad_sequence([torch.tensor(g) for g in data.drawings], batch_first=True)
        self._counts = counts

    @property
    def indices(self) -> TensorDataset:
        """The data set for the loop: numbers of drawings, which `draw` turns into samples."""
        return TensorDataset(torch.arange(len(self._counts)))

    def draw(
        self, drawings: torch.Tensor, dropout: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[str]]:
        """Latents `[batch, 4, 16, 16]` and captions, a skin tone of each drawing at random, some captions empty.

        Args:
            drawings: their numbers `[batch]`.
            dropout: share of empty captions.
            generator: of all choices.
        """
        device, count = generator.device, len(drawings)
        uniform = torch.rand(2, count, generator=generator, device=device).cpu()
        drawings = drawings.cpu()
        chosen = self._members[drawings, (uniform[0] * self._counts[drawings]).long()]
        kept = (uniform[1] >= dropout).tolist()
        captions = [self.captions[i] if keep else "" for i, keep in zip(chosen.tolist(), kept, strict=True)]
        return self.latents[chosen].to(device), captions


def load_autoencoder(folder: str | Path) -> AutoencoderKL:
    """A trained autoencoder, frozen.

    Raises:
        FileNotFoundError: with the command that trains one.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no autoencoder: `trimtab train emoji-autoencoder` makes one.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoencoderKL.from_pretrained(folder).to(device).eval().requires_grad_(False)


def keep_card(source: str | Path, folder: Path) -> None:
    """Put the card of a trained autoencoder beside its copy within a pipeline, with its curves."""
    for name in ("README.md", "training.png"):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def go_on_from(folder: str | Path, **parts: Any) -> None:
    """Give the parts of a model the weights of those of a trained one.

    Args:
        folder: the trained pipeline.
        parts: by their names in it.

    Raises:
        RuntimeError: naming the tensors, where the sizes are others.
    """
    for name, part in parts.items():
        part.load_state_dict(type(part).from_pretrained(Path(folder) / name).state_dict())


def half(module: Any) -> Any:
    """A copy in half precision on the CPU, as denoisers are stored.

    Text encoders are stored in float32: transformers would load them in half precision again.
    """
    return copy.deepcopy(module).to("cpu", torch.float16, memory_format=torch.contiguous_format)
