"""Recipes: the guidances of a pipeline as JSON, written beside a saved pipeline as `guidance.json`.

    {"format": 1, "trimtab": "0.1.0", "guidances": [
        {"name": "pag", "plugin": "pag", "distribution": "trimtab", "version": "0.1.0", "api_version": "1.0",
         "parameters": {"scale": 3.0, "layers": ["mid"], "sigma_max": "inf"}}]}

The guidances stand in the order in which they were attached, each with all its parameters, so that a later change of a
default does not change a picture. Infinity is the string `"inf"` or `"-inf"`, which JSON has no number for; tuples are
arrays; a guider of Diffusers is its class and configuration. A tensor or an image lies beside the recipe, as
safetensors or PNG, and the recipe says which file, with its hash:
`{"file": "mask-0f3a1c52d870.png", "sha256": "0f3a1c52d870..."}`. A parameter's declared type turns all of them back.
A value that would not come back is refused when written.

Where a guidance that loads files has a parameter for the commit of their repository or the hash of the local file,
`save` and `push` fill it in, so that the same ones are loaded again, or none. A local folder of several files has none.

Loading a recipe runs nothing that it holds: it names installed plug-ins, and its files are parsed as safetensors and
PNG only, after their sizes, names and hashes were checked.

| module | holds |
| --- | --- |
| `entries` | what a recipe says of each guidance, and what is said where a plug-in is missing or older |
| `values` | values of parameters as JSON, and the files of those that JSON cannot hold |
| `files` | folders, files and the Hub |
"""

from .entries import FORMAT, KEYS, dump, load, pinned
from .files import FILE, PushOptions, beside, push, read, save, write_files
from .values import LARGEST

__all__ = [
    "FILE",
    "FORMAT",
    "KEYS",
    "LARGEST",
    "PushOptions",
    "beside",
    "dump",
    "load",
    "pinned",
    "push",
    "read",
    "save",
    "write_files",
]
