"""Forward FLOPs of guidance, counted on real architectures without weights (meta device).

    python benchmarks/flops.py

Each figure is the cost of one guided step in units of one conditional forward pass.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from trimtab.guidance.branch import Branch
from trimtab.guidance.plugins.pag import IdentityAttention
from trimtab.pipelines.conditions import Conditions
from trimtab.pipelines.denoiser import Call, Denoiser

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}


def sd15(rows: int) -> dict[str, Any]:
    """Arguments of one SD1.5 call at 512x512."""
    return {
        "sample": torch.empty(rows, 4, 64, 64, device="meta"),
        "timestep": torch.ones((), device="meta"),
        "encoder_hidden_states": torch.empty(rows, 77, 768, device="meta"),
    }


def sdxl(rows: int) -> dict[str, Any]:
    """Arguments of one SDXL call at 1024x1024."""
    return {
        "sample": torch.empty(rows, 4, 128, 128, device="meta"),
        "timestep": torch.ones((), device="meta"),
        "encoder_hidden_states": torch.empty(rows, 77, 2048, device="meta"),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(rows, 1280, device="meta"),
            "time_ids": torch.empty(rows, 6, device="meta"),
        },
    }


def sd3(rows: int) -> dict[str, Any]:
    """Arguments of one SD3 call at 1024x1024 with 333 text tokens."""
    return {
        "hidden_states": torch.empty(rows, 16, 128, 128, device="meta"),
        "timestep": torch.ones(rows, device="meta"),
        "encoder_hidden_states": torch.empty(rows, 333, 4096, device="meta"),
        "pooled_projections": torch.empty(rows, 2048, device="meta"),
    }


ARCHITECTURES = {
    "SD1.5": (UNet2DConditionModel, SD15, sd15),
    "SDXL": (UNet2DConditionModel, SDXL, sdxl),
    "SD3 medium": (SD3Transformer2DModel, SD3_MEDIUM, sd3),
}


def forwards(name: str, own: int, layers: str = "auto", share_prefix: bool = True) -> float:
    """Cost of one step with PAG beside `own` rows of the pipeline, in conditional forward passes.

    Args:
        name: of `ARCHITECTURES`.
        own: 2 with classifier-free guidance, 1 without.
        layers: the perturbed layers.
        share_prefix: whether perturbed rows skip the blocks in which they do not differ.
    """
    kind, config, arguments = ARCHITECTURES[name]
    with torch.device("meta"):
        module = kind(**config).eval()
    pipe = SimpleNamespace()
    with ExitStack() as stack, torch.no_grad():
        denoiser = Denoiser(module, Conditions(pipe, {}, stack), stack)
        branch = Branch("cond", IdentityAttention(denoiser.family.resolve(layers, "pag")))
        roles = ["uncond", "cond"][2 - own :]
        with FlopCounterMode(display=False) as one:
            module(**arguments(1))
        with FlopCounterMode(display=False) as guided:
            nothing = torch.empty(0)
            call = Call(module, module._call_impl, (), arguments(own), own, roles, nothing, nothing)
            denoiser.call_joined(call, [branch], share_prefix)
    return guided.get_total_flops() / one.get_total_flops()


def main() -> None:
    """Print the table."""
    print("| architecture | CFG + PAG | PAG alone | CFG + PAG, without shared prefix |")
    print("| --- | --- | --- | --- |")
    for name in ARCHITECTURES:
        plain = forwards(name, 2, share_prefix=False)
        print(f"| {name} | {forwards(name, 2):.3f} | {forwards(name, 1):.3f} | {plain:.3f} |")


if __name__ == "__main__":
    main()
