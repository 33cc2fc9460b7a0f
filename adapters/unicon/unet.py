"""UniCon attached to a Stable Diffusion UNet for one run: each row of its calls gets entries for the partners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from ...guidance.branch import COND, UNCOND, Branch
from ...guidance.errors import ConflictError, GuidanceRuntimeError, UnsupportedPipelineError
from ...guidance.run import DenoiserCall, Run, Step
from ...guidance.source import is_repository
from .checkpoint import blocks_of, load
from .inputs import Inputs, rows_of
from .partner import Partner, Settings, is_separate
from .processors import JointProcessor, Pair


class UNetJoint:
    """The partners of one run. An entry is one image of a row: the pipeline's own first, then those of the partners.

    Args:
        run: of any of the guidances.
        unet: the `UNet2DConditionModel`.

    Raises:
        UnsupportedPipelineError: attention by other processors than the default, a scheduler with several calls a
            level, a pipeline that begins from an image, or one whose UNet sees more than the latents.
    """

    def __init__(self, run: Run, unet: nn.Module) -> None:
        self._run, self._pipe, self._unet = run, run.pipeline, unet
        self._blocks = blocks_of(unet)
        self._partners: list[Partner] = []
        self._attached: list[Settings] = []
        self._processors: dict[str, JointProcessor] = {}
        self._inputs: Inputs | None = None
        kinds = {
            type(part.processor).__name__ for block in self._blocks.values() for part in (block.attn1, block.attn2)
        }
        if others := kinds - {"AttnProcessor2_0", "JointProcessor"}:
            raise UnsupportedPipelineError(
                f"joint: attention by {', '.join(sorted(others))} cannot attend to a partner; needed: "
                "AttnProcessor2_0. Call pipe.unet.set_default_attn_processor(), or pipe.unload_ip_adapter()."
            )
        config: Any = unet.config
        if "strength" in run.arguments or config.in_channels != config.out_channels:
            raise UnsupportedPipelineError(
                f"joint: {type(self._pipe).__name__} begins from an image, or its UNet sees more than the latents, and "
                "a partner does not; use a text-to-image pipeline, and own_image with own_mask to keep a part."
            )
        scheduler = self._pipe.scheduler
        kutta = dict(getattr(scheduler, "config", {})).get("skip_prk_steps") is False
        if getattr(scheduler, "order", 1) > 1 or kutta:
            raise UnsupportedPipelineError(
                f"joint: {type(scheduler).__name__} calls the UNet several times at a noise level, which a partner "
                "with a timestep of its own cannot follow; use DDIMScheduler, DPMSolverMultistepScheduler, or "
                "PNDMScheduler with skip_prk_steps=True."
            )
        if (end := run.arguments.get("denoising_end")) is not None:
            raise UnsupportedPipelineError(
                f"joint: denoising_end={end} ends the run before its last noise level, where the partner is finished; "
                "leave it out."
            )

    # -- partners --------------------------------------------------------------------------------------------------
    def add(self, settings: Settings) -> Partner | None:
        """Attach a partner for this run; `None` where the run is only explained.

        Raises:
            WeightsError, SourceError: weights that cannot be had or do not fit.
            ConflictError: several partners of an own side that is estimated.
        """
        assert settings.weights is not None
        self._attached.append(settings)
        modes = [one.mode for one in self._attached]
        if len(modes) > 1 and "estimate" in modes:
            raise ConflictError(
                "joint: mode='estimate' makes the pipeline's own side the partner's kind, so it goes with no other "
                "joint guidance; attach one of them, or use mode='condition' or 'joint' for all."
            )
        if self._run.dry and is_repository(settings.weights):
            return None
        blocks = load(
            settings.weights, self._unet, subfolder=settings.model, allow_pth=settings.allow_pth,
            revision=settings.revision,
        )  # fmt: skip
        if self._run.dry:
            return None
        if not self._partners:
            self.install()
        self._partners.append(Partner(settings, blocks, self._run))
        return self._partners[-1]

    def separates_partners(self, step: Step) -> bool:
        """Whether a partner whose signal counts takes a step, and so is predicted without the others as well.

        Any of them takes its last one.
        """
        counting = [one for one in self._attached if one.signal_scale > 0 and one.joins(step)]
        return step.index + 1 == step.count or any(one.moves for one in counting)

    def install(self) -> None:
        """Put the processors into the UNet, and the rest around its calls, until the run ends."""
        for name, block in self._blocks.items():
            for part in ("attn1", "attn2"):
                attention = getattr(block, part)
                processor = JointProcessor((), ())
                self._processors[f"{name}.{part}"] = processor
                self._run.replace(attention, "processor", processor)
        self._run.around_denoiser(self._around)
        self._run.exit_stack.push(self._end)

    def _end(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave what there is of the partners, also of a run that was interrupted, but not of one that failed."""
        if kind is None:
            for partner in self._partners:
                partner.leave_unfinished()
        self._partners.clear()
        for processor in self._processors.values():
            processor.own = processor.pairs = ()

    @property
    def _estimates(self) -> bool:
        """Whether the pipeline's own side is y."""
        return any(partner.settings.mode == "estimate" for partner in self._partners)

    def seat(self, entries: Sequence[Partner | None]) -> None:
        """Tell the processors what each entry of a row is; `None` is the pipeline's own."""
        estimated = self._partners[0] if self._estimates else None
        as_y = [(estimated if entry is None else entry if estimated is None else None) for entry in entries]
        for name in self._blocks:
            for part in ("attn1", "attn2"):
                own = [{} if one is None else one.blocks[name].y_own.get(part, {}) for one in as_y]
                self._processors[f"{name}.{part}"].own = own
            pairs = []
            for entry, partner in enumerate(entries):
                if partner is not None and entries[0] is None:
                    x, y = (entry, 0) if estimated is not None else (0, entry)
                    added = partner.blocks[name]
                    pairs.append(Pair(x, y, added.x, added.y, added.post, partner.settings.joint_scale))
            self._processors[f"{name}.attn1"].pairs = pairs

    # -- a call of the denoiser ------------------------------------------------------------------------------------
    def _around(self, step: Step, call: DenoiserCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = call.named(args, kwargs)
        if self._inputs is None:
            for partner in self._partners:
                partner.blocks = {name: block.to(given["sample"]) for name, block in partner.blocks.items()}
            self._inputs = Inputs(self._run, self._partners, given, call.rows, step, self._estimates)
        solitary = bool(call.rows) and all(branch is not None and branch.solitary for branch in call.rows)
        with_others = [partner for partner in self._partners if partner.settings.joins(step) and not solitary]
        alone = [p for p in self._partners if p not in with_others and p.settings.moves and not p.predictions]
        if alone:
            known = self._known(call, given)
            own = [row for row, branch in enumerate(known) if branch in (COND, UNCOND)]
            self._compute(alone, call.apart, [known[row] for row in own], rows_of(given, own, len(known)))
        if not with_others and not self._estimates:
            return call(*args, **kwargs)
        return self._compute([None, *with_others], call, self._known(call, given), given)

    def _known(self, call: DenoiserCall, given: Mapping[str, Any]) -> list[Branch]:
        """What each row predicts."""
        known = [branch for branch in call.rows if branch is not None]
        if not len(known) == len(call.rows) == len(given["sample"]):
            raise GuidanceRuntimeError("joint: which rows of the UNet's call carry the prompt is not known.")
        return known

    def _compute(
        self, entries: Sequence[Partner | None], forward: Any, rows: Sequence[Branch], given: Mapping[str, Any]
    ) -> Any:
        """One call with these entries in each row; returns its output for the pipeline's own entry."""
        assert self._inputs is not None
        self.seat(entries)
        joined = torch.tensor([not is_separate(branch) for branch in rows])
        arguments = self._inputs.for_entries(given, rows, entries)
        options = {**(given.get("cross_attention_kwargs") or {}), "joined": joined}
        output = forward(**arguments, cross_attention_kwargs=options, return_dict=False)[0]
        parts = output.unflatten(0, (len(rows), len(entries)))
        for entry, partner in enumerate(entries):
            if partner is not None:
                for branch in dict.fromkeys(rows):
                    chosen = [row for row, one in enumerate(rows) if one == branch]
                    partner.predictions[branch] = parts[chosen, entry]
        own = parts[:, 0]
        return (own,) if given.get("return_dict") is False else UNet2DConditionOutput(sample=own)
