"""`trimtab reach` judges a class by its source, its components' types and its denoiser's attentions."""

from __future__ import annotations

import diffusers

from trimtab.pipelines import reach


def test_a_pipeline_is_judged_by_what_it_is() -> None:
    sd = reach._of(diffusers.StableDiffusionPipeline)
    assert (sd.denoiser, sd.family, sd.guided, sd.attention) == (("UNet2DConditionModel",), "unet", "yes", "yes")
    assert reach._of(diffusers.LTXLatentUpsamplePipeline).guided == "it never calls scheduler.step"
    assert "discrete tokens" in reach._of(diffusers.AmusedPipeline).guided
    assert reach._of(diffusers.SkyReelsV2DiffusionForcingPipeline).guided == "yes"  # by a scheduler of each frame
    assert reach.as_json([sd])[0]["family"] == "unet"


def test_the_table_gives_each_reason_once() -> None:
    kinds = (diffusers.StableDiffusionPipeline, diffusers.AmusedPipeline, diffusers.AmusedInpaintPipeline)
    drawn = reach.table([reach._of(kind) for kind in kinds]).splitlines()
    assert drawn[1].split() == ["StableDiffusionPipeline", "UNet2DConditionModel", "unet", "yes", "?", "yes"]
    assert [line.split()[3:5] for line in drawn[2:4]] == [["no", "[1]"]] * 2
    assert "[1] AmusedScheduler samples discrete tokens" in drawn
    assert drawn[-1] == "1 of 3 classes can be guided as far as inspection tells."
