"""A class-conditional pixel pipeline in ordinary Diffusers format.

The file stands alone on purpose: Diffusers copies it out of its package when a saved folder is loaded with
`DiffusionPipeline.from_pretrained(folder, custom_pipeline=...)`, and a relative import would not survive that.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples images of a requested class from a `UNet2DModel` with class embeddings.

    The last class embedding is the *null class*: the model was trained to ignore the label there, so it is the
    unconditional model. The pipeline has no classifier-free guidance of its own; guidance is added from outside
    (`pipe.add_guidance("cfg", scale=2.0)`).

    Args:
        unet: the denoiser; takes `class_labels` in `[0, num_class_embeds)`.
        scheduler: any Diffusers scheduler for continuous images.
        class_names: one name a class, in label order; the null class has none.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self, unet: UNet2DModel, scheduler: SchedulerMixin, class_names: list[str] | tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return list(self.config.class_names)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return int(self.unet.config.num_class_embeds) - 1

    def class_label(self, label: int | str | None) -> int:
        """The index of a class given by index, by name (any case), or `None` for the null class.

        Raises:
            ValueError: no such class; the message lists the classes.
        """
        if label is None:
            return self.null_class
        if isinstance(label, str):
            lowered = [name.lower() for name in self.class_names]
            if label.lower() in lowered:
                return lowered.index(label.lower())
        elif 0 <= label <= self.null_class:
            return int(label)
        known = ", ".join(f"{i} {name!r}" for i, name in enumerate(self.class_names))
        raise ValueError(f"class_labels: no class {label!r}; this model knows {known}, and None for no class.")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | None = None,
        num_inference_steps: int = 25,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image per entry of `class_labels`, times `num_images_per_prompt`.

        Args:
            class_labels: class index, class name, or `None` (no class); or a list of those.
            num_inference_steps: number of denoising steps.
            num_images_per_prompt: images for each label.
            generator: one generator, or one per image.
            latents: start from this noise `[batch, channels, height, width]` instead of drawing it.
            output_type: `"pil"`, `"np"` (`[batch, height, width, channels]` in 0..1) or `"pt"` (in -1..1).
        """
        if isinstance(class_labels, (int, str)) or class_labels is None:
            class_labels = [class_labels]
        labels = torch.tensor([self.class_label(label) for label in class_labels], device=self._execution_device)
        labels = labels.repeat_interleave(num_images_per_prompt)

        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), self.unet.config.in_channels, height, width)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: shape {tuple(latents.shape)} given, {shape} needed.")
        # Flow-matching schedulers scale neither the first noise nor the denoiser's input.
        latents = latents.to(self._execution_device) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)

        step_kwargs = self._step_kwargs(generator)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            prediction = self.unet(scaled(latents, timestep), timestep, class_labels=labels).sample
            latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs).prev_sample
            if callback_on_step_end is not None:
                tensors = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, index, timestep, tensors).pop("latents", latents)

        images: Any = latents
        if output_type != "pt":
            images = (latents.float() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = [_to_pil(image) for image in images]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Diffusers' own, with this file beside it, so that the folder is its own `custom_pipeline`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / "pipeline.py")

    def _step_kwargs(self, generator: Any) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}


def _to_pil(image: Any) -> Image.Image:
    pixels = (image * 255).round().astype("uint8")
    return Image.fromarray(pixels[..., 0], mode="L") if pixels.shape[-1] == 1 else Image.fromarray(pixels)
