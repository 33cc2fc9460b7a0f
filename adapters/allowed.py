"""What a training's settings may be; a wrong one is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from ..guidance.errors import ParameterError


def check_range(training: str, name: str, value: float, lowest: float, highest: float = float("inf")) -> None:
    """Refuse a number outside of a range.

    Args:
        training: as in `trimtab train TRAINING`.
        name, value: of the setting.
        lowest, highest: of the range, both allowed.

    Raises:
        ParameterError: it is outside.
    """
    if not lowest <= value <= highest:
        allowed = f"{lowest:g} or more" if highest == float("inf") else f"{lowest:g} to {round(highest, 3):g}"
        raise ParameterError(f"train {training}: {name}={value}; allowed: {allowed}.")


def check_choice(training: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of these.

    Raises:
        ParameterError: it is none.
    """
    if value not in choices:
        raise ParameterError(f"train {training}: {name}={value!r}; allowed: {', '.join(choices)}.")
