"""Every built-in plug-in passes the kit that is meant for everybody's, run as anybody runs it."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from .examples import example

pytest_plugins = ["pytester"]

BUILTIN = sorted(p.name for p in entry_points(group="trimtab.guidance") if p.dist and p.dist.name == "trimtab")


class Author:
    """Stands for a `conftest.py`."""

    pytest_trimtab_example = staticmethod(example)


@pytest.mark.parametrize("name", BUILTIN)
def test_it_conforms(name: str, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(
        "--trimtab-plugin", name, "-q", "-rs", "-p", "no:cacheprovider", "-W", "ignore", plugins=[Author()]
    )
    outcomes = result.parseoutcomes()
    assert result.ret == 0, str(result.stdout)
    assert outcomes["passed"] > outcomes.get("skipped", 0), str(result.stdout)
