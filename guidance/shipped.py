"""Models that come with this package: `"trimtab/NAME"` is its folder `models/NAME`, loaded without a network.

`"trimtab/embedded"` is the one of them that is meant where no model is named.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "models"
EMBEDDED = "trimtab/emoji-sd"
_NAME = re.compile(r"trimtab/([\w-]+)", re.ASCII)


def located(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A source as other libraries load it: of a model that came with this package its folder, any other as it is.

    Args:
        source: whatever `from_pretrained` takes.
    """
    named = _NAME.fullmatch(EMBEDDED if os.fspath(source) == "trimtab/embedded" else os.fspath(source))
    return FOLDER / named[1] if named and (FOLDER / named[1]).is_dir() else source
