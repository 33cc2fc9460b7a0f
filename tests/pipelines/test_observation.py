"""How a denoiser's rows become what the scheduler is given."""

from __future__ import annotations

import pytest
import torch

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
