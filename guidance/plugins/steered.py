"""Steered diffusion: measurements and losses that the clean estimate must satisfy."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..errors import GuidanceRuntimeError, ParameterError
from ..gradient import GradientGuidance
from ..images import Given, as_images, for_rows
from ..losses import Term, check_target
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
    which is exact therefore. With `recurrence` a step is evaluated several times.

    Latents are projected as images: decoded, projected, encoded. `latent="encode"` adds `E(P(D(z))) - E(D(z))`, so that
    what the autoencoder loses is not taken for a change; `"gradient"` descends `|y - A D(z)|^2` by `latent_steps` steps
    of Polyak's length, which needs no encoder. Neither is exact: the autoencoder decides how near it comes. Measured on
    images of 64x64: five such steps come about as near as encoding at 2.6 times the time; twenty come nearer where the
    measurement is small.

    Cost: a projection costs no evaluation (in latents a decoding and two encodings); losses a backward pass through
    the denoiser, about two evaluations.
    """

    name: ClassVar[str] = "steered"

    task: Task | None = parameter(None, "A measurement by name.")
    image: Given = parameter(
        None, "The measurement: PIL image, path, or tensor in -1..1, or one for each; small, or grey, as the task says."
    )
    mask: Given = parameter(None, "For inpainting: white (1) where the image is painted anew, as in Diffusers.")
    operator: LinearOperator | None = parameter(None, "Another measurement, whose result is `image`.")
    losses: tuple[Any, ...] = parameter((), "Functions of images in -1..1 that return `[batch]`, or Terms of these.")
    scale: float = parameter(
        1.0, "Share of the projection, and factor of the losses; 0 switches it off.", ge=0, off=0.0
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
        if self.image is not None:
            mode = "L" if self.task == "colourisation" else None
            state.measured = as_images(self.image, self.label, "image", mode)
            if self.task == "colourisation" and state.measured.shape[1] != 1:
                state.measured = luminance().forward(state.measured)
        if self.task == "inpainting":
            state.known = self._known()
            if state.known.shape[-2:] != state.measured.shape[-2:]:
                raise ParameterError(
                    f"steered: mask is {_size(state.known)}, but image is {_size(state.measured)}; needed: one size."
                )
        if self.scale > 0:
            run.check_step(lambda step: self._check(run, step))
        if not run.dry:
            for term in state.terms:
                network = getattr(term.loss, "network", term.loss)
                if isinstance(network, nn.Module):
                    borrow(run.exit_stack, network)

    def _known(self) -> torch.Tensor:
        mask = as_images(self.mask, self.label, "mask", "L")
        return mask[:, :1] <= (0.5 if _is_tensor(self.mask) else 0.0)

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
        total = torch.stack([term.weight * term.loss(image) for term in terms]).sum(0)
        # sqrt(1 - abar) times the gradient with respect to the sample at unit variance.
        return self.scale * step.level.sigma * total

    def repeats(self, step: Step) -> int:
        return self.recurrence if self.scale > 0 else 1

    # -- the measurement -------------------------------------------------------------------------------------------
    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        if self.scale == 0 or step.state.measured is None:
            return x0
        if step.in_pixels:
            projected = self._projected(step, x0)
            return projected if self.scale == 1 else x0 + self.scale * (projected - x0)
        if self.latent == "gradient":
            return x0 + self.scale * (self._descended(step, x0) - x0)
        image = step.decode(x0)
        return x0 + self.scale * (step.encode(self._projected(step, image)) - step.encode(image))

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        # The last step of a scheduler rounds, and may add a little noise; and the pipeline clips what it returns.
        if self.scale != 1 or step.state.measured is None or step.next_level.sigma > 0 or not step.in_pixels:
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
        """Latents at which the decoded image comes nearer to the measurement."""
        for _ in range(self.latent_steps):
            with torch.enable_grad():
                leaf = x0.detach().requires_grad_(True)
                image = step.decode(leaf)
                residual = self._operator(step.state, image).forward(image) - step.state.measured
                half = residual.square().flatten(1).sum(1) / 2
            gradient = torch.autograd.grad(half, leaf, torch.ones_like(half))[0]
            length = half.detach() / gradient.square().flatten(1).sum(1).clamp_min(1e-20)
            x0 = x0 - length.view(-1, *[1] * (x0.ndim - 1)) * gradient
        return x0

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
        if run.state.measured is not None:
            self._check_measured(run, blank)

    def _check_measured(self, run: Run, blank: torch.Tensor) -> None:
        given = run.state.measured
        for name, held in {"image": given, "mask": getattr(run.state, "known", given)}.items():
            if len(blank) % len(held):
                raise ParameterError(
                    f"steered: {name} holds {len(held)} images, but the denoiser is called with {len(blank)} rows; "
                    "give one, or one for each image that is made."
                )
        if self.operator is not None:
            check_operator(self.operator, blank[:1], given, "steered")
            return
        if blank.ndim == 5:
            raise ParameterError(
                f"steered: task={self.task!r} measures images, but the pipeline makes videos of {blank.shape[2]} "
                "frames; give an operator that takes [batch, channels, frames, height, width]."
            )
        channels, height, width = blank.shape[1:]
        if self.task == "colourisation" and channels != 3:
            raise ParameterError(
                f"steered: task='colourisation' needs a pipeline of colour images; this one's have {channels} channel."
            )
        if self.task != "colourisation" and given.shape[1] != channels:
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            raise ParameterError(
                f"steered: image has {given.shape[1]} channels, but the pipeline's images have {channels}; convert it: "
                f"image.convert({mode!r})."
            )
        small = self.task == "super_resolution"
        fits = (
            (given.shape[-2] <= height and given.shape[-1] <= width) if small else given.shape[-2:] == blank.shape[-2:]
        )
        if fits:
            return
        what = "image is" if self.mask is None or small else "image and mask are"
        call = ", or call the pipeline with height={} and width={}".format(*given.shape[-2:])
        raise ParameterError(
            f"steered: {what} {_size(given)}, but the pipeline makes {_size(blank)}; needed: "
            f"{'at most ' if small else ''}that size, such as image.resize(({width}, {height}))"
            f"{call if 'height' in run.arguments else ''}."
        )


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]} pixels"


def _is_tensor(value: Any) -> bool:
    """Whether masks are given as tensors, of 0 and 1, and not as pictures."""
    return isinstance(value[0] if isinstance(value, (list, tuple)) else value, torch.Tensor)
