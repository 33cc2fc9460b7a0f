"""What the guidance does to an image: something, nothing where it is off, and the same for every parametrisation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ...guidance.errors import ConflictError
from ...guidance.parameters import off_values
from ..parametrisations import PARAMETRISATIONS
from ..subject import HINT, ROUNDING, ExampleOf, Subject, percent, relative

EFFECT = 0.02
"""Share of what a guidance changes by which two ways to the same result may differ."""
PHASES_THAT_DO_NOT_COMMUTE = ("project", "guide_x0", "loss", "after_step", "renoise", "repeats")


def test_it_acts(subjects: Sequence[Subject]) -> None:
    """With its example parameters it changes the image of at least one pipeline."""
    refusals = []
    for subject in subjects:
        pipe = subject.stock()
        stock = subject.run(pipe)
        try:
            subject.attach(pipe)
            guided = subject.run(pipe)
        except pytest.skip.Exception as refusal:
            refusals.append(str(refusal))
            continue
        if not torch.isfinite(guided).all():
            subject.fail("to be finite", "its image holds infinities or NaNs.", "Look for a division by zero.")
        if relative(guided - stock, stock) > 1e-5:
            return
    reasons = "\n".join(refusals) or "it changed no image."
    subjects[0].fail("to act", f"on none of {len(subjects)} pipelines did it do anything:\n{reasons}", HINT)


def test_off_it_is_the_identity(subject: Subject) -> None:
    """At the values that switch it off, the image is that of the pipeline, whose own CFG is off, without it."""
    subject.skip_if_exempt("identity")
    off = off_values(subject.cls)
    if not off:
        subject.fail(
            "scale-0 identity",
            "it declares no value that switches it off.",
            'Declare one: scale: float = parameter(1.0, "...", ge=0, off=0.0). Where there is none by its formula, say '
            "so: Example(exempt={'identity': 'why'}).",
        )
    pipe = subject.stock()
    stock = subject.run(pipe, **subject.stage.without_cfg)
    subject.attach(pipe, **off)
    apart = relative(subject.run(pipe, **subject.stage.without_cfg) - stock, stock)
    if not apart <= ROUNDING:
        values = ", ".join(f"{name}={value!r}" for name, value in off.items())
        subject.fail(
            "scale-0 identity",
            f"at {values} the image differs from the stock one by {percent(apart)}.",
            "Return None from delta (and no branches), or the argument itself from the other hooks, at this "
            "value; or declare with parameter(..., off=...) which value does nothing.",
        )
    plain = subject.stock()
    paid, due = (subject.plan(one, **subject.stage.without_cfg).evaluations for one in (pipe, plain))
    if paid > due:
        subject.fail(
            "scale-0 identity",
            f"where it is off it costs {paid} evaluations an image, and the pipeline by itself {due}.",
            "Return no branches at the value that switches it off.",
        )


def test_all_parametrisations_lead_to_one_image(plugin: str, example_of: ExampleOf) -> None:
    """One model as noise, velocity, sample and flow prediction, at equal noise levels, makes one image."""
    first = Subject(plugin, PARAMETRISATIONS[0], example_of)
    first.skip_if_exempt("agreement")
    stock, expected = first.run(first.stock()), first.run(first.guided())
    allowed = ROUNDING * expected.norm() + EFFECT * (expected - stock).norm()
    for stage in PARAMETRISATIONS[1:]:
        other = Subject(plugin, stage, example_of)
        apart = (other.run(other.guided()) - expected).norm()
        if not apart <= allowed:
            other.fail(
                "epsilon/v/flow agreement",
                f"its image differs by {percent(float(apart / expected.norm()))} from that of noise prediction.",
                "Scale differences of predictions only by numbers, which means the same for all; for anything "
                "else work on the clean estimate (guide_x0, loss), or use step.level: x_t = alpha x_0 + "
                "sigma n. A formula that is defined on the raw prediction is exempt: "
                "Example(exempt={'agreement': 'why'}).",
            )


def test_it_composes_with_cfg(subject: Subject) -> None:
    """Beside `cfg` it costs what is declared; if it only adds a delta, the order does not matter."""
    subject.skip_if_exempt("composition")
    pipe = subject.guided()
    if subject.cls.exclusive == "cfg":
        pipe.guidances[subject.name].validate()
        with pytest.raises(ConflictError) as conflict:
            pipe.add_guidance("cfg", name="cfg of the kit")
        if subject.name not in str(conflict.value):
            subject.fail("a clear conflict", f"the error does not name it: {conflict.value}", "Set name on its class.")
        return
    pipe.add_guidance("cfg", scale=3.0)
    first = subject.run_as_declared(pipe)
    if not torch.isfinite(first).all():
        subject.fail("composition with cfg", "the image holds infinities or NaNs.", "See what it does to a large sum.")
    if any(subject.cls.overrides(hook) for hook in PHASES_THAT_DO_NOT_COMMUTE if hasattr(subject.cls, hook)):
        return
    other = subject.stock()
    other.add_guidance("cfg", scale=3.0)
    subject.attach(other)
    apart = relative(subject.run(other) - first, first)
    if not apart <= ROUNDING:
        subject.fail(
            "composition with cfg",
            f"attached before and after cfg, the images differ by {percent(apart)}.",
            "A delta is added to the pipeline's prediction: compute it from predictions alone, without "
            "step.own, which holds the sum of nothing but the pipeline's own.",
        )


def test_half_precision(subject: Subject) -> None:
    """In bfloat16 it runs, keeps the type, and makes about the image of float32."""
    subject.skip_if_exempt("precision")
    expected = subject.run(subject.guided())
    pipe = subject.stock(torch.bfloat16)
    subject.attach(pipe)
    image = subject.run(pipe)
    if image.dtype != torch.bfloat16 or not torch.isfinite(image).all():
        subject.fail(
            "dtype",
            f"in bfloat16 the image is {image.dtype}, finite: {bool(torch.isfinite(image).all())}.",
            "Compute in float32 where you must, and return the dtype that you were given.",
        )
    apart = relative(image.float() - expected, expected)
    if not apart <= 0.2:
        subject.fail(
            "dtype",
            f"in bfloat16 the image differs by {percent(apart)} from that of float32.",
            "Differences of large numbers lose their digits: compute them in float32.",
        )
