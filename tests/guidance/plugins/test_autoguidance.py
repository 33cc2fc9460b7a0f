"""`autoguidance` is that of the paper: a worse model under the same condition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from guided_runs import built, check_everywhere, close, stock
from peft import LoraConfig, inject_adapter_in_model
from recorder import Record, recorded
from zoo import CASES, run

import trimtab
from trimtab.guidance.errors import ParameterError, RecipeError

LORA = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])


def weaker(name: str) -> Any:
    """A denoiser of the same kind with other weights."""
    module = getattr(CASES[name].build(), CASES[name].denoiser)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in module.parameters():
            parameter.add_(0.1 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    return module


def with_lora(name: str) -> Any:
    pipe = trimtab.guide(CASES[name].build())
    with torch.random.fork_rng():
        torch.manual_seed(2)
        inject_adapter_in_model(LORA, getattr(pipe, CASES[name].denoiser), "style")
    return pipe


def forwards(module: Any, step: Any) -> torch.Tensor:
    """Another denoiser's prediction for the conditional row of a step's call."""
    given = step.forwards[0].arguments
    text = given["encoder_hidden_states"][-1:]
    with torch.no_grad():
        return module(given["sample"][-1:], given["timestep"], encoder_hidden_states=text).sample


def ran(weak: Any, scale: float = 1.5, **call: Any) -> Record:
    pipe = CASES["sd15"].build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("autoguidance", weak=weak, scale=scale)
    plan = pipe.explain_guidance(**{**CASES["sd15"].call, **call})
    run(pipe, CASES["sd15"], **call)
    done = pipe.last_guided_run
    assert (done.evaluations, done.forward_calls) == (plan.evaluations, plan.calls)
    return record


# -- a second checkpoint -----------------------------------------------------------------------------------------------
def test_without_cfg_it_is_the_interpolation_of_edm2() -> None:
    weak, w = weaker("sd15"), 2.5
    record = ran(weak, w - 1.0, guidance_scale=1.0)
    for step in record.steps:
        (forward,) = step.forwards
        assert forward.rows == 1
        close(step.model_output, torch.lerp(forwards(weak, step), forward.output, w), 1e-6)


def test_with_cfg_the_term_is_added() -> None:
    weak = weaker("sd15")
    for step in ran(weak, 1.5).steps:
        uncond, cond = step.forwards[0].output.chunk(2)
        expected = uncond + 5.0 * (cond - uncond) + 1.5 * (cond - forwards(weak, step))
        close(step.model_output, expected, 1e-6)


def test_it_costs_one_evaluation_of_the_weaker_model_in_a_call_of_its_own() -> None:
    pipe = built("sd15")
    with pipe.guidance("autoguidance", weak=weaker("sd15")), pipe.guidance("pag"):
        plan = pipe.explain_guidance(**CASES["sd15"].call)
        run(pipe, CASES["sd15"])
    done = pipe.last_guided_run
    assert (done.evaluations, done.forward_calls) == (plan.evaluations, plan.calls) == (3 * 4, 3 * 2)


@pytest.mark.parametrize("name", ["sd15", "dit", "sd3", "flux", "wan"])
def test_on_every_kind_of_denoiser_it_acts_and_costs_nothing_at_scale_zero(name: str) -> None:
    check_everywhere(name, "autoguidance", {"weak": weaker(name)}, {"scale": 0.0})


def test_the_same_model_does_not_guide() -> None:
    pipe = built("sd15")
    with pipe.guidance("autoguidance", weak=pipe.unet, scale=5.0):
        close(run(pipe, CASES["sd15"]), stock("sd15"), 1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_loaded_from_a_folder_of_a_model_or_of_a_pipeline(tmp_path: Path, whole: bool) -> None:
    source = CASES["sd15"].build()
    source.unet = weaker("sd15")
    (source if whole else source.unet).save_pretrained(tmp_path)
    pipe = CASES["sd15"].build()
    trimtab.guide(pipe)
    with pipe.guidance("autoguidance", weak=source.unet):
        expected = run(pipe, CASES["sd15"])
    pipe.add_guidance("autoguidance", weak=str(tmp_path))
    close(run(pipe, CASES["sd15"]), expected, 1e-5)  # weights that lie elsewhere in memory round differently
    loaded = pipe.__dict__["_trimtab_loaded"][str(tmp_path)]
    run(pipe, CASES["sd15"])
    assert pipe.__dict__["_trimtab_loaded"][str(tmp_path)] is loaded
    pipe.clear_guidance()
    assert torch.equal(run(pipe, CASES["sd15"]), stock("sd15"))
    assert "_trimtab_loaded" not in pipe.__dict__


def test_a_smaller_sibling_will_do() -> None:
    from zoo.unets import unet

    small = unet(block_out_channels=(4, 8, 8)).eval()
    for step in ran(small, guidance_scale=1.0).steps:
        cond = step.forwards[0].output
        close(step.model_output, cond + 1.5 * (cond - forwards(small, step)), 1e-6)


def test_a_folder_goes_into_a_recipe_and_a_module_does_not(tmp_path: Path) -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.unet.save_pretrained(tmp_path / "weak")
    pipe.add_guidance("autoguidance", weak=str(tmp_path / "weak"))
    pipe.save_guidance(tmp_path)
    pipe.load_guidance(tmp_path)
    assert pipe.guidances["autoguidance"].weak == str(tmp_path / "weak")
    pipe.guidances["autoguidance"].weak = pipe.unet
    with pytest.raises(RecipeError, match="weak"):
        pipe.save_guidance(tmp_path)


# -- a LoRA off --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd15", "dit", "sd3", "flux"])
@pytest.mark.parametrize("rows", ["auto", "batched", "sequential"])
def test_with_a_lora_off_it_is_the_model_without_it(name: str, rows: str) -> None:
    bare = getattr(CASES[name].build(), CASES[name].denoiser)
    pipe = with_lora(name)
    alone = run(pipe, CASES[name])
    with pipe.guidance("autoguidance", weak=bare):
        expected = run(pipe, CASES[name])
    assert not torch.allclose(alone, expected, atol=1e-4)
    pipe.guidance_rows = rows
    with pipe.guidance("autoguidance", adapters="all"):
        close(run(pipe, CASES[name]), expected, 1e-5)
        joined = pipe.last_guided_run.forward_calls == 3
    assert joined == (rows != "sequential")
    assert torch.equal(run(pipe, CASES[name]), alone)


def with_two_loras() -> Any:
    pipe = trimtab.guide(CASES["sd15"].build())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe.unet.add_adapter(LORA, "style")
        pipe.unet.add_adapter(LORA, "detail")
    return pipe


def test_of_several_adapters_one_can_be_switched_off() -> None:
    pipe, twin = with_two_loras(), with_two_loras()
    pipe.unet.set_adapters(["style", "detail"], [0.8, 0.5])
    twin.unet.set_adapters(["style"], [0.8])
    with pipe.guidance("autoguidance", weak=twin.unet):
        expected = run(pipe, CASES["sd15"])
    with pipe.guidance("autoguidance", adapters="detail"):
        close(run(pipe, CASES["sd15"]), expected, 1e-5)


def test_an_exception_leaves_the_adapters_as_they_were() -> None:
    pipe = with_lora("sd15")
    before = {name: dict(module.scaling) for name, module in pipe.unet.named_modules() if hasattr(module, "scaling")}
    last = pipe.unet.up_blocks[2].attentions[1].transformer_blocks[0].attn2.to_out[0].base_layer

    def fail(*args: Any) -> None:
        raise RuntimeError("broken on purpose")

    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken on purpose"), pipe.guidance("autoguidance", adapters="all"):
        run(pipe, CASES["sd15"])
    handle.remove()
    assert before == {n: dict(m.scaling) for n, m in pipe.unet.named_modules() if hasattr(m, "scaling")}
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "neither of weak and adapters given"),
        ({"weak": "x", "adapters": "all"}, "both of weak and adapters given"),
        ({"adapters": "all"}, "UNet2DConditionModel has no adapter"),
        ({"weak": "/no/such/folder"}, "'/no/such/folder' holds no denoiser"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_attached(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        built("sd15").add_guidance("autoguidance", **parameters)
    assert not built("sd15").guidances


def test_another_kind_of_denoiser_is_refused() -> None:
    other = built("sdxl").unet
    with pytest.raises(ParameterError, match=r"cross_attention_dim=64 \(the pipeline's: 32\)"):
        built("sd15").add_guidance("autoguidance", weak=other)


def test_an_unknown_or_fused_adapter_is_refused() -> None:
    pipe = with_two_loras()
    with pytest.raises(ParameterError, match=r"no adapter 'stile'\. Did you mean 'style'"):
        pipe.add_guidance("autoguidance", adapters="stile")
    pipe.unet.fuse_lora()
    with pytest.raises(ParameterError, match="unfuse_lora"):
        pipe.add_guidance("autoguidance", adapters="all")
