"""`trimtab calibrate`: how far a classifier's confidence can be trusted along the trajectory.

Images of known classes are generated without guidance. At each step the classifier looks at the clean estimate, and its
confidence is compared with how often it names the class that was asked for:

    ECE = sum_b |B_b| / n * | accuracy(B_b) - confidence(B_b) |

over bins of equal width (Naeini et al., AAAI 2015). EluCD chooses the softplus with the lowest one, arXiv:2310.11311.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..guidance.errors import GuidanceRuntimeError, ParameterError
from ..guidance.networks import soften
from ..guidance.plugins.classifier import Classifier
from ..guidance.run import Run, Step
from ..guidance.targets import as_known, class_index

BINS = 15


class Probe(Classifier):
    """Looks at the clean estimate with several softplus betas, and guides nothing.

    Attributes:
        classes: that images are made of.
        seen: by beta and step, the probabilities `[batch, classes]` of each call.
        ratios: sigma / alpha of each step.
        indices: the classifier's, of the classes in turn; known after the first step's check.
    """

    classes: Sequence[int | str]
    seen: dict[float | None, dict[int, list[torch.Tensor]]]
    ratios: dict[int, float]
    indices: list[int]

    def resolve_targets(self, run: Run) -> None:
        known = [as_known(run.pipeline, one, run.state.names) for one in self.classes]
        run.state.classes = [class_index(one, run.state.names, self.label) for one in known]

    def check(self, step: Step) -> None:
        found = step.state.classes
        for index, one in zip(found, self.classes, strict=True):
            if index is None:
                raise ParameterError(f"calibrate: classes holds {one!r}, which stands for no class.")
        self.__dict__["indices"] = list(found)
        highest = max(range(len(found)), key=found.__getitem__)
        step.state.classes = [found[highest]]
        self.__dict__["target"] = self.classes[highest]  # which the message names if there is no such class
        self.see_blank(step)

    def loss(self, step: Step, x0: torch.Tensor) -> None:
        if step.evaluation > 0:  # of a level that the scheduler evaluates twice
            return
        image = step.decode(x0).clamp(-1, 1)
        self.ratios[step.index] = step.level.ratio
        for beta, seen in self.seen.items():
            with ExitStack() as stack, torch.no_grad():
                if beta is not None:
                    soften(stack, step.state.network, beta)
                logits = self.logits(step, image)
            if not torch.isfinite(logits).all():
                raise GuidanceRuntimeError(
                    f"calibrate: the classifier's logits are not finite at step {step.index} of {step.count}, "
                    f"{'with ReLU' if beta is None else f'with softplus {beta:g}'}."
                )
            seen.setdefault(step.index, []).append(logits.softmax(1))


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """The expected calibration error of probabilities `[n, classes]` for labels `[n]`."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).float()
    which = (confidence * bins).long().clamp_max(bins - 1)
    total = 0.0
    for index in range(bins):
        inside = which == index
        if inside.any():
            total += float(inside.float().mean() * (right[inside].mean() - confidence[inside].mean()).abs())
    return total


@dataclass(frozen=True)
class Row:
    """One step of the trajectory: sigma / alpha, and by beta the ECE, the accuracy and the mean confidence."""

    step: int
    ratio: float
    error: dict[float | None, float]
    accuracy: dict[float | None, float]
    confidence: dict[float | None, float]


def _check_classes(pipe: Any, classes: Sequence[int | str]) -> None:
    """Refuse what a pipeline that has names for its classes does not know."""
    if not hasattr(pipe, "class_label"):
        return
    for one in classes:
        try:
            pipe.class_label(one)
        except ValueError as error:
            raise ParameterError(f"calibrate: classes={list(classes)!r}: {error}") from None


def calibrate(
    pipe: Any, classifier: nn.Module | str, classes: Sequence[int | str], *, count: int = 100, steps: int = 25,
    betas: Sequence[float | None] = (None, 1.0, 3.0, 10.0), batch: int = 25, prompt: str = "a photo of a {}",
    **preprocessing: Any,
) -> list[Row]:  # fmt: skip
    """Generate `count` images of `classes` in turn, and compare.

    Args:
        pipe: a guidable pipeline that takes `class_labels` or `prompt`.
        classifier: as the plug-in of that name takes it.
        classes: names or indices of the pipeline; the classifier's are those of the same name, or else index.
        betas: of softplus; `None` leaves ReLU.
        prompt: for a pipeline that takes prompts, with the class in place of the braces.
        preprocessing: further parameters of the plug-in: `size`, `mean`, `std`, `unit_range`, `labels`.

    Raises:
        ParameterError: no classes, or some that the classifier or the pipeline does not know.
        GuidanceRuntimeError: the classifier gives numbers that are not finite.
    """
    if not classes or count < 1 or batch < 1:
        raise ParameterError(
            f"calibrate: classes={list(classes)!r}, count={count}, batch={batch}; allowed: at least one of each."
        )
    if not betas or any(beta is not None and not 0 < beta < math.inf for beta in betas):
        raise ParameterError(f"calibrate: betas={list(betas)!r}; allowed: numbers above 0, and None for ReLU.")
    taken = inspect.signature(type(pipe).__call__).parameters
    if "class_labels" not in taken and "prompt" not in taken:
        raise ParameterError(f"calibrate: {type(pipe).__name__} takes neither class_labels nor a prompt.")
    _check_classes(pipe, classes)
    probe = Probe(classifier=classifier, target=classes[0], beta=None, **preprocessing)
    probe.__dict__.update(classes=classes, seen={beta: {} for beta in betas}, ratios={}, indices=[])
    for first in range(0, count, batch):
        asked = [classes[index % len(classes)] for index in range(first, min(first + batch, count))]
        given = {"class_labels": asked} if "class_labels" in taken else {"prompt": [prompt.format(c) for c in asked]}
        generators = [torch.Generator().manual_seed(index) for index in range(first, first + len(asked))]
        with pipe.guidance(probe, name="calibrate"):
            pipe(**given, num_inference_steps=steps, generator=generators)
    wanted = torch.tensor([probe.indices[index % len(classes)] for index in range(count)])
    rows = []
    for index in sorted(next(iter(probe.seen.values()))):
        found = {beta: torch.cat(seen[index]).cpu() for beta, seen in probe.seen.items()}
        rows.append(Row(
            index,
            probe.ratios[index],
            {beta: calibration_error(p, wanted) for beta, p in found.items()},
            {beta: float((p.argmax(1) == wanted).float().mean()) for beta, p in found.items()},
            {beta: float(p.max(1).values.mean()) for beta, p in found.items()},
        ))  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text: for each step the noise, and for each beta ECE and accuracy; at the end the means."""
    betas = list(rows[0].error)
    names = ["ReLU" if beta is None else f"softplus {beta:g}" for beta in betas]
    lines = ["step  sigma/alpha  " + "  ".join(f"{name:>20}" for name in names)]
    for row in rows:
        cells = [f"ECE {row.error[beta]:.3f} acc {row.accuracy[beta]:.3f}" for beta in betas]
        lines.append(f"{row.step:4d}  {row.ratio:11.3g}  " + "  ".join(f"{cell:>20}" for cell in cells))
    means = {beta: sum(row.error[beta] for row in rows) / len(rows) for beta in betas}
    lines.append("mean ECE           " + "  ".join(f"{means[beta]:20.3f}" for beta in betas))
    best = min(betas, key=means.__getitem__)
    lines.append(f"lowest: {names[betas.index(best)]}, so classifier:beta={best}")
    return "\n".join(lines)
