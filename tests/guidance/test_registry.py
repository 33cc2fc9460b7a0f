"""Plug-ins: found in metadata, imported at first use, checked, listed when broken, blocked, registered."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers.guiders
import pytest

import trimtab
from trimtab.conformance.tiny import class_conditional
from trimtab.guidance.base import Guidance
from trimtab.guidance.blocking import ALLOWED, BLOCKED, set_allowed, set_blocked
from trimtab.guidance.errors import ParameterError, PluginError, UnknownGuidanceError
from trimtab.guidance.listing import status
from trimtab.guidance.parameters import parameter
from trimtab.guidance.registry import GROUP, Plugin, create, find, identify, isolated, plugins, register, unregister

Provide = Callable[..., Path]

HEAD = """
from dataclasses import dataclass
from typing import ClassVar
from trimtab.guidance.base import Guidance
from trimtab.guidance.listing import status
from trimtab.guidance.parameters import parameter
"""


def mine(**attributes: Any) -> type[Guidance]:
    """A fresh guidance class, as a notebook cell makes one."""

    @dataclass
    class Mine(Guidance):
        name: ClassVar[str] = "me.mine"
        scale: float = parameter(1.0, "Strength.", ge=0)

    for key, value in attributes.items():
        setattr(Mine, key, value)
    return Mine


# -- discovery ---------------------------------------------------------------------------------------------------------
def test_importing_the_package_imports_no_plug_in() -> None:
    program = (
        "import sys, trimtab; from trimtab.guidance import registry, recipe, order; registry.plugins();"
        "print([name for name in sys.modules if name.startswith('trimtab.guidance.plugins.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_discovery_reads_metadata_only(provide: Provide) -> None:
    provide("acme-bomb", "0.3", {"acme.bomb": "acme_bomb:Bomb"}, acme_bomb="raise RuntimeError('imported')")
    assert plugins()["acme.bomb"] == Plugin("acme.bomb", "acme_bomb:Bomb", "acme-bomb", "0.3", "entry point")
    assert "acme_bomb" not in sys.modules


def test_a_plug_in_is_imported_at_first_use(tilt: Path) -> None:
    assert "acme_tilt" not in sys.modules
    cls = find("acme.tilt")
    assert cls is sys.modules["acme_tilt"].Tilt
    assert find("acme.tilt") is cls
    assert identify(cls) == plugins()["acme.tilt"]
    assert str(identify(cls)) == "acme.tilt (acme-tilt 1.2)"


def test_many_threads_get_one_class(provide: Provide) -> None:
    source = HEAD + "import time; time.sleep(0.05)\n@dataclass\nclass Slow(Guidance):\n    name = 'acme.slow'\n"
    provide("acme-slow", "1.0", {"acme.slow": "acme_slow:Slow"}, acme_slow=source)
    found: list[type[Guidance]] = []
    threads = [threading.Thread(target=lambda: found.append(find("acme.slow"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_package_installed_after_the_first_look_is_found(provide: Provide, tmp_path: Path) -> None:
    with pytest.raises(UnknownGuidanceError):
        find("acme.late")
    source = HEAD + "@dataclass\nclass Late(Guidance):\n    name = 'acme.late'\n"
    provide("acme-late", "1.0", {"acme.late": "acme_late:Late"}, acme_late=source)
    assert find("acme.late").name == "acme.late"


def test_a_plug_in_is_a_frozen_value() -> None:
    plugin = Plugin("a.b", "m:o", "d", "1")
    with pytest.raises(FrozenInstanceError):
        plugin.name = "c"  # type: ignore[misc]


def test_an_unknown_name_gets_the_nearest_and_the_list(tilt: Path) -> None:
    """And no command to install a misspelt name, under which anybody might publish."""
    with pytest.raises(UnknownGuidanceError) as caught:
        find("acme.tild")
    message = str(caught.value)
    assert "There is no guidance 'acme.tild'. Did you mean 'acme.tilt'? Installed: acme.tilt" in message
    assert "pip install" not in message


def test_a_name_like_no_other_may_come_from_a_package(tilt: Path) -> None:
    with pytest.raises(UnknownGuidanceError) as caught:
        find("zephyr")
    assert str(caught.value).endswith("perhaps (if you trust its author): pip install trimtab-zephyr")


@pytest.mark.parametrize(
    ("name", "guider"),
    [
        ("apg", "AdaptiveProjectedGuidance"),
        ("cfg_zero_star", "ClassifierFreeZeroStarGuidance"),
        ("CFG-Zero*", "ClassifierFreeZeroStarGuidance"),
        ("tcfg", "TangentialClassifierFreeGuidance"),
        ("fdg", "FrequencyDecoupledGuidance"),
        ("mag", "MagnitudeAwareGuidance"),
        ("apg_mix", "AdaptiveProjectedMixGuidance"),
        ("adaptive_projected_guidance", "AdaptiveProjectedGuidance"),
    ],
)
def test_a_guider_of_diffusers_is_named_as_what_it_is(name: str, guider: str) -> None:
    with pytest.raises(UnknownGuidanceError) as caught:
        find(name)
    assert str(caught.value) == (
        f"There is no guidance {name!r}, but Diffusers has it as a guider: add_guidance({guider}(...)) after "
        f"`from diffusers.guiders import {guider}`; in a command, --guidance guider:guider={guider}."
    )
    assert hasattr(diffusers.guiders, guider)


def test_a_guider_that_cannot_serve_is_named_by_its_plug_in() -> None:
    with pytest.raises(UnknownGuidanceError, match="Did you mean 'slg'"):
        find("skip_layer_guidance")


def test_no_command_is_made_of_a_name_that_is_not_plain() -> None:
    with pytest.raises(UnknownGuidanceError) as caught:
        find("x; rm -rf ~")
    assert "pip" not in str(caught.value)


# -- creation ----------------------------------------------------------------------------------------------------------
def test_create_builds_a_guidance(tilt: Path) -> None:
    guidance = create("acme.tilt", scale=2, order=3)
    assert (guidance.parameters["scale"], guidance.parameters["order"]) == (2.0, 3)


def test_create_refuses_unknown_parameters_and_values(tilt: Path) -> None:
    with pytest.raises(ParameterError, match=r"acme\.tilt: no parameter 'scal'\. Did you mean 'scale'\?"):
        create("acme.tilt", scal=2)
    with pytest.raises(ParameterError, match=r"acme\.tilt: scale=-1 is out of range; allowed: >= 0"):
        create("acme.tilt", scale=-1)


# -- broken plug-ins ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["import no_such_module", "raise SystemExit(3)", "1 / 0", "def f(:", "Other = 1"])
def test_a_broken_plug_in_is_listed_with_its_traceback_and_breaks_nothing_else(
    provide: Provide, tilt: Path, source: str
) -> None:
    provide("acme-bad", "0.1", {"acme.bad": "acme_bad:Bad"}, acme_bad=source)
    with pytest.raises(PluginError, match=r"^Plug-in acme\.bad \(acme-bad 0\.1\) is broken: \w+: ") as caught:
        find("acme.bad")
    listing = status("acme.bad")
    assert listing["status"] == "broken"
    assert "Traceback (most recent call last)" in listing["error"]
    assert type(caught.value.__cause__).__name__ in listing["error"]
    assert find("acme.tilt")
    assert status("acme.tilt")["status"] == "ok"


def test_an_entry_point_must_name_the_class_by_its_own_name(provide: Provide) -> None:
    source = HEAD + "@dataclass\nclass Odd(Guidance):\n    name = 'acme.other'\n"
    provide("acme-odd", "1", {"acme.odd": "acme_odd:Odd"}, acme_odd=source)
    with pytest.raises(PluginError, match=r"acme-odd 1.*Odd\.name is 'acme\.other'; it must be .*'acme\.odd'"):
        find("acme.odd")


# -- conflicts and blocks ----------------------------------------------------------------------------------------------
def test_a_name_claimed_twice_names_both_distributions_and_leaves_others_alone(provide: Provide, tilt: Path) -> None:
    provide("rival-tilt", "0.9", {"acme.tilt": "rival:Tilt", "rival.tilt": "rival:Other"}, rival="")
    with pytest.raises(PluginError) as caught:
        find("acme.tilt")
    assert "acme.tilt (acme-tilt 1.2)" in str(caught.value)
    assert "acme.tilt (rival-tilt 0.9)" in str(caught.value)
    assert status("acme.tilt")["status"] == "broken"
    assert "acme_tilt" not in sys.modules
    cls = mine(name="acme.tilt")
    register(cls, override=True)
    assert find("acme.tilt") is cls


@pytest.mark.parametrize("blocked", ["acme.tilt", "cfg, acme.tilt", "acme.*", "*"])
def test_the_environment_blocks_plug_ins(tilt: Path, monkeypatch: pytest.MonkeyPatch, blocked: str) -> None:
    monkeypatch.setenv(BLOCKED, blocked)
    with pytest.raises(PluginError, match=f"acme.tilt is blocked by the environment variable {BLOCKED}"):
        create("acme.tilt")
    assert status("acme.tilt")["status"] == "blocked"
    assert "acme_tilt" not in sys.modules


def test_the_environment_allows_some_only(tilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "cfg,pag")
    with pytest.raises(PluginError, match=f"{ALLOWED}, which lists only cfg,pag"):
        find("acme.tilt")
    monkeypatch.setenv(ALLOWED, "cfg, acme.*")
    assert find("acme.tilt")
    monkeypatch.setenv(BLOCKED, "acme.tilt")
    with pytest.raises(PluginError, match=BLOCKED):
        find("acme.tilt")


def test_set_blocked_replaces_what_it_blocked_before(tilt: Path) -> None:
    set_blocked("acme.tilt")
    with pytest.raises(PluginError, match=r"blocked by trimtab\.set_blocked"):
        find("acme.tilt")
    set_blocked()
    assert find("acme.tilt")


def test_set_allowed_leaves_only_those_and_what_is_blocked_stays_so(tilt: Path) -> None:
    set_allowed("cfg", "pag")
    with pytest.raises(PluginError, match=r"blocked by trimtab\.set_allowed, which lists only cfg, pag"):
        find("acme.tilt")
    set_allowed("acme.*")
    assert find("acme.tilt")
    set_blocked("acme.tilt")
    with pytest.raises(PluginError, match="set_blocked"):
        find("acme.tilt")


# -- registration ------------------------------------------------------------------------------------------------------
def test_a_registered_class_is_a_plug_in(provide: Provide) -> None:
    cls = register(mine())
    assert find("me.mine") is cls
    assert identify(cls) == plugins()["me.mine"]
    assert plugins()["me.mine"].origin == "registered"
    assert register(cls) is cls
    unregister("me.mine")
    assert "me.mine" not in plugins()
    assert identify(cls) is None
    with pytest.raises(UnknownGuidanceError, match=r"'me\.mine' is not registered"):
        unregister("me.mine")


def test_a_class_without_a_name_of_its_own_is_given_one(provide: Provide) -> None:
    cls = register(mine(name=""), "me.given")
    assert cls.name == "me.given"
    child = register(dataclass(type("Child", (cls,), {})), "me.child")
    assert (child.name, cls.name) == ("me.child", "me.given")
    with pytest.raises(PluginError, match="has no name"):
        register(mine(name=""))
    with pytest.raises(PluginError, match=r"Mine\.name is 'me\.mine'; it must be"):
        register(mine(), "me.other")


def test_registering_a_taken_name_needs_an_override(tilt: Path) -> None:
    original, cls = find("acme.tilt"), mine(name="acme.tilt")
    with pytest.raises(PluginError, match=r"acme-tilt 1\.2.* and acme\.tilt \(registered from .*Mine\)"):
        register(cls)
    register(cls, override=True)
    assert find("acme.tilt") is cls
    assert identify(original) is None
    unregister("acme.tilt")
    assert find("acme.tilt") is original


def test_registering_the_class_of_an_installed_plug_in_changes_nothing(tilt: Path) -> None:
    register(find("acme.tilt"))
    assert plugins()["acme.tilt"].origin == "entry point"


def test_a_notebook_cell_run_again_replaces_its_class_on_request(provide: Provide) -> None:
    register(mine())
    again = mine()
    with pytest.raises(PluginError, match="override=True"):
        register(again)
    register(again, override=True)
    assert find("me.mine") is again


# -- the contract ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"api_version": "2.0"}, r"written for hook interface 2\.0, but this trimtab has 1\.0; upgrade trimtab"),
        ({"api_version": "1.1"}, "upgrade trimtab"),
        ({"api_version": "0.9"}, "upgrade the plug-in"),
        ({"api_version": "one"}, "api_version='one' is not a version; write it like '1.0'"),
        ({"api_version": 1.0}, "is not a version"),
        ({"delta": lambda self, step: None}, r"Mine\.delta\(self, step\) must take delta\(self, step, predictions\)"),
        ({"setup": lambda self: None}, r"must take setup\(self, run\)"),
        ({"branches": staticmethod(lambda step: ())}, r"must take branches\(self, step\)"),
        ({"after_step": lambda self, step, *, sample: sample}, "must take after_step"),
        ({"loss": 3.0}, r"Mine\.loss = 3\.0 must take loss\(self, step, x0\)"),
        ({"before": "cfg"}, r"Mine\.before='cfg'; allowed: a tuple of names"),
        ({"after": ("me.mine",)}, "names of other plug-ins"),
        ({"exclusive": ""}, "exclusive=''; allowed: None or the name of a slot"),
        ({"needs": frozenset({"magic"})}, "allowed: a frozenset of 'attention', 'gradient'"),
        ({"deprecated": True}, "deprecated=True; allowed: a sentence that says what to use instead"),
        ({"differentiate": "x1"}, "allowed: 'x0' or 'x_t'"),
    ],
)
def test_a_class_that_breaks_the_contract_is_refused(
    provide: Provide, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        register(mine(**attributes))
    assert "me.mine" not in plugins()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "class Bad(Guidance):\n    name = 'a.b'\n    w: float = parameter(1.0, 'x')",
            "decorate Bad with @dataclass; w",
        ),
        ("@dataclass\nclass Bad(Guidance):\n    name = 'a.b'\n    w: float = 1.0", "make the field 'w' with"),
        (
            "@dataclass\nclass Bad(Guidance):\n    name = 'a.b'\n    w: float = parameter(1.0, ' ')",
            "'w' needs a sentence",
        ),
        (
            "@dataclass\nclass Bad(Guidance):\n    name = 'a.b'\n    w: float = parameter(-1.0, 'x', ge=0)",
            r"A default or off value is not allowed: a\.b: w=-1\.0 is out of range; allowed: >= 0",
        ),
        (
            "@dataclass\nclass Bad(Guidance):\n    name = 'a.b'\n    w: float = parameter(1.0, 'x', ge=0, off=-2)",
            r"off value is not allowed: a\.b: w=-2 is out of range; allowed: >= 0",
        ),
        (
            "@dataclass\nclass Bad(Guidance):\n    name = 'a.b'\n    w: 'Nope' = parameter(1, 'x')",
            "'Nope' is not defined",
        ),
        ("class Bad:\n    name = 'a.b'", "is not a subclass of trimtab.Guidance"),
        ("Bad = 3", "is not a subclass"),
        ("Bad = Guidance", "is not a subclass"),
    ],
)
def test_a_plug_in_that_breaks_the_contract_is_broken(provide: Provide, body: str, message: str) -> None:
    provide("acme-b", "1.0", {"a.b": "acme_b:Bad"}, acme_b=HEAD + body + "\n")
    with pytest.raises(PluginError, match=r"Plug-in a\.b \(acme-b 1\.0\) cannot be used\. .*" + message):
        find("a.b")
    assert status("a.b")["status"] == "broken"


def test_hooks_may_take_more_if_it_is_optional(provide: Provide) -> None:
    register(mine(delta=lambda self, step, predictions, more=None: None, loss=lambda *arguments: None))


# -- deprecation -------------------------------------------------------------------------------------------------------
def test_a_deprecated_plug_in_works_and_says_what_to_use_instead(provide: Provide) -> None:
    source = HEAD + "@dataclass\nclass Old(Guidance):\n    name = 'acme.old'\n    deprecated = \"Use 'acme.tilt'.\"\n"
    provide("acme-old", "3.1", {"acme.old": "acme_old:Old"}, acme_old=source)
    with pytest.warns(FutureWarning, match=r"^Plug-in acme\.old \(acme-old 3\.1\) is deprecated\. Use 'acme\.tilt'\.$"):
        assert create("acme.old").label == "acme.old"
    with pytest.warns(FutureWarning) as warned:
        trimtab.guide(class_conditional(["one"])).add_guidance("acme.old")
    assert warned[0].filename == __file__  # the line of who uses it


def test_a_deprecated_parameter_warns_only_where_it_is_given(provide: Provide) -> None:
    @dataclass
    class Mine(Guidance):
        name: ClassVar[str] = "me.mine"
        weight: float = parameter(1.0, "Old name.", deprecated="Use scale.")

    register(Mine)
    with pytest.warns(FutureWarning, match=r"me\.mine: weight is deprecated\. Use scale\."):
        create("me.mine", weight=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create("me.mine", start=0.5)


# -- isolation ---------------------------------------------------------------------------------------------------------
def test_isolated_there_is_only_what_is_registered_inside(tilt: Path) -> None:
    outside, cls = plugins(), find("acme.tilt")
    with isolated():
        assert plugins() == {} == plugins(refresh=True)
        with pytest.raises(UnknownGuidanceError, match="Installed: none"):
            find("acme.tilt")
        register(mine(name="acme.tilt"))
        assert find("acme.tilt") is not cls
    assert plugins() == outside
    assert find("acme.tilt") is cls


def test_metadata_that_cannot_be_read_costs_its_own_plug_ins_only(
    provide: Provide, tilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = provide("acme-torn", "2.0", {"acme.torn": "acme_torn:Torn"})
    (site / "acme_torn-2.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\nno equals sign\n")
    found = plugins(refresh=True)
    assert "acme.tilt" in found and "pag" in found and "acme.torn" not in found
    assert "entry points of acme-torn cannot be read" in caplog.text
    assert "pip install --force-reinstall acme-torn" in caplog.text


def test_a_distribution_without_a_name_is_listed_as_unknown(provide: Provide) -> None:
    site = provide("acme-nameless", "1", {"acme.nameless": "acme_nameless:It"})
    (site / "acme_nameless-1.dist-info" / "METADATA").unlink()
    assert plugins(refresh=True)["acme.nameless"].distribution == "unknown"
