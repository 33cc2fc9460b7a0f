"""What a listing tells of a plug-in: state, phases, cost, parameters, and what it still lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.guidance import registry
from trimtab.guidance.blocking import set_blocked
from trimtab.guidance.errors import UnknownGuidanceError
from trimtab.guidance.listing import advice, details, report, sheet, status, table

from .conftest import Provide

HEAD = "from dataclasses import dataclass\nfrom trimtab import Guidance, parameter\n"


def test_status_lists_a_plug_in_for_json(tilt: Path) -> None:
    assert json.loads(json.dumps(status("acme.tilt"))) == {
        "name": "acme.tilt",
        "value": "acme_tilt:Tilt",
        "distribution": "acme-tilt",
        "version": "1.2",
        "origin": "entry point",
        "status": "ok",
        "error": None,
        "api_version": "1.0",
        "phases": ["branches", "delta"],
        "exclusive": None,
        "cost": None,
        "needs": [],
        "deprecated": None,
    }
    with pytest.raises(UnknownGuidanceError):
        status("no.such")


def test_the_cost_is_the_paragraph_that_says_so() -> None:
    assert status("pag")["cost"] == (
        "one more evaluation a step, none before its first perturbed layer; none at scale 0 and outside its window."
    )


def test_details_add_the_description_and_what_switches_it_off(tilt: Path) -> None:
    described = details("acme.tilt")
    assert described["doc"] == "Push along (1, -1)."
    assert {one["name"]: one["off"] for one in described["parameters"] if one["off"] is not None} == {"scale": 0.0}
    assert {one["name"]: one["off"] for one in details("cfg")["parameters"] if one["off"] is not None} == {"scale": 1.0}
    assert "off at 1" in sheet(details("cfg")) and "Claims the slot: cfg" in sheet(details("cfg"))


def test_defaults_and_what_switches_off_are_shown_whatever_their_type(provide: Provide) -> None:
    provide(
        "odd-thing", "1", {"acme.odd": "odd_thing:Odd"},
        odd_thing=HEAD + "@dataclass\nclass Odd(Guidance):\n    name = 'acme.odd'\n"
        "    parts: list[float] = parameter([1.0, 2.0], 'x.')\n    on: bool = parameter(True, 'y.', off=False)\n"
        "    mode: str = parameter('all', 'z.', off='none')\n",
    )  # fmt: skip
    text = sheet(details("acme.odd"))
    assert "parts: list of float = [1.0, 2.0]" in text and "off at False" in text and "off at 'none'" in text


def test_advice_names_each_thing_that_is_lacking(provide: Provide, tilt: Path) -> None:
    provide(
        "bare-thing", "1", {"bare": "bare_thing:Bare"},
        bare_thing=HEAD + "@dataclass\nclass Bare(Guidance):\n    name = 'bare'\n    w: float = parameter(1.0, 'x.')\n",
    )  # fmt: skip
    phase, docstring, off, vendor = advice(status("bare"))
    assert "overrides no phase, so it does nothing; is a hook misspelt?" in phase and "guide_x0" in phase
    assert "Write a docstring" in docstring and "parameter(..., off=0.0)" in off and "vendor.bare" in vendor
    (cost,) = advice(status("acme.tilt"))
    assert "Cost:" in cost
    assert advice(status("pag")) == []


def test_what_acts_in_setup_alone_is_not_told_that_it_does_nothing() -> None:
    assert not [name for name in registry.plugins() if "does nothing" in " ".join(advice(status(name)))]


def test_what_a_module_prints_is_not_on_the_output_of_who_lists_it(
    provide: Provide, capsys: pytest.CaptureFixture[str]
) -> None:
    provide(
        "loud-thing", "1", {"acme.loud": "loud_thing:Loud"},
        loud_thing=HEAD + "print('hello')\n@dataclass\nclass Loud(Guidance):\n    name = 'acme.loud'\n",
    )  # fmt: skip
    assert status("acme.loud")["status"] == "ok"
    printed = capsys.readouterr()
    assert printed.out == "" and "hello" in printed.err


def test_the_table_shows_the_phases_of_a_step() -> None:
    assert "guide_x0, loss, after_step  " in table([status("tfg")])
    assert table([status("smooth")]).splitlines()[1].split()[:3] == ["smooth", "ok", "setup"]


@pytest.mark.parametrize("write", [lambda listing: table([listing]), sheet])
def test_a_broken_plug_in_shows_its_traceback(provide: Provide, write: Callable[..., str]) -> None:
    provide("acme-bad", "0.1", {"acme.bad": "acme_bad:Bad"}, acme_bad="1 / 0")
    text = write(details("acme.bad"))
    assert "Traceback" in text and "ZeroDivisionError" in text and "acme-bad 0.1" in text


def test_a_deprecated_plug_in_says_so(provide: Provide) -> None:
    source = HEAD + "@dataclass\nclass Old(Guidance):\n    name = 'acme.old'\n    deprecated = 'Use cfg.'\n"
    provide("acme-old", "3.1", {"acme.old": "acme_old:Old"}, acme_old=source)
    assert "deprecated" in table([status("acme.old")]).splitlines()[1].split()
    assert "Deprecated. Use cfg." in sheet(details("acme.old"))


def test_a_blocked_plug_in_is_reported_and_needs_no_advice(tilt: Path) -> None:
    set_blocked("acme.tilt")
    blocked = details("acme.tilt")
    assert advice(blocked) == []
    assert report([{**blocked, "advice": []}]).splitlines()[0] == "acme.tilt: blocked"
