"""The guidable pipeline: the same object, whose class is a dynamic subclass of its own.

The subclass carries the stock name, so that `save_pretrained`, `AutoPipeline...from_pipe` and logs see the stock
pipeline. Calling it without guidance is the stock call.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any

from diffusers import DiffusionPipeline

from ..guidance import recipe, registry
from ..guidance.base import Guidance
from ..guidance.errors import ParameterError, UnknownGuidanceError, did_you_mean
from ..guidance.order import check_conflicts, ordered
from ..guidance.planner import Plan
from .components import check_guidable
from .explain import make_plan
from .run import GuidedRun

ROWS = ("auto", "batched", "sequential")


class GuidedMixin:
    """What `trimtab.guide` adds to a pipeline."""

    _trimtab_guidances: dict[str, Guidance]

    # -- attaching -------------------------------------------------------------------------------------------------
    def add_guidance(self, guidance: str | Guidance, /, *, name: str | None = None, **parameters: Any) -> Guidance:
        """Attach a guidance; it acts in every call from now on.

        Args:
            guidance: a plug-in's name, or an instance of a `Guidance` subclass.
            name: the name under which it is attached; by default the plug-in's own.
            **parameters: the plug-in's parameters, where it is given by name.

        Returns:
            The guidance, whose parameters may be read and set between runs.

        Raises:
            UnknownGuidanceError: no such plug-in; the message lists those that are installed.
            ParameterError: an unknown parameter or a value that is not allowed, layers that match nothing, a name that
                is taken.
            ConflictError: another guidance claims the same slot or the opposite order.
            UnsupportedPipelineError, UnsupportedSchedulerError: it needs what this pipeline or scheduler does not have.
        """
        if name is not None and (not isinstance(name, str) or not name):
            raise ParameterError(f"add_guidance: name={name!r}; allowed: a string that is not empty, or None.")
        if isinstance(guidance, str):
            guidance = registry.create(guidance, **parameters)
        elif not isinstance(guidance, Guidance):
            raise _no_guidance(guidance)
        elif parameters:
            raise ParameterError(
                f"{guidance.label}: {', '.join(parameters)} given beside an instance; set parameters on the instance."
            )
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
        make_plan(self, {name: guidance}, None, {})
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
        self, guidance: str | Guidance, /, *, name: str | None = None, **parameters: Any
    ) -> Iterator[Guidance]:
        """Attach a guidance within a `with` block; takes what `add_guidance` takes."""
        added = self.add_guidance(guidance, name=name, **parameters)
        try:
            yield added
        finally:
            attached, key = self._guidances(), name or added.label
            if attached.get(key) is added:
                del attached[key]

    @property
    def guidances(self) -> Mapping[str, Guidance]:
        """The attached guidances by name, in the order in which they act."""
        attached = self._guidances()
        return MappingProxyType({name: attached[name] for name in ordered(attached)})

    def _guidances(self) -> dict[str, Guidance]:
        return self.__dict__.setdefault("_trimtab_guidances", {})

    # -- running ---------------------------------------------------------------------------------------------------
    guidance_rows: str = "auto"
    """How branches are computed: `"auto"` in the pipeline's denoiser call, from the block on where they begin to
    differ; `"batched"` in that call from its beginning; `"sequential"` each in a call of its own. The results agree to
    rounding."""
    guidance_max_rows: int | None = None
    """The most rows in one denoiser call (images times branches); beyond it, branches become calls of their own."""

    def explain_guidance(self, num_inference_steps: int | None = None, **call: Any) -> Plan:
        """Print what a call would do, and return the plan. Nothing is computed.

        Args:
            num_inference_steps: as in the call; the pipeline's own default if not given.
            **call: other arguments of the call that matter for the cost, such as `guidance_scale`.
        """
        plan = make_plan(self, self._guidances(), num_inference_steps, call)
        print(plan)
        return plan

    def _guided_call(self, stock_call: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self._guidances()
        if not attached:
            return stock_call(self, *args, **kwargs)
        if self.guidance_rows not in ROWS:
            raise ParameterError(f"guidance_rows={self.guidance_rows!r}; allowed: {', '.join(map(repr, ROWS))}.")
        most = self.guidance_max_rows
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ParameterError(f"guidance_max_rows={most!r}; allowed: a whole number >= 1, or None for no limit.")
        bound = inspect.signature(stock_call).bind(self, *args, **kwargs)
        bound.apply_defaults()
        with GuidedRun(self, attached, bound.arguments, self.guidance_rows, self.guidance_max_rows) as run:
            result = stock_call(self, *args, **kwargs)
        self.__dict__["last_guided_run"] = SimpleNamespace(evaluations=run.evaluations, forward_calls=run.forward_calls)
        return result

    # -- recipes ---------------------------------------------------------------------------------------------------
    def save_guidance(self, folder: str | os.PathLike[str]) -> None:
        """Write the recipe, `guidance.json`, into a folder."""
        recipe.save(folder, self.guidances)

    def load_guidance(self, source: str | os.PathLike[str], **hub: Any) -> None:
        """Replace the attached guidances by those of a recipe: a file, a folder, or a repository on the Hub.

        Raises:
            RecipeError: a recipe that is corrupt, or that names a plug-in that is not installed.
        """
        loaded = recipe.read(source, **hub)
        check_conflicts(loaded)
        ordered(loaded)
        make_plan(self, loaded, None, {})
        self.clear_guidance()
        self._guidances().update(loaded)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Diffusers' own `save_pretrained`, with the recipe beside it if guidances are attached."""
        recipe.dump(self.guidances)  # refuses here what could not be written after gigabytes of weights
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        # An older recipe in the folder would otherwise come back with the pipeline.
        if self._guidances() or os.path.isfile(os.path.join(save_directory, recipe.FILE)):
            self.save_guidance(save_directory)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _bare_guided, (stock_class(type(self)),), {**self.__dict__, "_trimtab_guidances": {**self._guidances()}}


def _no_guidance(given: Any) -> ParameterError:
    what = f"{given.__name__} is a class" if isinstance(given, type) else f"{given!r} is given"
    return ParameterError(
        f"add_guidance: {what}; needed: a plug-in's name such as 'pag', or an instance of a trimtab.Guidance subclass."
    )


@functools.cache
def guided_class(stock: type) -> type:
    """The guidable subclass of a stock pipeline class, under the stock name."""

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._guided_call(stock.__call__, *args, **kwargs)

    body = {
        "__call__": __call__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (GuidedMixin, stock), body)


def stock_class(kind: type) -> type:
    """The Diffusers class that a guidable class is made of; a class that is not guidable is returned as it is."""
    if not issubclass(kind, GuidedMixin):
        return kind
    return next(base for base in kind.__mro__ if not issubclass(base, GuidedMixin) and base is not GuidedMixin)


def _bare_guided(stock: type) -> Any:
    kind: Any = guided_class(stock)
    return kind.__new__(kind)


def guide(pipe: DiffusionPipeline) -> Any:
    """Make a pipeline guidable, in place, and return it.

    Raises:
        UnsupportedPipelineError: it has nothing that guidance could hold on to; the message says what is missing.
    """
    if isinstance(pipe, GuidedMixin):
        return pipe
    check_guidable(pipe)
    kind: Any = type(pipe)
    pipe.__class__ = guided_class(getattr(kind, "guided_stock", kind))
    return pipe
