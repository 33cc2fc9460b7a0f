"""What the progress bars say."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from zoo import CASES, run

import trimtab
from trimtab.pipelines import progress


@dataclass
class Slow(trimtab.Guidance):
    """Takes its time before the run."""

    name: ClassVar[str] = "slow"

    def setup(self, run: trimtab.Run) -> None:
        time.sleep(0.2)


def visible(name: str = "sd15") -> Any:
    pipe = trimtab.guide(CASES[name].build())
    pipe.set_progress_bar_config()
    return pipe


def test_the_pipelines_bar_says_who_guides(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = visible()
    pipe.add_guidance("pag", scale=1.0)
    pipe.add_guidance(Slow())
    run(pipe, CASES["sd15"])
    assert "guided by pag, slow: 100%" in capsys.readouterr().err
    pipe.clear_guidance()
    run(pipe, CASES["sd15"])
    assert "guided" not in capsys.readouterr().err


def test_a_name_that_the_user_gave_it_stays(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = visible()
    pipe.set_progress_bar_config(desc="mine")
    pipe.add_guidance(Slow())
    run(pipe, CASES["sd15"])
    said = capsys.readouterr().err
    assert "mine: 100%" in said and "guided" not in said and pipe._progress_bar_config == {"desc": "mine"}


def test_what_takes_long_to_prepare_is_named_and_what_does_not_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = visible()
    pipe.add_guidance(Slow())
    run(pipe, CASES["sd15"])
    assert "prepare slow" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    run(pipe, CASES["sd15"])
    assert "prepare slow" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bar_that_is_switched_off_stays_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    pipe = visible()
    pipe.set_progress_bar_config(disable=True)
    pipe.add_guidance(Slow())
    run(pipe, CASES["sd15"])
    assert capsys.readouterr().err == ""
