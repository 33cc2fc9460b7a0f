"""The order of guidances: as attached, changed only where a plug-in asks; conflicts name both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.guidance.base import Guidance
from trimtab.guidance.errors import ConflictError
from trimtab.guidance.order import check_conflicts, ordered
from trimtab.guidance.registry import create

Provide = Callable[..., Path]


def plugin(name: str, **attributes: Any) -> Guidance:
    return dataclass(type(name.title(), (Guidance,), {"name": name, **attributes}))()


def attach(*guidances: Guidance) -> dict[str, Guidance]:
    return {guidance.name: guidance for guidance in guidances}


def test_without_wishes_the_order_is_that_of_attachment() -> None:
    assert ordered(attach(plugin("c"), plugin("a"), plugin("b"))) == ["c", "a", "b"]
    assert ordered({}) == []


def test_after_and_before_are_obeyed() -> None:
    assert ordered(attach(plugin("a", after=("b",)), plugin("b"), plugin("c"))) == ["b", "a", "c"]
    assert ordered(attach(plugin("a"), plugin("b", before=("a",)), plugin("c"))) == ["b", "a", "c"]


def test_wishes_chain() -> None:
    guidances = attach(plugin("a", after=("b",)), plugin("b", after=("c",)), plugin("c"))
    assert ordered(guidances) == ["c", "b", "a"]


def test_plug_ins_that_are_not_attached_do_not_matter() -> None:
    assert ordered(attach(plugin("a", after=("z",), before=("y",)), plugin("b"))) == ["a", "b"]


def test_wishes_name_plug_ins_and_hold_for_each_guidance_of_it() -> None:
    guidances = {"late": plugin("a", after=("b",)), "one": plugin("b"), "two": plugin("b")}
    assert ordered(guidances) == ["one", "two", "late"]


@given(st.permutations(range(6)), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_every_wish_is_met_and_a_satisfied_order_is_kept(ranks: list[int], pairs: set[tuple[int, int]]) -> None:
    wishes = {(low, high) for low, high in pairs if ranks[low] < ranks[high]}  # a common ranking excludes cycles
    before = {i: tuple(str(high) for low, high in wishes if low == i) for i in range(6)}
    order = ordered(attach(*(plugin(str(i), before=before[i]) for i in range(6))))
    assert sorted(order) == [str(i) for i in range(6)]
    assert all(order.index(str(low)) < order.index(str(high)) for low, high in wishes)
    if all(low < high for low, high in wishes):
        assert order == [str(i) for i in range(6)]


def test_a_cycle_is_printed_with_plug_ins_and_distributions(provide: Provide) -> None:
    source = """
    from dataclasses import dataclass
    from trimtab.guidance.base import Guidance
    @dataclass
    class A(Guidance):
        name = "acme.a"
        before = ("acme.b",)
    @dataclass
    class B(Guidance):
        name = "acme.b"
        before = ("c",)
        exclusive = "slot"
    """
    provide("acme-ab", "1.5", {"acme.a": "acme_ab:A", "acme.b": "acme_ab:B"}, acme_ab=source)
    free, first, second = plugin("free"), create("acme.a"), create("acme.b")
    third = plugin("c", before=("acme.a",))
    with pytest.raises(ConflictError) as caught:
        ordered({"free": free, "first": first, "second": second, "third": third})
    a, b = "'first' = acme.a (acme-ab 1.5)", "'second' = acme.b (acme-ab 1.5)"
    c = f"'third' = c (not registered, from {__name__})"
    assert f"{a} before {b} before {c} before {a}." in str(caught.value)
    assert "free" not in str(caught.value)


def test_two_claims_on_one_slot_name_both(provide: Provide) -> None:
    source = """
    from dataclasses import dataclass
    from trimtab.guidance.base import Guidance
    @dataclass
    class B(Guidance):
        name = "acme.b"
        exclusive = "cfg"
    """
    provide("acme-b", "1.5", {"acme.b": "acme_b:B"}, acme_b=source)
    guidances = {"one": create("acme.b"), "two": plugin("other", exclusive="cfg"), "free": plugin("free")}
    with pytest.raises(ConflictError) as caught:
        check_conflicts(guidances)
    for words in ("slot 'cfg'", "'one' = acme.b (acme-b 1.5)", "'two' = other", "remove_guidance('one')"):
        assert words in str(caught.value)


def test_different_slots_and_no_slots_do_not_conflict() -> None:
    check_conflicts(attach(plugin("a", exclusive="x"), plugin("b", exclusive="y"), plugin("c"), plugin("d")))
