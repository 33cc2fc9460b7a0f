"""What must be known of a denoiser's architecture: its blocks in call order, and its self-attentions.

Nothing here knows a guidance. A denoiser is inspected, not looked up by name; which tokens of an attention are image
tokens shows in a call only (`tokens.py`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..guidance.branch import Branch, Perturbation
from ..guidance.errors import ParameterError, did_you_mean

_UNET_GROUPS = ("down_blocks", "mid_block", "up_blocks")
_BLOCK_LISTS = (
    "transformer_blocks", "joint_transformer_blocks", "double_stream_blocks", "double_blocks", "blocks",
    "visual_transformer_blocks", "single_transformer_blocks", "single_stream_blocks", "single_blocks", "layers",
)  # fmt: skip
_QUERY = re.compile(r"(^|_)(q|qkv|query)(_|$)")
"""Names of the projections that make queries: `to_q`, `to_qkv`, `to_query`, `img_qkv_proj`, ..."""
_CROSSING = re.compile(r"(attn2|cross_?att(n|ention)|_to_\w+_attn)$")
"""Names of attentions onto other tokens than their own: `attn2`, `cross_attention`, `audio_to_video_attn`, ..."""
_OFFICIAL = re.compile(r"([dmu])(\d+)")


@dataclass(frozen=True)
class Family:
    """One denoiser, seen by its parts.

    Args:
        denoiser: the module whose output reaches the scheduler.
    """

    denoiser: nn.Module

    @property
    def module(self) -> nn.Module:
        """The denoiser itself, unwrapped from `torch.compile`."""
        inner = self.denoiser.__dict__.get("_modules", {}).get("_orig_mod")
        return inner if inner is not None else self.denoiser

    @property
    def name(self) -> str:
        """`"unet"`, `"mmdit"` (text and image attend jointly), `"dit"`, or `"other"` where no blocks were found."""
        if any(hasattr(self.module, group) for group in _UNET_GROUPS):
            return "unet"
        if not self.blocks:
            return "other"
        joint = any(is_joint(attention) for attention in self.attentions.values())
        return "mmdit" if joint else "dit"

    @cached_property
    def pictures(self) -> bool:
        """Whether its sample is laid out in rows and columns: not packed into tokens, and no video."""
        takes = set(inspect.signature(type(self.module).forward).parameters)
        packed = bool({"img_ids", "img_shapes"} & takes) or {"num_frames", "height", "width"} <= takes
        settings = getattr(self.module, "config", {})
        moving = any("temporal" in name or "motion" in name for name in (*settings, *self.attentions))
        return not packed and not moving and not any(isinstance(part, nn.Conv3d) for part in self.module.modules())

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The outer blocks by name, in the order in which the denoiser calls them; each maps hidden states onward."""
        found: dict[str, nn.Module] = {}
        for group in _UNET_GROUPS:
            part = getattr(self.module, group, None)
            if isinstance(part, nn.ModuleList):
                found.update({f"{group}.{index}": block for index, block in enumerate(part)})
            elif isinstance(part, nn.Module):
                found[group] = part
        if not found:
            for group in _BLOCK_LISTS:
                part = getattr(self.module, group, None)
                if isinstance(part, nn.ModuleList):
                    found.update({f"{group}.{index}": block for index, block in enumerate(part)})
        return found

    @cached_property
    def attentions(self) -> dict[str, nn.Module]:
        """The self-attentions (joint ones included) by full name, in call order.

        None where the prediction is read from one token alone, as in a prior of image embeddings: it has no map.
        """
        if getattr(self.module, "prd_embedding", None) is not None:
            return {}
        return {
            f"{block_name}.{name}": module
            for block_name, block in self.blocks.items()
            for name, module in block.named_modules()
            if name and is_self_attention(name, module)
        }

    @property
    def auto(self) -> tuple[str, ...]:
        """The layers of `layers="auto"`.

        A transformer: the block just past its middle. A UNet with a prompt: the middle block. A UNet without one, whose
        only attentions these are: all at the lowest resolution, which the last down block, the middle and the first up
        block share. Where there is no attention, the nearest earlier one.
        """
        if self.name == "unet":
            down = [name for name in self.blocks if name.startswith("down_blocks")]
            up = [name for name in self.blocks if name.startswith("up_blocks")]
            lowest = ["mid_block"] if self.has_cross_attention else [*down[-1:], "mid_block", *up[:1]]
            candidates = [lowest, *([name] for name in reversed(down))]
        else:
            blocks = list(self.blocks)
            middle = round(0.54 * len(blocks))
            candidates = [[name] for name in blocks[middle:] + blocks[:middle][::-1]]
        for blocks in candidates:
            chosen = tuple(name for name in self.attentions if any(name.startswith(block + ".") for block in blocks))
            if chosen:
                return chosen
        return ()

    @cached_property
    def has_cross_attention(self) -> bool:
        """Whether a condition comes in by attentions of its own."""
        return any(
            getattr(module, "is_cross_attention", False) or _CROSSING.search(name)
            for name, module in self.module.named_modules()
        )

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.module.named_modules())

    def own(self, layers: Sequence[str]) -> list[str]:
        """Those of `layers` that this denoiser has; the others are of a pipeline's other denoiser."""
        return [name for name in layers if name in self._names]

    def block_of(self, name: str) -> int:
        """Index of the outer block that is or holds a layer; -1 if none does."""
        blocks = enumerate(self.blocks)
        return next((index for index, block in blocks if f"{name}.".startswith(f"{block}.")), -1)

    def joins_at(self, perturbation: Perturbation) -> int:
        """Index of the outer block that holds the first perturbed layer; -1 if that may come before all blocks."""
        return min(self.block_of(name) for name in self.own(perturbation.layers))

    def is_moved_by(self, branch: Branch) -> bool:
        """Whether a branch differs here from its condition's prediction: not if no perturbed layer is this one's."""
        return branch.perturbation is None or branch.denoiser is not None or bool(self.own(branch.perturbation.layers))

    def is_joined(self, name: str) -> bool:
        """Whether the attention `name` projects tokens of a condition beside the image tokens."""
        return is_joint(self.attentions[name])

    def resolve(self, layers: str | Sequence[str], plugin: str) -> tuple[str, ...]:
        """Full names of the self-attentions that a specification stands for, in call order.

        Args:
            layers: `"auto"`; `"down"`, `"mid"`, `"up"`; the `d0`, `m0`, `u2` of the PAG paper's code; a block or
                attention by name (`"blocks.13"`, `"up_blocks.1.attentions.0"`), each dotted part of which may be a
                regular expression that must match that whole part (`"blocks.(13|14)"`); or a list of those.
            plugin: who asks, for messages.

        Raises:
            ParameterError: nothing matches; the message lists the blocks.
        """
        if not layers:
            raise ParameterError(f"{plugin}: layers={layers!r} names no layer; allowed: 'auto', or at least one name.")
        chosen: set[str] = set()
        for spec in [layers] if isinstance(layers, str) else layers:
            names = self.auto if spec == "auto" else self.attentions
            matched = {name for name in names if spec == "auto" or self.matches(spec, name)}
            if not matched:
                if not self.attentions:
                    raise ParameterError(
                        f"{plugin}: layers={layers!r}: {type(self.module).__name__} has no self-attention that could "
                        "be perturbed, so this guidance cannot act on it."
                    )
                blocks = _summary(list(self.blocks))
                hint = did_you_mean(spec, ["auto", *self.blocks, *self.attentions])
                raise ParameterError(
                    f"{plugin}: layers={spec!r} matches no self-attention of {type(self.module).__name__}.{hint} "
                    f"Allowed: 'auto', or a name or pattern among {blocks or 'none: it has no known blocks'}."
                )
            chosen |= matched
        return tuple(name for name in self.attentions if name in chosen)

    def matches(self, spec: str, name: str) -> bool:
        """Whether a specification stands for the layer `name`."""
        official = _OFFICIAL.fullmatch(spec)
        if official and self.name == "unet":
            group = {"d": "down_blocks", "m": "mid_block", "u": "up_blocks"}[official[1]]
            members = [other for other in self.attentions if other.startswith(group)]
            return int(official[2]) < len(members) and members[int(official[2])] == name
        wanted, parts = spec.split("."), name.split(".")
        return any(
            all(_part_matches(pattern, part) for pattern, part in zip(wanted, parts[start:], strict=False))
            for start in range(len(parts) - len(wanted) + 1)
        )


def is_self_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is an attention among the image tokens (and possibly text), not one onto a condition only."""
    if not hasattr(module, "processor") or not any(_QUERY.search(child) for child, _ in module.named_children()):
        return False
    if is_joint(module):
        return not getattr(module, "only_cross_attention", False)
    crossing = getattr(module, "is_cross_attention", None)
    if crossing is not None:
        return not crossing
    return not _CROSSING.search(name)


def is_joint(attention: nn.Module) -> bool:
    """Whether an attention projects text tokens of its own beside the image tokens."""
    return any(getattr(attention, projection, None) is not None for projection in ("add_k_proj", "txt_kv_proj"))


def _part_matches(pattern: str, part: str) -> bool:
    aliases = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
    if pattern == "blocks":
        return part.endswith("blocks") or part == "layers"
    try:
        return re.fullmatch(aliases.get(pattern, pattern), part) is not None
    except re.error:
        return False


def _summary(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else ", ".join([*names[:3], "...", *names[-3:]])
