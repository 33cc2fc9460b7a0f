"""Throw-away distributions: real ones, with a module and metadata on the import path, gone after the test."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trimtab.guidance import registry
from trimtab.guidance.blocking import ALLOWED, BLOCKED, set_allowed, set_blocked

Provide = Callable[..., Path]

TILT = '''
"""A plug-in as a third party writes it."""
from __future__ import annotations
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from trimtab.guidance.base import Guidance
from trimtab.guidance.run import Step
from trimtab.guidance.branch import COND, UNCOND, Branch, Predictions
from trimtab.guidance.parameters import parameter

@dataclass
class Tilt(Guidance):
    """Push along (1, -1)."""
    name: ClassVar[str] = "acme.tilt"
    api_version: ClassVar[str] = "1.0"
    scale: float = parameter(1.0, "Strength.", ge=0, off=0.0)
    bound: float = parameter(math.inf, "Largest value.", finite=False)
    order: int = parameter(2, "Order.", ge=1, le=4)
    mode: Literal["fast", "exact"] = parameter("fast", "How.")
    layers: str | tuple[str, ...] = parameter("auto", "Layers.")
    weights: tuple[float, ...] = parameter((), "Weights.", finite=False)
    table: dict[str, float | None] = parameter({}, "Values by name.")
    seed: int | None = parameter(None, "Seed.")
    both: float | str = parameter(0.0, "A number or a word.", finite=False)
    extra: object = parameter(None, "Anything.")

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, UNCOND)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        return self.scale * (predictions[COND] - predictions[UNCOND])
'''


@pytest.fixture
def provide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Provide]:
    """`provide(distribution, version, {name: "module:object"}, module=source)`: as `pip install` would leave it."""
    before = set(sys.modules)
    monkeypatch.delenv(BLOCKED, raising=False)
    monkeypatch.delenv(ALLOWED, raising=False)

    def install(distribution: str, version: str, points: dict[str, str], **modules: str) -> Path:
        site = tmp_path / f"{distribution}-{version}"
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        info.joinpath("entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]) + "\n")
        for module, source in modules.items():
            site.joinpath(f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        registry.plugins(refresh=True)
        return site

    yield install
    set_blocked()
    set_allowed()
    for name, plugin in registry.plugins().items():
        if plugin.origin == "registered":
            registry.unregister(name)
    monkeypatch.undo()
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[module]
    registry._classes.clear()
    registry.plugins(refresh=True)


@pytest.fixture
def tilt(provide: Provide) -> Path:
    """The plug-in `acme.tilt`, from the distribution acme-tilt 1.2."""
    return provide("acme-tilt", "1.2", {"acme.tilt": "acme_tilt:Tilt"}, acme_tilt=TILT)
