"""Somebody else's network: made smooth, loaded for what it does, shown images in its own number type."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from trimtab.guidance.errors import SourceError
from trimtab.guidance.networks import check_softened, load_network, shown_to, soften, tensor_of, time_argument


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


def test_a_checkpoint_that_lacks_only_what_is_never_used_loads(tmp_path: Path) -> None:
    """As published ones of DPT do."""
    config = transformers.DPTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4, backbone_out_indices=[0, 1, 2, 3],
        reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
    )  # fmt: skip
    transformers.DPTForDepthEstimation(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("neck.fusion_stage.layers.0.residual_layer1")}
    assert len(kept) < len(load_file(file))
    save_file(kept, file, metadata={"format": "pt"})
    network, processor = load_network(str(tmp_path), None, "ppap", "depth")
    assert isinstance(network, transformers.DPTForDepthEstimation) and processor is None


@pytest.mark.parametrize("given", ["{bad", '{"image_processor_type": "NoSuchProcessor"}'])
def test_a_processor_that_cannot_be_loaded_is_an_error_and_not_none(given: str, tmp_path: Path) -> None:
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**CONFIG)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(given)
    with pytest.raises(
        SourceError, match=r"classifier='.*' has an image processor that cannot be loaded: .* give it wi"
    ):
        load_network(str(tmp_path), None, "classifier")


def test_a_damaged_file_and_sizes_that_do_not_match_are_one_error(tmp_path: Path) -> None:
    network = transformers.ResNetForImageClassification(transformers.ResNetConfig(**CONFIG))
    network.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="gives no transformers network for classification"):
        load_network(str(tmp_path), None, "classifier")
    file.write_bytes(whole)
    transformers.ResNetConfig(**{**CONFIG, "embedding_size": 8}).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="gives no transformers network for classification"):
        load_network(str(tmp_path), None, "classifier")


@pytest.mark.parametrize("made", [lambda x: {"out": x}, lambda x: {"logits": x}, lambda x: (x,), lambda x: x])
def test_a_tensor_is_found_in_what_a_network_returns(made: Any) -> None:
    x = torch.ones(1, 2)
    assert tensor_of(made(x)) is x


@pytest.mark.parametrize("returned", [None, {}, {"other": torch.ones(1)}, (), torch.ones(1).numpy()])
def test_what_holds_no_tensor_is_an_error_that_says_what_it_is(returned: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"it returned a {type(returned).__name__}; needed: a tensor, or an output with"
    ):
        tensor_of(returned)


@pytest.mark.parametrize("kind", ["depth", "segmentation"])
def test_a_network_that_does_something_else_is_refused_in_few_words(kind: str, tmp_path: Path) -> None:
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**CONFIG)).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=f"gives no transformers network for {kind} of images; needed: a fo") as error:
        load_network(str(tmp_path), None, "ppap", kind)
    assert len(str(error.value)) < 700 + len(str(tmp_path))


def test_a_folder_that_is_missing_is_named() -> None:
    with pytest.raises(SourceError, match="classifier='nowhere/to-be-found/at-all' gives no transformers network"):
        load_network("nowhere/to-be-found/at-all", None, "classifier")


class Noisy(nn.Module):
    def forward(self, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda network: network], ids=["compiled", "parallel", "bare"]
)
def test_a_network_of_noisy_images_is_known_within_what_wraps_it(wrap: Any) -> None:
    assert time_argument(wrap(Noisy())) == "timesteps"
    assert time_argument(wrap(Called())) is None
