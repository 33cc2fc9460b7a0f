"""What guidances are attached to: a guidable pipeline, or the stack that is a guider of a modular one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Unpack

from diffusers.guiders import BaseGuidance

from ..guidance import recipe, registry
from ..guidance.base import Guidance
from ..guidance.contract import check_contract
from ..guidance.errors import ParameterError, UnknownGuidanceError, did_you_mean
from ..guidance.order import check_conflicts, ordered
from ..guidance.planner import Plan
from ..guidance.recipe import PushOptions
from ..guidance.source import HubOptions


class Guidable:
    """Attaching, removing, explaining and saving guidances; `_plan` says what they would cost here."""

    _trimtab_guidances: dict[str, Guidance]

    def _plan(
        self, guidances: Mapping[str, Guidance], num_inference_steps: int | None, call: Mapping[str, Any]
    ) -> Plan:
        """The plan of a run under these guidances; raises what can be refused before one."""
        raise NotImplementedError

    # -- attaching -------------------------------------------------------------------------------------------------
    def add_guidance(
        self, guidance: str | Guidance | BaseGuidance, /, *, name: str | None = None, **parameters: Any
    ) -> Guidance:
        """Attach a guidance; it acts in every call from now on.

        Args:
            guidance: a plug-in's name, an instance of a `Guidance` subclass, or a guider of Diffusers.
            name: the name under which it is attached; by default the plug-in's own, or a guider's class.
            **parameters: the plug-in's parameters, where it is given by name.

        Returns:
            The guidance, whose parameters may be read and set between runs.

        Raises:
            UnknownGuidanceError: no such plug-in; the message lists those that are installed.
            ParameterError: an unknown parameter or a value that is not allowed, layers that match nothing, a name that
                is taken.
            ConflictError: another guidance claims the same slot or the opposite order.
            UnsupportedPipelineError, UnsupportedSchedulerError: it needs what this pipeline or scheduler does not have.
            PluginError: an instance whose class cannot serve as a plug-in.
        """
        if name is not None and (not isinstance(name, str) or not name):
            raise ParameterError(f"add_guidance: name={name!r}; allowed: a string that is not empty, or None.")
        if isinstance(guidance, str):
            guidance = registry.create(guidance, **parameters)
        elif isinstance(guidance, BaseGuidance):
            name = name or type(guidance).__name__
            guidance = registry.create("guider", guider=guidance, **parameters)
        elif not isinstance(guidance, Guidance):
            raise _no_guidance(guidance)
        elif parameters:
            raise ParameterError(
                f"{guidance.label}: {', '.join(parameters)} given beside an instance; set parameters on the instance."
            )
        else:
            check_contract(guidance.label, type(guidance))
        name = name or guidance.label
        if name in self._guidances():
            raise ParameterError(
                f"A guidance named {name!r} is attached already. Change its parameters through "
                f"pipe.guidances[{name!r}], remove it first, or attach this one under another name=."
            )
        attached = {**self._guidances(), name: guidance}
        check_conflicts(attached)
        ordered(attached)
        # Layers that match nothing should fail here, not after the text encoders have run.
        self._plan({name: guidance}, None, {})
        self._guidances()[name] = guidance
        return guidance

    def remove_guidance(self, name: str) -> None:
        """Detach a guidance.

        Raises:
            UnknownGuidanceError: nothing of that name is attached.
        """
        if name not in self._guidances():
            known = list(self._guidances())
            raise UnknownGuidanceError(
                f"No guidance named {name!r} is attached.{did_you_mean(name, known)} "
                f"Attached: {', '.join(known) or 'none'}."
            )
        del self._guidances()[name]

    def clear_guidance(self) -> None:
        """Detach all guidances."""
        self._guidances().clear()

    @contextmanager
    def guidance(
        self, guidance: str | Guidance | BaseGuidance, /, *, name: str | None = None, **parameters: Any
    ) -> Iterator[Guidance]:
        """Attach a guidance within a `with` block; takes what `add_guidance` takes."""
        added = self.add_guidance(guidance, name=name, **parameters)
        key = next(reversed(self._guidances()))
        try:
            yield added
        finally:
            if self._guidances().get(key) is added:
                del self._guidances()[key]

    @property
    def guidances(self) -> Mapping[str, Guidance]:
        """The attached guidances by name, in the order in which they act."""
        attached = self._guidances()
        return MappingProxyType({name: attached[name] for name in ordered(attached)})

    def _guidances(self) -> dict[str, Guidance]:
        return self.__dict__.setdefault("_trimtab_guidances", {})

    def explain_guidance(self, num_inference_steps: int | None = None, **call: Any) -> Plan:
        """Print what a call would do, and return the plan. Nothing is computed.

        Args:
            num_inference_steps: as in the call; the pipeline's own default if not given.
            **call: other arguments of the call that matter for the cost, such as `guidance_scale`.
        """
        plan = self._plan(self._guidances(), num_inference_steps, call)
        print(plan)
        return plan

    # -- recipes ---------------------------------------------------------------------------------------------------
    def save_guidance(self, folder: str | os.PathLike[str]) -> None:
        """Write the recipe, `guidance.json`, into a folder, and the tensors and images of parameters beside it.

        Raises:
            RecipeError: a guidance that is no registered plug-in, or a parameter that cannot be stored.
        """
        recipe.save(folder, self.guidances)

    def load_guidance(self, source: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> None:
        """Replace the attached guidances by those of a recipe: a file, a folder, or a repository on the Hub.

        Args:
            source: a path, or `"owner/repository"`.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `endpoint`.

        Raises:
            RecipeError: a recipe that is corrupt, or that names a plug-in that is not installed.
            SourceError: there is no recipe there, or it cannot be reached.
        """
        loaded = recipe.read(source, **hub)
        check_conflicts(loaded)
        ordered(loaded)
        self._plan(loaded, None, {})
        self.clear_guidance()
        self._guidances().update(loaded)

    def push_guidance_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload the recipe and its tensors and images to a repository on the Hub, in one commit.

        Args:
            repo_id: `"owner/repository"`; it is made if need be.
            **options: `private`, `token`, `revision`, `commit_message`, `create_pr`, `endpoint`; see `PushOptions`.

        Returns:
            The commit, which `load_guidance(repo_id, revision=...)` takes.

        Raises:
            RecipeError: see `save_guidance`; then nothing is sent.
            SourceError: no permission, or no connection.
        """
        return recipe.push(repo_id, self.guidances, **options)


def _no_guidance(given: Any) -> ParameterError:
    what = f"{given.__name__} is a class" if isinstance(given, type) else f"{given!r} is given"
    return ParameterError(
        f"add_guidance: {what}; needed: a plug-in's name such as 'pag', or an instance of a trimtab.Guidance subclass."
    )
