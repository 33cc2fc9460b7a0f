"""What both denoisers of emoji are trained on: latents of all drawings, with their captions."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from .data import EmojiData, to_unit

SHIFT = 2
"""Pixels that a copy of an image is moved at most."""


class Drawings:
    """Latents `[copies, n, 4, 16, 16]` of unit variance and captions; one sample is a drawing in one of its skin tones.

    Args:
        data: the images.
        autoencoder: trained.
        copies: of each image, of which each sample is one at random; see `copies_of`.
    """

    def __init__(self, data: EmojiData, autoencoder: AutoencoderKL, copies: int = 1) -> None:
        config: Any = autoencoder.config
        modes = []
        with torch.no_grad(), tqdm(total=copies * len(data.images), desc="encode emoji") as bar:
            for images in copies_of(data, copies):
                for batch in images.split(128):
                    modes.append(autoencoder.encode(batch.to(autoencoder.device)).latent_dist.mode().cpu())
                    bar.update(len(batch))
        latents = (torch.cat(modes) - config.shift_factor) * config.scaling_factor
        self.latents = latents.unflatten(0, (copies, len(data.images)))
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
        """Latents `[batch, 4, 16, 16]` and captions, tone and copy of each drawing at random, some captions empty.

        Args:
            drawings: their numbers `[batch]`.
            dropout: share of empty captions.
            generator: of all choices.
        """
        device, count = generator.device, len(drawings)
        uniform = torch.rand(2, count, generator=generator, device=device).cpu()
        drawings = drawings.cpu()
        copies = len(self.latents)
        choice = (uniform[0] * self._counts[drawings] * copies).long()
        chosen = self._members[drawings, choice // copies]
        kept = (uniform[1] >= dropout).tolist()
        captions = [self.captions[i] if keep else "" for i, keep in zip(chosen.tolist(), kept, strict=True)]
        return self.latents[choice % copies, chosen].to(device), captions


def copies_of(data: EmojiData, count: int) -> Iterator[torch.Tensor]:
    """The images `[n, 3, h, w]` in -1..1 so many times: as they are, then moved, and every second time mirrored.

    Nothing is mirrored whose caption names a side.
    """
    images, generator = to_unit(data.images), torch.Generator().manual_seed(0)
    sided = torch.tensor([any(word.startswith(("left", "right")) for word in one.split()) for one in data.captions])
    yield images
    for number in range(1, count):
        copy = moved(images, generator)
        yield torch.where(sided.view(-1, 1, 1, 1), copy, copy.flip(-1)) if number % 2 else copy


def moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image by up to `SHIFT` pixels either way, on white."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (SHIFT,) * 4, value=1.0)
    places = torch.randint(2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    parts = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, places, strict=True)]
    return torch.stack(parts)


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
