"""UniCon: an image and its partner (depth, edges, pose) sampled together, either of them given or made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image
from torch.nn import functional as F

from ..base import Guidance
from ..branch import COND, AttentionTokens, Branch, Perturbation, Predictions
from ..errors import ParameterError
from ..parameters import parameter
from ..pins import check_listing, commit, listing_sha256
from ..run import Run, Step

Given = Image.Image | str | list[Image.Image | str] | torch.Tensor | None
"""A side that is given: images, or latents `[images, channels, height, width]`."""

TRIGGERS = {"depth": "depth_map, ", "edge": "edge_map, ", "pose": "pose_map, "}
"""What the published models were trained to find before the partner's prompt."""


@dataclass(frozen=True)
class Separate(Perturbation):
    """The image and its partner do not attend to each other; either's own attention is what it is.

    Args:
        alone: whether no partner's prediction is needed, since none takes a step, and so none is computed.
    """

    alone: bool = False

    @property
    def solitary(self) -> bool:
        return self.alone

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: AttentionTokens,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


@dataclass
class Joint(Guidance):
    """Joint sampling of an image x and a partner y, each with its own scheduler and timestep.

    In each block the two attend to each other beside themselves, with LoRAs on either side:

    $$ h_x \\mathrel{+}= w\\,P\\,\\mathrm{attn}(Q_x; K_y, V_y), \\qquad
       h_y \\mathrel{+}= w\\,P\\,\\mathrm{attn}(Q_y; K_x, V_x) $$

    Li et al., "A Simple Approach to Unifying Diffusion-based Conditional Generation", arXiv:2410.11439. What the
    pipeline makes depends on `mode`: `"condition"`: the image, y is given (depth to image); `"estimate"`: y, the image
    is given (image to depth); `"joint"`: the image, while y is made beside it; `"coarse"`: the image, while y starts
    from a given one with noise on it. After a run `partner` holds the other one, in the pipeline's `output_type`.

    With `signal_scale` c the part of the prediction that is owed to the partner counts more:
    $\\tilde\\epsilon \\mathrel{+}= c\\,(\\epsilon_c - \\epsilon_c^{\\text{separate}})$.

    Other guidances act on what the pipeline makes; its partner gets the pipeline's own CFG and `signal_scale`.

    Cost: each evaluation of the UNet has as many rows for each partner, at 1.23 of the cost of so many rows without it;
    one more evaluation a step with `signal_scale`, for all partners together, without rows for them where all are given
    (but in the last step). Outside of its window a partner that is made has rows of its own, without joint attention.
    Nothing where `joint_scale` is 0 and the partner is given.

    Raises:
        WeightsError: weights that do not fit the UNet; the message names file, tensor and both shapes.
    """

    name: ClassVar[str] = "joint"
    repeatable: ClassVar[bool] = False

    weights: str | None = parameter(None, "Folder or Hub repository of the model.")
    model: str | None = parameter(None, "Folder of the model inside it, such as 'depth'.")
    image: Given = parameter(
        None, "The side that is given: a PIL image or the path of one, a list with one for each prompt, or latents."
    )
    mode: Literal["condition", "estimate", "joint", "coarse"] = parameter(
        "condition", "What is given and what is made, see above."
    )
    joint_scale: float = parameter(1.0, "w, the weight of the joint attention.", ge=0, off=0.0)
    signal_scale: float = parameter(0.0, "c, by which what is owed to the partner counts more.", ge=0)
    noise_strength: float = parameter(0.7, "In 'coarse' mode, the share of the run that makes y anew.", ge=0, le=1)
    prompt: str | None = parameter(None, "The partner's prompt; by default the pipeline's.")
    negative_prompt: str | None = parameter(None, "The partner's negative prompt; by default the pipeline's.")
    trigger: str | None = parameter(None, "Put before the prompt of y; by default what the model is known to need.")
    mask: Image.Image | str | list[Image.Image | str] | None = parameter(
        None, "White where the partner is made, black where it stays what `image` is."
    )
    own_image: Given = parameter(None, "What the pipeline's own side stays where `own_mask` is black.")
    own_mask: Image.Image | str | list[Image.Image | str] | None = parameter(
        None, "White where the pipeline's own side is made."
    )
    revision: str | None = parameter(None, "Branch, tag or commit of the repository.")
    files_sha256: str | None = parameter(None, "What the listing of a folder's files must hash to; recipes note it.")
    allow_pth: bool = parameter(
        False, "Read a model.pth, tensors only, where there is no model.safetensors; not from a recipe.", consent=True
    )

    @property
    def partner(self) -> Any:
        """The partner that the last run left: images, or what else the pipeline's `output_type` asks for.

        Of a run that was interrupted it is the partner as of the last step; of one that failed, `None`.
        """
        return self.__dict__.get("_partner")

    def keep(self, partner: Any) -> None:
        """Have `partner` return this; no parameter, so it is in no recipe."""
        object.__setattr__(self, "_partner", partner)

    def validate(self) -> None:
        super().validate()
        if self.weights is None:
            raise ParameterError("joint: weights is missing; give it, such as weights='lixirui142/unicon'.")
        if self.image is None and (self.mode != "joint" or self.mask is not None):
            raise ParameterError(f"joint: image is missing, which mode={self.mode!r} needs.")
        if (self.own_image is None) != (self.own_mask is None):
            raise ParameterError("joint: own_image and own_mask are needed together.")

    def pinned(self) -> Self:
        found = self.files_sha256 or listing_sha256(self.weights)
        return replace(self, revision=commit(self.weights, self.revision), files_sha256=found)

    @property
    def word(self) -> str:
        """The trigger word."""
        if self.trigger is not None:
            return self.trigger
        return TRIGGERS.get(self.model or (self.weights or "").rstrip("/").rsplit("/", 1)[-1], "")

    @property
    def moves(self) -> bool:
        """Whether the partner changes during the run."""
        return self.mode in ("joint", "coarse")

    @property
    def enters_at(self) -> float:
        """Where in its schedule the partner begins: 0 is pure noise, 1 the last level, at which it is held."""
        return {"joint": 0.0, "coarse": 1.0 - self.noise_strength}.get(self.mode, 1.0)

    def joins(self, step: Step) -> bool:
        """Whether the two attend to each other in this step."""
        return self.joint_scale > 0 and super().acts(step)

    @property
    def engaged(self) -> bool:
        """Whether there is a partner in the run at all."""
        return self.moves or self.own_mask is not None or (self.joint_scale > 0 and self.start < self.stop)

    def acts(self, step: Step) -> bool:
        """In each step, for the partner goes its way outside of the window as well; the window is that of `joins`."""
        return self.engaged

    def companions(self, step: Step) -> int:
        return int(self.joins(step))

    def companions_apart(self, step: Step) -> int:
        return int(self.moves and not self.joins(step))

    def setup(self, run: Run) -> None:
        run.state.partner = None
        if not run.dry:
            self.keep(None)
            check_listing(self.weights, self.files_sha256, self.label)
        if self.engaged:
            run.state.joint = attachment = run.attachment("joint")
            layers = run.attention_layers("attn1")
            run.state.separate = Branch("cond", Separate(layers))
            run.state.alone = Branch("cond", Separate(layers, alone=True))
            run.state.partner = attachment.add(self)

    def separate(self, step: Step) -> Branch:
        """The prediction without joint attention; partners' as well where one takes a step, and the same for all."""
        branch: Branch = step.state.separate if step.state.joint.separates_partners(step) else step.state.alone
        return branch

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, self.separate(step)) if self.signal_scale > 0 and self.joins(step) else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        if self.signal_scale == 0 or not self.joins(step):
            return None
        return self.signal_scale * (predictions[COND] - predictions[self.separate(step)])

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        """The own side's step comes first, then the partner's, from the same generator."""
        return sample if step.state.partner is None else step.state.partner.after_step(step, sample)
