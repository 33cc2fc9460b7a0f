"""Command-line text as seeds and guidances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trimtab.guidance import registry
from trimtab.guidance.base import Guidance
from trimtab.guidance.errors import ParameterError, UnknownGuidanceError
from trimtab.guidance.parameters import parameter
from trimtab.pipelines.generate import options


@dataclass
class Everything(Guidance):
    """One parameter of each kind."""

    name: ClassVar[str] = "test.everything"

    number: float = parameter(1.0, "A number.", ge=0)
    count: int | None = parameter(None, "A count.")
    switch: bool = parameter(False, "A switch.")
    text: str = parameter("", "A text.")
    layers: str | list = parameter("auto", "One or several.")
    weights: list[float] = parameter([], "Several numbers.")
    either: int | str = parameter(0, "A number or a word.")
    kind: Literal["a", "b"] = parameter("a", "One of two.", choices=("a", "b"))
    mapping: dict[str, int] = parameter({}, "No command line can say this.")
    mask: Image.Image | None = parameter(None, "An image.")
    pictures: Image.Image | str | tuple[Image.Image | str, ...] = parameter((), "One or several.")
    noise: torch.Tensor | str | None = parameter(None, "A tensor or a word.")


@pytest.fixture(autouse=True)
def everything() -> Iterator[None]:
    registry.register(Everything)
    yield
    registry.unregister("test.everything")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("0,3,5", [0, 3, 5]), ("5, 0-2", [5, 0, 1, 2]), ("1,0-2", [1, 0, 2])],
)
def test_seeds_are_numbers_and_ranges_in_the_order_given(text: str, expected: list[int]) -> None:
    assert options.seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "1,,2", "1.5", "0-1000000000000", str(2**64)])
def test_other_seeds_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"--seeds: .* such as 0-7 or 0,3,5"):
        options.seeds(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("number=3", {"number": 3.0}),
        ("sigma_max=inf", {"sigma_max": math.inf}),
        ("count=none", {"count": None}),
        ("count=4", {"count": 4}),
        ("switch=true", {"switch": True}),
        ("switch=No", {"switch": False}),
        ("text=a cat, a dog,number=2", {"text": "a cat, a dog", "number": 2.0}),
        ("text=", {"text": ""}),
        ("layers=mid", {"layers": "mid"}),
        ("layers=mid+up.0", {"layers": ["mid", "up.0"]}),
        ("weights=1+0.5", {"weights": [1.0, 0.5]}),
        ("weights=1", {"weights": [1.0]}),
        ("either=3", {"either": 3}),
        ("either=x", {"either": "x"}),
        ("kind=b", {"kind": "b"}),
    ],
)
def test_a_value_is_read_as_its_parameter_declares(text: str, expected: dict[str, Any]) -> None:
    guidance = options.guidance(f"test.everything:{text}")
    assert {name: getattr(guidance, name) for name in expected} == expected
    assert {name: type(getattr(guidance, name)) for name in expected} == {k: type(v) for k, v in expected.items()}


def test_an_image_is_given_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read at once, so that what was typed and what is recorded is the image, not where it lay."""
    monkeypatch.chdir(tmp_path)
    Image.new("1", (3, 2), 1).save("a.png")
    Image.new("RGB", (3, 2), (9, 8, 7)).save("b.png")
    guidance = options.guidance("test.everything:mask=a.png,pictures=a.png+b.png+absent.png")
    assert (guidance.mask.mode, guidance.mask.getpixel((0, 0))) == ("L", 255)
    assert guidance.pictures[1].getpixel((0, 0)) == (9, 8, 7)
    assert [type(one) for one in guidance.pictures] == [Image.Image, Image.Image, str]


def test_a_tensor_is_given_by_a_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"any": torch.arange(3.0)}, "one.safetensors")
    assert torch.equal(options.guidance("test.everything:noise=one.safetensors").noise, torch.arange(3.0))
    assert options.guidance("test.everything:noise=word").noise == "word"


def test_a_file_that_holds_no_single_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, "two.safetensors")
    Path("broken.safetensors").write_bytes(b"no header")
    for file, why in (
        ("two", r"holds 2 tensors \(a, b\); needed: a file that holds one\."),
        ("broken", "cannot be read as a tensor: "),
        ("absent", "cannot be read as a tensor: No such file or directory"),
    ):
        with pytest.raises(ParameterError, match=rf"^test\.everything: noise='{file}\.safetensors' {why}"):
            options.guidance(f"test.everything:noise={file}.safetensors")


def test_a_bare_name_takes_the_defaults() -> None:
    assert options.guidance("test.everything") == Everything()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmber=3", "no parameter 'nmber'.*'number'"),
        ("number=much", "number='much' cannot be read as float; allowed: >= 0"),
        ("number=-1", "number=-1.0 is out of range"),
        ("switch=2", "switch='2' cannot be read as bool"),
        ("kind=c", "allowed: one of 'a', 'b'"),
        ("number", "type test.everything:parameter=value"),
        ("number=1,number=2", "number is given twice"),
        ("mapping=a", r"mapping cannot be typed; give it in Python: pipe\.add_guidance\('test\.everything', mapping="),
        ("mask=absent.png", "mask='absent.png' cannot be read as Image or None; allowed: an image file"),
    ],
)
def test_a_mistake_names_the_parameter_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        options.guidance(f"test.everything:{text}")


def test_a_parameter_without_its_guidance_says_what_to_type() -> None:
    with pytest.raises(
        ParameterError, match=r"'pag=3' names no guidance; type NAME:PARAMETER=VALUE, such as pag:scale=3"
    ):
        options.guidance("pag=3")


def test_an_unknown_guidance_is_refused_by_the_registry() -> None:
    with pytest.raises(UnknownGuidanceError, match=r"Did you mean 'test\.everything'"):
        options.guidance("test.everthing:number=1")


def test_guidances_keep_their_order_and_none_is_given_twice() -> None:
    assert list(options.guidances(["test.everything", "pag"])) == ["test.everything", "pag"]
    with pytest.raises(ParameterError, match="pag is given twice"):
        options.guidances(["pag:scale=1", "pag:scale=2"])
