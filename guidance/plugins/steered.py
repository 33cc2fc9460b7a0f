"""Steered diffusion: measurements and losses that the clean estimate must satisfy."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..errors import GuidanceRuntimeError, ParameterError
from ..gradient import GradientGuidance, check_each
from ..images import Given, as_images, for_rows
from ..losses import Term, check_target, name_of
from ..measured import check_numbers, check_sizes, check_task, known_pixels, measurement
from ..networks import borrow
from ..operators import LinearOperator, check_operator, inpainting, luminance, resampling
from ..parameters import parameter
from ..run import Run, Step

Task = Literal["inpainting", "super_resolution", "colourisation"]


@dataclass
class Steered(GradientGuidance):
    """Steers the clean estimate to what is known of the image; the noise is derived anew from it.

    A linear measurement `y = A x` with right inverse B is satisfied exactly, by a projection:

    $$ \\hat x_0 \\leftarrow \\hat x_0 + B\\,(y - A\\hat x_0) $$

    `"inpainting"` keeps the pixels outside the mask, `"super_resolution"` what is left at the size of `image` (any
    factor, bicubic), `"colourisation"` the luminance; any other is a `LinearOperator`. Other conditions are losses,
    each with its own weight and window, summed, and followed through the denoiser:

    $$ \\hat x_0 \\leftarrow \\hat x_0 - \\sqrt{1-\\bar\\alpha_t}\\,\\nabla_{x_t}\\sum_k w_k L_k(\\hat x_0(x_t)) $$

    with x_t at unit variance, so that it means the same on every scheduler. Nair et al., "Steered Diffusion", ICCV
    2023, arXiv:2310.00224. (The paper takes `\\bar\\alpha` of the level before.) Losses act before the measurement,
    which is exact therefore. Of several measurements in one stack the last that is attached is exact, those before it
    are where it leaves them. With `recurrence` a step is evaluated several times.

    Latents are projected as images: decoded, projected, encoded. `latent="encode"` adds `E(P(D(z))) - E(D(z))`, so that
    what the autoencoder loses is not taken for a change; `"gradient"` descends `|y - A D(z)|^2` by `latent_steps` steps
    of Polyak's length, none of which may lead away, and needs no encoder. Neither is exact: the autoencoder decides how
    near it comes. Measured on images of 64x64: five such steps come about as near as encoding at 3.4 times the time;
    twenty come nearer where the measurement is small.

    Cost: a projection costs no evaluation (in latents a decoding and two encodings); losses a backward pass through
    the denoiser, about two evaluations.
    """

    name: ClassVar[str] = "steered"
    after: ClassVar[tuple[str, ...]] = ("tfg",)  # whose edit of the clean estimate would move what was measured

    task: Task | None = parameter(None, "A measurement by name.")
    image: Given = parameter(
        None, "The measurement: PIL image, path, or tensor in -1..1, or one for each; small, or grey, as the task says."
    )
    mask: Given = parameter(None, "For inpainting: white (1) where the image is painted anew, as in Diffusers.")
    operator: LinearOperator | None = parameter(None, "Another measurement, whose result is `image`.")
    losses: tuple[Any, ...] = parameter((), "Functions of images in -1..1 that return `[batch]`, or Terms of these.")
    scale: float = parameter(
        1.0, "Share of the projection, up to 1, and factor of the losses; 0 switches it off.", ge=0, off=0.0
    )
    recurrence: int = parameter(1, "Evaluations of each step.", ge=1)
    latent: Literal["encode", "gradient"] = parameter("encode", "How latents are projected.")
    latent_steps: int = parameter(5, "Gradient steps of latent='gradient'.", ge=1)

    def validate(self) -> None:
        super().validate()
        measured = self.task is not None or self.operator is not None
        if not measured and not self.losses:
            raise ParameterError("steered: nothing to steer to; give a task, an operator, or losses.")
        if self.task is not None and self.operator is not None:
            raise ParameterError("steered: task and operator are both given; allowed: one of them.")
        for name in ("image", "mask"):
            if getattr(self, name) is not None and not (self.task == "inpainting" if name == "mask" else measured):
                needs = "task='inpainting'" if name == "mask" else "a task or an operator that says what was measured"
                raise ParameterError(f"steered: {name} is given without {needs}.")
        if measured and self.image is None:
            raise ParameterError(f"steered: image is missing; task={self.task!r} needs what was measured.")
        if self.task == "inpainting" and self.mask is None:
            raise ParameterError("steered: mask is missing; give an image that is white where it is painted anew.")
        for loss in self.losses:
            if not callable(loss) and not isinstance(loss, Term):
                raise ParameterError(
                    f"steered: losses holds {loss!r}; allowed: functions of images, and Terms of these."
                )

    def setup(self, run: Run) -> None:
        state = run.state
        state.terms = [loss if isinstance(loss, Term) else Term(loss) for loss in self.losses]
        state.operator = state.measured = None
        if self.operator is not None:
            state.measured = as_images(self.image, self.label, "image")
        elif self.task is not None:
            state.measured = measurement(self.image, self.task == "colourisation", self.label)
        if self.task == "colourisation" and state.measured.shape[1] != 1:
            state.measured = luminance().forward(state.measured)
        if self.task == "inpainting":
            state.known = known_pixels(self.mask, self.label)
            check_sizes(state.known, state.measured, self.label)
        if self.scale > 0:
            run.check_step(lambda step: self._check(run, step))
        if not run.dry:
            for term in state.terms:
                network = getattr(term.loss, "network", term.loss)
                if isinstance(network, nn.Module):
                    borrow(run.exit_stack, network)

    # -- losses ----------------------------------------------------------------------------------------------------
    def acting_terms(self, step: Step) -> list[Term]:
        """The losses whose window holds the step."""
        position = step.index / step.count
        return [term for term in step.state.terms if term.weight and term.start <= position < term.stop]

    def with_respect_to(self, step: Step) -> str:
        return "x_t" if self.scale > 0 and self.acting_terms(step) else "x0"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor | None:
        terms = self.acting_terms(step)
        if self.scale == 0 or not terms:
            return None
        image = step.decode(x0)
        values = [check_each(term.loss(image), image, f"{self.label}: {name_of(term)}") for term in terms]
        total = torch.stack([term.weight * value for term, value in zip(terms, values, strict=True)]).sum(0)
        # sqrt(1 - abar) times the gradient with respect to the sample at unit variance.
        return self.scale * step.level.sigma * total

    def repeats(self, step: Step) -> int:
        return self.recurrence if self.scale > 0 else 1

    # -- the measurement -------------------------------------------------------------------------------------------
    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        if self.scale == 0 or step.state.measured is None:
            return x0
        share = min(self.scale, 1.0)  # beyond the projection the measurement is as wrong as before it
        if step.in_pixels:
            projected = self._projected(step, x0)
            return projected if share == 1 else x0 + share * (projected - x0)
        if self.latent == "gradient":
            return x0 + share * (self._descended(step, x0) - x0)
        image = step.decode(x0)
        return x0 + share * (step.encode(self._projected(step, image)) - step.encode(image))

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        # The last step of a scheduler rounds, and may add a little noise; and the pipeline clips what it returns.
        if self.scale < 1 or step.state.measured is None or step.next_level.sigma > 0 or not step.in_pixels:
            return sample
        image = sample.float()
        return self._operator(step.state, image).project_within(image, step.state.measured).to(sample.dtype)

    def _projected(self, step: Step, image: torch.Tensor) -> torch.Tensor:
        projected = self._operator(step.state, image).project(image, step.state.measured)
        if projected.shape != image.shape:
            raise GuidanceRuntimeError(
                f"steered: image {list(step.state.measured.shape)} does not fit the pipeline's {list(image.shape)}."
            )
        return projected

    def _descended(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        """Latents at which the decoded image comes nearer to the measurement, or those given if no step does."""
        best = at = x0
        least = x0.new_full((len(x0), *[1] * (x0.ndim - 1)), torch.inf)
        factor, gradient = torch.ones_like(least), torch.zeros_like(x0)
        for turn in range(self.latent_steps + 1):
            ends = turn == self.latent_steps
            with torch.set_grad_enabled(not ends):
                leaf = at.detach().requires_grad_(not ends)
                half = self._misfit(step, leaf)
            nearer = half.detach().view_as(least) < least
            best, least = torch.where(nearer, at, best), torch.where(nearer, half.detach().view_as(least), least)
            if ends:
                break
            gradient = torch.where(nearer, torch.autograd.grad(half, leaf, torch.ones_like(half))[0], gradient)
            # Where a step led away, half of it is tried.
            factor = torch.where(nearer, factor, factor / 2)
            length = least / gradient.square().flatten(1).sum(1).clamp_min(1e-20).view_as(least)
            at = best - factor * length * gradient
        return best

    def _misfit(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        """`|y - A D(z)|^2 / 2` of each image."""
        image = step.decode(x0)
        residual = self._operator(step.state, image).forward(image) - step.state.measured
        return residual.square().flatten(1).sum(1) / 2

    def _operator(self, state: SimpleNamespace, image: torch.Tensor) -> LinearOperator:
        """The measurement of images of this size; made at the first."""
        if state.operator is None:
            state.measured = for_rows(state.measured.to(image.device, torch.float32), len(image))
            if self.operator is not None:
                state.operator = self.operator
            elif self.task == "inpainting":
                state.operator = inpainting(for_rows(state.known.to(image.device), len(image)))
            elif self.task == "super_resolution":
                (height, width), (low, narrow) = image.shape[-2:], state.measured.shape[-2:]
                state.operator = resampling((height, width), (low, narrow))
            else:
                state.operator = luminance()
        found: LinearOperator = state.operator
        return found

    # -- what does not fit -----------------------------------------------------------------------------------------
    def _check(self, run: Run, step: Step) -> None:
        """Refuse an image that is no measurement of the run's images, and losses whose target does not fit them."""
        assert step.sample is not None
        blank = step.decode(step.sample)
        for index, term in enumerate(run.state.terms):
            check_target(term.loss, blank, f"steered: losses[{index}]")
        given = run.state.measured
        if given is None:
            return
        masked = self.task == "inpainting"
        check_numbers({"image": given, **({"mask": run.state.known} if masked else {})}, len(blank), self.label)
        if self.operator is not None:
            check_operator(self.operator, blank[:1], given, self.label)
        elif self.task is not None:
            check_task(self.task, given, masked, blank, run.arguments, self.label)
