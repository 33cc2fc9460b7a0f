"""Adapter weights: safetensors from a file, a folder or the Hub, and nothing else.

A guidance that loads weights declares the parameters `weights`, `weight_name`, `revision` and `sha256`, so that its
recipe says exactly which weights made a picture, and passes them on in `setup`:

    loaded = load_weights(self.weights, weight_name=self.weight_name, revision=self.revision, sha256=self.sha256)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized

from ..guidance import source as sources
from ..guidance.errors import SourceError, WeightsError
from ..guidance.files import replacing
from ..guidance.source import HubOptions

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Weights:
    """Loaded weights, and where they came from.

    Args:
        tensors: by name.
        metadata: the texts of the file's header.
        path: the local file.
        sha256: of that file, in hexadecimal.
        commit: the commit on the Hub; `None` for a local file.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    path: Path
    sha256: str
    commit: str | None


def load_weights(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
    **hub: Unpack[HubOptions],
) -> Weights:
    """Load the tensors of one safetensors file.

    Args:
        source: a `.safetensors` file, a folder, or `"owner/repository"` on the Hub.
        weight_name: the file inside the folder or repository; may be left out where there is only one. Of a repository
            its folder may be left out, where only one has such a file.
        sha256: what the file must hash to, 64 hexadecimal digits; by default what the Hub gives for it, if anything.
        device: where the tensors go.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `endpoint`; see `HubOptions`.

    Raises:
        WeightsError: a file in another format, with another hash, or corrupt; several files and no `weight_name`.
        SourceError: see `trimtab.guidance.source.fetch`.
    """
    path = _located(source, weight_name, hub)
    digest = sources.sha256(path)
    expected = sha256.lower() if sha256 is not None else sources.promised_sha256(path)
    if expected is not None and digest != expected:
        raise WeightsError(
            f"{path}: its SHA-256 is {digest}, not {expected}. It is another file than the one meant, or was "
            "damaged on the way (then force_download=True fetches it again)."
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no safetensors file that can be read: {error}") from error
    return Weights(tensors, metadata, path, digest, sources.commit_of(path))


def save_weights(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file; it appears whole or not at all.

    Args:
        path: a name that ends in `.safetensors`.
        tensors: by name; written as contiguous copies, so that they may share memory.
        metadata: texts for the header, such as the base model and the rank.

    Raises:
        WeightsError: another ending.
    """
    target = Path(path)
    _check_suffix(target.name)
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(target) as file:
        # `save_file` would leave a file that only its owner may read.
        file.write(serialized(copies, metadata=dict(metadata) if metadata else None))
    return target


def _located(source: str | os.PathLike[str], weight_name: str | None, hub: HubOptions) -> Path:
    if weight_name is not None:
        _check_suffix(weight_name)
        there = sources.find(source, weight_name, **hub) if sources.is_repository(source) else None
        return there or sources.fetch(source, _with_folder(source, weight_name, hub), **hub)
    if Path(source).is_file():
        _check_suffix(str(source))
        return Path(source)
    names = sources.list_files(source, SUFFIX, **hub)
    if len(names) != 1:
        found = f"several files: {', '.join(names)}; choose one with weight_name=" if names else f"no {SUFFIX} file"
        raise WeightsError(f"{os.fspath(source)!r} has {found}. Weights in other formats are not loaded.")
    return sources.fetch(source, names[0], **hub)


def _with_folder(source: str | os.PathLike[str], name: str, hub: HubOptions) -> str:
    """The name of a repository's file with its folder, where only one folder has such a file."""
    names = []
    if sources.is_repository(source):
        with suppress(SourceError):  # fetching will say what is wrong
            names = [one for one in sources.list_files(source, SUFFIX, **hub) if one.endswith(f"/{name}")]
    return names[0] if len(names) == 1 else name


def _check_suffix(name: str) -> None:
    if not name.endswith(SUFFIX):
        raise WeightsError(
            f"{name!r}: only {SUFFIX} files are loaded. Others (.bin, .pt, .ckpt) are pickles, which run code when "
            "loaded; if you trust the author, convert it once: torch.load(..., weights_only=True), then "
            "trimtab.adapters.weights.save_weights(...)."
        )
