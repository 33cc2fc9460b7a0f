"""Autoencoders that shrink a picture 128 times, for pipelines that first enlarge whatever they get to a megapixel."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import Tensor

from trimtab.conformance.tiny import vae


class _Sparse:
    """Sees every 64th pixel of a picture; the autoencoder itself halves the rest."""

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The autoencoder comes after this class in its heirs, which no type of `super` here can say.
        return super().encode(x[..., 32::64, 32::64], *args, **kwargs)  # type: ignore[misc]


class _Image(_Sparse, diffusers.AutoencoderKL):
    pass


class _QwenImage(_Sparse, diffusers.AutoencoderKLQwenImage):
    pass


class _Wan(_Sparse, diffusers.AutoencoderKLWan):
    pass


_TINY: dict[str, Any] = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False],
    "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip


def image(channels: int) -> diffusers.AutoencoderKL:
    made = _Image(**vae(channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1).config)
    made.register_to_config(block_out_channels=(8,) * 8)  # whose length is how a pipeline knows the factor
    return made


def qwen_image() -> diffusers.AutoencoderKLQwenImage:
    made = _QwenImage(**_TINY)
    made.temperal_downsample = [False] * 7  # whose length is how a pipeline knows the factor
    return made


def wan() -> diffusers.AutoencoderKLWan:
    return _Wan(**_TINY, scale_factor_spatial=128)
