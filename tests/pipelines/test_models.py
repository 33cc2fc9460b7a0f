"""`trimtab models`: what ships, where it came from, and what makes the others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import trimtab
from trimtab import cli
from trimtab.benchmarks.likeness import edge_f1
from trimtab.guidance.networks import load_network, names_of
from trimtab.pipelines.emoji import data as emoji
from trimtab.pipelines.generate.samples import length_of_text
from trimtab.pipelines.interpolate import slerp, spread_of_steps

CONTROLS = [f"trimtab/emoji-{name}" for name in ("easycontrol", "smooth", "unicon")]


def test_what_ships_loads_by_its_name_and_is_within_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shipped = [row for row in rows if row["ships"]]
    assert shipped
    for row in shipped:
        if "judge" in row["name"]:
            load_network(row["name"], None, "test")
        elif row["name"] not in CONTROLS:
            trimtab.GuidedPipeline.from_pretrained(row["name"])
        assert 0 < row["megabytes"] <= 25 and row["licence"]


@pytest.mark.parametrize("name, scale", [("emoji-sd", "guidance_scale"), ("emoji-flux", "true_cfg_scale")])
def test_a_model_draws_what_the_words_say(name: str, scale: str) -> None:
    pipe = trimtab.GuidedPipeline.from_pretrained(f"trimtab/{name}")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["red apple, noto style", "blue heart, noto style"]
    call: dict[str, Any] = {scale: 3.0, "negative_prompt": [""] * 2, "num_inference_steps": 12}
    call |= {"height": 64, "width": 64, **length_of_text(pipe)}
    apple, heart = pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    for image, channel in ((apple, 0), (heart, 2)):
        middle, corners = image[:, 24:40, 24:40].mean((1, 2)), image[:, ::63, ::63]
        assert middle.argmax() == channel and middle.max() > 2 * middle.min()
        assert corners.mean() > 0.85, "it lies on white"


def test_the_partner_that_ships_attaches_to_the_model_that_ships() -> None:
    """The drawing of a heart, and the edges beside it."""
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    joint = pipe.add_guidance("joint", weights="trimtab/emoji-unicon", mode="joint", trigger="edge_map, ")
    call = {"guidance_scale": 2.0, "num_inference_steps": 12, "generator": torch.Generator().manual_seed(0)}
    image = pipe("blue heart, noto style", output_type="pt", **call).images
    edges = 1 - joint.partner.mean(1, keepdim=True)
    pixels = image * 2 - 1
    assert edge_f1(emoji.edges(pixels), edges) > 2 * edge_f1(emoji.edges(pixels), edges.roll((16, 16), (2, 3)))


def test_the_lora_that_ships_makes_steps_more_even() -> None:
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    first, last = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2 + end)) for end in (0, 1))
    noises = torch.cat([slerp(first, last, w) for w in torch.linspace(0, 1, 7).tolist()])

    def uneven() -> float:
        call = {"guidance_scale": 2.0, "num_inference_steps": 12, "output_type": "pt"}
        return spread_of_steps(pipe(["grinning face, fluent style"] * 7, latents=noises, **call).images * 255)

    before = uneven()
    pipe.add_guidance("smooth", weights="trimtab/emoji-smooth")
    assert 0 < uneven() < before


def test_the_classifier_that_guides_is_believed_by_the_one_that_judges() -> None:
    judge, _ = load_network("trimtab/emoji-judge-category-1", None, "test")
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    target = "Animals & Nature"

    def believed() -> float:
        call = {"guidance_scale": 1.0, "num_inference_steps": 12, "output_type": "pt"}
        images = pipe([""] * 4, generator=[torch.Generator().manual_seed(s) for s in range(4)], **call).images
        with torch.no_grad():
            probabilities = judge(images * 2 - 1).logits.softmax(1)
        return float(probabilities[:, names_of(judge).index(target)].mean())

    before = believed()
    pipe.add_guidance("classifier", classifier="trimtab/emoji-judge-category-0", target=target, scale=6.0)
    assert believed() > before + 0.2


def test_every_model_says_its_data_with_licence_and_what_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    assert text.count("data: ") == text.count("made by: ") == text.count("ships") + text.count("not shipped")
    assert "emoji-flux" in text and "CC-BY 4.0" in text
