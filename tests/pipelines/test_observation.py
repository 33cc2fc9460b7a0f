"""How a denoiser's rows become what the scheduler is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.pipelines.call import Call, observe_calls
from trimtab.pipelines.observation import View, observe


@pytest.mark.parametrize("start", [0, 2])
def test_tokens_that_become_frames_are_found_and_put_back(start: int) -> None:
    noise = torch.Generator().manual_seed(0)
    uncond, cond = torch.randn(2, 1, 5 * 4 * 4, 6, generator=noise)
    frames = (uncond + 3.0 * (cond - uncond)).reshape(1, 5, 4, 4, 6).permute(0, 4, 1, 2, 3)
    given = frames[:, :, start : start + 3]

    found = observe([torch.cat([uncond, cond])], given, torch.randn(given.shape, generator=noise))

    assert found is not None and found.exact and found.roles == ("uncond", "cond") and found.gain == 1.0
    assert torch.equal(found.view.of(cond), cond.reshape(1, 5, 4, 4, 6).permute(0, 4, 1, 2, 3)[:, :, start : start + 3])
    part = torch.randn(given.shape, generator=noise)
    back = found.view.transpose(part, cond)
    assert back.shape == cond.shape and torch.equal(found.view.of(back), part)
    # The transpose: <of(a), b> = <a, transpose(b)>.
    torch.testing.assert_close((found.view.of(cond) * part).sum(), (cond * back).sum())


def test_tokens_that_make_no_frames_are_not_found() -> None:
    assert observe([torch.randn(1, 33, 6)], torch.randn(1, 6, 2, 4, 4), torch.randn(1, 6, 2, 4, 4)) is None


def test_a_view_of_all_changes_nothing() -> None:
    rows = torch.randn(2, 3, 4)
    assert View().of(rows) is rows and torch.equal(View().transpose(rows, rows), rows)


def test_a_weight_for_each_channel_is_found_where_one_for_all_does_not_do() -> None:
    """Lumina's combination: three channels at g = 4, the last one the conditional row's, the sign flipped."""
    noise = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 4, 8, 8, generator=noise)
    g = torch.tensor([4.0, 4.0, 4.0, 1.0]).reshape(1, 4, 1, 1)
    given = -(uncond + g * (cond - uncond))

    found = observe([torch.cat([cond, uncond])], given, torch.randn(given.shape, generator=noise))

    assert found is not None and found.exact and not found.rescaled
    assert found.gain == -1.0 and found.roles == ("cond", "uncond")
    for weight, expected in zip(found.weights, (-g, g - 1), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.combine([torch.cat([cond, uncond])], given), given)


def test_a_rescale_of_each_token_is_not_taken_for_weights_of_its_own() -> None:
    """Qwen-Image's norm: each token has weights, but their sums differ."""
    noise = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 1, 16, 16, generator=noise)
    total = uncond + 3.0 * (cond - uncond)
    given = total * cond.norm(dim=-1, keepdim=True) / total.norm(dim=-1, keepdim=True)
    found = observe([cond, uncond], given, torch.randn(given.shape, generator=noise))
    assert found is not None and found.rescaled and found.gain == 1.0 and found.roles == ("cond", "uncond")


def test_no_channel_escapes_the_fit() -> None:
    """A stride through large predictions that divided the number of channels would see a part of them only."""
    noise = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 1, 4096, 64, generator=noise)
    given = uncond + 3.0 * (cond - uncond)
    given[..., 1::2] *= 0.5
    found = observe([cond, uncond], given, torch.randn(given.shape, generator=noise))
    assert found is not None and found.rescaled


@pytest.mark.parametrize("frame", [0, 2])
def test_the_frame_that_a_scheduler_is_given_is_found(frame: int) -> None:
    noise = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 1, 4, 3, 6, 6, generator=noise)
    given = (uncond + 3.0 * (cond - uncond))[:, :, frame]
    found = observe([cond, uncond], given, torch.randn(given.shape, generator=noise))
    assert found is not None and found.exact and found.gain == 1.0
    assert torch.equal(found.view.of(cond), cond[:, :, frame])
    back = found.view.transpose(given, cond)
    assert torch.equal(back[:, :, frame], given) and back.count_nonzero() == given.count_nonzero()


def test_given_frames_are_held() -> None:
    """Cosmos 2 hands the scheduler (x_t - x_0) / sigma, in which the first frames of x_0 are the given ones."""
    noise = torch.Generator().manual_seed(0)
    cond, uncond, x_t, frames = torch.randn(4, 1, 8, 4, 6, 6, generator=noise)
    combined = 0.4 * x_t - 0.6 * (uncond + 3.0 * (cond - uncond))
    held = torch.tensor([True, False, False, False]).reshape(1, 1, 4, 1, 1)
    given = (x_t - torch.where(held, frames, combined)) / 1.5

    found = observe([cond, uncond], given, x_t)

    assert found is not None and found.exact and not found.rescaled and found.roles == ("cond", "uncond")
    assert found.held is not None and torch.equal(found.held, held)
    assert found.gain == pytest.approx(0.4) and found.on_sample == pytest.approx(0.4)
    assert torch.equal(found.kept(given, given + 1.0)[:, :, 0], given[:, :, 0])


def test_given_tokens_whose_prediction_is_zero_are_held() -> None:
    """LTX-2: the velocity of a given token is zero, so that it stays where it is."""
    noise = torch.Generator().manual_seed(0)
    row, x_t = torch.randn(2, 1, 12, 8, generator=noise)
    held = (torch.arange(12) < 4).reshape(1, 12, 1)
    found = observe([row], torch.where(held, 0.0, row), x_t)
    assert found is not None and found.exact and found.gain == 1.0
    assert found.held is not None and torch.equal(found.held, held)


@pytest.mark.parametrize("frame", [0, 1])
def test_a_cut_of_which_nothing_is_held_explains_more_than_one_of_which_half_is(frame: int) -> None:
    """Two frames of two by two: a row of both frames shares its entries with a frame, but for those of the other."""
    for seed in range(8):
        row = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
        target = row[:, :, frame]
        seen = observe([row, row * (1 + 1e-7)], target, torch.randn(1, 16, 2, 2))
        assert seen is not None and seen.exact
        assert seen.held is None and torch.equal(seen.view.of(row), target)


@pytest.mark.parametrize("at_end", [True, False])
def test_rows_beside_texts_of_different_lengths_are_cut_alike(at_end: bool) -> None:
    """As those of two denoisers, of which one sees no text (Ideogram 4)."""
    cond, uncond = torch.randn(1, 9, 4), torch.randn(1, 6, 4)
    own = [rows[:, -6:] if at_end else rows[:, :6] for rows in (cond, uncond)]
    seen = observe([cond, uncond], own[1] - 3 * (own[0] - own[1]), torch.randn(1, 6, 4))
    assert seen is not None and seen.exact
    torch.testing.assert_close(seen.view.of(cond), own[0])
    torch.testing.assert_close(seen.view.of(seen.view.transpose(own[0], cond)), own[0])


def test_rows_that_differ_in_more_than_their_length_are_not_cut() -> None:
    sample = torch.randn(1, 6, 4)
    assert observe([torch.randn(1, 9, 4), torch.randn(1, 6, 5)], sample, sample) is None


@pytest.mark.parametrize("scale", [1.2, 3.0])
def test_two_denoisers_whose_predictions_resemble_each_other_are_seen_as_one_combination(scale: float) -> None:
    """Each by itself explains most of it."""
    cond, between, x_t = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    uncond = cond + 0.1 * between
    calls = [Call(nn.Identity(), nn.Identity(), (), {}, 1, None, rows, rows) for rows in (cond, uncond)]
    seen, taken = observe_calls("", calls, uncond + scale * (cond - uncond), x_t)
    assert len(taken) == 2 and seen.exact and seen.roles == ("cond", "uncond")
