"""From what a pipeline's scheduler steps on to the image and back, differentiably.

A pipeline with an autoencoder steps on `z = (E(image) - shift) * scale`, possibly packed into tokens, so that
`image = D(z / scale + shift)`. Scale and shift are the autoencoder's own, and packing is the pipeline's own method. A
pipeline without an autoencoder steps on the image itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..guidance.errors import TrimtabError, UnsupportedPipelineError
from ..guidance.half import carried
from .budget import is_out_of_memory
from .interception import tap_method
from .latent_scale import scale_and_shift
from .meter import GraphMeter
from .prediction import locate, primary, sample_argument

AUTOENCODERS = ("vae", "vqvae", "movq", "vqgan")
"""Names of the component that decodes, in Diffusers' pipelines."""


class ImageSpace:
    """The images that the samples of one run stand for.

    Args:
        pipe: the pipeline.
        arguments: of its call; they tell the size of packed latents.
        meter: weighs the graph of the decoding.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any], meter: GraphMeter) -> None:
        self._pipe, self._arguments, self._meter = pipe, arguments, meter
        found = (pipe.components.get(name) for name in AUTOENCODERS)
        self.autoencoder: Any = next((one for one in found if isinstance(one, nn.Module)), None)
        self._prepared: tuple[torch.Tensor, ...] = ()
        self.shapes: tuple[torch.Size, ...] = ()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._wide: dict[str, torch.Tensor] = {}

    def follow(self, stack: ExitStack) -> None:
        """Note, until the stack closes, which samples the pipeline prepares, and the size that it settles on."""
        if hasattr(self._pipe, "prepare_latents"):
            tap_method(stack, self._pipe, "prepare_latents", self._note)

    def _note(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        self._arguments = {**self._arguments, **{n: given[n] for n in ("height", "width") if given.get(n)}}
        values = result if isinstance(result, (tuple, list)) else (result,)
        self._prepared = tuple(value for value in values if isinstance(value, torch.Tensor))
        self.shapes = tuple(value.shape for value in self._prepared)
        return result

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        """The image `[batch, channels, height, width]`, about -1..1, of a clean sample `[batch, ...]`.

        Asked again for the same tensor it answers with the same image, so that several losses share one decoding.

        Raises:
            UnsupportedPipelineError: it stands for no image, or this package does not know how the pipeline packs it.
        """
        if self.autoencoder is None:
            return sample
        if self._last is not None and self._last[0] is sample:
            kept = self._last[1]
            if kept.requires_grad or not (torch.is_grad_enabled() and sample.requires_grad):
                return kept
        latents = self._unpacked(sample)
        self._check_latents(sample, latents)
        scale, shift = scale_and_shift(self._pipe, self.autoencoder, latents)
        with self._meter.watching():
            image = self._differentiable(latents / scale + shift)
        if image.ndim == 5 and image.shape[2] == 1:
            image = image[:, :, 0]
        self._last = (sample, image)
        return image

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """The clean sample `[batch, ...]` of an image `[batch, channels, height, width]` in -1..1: the encoder's mode.

        Raises:
            UnsupportedPipelineError: see `decode`.
        """
        if self.autoencoder is None:
            return image
        takes_frames = _is_video(self.autoencoder) and image.ndim == 4
        latents = self._run("encode", image[:, :, None] if takes_frames else image).float()
        scale, shift = scale_and_shift(self._pipe, self.autoencoder, latents)
        return self._packed((latents - shift) * scale)

    def blank(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Zeros like the run's samples `[batch, ...]`, told from its first denoiser call; `None` if nobody can tell.

        The sample is what the pipeline prepared, if that is found in the input; else the input, if it has as many
        channels as a sample.

        Args:
            args, kwargs: of that call.
        """
        key = sample_argument(args, kwargs)
        given = None if key is None else args[key] if isinstance(key, int) else kwargs[key]
        if given is None:
            return None
        whole = primary(given)
        for prepared in self._prepared:
            rows = len(prepared)
            if prepared.ndim > 2 and len(whole) % rows == 0 and locate(whole[:rows], prepared) is not None:
                return self._if_image(torch.zeros_like(prepared, dtype=torch.float32))
        return self._if_image(torch.zeros_like(whole, dtype=torch.float32)) if whole.ndim == 4 else None

    def _if_image(self, sample: torch.Tensor) -> torch.Tensor | None:
        """The sample, unless it cannot be one of images: features of a prior, a sample that more is joined to."""
        if self.autoencoder is None:
            return sample if sample.ndim == 4 and sample.shape[1] in (1, 3, 4) else None
        latent = self.autoencoder.config.get("latent_channels")
        return sample if sample.ndim > 2 and (sample.ndim != 4 or latent in (None, sample.shape[1])) else None

    def forget(self) -> None:
        """Release the last image and its graph."""
        self._last = None

    def forget_prepared(self) -> None:
        """Release the samples that the pipeline prepared."""
        self._prepared = ()

    def _check_latents(self, sample: torch.Tensor, latents: torch.Tensor) -> None:
        """Refuse what the autoencoder cannot take: a prior's embeddings, frames that are stepped one by one."""
        kind, takes = type(self._pipe).__name__, 5 if _is_video(self.autoencoder) else 4
        if latents.ndim < 4:
            raise UnsupportedPipelineError(
                f"{kind}: at this stage it makes embeddings {list(latents.shape)}, which stand for no image. Guide the "
                "pipeline of the other stage by itself, or use a guidance that works on the sample itself."
            )
        if self._pipe.components.get("vqgan") is self.autoencoder:
            raise UnsupportedPipelineError(
                f"{kind}: its {type(self.autoencoder).__name__} decodes to images of another range and scale. Guide "
                "the stage before it, or use a guidance that works on the sample itself."
            )
        whole = not self.shapes or any(len(s) == 5 and s[2] == latents.shape[2] for s in self.shapes)
        if latents is sample and sample.ndim == 5 and not whole:
            raise UnsupportedPipelineError(
                f"{kind}: of its frames, those that are given are not in the sample, so no video is known. Use a "
                "guidance that works on the sample itself."
            )
        if latents.ndim < takes:
            raise UnsupportedPipelineError(
                f"{kind}: it goes through its frames one by one, of which {type(self.autoencoder).__name__} decodes "
                "none alone. Use a guidance that works on the sample itself."
            )

    # -- the autoencoder -------------------------------------------------------------------------------------------
    def _differentiable(self, latents: torch.Tensor) -> torch.Tensor:
        """The decoded image in float32."""
        half = next(self.autoencoder.parameters()).dtype == torch.float16
        return carried(latents, self._decoded) if half else self._decoded(latents).float()

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        try:
            return self._run("decode", latents)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, TrimtabError) or is_out_of_memory(error):
                raise
            what = f"the frames of {list(latents.shape)} at once" if latents.ndim == 5 else f"{list(latents.shape)}"
            raise UnsupportedPipelineError(
                f"{type(self._pipe).__name__}: its {type(self.autoencoder).__name__} does not decode {what}, so no "
                "image is known. Use a guidance that works on the sample itself."
            ) from error

    def _run(self, method: str, value: torch.Tensor) -> torch.Tensor:
        """Decode or encode, in float32 where half precision would overflow, with the parameters left as they are."""
        module = self.autoencoder
        dtype = next(module.parameters()).dtype
        if dtype == torch.float16 and getattr(module.config, "force_upcast", False):
            if not self._wide:
                self._wide = {name: p.detach().to(value.device, torch.float32) for name, p in module.named_parameters()}
            wide = {f"inner.{name}": parameter for name, parameter in self._wide.items()}
            output = torch.func.functional_call(_Method(module, method), wide, (value.float(),))
        else:
            whole = {"force_not_quantize": True} if method == "decode" and self._not_quantised() else {}
            output = getattr(module, method)(value.to(dtype), **whole)
        return _tensor_of(output)

    def _not_quantised(self) -> bool:
        """Whether it decodes latents as they are, as Kandinsky's pipelines have their MoVQ do."""
        return self._pipe.components.get("movq") is self.autoencoder

    # -- packing ---------------------------------------------------------------------------------------------------
    def _unpacked(self, sample: torch.Tensor) -> torch.Tensor:
        if sample.ndim != 3:
            return sample
        return self._call_packing("_unpack_latents", {"latents": sample})

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        if not hasattr(type(self._pipe), "_pack_latents"):
            return latents
        batch, channels, *_, height, width = latents.shape
        known = {"latents": latents, "batch_size": batch, "num_channels_latents": channels}
        return self._call_packing("_pack_latents", {**known, "height": height, "width": width})

    def _call_packing(self, method: str, known: dict[str, Any]) -> torch.Tensor:
        packing: Callable[..., torch.Tensor] | None = getattr(self._pipe, method, None)
        factor = getattr(self._pipe, "vae_scale_factor", None)
        default = getattr(self._pipe, "default_sample_size", None)
        for side in ("height", "width"):
            given = self._arguments.get(side) or (default * factor if default and factor else None)
            known.setdefault(side, given)
        known.setdefault("vae_scale_factor", factor)
        names = () if packing is None else inspect.signature(packing).parameters
        if packing is None or any(known.get(name) is None for name in names):
            raise UnsupportedPipelineError(
                f"{type(self._pipe).__name__}: its samples are packed in a way that is not known here, so no image can "
                "be decoded from them. Use a guidance that works on the sample itself."
            )
        return packing(**{name: known[name] for name in names})


class _Method(nn.Module):
    """One method of a module as a module of its own, which `functional_call` needs."""

    def __init__(self, inner: nn.Module, method: str) -> None:
        super().__init__()
        self.inner, self._method = inner, method

    def forward(self, value: torch.Tensor) -> Any:
        return getattr(self.inner, self._method)(value)


def _is_video(autoencoder: nn.Module) -> bool:
    """Whether it convolves over frames."""
    return any(isinstance(module, nn.Conv3d) for module in autoencoder.modules())


def _tensor_of(output: Any) -> torch.Tensor:
    """The tensor in what an autoencoder returned; of a distribution, its mode."""
    for name in ("sample", "latent_dist", "latents", "latent"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
        if value is not None:
            mode: torch.Tensor = value.mode()
            return mode
    return output if isinstance(output, torch.Tensor) else _tensor_of(output[0])
