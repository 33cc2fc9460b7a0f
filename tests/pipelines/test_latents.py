"""How large a run's images are is known before its first denoiser call, on every kind of pipeline."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from guided_runs import built
from zoo import CASES, run

import trimtab
from trimtab import Guidance, Run, Step, parameter

TOLD = ["sd15", "sd3", "dit", "ddpm", "flux", "qwenimage", "if_", "instruct_pix2pix", "sd_inpaint", "sana_sprint",
        "flux_kontext", "z_image", "lumina", "wan"]  # fmt: skip
"""By kind of input: latents, pixels, packed tokens, what more is joined to them, lists, another factor, videos."""
PREPARED = {"dit": False, "ddpm": False, "if_": False}
"""Whether the pipeline prepares its latents by a method; if not, there may be more rows than images."""


@dataclass
class Sizes(Guidance):
    """Notes what is said before the first call, and what the clean estimate decodes to."""

    told: list = parameter([], "Before.")
    seen: list = parameter([], "Then.")

    def setup(self, run: Run) -> None:
        run.check_step(lambda step: self.told.append(tuple(step.decode(step.sample).shape)))

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(step.decode(x0).shape))
        return x0


@pytest.mark.parametrize("name", TOLD)
def test_what_is_told_before_the_first_call_is_what_the_estimate_decodes_to(name: str) -> None:
    pipe, sizes = built(name), Sizes()
    with pipe.guidance(sizes, name="sizes"):
        run(pipe, CASES[name])
    [(rows, *size)], (images, *decoded) = sizes.told, sizes.seen[0]
    assert size == decoded
    assert rows == images if PREPARED.get(name, True) else rows % images == 0


@dataclass
class Last(Guidance):
    """Notes what the last sample of a run decodes to."""

    seen: list = parameter([], "Then.")

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        if step.index == step.count - 1 and sample.ndim > 2:
            self.seen[:] = [step.decode(sample.float())]
        return sample


PICTURES = ["sd15", "sdxl", "sd3", "pixart", "dit", "ddpm", "flux", "qwenimage", "if_", "instruct_pix2pix",
            "flux_kontext", "lcm", "sd_img2img", "sd_inpaint", "lumina", "z_image", "prx_pixel", "sana_sprint",
            "kandinsky_combined", "wan", "wan22", "cosmos_video2world"]  # fmt: skip
"""Scaled, shifted, by channel, by channel and frame, by the scheduler's data, not at all; pixels; packed; videos."""


@pytest.mark.parametrize("name", PICTURES)
def test_what_the_last_sample_decodes_to_is_the_image_that_the_pipeline_returns(name: str) -> None:
    pipe, last = built(name), Last(seen=[])
    with pipe.guidance(last, name="last"):
        result = run(pipe, CASES[name], output_type="np")
    (decoded,) = last.seen
    returned = torch.as_tensor(np.asarray(result)).float()
    returned = returned.reshape(-1, *returned.shape[-3:]).movedim(-1, 1)
    ours = (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2).flatten(0, 1) if decoded.ndim == 5 else decoded / 2 + 0.5
    # Cosmos returns its frames as bytes, rounded down; the others what was decoded.
    near = 1 / 255 + 1e-6 if name == "cosmos_video2world" else 1e-6
    torch.testing.assert_close(ours.clamp(0, 1), returned, atol=near, rtol=0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ltx_image2video", "of its frames, those that are given are not in the sample"),
        ("skyreels_forcing", "it goes through its frames one by one"),
    ],
)
def test_samples_that_are_no_whole_video_are_refused(name: str, why: str) -> None:
    with pytest.raises(trimtab.UnsupportedPipelineError, match=why), built(name).guidance(Last(seen=[]), name="last"):
        run(built(name), CASES[name])


def test_a_stage_of_embeddings_has_no_image() -> None:
    pipe = built("kandinsky_combined")
    with (
        pytest.raises(trimtab.UnsupportedPipelineError, match="at this stage it makes embeddings"),
        pipe.guidance("tfg", energy=lambda x: x.flatten(1).sum(1)),
    ):
        run(pipe, CASES["kandinsky_combined"])


@pytest.mark.parametrize("name", ["animatediff", "svd", "ltx"])
def test_videos_that_nobody_can_decode_here_are_refused_before_the_first_call(name: str) -> None:
    pipe, sizes, calls = built(name), Sizes(), []
    handle = getattr(pipe, CASES[name].denoiser).register_forward_pre_hook(lambda *_: calls.append(1))
    attached = pipe.guidance(sizes, name="sizes")
    with handle, pytest.raises(trimtab.UnsupportedPipelineError, match="that works on the sample itself"), attached:
        run(pipe, CASES[name])
    assert not calls


@pytest.mark.parametrize("guidance", [Sizes(), "pag"], ids=["checked", "not checked"])
def test_the_samples_that_were_prepared_are_not_kept_beyond_the_first_call(
    guidance: Guidance | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, case, kept, alive = built("sd15"), CASES["sd15"], [], []
    original = type(pipe).prepare_latents

    def noted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        latents: torch.Tensor = original(self, *args, **kwargs)
        kept.append(weakref.ref(latents))
        return latents

    monkeypatch.setattr(type(pipe), "prepare_latents", noted)

    def look(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        alive.append(kept[0]() is not None)
        return tensors

    with pipe.guidance(guidance, name="acting"):
        run(pipe, case, callback_on_step_end=look)
    assert len(alive) > 1 and not alive[-1]


def test_what_is_noted_of_the_pipeline_is_undone() -> None:
    pipe = built("flux")
    with pipe.guidance(Sizes(), name="sizes"):
        run(pipe, CASES["flux"])
    assert "prepare_latents" not in vars(pipe)
