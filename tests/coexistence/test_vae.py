"""VAE slicing and tiling come after the last step: what a guided run leaves is decoded as in the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from configured import check_configured


def slicing(pipe: Any) -> None:
    pipe.vae.enable_slicing()


def tiling(pipe: Any) -> None:
    pipe.vae.enable_tiling()


@pytest.mark.parametrize("configure", [slicing, tiling])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_slicing_and_tiling_change_nothing(name: str, configure: Callable[[Any], None]) -> None:
    check_configured(name, configure, output_type="pt")
