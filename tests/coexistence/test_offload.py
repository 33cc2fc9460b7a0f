"""Offloaded models give the same result to the bit, and are offloaded as before.

With a CPU as the device to which weights are brought, the hooks do everything but the copying between devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from configured import check_configured
from guided_runs import guided
from zoo import CASES, run

import trimtab

NAMES = ["sd15", "flux", "wan"]


def sequential(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does; that itself takes no CPU as the device."""
    for model in (pipe.vae, getattr(pipe, "unet", None) or pipe.transformer):
        accelerate.cpu_offload(model, execution_device="cpu")


def leaves(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def blocks(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("offload", [sequential, leaves, blocks])
@pytest.mark.parametrize("name", NAMES)
def test_sequential_and_group_offload_change_nothing(name: str, offload: Callable[[Any], None]) -> None:
    check_configured(name, offload)


@pytest.mark.parametrize("name", NAMES)
def test_model_offload_changes_nothing(name: str) -> None:
    """`maybe_free_model_hooks` hooks every model anew at the end of each call, in the midst of a guided run."""
    check_configured(name, model, identity=False)


def test_weights_that_were_offloaded_are_offloaded_after_a_guided_run() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    sequential(pipe)
    with pipe.guidance("pag", scale=2.0):
        run(pipe, CASES["sd15"])
    assert {weight.device.type for weight in pipe.unet.parameters()} == {"meta"}


def test_models_hooked_anew_between_two_steps_stay_guided() -> None:
    pipe, case = trimtab.guide(CASES["sd15"].build()), CASES["sd15"]
    model(pipe)
    hooks = []

    def free(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.maybe_free_model_hooks()
        hooks.append(pipe.unet._hf_hook)
        return tensors

    with pipe.guidance("pag", scale=2.0):
        result = run(pipe, case, callback_on_step_end=free)
    assert len(set(hooks)) == 3
    assert torch.equal(result, guided("sd15", "pag", {"scale": 2.0}))


def test_a_hook_of_the_users_own_offloads_before_and_after() -> None:
    pipe, case = trimtab.guide(CASES["sd15"].build()), CASES["sd15"]
    pipe.unet, hook = accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    with pipe.guidance("pag", scale=2.0):
        assert torch.equal(run(pipe, case), guided("sd15", "pag", {"scale": 2.0}))
        hook.offload()
        assert torch.equal(run(pipe, case), guided("sd15", "pag", {"scale": 2.0}))
    assert pipe.unet._hf_hook is hook.hook
    hook.remove()
    assert not hasattr(pipe.unet, "_hf_hook") and "_compiled_call_impl" not in vars(pipe.unet)
