"""Every built-in plug-in passes the kit that is meant for everybody's, run as anybody runs it."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from . import examples
from .kit import run_kit

BUILTIN = sorted(p.name for p in entry_points(group="trimtab.guidance") if p.dist and p.dist.name == "trimtab")


@pytest.mark.parametrize("name", BUILTIN)
def test_it_conforms(name: str, tmp_path: Path) -> None:
    result = run_kit(tmp_path, "--trimtab-plugin", name, "-q", "-rs", plugins=(examples,))
    assert result.code == 0, result.text
    assert result.count("passed") > result.count("skipped"), result.text
