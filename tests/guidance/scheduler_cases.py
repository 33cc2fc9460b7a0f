"""Every scheduler configuration that the noise algebra covers, one entry a parametrisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers

EPSILON_V_SAMPLE = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Case:
    """A scheduler to build.

    Args:
        name: its class.
        kind: parametrisation, in the words of `gaussian.predict`.
        config: constructor arguments.
        timesteps: arguments of `set_timesteps`.
        first: the call to start from.
        tolerance: how far its samples may be off the path by rounding.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    timesteps: dict[str, Any] = field(default_factory=lambda: {"num_inference_steps": 8})
    first: int = 0
    tolerance: float = 2e-4

    def build(self) -> Any:
        scheduler = getattr(diffusers, self.name)(**self.config)
        scheduler.set_timesteps(**self.timesteps)
        return scheduler

    def __str__(self) -> str:
        options = [
            f"{key}={value}" for key, value in self.config.items() if key not in ("prediction_type", "clip_sample")
        ]
        start = [f"from call {self.first}"] if self.first else []
        return "-".join([self.name.removesuffix("Scheduler"), self.kind, *options, *start])


def _typed(names: tuple[str, ...], kinds: tuple[str, ...], tolerance: float = 2e-4, **config: Any) -> list[Case]:
    return [
        Case(name, kind, {"prediction_type": kind, **config}, tolerance=tolerance) for name in names for kind in kinds
    ]


def _edm(name: str, **config: Any) -> list[Case]:
    return [Case(name, f"edm_{kind}", {"prediction_type": kind, **config}) for kind in ("epsilon", "v_prediction")]


SOLVERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)

CASES: list[Case] = [
    *_typed(("DDIMScheduler", "DDIMParallelScheduler"), EPSILON_V_SAMPLE, clip_sample=False),
    *_typed(("DDPMScheduler", "DDPMParallelScheduler"), EPSILON_V_SAMPLE, clip_sample=False),
    *_typed(("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"), EPSILON_V_SAMPLE, clip_sample=False),
    *_typed(("LCMScheduler", "TCDScheduler"), EPSILON_V_SAMPLE, clip_sample=False),
    *_typed(("UnCLIPScheduler",), ("epsilon", "sample"), tolerance=2e-3, clip_sample=False),
    *_typed(("DDIMInverseScheduler",), EPSILON_V_SAMPLE, clip_sample=False, set_alpha_to_one=False),
    *_typed(("PNDMScheduler",), ("epsilon",), tolerance=4e-3),
    *_typed(("PNDMScheduler",), ("epsilon",), tolerance=4e-3, skip_prk_steps=True),
    # It averages velocities of several levels before it turns them into noise, which leaves the path a little.
    Case(
        "PNDMScheduler",
        "v_prediction",
        {"prediction_type": "v_prediction", "skip_prk_steps": True},
        {"num_inference_steps": 50},
        tolerance=2e-2,
    ),
    Case(
        "RePaintScheduler",
        "epsilon",
        {"clip_sample": False},
        {"num_inference_steps": 8, "jump_length": 1, "jump_n_sample": 1},
    ),
    Case("DDPMWuerstchenScheduler", "epsilon"),
    *_typed((*SOLVERS, "DPMSolverMultistepInverseScheduler"), EPSILON_V_SAMPLE),
    *_typed(SOLVERS, ("flow_prediction", "sample"), use_flow_sigmas=True),
    *_typed(("DPMSolverMultistepScheduler",), ("epsilon", "v_prediction"), algorithm_type="sde-dpmsolver++"),
    *_typed(("EulerDiscreteScheduler",), EPSILON_V_SAMPLE),
    *_typed(("EulerDiscreteScheduler",), ("v_prediction",), timestep_type="continuous", use_karras_sigmas=True),
    *_typed(("EulerAncestralDiscreteScheduler",), ("epsilon", "v_prediction")),
    *_typed(("LMSDiscreteScheduler", "HeunDiscreteScheduler"), EPSILON_V_SAMPLE),
    *_typed(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), ("epsilon", "v_prediction")),
    *_typed(("DPMSolverSDEScheduler",), ("epsilon", "v_prediction"), noise_sampler_seed=0),
    Case("KDPM2DiscreteScheduler", "epsilon", first=4),
    Case("KDPM2AncestralDiscreteScheduler", "epsilon", first=4),
    Case("DPMSolverSDEScheduler", "epsilon", {"noise_sampler_seed": 0}, first=4),
    Case("DPMSolverSinglestepScheduler", "epsilon", first=3),
    *_edm("EDMEulerScheduler", sigma_data=0.7),
    *_edm("EDMDPMSolverMultistepScheduler", sigma_data=0.7),
    *_edm("CosineDPMSolverMultistepScheduler", sigma_data=0.7, sigma_max=80.0),
    Case("FlowMatchEulerDiscreteScheduler", "flow_prediction", {"shift": 3.0}),
    Case("FlowMatchEulerDiscreteScheduler", "flow_prediction", {"stochastic_sampling": True}),
    Case("FlowMatchEulerDiscreteScheduler", "reversed_flow_prediction", {"invert_sigmas": True}),
    Case("FlowMatchHeunDiscreteScheduler", "flow_prediction"),
    Case("FlowMatchLCMScheduler", "flow_prediction"),
    Case("FlowMapEulerDiscreteScheduler", "flow_prediction", {"shift": 2.0}),
    Case("LTXEulerAncestralRFScheduler", "flow_prediction"),
    Case("MiniMaxH3Scheduler", "reversed_flow_prediction"),
    # Its first level has alpha = 0, where it drops the clean sample altogether.
    Case("IPNDMScheduler", "v_prediction", first=1),
    Case("SCMScheduler", "trigflow", {}, {"num_inference_steps": 4, "intermediate_timesteps": None}),
    Case("CMStochasticIterativeScheduler", "consistency", {}, {"num_inference_steps": 8}),
]
"""No case clips: a sample that is clipped leaves the path, and a test of levels would see only that."""

TELLS_NO_X0 = {
    "CMStochasticIterativeScheduler",
    "DDPMWuerstchenScheduler",
    "DEISMultistepScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "IPNDMScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "PNDMScheduler",
    "TCDScheduler",
}
"""Schedulers that keep their clean estimate to themselves."""
