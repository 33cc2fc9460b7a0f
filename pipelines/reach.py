"""`trimtab reach`: which pipeline classes of the installed Diffusers can be guided, told by inspection.

Nothing is loaded and no list of names is asked. A class is judged by the source of its methods (whether it calls
`scheduler.step`), by the types of its components (whether one may be the denoiser), by its scheduler's noise algebra,
and by its denoiser's attentions, which is built without weights for that. What only a run can tell is said to be so.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from ..guidance.schedulers import REFUSED, SUPPORTED
from .components import may_denoise
from .families import Family
from .processors import stand_in

RUN_TELLS = "only a run can tell"


@dataclass(frozen=True)
class Reach:
    """One pipeline class.

    Args:
        pipeline: its name.
        denoiser: classes that may be its denoiser.
        family: of the first of them, as `Family.name`.
        guided: `"yes"`, or why it cannot be guided.
        levels: whether guidance may ask for noise levels: `"yes"`, or why not.
        attention: whether attention can be perturbed: `"yes"`, or why not.
    """

    pipeline: str
    denoiser: tuple[str, ...]
    family: str
    guided: str
    levels: str
    attention: str


def reach() -> list[Reach]:
    """Every pipeline class that the installed Diffusers exports, by name."""
    return [_of(kind) for kind in _classes()]


def as_json(rows: list[Reach]) -> list[dict[str, Any]]:
    """The rows for programs."""
    return [asdict(row) for row in rows]


def table(rows: list[Reach]) -> str:
    """The rows for people, the reasons below them, and how many can be guided."""
    reasons: dict[str, int] = {}

    def cell(verdict: str) -> str:
        if verdict in ("yes", RUN_TELLS):
            return "yes" if verdict == "yes" else "?"
        return f"no [{reasons.setdefault(verdict, len(reasons) + 1)}]"

    lines = [("PIPELINE", "DENOISER", "FAMILY", "GUIDED", "LEVELS", "ATTENTION")]
    for row in rows:
        verdicts = (cell(row.guided), cell(row.levels), cell(row.attention))
        lines.append((row.pipeline, ", ".join(row.denoiser), row.family, *verdicts))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    guided = sum(row.guided == "yes" for row in rows)
    notes = [f"[{number}] {reason}" for reason, number in reasons.items()]
    told = f"{guided} of {len(rows)} classes can be guided as far as inspection tells."
    return "\n".join([*drawn, "", f"?   {RUN_TELLS}", *notes, "", told])


def _classes() -> Iterator[type]:
    for name in sorted(dir(diffusers)):
        if "Pipeline" not in name or name.startswith(("AutoPipeline", "Flax", "Onnx")):
            continue
        kind = getattr(diffusers, name, None)
        # Classes whose dependencies are missing are stand-ins and no pipelines.
        if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline:
            yield kind


def _of(kind: type) -> Reach:
    parts = _component_types(kind)
    denoisers = [part for part in parts if issubclass(part, ModelMixin) and may_denoise(part)]
    schedulers = [part for part in parts if issubclass(part, SchedulerMixin)]
    families = [found for part in denoisers if (found := _family(part)) is not None]
    # Of a prior and a decoder, or of several sizes, the one with attention is what a perturbation acts on.
    family = next((found for found in families if found.attentions), families[0] if families else None)
    return Reach(
        kind.__name__,
        tuple(part.__name__ for part in denoisers),
        "" if family is None else family.name,
        _guided(kind, denoisers, schedulers),
        _levels(schedulers),
        _attention(denoisers, family),
    )


def _component_types(kind: type) -> list[type]:
    """The types that a pipeline's constructor names, each once."""
    try:
        hints = typing.get_type_hints(vars(kind).get("__init__", kind))
    except Exception:  # an annotation names what is not installed
        hints = {name: p.annotation for name, p in inspect.signature(kind).parameters.items()}
    found: dict[type, None] = {}

    def collect(hint: Any) -> None:
        if isinstance(hint, type):
            found[hint] = None
        for part in typing.get_args(hint):
            collect(part)

    for name, hint in hints.items():
        if name != "return":
            collect(hint)
    return list(found)


def _guided(kind: type, denoisers: list[type], schedulers: list[type]) -> str:
    tokens = [part.__name__ for part in schedulers if "discrete tokens" in REFUSED.get(part.__name__, "")]
    if tokens:
        return f"{tokens[0]} samples discrete tokens"
    if not _steps(kind):
        return "it never calls scheduler.step"
    if not denoisers:
        return f"no component's type is a denoiser's; {RUN_TELLS}"
    return "yes"


def _steps(kind: type) -> bool:
    """Whether the source of a class calls `scheduler.step`, or calls pipelines of its own that may."""
    return any(re.search(r"scheduler\w*(\[\w+\])?\.step\(|self\.\w*pipe\w*\(", source) for source in _sources(kind))


def _sources(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        if base is not DiffusionPipeline and issubclass(base, DiffusionPipeline):
            with suppress(OSError, TypeError):
                yield inspect.getsource(base)


def _levels(schedulers: list[type]) -> str:
    names = [part.__name__ for part in schedulers]
    if any(name in SUPPORTED for name in names):
        return "yes"
    refused = next((name for name in names if name in REFUSED), None)
    return f"{refused}: {REFUSED[refused]}" if refused else RUN_TELLS


def _attention(denoisers: list[type], family: Family | None) -> str:
    if family is None:
        return RUN_TELLS if denoisers else "there is no denoiser"
    if not family.attentions:
        return "no self-attention was found"
    layer = family.attentions[family.auto[0]]
    acts = stand_in(layer) is not None
    return "yes" if acts else f"{type(layer.processor).__name__} computes it in another way"


@functools.cache
def _family(denoiser: Any) -> Family | None:
    """A denoiser of the default configuration but shallow, without weights; `None` where that cannot be built."""
    defaults = inspect.signature(denoiser).parameters.items()
    deep = {n: p.default for n, p in defaults if n.endswith(("layers", "depth")) and isinstance(p.default, int)}
    try:
        with torch.device("meta"):
            return Family(denoiser(**{name: min(depth, 2) for name, depth in deep.items()}))
    except Exception:  # whatever a constructor raises that needs arguments or real numbers
        return None
