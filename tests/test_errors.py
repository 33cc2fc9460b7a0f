"""Bad input gets one clear error that names what is wrong and what is allowed, before any model is called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, KarrasVeScheduler, UNet2DModel
from torch import nn
from zoo import CASES, run

import trimtab
from trimtab import (
    ClassConditionalPipeline,
    ConflictError,
    Guidance,
    ParameterError,
    SourceError,
    Step,
    TrimtabError,
    UnknownGuidanceError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
)
from trimtab.guidance.plugins.pag import PAG

CASE = CASES["sd15"]


@pytest.fixture(scope="module")
def shared() -> Any:
    return CASE.build()


@pytest.fixture
def pipe(shared: Any) -> Any:
    """A pipeline that shares its models, which are never called here."""
    return trimtab.guide(copy.copy(shared))


@contextmanager
def refused(pipe: Any, kind: type[Exception], message: str) -> Iterator[None]:
    """Expect an error of this kind, whose text is exactly `message`, before the denoiser is called."""
    calls = []
    denoiser: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(kind) as raised:
            yield
    finally:
        handle.remove()
    assert str(raised.value) == message
    assert not calls


@dataclass
class Pull(Guidance):
    """A loss; it does not say that it needs a gradient, but having a loss is enough."""

    name: ClassVar[str] = "test.pull"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return x0.square().flatten(1).sum(1)


# -- plug-ins and parameters -------------------------------------------------------------------------------------------
TAKES = "It takes: adaptive_scale, layers, scale, sigma_max, sigma_min, start, stop."
BLOCKS = "down_blocks.0, down_blocks.1, down_blocks.2, mid_block, up_blocks.0, up_blocks.1, up_blocks.2"
NO_LAYER = "pag: layers={!r} matches no self-attention of UNet2DConditionModel."
PARAMETERS = [
    ({"scal": 3.0}, f"pag: no parameter 'scal'. Did you mean 'scale'? {TAKES}"),
    ({"scale": float("nan")}, "pag: scale=nan is not a number; allowed: >= 0."),
    ({"scale": float("inf")}, "pag: scale=inf is infinite; allowed: >= 0."),
    ({"scale": -1.0}, "pag: scale=-1.0 is out of range; allowed: >= 0."),
    ({"scale": "3"}, "pag: scale='3' is a str, not float; allowed: >= 0."),
    ({"start": 0.8, "stop": 0.2}, "pag: start=0.8 lies after stop=0.2; allowed: start <= stop."),
    ({"sigma_min": 5, "sigma_max": 2}, "pag: sigma_min=5 lies after sigma_max=2; allowed: sigma_min <= sigma_max."),
    ({"stop": 30}, "pag: stop=30 is out of range; allowed: 0 to 1."),
    ({"layers": 5}, "pag: layers=5 is an int, not str or tuple of str."),
    ({"layers": [5]}, "pag: layers=[5] holds 5, which is an int, not str."),
    ({"layers": []}, "pag: layers=() names no layer; allowed: 'auto', or at least one name."),
    ({"layers": "d99"}, f"{NO_LAYER.format('d99')} Allowed: 'auto', or a name or pattern among {BLOCKS}."),
    (
        {"layers": ["mid", "mid_blok"]},
        f"{NO_LAYER.format('mid_blok')} Did you mean 'mid_block'? "
        f"Allowed: 'auto', or a name or pattern among {BLOCKS}.",
    ),
]


@pytest.mark.parametrize(("parameters", "message"), PARAMETERS)
def test_a_parameter(pipe: Any, parameters: dict[str, Any], message: str) -> None:
    with refused(pipe, ParameterError, message):
        pipe.add_guidance("pag", **parameters)
    assert not pipe.guidances


def test_parameters_that_no_longer_fit_when_the_pipeline_is_called(pipe: Any) -> None:
    handle = pipe.add_guidance("pag", stop=0.5)
    handle.start = 0.8
    with refused(pipe, ParameterError, "pag: start=0.8 lies after stop=0.5; allowed: start <= stop."):
        run(pipe, CASE)
    handle.start, handle.layers = 0.0, "d99"
    with refused(pipe, ParameterError, PARAMETERS[-2][1]):
        run(pipe, CASE)


def test_an_unknown_plug_in(pipe: Any) -> None:
    with pytest.raises(UnknownGuidanceError) as raised:
        pipe.add_guidance("pga")
    assert str(raised.value).startswith("There is no guidance 'pga'. Did you mean 'pag'? Installed: ")
    assert ", cfg, " in str(raised.value)
    with pytest.raises(UnknownGuidanceError, match="Did you mean 'pag'"):
        pipe.add_guidance("PAG")


def test_a_plug_in_for_another_architecture() -> None:
    pipe = trimtab.guide(CASES["ddpm"].build())
    message = (
        "joint cannot be attached to the denoiser of DDPMPipeline, UNet2DModel; it can be to: UNet2DConditionModel."
    )
    with refused(pipe, UnsupportedPipelineError, message):
        pipe.add_guidance("joint", weights="absent", mode="joint")


def test_a_classifier_that_is_not_there(pipe: Any) -> None:
    pipe.add_guidance("classifier", classifier="./absent", target=1)
    refusal = r"classifier='\./absent' gives no transformers network for classification of images; needed: a "
    with pytest.raises(SourceError, match=refusal):
        run(pipe, CASE)


NEEDED = "needed: a plug-in's name such as 'pag', or an instance of a trimtab.Guidance subclass."


@pytest.mark.parametrize(
    ("guidance", "options", "message"),
    [
        (5, {}, f"add_guidance: 5 is given; {NEEDED}"),
        (None, {}, f"add_guidance: None is given; {NEEDED}"),
        (PAG, {}, f"add_guidance: PAG is a class; {NEEDED}"),
        (PAG(), {"scale": 2.0}, "pag: scale given beside an instance; set parameters on the instance."),
        ("pag", {"name": 5}, "add_guidance: name=5; allowed: a string that is not empty, or None."),
        ("pag", {"name": ""}, "add_guidance: name=''; allowed: a string that is not empty, or None."),
    ],
)
def test_what_is_no_guidance(pipe: Any, guidance: Any, options: dict[str, Any], message: str) -> None:
    with refused(pipe, ParameterError, message):
        pipe.add_guidance(guidance, **options)


def test_a_name_that_is_taken(pipe: Any) -> None:
    first = pipe.add_guidance("pag", scale=1.0)
    message = (
        "A guidance named 'pag' is attached already. Change its parameters through pipe.guidances['pag'], remove it "
        "first, or attach this one under another name=."
    )
    with refused(pipe, ParameterError, message):
        pipe.add_guidance("pag", scale=2.0)
    assert pipe.guidances["pag"] is first


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("guidance_rows", "both", "guidance_rows='both'; allowed: 'auto', 'batched', 'sequential'."),
        ("guidance_max_rows", 0, "guidance_max_rows=0; allowed: a whole number >= 1, or None for no limit."),
        ("guidance_max_rows", "4", "guidance_max_rows='4'; allowed: a whole number >= 1, or None for no limit."),
    ],
)
def test_a_setting_of_rows(pipe: Any, attribute: str, value: Any, message: str) -> None:
    pipe.add_guidance("pag")
    setattr(pipe, attribute, value)
    with refused(pipe, ParameterError, message):
        run(pipe, CASE)


# -- pipelines and schedulers ------------------------------------------------------------------------------------------
def test_what_is_no_pipeline() -> None:
    needed = (
        "Needed: an instance of a DiffusionPipeline subclass, such as DiffusionPipeline.from_pretrained(...) returns."
    )
    with pytest.raises(UnsupportedPipelineError) as raised:
        trimtab.guide("sd15")  # type: ignore[arg-type]
    assert str(raised.value) == f"str cannot be guided: it is not a Diffusers pipeline. {needed}"
    with pytest.raises(UnsupportedPipelineError) as raised:
        trimtab.guide(DiffusionPipeline)  # type: ignore[arg-type]
    assert (
        str(raised.value)
        == f"DiffusionPipeline cannot be guided: it is a class, not a pipeline; load one first. {needed}"
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("unet", "it has no denoiser (a Diffusers model whose prediction goes to the scheduler); it holds vae, "),
        ("scheduler", "it has no scheduler with a step that guidance could join; it holds vae, "),
    ],
)
def test_a_pipeline_that_lacks_a_part(missing: str, message: str) -> None:
    stock = CASE.build()
    setattr(stock, missing, None)
    with pytest.raises(UnsupportedPipelineError) as raised:
        trimtab.guide(stock)
    assert str(raised.value).startswith(f"StableDiffusionPipeline cannot be guided: {message}")
    assert missing not in str(raised.value).partition("it holds")[2]
    assert type(stock) is diffusers.StableDiffusionPipeline


@pytest.mark.parametrize("guidance", [PAG(sigma_max=5.0), Pull()])
def test_a_scheduler_whose_levels_are_not_known(pipe: Any, guidance: Guidance) -> None:
    pipe.scheduler = KarrasVeScheduler()
    message = (
        f"{guidance.label}: the noise level is needed (for a window in sigma, a loss or an edit of the clean estimate),"
        " but KarrasVeScheduler cannot be guided: its step takes no sample and timestep; use EulerDiscreteScheduler "
        "instead."
    )
    with refused(pipe, UnsupportedSchedulerError, message):
        pipe.add_guidance(guidance)
    pipe.scheduler = DDIMScheduler()
    pipe.add_guidance(guidance)
    pipe.scheduler = KarrasVeScheduler()
    with refused(pipe, UnsupportedSchedulerError, message):
        run(pipe, CASE)


def test_a_condition_that_the_pipeline_cannot_have() -> None:
    unconditional = trimtab.guide(CASES["ddpm"].build())
    message = (
        "cfg needs an unconditional prediction beside the conditional one, but DDPMPipeline has only one: it takes "
        "neither a prompt nor a class that could be left out. Use a guidance that needs no condition, such as 'pag'."
    )
    with refused(unconditional, UnsupportedPipelineError, message):
        unconditional.add_guidance("cfg")
    labelled = trimtab.guide(CASES["dit"].build())
    message = "cfg: prompt 'blurry' cannot be given to DiTPipeline, which takes no prompts."
    with refused(labelled, UnsupportedPipelineError, message):
        labelled.add_guidance("cfg", negative_prompt="blurry")


def test_a_gradient_under_inference_mode(pipe: Any) -> None:
    pipe.add_guidance(Pull())
    message = (
        "test.pull needs gradients, which torch.inference_mode() forbids for good. Call the pipeline outside of it; "
        "torch.no_grad() is fine."
    )
    with torch.inference_mode(), refused(pipe, ConflictError, message):
        run(pipe, CASE)


@pytest.mark.parametrize("label", [-1, 3, "triangle"])
def test_a_class_out_of_range(label: int | str) -> None:
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=3,
    )  # fmt: skip
    pipe = trimtab.guide(ClassConditionalPipeline(unet, DDIMScheduler(), ["circle", "square"]))
    pipe.add_guidance("cfg")
    message = f"class_labels: no class {label!r}; this model knows 0 'circle', 1 'square', and None for no class."
    with refused(pipe, ValueError, message):
        pipe(label)


def test_every_error_of_ours_can_be_caught_as_one() -> None:
    kinds = [kind for kind in vars(trimtab).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 8 and all(issubclass(kind, TrimtabError) for kind in kinds)


def test_a_pipeline_that_hands_its_prompt_to_others_is_not_said_to_take_none() -> None:
    pipe = trimtab.guide(CASES["kandinsky_combined"].build())
    message = (
        "perp_neg: prompt '' cannot be given to KandinskyV22CombinedPipeline, because it hands its prompt to "
        "pipelines of its own (prior_pipe, decoder_pipe), of which the later are given what the earlier made of it; "
        "guide these by themselves."
    )
    with refused(pipe, UnsupportedPipelineError, message):
        pipe.add_guidance("perp_neg", negative_prompt="red")
