"""`trimtab models`: what ships, where it came from, and what makes the others."""

from __future__ import annotations

import json

import pytest
import torch

import trimtab
from trimtab import cli
from trimtab.benchmarks.likeness import edge_f1
from trimtab.guidance.networks import load_classifier, names_of
from trimtab.pipelines.emoji import data as emoji


def test_what_ships_loads_by_its_name_and_is_within_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shipped = [row for row in rows if row["ships"]]
    assert shipped
    for row in shipped:
        if "judge" in row["name"]:
            load_classifier(row["name"], None, "test")
        elif row["name"] != "trimtab/emoji-unicon":
            trimtab.GuidedPipeline.from_pretrained(row["name"])
        assert 0 < row["megabytes"] <= 25 and row["licence"]


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


def test_the_classifier_that_guides_is_believed_by_the_one_that_judges() -> None:
    judge, _ = load_classifier("trimtab/emoji-judge-category-1", None, "test")
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
