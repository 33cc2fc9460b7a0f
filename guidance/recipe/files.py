"""Recipes in folders, in files and on the Hub, with the files that belong to them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import CommitOperationAdd, HfApi

from .. import source as sources
from ..base import Guidance
from ..errors import RecipeError, SourceError
from ..files import replacing
from ..source import HubOptions
from .entries import dump, load, pinned
from .values import LARGEST, Fetch

FILE = "guidance.json"


class PushOptions(TypedDict, total=False):
    """What may be said about a push to the Hub.

    Args:
        private: whether a new repository is; by default as the account says.
        token: access token; by default the one that `hf auth login` stored.
        revision: the branch to commit to; by default the main one.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing to the branch.
        endpoint: address of another Hub; by default `HF_ENDPOINT`.
    """

    private: bool | None
    token: str | bool | None
    revision: str | None
    commit_message: str
    create_pr: bool
    endpoint: str | None


def save(path: str | os.PathLike[str], guidances: Mapping[str, Guidance]) -> Path:
    """Write the recipe into a folder as `guidance.json`, or into a `.json` file, and its tensors and images beside it.

    The recipe is replaced last and as a whole, so that a failure leaves the old one. The other files are named by their
    content; those of an older recipe stay, since another recipe in the folder may name them.

    Raises:
        RecipeError: see `dump`; then no file is touched.
    """
    files: dict[str, bytes] = {}
    text = _text(pinned(guidances), files)
    target = Path(path)
    if target.suffix != ".json" or target.is_dir():
        target = target / FILE
    write_files(target.parent, files)
    _write(target, text)
    return target


def read(source: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> dict[str, Guidance]:
    """The guidances of a recipe in a folder, a file, or a repository on the Hub.

    Args:
        source: a path, or `"owner/repository"` where no such path exists.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, ...; see `HubOptions`.

    Raises:
        RecipeError: it is not JSON, is too large, or see `load`.
        SourceError: there is no recipe there, or it cannot be reached; see `trimtab.guidance.source.fetch`.
    """
    if sources.is_repository(source) and Path(source).suffix != ".json":
        path = sources.fetch(source, FILE, LARGEST[".json"], **hub)
        # The files beside it must be of the same commit, also when the branch moves on meanwhile.
        pinned: HubOptions = {**hub, "revision": sources.commit_of(path) or hub.get("revision")}
        return load(_parsed(path), lambda name, largest: sources.fetch(source, name, largest, **pinned).read_bytes())
    path = Path(source)
    if path.is_dir():
        path = path / FILE
    return load(_parsed(path), beside(path))


def push(repo_id: str, guidances: Mapping[str, Guidance], **options: Unpack[PushOptions]) -> str:
    """Upload the recipe and its files to the Hub in one commit; the repository is made if need be.

    Returns:
        The commit, 40 hexadecimal digits: what `read(repo_id, revision=...)` takes.

    Raises:
        RecipeError: see `dump`; then nothing is sent.
        SourceError: no such account, no permission, or no connection.
    """
    files: dict[str, bytes] = {}
    files[FILE] = _text(pinned(guidances), files).encode()
    api = HfApi(endpoint=options.get("endpoint"), token=options.get("token"))
    try:
        api.create_repo(repo_id, private=options.get("private"), exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=options.get("commit_message", "Guidance of trimtab"),
            revision=options.get("revision"),
            create_pr=options.get("create_pr", False),
        )
    except (OSError, ValueError, RuntimeError, sources.TRANSPORT) as error:
        raise SourceError(
            f"The recipe was not pushed to {repo_id!r}: {' '.join(str(error).split())} To push needs a token that may "
            "write there: run `hf auth login`, or pass token=."
        ) from error
    return str(commit.oid)


def beside(path: Path) -> Fetch:
    """What `load` needs for a recipe in this file: its tensors and images lie in the same folder."""
    return lambda name, largest: sources.fetch(path.parent, name, largest).read_bytes()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files that `dump` gave into a folder, each whole or not at all."""
    for name, data in files.items():
        _write(folder / name, data)


def _write(target: Path, content: str | bytes) -> None:
    with replacing(target) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _text(guidances: Mapping[str, Guidance], files: dict[str, bytes]) -> str:
    return json.dumps(dump(guidances, files), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _parsed(path: Path) -> Any:
    def refuse_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON; infinity is written 'inf'")

    try:
        content = path.read_bytes() if (size := path.stat().st_size) <= LARGEST[".json"] else None
    except OSError as error:
        raise SourceError(f"No recipe can be read from {str(path)!r}: {error.strerror}.") from error
    if content is None:
        raise RecipeError(f"{str(path)!r} has {size:,} bytes; allowed: at most {LARGEST['.json']:,}.")
    try:
        return json.loads(content.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{str(path)!r} is not JSON: {error}.") from error
