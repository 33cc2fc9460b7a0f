"""What the processes of the tests of sharded denoisers run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from branch_programs import Bright, difference
from diffusers import TensorParallelConfig
from diffusers.hooks import tensor_parallel as diffusers_tensor_parallel
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from zoo import CASES, run

import trimtab
from trimtab import Guidance
from trimtab.guidance.errors import ParameterError, UnsupportedPipelineError

GUIDANCES: tuple[dict[str, Any], ...] = (
    {"pag": {"scale": 2.0}},
    {"pag": {"scale": 2.0}, "cfg": {"scale": 4.0}},
    {"seg": {}, "cfg": {"scale": 4.0}},
    {"bright": Bright()},
)
"""Attached together; the last one's gradient goes through the denoiser."""


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    groups = ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for group in groups for block in getattr(denoiser, group, ())]


def fsdp(denoiser: nn.Module) -> None:
    """FSDP2, each block a unit of its own."""
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks_of(denoiser):
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def accelerate_fsdp(denoiser: nn.Module) -> None:
    """FSDP2 by Accelerate's `prepare`, which of the processes that talk by gloo knows plain copies only: told here."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(block).__name__ for block in blocks_of(denoiser)}),
    )
    sharded, _ = accelerator.prepare(denoiser, torch.optim.SGD(denoiser.parameters()))
    assert sharded is denoiser


def diffusers_parallel(denoiser: Any) -> None:
    """What Diffusers' `enable_parallelism` does by the plan of the denoiser's class, on CPUs, which it refuses."""
    diffusers_tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    config, mesh = TensorParallelConfig(tp_degree=2), init_device_mesh("cpu", (2,))
    config.setup(mesh.get_rank(), mesh.size(), torch.device("cpu"), mesh)
    diffusers_tensor_parallel.apply_tensor_parallel(denoiser, config, denoiser._tp_plan)


def tensor_parallel(denoiser: nn.Module) -> None:
    """Each attention's heads, and each feed-forward's channels, over two processes."""
    mesh = init_device_mesh("cpu", (2,))
    for module in denoiser.modules():
        names = {name for name, _ in module.named_modules()}
        if {"to_q", "to_out.0"} <= names:
            into = {
                f"{kind}_{part}" for kind in ("to", "add") for part in ("q", "k", "v", "q_proj", "k_proj", "v_proj")
            }
            plan: dict[str, Any] = {name: ColwiseParallel() for name in into & names}
            plan |= {name: RowwiseParallel() for name in {"to_out.0", "to_add_out"} & names}
            parallelize_module(module, mesh, plan)
            module.heads //= 2
        elif isinstance(module, FeedForward) and isinstance(module.net[0], GELU):  # GEGLU halves its channels itself
            parallelize_module(module, mesh, {"net.0.proj": ColwiseParallel(), "net.2": RowwiseParallel()})


WAYS: dict[str, Callable[[nn.Module], None]] = {"FSDP": fsdp, "tensor parallel": tensor_parallel}
BY_LIBRARIES = {"FSDP by Accelerate": accelerate_fsdp, "tensor parallel by Diffusers": diffusers_parallel}


def attach(pipe: Any, guidances: dict[str, Any]) -> None:
    for plugin, given in guidances.items():
        _ = pipe.add_guidance(given) if isinstance(given, Guidance) else pipe.add_guidance(plugin, **given)


def compare(way: str, *names: str) -> dict[str, Any]:
    """Guided runs of a sharded denoiser against those of the whole one."""
    seen: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        whole, sharded = (trimtab.guide(case.build()) for _ in range(2))
        (WAYS | BY_LIBRARIES)[way](getattr(sharded, case.denoiser))
        sizes = [parameter for parameter in getattr(sharded, case.denoiser).parameters()]
        split = [p for p in sizes if isinstance(p, DTensor) and p.to_local().numel() < p.numel()]
        seen[name] = {"split": len(split), "stock": difference(run(sharded, case), run(whole, case))}
        for guidances in GUIDANCES:
            for pipe in (whole, sharded):
                attach(pipe, guidances)
            guided = run(whole, case)
            seen[name]["+".join(guidances)] = difference(run(sharded, case), guided)
            for pipe in (whole, sharded):
                pipe.clear_guidance()
        seen[name]["stock after"] = difference(run(sharded, case), run(whole, case))
    return seen


def watch(name: str) -> dict[str, Any]:
    """How far `sag`, which watches attention, is off on a sharded denoiser, or why it is refused."""
    case, seen = CASES[name], {}
    whole = trimtab.guide(case.build())
    whole.add_guidance("sag")
    for way, shard in WAYS.items():
        pipe = trimtab.guide(case.build())
        shard(getattr(pipe, case.denoiser))
        pipe.add_guidance("sag")
        try:
            seen[way] = difference(run(pipe, case), run(whole, case))
        except UnsupportedPipelineError as error:
            seen[way] = str(error)
    return seen


def share_branches(name: str) -> dict[str, str]:
    """What is said of a sharded denoiser whose branches the same processes are to share."""
    seen = {}
    for way, shard in WAYS.items():
        pipe = trimtab.guide(CASES[name].build())
        shard(getattr(pipe, CASES[name].denoiser))
        pipe.enable_branch_parallel()
        try:
            run(pipe, CASES[name])
        except ParameterError as error:
            seen[way] = str(error)
        pipe.disable_branch_parallel()
        run(pipe, CASES[name])
    return seen
