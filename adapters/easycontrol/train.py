"""`trimtab train easycontrol`: a LoRA for one kind of condition on a Flux model.

Flow matching, `|| v_theta((1 - s) x + s n, s, c) - (n - x) ||^2` with s uniform over the scheduler's levels and the
guidance input at 1. The condition's tokens make their keys and values in a pass of their own, as they do when sampling;
only their LoRA is trained. The size of the image is drawn for each batch, and the positions of the condition with it.
An image keeps its aspect ratio; in a batch the others are cut to that of one. Subjects are mirrored and turned.
Captions are left out with probability `caption_dropout`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch.nn import functional as F

from ...guidance.shipped import located
from ...training import TrainingSettings, option, train
from ..allowed import check_choice, check_range
from ..low_rank import LowRank
from ..pairs import Pairs, unsquashed
from ..trained import Trained
from ..weights import save_weights
from .checkpoint import attentions_of, projections_of, written
from .condition import positions
from .processors import FillProcessor, StepProcessor
from .shapes import chance, drawn_shape, turned

FILE = "easycontrol.safetensors"


@dataclass(frozen=True, kw_only=True)
class EasyControlSettings(TrainingSettings):
    """What a training run of an EasyControl LoRA is made of; stored beside the weights."""

    output: str = option(
        "runs/easycontrol", "folder for the LoRA, its checkpoints and its log; a stopped run continues there"
    )
    base: str = option("black-forest-labs/FLUX.1-dev", "the Flux model, a folder or Hub repository")
    data: str = option("data", "JSONL file with a column caption, or folder, perhaps with captions.jsonl")
    source: str = option("source", "column or folder of the conditions")
    target: str = option("target", "column or folder of the images")
    kind: str = option("spatial", "spatial or subject")
    rank: int = option(128, "of the LoRA")
    cond_size: int = option(512, "side of the condition, in pixels")
    smallest: int = option(512, "shortest longest side of an image, in pixels")
    largest: int = option(1024, "longest side of an image, in pixels")
    aspect: float = option(4 / 3, "largest aspect ratio, beyond which images are cut; 1 for squares only")
    caption_dropout: float = option(0.1, "share of captions left out")
    gradient_checkpointing: int = option(0, "1 to compute activations again in the backward pass, to save memory")
    batch_size: int = option(1, "samples a step and process")
    learning_rate: float = option(1e-4, "its highest value")
    weight_decay: float = option(1e-2, "of AdamW")
    ema_decay: float = option(0.0, "of the averaged weights; 0 for none")
    max_sequence_length: int = option(512, "tokens of a caption")
    validation_steps: int = option(20, "denoising steps of a validation image")

    def __post_init__(self) -> None:
        check_choice("easycontrol", "kind", self.kind, ("spatial", "subject"))
        check_range("easycontrol", "caption_dropout", self.caption_dropout, 0, 1)
        check_range("easycontrol", "aspect", self.aspect, 1)
        check_range("easycontrol", "smallest", self.smallest, 1, self.largest)


class TrainProcessor(FluxAttnProcessor):
    """Both processors in one, so that a block computed again in the backward pass finds the right one."""

    def __init__(self, fill: FillProcessor) -> None:
        super().__init__()
        self.fill, self.step = fill, StepProcessor()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        fills: tuple[torch.Tensor, ...] | None = None,
    ) -> Any:
        given = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        return self.fill(*given) if fills is None else self.step(*given, fills=fills)


class EasyControlTraining(Trained):
    """The LoRA, and the frozen transformer's prediction under it.

    Args:
        transformer: a `FluxTransformer2DModel`; its processors are exchanged.
        rank: of the LoRA.
        kind: of the condition.
    """

    def __init__(self, transformer: Any, rank: int, kind: str) -> None:
        super().__init__()
        self.__dict__["transformer"] = transformer.requires_grad_(False)
        self.kind = kind
        self.layers: dict[str, dict[str, LowRank]] = {}
        last = list(attentions_of(transformer))[-1]
        for layer, projection, width_in, width_out in projections_of(transformer):
            # What the condition's tokens look for in the last attention is never used, so no gradient reaches it.
            unused = layer == last and projection == "q"
            nothing = LowRank(torch.zeros(rank, width_in), torch.zeros(width_out, rank))
            used = None if unused else self.low_rank(rank, width_in, width_out, 1 / rank)
            self.layers.setdefault(layer, {})[projection] = used or nothing
        self._processors: dict[str, TrainProcessor] = {}
        for layer, attention in attentions_of(transformer).items():
            cut = layer == last and layer.startswith("single_")
            self._processors[layer] = TrainProcessor(FillProcessor(self.layers[layer], 1.0, last=cut))
            attention.set_processor(self._processors[layer])

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor, **given: Any) -> torch.Tensor:
        """The prediction `[batch, tokens, channels]` for noised tokens, under a condition's tokens."""
        rows = torch.arange(len(tokens), device=tokens.device)
        side = round(condition.shape[1] ** 0.5)
        self.__dict__["transformer"](
            hidden_states=condition,
            encoder_hidden_states=given["encoder_hidden_states"][:, :0],
            pooled_projections=given["pooled_projections"],
            timestep=torch.zeros_like(given["timestep"]),
            guidance=given["guidance"],
            img_ids=positions(self.kind, side, given["img_ids"]),
            txt_ids=given["txt_ids"][:0],
        )
        for processor in self._processors.values():
            assert processor.fill.recorded is not None
            processor.step.memory, processor.step.biases = [processor.fill.recorded], [0.0]
        output = self.__dict__["transformer"](
            hidden_states=tokens, **given, joint_attention_kwargs={"fills": (rows,)}, return_dict=False
        )
        return output[0]


def train_easycontrol(settings: EasyControlSettings) -> Path:
    """Train, or continue where the last checkpoint in `settings.output` stopped; returns the LoRA's file."""
    torch.manual_seed(settings.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision, torch.float32)
    pipe = FluxPipeline.from_pretrained(located(settings.base), torch_dtype=dtype, use_safetensors=True)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, part).requires_grad_(False)
    if settings.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    model = EasyControlTraining(pipe.transformer, settings.rank, settings.kind)
    subject = settings.kind == "subject"
    data = Pairs(settings.data, settings.largest, settings.source, settings.target, whole=True, padded=subject)
    held = {name: [value] if name == "caption" else value[None] for name, value in data[0].items()}
    file = Path(settings.output) / FILE

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        return flow_matching_loss(model, pipe, batch, settings, generator)

    def export(model: Any) -> None:
        made_with = {"base": settings.base, "kind": settings.kind, "settings": json.dumps(settings.to_store())}
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in written(model.layers).items()}
        save_weights(file, tensors, made_with)

    def validate(model: Any) -> dict[str, float]:
        generator = torch.Generator(pipe.device).manual_seed(0)
        value = flow_matching_loss(model, pipe, held, settings, generator).item()
        if PartialState().is_main_process:
            folder = Path(settings.output) / "validation"
            folder.mkdir(parents=True, exist_ok=True)
            number = len(list(folder.glob("*.png")))
            sample(model, pipe, held, settings, generator).save(folder / f"{number:04d}.png")
        return {"validation_loss": value}

    train("easycontrol", model, data, loss, settings, export, validate)
    return file


def flow_matching_loss(
    model: Any, pipe: Any, batch: Any, settings: EasyControlSettings, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared velocity error of one batch of `source`, `target` and `caption`."""
    pipe.to(generator.device)
    patch, sides = 2 * pipe.vae_scale_factor, (settings.smallest, settings.largest)
    aspect, size = drawn_shape(batch["aspect"], sides, settings.aspect, patch, generator)
    captions = [" " if chance(generator) < settings.caption_dropout else text for text in batch["caption"]]
    with torch.no_grad():
        target = unsquashed(batch["target"].to(generator.device), batch["aspect"], aspect, size)
        clean = tokens_of(pipe, target, generator)
        source = batch["source"].to(generator.device)
        varied = {"source": turned(source, generator) if settings.kind == "subject" else source}
        condition = condition_of(pipe, {**batch, **varied}, settings, aspect, generator)
        given = conditioning(pipe, captions, *size, settings.max_sequence_length)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
    sigmas = pipe.scheduler.sigmas[: pipe.scheduler.config.num_train_timesteps].to(clean.device)
    chosen = torch.randint(len(sigmas), (len(clean),), generator=generator, device=clean.device)
    s = sigmas[chosen].to(clean.dtype)
    noised = (1 - s[:, None, None]) * clean + s[:, None, None] * noise
    velocity = model(noised, condition, timestep=s, **given)
    return F.mse_loss(velocity.float(), (noise - clean).float())


def tokens_of(pipe: Any, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Packed latents `[batch, tokens, channels]` of images `[batch, 3, height, width]`."""
    vae = pipe.vae
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample(generator)
    latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)


def condition_of(
    pipe: Any, batch: Any, settings: EasyControlSettings, aspect: float, generator: torch.Generator
) -> torch.Tensor:
    """The condition's tokens; of a spatial one the same part as of the image is squashed to a square."""
    source, size = batch["source"].to(generator.device), (settings.cond_size, settings.cond_size)
    if settings.kind == "spatial":
        return tokens_of(pipe, unsquashed(source, batch["aspect"], aspect, size), generator)
    return tokens_of(pipe, F.interpolate(source, size, mode="bilinear", antialias=True), generator)


def conditioning(pipe: Any, captions: list[str], height: int, width: int, length: int) -> dict[str, Any]:
    """The transformer's arguments but for tokens and timestep."""
    embeds, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=length)
    patch = 2 * pipe.vae_scale_factor
    ids = pipe._prepare_latent_image_ids(1, height // patch, width // patch, embeds.device, embeds.dtype)
    distilled = pipe.transformer.config.guidance_embeds
    return {
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "txt_ids": text_ids,
        "img_ids": ids,
        "guidance": torch.ones(len(captions), device=embeds.device) if distilled else None,
    }


@torch.no_grad()
def sample(model: Any, pipe: Any, batch: Any, settings: EasyControlSettings, generator: torch.Generator) -> Any:
    """One image under a condition, by Euler's method on evenly spaced levels."""
    side = settings.largest
    given = conditioning(pipe, batch["caption"][:1], side, side, settings.max_sequence_length)
    given["guidance"] = None if given["guidance"] is None else 3.5 * given["guidance"]
    condition = condition_of(pipe, batch, settings, 1.0, generator)[:1]
    shape = (1, len(given["img_ids"]), pipe.transformer.config.in_channels)
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=condition.dtype)
    levels = torch.linspace(1, 0, settings.validation_steps + 1, device=x.device, dtype=x.dtype)
    for level, following in itertools.pairwise(levels):
        x = x + (following - level) * model(x, condition, timestep=level[None], **given)
    latents = pipe._unpack_latents(x, side, side, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0)
    return pipe.image_processor.postprocess(pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0])[0]
