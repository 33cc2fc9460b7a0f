"""VAE slicing and tiling come after the last step: what a guided run leaves is decoded as in the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from configured import check_configured
from guided_runs import guided
from zoo import CASES


def slicing(pipe: Any) -> None:
    pipe.vae.enable_slicing()


def tiling(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8


@pytest.mark.parametrize("configure", [slicing, tiling])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_slicing_and_tiling_decode_what_guidance_made(name: str, configure: Callable[[Any], None]) -> None:
    """Two images, of which each is a slice, of several tiles each."""
    batch = {"num_images_per_prompt": 2}

    def decoded(plugin: str, parameters: Mapping[str, Any]) -> torch.Tensor:
        pipe: Any = CASES[name].build()
        configure(pipe)
        latents = guided(name, plugin, parameters, **batch)
        config = pipe.vae.config
        with torch.no_grad():
            images = pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
        images = pipe.image_processor.postprocess(images, "pt")
        in_one = guided(name, plugin, parameters, output_type="pt", **batch)
        assert torch.allclose(images, in_one, atol=1e-5) == (configure is slicing)
        return images

    check_configured(name, configure, decoded, output_type="pt", **batch)
