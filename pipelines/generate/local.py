"""What is loaded from this machine: files that may be written anew under the same name, as by another training.

Their fingerprints belong to the settings of an image, so that images of the model as it was are not taken for those of
the model as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...guidance import pins
from ...guidance.base import Guidance


def fingerprints(model: str, guidances: Mapping[str, Guidance]) -> dict[str, str]:
    """The fingerprints of the files of this machine, by `model`, or by plug-in and parameter.

    Args:
        model: whatever `from_pretrained` takes.
        guidances: by name; each text among their parameters that is the path of a file or a folder counts.
    """
    return pins.fingerprints({"model": model, **dict(_paths(guidances))})


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of what was loaded from other files then."""
    return sorted(name for name in then.keys() & now.keys() if then[name] != now[name])


def _paths(guidances: Mapping[str, Guidance]) -> Iterator[tuple[str, str]]:
    for name, guidance in guidances.items():
        for key, value in guidance.parameters.items():
            several = value if isinstance(value, (list, tuple)) else [value]
            for number, text in enumerate(one for one in several if isinstance(one, str)):
                yield f"{name}.{key}" + (f".{number}" if number else ""), text
