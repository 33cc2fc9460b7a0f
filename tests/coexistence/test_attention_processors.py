"""Attention computed in slices, by older processors or by a chosen backend: perturbed all the same, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from guided_runs import close
from recorder import recorded
from zoo import CASES, run

import trimtab
from trimtab.pipelines.processors import stand_in


def by_processor(kind: str, *arguments: Any) -> Callable[[Any], None]:
    return lambda pipe: pipe.unet.set_attn_processor(getattr(attention_processor, kind)(*arguments))


OTHERS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "slices": ("sd15", lambda pipe: pipe.enable_attention_slicing()),
    "slices of one head": ("sd15", lambda pipe: pipe.enable_attention_slicing(1)),
    "classic": ("sd15", by_processor("AttnProcessor")),
    "slices beside added keys": ("if_", lambda pipe: pipe.unet.set_attention_slice(1)),
    "classic beside added keys": ("if_", by_processor("AttnAddedKVProcessor")),
    "flux, math backend": ("flux", lambda pipe: pipe.transformer.set_attention_backend("_native_math")),
    "flux, flex backend": ("flux", lambda pipe: pipe.transformer.set_attention_backend("flex")),
    "wan, math backend": ("wan", lambda pipe: pipe.transformer.set_attention_backend("_native_math")),
}


@pytest.mark.parametrize("plugin", ["pag", "seg"])
@pytest.mark.parametrize("how", OTHERS)
def test_however_attention_is_computed_its_perturbation_is_the_same(how: str, plugin: str) -> None:
    name, choose = OTHERS[how]
    pipe: Any = trimtab.guide(CASES[name].build())
    with pipe.guidance(plugin, scale=3.0):
        expected = run(pipe, CASES[name])
    choose(pipe)
    stock = run(pipe, CASES[name])
    chosen = attention_kinds(pipe, name)
    with pipe.guidance(plugin, scale=3.0):
        close(run(pipe, CASES[name]), expected, 1e-4)
    assert (expected - stock).abs().max() > 1e-3 * stock.abs().max()
    assert attention_kinds(pipe, name) == chosen
    assert torch.equal(run(pipe, CASES[name]), stock)


def attention_kinds(pipe: Any, name: str) -> list[tuple[type, Any]]:
    processors = getattr(pipe, CASES[name].denoiser).attn_processors.values()
    return [(type(one), getattr(one, "_attention_backend", None)) for one in processors]


class Own:
    """A processor whose attention is its own formula."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("rows", ["auto", "sequential"])
@pytest.mark.parametrize("plugin", ["pag", "seg", "sag"])
def test_a_processor_with_a_formula_of_its_own_is_refused_before_the_first_call(plugin: str, rows: str) -> None:
    pipe = CASES["sd15"].build()
    pipe.unet.set_attn_processor(Own())
    record = recorded(pipe, "unet")
    guided: Any = trimtab.guide(pipe)
    guided.guidance_rows = rows
    with pytest.raises(trimtab.UnsupportedPipelineError, match=f"Own calls neither .* so {plugin} cannot act"):
        guided.add_guidance(plugin, scale=1.0)
        run(guided, CASES["sd15"])
    assert not record.forwards


def test_a_stand_in_shares_what_the_processor_knows() -> None:
    pipe = CASES["flux"].build()
    attention = pipe.transformer.transformer_blocks[0].attn
    twin = stand_in(attention)
    assert type(twin) is not type(attention.processor) and isinstance(twin, type(attention.processor))
    assert vars(twin) is vars(attention.processor)
