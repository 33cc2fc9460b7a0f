"""The published layout: a folder for each model, with its post projections and three LoRA folders.

    depth/model.safetensors (published as model.pth)   <block>.conv1n.weight          [C, C] or [2C, 2C]
    depth/xy_lora/pytorch_lora_weights.safetensors     unet.<block>.attn1n.to_q.lora.down.weight     [rank, C]
    depth/yx_lora/...                                  likewise
    depth/y_lora/...  (not in every model)             unet.<block>.attn1.to_q.lora.up.weight, and attn2

`xy_lora` acts on the image's tokens x in joint attention, `yx_lora` on the partner's y, and `y_lora` on y in the own
attentions of the block. A LoRA folder may also be PEFT's: `adapter_model.safetensors` with `adapter_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ...guidance import source as sources
from ...guidance.errors import WeightsError
from ...guidance.source import HubOptions
from ..low_rank import LowRank, check_fits, low_ranks
from ..weights import load_weights, save_weights

POST, PICKLED = "model.safetensors", "model.pth"
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

Loras = Mapping[str, LowRank]
"""By projection: `to_q`, `to_k`, `to_v`, `to_out.0`."""


@dataclass(frozen=True)
class Block:
    """What a model adds to one transformer block.

    Args:
        post: of the joint attention's output, `[C, C]`, or `[2C, 2C]` where it mixes both sides.
        x, y: LoRAs of the joint attention on either side's tokens.
        y_own: those of the block's attentions on y, by `"attn1"` and `"attn2"`; empty where the model has none.
    """

    post: torch.Tensor
    x: Loras
    y: Loras
    y_own: Mapping[str, Loras]

    def to(self, like: torch.Tensor) -> Block:
        """The same where another tensor is, and in its type."""
        own = {part: _moved(loras, like) for part, loras in self.y_own.items()}
        return Block(self.post.to(like), _moved(self.x, like), _moved(self.y, like), own)


def _moved(loras: Loras, like: torch.Tensor) -> Loras:
    return {projection: lora.to(like) for projection, lora in loras.items()}


def blocks_of(unet: nn.Module) -> dict[str, Any]:
    """The transformer blocks of a UNet by name."""
    return {name: part for name, part in unet.named_modules() if type(part).__name__ == "BasicTransformerBlock"}


def load(
    source: str, unet: nn.Module, *, subfolder: str | None = None, allow_pth: bool = False, **hub: Unpack[HubOptions]
) -> dict[str, Block]:
    """A model's additions by block, checked against the UNet.

    Args:
        source: a folder, or `"owner/repository"` on the Hub.
        unet: a `UNet2DConditionModel`.
        subfolder: the model's folder inside the source.
        allow_pth: whether `model.pth` may be read where there is no `model.safetensors`; only tensors are unpickled.
        **hub: see `HubOptions`.

    Raises:
        WeightsError: a tensor is missing, not finite or of a shape that does not fit; `model.pth` without `allow_pth`.
        SourceError: the files cannot be had.
    """
    folder = f"{subfolder}/" if subfolder else ""
    path, post = _post(source, folder, allow_pth, hub)
    loras = {name: _lora(source, f"{folder}{name}/", hub) for name in ("xy_lora", "yx_lora", "y_lora")}
    for name in ("xy_lora", "yx_lora"):
        if not loras[name]:
            raise WeightsError(f"{source}: {folder}{name} is missing; it must hold {' or '.join(LORA_FILES)}.")
    own = loras["y_lora"]
    found = {}
    blocks = blocks_of(unet)
    if foreign := sorted(name for name in post if name.removesuffix(".conv1n.weight") not in blocks):
        raise WeightsError(
            f"{path} holds {foreign[0]}, but {type(unet).__name__} has no such block. It was trained for another base "
            "model."
        )
    for name, block in blocks.items():
        width = block.attn1.out_dim
        weight = post.get(f"{name}.conv1n.weight")
        if weight is None:
            raise WeightsError(f"{path} lacks {name}.conv1n.weight, which {type(unet).__name__} needs.")
        if tuple(weight.shape) not in ((width, width), (2 * width, 2 * width)):
            raise WeightsError(
                f"{path}: {name}.conv1n.weight has shape {tuple(weight.shape)}, but {type(unet).__name__} needs "
                f"{(width, width)} or {(2 * width, 2 * width)}. It was trained for another base model."
            )
        _check_finite(f"{path}: {name}.conv1n.weight", weight)
        joint = f"{name}.attn1n"
        found[name] = Block(
            weight,
            _fitting(loras["xy_lora"], joint, block.attn1),
            _fitting(loras["yx_lora"], joint, block.attn1),
            {part: _fitting(own, f"{name}.{part}", getattr(block, part)) for part in ("attn1", "attn2")} if own else {},
        )
    return found


def save(folder: Path, blocks: Mapping[str, Block]) -> Path:
    """Write a model in the published layout, as safetensors; returns its folder."""
    save_weights(folder / POST, {f"{name}.conv1n.weight": block.post for name, block in blocks.items()})
    kinds = {
        "xy_lora": {f"{name}.attn1n": block.x for name, block in blocks.items()},
        "yx_lora": {f"{name}.attn1n": block.y for name, block in blocks.items()},
        "y_lora": {f"{name}.{part}": loras for name, block in blocks.items() for part, loras in block.y_own.items()},
    }
    for kind, attentions in kinds.items():
        tensors = {
            f"unet.{attention}.{projection}.lora.{part}.weight": getattr(lora, part)
            for attention, loras in attentions.items()
            for projection, lora in loras.items()
            for part in ("down", "up")
        }
        if tensors:
            save_weights(folder / kind / LORA_FILES[0], tensors)
    return folder


def posts_from_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The post projections in a published `model.pth`, of which nothing but tensors is unpickled.

    It also holds every LoRA under PEFT's names; those are in their own folders.

    Raises:
        WeightsError: it is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} holds more than tensors, or is damaged, and is not read: {_reason(error)}"
        ) from None
    named = content.items() if isinstance(content, dict) else ()
    posts = {n: value for n, value in named if str(n).endswith(".conv1n.weight") and isinstance(value, torch.Tensor)}
    if not posts:
        raise WeightsError(f"{path} holds no *.conv1n.weight; it is no UniCon model.")
    return posts


def _reason(error: Exception) -> str:
    """What PyTorch found, without its advice to unpickle the file whatever it holds."""
    found = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return " ".join(found.split()).partition(" Check the documentation")[0].partition(". ")[0]


def convert(path: Path) -> Path:
    """Write `model.safetensors` beside a published `model.pth`; returns where.

    Raises:
        WeightsError: see `posts_from_pickle`; or there is no such file.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file {str(path)!r}; needed: a model's {PICKLED}.")
    return save_weights(path.with_name(POST), posts_from_pickle(path))


def _post(source: str, folder: str, allow_pth: bool, hub: HubOptions) -> tuple[Path, dict[str, torch.Tensor]]:
    if sources.find(source, f"{folder}{POST}", **hub) is not None:
        loaded = load_weights(source, weight_name=f"{folder}{POST}", **hub)
        return loaded.path, loaded.tensors
    if not folder and (models := _models(source, hub)):
        raise WeightsError(f"{source} has its models in folders; choose one with model=: {', '.join(models)}.")
    if not allow_pth:
        raise WeightsError(
            f"{source}: there is no {folder}{POST}. If there is a {PICKLED}, write the other from it: "
            f"`trimtab convert {folder}{PICKLED}`; or read it as it is, tensors only: allow_pth=True."
        )
    path = sources.fetch(source, f"{folder}{PICKLED}", **hub)
    return path, posts_from_pickle(path)


def _models(source: str, hub: HubOptions) -> list[str]:
    """The folders of the models in a source."""
    names = (name.rpartition("/") for kind in (POST, PICKLED) for name in sources.list_files(source, kind, **hub))
    return sorted({folder for folder, _, file in names if folder and file in (POST, PICKLED)})


@dataclass(frozen=True)
class _File:
    path: Path
    loras: Mapping[str, Mapping[str, LowRank]]
    """By attention and projection."""


def _lora(source: str, folder: str, hub: HubOptions) -> _File | None:
    """A LoRA folder; `None` where there is none."""
    for name in LORA_FILES:
        # Not one that did not arrive: without `y_lora` a model that has it would be another, and nothing would say so.
        if sources.find(source, f"{folder}{name}", **hub) is None:
            continue
        loaded = load_weights(source, weight_name=f"{folder}{name}", **hub)
        scale = _peft_scale(source, folder, loaded.tensors, hub) if name.startswith("adapter_model") else 1.0
        return _File(loaded.path, low_ranks(loaded.path, loaded.tensors, scale))
    return None


def _peft_scale(source: str, folder: str, tensors: Mapping[str, torch.Tensor], hub: HubOptions) -> float:
    what = f"{source}: {folder}adapter_config.json"
    try:
        config = json.loads(sources.fetch(source, f"{folder}adapter_config.json", **hub).read_text())
        special = [name for name in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern") if config.get(name)]
        scale = float(config["lora_alpha"]) / float(config["r"])
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(f"{what} does not say lora_alpha and r as numbers above 0: {error!r}.") from None
    if special:
        raise WeightsError(f"{what} asks for {special[0]}; needed: a plain LoRA of one rank and one alpha.")
    if wrong := [name for name, t in tensors.items() if "lora_A" in name and len(t) != config["r"]]:
        raise WeightsError(f"{what} says r={config['r']}, but {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}.")
    return scale


def _fitting(file: _File | None, attention: str, module: Any) -> Loras:
    """The LoRAs of one attention, each of a shape that fits the module's projections."""
    assert file is not None
    found = file.loras.get(attention, {})
    for projection in PROJECTIONS:
        if projection not in found:
            raise WeightsError(f"{file.path} lacks the LoRA of {attention}.{projection}.")
        check_fits(file.path, f"{attention}.{projection}", found[projection], module, projection)
    return found


def _check_finite(what: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{what} of shape {tuple(tensor.shape)} holds numbers that are not finite.")
