"""Runs the kit in this process, as `pytest --trimtab-plugin NAME` does in its own.

Not with pytest's `pytester`, which takes every module imported meanwhile out of `sys.modules` again, also those of
which this package keeps the classes.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ALONE = ("--capture=no", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist", "-W", "ignore")


@dataclass
class Result:
    """What a session came to.

    Attributes:
        code: the exit code.
        text: what it printed.
        reports: those of all tests' calls, and of what else did not pass.
    """

    code: int = 0
    text: str = ""
    reports: list[pytest.TestReport] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.reports.append(report)

    def count(self, outcome: str) -> int:
        return sum(report.outcome == outcome for report in self.reports)


def run_kit(folder: Path, *arguments: str, plugins: tuple[Any, ...] = ()) -> Result:
    """One session of pytest in `folder`, apart from this one's settings."""
    result, printed = Result(), io.StringIO()
    place = ("--rootdir", str(folder), "--confcutdir", str(folder))
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result.code = int(pytest.main([*ALONE, *place, *arguments], plugins=[result, *plugins]))
    result.text = printed.getvalue()
    return result
