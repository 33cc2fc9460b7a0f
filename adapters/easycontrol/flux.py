"""EasyControl attached to a Flux transformer for one run of a pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from ...guidance.errors import ParameterError, UnsupportedPipelineError
from ...guidance.run import DenoiserCall, Run, Step
from ...guidance.source import is_repository
from ..batch import images_for_each, prompts_of
from ..pictures import pictures
from ..weights import load_weights
from .bank import Bank
from .checkpoint import Layers, attentions_of, read
from .condition import encode, layout
from .fill import fill
from .processors import StepProcessor


class Settings(Protocol):
    """The parameters of the guidance, see `guidance/plugins/easycontrol.py`."""

    weights: str | None
    weight_name: str | None
    revision: str | None
    sha256: str | None
    lora_index: int
    lora_weight: float
    image: Any
    kind: Any
    cond_size: int
    offload_cache: bool

    def acts(self, step: Step) -> bool: ...


@dataclass
class Condition:
    """One attached condition in this run."""

    settings: Settings
    bias: float
    layers: Layers
    images: Sequence[Image.Image]
    bank: Bank
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """`[draws, tokens, channels]`, once encoded: one for each picture, or for each image that has its own generator."""

    def picture(self, number: int, count: int) -> Image.Image:
        """The picture for one of so many alike rows: all of one prompt, or image, follow one another."""
        return self.images[number * len(self.images) // count]


class FluxEasyControl:
    """The conditions of one run, in the order subjects, then spatial ones, each as they were attached.

    Args:
        run: of any of the guidances.
        transformer: the `FluxTransformer2DModel`.

    Raises:
        UnsupportedPipelineError: the transformer takes more than latents, or attends by a processor of another kind.
    """

    def __init__(self, run: Run, transformer: nn.Module) -> None:
        self._run, self._pipe, self._transformer = run, run.pipeline, transformer
        self._attentions = attentions_of(transformer)
        self._conditions: list[Condition] = []
        self._encoded = False
        self._check()

    def _check(self) -> None:
        kind = type(self._pipe).__name__
        config: Any = self._transformer.config
        vae = getattr(self._pipe, "vae", None)
        if vae is None or config.in_channels != 4 * vae.config.latent_channels:
            raise UnsupportedPipelineError(
                f"easycontrol: {kind} needs an autoencoder whose packed latents are the transformer's only input; use "
                "FluxPipeline, FluxImg2ImgPipeline or FluxInpaintPipeline with FLUX.1-dev."
            )
        others = {type(a.processor).__name__ for a in self._attentions.values()} - {"FluxAttnProcessor"}
        if others and not any(isinstance(a.processor, StepProcessor) for a in self._attentions.values()):
            raise UnsupportedPipelineError(
                f"easycontrol: attention by {', '.join(sorted(others))} cannot attend to a condition as well; needed: "
                "FluxAttnProcessor. Unload the IP-Adapter: pipe.unload_ip_adapter()."
            )

    # -- conditions ------------------------------------------------------------------------------------------------
    def add(self, settings: Settings, bias: float) -> None:
        """Attach a condition for this run.

        Args:
            settings: the guidance.
            bias: what is added to the logits of its columns.

        Raises:
            WeightsError, SourceError: weights that cannot be had or do not fit.
            ParameterError: images that cannot be read, or too few or too many of them.
        """
        patch = self._patch
        if settings.cond_size % patch:
            raise ParameterError(f"easycontrol: cond_size={settings.cond_size}; allowed: a multiple of {patch} pixels.")
        images = pictures(settings.image, "easycontrol")
        layers = self._layers(settings)
        if self._run.dry:
            return
        prompts, each = prompts_of(self._run.arguments), images_for_each(self._run.arguments)
        if len(images) not in (1, prompts, prompts * each):
            what = f"{prompts} prompts" + (f" with {each} images each" if each > 1 else "")
            raise ParameterError(
                f"easycontrol: image holds {len(images)} images for {what}; give one, or one for each prompt or image."
            )
        if not self._conditions:
            self.install()
        self._conditions.append(Condition(settings, bias, layers, images, Bank(settings.offload_cache)))
        self._conditions.sort(key=lambda condition: condition.settings.kind == "spatial")

    def _layers(self, settings: Settings) -> Layers:
        assert settings.weights is not None
        if self._run.dry and is_repository(settings.weights):
            return {}
        loaded = load_weights(
            settings.weights,
            weight_name=settings.weight_name,
            sha256=settings.sha256,
            revision=settings.revision,
        )
        return read(loaded.path, loaded.tensors, self._transformer, settings.lora_index)

    def install(self) -> None:
        """Put the processors into the transformer, and the rest around its calls, until the run ends."""
        self._steps = {name: StepProcessor() for name in self._attentions}
        for name, attention in self._attentions.items():
            stock: Any = attention.processor
            step = self._steps[name]
            step._attention_backend, step._parallel_config = stock._attention_backend, stock._parallel_config
            self._run.replace(attention, "processor", step)
        self._run.around_denoiser(self._around)
        self._run.exit_stack.callback(self._release)

    def _release(self) -> None:
        self._conditions.clear()
        self.attend(())

    @property
    def _patch(self) -> int:
        """Pixels that one token's side covers."""
        return 2 * int(self._pipe.vae_scale_factor)

    # -- tokens ----------------------------------------------------------------------------------------------------
    def _encode(self) -> None:
        """Encode all conditions, those of one kind and size stacked; the generator's noise has been drawn by now."""
        generator = self._run.arguments.get("generator")
        alike = itertools.groupby(self._conditions, lambda one: (one.settings.kind, one.settings.cond_size))
        for (kind, size), group in alike:
            members = list(group)
            count = max(len(one.images) for one in members)
            stacks = [
                torch.cat([layout(one.picture(i, count), kind, size, self._patch) for one in members], dim=2)
                for i in range(count)
            ]
            tokens = encode(self._pipe, stacks, generator)
            for one, part in zip(members, tokens.chunk(len(members), dim=1), strict=True):
                one.tokens = part if isinstance(generator, list) else part[:: count // len(one.images)]
        self._encoded = True

    # -- a call of the denoiser ------------------------------------------------------------------------------------
    def _around(self, step: Step, call: DenoiserCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not self._encoded:
            with torch.no_grad():
                self._encode()
        acting = [one for one in self._conditions if one.settings.acts(step)]
        given = call.named(args, kwargs)
        fills = tuple(self._fills(one, call, given) for one in acting)
        self.attend(acting)
        if not acting:
            return call(*args, **kwargs)
        given["joint_attention_kwargs"] = {**(given.get("joint_attention_kwargs") or {}), "fills": fills}
        return call(**given)

    def attend(self, acting: Sequence[Condition]) -> None:
        """Let text and image attend to these conditions, whose banks are filled."""
        for name, processor in self._steps.items():
            processor.memory = [one.bank.layers[name] for one in acting]
            processor.biases = [one.bias for one in acting]

    def _fills(self, one: Condition, call: DenoiserCall, given: Mapping[str, Any]) -> torch.Tensor:
        """Which fill of its bank belongs to each row; those that are missing are made."""
        pooled, guidance = given["pooled_projections"], given.get("guidance")
        rows = torch.arange(len(pooled), device=pooled.device)
        # Rows of further branches follow in the order of the pipeline's own.
        images = prompts_of(self._run.arguments) * images_for_each(self._run.arguments)
        draw = rows % images * len(one.tokens) // images
        parts = [draw[:, None].float(), pooled.float()]
        parts += [] if guidance is None else [guidance.float()[:, None]]
        keys = torch.cat(parts, dim=1)
        if new := one.bank.missing(keys):
            chosen = torch.tensor(new, device=pooled.device)
            tokens = one.tokens.to(given["hidden_states"])[draw[chosen]]
            control = one.settings.kind, one.layers, one.settings.lora_weight
            one.bank.add(keys[chosen], fill(call, self._attentions, *control, tokens, given, chosen))
        return one.bank.index(keys)
