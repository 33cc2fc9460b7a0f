"""What `trimtab` offers, and where it is: `__init__.py` imports each from there when it is first asked for."""

from .guidance.base import API_VERSION, Guidance
from .guidance.blocking import set_allowed, set_blocked
from .guidance.branch import (
    COND,
    UNCOND,
    AttentionTokens,
    Branch,
    Perturbation,
    Point,
    Predictions,
    Prompt,
    ScaledAdapters,
    SkippedBlocks,
)
from .guidance.errors import (
    ConflictError,
    GuidanceRuntimeError,
    ParameterError,
    PluginError,
    RecipeError,
    SourceError,
    TrimtabError,
    UnknownGuidanceError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
    UntrustedCodeError,
    WeightsError,
)
from .guidance.noise import Level, NoiseAlgebra, noise_algebra
from .guidance.parameters import parameter
from .guidance.planner import Plan
from .guidance.registry import plugins, register, unregister
from .guidance.run import Run, Step
from .pipelines.fashion import ClassConditionalPipeline
from .pipelines.guided import guide
from .pipelines.loading import GuidedPipeline
from .pipelines.stack import GuidanceStack

__version__: str

__all__ = [
    "API_VERSION",
    "COND",
    "UNCOND",
    "AttentionTokens",
    "Branch",
    "ClassConditionalPipeline",
    "ConflictError",
    "Guidance",
    "GuidanceRuntimeError",
    "GuidanceStack",
    "GuidedPipeline",
    "Level",
    "NoiseAlgebra",
    "ParameterError",
    "Perturbation",
    "Plan",
    "PluginError",
    "Point",
    "Predictions",
    "Prompt",
    "RecipeError",
    "Run",
    "ScaledAdapters",
    "SkippedBlocks",
    "SourceError",
    "Step",
    "TrimtabError",
    "UnknownGuidanceError",
    "UnsupportedPipelineError",
    "UnsupportedSchedulerError",
    "UntrustedCodeError",
    "WeightsError",
    "guide",
    "noise_algebra",
    "parameter",
    "plugins",
    "register",
    "set_allowed",
    "set_blocked",
    "unregister",
]
