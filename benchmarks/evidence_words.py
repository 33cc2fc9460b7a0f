"""How the evidence page says a number and what a difference means."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.evaluation.distances import Interval
from trimtab.evaluation.evaluate import HIGHER

BETTER, WORSE, UNCLEAR = "**better**", "*worse*", "unclear"


def verdict(change: Mapping[str, float], direction: str) -> str:
    """Whether the interval of a difference leaves out 0, and on which side."""
    if change["low"] > 0:
        return BETTER if direction == HIGHER else WORSE
    if change["high"] < 0:
        return WORSE if direction == HIGHER else BETTER
    return UNCLEAR


def cell(one: Interval, how: str = "") -> str:
    """A value with its interval, and how that is meant."""
    return f"{one.value:.3g} ({how}{one.low:.3g} to {one.high:.3g})"
