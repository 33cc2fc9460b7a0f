"""Files from a folder or from a repository on the Hub, by one path: no other module downloads anything.

A source is what `from_pretrained` takes: a folder, `"trimtab/NAME"` for a model that came with this package, or
`"owner/repository"` where no such folder exists. Nothing that is fetched is run, unpickled or evaluated here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypedDict, Unpack

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import SourceError
from .shipped import located

COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the client's HTTP library raises for a broken connection; the client's version decides which library that is."""


class HubOptions(TypedDict, total=False):
    """What may be said about a repository on the Hub; a folder ignores it.

    Args:
        revision: branch, tag or commit; by default the main branch.
        token: access token; `True` for the one that `hf auth login` stored, `False` for none.
        cache_dir: folder of the cache; by default the client's own.
        local_files_only: take what is in the cache and never ask the Hub; `HF_HUB_OFFLINE=1` does so for a process.
        force_download: fetch again what is in the cache.
        endpoint: address of another Hub; by default `HF_ENDPOINT`.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    endpoint: str | None


def is_repository(source: str | os.PathLike[str]) -> bool:
    """Whether a source is `"owner/repository"`, and no file or folder of that name exists."""
    source = located(source)
    return isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None and not os.path.exists(source)


def check_name(name: str) -> str:
    """The name of a file inside a source, refused if it could lead out of it, on any system.

    Raises:
        SourceError: an absolute name, one with `..`, a backslash, a drive, or an empty part.
    """
    parts = name.split("/")
    windows = PureWindowsPath(name)
    leads_out = PurePosixPath(name).is_absolute() or windows.drive or windows.root or "\\" in name or "\0" in name
    if leads_out or any(part in ("", ".", "..") for part in parts):
        raise SourceError(f"{name!r} is no name of a file inside a folder; allowed: a relative name without '..'.")
    return name


def fetch(source: str | os.PathLike[str], name: str, largest: int | None = None, **hub: Unpack[HubOptions]) -> Path:
    """The local path of a file of a source, downloaded to the client's cache if need be.

    Args:
        source: a folder, or `"owner/repository"`.
        name: the file's name inside it, with `/` between folders.
        largest: the most bytes that it may have; a larger one is not downloaded.
        **hub: see `HubOptions`.

    Raises:
        SourceError: there is no such file, folder, repository or revision, no access to it, no connection and nothing
            in the cache, a download that broke off, or a file that is too large; the message says which, and what to
            do.
    """
    check_name(name)
    if not is_repository(source):
        path = Path(located(source)) / name
        if not path.is_file():
            raise SourceError(f"There is no file {name!r} in {os.fspath(source)!r}.")
        _check_size(path.stat().st_size, largest, f"{str(path)!r}")
        return path
    try:
        if largest is not None:
            size = hf_hub_download(str(source), name, dry_run=True, **hub).file_size
            _check_size(size, largest, f"{name!r} from {source!r}")
        return Path(hf_hub_download(str(source), name, **hub))
    except SourceError:
        raise
    except (OSError, ValueError, TRANSPORT) as error:
        raise _explained(error, str(source), name, hub) from error


def fetch_folder(source: str | os.PathLike[str], patterns: Sequence[str], **hub: Unpack[HubOptions]) -> Path:
    """The local folder of a source, with those of its files that match.

    Args:
        source: a folder, or `"owner/repository"`.
        patterns: such as `"*.json"`.
        **hub: see `HubOptions`.

    Raises:
        SourceError: see `fetch`.
    """
    if not is_repository(source):
        return Path(located(source))
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns), **hub))
    except (OSError, ValueError, TRANSPORT) as error:
        raise _explained(error, str(source), ", ".join(patterns), hub) from error


def find(source: str | os.PathLike[str], name: str, **hub: Unpack[HubOptions]) -> Path | None:
    """As `fetch`, but `None` where the source has no such file; offline, where the cache has none.

    Raises:
        SourceError: see `fetch`.
    """
    if not is_repository(source) and not (Path(located(source)) / check_name(name)).is_file():
        return None
    try:
        return fetch(source, name, **hub)
    except SourceError as error:
        cause = error.__cause__
        offline = isinstance(cause, LocalEntryNotFoundError) and isinstance(
            cause.__cause__, (OfflineModeIsEnabled, type(None))
        )
        if offline or isinstance(cause, RemoteEntryNotFoundError):
            return None
        raise


def list_files(source: str | os.PathLike[str], suffix: str, **hub: Unpack[HubOptions]) -> list[str]:
    """The names of a source's files that end in `suffix`, sorted; offline those that the cache holds.

    Raises:
        SourceError: see `fetch`.
    """
    if not is_repository(source):
        folder = Path(located(source))
        if not folder.is_dir():
            raise SourceError(
                f"There is no file or folder {os.fspath(source)!r}, and no repository can have that name."
            )
        return _inside(folder, suffix)
    repository, revision = str(source), hub.get("revision")
    try:
        if hub.get("local_files_only"):
            return _cached(repository, suffix, hub)
        api = HfApi(endpoint=hub.get("endpoint"), token=hub.get("token"))
        return sorted(name for name in api.list_repo_files(repository, revision=revision) if name.endswith(suffix))
    except OfflineModeIsEnabled:
        return _cached(repository, suffix, hub)
    except (OSError, ValueError, TRANSPORT) as error:
        raise _explained(error, repository, f"*{suffix}", hub) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit_of(path: Path) -> str | None:
    """The commit that a file in the client's cache belongs to; `None` for any other file."""
    parents = (parent for parent in path.parents if parent.parent.name == "snapshots")
    return next((parent.name for parent in parents if COMMIT.fullmatch(parent.name)), None)


def promised_sha256(path: Path) -> str | None:
    """The SHA-256 that the Hub gave for a large file: the client's cache names the content by it."""
    name = path.resolve().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def _inside(folder: Path, suffix: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}") if path.is_file())


def _cached(repository: str, suffix: str, hub: HubOptions) -> list[str]:
    try:
        folder = snapshot_download(
            repository,
            revision=hub.get("revision"),
            cache_dir=hub.get("cache_dir"),
            allow_patterns=f"*{suffix}",
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise _explained(error, repository, f"*{suffix}", hub) from error
    return _inside(Path(folder), suffix)


def _explained(error: Exception, repository: str, name: str, hub: HubOptions) -> SourceError:
    """The client's error as one sentence that says what to do."""
    revision = hub.get("revision")
    where = f"{repository!r} at revision {revision!r}" if revision else repr(repository)
    what = f"{name!r} from {where} on the Hub"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return SourceError(f"No access to {repository!r}: accept its conditions on its page, then pass token=.")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return SourceError(
            f"There is no folder {repository!r}, and the Hub shows no such repository (HTTP {status}): check the name; "
            "if it is private, run `hf auth login` or pass token=."
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{repository!r} has no revision {revision!r}; allowed: a branch, a tag or a commit.")
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        why = f"the Hub cannot be reached ({type(cause).__name__})" if cause else "the Hub may not be asked"
        if isinstance(cause, OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set"
        return SourceError(f"{what} is not in the cache, and {why}. Fetch it once while online.")
    if isinstance(error, EntryNotFoundError):
        return SourceError(f"There is no file {name!r} in {where} on the Hub.")
    if isinstance(error, HfHubHTTPError):
        return SourceError(f"The Hub refused {what} (HTTP {status}).")
    reason = " ".join(str(error).split()) or type(error).__name__
    return SourceError(f"{what} did not arrive whole ({type(error).__name__}: {reason}). Nothing of it is kept; retry.")


def _check_size(size: int | None, largest: int | None, what: str) -> None:
    if largest is not None and size is not None and size > largest:
        raise SourceError(f"{what} has {size:,} bytes; allowed: at most {largest:,}.")
