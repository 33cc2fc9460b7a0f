"""Named classes load by import and through plain Diffusers, and leave no trace in what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from zoo import CASES, run

from trimtab.pipelines import named
from trimtab.pipelines.guided import GuidedMixin

ZOO = {
    "dit": "dit", "flux": "flux", "pixart_sigma": "pixart", "qwenimage": "qwenimage", "stable_diffusion_3": "sd3",
    "stable_diffusion": "sd15", "stable_diffusion_xl": "sdxl", "wan": "wan",
}  # fmt: skip


def test_every_named_class_is_found_in_its_file() -> None:
    assert set(ZOO) == set(named.FILES.values())
    for name, family in named.FILES.items():
        kind = getattr(named, name)
        assert kind.__module__ == f"trimtab.pipelines.named.{family}"
        assert f"Guided{kind.guided_stock.__name__}" == name


@pytest.mark.parametrize("family", sorted(ZOO))
def test_a_named_class_takes_what_its_stock_class_takes(family: str) -> None:
    case = CASES[ZOO[family]]
    stock = case.build()
    name = next(name for name, file in named.FILES.items() if file == family)
    parts = {key: value for key, value in stock.components.items()}
    pipe = getattr(named, name)(**parts, **{k: v for k, v in _options(stock).items() if k not in parts})
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, GuidedMixin) and isinstance(pipe, type(stock))
    assert type(pipe).__name__ == type(stock).__name__
    pipe.add_guidance("pag", scale=2.0)
    guided = run(pipe, case)
    pipe.clear_guidance()
    assert torch.equal(run(pipe, case), run(stock, case))
    assert not torch.equal(guided, run(stock, case))


def test_plain_diffusers_loads_it_as_custom_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    case = CASES["sd15"]
    stock = case.build()
    stock.save_pretrained(tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=named.path("stable_diffusion"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.add_guidance("pag", scale=2.0)
    assert torch.isfinite(run(pipe, case)).all()
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_an_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="stable_diffusion_xl"):
        named.path("sdxl")


def _options(pipe: DiffusionPipeline) -> dict[str, object]:
    return {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {}
