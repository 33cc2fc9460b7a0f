"""Which class an image is guided to: by name where pipeline and classifier both know it, else by index."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import trimtab
from trimtab.guidance.errors import ParameterError
from trimtab.guidance.targets import class_index, labels_of_call
from trimtab.pipelines.fashion import ClassConditionalPipeline

from ..zoo.class_conditional import class_conditional

NAMES = ["Shoe", "Hat", "Coat"]
OTHER_ORDER = ["coat", "shoe", "hat"]


@pytest.fixture(scope="module")
def pipe() -> ClassConditionalPipeline:
    return trimtab.guide(class_conditional(NAMES))


def known(pipe: Any, given: Any, labels: list[str]) -> Any:
    return labels_of_call(SimpleNamespace(pipeline=pipe, arguments={"class_labels": given}), labels)


def test_names_go_by_name_whatever_their_order(pipe: ClassConditionalPipeline) -> None:
    for given in (["Hat", "coat"], [1, 2]):
        found = known(pipe, given, OTHER_ORDER)
        assert [class_index(one, OTHER_ORDER, "test") for one in found] == [2, 0]


def test_a_classifier_without_names_goes_by_the_pipelines_index(pipe: ClassConditionalPipeline) -> None:
    assert known(pipe, ["Hat", 2], []) == [1, 2]
    assert known(pipe, "Coat", ["LABEL_0", "LABEL_1", "LABEL_2"]) == [2]


def test_no_class_is_no_target(pipe: ClassConditionalPipeline) -> None:
    assert known(pipe, [None, pipe.null_class, "hat"], OTHER_ORDER) == [None, None, "hat"]
    assert known(pipe, None, OTHER_ORDER) is None


def test_a_name_that_only_the_call_knows_is_an_error_with_a_hint() -> None:
    (name,) = known(SimpleNamespace(), "Shoo", OTHER_ORDER)
    with pytest.raises(ParameterError, match=r"target='Shoo' is no class of the classifier\. Did you mean"):
        class_index(name, OTHER_ORDER, "test")


def test_a_synonym_is_a_name_and_a_name_of_two_classes_is_none() -> None:
    labels = ["tabby, tabby cat", "crane", "crane, machine", "crane"]
    assert class_index("Tabby cat", labels, "test") == 0
    with pytest.raises(ParameterError, match=r"target='crane' names the classes \[1, 3\]; give the index"):
        class_index("crane", labels, "test")
    assert class_index("machine", labels, "test") == 2
