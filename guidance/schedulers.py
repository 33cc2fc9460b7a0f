"""Which rules hold for which scheduler class of Diffusers, and which classes are refused and why.

Listed by class because attributes mislead: sigmas without alphas_cumprod mark flow matching, consistency models and
IPNDM alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import levels
from . import parametrisation as forms
from .errors import UnsupportedSchedulerError
from .levels import LevelRule
from .parametrisation import Prediction

FormRule = Callable[[Any], Prediction]

SUPPORTED: dict[str, tuple[LevelRule, FormRule]] = {
    **dict.fromkeys(
        (
            "DDIMScheduler",
            "DDIMParallelScheduler",
            "DDPMScheduler",
            "DDPMParallelScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "LCMScheduler",
            "RePaintScheduler",
            "TCDScheduler",
            "UnCLIPScheduler",
        ),
        (levels.FROM_TIMESTEP, forms.configured),
    ),
    "PNDMScheduler": (levels.PNDM, forms.configured),
    "DDIMInverseScheduler": (levels.INVERSE, forms.configured),
    "DDPMWuerstchenScheduler": (levels.WUERSTCHEN, forms.configured),
    **dict.fromkeys(
        (
            "DEISMultistepScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
        (levels.SOLVER, forms.solver),
    ),
    **dict.fromkeys(
        ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"),
        (levels.SIGMA, forms.configured),
    ),
    "HeunDiscreteScheduler": (levels.HEUN, forms.configured),
    "KDPM2DiscreteScheduler": (levels.KDPM2, forms.configured),
    "KDPM2AncestralDiscreteScheduler": (levels.KDPM2_ANCESTRAL, forms.configured),
    "DPMSolverSDEScheduler": (levels.DPM_SDE, forms.configured),
    **dict.fromkeys(
        ("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
        (levels.EDM, forms.edm),
    ),
    **dict.fromkeys(
        ("FlowMatchEulerDiscreteScheduler", "LTXEulerAncestralRFScheduler"),
        (levels.FLOW, forms.flow),
    ),
    "FlowMatchLCMScheduler": (levels.FLOW, forms.renoised_flow),
    "FlowMatchHeunDiscreteScheduler": (levels.FLOW_HEUN, forms.flow),
    "FlowMapEulerDiscreteScheduler": (levels.FLOW_MAP, forms.flow),
    "MiniMaxH3Scheduler": (levels.FLOW, forms.reversed_flow),
    "IPNDMScheduler": (levels.IPNDM, forms.velocity),
    "SCMScheduler": (levels.TRIGONOMETRIC, forms.trigflow),
    "CMStochasticIterativeScheduler": (levels.EDM, forms.consistency),
}

SINGLE_STEP = (
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
"""Those whose step goes from a clean estimate and its noise to the next level, and remembers nothing."""

_TOKENS = "it samples discrete tokens, which have no noise level; guide a pipeline of continuous latents instead."
_STAGES = (
    "its levels are set by the pipeline, stage by stage, not by the scheduler; no other scheduler fits its pipeline."
)

REFUSED: dict[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "HeliosScheduler": _STAGES,
    "HeliosDMDScheduler": _STAGES,
    "ConsistencyDecoderScheduler": "it belongs to a VAE decoder; guide the pipeline's own scheduler instead.",
    "KarrasVeScheduler": "its step takes no sample and timestep; use EulerDiscreteScheduler instead.",
    "PiflowScheduler": "its model returns a whole grid of predictions a step; no other scheduler fits its pipeline.",
    "RFD4ProteinaScheduler": "it samples proteins, not images; guide an image pipeline instead.",
    "ScoreSdeVeScheduler": "it has no step() but a predictor and a corrector; use EulerDiscreteScheduler instead.",
    "ScoreSdeVpScheduler": "it has no step() but step_pred(); use DDIMScheduler instead.",
}


def rules_of(scheduler: Any) -> tuple[LevelRule, FormRule]:
    """The rules of a scheduler, which may be a subclass of the class listed.

    Raises:
        UnsupportedSchedulerError: for a class that is refused or unknown, with what works instead.
    """
    for base in type(scheduler).__mro__:
        if base.__module__.partition(".")[0] != "diffusers":
            continue
        if base.__name__ in SUPPORTED:
            return SUPPORTED[base.__name__]
        if base.__name__ in REFUSED:
            raise UnsupportedSchedulerError(f"{base.__name__} cannot be guided: {REFUSED[base.__name__]}")
    raise UnsupportedSchedulerError(
        f"{type(scheduler).__name__} cannot be guided: its noise levels are not known. Use one of Diffusers' own, such "
        "as DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler, or "
        "a subclass of one."
    )


def check_single_step(scheduler: Any, plugin: str) -> None:
    """Refuse a scheduler whose step depends on earlier steps, or adds back none of the noise it was told of.

    Raises:
        UnsupportedSchedulerError: naming those that work.
    """
    names = {base.__name__ for base in type(scheduler).__mro__ if base.__module__.partition(".")[0] == "diffusers"}
    fresh = getattr(scheduler.config, "stochastic_sampling", False)
    if names & set(SINGLE_STEP) and not fresh:
        return
    setting = " with stochastic_sampling=True" if fresh else ""
    raise UnsupportedSchedulerError(
        f"{plugin}: {type(scheduler).__name__}{setting} does not step from one clean estimate and one noise, so the "
        f"noise that is added back cannot be chosen. Use one of {', '.join(SINGLE_STEP)}, for example "
        "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)."
    )
