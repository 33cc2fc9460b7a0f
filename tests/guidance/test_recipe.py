"""Recipes: what is saved loads again, equal; everything else is refused with one clear message."""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.guidance import recipe
from trimtab.guidance.base import API_VERSION, Guidance
from trimtab.guidance.blocking import set_blocked
from trimtab.guidance.errors import ParameterError, RecipeError, SourceError
from trimtab.guidance.registry import create, register, unregister

Provide = Callable[..., Path]

numbers = st.floats(allow_nan=False, allow_infinity=False)
unbounded = st.floats(allow_nan=False)
words = st.text(st.characters(exclude_categories=["Cs"]))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | words,
    lambda inner: st.lists(inner) | st.dictionaries(words, inner),
    max_leaves=5,
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.floats(0, allow_infinity=False),
        "bound": unbounded,
        "order": st.integers(1, 4),
        "mode": st.sampled_from(["fast", "exact"]),
        "layers": words | st.lists(words).map(tuple),
        "weights": st.lists(unbounded).map(tuple),
        "table": st.dictionaries(words, st.none() | numbers),
        "seed": st.none() | st.integers(),
        "both": unbounded | words.filter(lambda word: word not in ("inf", "-inf")),
        "extra": plain,
        "start": st.floats(0, 0.5),
        "stop": st.floats(0.5, 1),
        "sigma_min": st.floats(0, 1),
        "sigma_max": st.floats(1),
    },
)


def test_a_recipe_gives_no_consent() -> None:
    """To unpickle is for who calls to allow, not for a file from anywhere."""
    data = recipe.dump({"joint": create("joint", weights="owner/repo", image="depth.png")})
    data["guidances"][0]["parameters"]["allow_pth"] = True
    with pytest.raises(RecipeError, match="joint: allow_pth=True is a consent that a recipe cannot give"):
        recipe.load(data)


def entry(**changes: Any) -> dict[str, Any]:
    """A recipe of one guidance, with changes to its entry."""
    one = {
        "name": "a", "plugin": "acme.tilt", "distribution": "acme-tilt", "version": "1.2", "api_version": "1.0",
        "parameters": {},
    }  # fmt: skip
    return {"format": 1, "trimtab": "0.1.0", "guidances": [one | changes]}


# -- round trip --------------------------------------------------------------------------------------------------------
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(values=PARAMETERS)
def test_what_is_dumped_as_strict_json_loads_again_equal(tilt: Path, values: dict[str, Any]) -> None:
    guidance = create("acme.tilt", **values)
    text = json.dumps(recipe.dump({"mine": guidance}), allow_nan=False)
    loaded = recipe.load(json.loads(text))
    assert list(loaded) == ["mine"]
    assert type(loaded["mine"]) is type(guidance)
    assert loaded["mine"] == guidance
    for name, value in guidance.parameters.items():
        assert type(loaded["mine"].parameters[name]) is type(value)


def test_a_recipe_says_all_that_is_needed(tilt: Path) -> None:
    data = recipe.dump({"second": create("acme.tilt", scale=2), "first": create("acme.tilt", layers=("x", "y"))})
    assert data["format"] == 1
    assert data["trimtab"]
    assert [one["name"] for one in data["guidances"]] == ["second", "first"]
    one = data["guidances"][1]
    assert {key: one[key] for key in ("plugin", "distribution", "version", "api_version")} == {
        "plugin": "acme.tilt", "distribution": "acme-tilt", "version": "1.2", "api_version": API_VERSION
    }  # fmt: skip
    assert one["parameters"] == {
        "start": 0.0, "stop": 1.0, "sigma_max": "inf", "sigma_min": 0.0, "scale": 1.0, "bound": "inf", "order": 2,
        "mode": "fast", "layers": ["x", "y"], "weights": [], "table": {}, "seed": None, "both": 0.0, "extra": None,
    }  # fmt: skip


def test_infinity_survives_wherever_the_type_has_numbers(tilt: Path) -> None:
    guidance = create("acme.tilt", bound=-math.inf, weights=(math.inf, 1.0, -math.inf), both=math.inf, layers="inf")
    assert recipe.load(recipe.dump({"a": guidance})) == {"a": guidance}


def test_parameters_that_a_recipe_lacks_have_their_defaults(tilt: Path) -> None:
    assert recipe.load(entry(parameters={"scale": 2}))["a"] == create("acme.tilt", scale=2.0)


@pytest.mark.parametrize("value", [object(), len, {1: 2}, 1j, b"x", (1, {2})])
def test_a_value_that_would_not_come_back_is_refused(tilt: Path, value: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"Guidance 'a', plug-in acme\.tilt \(acme-tilt 1\.2\): extra=.*cannot be stored"
    ):
        recipe.dump({"a": create("acme.tilt", extra=value)})


def test_a_word_that_would_come_back_as_a_number_is_refused(tilt: Path) -> None:
    with pytest.raises(RecipeError, match="both='inf' cannot be stored"):
        recipe.dump({"a": create("acme.tilt", both="inf")})


def test_a_class_must_be_registered(provide: Provide) -> None:
    @dataclass
    class Mine(Guidance):
        name = "me.mine"

    with pytest.raises(RecipeError, match=r"Guidance 'a' is a .*Mine, .* call trimtab\.register\(cls\)"):
        recipe.dump({"a": Mine()})
    register(Mine)
    data = recipe.dump({"a": Mine()})
    assert recipe.load(data) == {"a": Mine()}
    unregister("me.mine")
    with pytest.raises(RecipeError, match=r"'me\.mine', a class registered in the process .* trimtab\.register\(cls\)"):
        recipe.load(data)


# -- files -------------------------------------------------------------------------------------------------------------
def test_a_recipe_lies_in_a_folder_or_a_file(tilt: Path, tmp_path: Path) -> None:
    guidances = {"a": create("acme.tilt", scale=2, layers="été")}
    assert recipe.save(tmp_path / "saved" / "pipe", guidances) == tmp_path / "saved" / "pipe" / "guidance.json"
    assert recipe.read(tmp_path / "saved" / "pipe") == guidances
    assert recipe.save(str(tmp_path / "other.json"), guidances) == tmp_path / "other.json"
    assert recipe.read(str(tmp_path / "other.json")) == guidances
    assert "été" in (tmp_path / "other.json").read_text(encoding="utf-8")
    assert recipe.read(recipe.save(tmp_path / "none.json", {})) == {}


def test_a_recipe_can_be_read_by_whoever_can_read_the_files_beside_it(tilt: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.touch()
    written = recipe.save(tmp_path, {})
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(beside.stat().st_mode)


def test_a_failure_leaves_the_old_recipe_and_nothing_else(
    tilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pipe"
    recipe.save(folder, {"a": create("acme.tilt")})
    before = (folder / "guidance.json").read_bytes()
    with pytest.raises(RecipeError):
        recipe.save(folder, {"a": create("acme.tilt", extra=len)})

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        recipe.save(folder, {})
    assert [path.name for path in folder.iterdir()] == ["guidance.json"]
    assert (folder / "guidance.json").read_bytes() == before


def test_a_folder_or_file_without_a_recipe_is_one_clear_error(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "no-such.json", "no/such.json", "no-such"):
        with pytest.raises(SourceError, match=r"No recipe can be read from .*: No such file or directory"):
            recipe.read(missing)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"format": NaN}', b'{"format": -Infinity}', b"[" * 100_000, b"format: 1"]
)
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "guidance.json").write_bytes(content)
    with pytest.raises(RecipeError, match=r"guidance\.json' is not JSON: "):
        recipe.read(tmp_path)


# -- what a recipe must be ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "The recipe is a list, not an object"),
        (None, "The recipe is a NoneType, not an object"),
        ({}, "The recipe lacks 'format', 'guidances'"),
        ({"format": 2, "guidances": []}, "has format 2; this version of trimtab reads format 1: pip install --upgrade"),
        ({"format": True, "guidances": []}, "'format' is True, not a int"),
        ({"format": "1", "guidances": []}, "'format' is '1', not a int"),
        ({"format": 1, "guidances": {}}, "'guidances' is {}, not a list"),
        ({"format": 1, "guidances": ["pag"]}, r"guidances\[0\] of the recipe is a str, not an object"),
        ({"format": 1, "guidances": [{"name": "a"}]}, r"guidances\[0\] .*lacks 'plugin', 'distribution', 'version'"),
        (entry(parameters=[]), "'parameters' is .*, not a dict"),
        (entry(version=None), "'version' is None, not a str"),
        (entry(name=""), "name '' is empty or used twice"),
        (entry(api_version="2.0"), r"'a' of the recipe was written for hook interface 2\.0; this trimtab has 1\.0"),
        (entry(api_version="new"), "api_version='new' is not a version"),
        (entry(parameters={"scal": 1}), r"'a' .*acme\.tilt 1\.2: .*no parameter 'scal'\. Did you mean 'scale'\?"),
        (entry(parameters={"scale": -1}), r"'a' .*acme\.tilt: scale=-1 is out of range; allowed: >= 0"),
        (entry(parameters={"scale": "inf"}), "scale=inf is infinite"),
        (entry(parameters={"mode": "__import__('os')"}), "is not one of 'fast', 'exact'"),
        (entry(parameters={"start": 1, "stop": 0}), "lies after stop=0"),
    ],
)
def test_a_corrupt_recipe_is_one_clear_error(tilt: Path, data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.load(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(
    data=plain | st.builds(lambda change: entry(**change), st.dictionaries(st.sampled_from(list(recipe.KEYS)), plain))
)
def test_any_json_is_a_recipe_or_a_recipe_error(tilt: Path, data: Any) -> None:
    try:
        recipe.load(data)
    except RecipeError as error:
        assert str(error)


def test_two_guidances_of_one_name_are_refused(tilt: Path) -> None:
    data = entry()
    data["guidances"] *= 2
    with pytest.raises(RecipeError, match=r"guidances\[1\].*'a' is empty or used twice"):
        recipe.load(data)


def test_a_missing_plug_in_is_named_with_the_package_that_had_it() -> None:
    message = r"'a' of the recipe needs the plug-in 'acme\.tilt', from acme-tilt 1\.2, which is not installed\. "
    with pytest.raises(RecipeError, match=message + r'If you trust its author: pip install "acme-tilt>=1\.2"'):
        recipe.load(entry())


@pytest.mark.parametrize("changes", [{"distribution": "x; rm -rf ~"}, {"distribution": "-r x"}, {"version": '1"; rm'}])
def test_no_command_is_made_of_what_is_not_a_plain_name(changes: dict[str, str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(entry(**changes))
    assert "pip" not in str(caught.value)


def test_a_plug_in_that_cannot_be_used_is_named_with_the_reason(tilt: Path) -> None:
    set_blocked("acme.*")
    with pytest.raises(
        RecipeError, match=r"'a' of the recipe needs a plug-in that cannot be used: acme\.tilt is blocked"
    ):
        recipe.load(entry())


def test_an_error_that_an_older_plug_in_explains_ends_with_the_remedy(tilt: Path) -> None:
    remedy = r'no parameter .skew.*To bring it up to date: pip install --upgrade "acme-tilt>=2"'
    with pytest.raises(RecipeError, match=remedy):
        recipe.load(entry(version="2", parameters={"skew": 1}))


def test_a_recipe_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "guidance.json").write_bytes(b"[" + b"0," * 2**20 + b"0]")
    with pytest.raises(RecipeError, match=r"has 2,097,155 bytes; allowed: at most 1,048,576"):
        recipe.read(tmp_path)


def test_a_recipe_that_is_nested_too_deeply_is_refused(tilt: Path) -> None:
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    with pytest.raises(RecipeError, match="nested more than 32 deep"):
        recipe.load(entry(parameters={"extra": deep}))


def test_errors_of_parameters_keep_their_cause(tilt: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(entry(parameters={"order": 9}))
    assert isinstance(caught.value.__cause__, ParameterError)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"version": "1.10"},
            "recorded with version 1.10, newer than acme.tilt (acme-tilt 1.2). To bring it up to date: "
            'pip install --upgrade "acme-tilt>=1.10"',
        ),
        ({"distribution": "acme-fork"}, "recorded with 'acme-fork', but acme.tilt (acme-tilt 1.2) is used"),
        ({"version": "1.1"}, ""),
        ({"version": "1.2"}, ""),
        ({"version": "?"}, ""),
    ],
)
def test_another_version_or_distribution_is_a_warning(
    tilt: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, str], warning: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        assert recipe.load(entry(**changes))
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)
