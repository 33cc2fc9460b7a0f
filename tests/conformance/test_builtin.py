"""Every built-in plug-in passes the kit that is meant for everybody's, run as anybody runs it."""

from __future__ import annotations

from importlib.metadata import entry_points

import hypothesis.strategies  # noqa: F401  (what a run inside this process imports is forgotten after it)
import pytest

from . import examples

pytest_plugins = ["pytester"]

BUILTIN = sorted(p.name for p in entry_points(group="trimtab.guidance") if p.dist and p.dist.name == "trimtab")


@pytest.mark.parametrize("name", BUILTIN)
def test_it_conforms(name: str, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(
        "--trimtab-plugin", name, "-q", "-rs", "-p", "no:cacheprovider", "-W", "ignore", plugins=[examples]
    )
    outcomes = result.parseoutcomes()
    assert result.ret == 0, str(result.stdout)
    assert outcomes["passed"] > outcomes.get("skipped", 0), str(result.stdout)
