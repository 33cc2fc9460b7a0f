"""`trimtab reach` judges a class by its source, its components' types and its denoiser's attentions."""

from __future__ import annotations

import diffusers

from trimtab.pipelines import reach


def test_a_pipeline_is_judged_by_what_it_is() -> None:
    sd = reach._of(diffusers.StableDiffusionPipeline)
    assert (sd.denoiser, sd.family, sd.guided, sd.attention) == (("UNet2DConditionModel",), "unet", "yes", "yes")
    assert reach._of(diffusers.LTXLatentUpsamplePipeline).guided == "it never calls scheduler.step"
    assert "discrete tokens" in reach._of(diffusers.AmusedPipeline).guided
    assert "1 of 1 classes can be guided" in reach.table([sd]) and reach.as_json([sd])[0]["family"] == "unet"
