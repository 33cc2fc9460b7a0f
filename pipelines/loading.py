"""Loading a pipeline that is guidable from the start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline

from ..guidance import recipe
from ..guidance import source as sources
from ..guidance.errors import SourceError, UnsupportedPipelineError, UntrustedCodeError
from ..guidance.recipe.values import check_depth
from ..guidance.shipped import located
from ..guidance.source import HubOptions
from .fashion import ClassConditionalPipeline, is_class_conditional
from .guided import guide

INDEX = "model_index.json"
LARGEST_CONFIG = 2**24
"""The most bytes of a configuration file; the largest real ones, with names of 22,000 classes, have a tenth of it."""
LARGEST_JSON = 2**27
"""Of any other JSON file; the largest vocabularies of tokenizers have a quarter of it."""


class GuidedPipeline:
    """Loads any Diffusers pipeline as a guidable one."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Any:
        """Load from the Hub, a folder, or by the name of a model that came with this package (`trimtab models`).

        A recipe (`guidance.json`) beside the pipeline is attached. From the Hub, all files are of one commit, and
        nothing that they hold is run: weights are safetensors, and code needs `trust_remote_code=True` together with
        a pinned commit, so that what runs is what was read.

        Args:
            source: repository, folder, or a name such as `"trimtab/fashion"`.
            **options: whatever `DiffusionPipeline.from_pretrained` takes, such as `revision`, `cache_dir`, `token`,
                `local_files_only` and `custom_pipeline`. `use_safetensors` is true unless given: weights in other
                formats are pickles, which run code when loaded.

        Raises:
            UnsupportedPipelineError: weights that are not safetensors, a configuration that is no JSON or too large,
                or nothing that guidance could hold on to.
            UntrustedCodeError: code from the Hub without trust or without a pinned commit.
            SourceError: no such folder, repository or revision, no access to it, or no connection.
            RecipeError: see `load_guidance`.
        """
        source = located(source)
        if not sources.is_repository(source) and not os.path.exists(source):
            raise SourceError(f"There is no folder {os.fspath(source)!r}, and no repository can have that name.")
        check_trust(source, options)
        options.setdefault("use_safetensors", True)
        hub: HubOptions = {}
        folder = Path(source)
        try:
            if sources.is_repository(source):
                hub = _hub_options(options)
                index = sources.fetch(source, INDEX, LARGEST_CONFIG, **hub)
                _check_json(index)
                # The branch may move on meanwhile.
                hub["revision"] = options["revision"] = sources.commit_of(index)
                if is_class_conditional(index.parent):
                    # Diffusers would take the names of classes in its index for those of components.
                    folder = sources.fetch_folder(source, ("*.json", "*.safetensors"), **hub)
                else:
                    folder = Path(DiffusionPipeline.download(source, **options))
            for file in sorted(folder.rglob("*.json")):
                _check_json(file)
            if is_class_conditional(folder):
                pipe = guide(ClassConditionalPipeline.from_pretrained(folder, **options))
            else:
                pipe = guide(DiffusionPipeline.from_pretrained(source, **options))
        except OSError as error:
            if options["use_safetensors"] and "safetensors" in str(error):
                raise UnsupportedPipelineError(
                    f"{source}: only weights in safetensors format are loaded, and some are missing. {error} Weights "
                    "in other formats (.bin, .pt, .ckpt) are pickles, which run code when they are loaded. If you "
                    "trust their author, convert them once: load with use_safetensors=None, which Diffusers takes as "
                    "leave to fall back on them, then save_pretrained(...)."
                ) from error
            raise
        if sources.find(source, recipe.FILE, **hub) is not None:
            pipe.load_guidance(source, **hub)
        return pipe

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Use GuidedPipeline.from_pretrained(...), or trimtab.guide(pipe) for a pipeline you have.")


def check_trust(source: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Refuse code from the Hub that is not both trusted and pinned; a file on this machine is the caller's own.

    Args:
        source: what the pipeline is loaded from.
        options: of them, `trust_remote_code`, `revision`, `custom_pipeline` and `custom_revision` matter.

    Raises:
        UntrustedCodeError: the message says which argument to add.
    """
    trusted, custom = options.get("trust_remote_code", False), options.get("custom_pipeline")
    remote = sources.is_repository(source)
    if trusted and remote:
        _check_pinned("revision", options.get("revision"), source)
    if custom is None or os.path.exists(custom):
        return
    if sources.is_repository(custom):
        if not trusted:
            raise UntrustedCodeError(
                f"custom_pipeline={custom!r} runs code from the Hub. Read it, then pass trust_remote_code=True and "
                "custom_revision= with the commit that you read."
            )
        _check_pinned("custom_revision", options.get("custom_revision"), custom)
        return
    if f"{custom}.py" not in sources.list_files(source, ".py", **_hub_options(options)):
        raise UntrustedCodeError(
            f"custom_pipeline={custom!r} is no file, folder or repository. Diffusers would take code of that name from "
            "its community pipelines, which cannot be pinned to a commit: download the file, and pass its path."
        )


def _hub_options(options: Mapping[str, Any]) -> HubOptions:
    return cast(HubOptions, {key: options[key] for key in HubOptions.__annotations__ if key in options})


def _check_pinned(argument: str, revision: object, repository: str | os.PathLike[str]) -> None:
    if not isinstance(revision, str) or not sources.COMMIT.fullmatch(revision):
        raise UntrustedCodeError(
            f"trust_remote_code=True runs code of {str(repository)!r}, and {argument}={revision!r} may be other code "
            f"tomorrow. Pass {argument}= with the 40 hexadecimal digits of the commit that you read."
        )


def _check_json(path: Path) -> None:
    """Refuse a file that would use up memory or stack before it is known to be what it should."""
    settings = path.name == INDEX or path.name.endswith("config.json")
    largest = LARGEST_CONFIG if settings else LARGEST_JSON
    if (size := path.stat().st_size) > largest:
        raise UnsupportedPipelineError(f"{path} has {size:,} bytes; allowed: at most {largest:,}.")
    try:
        content = json.loads(path.read_bytes())
        if settings:
            check_depth(content)
    except ValueError as error:
        if settings:
            raise UnsupportedPipelineError(f"{path} is no JSON that a configuration can be: {error}.") from error
        return
    except RecursionError as error:
        raise UnsupportedPipelineError(f"{path} is no JSON that a model can be made of: {error}.") from error
    if settings and not isinstance(content, dict):
        raise UnsupportedPipelineError(f"{path} is a JSON {type(content).__name__}; needed: names with their values.")
