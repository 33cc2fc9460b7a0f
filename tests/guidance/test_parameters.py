"""Parameters: typed, ranged, converted or refused with a message that says what is allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.guidance.base import Guidance
from trimtab.guidance.errors import ParameterError
from trimtab.guidance.parameters import check_value, fields_of, off_values, parameter
from trimtab.guidance.wording import describe_range


@dataclass
class Sample(Guidance):
    scale: float = parameter(3.0, "A number from 0 to 10.", ge=0, le=10)
    free: float = parameter(0.0, "Any finite number.")
    order: int = parameter(2, "A whole number.", ge=1)
    mode: Literal["fast", "exact"] = parameter("fast", "One of two words.")
    norm: str = parameter("l2", "One of two words.", choices=("l1", "l2"))
    either: float | int | str | None = parameter(None, "Several types.")
    flag: bool = parameter(False, "A truth value.")
    tag: int | str = parameter(0, "A whole number or a word.")
    layers: str | tuple[str, ...] = parameter("auto", "A word or several.")
    names: Sequence[str] = parameter((), "Several words.")
    weights: list[float] = parameter([1.0], "Numbers from 0 on.", ge=0)
    pair: tuple[float, str] = parameter((0.0, ""), "A number and a word.")
    table: dict[str, float] = parameter({}, "Numbers by name.", le=1)
    function: Callable[..., Any] | None = parameter(None, "A function.")
    anything: Any = parameter(None, "Anything.")


def checked(name: str, value: Any) -> Any:
    return check_value("sample", Sample, name, value)


@pytest.mark.parametrize(
    ("name", "given_value", "held"),
    [
        ("scale", 3, 3.0),
        ("scale", np.float32(0.5), 0.5),
        ("scale", Fraction(1, 4), 0.25),
        ("order", np.int64(3), 3),
        ("either", 2, 2),
        ("either", 2.0, 2.0),
        ("either", "2", "2"),
        ("either", None, None),
        ("flag", True, True),
        ("mode", "exact", "exact"),
        ("layers", ["mid", "d2"], ("mid", "d2")),
        ("layers", "mid", "mid"),
        ("names", ["a"], ("a",)),
        ("weights", (1, 2), [1.0, 2.0]),
        ("pair", [1, "x"], (1.0, "x")),
        ("table", {"a": 1}, {"a": 1.0}),
        ("function", len, len),
        ("anything", {1: [2]}, {1: [2]}),
    ],
)
def test_a_value_is_converted_to_the_declared_type(name: str, given_value: Any, held: Any) -> None:
    value = checked(name, given_value)
    assert value == held
    assert type(value) is type(held)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", -1, r"sample: scale=-1 is out of range; allowed: 0 to 10\."),
        ("scale", 10.5, r"scale=10.5 is out of range; allowed: 0 to 10\."),
        ("scale", math.nan, "scale=nan is not a number"),
        ("free", math.inf, r"free=inf is infinite\.$"),
        ("free", 10**400, "is too large"),
        ("scale", "3", "scale='3' is a str, not float"),
        ("scale", True, "scale=True is a truth value, not a number"),
        ("scale", None, "scale=None is a NoneType, not float"),
        ("order", 1.5, "order=1.5 is a float, not int; allowed: >= 1"),
        ("order", False, "truth value"),
        ("tag", True, "truth value"),
        ("flag", 1, "flag=1 is an int, not bool"),
        ("mode", "slow", r"mode='slow' is not one of 'fast', 'exact'\.$"),
        ("norm", "l3", "norm='l3' is not allowed; allowed: one of 'l1', 'l2'"),
        ("layers", ["mid", 3], "layers=.* holds 3, which is an int, not str"),
        ("names", "abc", "names='abc' is a str, not"),
        ("weights", [1.0, -1.0], "is out of range; allowed: >= 0"),
        ("weights", [math.nan], "is not a number"),
        ("pair", (1.0,), "has 1 values, not 2"),
        ("table", {"a": 2}, "is out of range; allowed: <= 1"),
        ("table", {1: 1.0}, "holds 1, which is an int, not str"),
        ("function", 3, "function=3 is an int, not"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(name: str, value: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        checked(name, value)


@given(st.floats() | st.integers())
def test_a_number_is_held_exactly_when_it_is_finite_and_in_range(value: float) -> None:
    if 0 <= value <= 10:
        assert checked("scale", value) == value
    else:
        with pytest.raises(ParameterError, match="scale"):
            checked("scale", value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "any"),
        ({"ge": 0}, ">= 0"),
        ({"le": 1}, "<= 1"),
        ({"ge": 0, "le": 0.5}, "0 to 0.5"),
        ({"choices": ("a", "b")}, "one of 'a', 'b'"),
    ],
)
def test_the_range_in_words(options: dict[str, Any], words: str) -> None:
    assert describe_range(parameter(None, "What it does.", **options)) == words


def test_a_mutable_default_is_not_shared() -> None:
    first, second = Sample(), Sample()
    first.weights.append(5.0)
    assert second.weights == [1.0]


def test_a_list_is_copied_so_that_the_caller_cannot_change_it_later() -> None:
    mine = [1.0]
    sample = Sample(weights=mine)
    mine.append(-1.0)
    assert sample.weights == [1.0]


def test_only_fields_made_with_parameter_are_parameters() -> None:
    @dataclass
    class Plain:
        hidden: int = 0
        shown: int = parameter(0, "Shown.")

    assert list(fields_of(Plain)) == ["shown"]
    assert {field.name for field in dataclasses.fields(Plain)} == {"hidden", "shown"}


def test_off_values_are_those_declared() -> None:
    @dataclass
    class Declared(Guidance):
        scale: float = parameter(2.0, "Strength.", ge=0, off=1.0)
        weight: float = parameter(2.0, "Weight.", ge=0)

    assert off_values(Declared) == {"scale": 1.0}
    assert off_values(Guidance) == {}
