"""`trimtab reach` judges a class by its source, its components' types and its denoiser's attentions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

import trimtab
from trimtab.conformance import tiny
from trimtab.pipelines import reach


def test_a_pipeline_is_judged_by_what_it_is() -> None:
    sd = reach._of(diffusers.StableDiffusionPipeline)
    assert (sd.denoiser, sd.family, sd.guided, sd.attention) == (("UNet2DConditionModel",), "unet", "yes", "yes")
    assert reach._of(diffusers.LTXLatentUpsamplePipeline).guided == "it never calls scheduler.step"
    assert "discrete tokens" in reach._of(diffusers.AmusedPipeline).guided
    assert reach._of(diffusers.SkyReelsV2DiffusionForcingPipeline).guided == "yes"  # by a scheduler of each frame
    assert reach.as_json([sd])[0]["family"] == "unet"


def test_attention_by_products_of_matrices_counts_where_it_has_a_twin_that_calls_the_function() -> None:
    """As Wuerstchen's prior has it; linear attention has no map that could be another."""
    assert reach._of(diffusers.WuerstchenPriorPipeline).attention == "yes"
    assert reach._of(diffusers.SanaPipeline).attention == "SanaLinearAttnProcessor2_0 computes it in another way"


@pytest.mark.parametrize("plugin", ["pag", "seg"])
def test_what_is_said_of_it_is_so(plugin: str) -> None:
    torch.manual_seed(0)
    prior = WuerstchenPrior(c_in=4, c=32, c_cond=tiny.WIDTH, c_r=8, depth=2, nhead=4).eval()
    parts = (tiny.clip_tokenizer(), tiny.clip_text(), prior, diffusers.DDPMWuerstchenScheduler())
    pipe = trimtab.guide(diffusers.WuerstchenPriorPipeline(*parts))
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a fox", "height": 256, "width": 256, "num_inference_steps": 2, "guidance_scale": 4.0}

    def run() -> torch.Tensor:
        return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pt")[0])

    stock = run()
    with pipe.guidance(plugin):
        guided, plan = run(), pipe.explain_guidance(**call)
    assert torch.isfinite(guided).all() and (guided - stock).abs().max() > 1e-3 * stock.abs().max()
    assert (pipe.last_guided_run.evaluations, pipe.last_guided_run.forward_calls) == (plan.evaluations, plan.calls)
    assert torch.equal(run(), stock)


def test_the_table_gives_each_reason_once() -> None:
    kinds = (diffusers.StableDiffusionPipeline, diffusers.AmusedPipeline, diffusers.AmusedInpaintPipeline)
    drawn = reach.table([reach._of(kind) for kind in kinds]).splitlines()
    assert drawn[1].split() == ["StableDiffusionPipeline", "UNet2DConditionModel", "unet", "yes", "?", "yes"]
    assert [line.split()[3:5] for line in drawn[2:4]] == [["no", "[1]"]] * 2
    assert "[1] AmusedScheduler samples discrete tokens" in drawn
    assert drawn[-1] == "1 of 3 classes can be guided as far as inspection tells."


PAGE = Path(__file__).parents[2] / "docs" / "reach.md"


def test_the_counts_of_the_page_are_those_of_its_table() -> None:
    cells = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines()]
    exported = {row.pipeline for row in reach.reach()}
    table = {name: (delta, pag) for name, _, delta, pag in (row for row in cells if len(row) == 4) if name in exported}
    counts = {name.strip("*"): value.strip("*") for name, value in (row for row in cells if len(row) == 2)}
    guided = {name: row for name, row in table.items() if not row[0].startswith("refused")}
    of_kind = Counter(delta for delta, _ in guided.values())
    acting = [pag for _, pag in guided.values() if pag.startswith("acts")]
    assert counts["of those, guided in an actual run"] == str(len(guided))
    assert counts["refused, with the reason below"] == str(len(table) - len(guided))
    stepping = int(counts["step continuous latents"])
    assert stepping == len(table) + int(counts["fail by themselves in Diffusers 0.42.1"])
    assert counts["guidable"] == f"{len(guided)} of {stepping} ({len(guided) / stepping:.1%})".replace("%", " %")
    assert counts["a known delta arrives as itself, to 1e-5"] == str(of_kind["exact"])
    assert counts["it is summed before the pipeline's own rescale"] == str(
        of_kind["summed before the pipeline's own rescale"]
    )
    assert counts["`pag` acts"] == str(len(acting))
    assert counts["and costs what the plan declares"] == str(sum("counted" not in pag for pag in acting))
