"""`trimtab models`: what ships, where it came from, and what makes the others."""

from __future__ import annotations

import json

import pytest
import torch

import trimtab
from trimtab import cli
from trimtab.benchmarks.likeness import edge_f1
from trimtab.pipelines.emoji import data as emoji


def test_what_ships_loads_by_its_name_and_is_within_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shipped = [row for row in rows if row["ships"]]
    assert shipped
    for row in shipped:
        if row["name"] != "trimtab/emoji-unicon":
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


def test_every_model_says_its_data_with_licence_and_what_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    assert text.count("data: ") == text.count("made by: ") == text.count("ships") + text.count("not shipped")
    assert "emoji-flux" in text and "CC-BY 4.0" in text
