"""Guidance as modular pipelines of Diffusers do it: by a guider, which makes each prediction a call of its own.

Only one guider acts at a time, and none has both perturbations; `BothPerturbed` is what one would write for that, of
Diffusers' own parts. Perturbed attention is not offered for SD3's processor, and SD1.5 has no modular pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.guiders import BaseGuidance, PerturbedAttentionGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)

MIDDLE = "mid_block.attentions.0.transformer_blocks"
SCALES = {"cfg": 5.0, "pag": 3.0, "seg": 3.0}
"""As in the other ways."""


def modular(unet: Any, scheduler: Any, guider: BaseGuidance) -> ModularPipeline:
    """Diffusers' modular pipeline for SDXL, from prompt embeddings to latents."""
    blocks = StableDiffusionXLCoreDenoiseStep()
    _silence(blocks)
    pipe = blocks.init_pipeline()
    pipe.update_components(unet=unet, scheduler=scheduler, guider=guider)
    return pipe


def _silence(block: Any) -> None:
    """Draw no progress bar: the loop over the steps is a block somewhere inside."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in block.sub_blocks.values():
        _silence(inner)


def perturbed(unet: Any) -> PerturbedAttentionGuidance:
    """CFG and PAG in the middle block by Diffusers' guider, whose window leaves out the first step otherwise."""
    return PerturbedAttentionGuidance(
        guidance_scale=SCALES["cfg"], perturbed_guidance_scale=SCALES["pag"], perturbed_guidance_start=-1.0,
        perturbed_guidance_stop=1.0, perturbed_guidance_config=LayerSkipConfig(
            _middle(unet), MIDDLE, skip_attention=False, skip_attention_scores=True, skip_ff=False
        ),
    )  # fmt: skip


class BothPerturbed(PerturbedAttentionGuidance):
    """CFG, PAG and SEG in the middle block: four predictions by Diffusers' own hooks."""

    # A list, as in every guider of Diffusers.
    _input_predictions = ["pred_cond", "pred_uncond", "pred_cond_skip", "pred_cond_seg"]  # noqa: RUF012

    def __init__(self, unet: Any) -> None:
        super().__init__(**perturbed(unet).config)
        # A finite sigma is what Diffusers' hook takes for an infinite blur: the mean of all queries.
        self._smoothed, self._sigma = SmoothedEnergyGuidanceConfig(_middle(unet), MIDDLE), 1.0

    @property
    def num_conditions(self) -> int:
        return len(self._input_predictions)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared != 2

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(name == "pred_uncond"), name)
            for name in self._input_predictions
        ]

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, int(name == "pred_uncond"), name) for name in self._input_predictions]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        self._count_prepared += 1
        if self._count_prepared == 3:
            _apply_layer_skip_hook(denoiser, self.skip_layer_config[0], name="perturbed")
        elif self._count_prepared == 4:
            _apply_smoothed_energy_guidance_hook(denoiser, self._smoothed, self._sigma, name="perturbed")

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._count_prepared > 2:
            HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook("perturbed", recurse=True)

    # Diffusers calls it by the names of the predictions, of which there is one more.
    def forward(  # type: ignore[override]
        self, pred_cond: Any, pred_uncond: Any, pred_cond_skip: Any, pred_cond_seg: Any
    ) -> GuiderOutput:
        pred = pred_uncond + SCALES["cfg"] * (pred_cond - pred_uncond)
        pred = pred + SCALES["pag"] * (pred_cond - pred_cond_skip) + SCALES["seg"] * (pred_cond - pred_cond_seg)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def _middle(unet: Any) -> list[int]:
    return list(range(len(unet.get_submodule(MIDDLE))))
