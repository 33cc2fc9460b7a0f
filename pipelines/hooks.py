"""The attached guidances within one run: their state, which of them act, and what each phase makes of a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from ..guidance.base import Guidance
from ..guidance.branch import Branch, Point, Predictions, ScaledAdapters
from ..guidance.errors import GuidanceRuntimeError, UnsupportedPipelineError
from ..guidance.planner import repeats_of, wanted_branches
from ..guidance.run import AroundDenoiser, Step
from .attachment import find_attachment
from .attention import no_stand_in
from .families import Family
from .given import only_read
from .interception import fresh_copy
from .latents import ImageSpace
from .lora import adapters_of
from .others import check_other
from .processors import stand_in
from .progress import prepared
from .skipping import resolve_blocks
from .taps import set_attribute

Found = TypeVar("Found")


class SetupView:
    """What one guidance sees of a run: see `guidance.run.Run`.

    Args:
        name: under which the guidance is attached.
        run: has `stack`, `pipe`, `arguments`, `families`, `own` branches, `others`, and what guidances share: `around`
            and `attachments`.
        dry: whether the run is only explained.
    """

    def __init__(self, name: str, run: Any, dry: bool) -> None:
        self.state = SimpleNamespace()
        self.exit_stack: ExitStack = run.stack
        self.dry = dry
        self.own: tuple[Branch, ...] = run.own
        self.pictures = all(family.pictures for family in run.families)
        self.pipeline: Any = run.pipe
        self.arguments: Mapping[str, Any] = run.arguments
        self.checks: list[Callable[[Step], None]] = []
        self._name, self._run = name, run

    def attention_layers(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        refusal: Exception | None = None
        found: dict[str, None] = {}
        for family in self._run.families:  # a prior and a decoder each have layers of their own
            try:
                names = family.resolve(layers, self._name)
            except ValueError as error:
                refusal = refusal or error
                continue
            for name in names:
                if stand_in(family.attentions[name]) is None:
                    raise UnsupportedPipelineError(no_stand_in(name, family.attentions[name], self._name))
            found.update(dict.fromkeys(names))
        if refusal is not None and not found:
            raise refusal
        return tuple(found)

    def skippable_blocks(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        return self._first_of(lambda family: resolve_blocks(family, layers, self._name))

    def adapters(self, names: str | Sequence[str]) -> ScaledAdapters:
        return self._first_of(lambda family: adapters_of(family, names, self._name))

    def prepare_denoiser(self, source: str | nn.Module) -> None:
        if self.dry:
            check_other(self._run.pipe, source, self._name)
        else:
            self._run.others.prepare(source, self._name)

    def _first_of(self, resolve: Callable[[Family], Found]) -> Found:
        """What the first of the candidate denoisers has; where none has it, the first one's refusal."""
        refusal: Exception | None = None
        for family in self._run.families:
            try:
                return resolve(family)
            except ValueError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def replace(self, owner: Any, name: str, value: Any) -> None:
        set_attribute(self.exit_stack, owner, name, value)

    def fresh_scheduler(self) -> Any:
        return fresh_copy(self.pipeline.scheduler)

    def around_denoiser(self, around: AroundDenoiser) -> None:
        self._run.around.append(around)

    def check_step(self, check: Callable[[Step], None]) -> None:
        self.checks.append(check)

    def attachment(self, kind: str) -> Any:
        if kind not in self._run.attachments:
            build, denoiser = find_attachment(kind, self._run.families, type(self.pipeline).__name__, self._name)
            self._run.attachments[kind] = build(self, denoiser)
        return self._run.attachments[kind]


class Hooks:
    """The guidances of one run by name, in the order in which they act.

    Args:
        guidances: in that order.
        run: has `stack`, where each teardown is put, `families`, `own` branches and `others`.
        space: the images that samples stand for; `None` where nobody knows.
    """

    def __init__(self, guidances: Mapping[str, Guidance], run: Any, space: ImageSpace | None = None) -> None:
        self.guidances, self._space = guidances, space
        self._decoding: dict[str, Any] = {}
        if space is not None and space.autoencoder is not None:
            self._decoding = {"decode": space.decode, "encode": space.encode}
        self._views: dict[str, SetupView] = {}
        for name in prepared(run.pipe, guidances):
            guidance, view = guidances[name], SetupView(name, run, dry=False)
            self._views[name] = view
            run.stack.callback(guidance.teardown, view)
            with annotated(name, "setup"):
                guidance.setup(view)

    def check_unwatched(self) -> None:
        """Refuse guidances that read attention maps, which a step cache leaves out."""
        for name, view in self._views.items():
            branches = [value for value in vars(view.state).values() if isinstance(value, Branch)]
            if any(branch.point is not None and branch.point.layers for branch in branches):
                raise UnsupportedPipelineError(
                    f"{name} reads the attention maps of each step, and a step cache leaves some out. Call "
                    "disable_cache() on the denoiser, or use a guidance that only perturbs: 'pag', 'seg', 'slg'."
                )

    def check(self, step: Step | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Let guidances refuse what does not fit the run, once: at its first denoiser call, before it is made."""
        checks = [(name, check) for name, view in self._views.items() for check in view.checks]
        for view in self._views.values():
            view.checks.clear()
        sample = self._space.blank(args, kwargs) if checks and step is not None and self._space is not None else None
        if self._space is not None:
            self._space.forget_prepared()
        if step is None or sample is None:
            return
        for name, check in checks:
            with annotated(name, "setup"), torch.no_grad(), torch.autocast(sample.device.type, enabled=False):
                check(self.view(name, dataclasses.replace(step, sample=sample)))

    def acting(self, step: Step) -> dict[str, Guidance]:
        """The guidances whose window holds the step."""
        return {name: guidance for name, guidance in self.guidances.items() if guidance.acts(step)}

    def view(self, name: str, step: Step) -> Step:
        """The step with this guidance's own state."""
        return dataclasses.replace(step, state=self._views[name].state, **self._decoding)

    def wanted(self, acting: Mapping[str, Guidance], step: Step) -> tuple[Branch, ...]:
        """Phase 2: the branches that they ask for, each once."""
        return wanted_branches(acting, {name: self.view(name, step) for name in acting})

    def points(self, acting: Mapping[str, Guidance], step: Step) -> tuple[Point, ...]:
        """The points of those branches that watch attention."""
        points = [branch.point for branch in self.wanted(acting, step) if branch.point is not None]
        return tuple(dict.fromkeys(point for point in points if point.layers))

    def delta(self, acting: Mapping[str, Guidance], step: Step, predictions: Predictions) -> torch.Tensor | None:
        """Phase 3: the sum of all deltas."""
        total: torch.Tensor | None = None
        for name, guidance in acting.items():
            if guidance.overrides("delta"):
                with annotated(name, "delta", step), only_read(name, "delta", predictions.values()):
                    delta = guidance.delta(self.view(name, step), predictions)
                    if delta is not None and step.own is not None:
                        _check_shape(delta, step.own)
                if delta is not None:
                    total = delta if total is None else total + delta
        return total

    def project(
        self, acting: Mapping[str, Guidance], step: Step, prediction: torch.Tensor, predictions: Predictions
    ) -> torch.Tensor:
        """Phase 4: the prediction, reshaped by each in turn."""
        for name, guidance in acting.items():
            if guidance.overrides("project"):
                given = (prediction, *predictions.values())
                with annotated(name, "project", step), only_read(name, "project", given):
                    projected = guidance.project(self.view(name, step), prediction, predictions)
                    _check_shape(projected, prediction)
                prediction = projected.to(prediction.dtype)
        return prediction

    def renoise(
        self, acting: Mapping[str, Guidance], step: Step, noise: torch.Tensor, predictions: Predictions
    ) -> torch.Tensor:
        """Phase 5: the noise that the scheduler adds back, chosen by each in turn."""
        for name, guidance in acting.items():
            if guidance.overrides("renoise"):
                with annotated(name, "renoise", step):
                    chosen = guidance.renoise(self.view(name, step), noise, predictions)
                    _check_shape(chosen, noise)
                noise = chosen.to(noise.dtype)
        return noise

    def repeats(self, acting: Mapping[str, Guidance], step: Step) -> int:
        """How often the step is evaluated."""
        return repeats_of(acting, {name: self.view(name, step) for name in acting})

    def after_step(self, acting: Mapping[str, Guidance], step: Step, following: torch.Tensor) -> torch.Tensor:
        """Phase 6: the next sample, edited by each in turn, in its own precision also under autocast."""
        for name, guidance in acting.items():
            if guidance.overrides("after_step"):
                with annotated(name, "after_step", step), torch.autocast(following.device.type, enabled=False):
                    edited = guidance.after_step(self.view(name, step), following)
                    _check_shape(edited, following)
                following = edited.to(following.dtype)
        return following


def _check_shape(returned: Any, like: torch.Tensor) -> None:
    """Refuse what would otherwise broadcast, or fail far from here."""
    if not isinstance(returned, torch.Tensor) or returned.shape != like.shape:
        what = (
            f"shape {tuple(returned.shape)}" if isinstance(returned, torch.Tensor) else f"a {type(returned).__name__}"
        )
        raise GuidanceRuntimeError(f"it returned {what}; needed: a tensor of shape {tuple(like.shape)}.")


def needs_level(guidance: Guidance) -> bool:
    """Whether a guidance cannot act without knowing alpha and sigma."""
    windowed = guidance.sigma_min > 0 or guidance.sigma_max != float("inf")
    editing = any(guidance.overrides(hook) for hook in ("guide_x0", "loss", "renoise"))
    return windowed or editing or "level" in guidance.needs


@contextmanager
def annotated(name: str, hook: str, step: Step | None = None) -> Iterator[None]:
    """Say in an exception which guidance, hook and step it came from."""
    try:
        yield
    except Exception as error:
        where = f"guidance {name!r}, hook {hook}" + (f", step {step.index} of {step.count}" if step is not None else "")
        if hasattr(error, "add_note"):
            error.add_note(where)
            raise
        raise GuidanceRuntimeError(f"{where}: {error}") from error
