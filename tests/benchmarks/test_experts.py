"""What PPAP owes to its experts: the page is what the rows say, and what is measured is what it is called."""

from __future__ import annotations

import json
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from trimtab.benchmarks.experts import ARMS, LORAS, MIXTURES, by_class
from trimtab.benchmarks.experts_page import by_arm, by_mixture, mixed, page, spread
from trimtab.benchmarks.experts_push import Exact

DOCS = Path(__file__).parents[2] / "docs"
ROWS = json.loads((DOCS / "experts.json").read_text())
SEEDS = 3


def test_the_page_of_the_documentation_is_made_of_the_rows_beside_it() -> None:
    text = (DOCS / "experts.md").read_text()
    command = text.split("Made by\n\n    ")[1].splitlines()[0]
    args = Namespace(count=ROWS["settings"]["count"], expert_steps=ROWS["settings"]["expert_steps"])
    assert page(ROWS["rows"], command, args) == text


def test_there_is_a_row_for_each_training_mixture_and_lora() -> None:
    arms, mixtures = by_arm(ROWS["rows"]), by_mixture(ROWS["rows"])
    assert sorted(arms) == sorted(f"{count} of {times * ROWS['settings']['expert_steps']}" for count, times in ARMS)
    assert {name: len(trained) for name, trained in arms.items()} == {
        f"{count} of {times * ROWS['settings']['expert_steps']}": SEEDS if times == 1 else 1 for count, times in ARMS
    }
    assert {name: len(trained) for name, trained in mixtures.items()} == dict.fromkeys(MIXTURES, SEEDS)
    assert sum("share" in row for row in ROWS["rows"].values()) == len(LORAS)


@pytest.mark.parametrize(
    ("values", "text"), [([0.5], "0.50"), ([0.25, 0.75], "0.50 (0.25 to 0.75)"), ([1.0, 1.0], "1.00 (1.00 to 1.00)")]
)
def test_of_several_trainings_the_lowest_and_the_highest_are_said(values: list[float], text: str) -> None:
    assert spread(values, 2) == text


def test_mixtures_stand_below_what_they_are_made_of() -> None:
    assert list(mixed(ROWS["rows"])) == ["1 expert", *list(MIXTURES)[:3], "5 experts", *list(MIXTURES)[3:]]


@pytest.mark.parametrize("parts", MIXTURES.values(), ids=MIXTURES)
def test_the_parts_of_a_mixture_are_the_whole_run(parts: tuple) -> None:
    assert parts[0].start == 0.0 and parts[-1].stop == 1.0
    assert all(before.stop == after.start for before, after in pairwise(parts))


def test_the_variance_within_classes_knows_nothing_of_the_distance_between_them() -> None:
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 10
    means, variance = by_class(features, labels)
    apart, same = by_class(features + 5.0 * labels[:, None], labels)
    assert same == pytest.approx(variance, rel=1e-5)
    torch.testing.assert_close(apart - means, (5.0 * torch.arange(10.0))[:, None].expand(10, 4).double())


def test_the_exact_gradient_is_that_of_the_log_probability() -> None:
    torch.manual_seed(0)
    images, probabilities = torch.randn(30, 1, 2, 2), torch.rand(30, 3).softmax(1)
    alphas = torch.tensor([0.9, 0.5, 0.1])
    x_t, t, wanted = torch.randn(5, 1, 2, 2, requires_grad=True), torch.tensor([0, 1, 2, 1, 2]), torch.arange(5) % 3
    squares = (x_t.flatten(1)[:, None] - alphas[t].sqrt()[:, None, None] * images.flatten(1)).square().sum(-1)
    near = (-squares / (2 * (1 - alphas[t])[:, None])).softmax(1)
    score = (near @ probabilities).log().gather(1, wanted[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, x_t)
    found = Exact(images, probabilities, alphas)(x_t.detach(), t, wanted)
    torch.testing.assert_close(found, gradient.flatten(1), rtol=1e-4, atol=1e-5)
