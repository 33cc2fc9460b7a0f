"""How the guidance behaves in a run: it undoes, repeats and costs what it should, and comes back from a recipe."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

from ...guidance.base import Guidance
from ...guidance.errors import GuidanceRuntimeError, ParameterError, RecipeError
from ...guidance.parameters import fields_of
from .. import strategies
from ..fingerprint import of_class
from ..stages import living_tensors, moves_generators
from ..subject import ROUNDING, Subject, changes, percent, relative, state_of


def test_it_undoes_what_it_did(subject: Subject) -> None:
    """After a run and `remove_guidance` the pipeline is a stock one: every object, and the image bit for bit."""
    pipe = subject.stock()
    stock = subject.run(pipe)
    guidance = subject.attach(pipe)
    pipe.clear_guidance()
    subject.run(pipe)
    before = state_of(pipe, guidance)
    pipe.add_guidance(guidance)
    subject.run(pipe)
    pipe.clear_guidance()
    _expect_stock(subject, "clean undo", "after a run", pipe, guidance, stock, before)


def test_it_undoes_what_it_did_when_a_run_fails(subject: Subject) -> None:
    """So it is where something raised in the middle of the run."""

    class Interruption(Exception):
        pass

    def interrupt(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise Interruption

    pipe = subject.stock()
    stock = subject.run(pipe)
    guidance = subject.attach(pipe)
    pipe.clear_guidance()
    subject.run(pipe)
    before = state_of(pipe, guidance)
    pipe.add_guidance(guidance)
    with pytest.raises(Interruption):
        subject.run(pipe, callback_on_step_end=interrupt)
    pipe.clear_guidance()
    _expect_stock(subject, "clean undo", "after a run that failed", pipe, guidance, stock, before)


def _expect_stock(
    subject: Subject, check: str, when: str, pipe: Any, guidance: Any, stock: torch.Tensor, before: dict[str, str]
) -> None:
    again = subject.run(pipe)
    if found := changes(before, state_of(pipe, guidance)):
        subject.fail(
            check,
            f"{when}, something is not as it was:\n{found}",
            "Undo what you install on every path: run.exit_stack.callback(handle.remove) in setup(run). Keep "
            "what you compute in run.state, not on the plug-in or in globals.",
        )
    if not torch.equal(again, stock):
        subject.fail(
            check,
            f"{when}, without it attached, the image is not the stock one bit for bit.",
            "Something outside of the pipeline still changes it: a patched function, a cache, a thread.",
        )


def test_it_remembers_no_run(subjects: Sequence[Subject], memory: dict[str, str]) -> None:
    """What its module and its class hold is what they held before its first run, and so is every later run."""
    subjects[0].skip_if_exempt("memory")
    for subject in subjects:
        with contextlib.suppress(pytest.skip.Exception):
            subject.run(subject.guided())
    if found := changes(memory, of_class(subjects[0].cls, Guidance)):
        subjects[0].fail(
            "clean undo",
            f"runs have left something for the next ones:\n{found}",
            "Keep what you compute in run.state, which is new in each run; not in globals or on the class. Where it is "
            "what no run changes, such as a loaded network, say so: Example(exempt={'memory': 'why'}).",
        )


def test_it_leaves_no_tensors(subject: Subject) -> None:
    """A second run leaves as many tensors alive as the first: else memory runs out after some hundreds of images."""
    pipe = subject.guided()
    subject.run(pipe)
    before = living_tensors()
    subject.run(pipe)
    if (left := living_tensors() - before) > 0:
        subject.fail(
            "clean undo",
            f"a run left {left} tensors alive that the run before it had not.",
            "Keep tensors in run.state, which goes with its run. A saved_tensors_hooks that returns what it is given "
            "keeps a whole gradient graph alive; return tensor.detach().",
        )


def test_it_is_deterministic(subject: Subject) -> None:
    """The same seed gives the same image bit for bit, in a second run too and whatever the global generators hold."""
    pipe = subject.guided()
    first, second = subject.run(pipe, ambient=1), subject.run(pipe, ambient=2)
    if not torch.equal(first, second):
        subject.fail(
            "determinism",
            f"two runs with one seed differ by {percent(relative(first - second, first))}.",
            "Draw noise from a generator of your own, made in setup(run) from a seed: "
            "run.state.generator = torch.Generator().manual_seed(self.seed); never from the global one. "
            "Keep what you compute in run.state, so that a second run begins afresh.",
        )
    if moves_generators(pipe, subject.stage) and not moves_generators(subject.stock(), subject.stage):
        subject.fail(
            "determinism",
            "it draws from a global random generator, or seeds one: whatever its user draws next is another number.",
            "Draw noise from a generator of your own: run.state.generator = torch.Generator().manual_seed(self.seed).",
        )


@pytest.mark.parametrize("rows", ["batched", "sequential"])
def test_batched_equals_sequential(subject: Subject, rows: str) -> None:
    """The result does not depend on how its branches are computed."""
    pipe = subject.guided()
    expected = subject.run(pipe)
    pipe.guidance_rows = rows
    apart = relative(subject.run(pipe) - expected, expected)
    if not apart <= ROUNDING:
        subject.fail(
            f"equality of guidance_rows='auto' and {rows!r}",
            f"the images differ by {percent(apart)}.",
            "A perturbation must treat each row by itself: no statistics over the batch, no fixed row "
            "numbers, no state that counts calls.",
        )


def test_an_image_does_not_depend_on_its_batch(subject: Subject) -> None:
    """Of two images made in one call, each is the one that its own call makes."""
    subject.skip_if_exempt("batch")
    pipe = subject.guided()
    together = subject.run(pipe, seeds=(3, 4))
    for image, seed in zip(together, (3, 4), strict=True):
        alone = subject.run(pipe, seeds=(seed,))[0]
        apart = relative(image - alone, alone)
        if not apart <= ROUNDING:
            subject.fail(
                "independence of the batch",
                f"image {seed} in a batch of two differs by {percent(apart)} from the same image made alone.",
                "Take means, norms and losses over each image, dim=tuple(range(1, x.ndim)), not over the "
                "batch; loss returns one number an image.",
            )


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one", "two"])
def test_declared_evaluations_are_those_computed(subject: Subject, seeds: tuple[int, ...]) -> None:
    """What `explain_guidance` announces is what the denoiser computes, counted at its own `forward`."""
    pipe = subject.guided()
    subject.run_as_declared(pipe, seeds)
    subject.run_as_declared(pipe, seeds, **subject.stage.without_cfg)


def test_it_comes_back_from_a_recipe(subject: Subject, tmp_path: Path) -> None:
    """Saved and loaded elsewhere, it makes the same image; parameters that cannot be saved are refused by name."""
    pipe = subject.guided()
    expected = subject.run(pipe)
    try:
        pipe.save_guidance(tmp_path)
    except RecipeError as error:
        if any(name in str(error) for name in fields_of(subject.cls)):
            pytest.skip(f"{subject.name} cannot be saved, and says so: {error}")
        raise
    other = subject.stock()
    other.load_guidance(tmp_path)
    if not torch.equal(subject.run(other), expected):
        recipe = json.dumps(json.loads((tmp_path / "guidance.json").read_text())["guidances"], indent=2)
        subject.fail(
            "save and load",
            f"loaded from its recipe it makes another image:\n{recipe}",
            "All that it does must follow from its parameters.",
        )


def test_its_whole_declared_range_works(subject: Subject) -> None:
    """Drawn from the declared ranges, parameters give finite, repeatable images at the declared cost."""
    pipe = subject.stock()
    pinned = subject.example(pipe).parameters
    subject.attach(pipe)

    @settings(
        max_examples=5,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.parameters(subject.cls, keep=pinned))
    def keeps(drawn: dict[str, Any]) -> None:
        pipe.clear_guidance()
        try:
            pipe.add_guidance(subject.name, **{**pinned, **drawn})
        except ParameterError:
            assume(False)  # values that are allowed each for itself, but not together
        try:
            image = subject.run_as_declared(pipe)
        except GuidanceRuntimeError as error:
            subject.fail("its declared ranges", f"at {drawn} it raises: {error}", "Narrow them with ge= and le=.")
        if not torch.isfinite(image).all():
            subject.fail("its declared ranges", f"the image is not finite at {drawn}.", "Narrow them with ge= and le=.")
        if not torch.equal(subject.run(pipe, ambient=1), image):
            subject.fail("determinism", f"two runs differ at {drawn}.", "Draw noise from a generator of your own.")

    keeps()
