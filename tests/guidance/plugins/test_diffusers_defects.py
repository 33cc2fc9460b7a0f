"""Defects of Diffusers 0.42's guiders, each shown in the installed version beside what is done here.

A test whose first half fails says that Diffusers has mended the defect; its second half must hold in any case.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.guiders import (
    AutoGuidance,
    BaseGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._common import _get_submodule_from_fqn
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode, _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig, _gaussian_blur_2d
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor
from guided_runs import built, close, guided, stock, watched
from torch.nn import functional as F
from zoo import CASES, run

import trimtab
from trimtab.guidance.branch import AttentionTokens
from trimtab.guidance.errors import UnsupportedPipelineError
from trimtab.guidance.plugins.pag import IdentityAttention
from trimtab.guidance.plugins.seg import SmoothedQueries
from trimtab.pipelines.families import Family

MID = "mid_block.attentions.0.transformer_blocks"
SCALE = 3.0
PERTURBING: dict[str, Any] = {
    "pag": lambda g: PerturbedAttentionGuidance(
        g, SCALE, 0.0, 1.0, perturbed_guidance_config=LayerSkipConfig([0], MID, False, True, False)
    ),
    "slg": lambda g: SkipLayerGuidance(g, SCALE, 0.0, 1.0, skip_layer_config=LayerSkipConfig([0], MID)),
    "seg": lambda g: SmoothedEnergyGuidance(
        g, SCALE, seg_guidance_config=SmoothedEnergyGuidanceConfig([0], MID)
    ),
}  # fmt: skip


class Toy:
    """A UNet, a sample, and a pair of conditions; and how a modular denoising loop uses a guider."""

    def __init__(self) -> None:
        self.unet = CASES["sd15"].build().unet
        self.sample, self.timestep = torch.randn(1, 4, 16, 16), torch.tensor(500)
        self.cond, self.uncond = torch.randn(2, 1, 8, 32)

    def plain(self, text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.unet(self.sample, self.timestep, encoder_hidden_states=text).sample

    def guided(self, guider: BaseGuidance) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The prediction of each branch, and their combination, in the middle of a run."""
        guider.set_state(step=5, num_inference_steps=10, timestep=self.timestep)
        states = guider.prepare_inputs({"text": (self.cond, self.uncond)})
        for state in states:
            guider.prepare_models(self.unet)
            state.noise_pred = self.plain(state.text)
            guider.cleanup_models(self.unet)
        return [state.noise_pred for state in states], guider(states).pred


@pytest.fixture
def toy() -> Toy:
    return Toy()


# -- D1: with CFG off, PAG, SLG and SEG become plain CFG ---------------------------------------------------------------
@pytest.mark.parametrize("plugin", PERTURBING)
def test_d1_with_cfg_off_the_perturbation_acts_on_the_condition(toy: Toy, plugin: str) -> None:
    (cond, perturbed), result = toy.guided(PERTURBING[plugin](1.0))
    assert torch.equal(perturbed, toy.plain(toy.uncond))
    close(result, perturbed + SCALE * (cond - perturbed), 1e-6)

    record = watched("sd15", plugin, {"scale": SCALE, "start": 0.0, "stop": 1.0}, guidance_scale=1.0)
    for step in record.steps:
        (forward,) = step.forwards
        cond, perturbed = forward.output.split(1)
        text = forward.arguments["encoder_hidden_states"]
        assert torch.equal(text[0], text[1])
        assert not torch.allclose(cond, perturbed, atol=1e-4)
        close(step.model_output, cond + SCALE * (cond - perturbed), 1e-6)


def test_d1_seg_acts_at_all(toy: Toy) -> None:
    # Its `prepare_models` never counts, so that it never takes a pass for a perturbed one, with CFG or without.
    (cond, _, smoothed), _ = toy.guided(PERTURBING["seg"](5.0))
    assert torch.equal(smoothed, cond)
    assert not torch.allclose(guided("sd15", "seg", {}), stock("sd15"), atol=1e-3)


# -- D2: an exception in a perturbed pass leaves the hook on the model -------------------------------------------------
def test_d2_after_an_exception_the_model_is_as_before(toy: Toy) -> None:
    before, guider = toy.plain(toy.cond), PERTURBING["slg"](5.0)
    guider.set_state(step=5, num_inference_steps=10, timestep=toy.timestep)
    for _ in guider.prepare_inputs({"text": (toy.cond, toy.uncond)}):
        guider.prepare_models(toy.unet)  # an exception in the third pass never gets to cleanup_models
    assert (toy.plain(toy.cond) - before).abs().max() > 1e-3
    guider.set_state(step=6, num_inference_steps=10, timestep=toy.timestep)
    with pytest.raises(ValueError, match="already exists"):
        toy.guided(guider)

    pipe = trimtab.guide(CASES["sd15"].build())
    last = pipe.unet.conv_out.register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"), pipe.guidance("slg", start=0.0, stop=1.0):
        run(pipe, CASES["sd15"])
    last.remove()
    assert torch.equal(run(pipe, CASES["sd15"]), stock("sd15"))
    assert not any({"forward", "_diffusers_hook"} & module.__dict__.keys() for module in pipe.unet.modules())


def _fail(*args: Any) -> None:
    raise RuntimeError("broken on purpose")


# -- D3: autoguidance under another condition, and of the same model only ----------------------------------------------
def test_d3_both_branches_of_autoguidance_have_the_same_condition(toy: Toy) -> None:
    guider = AutoGuidance(5.0, auto_guidance_config=LayerSkipConfig([0], MID, dropout=0.0), dropout=0.0)
    (cond, weak), _ = toy.guided(guider)
    assert torch.equal(cond, toy.plain(toy.cond))
    close(weak, toy.plain(toy.uncond), 1e-6)

    seen: list[torch.Tensor] = []
    other = CASES["sd15"].build().unet
    other.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    record = watched("sd15", "autoguidance", {"weak": other})
    for step, text in zip(record.steps, seen, strict=True):
        assert torch.equal(text, step.forwards[0].arguments["encoder_hidden_states"][1:])


# -- D4: the automatic choice of layers depends on the hash seed -------------------------------------------------------
def test_d4_automatic_layers_do_not_depend_on_the_hash_seed() -> None:
    # Their list of names, in the order in which they are tried, by nothing but its own source.
    source = Path(inspect.getfile(_get_submodule_from_fqn)).read_text()
    lists = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    program = "".join(f"{ast.unparse(node)}\n" for node in lists if "BLOCK_IDENTIFIERS" in ast.unparse(node.targets[0]))
    program += "print(next(name for name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS if name in "
    program += "('transformer_blocks', 'single_transformer_blocks')))"
    assert len({_printed(program, seed) for seed in range(12)}) == 2

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=8, num_single_layers=8, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=8,
            pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    family = Family(model)
    # Nothing in the choice goes through a set whose order could show: it is in call order, always.
    assert list(family.blocks) == [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in range(8)]
    for layers in ("auto", ("blocks.(3|5)", "blocks.1")):
        chosen = family.resolve(layers, "pag")
        assert list(chosen) == sorted(chosen, key=list(family.attentions).index)


def _printed(program: str, seed: int) -> str:
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True, timeout=60,
        env={"PYTHONHASHSEED": str(seed)},
    )  # fmt: skip
    return done.stdout


# -- D5: a guider that cannot say whether a pass is conditional --------------------------------------------------------
@dataclass
class Branches(trimtab.Guidance):
    """Asks for two branches, to see that their roles are told without a counter."""

    def branches(self, step: trimtab.Step) -> tuple[trimtab.Branch, ...]:
        return (trimtab.COND, trimtab.UNCOND)

    def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> torch.Tensor:
        assert step.own is not None
        return predictions[trimtab.COND] - step.own


def test_d5_the_conditional_branch_is_known_by_name() -> None:
    with pytest.raises(AttributeError, match="no attribute"):
        _ = TangentialClassifierFreeGuidance().is_conditional

    with built("sd15").guidance(Branches()):
        close(run(built("sd15"), CASES["sd15"]), stock("sd15", guidance_scale=1.0), 1e-5)


# -- D6: PAG on joint attention replaces the text rows too, or silently does nothing -----------------------------------
def test_d6_text_tokens_keep_their_attention() -> None:
    query, key, value = torch.randn(3, 1, 2, 22, 16)
    plain = F.scaled_dot_product_attention(query, key, value)
    with AttentionScoreSkipFunctionMode():
        theirs = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(theirs[..., :6, :], value[..., :6, :])

    ours = IdentityAttention(()).attention(query, key, value, AttentionTokens(6, 22), None, None)
    close(ours[..., :6, :], plain[..., :6, :], 1e-6)
    assert not torch.allclose(ours[..., 6:, :], value[..., 6:, :], atol=1e-2)  # image tokens see the text as before


def test_d6_it_acts_where_the_matrices_are_multiplied_by_hand_and_else_says_that_it_cannot() -> None:
    query, key = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 22, 8)
    with AttentionScoreSkipFunctionMode():
        theirs = F.scaled_dot_product_attention(query, key, key)
    assert torch.equal(theirs, F.scaled_dot_product_attention(query, key, key))

    pipe = trimtab.guide(CASES["sd15"].build())
    with pipe.guidance("pag"):
        expected = run(pipe, CASES["sd15"])
    pipe.unet.set_attn_processor(AttnProcessor())
    with pipe.guidance("pag"):
        close(run(pipe, CASES["sd15"]), expected)
    pipe.unet.set_attn_processor(CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False))
    with pytest.raises(UnsupportedPipelineError, match="calls neither scaled_dot_product_attention"):
        pipe.add_guidance("pag")


# -- D7: no usable defaults --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("guider", "plugin"),
    [(PerturbedAttentionGuidance, "pag"), (SkipLayerGuidance, "slg"), (SmoothedEnergyGuidance, "seg")],
)
def test_d7_defaults_work_on_every_family(guider: type[BaseGuidance], plugin: str) -> None:
    with pytest.raises(ValueError, match="must be provided"):
        guider()

    for name in ("sd15", "dit", "sd3", "flux"):
        with built(name).guidance(plugin) as attached:
            plan = built(name).explain_guidance(**{**CASES[name].call, "num_inference_steps": 20})
        assert attached.layers == "auto"
        assert plan.rows[0].layers
        assert plan.evaluations > plan.own_evaluations


# -- found here --------------------------------------------------------------------------------------------------------
def test_their_blur_takes_the_mean_where_sigma_is_small() -> None:
    query = torch.randn(1, 16, 4)
    small = _gaussian_blur_2d(query.clone(), 3, 0.5, sigma_threshold_inf=9999.0)
    close(small, query.mean(dim=1, keepdim=True).expand_as(query), 1e-6)

    ours = SmoothedQueries((), 0.1).smoothed(query[:, None], (4, 4))[:, 0]
    close(ours, query, 1e-6)


def test_their_skipped_block_swaps_text_and_image() -> None:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 16, 16),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([500.0]),
    }  # fmt: skip
    with torch.no_grad():
        right = model(**given, skip_layers=[1]).sample
        _apply_layer_skip_hook(model, LayerSkipConfig([1], "transformer_blocks"))
        theirs = model(**given).sample
    assert (theirs - right).abs().max() > 1e-2

    call = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.8}
    expected = run(CASES["sd3"].build(), CASES["sd3"], **call)
    assert torch.equal(guided("sd3", "slg", {"layers": "blocks.1", "stop": 0.8}, "sequential"), expected)
