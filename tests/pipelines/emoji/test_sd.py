"""The loss of the text-to-image UNet counts every level of noise."""

from __future__ import annotations

import torch

from trimtab.pipelines.emoji.sd import build_scheduler, level_weight


def test_the_weight_of_a_level_is_that_of_its_signal_to_noise_ratio_and_whole_for_all_noisy_ones() -> None:
    alphas = build_scheduler().alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    weight = level_weight(alphas, 5.0)
    torch.testing.assert_close(weight, (snr + 1).clamp(max=5) / (snr + 1))
    assert alphas[-1] == 0 and (weight[snr <= 4] == 1).all() and (weight[snr > 4] < 1).all()
