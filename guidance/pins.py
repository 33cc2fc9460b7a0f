"""Which files a recipe means: the commit of a repository on the Hub, or the hash of a file on this machine.

What a guidance gives in `pinned` is made here, and what an image's record says of the model that made it. A branch
moves on and a file may be written anew; a commit and a hash do not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name

from . import source as sources
from .errors import WeightsError
from .files import replacing
from .shipped import located

TIMEOUT = 10
"""Seconds after which a Hub that does not answer is not waited for."""
LOADED = (".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".py")
"""How files end that a model is made of; a page, a picture or a log beside them changes nothing."""
WHOLE, PIECE, EVERY = 2**26, 2**12, 2**16
"""Bytes up to which a file is read whole for a fingerprint; of a larger one the first `PIECE` of each `EVERY`."""


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
        found = HfApi().repo_info(str(source), revision=revision, timeout=TIMEOUT).sha
    except (OfflineModeIsEnabled, OSError, ValueError, sources.TRANSPORT):
        return _cached(str(source), revision)
    if found is None:
        return revision
    _note(str(source), revision or constants.DEFAULT_REVISION, found)
    return found


def _note(repository: str, revision: str, found: str) -> None:
    """Tell the client's cache where a branch is: it notes that only for what is loaded by the branch's name."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    with replacing(folder / "refs" / revision) as file:
        file.write(found.encode())


def _cached(repository: str, revision: str | None) -> str | None:
    """The commit that the cache has for a branch."""
    try:
        folder = snapshot_download(repository, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return revision
    return sources.commit_of(Path(folder) / "any file")


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


def listing_sha256(source: str | os.PathLike[str] | None) -> str | None:
    """The SHA-256 of what `sha256sum` lists of a model's files on this machine, in the order of their names.

    Args:
        source: the folder of a model; whatever `from_pretrained` takes.

    Returns:
        `None` where there is no such folder, as for a repository, whose commit says as much.
    """
    if source is None or not (folder := Path(located(source))).is_dir():
        return None
    lines = (f"{sources.sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in _files(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_listing(source: str | os.PathLike[str] | None, expected: str | None, label: str) -> None:
    """Refuse a folder whose files are not those that were meant.

    Args:
        source: whatever `from_pretrained` takes; for a repository its commit says as much, and nothing is checked.
        expected: what `listing_sha256` should give; `None` for whatever there is.
        label: of the guidance, for the message.

    Raises:
        WeightsError: its files are others.
    """
    if expected is not None and (found := listing_sha256(source)) not in (None, expected.lower()):
        raise WeightsError(
            f"{label}: files_sha256={expected!r}, but the files in {source} come to {found}. They were changed or "
            "are others than the ones meant; leave files_sha256 out to take them as they are."
        )


def fingerprint(source: str | os.PathLike[str]) -> str | None:
    """A short hash that tells the files of a model on this machine from what they were before they were written anew.

    Names and contents count, times do not. Of a large file every sixteenth part is read, for training changes all of
    it: so a model of ten GiB takes a second, where `sha256` would take as long as loading it.

    Args:
        source: a file, or the folder of a model; whatever `from_pretrained` takes.

    Returns:
        `None` where there is no such file or folder, as for a repository, whose commit says as much.
    """
    place = os.fspath(located(source))
    if not os.path.exists(place):
        return None
    folder = Path(place)
    digest = hashlib.sha256()
    for file in [folder] if folder.is_file() else _files(folder):
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()[:16]


def fingerprints(sources: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints, by the same names, of those sources that are on this machine."""
    found = {name: fingerprint(source) for name, source in sources.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def _files(folder: Path) -> list[Path]:
    """Those that a model is made of, sorted."""
    # A component's folder may be a link to that of another model, which `rglob` would pass by.
    inside = (*folder.glob("*"), *folder.glob("*/*"))
    return sorted(one for one in inside if one.suffix in LOADED and one.is_file())


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb", buffering=0) as opened:
        if size <= WHOLE:
            yield opened.read()
            return
        for start in range(0, size, EVERY):
            opened.seek(start)
            yield opened.read(PIECE)
