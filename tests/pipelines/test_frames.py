"""Frames of videos, packed rows, and rows beside the mask of an edit are told from what the scheduler is given."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.pipelines.frames import with_videos
from trimtab.pipelines.observation import observe


def step(model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
    """A scheduler's."""
    return sample - model_output


def stepped(outputs: list[torch.Tensor], model_output: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    """The shape in which a run sees `model_output`, and what the pipeline gets of the step."""
    seen: list[tuple[int, ...]] = []

    def on_step(scheduler: Any, bound: inspect.BoundArguments, original: Any) -> Any:
        seen.append(tuple(bound.arguments["model_output"].shape))
        return original(*bound.args, **bound.kwargs)

    calls: Any = [SimpleNamespace(handed_back=output) for output in outputs]
    bound = inspect.signature(step).bind(model_output, 1, torch.ones_like(model_output))
    result = with_videos(on_step, lambda: calls)(None, bound, step)
    return seen[0], result


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("frames", [2, 3])
def test_frames_that_are_stepped_as_images_are_seen_as_videos(videos: int, frames: int) -> None:
    rows = torch.randn(2 * videos, 4, frames, 5, 6)
    uncond, cond = rows.chunk(2)
    images = (uncond + 3.0 * (cond - uncond)).transpose(1, 2).flatten(0, 1)
    shape, result = stepped([rows], images)
    assert shape == (videos, 4, frames, 5, 6)
    assert torch.equal(result, 1 - images)


def test_one_frame_of_as_many_videos_as_they_have_frames_is_seen_as_images() -> None:
    cond, uncond = torch.randn(2, 3, 4, 3, 5, 6)
    images = (uncond + 3.0 * (cond - uncond))[:, :, 1]
    shape, result = stepped([cond, uncond], images)
    assert shape == (3, 4, 5, 6)
    assert torch.equal(result, 1 - images)


def test_rows_that_are_packed_into_tokens_are_recognised() -> None:
    rows = torch.randn(2, 4, 3, 5, 6)
    packed = -(rows[:1] + 3.0 * (rows[1:] - rows[:1])).flatten(2).transpose(1, 2)
    seen = observe([rows], packed, torch.randn_like(packed))
    assert seen is not None and seen.exact and seen.gain == -1.0 and seen.roles == ("uncond", "cond")
    assert torch.equal(seen.view.transpose(seen.view.of(rows), rows), rows)


def test_lines_without_an_edit_do_not_make_the_others_held() -> None:
    """LEdits++ adds its edit inside of a mask; whole lines of the picture may lie outside of it."""
    rows = torch.randn(2, 4, 16, 16)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 2:5] = 1.0
    edited = rows[:1] + 5.0 * mask * (rows[1:] - rows[:1])
    seen = observe([rows], edited, torch.randn_like(edited))
    assert seen is not None and seen.held is None and seen.gain == 1.0


def test_given_frames_are_held() -> None:
    rows, x_t = torch.randn(2, 4, 3, 8, 8), torch.randn(1, 4, 3, 8, 8)
    combined = rows[:1] + 3.0 * (rows[1:] - rows[:1])
    combined[:, :, 0] = torch.randn(1, 4, 8, 8)
    seen = observe([rows], combined, x_t)
    assert seen is not None and seen.held is not None and seen.held.flatten().tolist() == [True, False, False]
