"""`trimtab plugins new`: a complete package with one guidance, from `template/`.

The template is a package called vendor-guidance; its name, in four spellings, is all that is replaced. Its files end in
`.in`, so that no tool takes them for code of this package, and hidden ones begin with `dot.`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..guidance.errors import ParameterError

TEMPLATE = Path(__file__).parent / "template"
SUFFIX = ".in"
_NAME = re.compile(r"[a-z][a-z0-9]*([.-][a-z][a-z0-9]*)+")


def write(name: str, parent: Path) -> Path:
    """Write the package into a new folder of `parent`, and return that folder.

    Args:
        name: `my-guidance` or `my.guidance`; the distribution is then called my-guidance, its module my_guidance, and
            the plug-in my.guidance.

    Raises:
        ParameterError: a name without a vendor, or with other signs.
        FileExistsError: the folder is there already; nothing is written.
    """
    if not _NAME.fullmatch(name):
        raise ParameterError(
            f"name={name!r}; allowed: your own name or your group's, a hyphen, and the guidance's, in small letters "
            "and digits, such as my-guidance. Names without a vendor are trimtab's own."
        )
    parts = re.split(r"[.-]", name)
    spellings = {
        "vendor-guidance": "-".join(parts),
        "vendor_guidance": "_".join(parts),
        "vendor.guidance": f"{parts[0]}.{'_'.join(parts[1:])}",
        "VendorGuidance": "".join(part.capitalize() for part in parts),
    }

    def spelled(text: str) -> str:
        for ours, theirs in spellings.items():
            text = text.replace(ours, theirs)
        return text

    folder = parent / spellings["vendor-guidance"]
    folder.mkdir(parents=True)
    for source in sorted(TEMPLATE.rglob(f"*{SUFFIX}")):
        path = source.relative_to(TEMPLATE).as_posix().removesuffix(SUFFIX)
        target = folder / spelled(re.sub(r"^dot\.", ".", path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(spelled(source.read_text(encoding="utf-8")), encoding="utf-8")
    return folder
