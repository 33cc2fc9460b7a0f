"""Classifier guidance, on the clean estimate (EluCD) or on the noisy sample."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from .. import networks
from ..errors import GuidanceRuntimeError, ParameterError
from ..gradient import GradientGuidance, in_pairs, rank_of_level, rms, share_of_next, signal_share
from ..image_processor import of_processor
from ..images import Preprocessing
from ..parameters import parameter
from ..pins import check_listing, commit, listing_sha256
from ..run import Run, Step
from ..targets import Target, class_index, labels_of_call


@dataclass
class Classifier(GradientGuidance):
    """Guidance by the gradient of a classifier's log-probability, towards classes named for each image.

    $$ \\ell = \\tau_1 f_y - \\log\\sum_i \\exp(\\tau_2 f_i) $$

    `estimate="x0"`, for any classifier of clean images: EluCD, Ma et al., "Elucidating the Design Space of
    Classifier-Guided Diffusion Generation", ICLR 2024, arXiv:2310.11311. The gradient is taken at the clean estimate,
    clipped to -1..1, as if it were one at x_t, and no backward pass goes through the denoiser; ReLU becomes
    `Softplus(beta)`, for a smooth gradient; the temperatures weigh joint against conditional probability; the mean
    of the next sample moves by $(\\beta_t + \\gamma v_{max}\\sin(\\pi t/T))\\,\\nabla\\ell$, with `\\beta_t` the
    variance of the step and `v_max` its largest yet. That is, with `\\bar\\alpha` the signal's share of the variance,

    $$ \\hat x_0 \\leftarrow \\hat x_0 + s\\,\\frac{1-\\bar\\alpha_t}{\\sqrt{\\bar\\alpha_s}}
       \\Bigl(1 + \\gamma\\,\\frac{v_{max}}{\\beta_t}\\sin\\frac{\\pi t}{T}\\Bigr)\\nabla_{\\hat x_0}\\ell $$

    `estimate="x_t"`, for a classifier of noisy samples (one that takes `timestep` is given it; latents stay latents):
    Dhariwal & Nichol, arXiv:2105.05233. With the exact gradient it samples the exact conditional distribution:

    $$ \\hat x_0 \\leftarrow \\hat x_0 + s\\,\\frac{\\sigma_t^2}{\\alpha_t}\\,\\nabla_{x_t}\\ell $$

    `estimate="edm"`, EluCD for samplers of EDM: the classifier sees x_t at unit root mean square, and the next sample
    moves by its gradient, normed to the root mean square of that sample, times
    $w_i = m ((N + 1 - i)/(N + 1) + a \\sin(\\pi i/N))$. The noise that the sampler starts from is not moved.

    Cost: no evaluation of the denoiser; the classifier's forward and backward pass, and the decoding, once a step.
    """

    name: ClassVar[str] = "classifier"

    scale: float = parameter(1.0, "Strength s; 0 switches it off.", ge=0, off=0.0)
    classifier: nn.Module | str | None = parameter(
        None, "A module that returns logits `[batch, classes]`, or a folder or repository of a transformers classifier."
    )
    target: int | str | tuple[Target, ...] | None = parameter(
        None, "Class by index or name, or one for each image, None for no guidance; by default the call's class_labels."
    )
    labels: tuple[str, ...] = parameter((), "Names of the classes; by default the checkpoint's.")
    estimate: Literal["x0", "x_t", "edm"] = parameter("x0", "What the classifier sees.")
    beta: float | None = parameter(
        3.0, "Of Softplus in place of ReLU, unless at x_t; None keeps ReLU. The paper takes 3, and 5 for 'edm'.", ge=0
    )
    tau1: float = parameter(1.0, "Temperature of the joint term.", ge=0)
    tau2: float | None = parameter(
        None, "Temperature of the marginal one; by default 0.5 at x0, 1 at x_t, 0 for 'edm'.", ge=0
    )
    gamma: float = parameter(0.3, "Share of the sine schedule.", ge=0)
    max_guidance: float = parameter(0.004, "m, of 'edm'.", ge=0)
    added: float = parameter(0.3, "a, of 'edm'.", ge=0)
    size: int | tuple[int, int] | None = parameter(
        None, "What the classifier's images are resized to; by default as its processor says, or not at all.", ge=1
    )
    unit_range: bool | None = parameter(
        None, "Whether it expects 0..1 and not -1..1; by default as its processor says, or -1..1."
    )
    mean: tuple[float, ...] | None = parameter(None, "Mean of its images; by default its processor's, or none.")
    std: tuple[float, ...] | None = parameter(None, "Standard deviation; by default its processor's, or none.")
    revision: str | None = parameter(None, "Branch, tag or commit of the repository.")
    files_sha256: str | None = parameter(None, "What the listing of a folder's files must hash to; recipes note it.")

    def validate(self) -> None:
        super().validate()
        if self.classifier is None:
            raise ParameterError(
                f"{self.label}: classifier is missing; give a torch.nn.Module that returns logits, or a folder or "
                "repository of a transformers image classifier."
            )
        if self.target == ():
            raise ParameterError(f"{self.label}: target=() names no class; allowed: a class, or one for each image.")
        if self.beta == 0:
            raise ParameterError(f"{self.label}: beta=0 is no softplus; allowed: > 0, or None for ReLU.")
        if self.std is not None and min(self.std, default=0) <= 0:
            raise ParameterError(f"{self.label}: std={self.std!r}; allowed: a number above 0 for each channel.")
        if self.estimate == "edm" and self.grad_norm != "none":
            raise ParameterError(
                f"{self.label}: grad_norm={self.grad_norm!r} with estimate='edm', which norms the gradient by itself; "
                "allowed: 'none', and max_guidance for its size."
            )

    def pinned(self) -> Self:
        named = self.classifier if isinstance(self.classifier, str) else None
        found = self.files_sha256 or listing_sha256(named)
        return replace(self, revision=commit(named, self.revision), files_sha256=found)

    def setup(self, run: Run) -> None:
        state = run.state
        state.largest = 0.0
        assert self.classifier is not None
        network, processor = self.classifier, None
        if isinstance(network, str):
            if run.dry:
                return
            check_listing(network, self.files_sha256, self.label)
            network, processor = networks.load_network(network, self.revision, self.label, self.does)
        self._use(run, network, processor)
        self.resolve_targets(run)
        if self.scale > 0:
            run.check_step(self.check)

    @property
    def does(self) -> str:
        """What a network that is loaded does, one of `networks.LOADERS`."""
        return "classification"

    def resolve_targets(self, run: Run) -> None:
        """Find the class of each image."""
        labels = run.state.names
        targets = self.target if self.target is not None else labels_of_call(run, labels)
        if targets is None:
            if run.dry:
                return
            raise ParameterError(f"{self.label}: target is missing; give a class by name or index, or one an image.")
        given = targets if isinstance(targets, (tuple, list)) else (targets,)
        run.state.classes = [class_index(target, labels, self.label) for target in given]

    def check(self, step: Step) -> None:
        """Refuse before the run what the classifier does not give, for one pass of it on a blank image."""
        network = step.state.network
        if not self.see_blank(step).requires_grad:
            raise ParameterError(
                f"{self.label}: classifier, {type(network).__name__}, gives no gradient; compute its logits from what "
                "it is shown, without detach() or no_grad()."
            )
        if self.estimate != "x_t" and self.beta is not None:
            networks.check_softened(network, self.beta, self.label)

    def see_blank(self, step: Step) -> torch.Tensor:
        """The log-probability of a blank image."""
        assert step.sample is not None
        image = step.decode(step.sample) if self.estimate == "x0" else step.sample
        with networks.refused(self.label, step.state.network, image), torch.enable_grad():
            return self.log_probability(step, image.detach().requires_grad_(True))

    def _use(self, run: Run, network: nn.Module, processor: Any) -> None:
        state = run.state
        state.network, state.names = network, self.labels or networks.names_of(network)
        config = getattr(network, "config", None)
        channels = getattr(config, "num_channels", None)
        found = Preprocessing() if processor is None else of_processor(processor, channels, self.label)
        state.preprocessing = replace(
            found,
            size=((self.size, self.size) if isinstance(self.size, int) else self.size) or found.size,
            unit_range=found.unit_range if self.unit_range is None else self.unit_range,
            mean=self.mean or found.mean,
            std=self.std or found.std,
            channels=found.channels or channels or (len(self.mean) if self.mean else None),
        )
        if not run.dry:
            networks.borrow(run.exit_stack, network)

    # -- the gradient ----------------------------------------------------------------------------------------------
    def with_respect_to(self, step: Step) -> str:
        return "x0" if self.estimate == "x0" else "sample"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor | None:
        if self.scale == 0 or self.estimate == "edm" or (self.estimate == "x_t" and not step.level.holds_signal):
            return None
        if self.estimate == "x_t":
            assert step.sample is not None
            weight = step.level.sigma**2 / step.level.alpha
            # At unit variance, as on the path of training.
            noisy = step.sample / math.hypot(step.level.alpha, step.level.sigma)
            return -self.scale * weight * self.log_probability(step, noisy)
        image = step.decode(x0)
        # The gradient is that at the clipped image, also where it was clipped.
        image = image + (image.clamp(-1, 1) - image).detach()
        return -self.scale * self.weight(step) * self.log_probability(step, image)

    def weight(self, step: Step) -> float:
        """What the gradient at the clean estimate is multiplied with."""
        now, following = signal_share(step.level), share_of_next(step)
        variance = 1 - now / following
        step.state.largest = max(step.state.largest, variance)
        index, count = rank_of_level(step)
        sine = math.sin(math.pi * (count - 1 - index) / count)
        return (1 - now) / math.sqrt(following) * (1 + self.gamma * step.state.largest / variance * sine)

    def log_probability(self, step: Step, image: torch.Tensor) -> torch.Tensor:
        """`tau1 f_y - log sum_i exp(tau2 f_i)` `[batch]`, 0 where an image has no target."""
        logits = self.logits(step, image)
        if logits.ndim != 2 or len(logits) != len(image):
            raise ParameterError(
                f"{self.label}: classifier, {type(step.state.network).__name__}, returns {list(logits.shape)} for "
                f"{len(image)} images; needed: logits [batch, classes]."
            )
        classes = self._classes(step, len(logits))
        wanted = [0 if index is None else index for index in classes]
        if max(wanted) >= logits.shape[1] or min(wanted) < 0:
            raise ParameterError(
                f"{self.label}: target={self.target!r} is out of range; allowed: 0 to {logits.shape[1] - 1}."
            )
        tau2 = self.tau2 if self.tau2 is not None else {"x0": 0.5, "x_t": 1.0, "edm": 0.0}[self.estimate]
        chosen = logits.gather(1, torch.tensor(wanted, device=logits.device)[:, None])[:, 0]
        value = self.tau1 * chosen - torch.logsumexp(tau2 * logits, dim=1)
        has_target = torch.tensor([index is not None for index in classes], device=logits.device)
        return torch.where(has_target, value, 0.0)

    def logits(self, step: Step, image: torch.Tensor) -> torch.Tensor:
        """The classifier's logits `[batch, classes]` in float32."""
        network, given = step.state.network, step.state.preprocessing(image)
        if self.estimate == "x_t" and (name := networks.time_argument(network)):
            device, _ = networks.device_of(network, given)
            return networks.shown_to(network, given, **{name: torch.full((len(given),), step.timestep, device=device)})
        with ExitStack() as stack:  # for this call only, since the network may serve others in this run
            if self.estimate != "x_t" and self.beta is not None:
                networks.soften(stack, network, self.beta)
            return networks.shown_to(network, given)

    def _classes(self, step: Step, batch: int) -> list[int | None]:
        classes = step.state.classes
        if batch % len(classes):
            raise ParameterError(
                f"{self.label}: target names {len(classes)} classes for {batch} images; allowed: one, or one for each "
                "image."
            )
        return [index for index in classes for _ in range(batch // len(classes))]

    # -- EDM -------------------------------------------------------------------------------------------------------
    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        ends_level = step.evaluation > 0 or not in_pairs(step)
        if self.estimate != "edm" or self.scale == 0 or step.next_level.sigma == 0 or not ends_level:
            return sample
        index = step.index + 1
        falling = max(self.max_guidance * (step.count + 1 - index) / (step.count + 1), 1e-5)
        weight = falling + self.max_guidance * self.added * math.sin(math.pi * index / step.count)
        with torch.enable_grad():
            x = sample.detach().float()
            x = (x / rms(x).clamp_min(1.0)).requires_grad_(True)
            value = self.log_probability(step, x).sum()
        gradient = torch.autograd.grad(value, x)[0]
        if not torch.isfinite(gradient).all():
            raise GuidanceRuntimeError(
                f"{self.label}: the classifier's gradient is not finite at step {step.index} of {step.count}."
            )
        shift = weight * gradient / rms(gradient).clamp_min(1e-30) * rms(sample.float())
        return sample + self.scale * shift.to(sample.dtype)
