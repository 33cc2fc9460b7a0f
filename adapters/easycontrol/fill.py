"""The pass that fills a condition's cache: the stock forward over its tokens alone, with no text, at timestep 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...guidance.run import DenoiserCall
from .checkpoint import Layers
from .condition import positions
from .processors import FillProcessor, KeysAndValues


def fill(
    call: DenoiserCall,
    attentions: Mapping[str, Any],
    kind: str,
    layers: Layers,
    weight: float,
    tokens: torch.Tensor,
    given: Mapping[str, Any],
    rows: torch.Tensor,
) -> dict[str, KeysAndValues]:
    """The keys and values that a condition leaves in each attention.

    Args:
        call: the denoiser call that the condition is wanted for.
        attentions: of the transformer, in call order.
        kind: `"spatial"` or `"subject"`.
        layers, weight: the LoRA.
        tokens: of the condition, `[fills, tokens, channels]`.
        given: the call's arguments by name.
        rows: whose prompt and guidance value each fill has.
    """
    guidance = given.get("guidance")
    scale = (given.get("joint_attention_kwargs") or {}).get("scale")
    with _recording(call.module, attentions, layers, weight) as processors:
        call.apart(
            hidden_states=tokens,
            encoder_hidden_states=given["encoder_hidden_states"][rows, :0],
            pooled_projections=given["pooled_projections"][rows],
            timestep=torch.zeros_like(given["timestep"][rows]),
            guidance=None if guidance is None else guidance[rows],
            img_ids=positions(kind, math.isqrt(tokens.shape[1]), given["img_ids"]),
            txt_ids=given["txt_ids"][:0],
            joint_attention_kwargs=None if scale is None else {"scale": scale},
            return_dict=False,
        )
    return {name: processor.recorded for name, processor in processors.items() if processor.recorded is not None}


@contextmanager
def _recording(
    transformer: Any, attentions: Mapping[str, Any], layers: Layers, weight: float
) -> Iterator[dict[str, FillProcessor]]:
    """Processors that apply the LoRA and record; of the last block only what its keys and values need."""
    last = next(reversed(list(attentions)))
    cut = last if last.startswith("single_") else None
    processors: dict[str, FillProcessor] = {}
    with ExitStack() as stack:
        for name, attention in attentions.items():
            stack.callback(setattr, attention, "processor", attention.processor)
            processor = FillProcessor(layers[name], weight, last=name == cut)
            processor._attention_backend = attention.processor._attention_backend
            processors[name] = attention.processor = processor
        if cut is not None:
            block = transformer.get_submodule(cut.rpartition(".")[0])
            for part in (block.proj_mlp, block.proj_out):
                if "forward" not in part.__dict__:  # else offloading holds it, and must see it run
                    stack.callback(part.__dict__.pop, "forward", None)
                    part.__dict__["forward"] = _zeros(part.out_features)
        yield processors


def _zeros(width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A projection whose result does not matter, for free."""
    return lambda states: states.new_zeros(()).expand(*states.shape[:-1], width)
