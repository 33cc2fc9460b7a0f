"""`trimtab train unicon`: the joint attention and the LoRAs of one kind of partner on a Stable Diffusion UNet.

Noise prediction on both sides at independent timesteps,

    w(t_x) || eps_theta(x_{t_x}; y_{t_y}) - n_x ||^2 + w(t_y) || eps_theta(y_{t_y}; x_{t_x}) - n_y ||^2

with the min-SNR weight w (arXiv:2303.09556). The text of x alone, of y alone, or of both is left out, by an embedding
of zeros, with probability `text_dropout` each. Both images of a pair are cut and mirrored alike: a part at a random
place, of a shape that is drawn for each batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr

from ...guidance.shipped import located
from ...training import TrainingSettings, option, train
from ..allowed import check_range
from ..cuts import Cut, middle_parts, random_parts, side_to_cut_from
from ..low_rank import LowRank
from ..pairs import Pairs
from ..trained import Trained
from .checkpoint import PROJECTIONS, Block, blocks_of, save
from .partner import in_full_precision
from .processors import JointProcessor, Pair


@dataclass(frozen=True, kw_only=True)
class UniConSettings(TrainingSettings):
    """What a training run of a UniCon model is made of; stored beside the weights."""

    output: str = option(
        "runs/unicon", "folder for the model, its checkpoints and its log; a stopped run continues there"
    )
    base: str = option("stable-diffusion-v1-5/stable-diffusion-v1-5", "the base model, a folder or Hub repository")
    data: str = option("data", "JSONL file with a column caption, or folder, perhaps with captions.jsonl")
    source: str = option("source", "column or folder of the partners y")
    target: str = option("target", "column or folder of the images x")
    trigger: str = option("", "put before the captions of y, such as 'depth_map, '")
    size: int = option(512, "root of the area of an image, in pixels")
    aspect: float = option(1.5, "largest aspect ratio")
    crop: float = option(
        0.75, "least area of what is cut out at random, of the largest part of that shape; 0 for the middle of all"
    )
    flip: float = option(0.5, "share of pairs that are mirrored")
    rank: int = option(64, "of the LoRAs")
    mixing: int = option(1, "1 if the two sides lie on each other and the post projection mixes them")
    partner_lora: int = option(1, "1 if the block's own attentions get a LoRA on y")
    text_dropout: float = option(0.1, "share of texts left out of x alone, of y alone, and of both")
    snr_gamma: float = option(5.0, "of the min-SNR weight; 0 for none")
    gradient_checkpointing: int = option(0, "1 to compute activations again in the backward pass, to save memory")
    batch_size: int = option(16, "pairs a step and process")
    learning_rate: float = option(1e-4, "its highest value")
    warmup: int = option(500, "steps until it is reached")
    weight_decay: float = option(1e-2, "of AdamW")
    ema_decay: float = option(0.0, "of the averaged weights; 0 for none")

    def __post_init__(self) -> None:
        for name in ("crop", "flip"):
            check_range("unicon", name, getattr(self, name), 0, 1)
        check_range("unicon", "text_dropout", self.text_dropout, 0, 1 / 3)  # of x, of y and of both
        check_range("unicon", "aspect", self.aspect, 1)


class UniConTraining(Trained):
    """The additions to the UNet, and its predictions for pairs.

    Args:
        unet: a `UNet2DConditionModel`; its processors are exchanged.
        settings: of the run.
    """

    def __init__(self, unet: Any, settings: UniConSettings) -> None:
        super().__init__()
        self.__dict__["unet"] = unet.requires_grad_(False)
        self.blocks: dict[str, Block] = {}
        for name, block in blocks_of(unet).items():
            width = block.attn1.out_dim * (2 if settings.mixing else 1)
            own = {part: self._loras(getattr(block, part), settings.rank) for part in ("attn1", "attn2")}
            added = Block(
                self.add(torch.zeros(width, width)),
                self._loras(block.attn1, settings.rank),
                self._loras(block.attn1, settings.rank),
                own if settings.partner_lora else {},
            )
            self.blocks[name] = added
            pair = Pair(0, 1, added.x, added.y, added.post, 1.0)
            for part, pairs in (("attn1", (pair,)), ("attn2", ())):
                attention = getattr(block, part)
                attention.set_processor(JointProcessor(({}, added.y_own.get(part, {})), pairs))

    def _loras(self, attention: Any, rank: int) -> dict[str, LowRank]:
        linears = {projection: attention.get_submodule(projection) for projection in PROJECTIONS}
        return {n: self.low_rank(rank, one.in_features, one.out_features, 1 / rank) for n, one in linears.items()}

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, **more: Any) -> torch.Tensor:
        """Predictions `[2 * pairs, ...]`; the rows of all arguments are x, y, x, y, ..."""
        joined = torch.ones(len(sample) // 2, dtype=torch.bool)
        options = {"joined": joined}
        return self.__dict__["unet"](sample, timestep, text, cross_attention_kwargs=options, return_dict=False, **more)[
            0
        ]


def train_unicon(settings: UniConSettings) -> Path:
    """Train, or continue where the last checkpoint in `settings.output` stopped; returns the model's folder."""
    torch.manual_seed(settings.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision, torch.float32)
    pipe = DiffusionPipeline.from_pretrained(located(settings.base), torch_dtype=dtype, use_safetensors=True)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).requires_grad_(False)
    if settings.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()
    model = UniConTraining(pipe.unet, settings)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    data = pairs_of(settings)
    held = {name: [value] if name == "caption" else value[None] for name, value in data[0].items()}
    folder = Path(settings.output) / "model"

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        return pair_loss(model, pipe, scheduler, batch, settings, generator)

    def export(model: Any) -> None:
        save(folder, copy.deepcopy(model.blocks))

    def validate(model: Any) -> dict[str, float]:
        generator = torch.Generator(pipe.device).manual_seed(0)
        return {"validation_loss": pair_loss(model, pipe, scheduler, held, settings, generator).item()}

    train("unicon", model, data, loss, settings, export, validate)
    return folder


def pairs_of(settings: UniConSettings) -> Pairs:
    """The training data, as what is cut from them asks for them."""
    side = side_to_cut_from(settings.size, settings.aspect, settings.crop or 1.0)
    return Pairs(settings.data, side, settings.source, settings.target, whole=settings.crop > 0)


def pair_loss(
    model: Any, pipe: Any, scheduler: Any, batch: Any, settings: UniConSettings, generator: torch.Generator
) -> torch.Tensor:
    """The weighted error on both sides of one batch of `source` (y), `target` (x) and `caption`."""
    pipe.to(generator.device)
    size = drawn_size(settings, pipe.vae_scale_factor * 2 ** (len(pipe.unet.down_blocks) - 1), generator)
    cut = drawn_cut(batch, size, settings, generator)
    with torch.no_grad():
        sides = []
        for name in ("target", "source"):
            pixels = cut(batch[name].to(generator.device))
            with in_full_precision(pipe.vae):
                latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.sample(generator)
            sides.append((latents * pipe.vae.config.scaling_factor).to(pipe.unet.dtype))
        clean = torch.stack(sides, dim=1).flatten(0, 1)
        text, more = prompts(pipe, batch["caption"], settings.trigger, size)
        kept = text_mask(len(batch["caption"]), settings.text_dropout, generator).flatten()
        text = text * kept[:, None, None].to(text)
        if more:  # of SDXL, which also sees the pooled text
            pooled = more["added_cond_kwargs"]["text_embeds"]
            more["added_cond_kwargs"]["text_embeds"] = pooled * kept[:, None].to(pooled)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        levels = scheduler.config.num_train_timesteps
        t = torch.randint(levels, (len(clean),), generator=generator, device=clean.device)
        noised = scheduler.add_noise(clean, noise, t)
    velocity = scheduler.config.prediction_type == "v_prediction"
    wanted = scheduler.get_velocity(clean, noise, t) if velocity else noise
    error = (model(noised, t, text, **more).float() - wanted.float()).square().flatten(1).mean(dim=1)
    return (error * min_snr_weight(scheduler, t, settings.snr_gamma)).mean()


def min_snr_weight(scheduler: Any, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """`min(SNR, gamma) / SNR` for noise prediction, `min(SNR, gamma) / (SNR + 1)` for velocity; 1 where gamma is 0."""
    if gamma == 0:
        return torch.ones(len(t), device=t.device)
    snr = compute_snr(scheduler, t)
    return snr.clamp(max=gamma) / (snr + (scheduler.config.prediction_type == "v_prediction"))


def text_mask(pairs: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Which texts stay, `[pairs, 2]`: those of x alone, of both, and of y alone are left out with equal probability."""
    u = _uniform(generator, pairs)
    return torch.stack([u >= 2 * share, (u < share) | (u >= 3 * share)], dim=1)


def drawn_size(settings: UniConSettings, multiple: int, generator: torch.Generator) -> tuple[int, int]:
    """Height and width of a batch: a constant area, and an aspect ratio between the largest and its inverse."""
    exponent = 2 * float(_uniform(generator, 1)) - 1
    aspect = settings.aspect**exponent
    height, width = settings.size * aspect**0.5, settings.size / aspect**0.5
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (height, width))


def drawn_cut(batch: Any, size: tuple[int, int], settings: UniConSettings, generator: torch.Generator) -> Cut:
    """What is cut out of both images of each pair of a batch."""
    if settings.crop == 0:
        return middle_parts(size, settings.flip, generator)
    return random_parts(batch["aspect"], size, settings.crop, settings.flip, generator)


def prompts(pipe: Any, captions: list[str], trigger: str, size: tuple[int, int]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The text of both sides, x, y, x, y, ..., and what else SDXL's UNet takes."""
    texts = [text for caption in captions for text in (caption, trigger + caption)]
    encoded = pipe.encode_prompt(
        prompt=texts, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if len(encoded) < 4:
        return encoded[0], {}
    ids = torch.tensor([[*size, 0, 0, *size]] * len(texts), device=pipe.device, dtype=encoded[0].dtype)
    return encoded[0], {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": ids}}


def _uniform(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.rand(count, generator=generator, device=generator.device)
