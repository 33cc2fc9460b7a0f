"""The arguments of a UNet call in which each row has several entries, and what the partners begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

from ...guidance.branch import COND, UNCOND, Branch
from ...guidance.errors import ParameterError
from ...guidance.run import Run, Step
from ..batch import images_for_each, prompts_of
from ..pictures import pictures
from .partner import Kept, Partner, in_full_precision
from .texts import Prompts, Texts

Rows = Sequence[Branch | None]


class Inputs:
    """What is made once in a run, at its first UNet call: the pipeline's own noise has been drawn by then.

    Args:
        run: the run.
        partners: its partners, which enter their own runs here, in order.
        given: the arguments of that call by name.
        rows: what its rows predict.
        step: that it belongs to.
        estimates: whether the pipeline's own side is y.
    """

    def __init__(
        self, run: Run, partners: Sequence[Partner], given: Mapping[str, Any], rows: Rows, step: Step, estimates: bool
    ) -> None:
        self._run, self._pipe = run, run.pipeline
        self._each = images_for_each(run.arguments)
        self._images = prompts_of(run.arguments) * self._each
        plain: Texts = {
            branch: {name: states[chosen] for name, states in _text_of(given).items()}
            for branch in (COND, UNCOND)
            if (chosen := [row for row, one in enumerate(rows) if one == branch])
        }
        prompts = Prompts(run, self._each, self._images, plain)
        self._own: Texts = prompts.of_side(partners[0].settings.word if estimates else "", None, None)
        self._size = given["sample"].shape[2:]
        self._like = given["sample"][: self._images]
        for partner in partners:
            settings = partner.settings
            word = "" if estimates else settings.word
            partner.texts = prompts.of_side(word, settings.prompt, settings.negative_prompt)
            with torch.no_grad():
                self._enter(partner, step)

    # -- the partners' beginnings ----------------------------------------------------------------------------------
    def _enter(self, partner: Partner, step: Step) -> None:
        settings, generator = partner.settings, self._run.arguments.get("generator")
        channels = self._pipe.vae.config.latent_channels
        shape = (self._images, channels, *self._size)
        image = None if settings.image is None else self._latents(settings.image, "image")
        noise = randn_tensor(shape, generator, self._like.device, self._like.dtype)
        blank = torch.zeros(shape, device=self._like.device, dtype=self._like.dtype)
        partner.enter(self._run.fresh_scheduler(), blank if image is None else image, noise)
        if settings.mask is not None:
            assert image is not None
            partner.kept = Kept(image, noise, self._mask(settings.mask, "mask"), self._run.fresh_scheduler())
        if settings.own_mask is not None:
            own = self._latents(settings.own_image, "own_image")
            mask, scheduler = self._mask(settings.own_mask, "own_mask"), self._run.fresh_scheduler()
            partner.own_kept = Kept(own, torch.empty(0), mask, scheduler)

    def _latents(self, value: Any, name: str) -> torch.Tensor:
        """An image's latents `[images, ...]`, drawn from what the autoencoder says; latents are taken as they are."""
        if isinstance(value, torch.Tensor):
            wanted = (self._pipe.vae.config.latent_channels, *self._size)
            if tuple(value.shape[1:]) != wanted:
                raise ParameterError(
                    f"joint: {name} is a tensor {list(value.shape)}; needed: latents [images, "
                    f"{', '.join(map(str, wanted))}] as the pipeline's own, or an image, which is resized."
                )
            latents = value
        else:
            height, width = (side * int(self._pipe.vae_scale_factor) for side in self._size)
            found = pictures(value, "joint", name)
            processor = self._pipe.image_processor
            pixels = processor.preprocess(found, height=height, width=width, resize_mode="crop")
            pixels = pixels.to(self._pipe._execution_device, self._pipe.vae.dtype)
            latents = self._encode(pixels, name)
        return self._for_each(latents.to(self._like), name)

    def _encode(self, pixels: torch.Tensor, name: str) -> torch.Tensor:
        vae, generator = self._pipe.vae, self._run.arguments.get("generator")
        with in_full_precision(vae):
            pixels = pixels.to(vae.dtype)
            if isinstance(generator, list):  # so that an image does not depend on the others of its batch
                pixels = self._for_each(pixels, name)
                drawn = [vae.encode(one[None]).latent_dist.sample(g) for one, g in zip(pixels, generator, strict=True)]
                return torch.cat(drawn) * vae.config.scaling_factor
            return vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor

    def _for_each(self, given: torch.Tensor, name: str) -> torch.Tensor:
        """One for each image of the run, from one, one for each prompt, or one for each image."""
        if len(given) not in (1, self._images // self._each, self._images):
            raise ParameterError(
                f"joint: {name} holds {len(given)} images for {self._images}; give one, or one for each prompt."
            )
        return given.repeat_interleave(self._images // len(given), dim=0)

    def _mask(self, value: Any, name: str) -> torch.Tensor:
        """1 where a side is made, `[masks, 1, height, width]` of latents."""
        scale = int(self._pipe.vae_scale_factor)
        processor = VaeImageProcessor(
            vae_scale_factor=scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        height, width = (side * scale for side in self._size)
        found = pictures(value, "joint", name)
        pixels = processor.preprocess(found, height=height, width=width, resize_mode="crop")
        return self._for_each(F.interpolate(pixels, tuple(self._size)).to(self._like), name)

    # -- arguments -------------------------------------------------------------------------------------------------
    def for_entries(self, given: Mapping[str, Any], rows: Rows, entries: Sequence[Partner | None]) -> dict[str, Any]:
        """The call's arguments with an entry for the pipeline's own side (`None`) and each partner in every row."""
        image = [row % self._images for row in range(len(rows))]
        count = len(entries)

        def together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.stack(list(parts), dim=1).flatten(0, 1)

        sample = given["sample"]
        own_time = torch.as_tensor(given["timestep"], device=sample.device).expand(len(rows))
        texts = _text_of(given)

        def prompts(name: str) -> torch.Tensor:
            return together([self._rows_text(partner, name, texts, rows) for partner in entries])

        arguments = {
            "sample": together([sample if p is None else p.model_input()[image].to(sample) for p in entries]),
            "timestep": together(
                [own_time if p is None else p.timestep.to(own_time).expand(len(rows)) for p in entries]
            ),
            "encoder_hidden_states": together(
                [self._rows_text(p, "encoder_hidden_states", texts, rows) for p in entries]
            ),
        }
        for name, value in given.items():
            if name in (*arguments, "cross_attention_kwargs", "return_dict"):
                continue
            if name == "added_cond_kwargs" and value:
                value = {key: part.repeat_interleave(count, dim=0) for key, part in value.items()}
                if "text_embeds" in value:
                    value["text_embeds"] = prompts("text_embeds")
            elif "residual" in name:
                value = _on_own(value, entries)
            elif isinstance(value, torch.Tensor) and value.ndim and len(value) == len(rows):
                value = value.repeat_interleave(count, dim=0)
            arguments[name] = value
        return arguments

    def _rows_text(
        self, partner: Partner | None, name: str, given: Mapping[str, torch.Tensor], rows: Rows
    ) -> torch.Tensor:
        """The rows of one entry's prompt: of the same branch as the pipeline's; of an unknown branch, its own."""
        texts = self._own if partner is None else partner.texts
        states = []
        for row, branch in enumerate(rows):
            known = PROMPTS.get(branch.condition) if branch is not None else None
            encoded = texts.get(known) if known is not None else None
            states.append(given[name][row] if encoded is None else encoded[name][row % self._images])
        return torch.stack([one.to(given[name]) for one in states])


PROMPTS: Mapping[Any, Branch] = {"cond": COND, "uncond": UNCOND}
"""The branches whose prompts are encoded for each side."""


def rows_of(value: Any, chosen: Sequence[int], count: int) -> Any:
    """Of a call's arguments with so many rows, these rows; what has no rows stays as it is."""
    if isinstance(value, torch.Tensor):
        return value[list(chosen)] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: rows_of(part, chosen, count) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rows_of(part, chosen, count) for part in value]
    return value


def _text_of(given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    added = given.get("added_cond_kwargs") or {}
    found = {"encoder_hidden_states": given["encoder_hidden_states"]}
    return found | ({"text_embeds": added["text_embeds"]} if "text_embeds" in added else {})


def _on_own(residual: Any, entries: Sequence[Partner | None]) -> Any:
    """A ControlNet's residuals, one or several, on the pipeline's own entry alone."""
    if isinstance(residual, (list, tuple)):
        return [_on_own(part, entries) for part in residual]
    if residual is None:
        return None
    parts = [residual if partner is None else torch.zeros_like(residual) for partner in entries]
    return torch.stack(parts, dim=1).flatten(0, 1)
