"""Forward FLOPs of guidance, counted on real architectures without weights (meta device).

    python benchmarks/flops.py

Each figure is the cost of one guided step in units of one conditional forward pass; those of EasyControl in units of
the step without a condition.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from trimtab.adapters.easycontrol.bank import Bank
from trimtab.adapters.easycontrol.checkpoint import attentions_of, projections_of
from trimtab.adapters.easycontrol.fill import fill
from trimtab.adapters.easycontrol.flux import Condition, FluxEasyControl
from trimtab.adapters.low_rank import LowRank
from trimtab.adapters.unicon.checkpoint import PROJECTIONS as UNICON_PROJECTIONS
from trimtab.adapters.unicon.checkpoint import Block, blocks_of
from trimtab.adapters.unicon.partner import Partner
from trimtab.adapters.unicon.unet import UNetJoint
from trimtab.guidance.branch import AttentionTokens, Branch
from trimtab.guidance.plugins.pag import IdentityAttention
from trimtab.pipelines.call import Call
from trimtab.pipelines.conditions import Conditions
from trimtab.pipelines.denoiser import Denoiser
from trimtab.pipelines.tokens import Places

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
        perturbation = IdentityAttention(denoiser.family.resolve(layers, "pag"))
        branch = Branch("cond", perturbation)
        roles = ["uncond", "cond"][2 - own :]
        with FlopCounterMode(display=False) as one:
            module(**arguments(1))
        nothing = torch.empty(0)
        call = Call(module, module._call_impl, (), arguments(own), own, roles, nothing, nothing)
        # On the meta device no token can be looked at; of these architectures only SD3 joins others, after its image's.
        image = AttentionTokens(0, 64 * 64)
        known = {layer: Places(image, image) for layer in perturbation.layers}
        with (
            patch("trimtab.pipelines.perturbation.locate", return_value=known),
            FlopCounterMode(display=False) as guided,
        ):
            denoiser.call_joined(call, [branch], share_prefix)
    return guided.get_total_flops() / one.get_total_flops()


FLUX_DEV: dict[str, Any] = {"guidance_embeds": True}


def easycontrol(most: int = 2, side: int = 1024, cond_size: int = 512, rank: int = 128) -> tuple[list[float], float]:
    """Cost of a Flux-dev step with 1 to `most` conditions, and of filling one's cache, in steps without a condition.

    Args:
        most: spatial conditions of `cond_size` pixels.
        side: of the image, in pixels.
        rank: of the LoRA.
    """
    tokens = (side // 16) ** 2
    with torch.device("meta"):
        module = FluxTransformer2DModel(**FLUX_DEV).eval()
        given = {
            "hidden_states": torch.empty(1, tokens, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(512, 3),
        }
        loras: dict[str, dict[str, LowRank]] = {}
        for layer, projection, width_in, width_out in projections_of(module):
            low_rank = LowRank(torch.empty(rank, width_in), torch.empty(width_out, rank))
            loras.setdefault(layer, {})[projection] = low_rank
        vae = SimpleNamespace(config=SimpleNamespace(latent_channels=16))
        call: Any = SimpleNamespace(module=module, apart=module)
        with ExitStack() as stack, torch.no_grad():
            run: Any = SimpleNamespace(
                pipeline=SimpleNamespace(vae=vae, vae_scale_factor=8), exit_stack=stack, replace=setattr, dry=False,
                around_denoiser=lambda around: None,
            )  # fmt: skip
            with FlopCounterMode(display=False) as plain:
                module(**given)
            control = FluxEasyControl(run, module)
            control.install()
            settings: Any = SimpleNamespace()
            one = Condition(settings, 0.0, loras, [], Bank(offload=False))
            row = torch.zeros(1, dtype=torch.long)
            cond_tokens = torch.empty(1, (cond_size // 16) ** 2, 64)
            with FlopCounterMode(display=False) as filling:
                recorded = fill(call, attentions_of(module), "spatial", loras, 1.0, cond_tokens, given, row)
            one.bank.add(torch.empty(1, 1), recorded)
            unit, steps = plain.get_total_flops(), []
            for conditions in range(1, most + 1):
                control.attend([one] * conditions)
                with FlopCounterMode(display=False) as step:
                    module(**given, joint_attention_kwargs={"fills": (row,) * conditions})
                steps.append(step.get_total_flops() / unit)
    return steps, filling.get_total_flops() / unit


def joint(rows: int = 2, rank: int = 64) -> float:
    """Cost of a Stable Diffusion 1.5 call of UniCon with a partner in each row, in stock calls of as many images."""
    with torch.device("meta"):
        module = UNet2DConditionModel(**SD15).eval()
        given = sd15(2 * rows)
        blocks = {}
        for name, block in blocks_of(module).items():

            def loras(part: Any) -> dict[str, LowRank]:
                linears = {projection: part.get_submodule(projection) for projection in UNICON_PROJECTIONS}
                return {
                    projection: LowRank(torch.empty(rank, one.in_features), torch.empty(one.out_features, rank))
                    for projection, one in linears.items()
                }

            width = 2 * block.attn1.out_dim
            own = {part: loras(getattr(block, part)) for part in ("attn1", "attn2")}
            blocks[name] = Block(torch.empty(width, width), loras(block.attn1), loras(block.attn1), own)
        with ExitStack() as stack, torch.no_grad():
            scheduler = SimpleNamespace(order=1)
            run: Any = SimpleNamespace(
                pipeline=SimpleNamespace(scheduler=scheduler), exit_stack=stack, replace=setattr, dry=False,
                arguments={}, around_denoiser=lambda around: None,
            )  # fmt: skip
            with FlopCounterMode(display=False) as plain:
                module(**given)
            control = UNetJoint(run, module)
            control.install()
            settings: Any = SimpleNamespace(mode="condition", joint_scale=1.0)
            control.seat([None, Partner(settings, blocks, run)])
            joined = torch.ones(rows, dtype=torch.bool, device="cpu")
            with FlopCounterMode(display=False) as with_partner:
                module(**given, cross_attention_kwargs={"joined": joined})
    return with_partner.get_total_flops() / plain.get_total_flops()


def main() -> None:
    """Print the tables."""
    print("| architecture | CFG + PAG | PAG alone | CFG + PAG, without shared prefix |")
    print("| --- | --- | --- | --- |")
    for name in ARCHITECTURES:
        plain = forwards(name, 2, share_prefix=False)
        print(f"| {name} | {forwards(name, 2):.3f} | {forwards(name, 1):.3f} | {plain:.3f} |")
    print("\n| conditions, FLUX.1-dev at 1024 x 1024 | a step | the fill of each condition |")
    print("| --- | --- | --- |")
    steps, filling = easycontrol()
    for conditions, step in enumerate(steps, start=1):
        print(f"| {conditions} of 512 x 512 | {step:.4f} | {filling:.4f} |")
    print(f"\nUniCon on Stable Diffusion 1.5, 512 x 512: {joint():.4f} of as many rows without it")


if __name__ == "__main__":
    main()
