"""A denoiser with int8 weights is guided as the one that has the same weights in float32, to rounding.

Diffusers imports torchao wherever it is installed, which takes long and writes to the terminal; so `make test` puts it
beside the environment, and runs this file in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from configured import check_configured
from zoo import CASES, run

import trimtab

quantization = pytest.importorskip("torchao.quantization", reason="torchao is installed for `make test` only")


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_int8_weights(name: str) -> None:
    part = CASES[name].denoiser

    def quantise(pipe: Any) -> None:
        quantization.quantize_(getattr(pipe, part), quantization.Int8WeightOnlyConfig())

    def dequantised(plugin: str, parameters: Any) -> torch.Tensor:
        quantised, pipe = CASES[name].build(), trimtab.guide(CASES[name].build())
        quantise(quantised)
        weights = dict(getattr(quantised, part).named_parameters())
        int8 = {key: weight for key, weight in weights.items() if isinstance(weight, quantization.Int8Tensor)}
        for key, weight in int8.items():
            getattr(pipe, part).get_parameter(key).data = weight.dequantize()
        assert int8
        with pipe.guidance(plugin, **parameters):
            return run(pipe, CASES[name])

    check_configured(name, quantise, dequantised, tolerance=1e-5)
