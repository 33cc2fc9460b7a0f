"""Denoisers that are one piece too big: sharded over processes, or dispatched to a device and a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import sharded_programs as programs
from configured import check_configured
from processes import together
from zoo import CASES

NAMES = ("sd15", "flux")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, programs.compare, tmp_path_factory.mktemp("fsdp"), "FSDP", *NAMES)


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, programs.compare, tmp_path_factory.mktemp("tensor"), "tensor parallel", *NAMES)


@pytest.fixture(scope="module")
def accelerate_fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, programs.compare, tmp_path_factory.mktemp("prepared"), "FSDP by Accelerate", *NAMES)


@pytest.fixture(scope="module")
def diffusers_parallel(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, programs.compare, tmp_path_factory.mktemp("planned"), "tensor parallel by Diffusers", "flux")


@pytest.mark.parametrize("name", NAMES)
def test_fsdp_changes_nothing(fsdp: list[dict[str, Any]], name: str) -> None:
    for seen in fsdp:
        assert seen[name].pop("split") > 50
        assert set(seen[name].values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_fsdp_as_accelerate_prepares_it_changes_nothing(accelerate_fsdp: list[dict[str, Any]], name: str) -> None:
    for seen in accelerate_fsdp:
        assert seen[name].pop("split") > 50
        assert set(seen[name].values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_tensor_parallel_layers_change_no_more_than_rounding(tensor_parallel: list[dict[str, Any]], name: str) -> None:
    for seen in tensor_parallel:
        assert seen[name].pop("split") > 10
        assert max(seen[name].values()) < 1e-5


def test_tensor_parallelism_by_the_plan_of_diffusers_changes_no_more_than_rounding(
    diffusers_parallel: list[dict[str, Any]],
) -> None:
    for seen in diffusers_parallel:
        assert seen["flux"].pop("split") > 50
        assert max(seen["flux"].values()) < 1e-5


def test_attention_is_watched_where_a_process_sees_whole_maps_and_refused_elsewhere(tmp_path: Path) -> None:
    for seen in together(2, programs.watch, tmp_path / "watch", "sd15"):
        assert seen["FSDP"] == 0.0
        assert "the heads of the denoiser's attentions are split over processes" in seen["tensor parallel"]


def test_processes_do_not_share_the_branches_of_a_denoiser_that_is_sharded_over_them(tmp_path: Path) -> None:
    for seen in together(2, programs.share_branches, tmp_path / "branches", "sd15"):
        assert set(seen) == {"FSDP", "tensor parallel"}
        assert all("unet is sharded over the processes that share an image's" in said for said in seen.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_device_map_onto_a_disk_changes_nothing(name: str, tmp_path: Path) -> None:
    def dispatched(pipe: Any) -> None:
        denoiser = getattr(pipe, CASES[name].denoiser)
        parts = [part for part, _ in denoiser.named_children()]
        places = {part: ("cpu", "disk")[number % 2] for number, part in enumerate(parts)}
        accelerate.dispatch_model(
            denoiser, device_map=places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )

    check_configured(name, dispatched)


@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_loaded_in_balance_onto_a_cpu_and_a_disk_changes_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole = getattr(case.build(), case.denoiser)
    whole.save_pretrained(tmp_path / "saved")
    fits = {"cpu": sum(parameter.nbytes for parameter in whole.parameters()) * 3 // 5}

    def balanced(pipe: Any) -> None:
        denoiser = type(whole).from_pretrained(
            tmp_path / "saved", device_map="balanced", max_memory=fits, offload_folder=str(tmp_path / "disk")
        )
        assert set(denoiser.hf_device_map.values()) == {"cpu", "disk"}
        pipe.register_modules(**{case.denoiser: denoiser})

    check_configured(name, balanced)
