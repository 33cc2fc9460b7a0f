"""Which files a recipe means: the commit of a repository on the Hub, or the hash of a file on this machine.

What a guidance gives in `pinned` is made here. A branch moves on and a file may be written anew; a commit and a hash do
not.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from . import source as sources
from .shipped import located

TIMEOUT = 10
"""Seconds after which a Hub that does not answer is not waited for."""


def commit(source: str | os.PathLike[str] | None, revision: str | None) -> str | None:
    """The commit that a branch or tag is at, as the Hub says, or else the cache.

    Args:
        source: whatever `from_pretrained` takes.
        revision: branch, tag or commit; by default the main branch.

    Returns:
        The commit; `revision` for a folder, and where neither knows.
    """
    if source is None or not sources.is_repository(source) or sources.COMMIT.fullmatch(revision or ""):
        return revision
    try:
        return HfApi().repo_info(str(source), revision=revision, timeout=TIMEOUT).sha or revision
    except (OfflineModeIsEnabled, OSError, ValueError, sources.TRANSPORT):
        pass
    try:
        found = snapshot_download(str(source), revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return revision
    return sources.commit_of(Path(found) / "any file")


def sha256(source: str | os.PathLike[str] | None, name: str | None, suffix: str = ".safetensors") -> str | None:
    """The SHA-256 of a file on this machine; `None` for a repository, whose commit says as much.

    Args:
        source: a file, or the folder that holds it.
        name: of the file in the folder; may be left out where it holds one with this suffix.
        suffix: what its name ends in.
    """
    if source is None or sources.is_repository(source):
        return None
    path = Path(located(source))
    files = [path] if path.is_file() else [path / name] if name else sorted(path.rglob(f"*{suffix}"))
    return sources.sha256(files[0]) if len(files) == 1 and files[0].is_file() else None
