"""The guidable pipeline: the same object, whose class is a dynamic subclass of its own.

The subclass carries the stock name, so that `save_pretrained`, `AutoPipeline...from_pipe` and logs see the stock
pipeline. Calling it without guidance is the stock call.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from diffusers import DiffusionPipeline

from ..guidance import recipe
from ..guidance.base import Guidance
from ..guidance.errors import ParameterError
from ..guidance.planner import Plan
from ..guidance.trace import Trace
from .attaching import Guidable
from .budget import ROWS, Budget
from .callbacks import with_callbacks_apart
from .components import check_guidable
from .explain import make_plan
from .parallel.branches import BranchParallel
from .run import GuidedRun
from .tracing import TracedRun, is_traced


class GuidedMixin(Guidable):
    """What `trimtab.guide` adds to a pipeline."""

    guidance_rows: str = "auto"
    """How branches are computed: `"auto"` in the pipeline's denoiser call, from the block on where they begin to
    differ; `"batched"` in that call from its beginning; `"sequential"` each in a call of its own. The results agree to
    rounding."""
    guidance_max_rows: int | None = None
    """A memory budget: the most rows in one denoiser call (images times branches), the pipeline's own included. A call
    of more is made in pieces, down to one row. Where memory runs out, the run goes on with half as many by itself."""

    guidance_checkpointing: bool = False
    """Whether a gradient through the denoiser or the autoencoder keeps only the inputs of their blocks and computes the
    rest anew: less memory, about one forward more."""

    def _plan(
        self, guidances: Mapping[str, Guidance], num_inference_steps: int | None, call: Mapping[str, Any]
    ) -> Plan:
        return make_plan(self, guidances, num_inference_steps, call)

    def _guided_call(self, stock_call: Any, *args: Any, **kwargs: Any) -> Any:
        attached, parallel = self._guidances(), self.branch_parallel
        if not attached:
            self.__dict__.pop("_trimtab_loaded", None)  # denoisers that only a guidance used
        if not attached and parallel is None:
            return stock_call(self, *args, **kwargs)
        if parallel is not None:
            parallel.check(self)
        with nullcontext() if parallel is None else parallel.run():
            return self._guided_run(stock_call, attached, args, kwargs)

    def _guided_run(self, stock_call: Any, attached: Mapping[str, Guidance], args: Any, kwargs: Any) -> Any:
        if self.guidance_rows not in ROWS:
            raise ParameterError(f"guidance_rows={self.guidance_rows!r}; allowed: {', '.join(map(repr, ROWS))}.")
        bound = inspect.signature(stock_call).bind(self, *args, **kwargs)
        bound.apply_defaults()
        kind = TracedRun if is_traced(self) else GuidedRun
        run = kind(
            self, attached, bound.arguments, self.guidance_rows, Budget(self.guidance_max_rows),
            self.guidance_checkpointing, self.branch_parallel,
        )  # fmt: skip
        with run:
            result = stock_call(self, *args, **with_callbacks_apart(run.stack, kwargs))
        self.__dict__["last_guided_run"] = SimpleNamespace(
            evaluations=run.forwards.evaluations, forward_calls=run.forwards.made, graph_bytes=run.meter.bytes
        )
        return result

    @property
    def branch_parallel(self) -> BranchParallel | None:
        """The processes that share the branches of each step; `None` where this one computes all."""
        return self.__dict__.get("_trimtab_parallel")

    def enable_branch_parallel(self, processes: int | None = None, timeout: float = 600.0) -> BranchParallel:
        """Let several processes share the branches of each step: the rows of its denoiser calls, or whole calls.

        All processes call this, and then the pipeline, with the same arguments and the same seed; each gets the whole
        result, equal to that of one process to rounding. Start them with `torchrun` or `accelerate launch`.

            mesh = pipe.enable_branch_parallel(processes=2)  # of four: two groups of two
            for number in range(mesh.index, len(prompts), mesh.groups):
                image = pipe(prompts[number], generator=torch.Generator().manual_seed(number)).images[0]
                if mesh.rank == 0:
                    image.save(f"{number}.png")

        Computed whole in every process: steps whose gradient goes through the denoiser, calls whose attention a
        guidance watches (`sag`) or that it surrounds (`easycontrol`, `joint`), and denoisers with a step cache.

        Args:
            processes: that share one image; a divisor of all there are, which is the default.
            timeout: seconds after which a process that does not answer counts as gone. One that has ended is noticed
                at once.

        Returns:
            The group of this process: `rank` of `size` in it, and `index` of `groups`.

        Raises:
            ParameterError: `processes` is no divisor, or there is only this process.
        """
        self.disable_branch_parallel()
        self.__dict__["_trimtab_parallel"] = parallel = BranchParallel(processes, timeout)
        return parallel

    def disable_branch_parallel(self) -> None:
        """Compute all branches in this process from now on."""
        parallel = self.__dict__.pop("_trimtab_parallel", None)
        if parallel is not None:
            parallel.leave()

    @contextmanager
    def trace_guidance(self) -> Iterator[list[Trace]]:
        """Record, within a `with` block, what each guidance contributes to each step of each guided run.

        with pipe.trace_guidance() as traces:
            pipe("a red fox")
        print(traces[-1])
        traces[-1].plot("trace.png")

        Yields:
            One `Trace` a run, also of a run that was broken off. Runs with nothing attached are the pipeline's own and
            leave none. `TRIMTAB_TRACE=1` in the environment writes one file a run instead.
        """
        outer = self.__dict__.get("_trimtab_traces")
        traces: list[Trace] = []
        self.__dict__["_trimtab_traces"] = traces
        try:
            yield traces
        finally:
            if outer is None:
                del self.__dict__["_trimtab_traces"]
            else:
                self.__dict__["_trimtab_traces"] = outer

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Diffusers' own `save_pretrained`, with the recipe beside it if guidances are attached."""
        recipe.dump(self.guidances, {})  # refuses here what could not be written after gigabytes of weights
        # The method is that of the stock class, which follows this one only in what `guided_class` makes.
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        # An older recipe in the folder would otherwise come back with the pipeline.
        if self._guidances() or os.path.isfile(os.path.join(save_directory, recipe.FILE)):
            self.save_guidance(save_directory)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A copy belongs to no group of processes, and to no block that records traces.
        alone = ("_trimtab_parallel", "_trimtab_traces")
        state = {name: value for name, value in self.__dict__.items() if name not in alone}
        return _bare_guided, (stock_class(type(self)),), {**state, "_trimtab_guidances": {**self._guidances()}}


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
    ours = set(GuidedMixin.__mro__)
    return next(base for base in kind.__mro__ if base not in ours and not issubclass(base, GuidedMixin))


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
