"""What a pipeline is made of is read without a side effect."""

from __future__ import annotations

import warnings

import pytest
from zoo import CASES

from trimtab.pipelines.components import parts_of


@pytest.mark.parametrize("name", ["sd15", "sdxl", "wan"])
def test_settings_of_the_configuration_are_not_read_as_attributes(name: str) -> None:
    """Diffusers warns of that, as of `boundary_ratio` of Wan."""
    pipe = CASES[name].build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = parts_of(pipe)
    assert set(pipe.components) <= set(parts)
