"""The plug-in under test on one tiny pipeline: attached, run, counted, and compared with the stock pipeline."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from .. import guide
from ..guidance.base import Guidance
from ..guidance.errors import ParameterError, UnsupportedPipelineError, UnsupportedSchedulerError
from ..guidance.registry import find
from ..pipelines.around import apart
from ..pipelines.components import denoisers_of
from .example import Example
from .fingerprint import fingerprint, of_pipeline
from .stages import Stage, run

HINT = """If it needs parameters to act, give the kit an example in the conftest.py of your package:

    from trimtab.conformance import Example

    def pytest_trimtab_example(name, pipe):
        return Example({"parameter": value})"""

ROUNDING = 1e-3
"""Relative difference of two results that are equal but for the order of float32 operations."""

ExampleOf = Callable[[str, Any], Example | None]


@dataclass(frozen=True)
class Subject:
    """A plug-in on one stage.

    Args:
        name: of the plug-in.
        stage: the pipeline and its call.
        example_of: the `pytest_trimtab_example` hook.
    """

    name: str
    stage: Stage
    example_of: ExampleOf

    @property
    def cls(self) -> type[Guidance]:
        """The plug-in's class."""
        return find(self.name)

    def stock(self, dtype: torch.dtype = torch.float32) -> Any:
        """The stage's pipeline, guidable, with nothing attached."""
        pipe = self.stage.build()
        return guide(pipe if dtype == torch.float32 else pipe.to(dtype))

    def example(self, pipe: Any) -> Example:
        """What the author says of this plug-in on this pipeline."""
        return self.example_of(self.name, pipe) or Example()

    def skip_if_exempt(self, check: str) -> None:
        """Skip a check that the author says the formula cannot pass, with the reason given."""
        reason = self.example(self.stock()).exempt.get(check)
        if reason is not None:
            pytest.skip(f"{self.name} is exempt from {check!r}: {reason}")

    def attach(self, pipe: Any, **parameters: Any) -> Guidance:
        """Attach the plug-in with its example parameters, and those given here; skip where it refuses the pipeline."""
        with self.refusals(pipe):
            guidance: Guidance = pipe.add_guidance(self.name, **{**self.example(pipe).parameters, **parameters})
        return guidance

    def guided(self, **parameters: Any) -> Any:
        """The stage's pipeline with the plug-in attached."""
        pipe = self.stock()
        self.attach(pipe, **parameters)
        return pipe

    def run(self, pipe: Any, **options: Any) -> torch.Tensor:
        """The images of one run; skip where the plug-in refuses the pipeline before the first denoiser call."""
        with self.refusals(pipe):
            return run(pipe, self.stage, **options)
        raise AssertionError("a refusal skips")

    @contextmanager
    def refusals(self, pipe: Any) -> Iterator[None]:
        """Skip where the plug-in refuses the pipeline; fail where it does so too late."""
        with counted(pipe) as count:
            try:
                yield
            except (UnsupportedPipelineError, UnsupportedSchedulerError, ParameterError) as error:
                if count.evaluations:
                    self.fail(
                        "a timely refusal",
                        f"it refused after {count.evaluations} evaluations: {error}",
                        "Refuse in validate() or setup(run), before anything is computed.",
                    )
                pytest.skip(f"{self.name} refuses {self.stage.name}: {error}")

    def run_as_declared(self, pipe: Any, seeds: Sequence[int] = (0,), **override: Any) -> torch.Tensor:
        """The images of one run; fail where the plan announces other evaluations than the denoiser computes."""
        declared = self.plan(pipe, **override).evaluations
        with counted(pipe) as count:
            image = self.run(pipe, seeds=seeds, **override)
        computed = count.evaluations / len(seeds)
        if declared != computed:
            self.fail(
                "declared evaluations = actual evaluations",
                f"explain_guidance declares {declared} an image, but the denoiser computed {computed:g}.",
                "branches(step) must ask for the same predictions in a plan, where run.dry is true and "
                "step.sample is None, as in a run; and nothing may call the denoiser but the engine.",
            )
        return image

    def plan(self, pipe: Any, **override: Any) -> Any:
        """What `explain_guidance` says of the stage's call, unprinted."""
        with contextlib.redirect_stdout(io.StringIO()):
            return pipe.explain_guidance(**{**self.stage.call, **override})

    def fail(self, check: str, finding: str, remedy: str) -> NoReturn:
        """Fail with what was found and what to do about it."""
        pytest.fail(f"{self.name} on {self.stage.name} fails {check}: {finding}\n\n{remedy}", pytrace=False)


class Count:
    """Rows that a denoiser and others of its class have computed."""

    evaluations = 0


@contextmanager
def counted(pipe: Any) -> Iterator[Count]:
    """Count rows at the `forward` of the denoiser's class, underneath trimtab, so that a second denoiser counts too.

    Calls that a guidance makes apart, on other inputs than x_t, are no evaluations.
    """
    count = Count()
    kinds: set[Any] = {type(getattr(module, "_orig_mod", module)) for module in denoisers_of(pipe)}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            original = kind.forward

            @functools.wraps(original)
            def forward(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                output = _original(self, *args, **kwargs)
                count.evaluations += 0 if apart.get() else len(output[0])
                return output

            stack.callback(setattr, kind, "forward", original)
            kind.forward = forward
        yield count


def relative(difference: torch.Tensor, size: torch.Tensor) -> float:
    """The size of one tensor in units of another's."""
    return float(difference.float().norm() / size.float().norm().clamp_min(1e-12))


def percent(share: float) -> str:
    """A share in words, however small: never "0.0%" of what differs."""
    return f"{100 * share:.1g}%" if share < 0.001 else f"{share:.1%}"


def state_of(pipe: Any, guidance: Guidance, values: bool = True) -> dict[str, str]:
    """Everything that a run must leave as it was: the pipeline, the guidance, models among its parameters, torch."""
    found = {f"pipe.{path}": token for path, token in of_pipeline(pipe, values).items()}
    for name, value in guidance.parameters.items():
        inner = fingerprint(value, values) if isinstance(value, torch.nn.Module) else {"": repr(value)}
        found.update({f"{guidance.label}.{name}{path}": token for path, token in inner.items()})
    own = {name for name in vars(guidance) if name not in guidance.parameters and not name.startswith("_")}
    found.update({f"{guidance.label}.{name}": "kept" for name in own})
    for kind in {type(part) for part in _parts_of(pipe)}:
        for base in kind.__mro__:
            functions = {key: value for key, value in vars(base).items() if callable(value)}
            found.update({f"{base.__qualname__}.{key}, of the class": str(id(f)) for key, f in functions.items()})
    for name in ("pre_hooks", "hooks"):
        for hook in getattr(torch_module, f"_global_forward_{name}").values():
            found[f"torch.nn.modules.module, global forward {name}: {hook!r}"] = "registered"
    found["torch.nn.functional.scaled_dot_product_attention"] = str(id(F.scaled_dot_product_attention))
    found["torch.is_grad_enabled()"] = str(torch.is_grad_enabled())
    found["torch.get_default_dtype()"] = str(torch.get_default_dtype())
    return found


def _parts_of(pipe: Any) -> Iterator[Any]:
    """The components of a pipeline, and the modules inside them."""
    for component in pipe.components.values():
        yield from component.modules() if isinstance(component, torch.nn.Module) else (component,)


def changes(before: Mapping[str, str], after: Mapping[str, str], most: int = 6) -> str:
    """What was added, removed or exchanged, a line each."""
    lines = []
    for path in [*before, *(path for path in after if path not in before)]:
        if before.get(path) != after.get(path):
            kind = "was added" if path not in before else "is gone" if path not in after else "was changed"
            lines.append(f"    {path} {kind}")
    return "\n".join(lines[:most] + ([f"    and {len(lines) - most} more"] if len(lines) > most else []))
