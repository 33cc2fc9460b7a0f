"""Somebody else's network: made smooth, loaded for what it does, shown images in its own number type."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from trimtab.guidance.errors import SourceError
from trimtab.guidance.networks import check_softened, load_network, shown_to, soften


class Shared(nn.Module):
    """One activation under two names, as ResNets of torchvision have it within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) - 1)


def test_an_activation_under_two_names_is_made_smooth_under_both() -> None:
    network, x = Shared(), torch.tensor([-1.0, 0.5])
    with ExitStack() as stack:
        assert soften(stack, network, 2.0) == 2
        torch.testing.assert_close(network(x), nn.Softplus(2.0)(nn.Softplus(2.0)(x) - 1))
    assert network.first is network.second and type(network.first) is nn.ReLU


class Called(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


def test_what_cannot_be_made_smooth_is_said_once() -> None:
    with pytest.warns(UserWarning, match=r"test: beta=3 does nothing, since Called holds no nn.ReLU"):
        check_softened(Called(), 3.0, "test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for network in (Shared(), nn.Sequential(nn.Linear(1, 1), nn.GELU()), nn.Sequential(nn.SiLU())):
            check_softened(network, 3.0, "test")


def test_a_small_gradient_goes_through_float16() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).half()
    images = torch.ones(1, 1, 2, 2, requires_grad=True)
    made = shown_to(network, images)
    assert made.dtype == torch.float32
    (gradient,) = torch.autograd.grad(1e-9 * made.sum(), images)
    expected = 1e-9 * network[1].weight.detach().float().sum(0).reshape(1, 1, 2, 2)
    torch.testing.assert_close(gradient, expected, rtol=5e-3, atol=0)


CONFIG = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}


def test_a_network_that_was_not_trained_for_it_is_refused(tmp_path: Path) -> None:
    """Its head would be random numbers."""
    transformers.ResNetModel(transformers.ResNetConfig(**CONFIG)).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"train ppap: teacher='.*' was not trained for classification: it lacks"):
        load_network(str(tmp_path), None, "train ppap", parameter="teacher")


@pytest.mark.parametrize("kind", ["depth", "segmentation"])
def test_a_network_that_does_something_else_is_refused_in_few_words(kind: str, tmp_path: Path) -> None:
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**CONFIG)).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=f"gives no transformers network for {kind} of images; needed: a fo") as error:
        load_network(str(tmp_path), None, "ppap", kind)
    assert len(str(error.value)) < 700 + len(str(tmp_path))


def test_a_folder_that_is_missing_is_named() -> None:
    with pytest.raises(SourceError, match="classifier='nowhere/to-be-found/at-all' gives no transformers network"):
        load_network("nowhere/to-be-found/at-all", None, "classifier")
