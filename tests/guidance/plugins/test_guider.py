"""Diffusers' guiders as guidances: what a modular pipeline computes with one, the ordinary pipeline computes here."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from typing import Any

import pytest
import torch
from diffusers import guiders
from diffusers.guiders import BaseGuidance
from guided_runs import built, close, guided, stock
from recorder import recorded
from zoo import CASES, run
from zoo.modular import modular_twin, run_modular

import trimtab
from trimtab.guidance import recipe
from trimtab.guidance.errors import ConflictError, ParameterError, RecipeError
from trimtab.guidance.plugins.guider import Guider

MADE: dict[str, Any] = {
    "AdaptiveProjectedGuidance": {
        "guidance_scale": 5.0,
        "adaptive_projected_guidance_momentum": -0.5,
        "adaptive_projected_guidance_rescale": 2.0,
        "eta": 0.3,
    },
    "AdaptiveProjectedMixGuidance": {"guidance_scale": 5.0, "adaptive_projected_guidance_start_step": 0},
    "ClassifierFreeGuidance": {"guidance_scale": 5.0, "guidance_rescale": 0.7, "stop": 0.7},
    "ClassifierFreeZeroStarGuidance": {"guidance_scale": 5.0, "zero_init_steps": 1},
    "TangentialClassifierFreeGuidance": {"guidance_scale": 5.0},
}


def make(name: str) -> guiders.BaseGuidance:
    return getattr(guiders, name)(**MADE[name])


class Halfway(guiders.BaseGuidance):
    """A guider that Diffusers does not know."""

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012
    prepare_inputs = guiders.ClassifierFreeGuidance.prepare_inputs
    num_conditions = 2

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> tuple[torch.Tensor]:
        return ((pred_cond + pred_uncond) / 2,)


# -- parity ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MADE)
def test_it_equals_the_modular_pipeline_with_the_same_guider(name: str) -> None:
    pipe, case = CASES["sdxl"].build(), CASES["sdxl"]
    expected = run_modular(modular_twin(pipe, make(name)), case)
    trimtab.guide(pipe).add_guidance(make(name))
    assert not torch.allclose(expected, stock("sdxl"), atol=1e-3)
    close(run(pipe, case), expected)
    # Computed call by call, as the modular pipeline does, there is not even rounding between them.
    pipe.guidance_rows = "sequential"
    assert torch.equal(run(pipe, case, guidance_scale=1.0), expected)


@pytest.mark.parametrize("name", ["AdaptiveProjectedGuidance", "ClassifierFreeZeroStarGuidance"])
def test_it_equals_the_modular_pipeline_of_a_flow_model(name: str) -> None:
    pipe, case = CASES["sd3"].build(), CASES["sd3"]
    expected = run_modular(modular_twin(pipe, make(name)), case)
    trimtab.guide(pipe).add_guidance(make(name))
    close(run(pipe, case), expected)


def test_frequency_decoupled_guidance_works() -> None:
    guider = guiders.FrequencyDecoupledGuidance(guidance_scales=[6.0, 3.0])
    pipe, case = CASES["sdxl"].build(), CASES["sdxl"]
    expected = run_modular(modular_twin(pipe, guider), case)
    trimtab.guide(pipe).add_guidance(guider)
    close(run(pipe, case), expected)


def test_a_guider_of_ones_own_works() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    record = recorded(pipe, "unet")
    pipe.add_guidance(Halfway())
    run(pipe, CASES["sd15"])
    uncond, cond = record.steps[0].forwards[0].output
    close(record.steps[0].model_output[0], (cond + uncond) / 2, 1e-6)


@pytest.mark.parametrize("name", ["sd15", "flux_true_cfg"])
def test_magnitude_aware_guidance_works_on_images_too_where_diffusers_own_fails(name: str) -> None:
    pipe, case, guider = CASES[name].build(), CASES[name], guiders.MagnitudeAwareGuidance(guidance_scale=5.0, alpha=2.0)
    record = recorded(pipe, case.denoiser)
    trimtab.guide(pipe).add_guidance(guider)
    run(pipe, case)
    outputs = torch.cat([forward.output for forward in record.steps[0].forwards])
    cond, uncond = outputs if name == "flux_true_cfg" else outputs.flip(0)
    scale = 1 + (5.0 - 1) * torch.exp(-2.0 * (cond - uncond).norm() / uncond.norm())
    close(record.steps[0].model_output[0], uncond + scale * (cond - uncond))


# -- with others -------------------------------------------------------------------------------------------------------
def test_classifier_free_guidance_and_pag_add_up_in_either_order() -> None:
    pipe = built("sd15")
    outputs = []
    for first in ("guider", "pag"):
        guider = guiders.ClassifierFreeGuidance(guidance_scale=5.0)
        with (
            pipe.guidance(guider if first == "guider" else "pag"),
            pipe.guidance("pag" if first == "guider" else guider),
        ):
            outputs.append(run(pipe, CASES["sd15"]))
    close(outputs[0], guided("sd15", "pag", {}))
    close(outputs[1], outputs[0], 1e-6)


def test_it_combines_what_the_steered_model_predicts() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    record = recorded(pipe, "unet")
    pipe.add_guidance("pag", scale=2.0, layers="mid")
    pipe.add_guidance(guider := make("TangentialClassifierFreeGuidance"))
    run(pipe, CASES["sd15"])
    uncond, cond, perturbed = record.steps[0].forwards[0].output[:, None]
    delta = 2.0 * (cond - perturbed)
    guider.set_state(0, 3, None)
    close(record.steps[0].model_output, guider.forward(cond + delta, uncond + delta).pred, 1e-5)


def test_it_takes_the_place_of_cfg() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("cfg")
    with pytest.raises(ConflictError, match=r"'cfg' = .* and 'AdaptiveProjectedGuidance' = "):
        pipe.add_guidance(make("AdaptiveProjectedGuidance"))


# -- window, state, cost -----------------------------------------------------------------------------------------------
def test_each_run_begins_with_a_momentum_of_its_own_and_leaves_the_guider_alone() -> None:
    guider = make("AdaptiveProjectedGuidance")
    before = {**vars(guider)}
    pipe = built("sd15")
    with pipe.guidance(guider):
        first, second = run(pipe, CASES["sd15"]), run(pipe, CASES["sd15"])
        guider.guidance_scale = 2.0
        weaker = run(pipe, CASES["sd15"])
    assert torch.equal(first, second) and not torch.allclose(first, weaker, atol=1e-3)
    assert vars(guider) == before | {"guidance_scale": 2.0}


def test_beyond_the_guiders_interval_the_prediction_is_the_conditional_one_and_costs_nothing() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance(guiders.ClassifierFreeGuidance(guidance_scale=5.0, start=0.4))
    assert pipe.explain_guidance(3, guidance_scale=1.0).evaluations == 1 + 2 + 2
    output = run(pipe, CASES["sd15"], guidance_scale=1.0)
    assert pipe.last_guided_run.evaluations == 1 + 2 + 2
    # Diffusers rounds the first step down, so `start` of the other is that of the same step.
    close(output, guided("sd15", "cfg", {"scale": 5.0, "start": 0.3}, guidance_scale=1.0))


def test_outside_of_its_own_window_the_pipeline_does_what_it_does_by_itself() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("guider", guider=make("AdaptiveProjectedGuidance"), start=1.0)
    assert torch.equal(run(pipe, CASES["sd15"]), stock("sd15"))


def test_the_plan_shows_what_is_not_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance(guiders.AdaptiveProjectedGuidance(eta=0.3))
    pipe.explain_guidance(3)
    assert "AdaptiveProjectedGuidance(eta=0.3)" in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("guider", "plugin"),
    [
        (guiders.PerturbedAttentionGuidance(perturbed_guidance_layers=0), "pag"),
        (guiders.SkipLayerGuidance(skip_layer_guidance_layers=0), "slg"),
        (guiders.SmoothedEnergyGuidance(seg_guidance_layers=0), "seg"),
        (guiders.AutoGuidance(auto_guidance_layers=0, dropout=0.1), "autoguidance"),
        (guiders.LTX2Guidance(), "cfg"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_guider_that_does_more_than_combine_is_refused_with_what_to_use(guider: Any, plugin: str) -> None:
    with pytest.raises(ParameterError, match=rf"{type(guider).__name__} .*cannot serve.*add_guidance\('{plugin}'\)"):
        built("sd15").add_guidance(guider)
    assert not built("sd15").guidances


def test_a_misspelt_guider_is_told_from_those_that_there_are() -> None:
    with pytest.raises(ParameterError, match="Did you mean 'AdaptiveProjectedGuidance'"):
        built("sd15").add_guidance("guider", guider="AdaptivProjectedGuidance")


def test_diffusers_notice_is_for_those_who_make_a_guider_themselves() -> None:
    notices: list[logging.LogRecord] = []

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notices.append(record)

    handler = Noted()
    logger = logging.getLogger(BaseGuidance.__module__)
    logger.addHandler(handler)
    try:
        recipe.dump({"it": Guider(guider="apg")})
        assert not notices
        guiders.AdaptiveProjectedGuidance()
    finally:
        logger.removeHandler(handler)
    assert [record.levelname for record in notices] == ["WARNING"]


def test_a_guider_is_named_as_its_paper_calls_it() -> None:
    assert isinstance(Guider(guider="apg").guider, guiders.AdaptiveProjectedGuidance)


# -- kept and loaded ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MADE)
def test_a_recipe_keeps_class_and_configuration(name: str) -> None:
    data = json.loads(json.dumps(recipe.dump({"it": Guider(guider=make(name))})))
    stored = data["guidances"][0]["parameters"]["guider"]
    assert stored["class"] == name and stored["config"].items() >= MADE[name].items()
    again = recipe.load(data)["it"]
    assert type(again.guider) is getattr(guiders, name)
    assert recipe.dump({"it": again}) == recipe.dump({"it": Guider(guider=make(name))})


def test_a_recipe_keeps_what_was_set_on_the_guider_since() -> None:
    guider = make("AdaptiveProjectedGuidance")
    guider.guidance_scale = 2.0
    guider.disable()
    again = recipe.load(recipe.dump({"it": Guider(guider=guider)}))["it"].guider
    assert again.guidance_scale == 2.0 and not again._enabled


@pytest.mark.parametrize(
    "stored",
    [
        {"class": "os.system", "config": {}},
        {"class": "BaseGuidance", "config": {}},
        {"class": ["ClassifierFreeGuidance"], "config": {}},
        {"class": "ClassifierFreeGuidance", "config": {"scale": 3}},
        {"class": "ClassifierFreeGuidance", "config": ["guidance_scale"]},
        {"class": "PerturbedAttentionGuidance", "config": {"perturbed_guidance_layers": 0}},
        {"module": "os", "class": "system"},
    ],
)
def test_a_recipe_makes_nothing_but_guiders_of_diffusers(stored: dict[str, Any]) -> None:
    data = recipe.dump({"it": Guider()})
    data["guidances"][0]["parameters"]["guider"] = stored
    with pytest.raises(RecipeError):
        recipe.load(data)


def test_a_recipe_refuses_a_guider_that_it_could_not_find_again() -> None:
    with pytest.raises(RecipeError, match="guider="):
        recipe.dump({"it": Guider(guider=Halfway())})


def test_it_copies_and_pickles() -> None:
    guidance = Guider(guider=make("AdaptiveProjectedGuidance"))
    for twin in (copy.deepcopy(guidance), pickle.loads(pickle.dumps(guidance))):
        assert twin.guider is not guidance.guider
        assert recipe.dump({"it": twin}) == recipe.dump({"it": guidance})
