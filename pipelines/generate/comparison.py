"""Comparison sheets: what each guidance does alone and what they do together, on the same seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from ...guidance import recipe
from ...guidance.base import Guidance
from ...guidance.errors import ParameterError
from ...guidance.parameters import fields_of, same
from ...guidance.wording import shown
from .pictures import Row, sheet
from .request import Request
from .samples import attach, generate


def variants(guidances: Mapping[str, Guidance]) -> dict[str, dict[str, Guidance]]:
    """The rows of a sheet: none, each guidance alone, and, if there are several, all together.

    Raises:
        ParameterError: there is nothing to compare.
    """
    if not guidances:
        raise ParameterError("--compare: no guidance is given; add one, such as --guidance pag:scale=3.")
    rows: dict[str, dict[str, Guidance]] = {"no guidance": {}}
    rows |= {describe(name, guidance): {name: guidance} for name, guidance in guidances.items()}
    return rows | ({"all together": dict(guidances)} if len(guidances) > 1 else {})


def describe(name: str, guidance: Guidance) -> str:
    """A guidance, its scale, and its other parameters that are not at their defaults: `pag scale=4 layers=mid`."""
    defaults = {key: field.default for key, field in fields_of(type(guidance)).items()}
    values = guidance.parameters
    shown = [key for key, value in values.items() if key == "scale" or not same(value, defaults[key])]
    return " ".join([name, *(f"{key}={_short(values[key])}" for key in sorted(shown, key=lambda key: key != "scale"))])


def compare(
    pipe: Any,
    request: Request,
    guidances: Mapping[str, Guidance],
    seeds: Sequence[int],
    begun: Callable[[str], object] = lambda label: None,
    done: Callable[[], object] = lambda: None,
) -> tuple[Image.Image, dict[str, Any]]:
    """A sheet with one row a variant and one column a seed, and the metadata of its file.

    Args:
        pipe: from `load_pipeline`.
        request: from `resolve`; its seed and recipe are replaced.
        guidances: what to compare.
        seeds: of the columns.
        begun: called with a row's label when its first image is begun.
        done: called after each image.
    """
    rows: list[Row] = []
    for label, variant in variants(guidances).items():
        begun(label)
        attach(pipe, variant)
        images = []
        for seed in seeds:
            images.append(generate(pipe, dataclasses.replace(request, seed=seed)))
            done()
        rows.append(Row(label, images))
    title = f"{request.subject}, {request.steps} steps, {request.scheduler}"
    picture = sheet(title, [f"seed {seed}" for seed in seeds], rows)
    whole = dataclasses.replace(request, seed=seeds[0], guidance=recipe.dump(guidances, {}))
    return picture, {**whole.metadata(picture), "seeds": list(seeds), "rows": [row.label for row in rows]}


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(_short, value))
    return value if isinstance(value, str) else shown(value)
