"""What a checkpoint's image processor does is what its network is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from trimtab.guidance.errors import ParameterError
from trimtab.guidance.image_processor import of_processor

SIDE = 64


def picture(channels: int = 3, side: int = SIDE) -> np.ndarray:
    """A picture that is smooth, so that filters of resizing agree on it."""
    at = np.linspace(0, 1, side)
    planes = [255 * (0.5 + 0.4 * np.sin(3 * at[:, None] + c) * np.cos(2 * at[None] - c)) for c in range(channels)]
    return np.stack(planes, -1).round().astype(np.uint8)


AT = {"height": SIDE, "width": SIDE}
PROCESSORS = {
    "vit": transformers.ViTImageProcessor(size=AT),
    "mean and std of each channel": transformers.ViTImageProcessor(
        size=AT, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ),
    "0 to 255": transformers.ViTImageProcessor(size=AT, do_rescale=False, do_normalize=False),
    "another factor": transformers.ViTImageProcessor(size=AT, rescale_factor=1 / 127.5, do_normalize=False),
    "blue first": transformers.MobileViTImageProcessor(size={"shortest_edge": SIDE}, crop_size=AT),
    "an offset": transformers.EfficientNetImageProcessor(
        size=AT, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False, do_normalize=False
    ),
    "normed twice": transformers.EfficientNetImageProcessor(size=AT, include_top=True),
    "cropped, then resized": transformers.PerceiverImageProcessor(size=AT, crop_size=AT),
    "size that is kept": transformers.ViTImageProcessor(do_resize=False),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_network_is_shown_what_its_processor_makes(kind: str) -> None:
    pixels = picture()
    theirs = PROCESSORS[kind](Image.fromarray(pixels), return_tensors="pt")["pixel_values"].float()
    images = torch.as_tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    ours = of_processor(PROCESSORS[kind])(images)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("ViTImageProcessor", (224, 224)),
        ("PerceiverImageProcessor", (224, 224)),  # whose crop_size is 256
        ("ConvNextImageProcessor", (384, 384)),
        ("MobileViTImageProcessor", (256, 256)),
        ("SegformerImageProcessor", (512, 512)),
        ("DPTImageProcessor", (384, 384)),
        ("GLPNImageProcessor", None),
    ],
)
def test_it_is_shown_at_the_size_that_the_processor_makes(kind: str, size: tuple[int, int] | None) -> None:
    assert of_processor(getattr(transformers, kind)()).size == size


def test_a_processor_of_grey_pictures() -> None:
    processor = transformers.ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.2], image_std=[0.3])
    found = of_processor(processor, channels=1)
    assert (found.size, found.channels) == ((28, 28), 1)
    torch.testing.assert_close(found(torch.zeros(1, 1, 28, 28)), torch.full((1, 1, 28, 28), 1.0))


class Squaring:
    """Does what no mean and standard deviation do."""

    def __call__(self, image: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].float()
        return {"pixel_values": (pixels / 255) ** 2}


def test_a_processor_that_cannot_be_followed_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ParameterError, match=r"Squaring cannot be followed .* give it with size, unit_range"):
        of_processor(Squaring())
    with pytest.raises(ParameterError, match="Clusters must be provided"):
        of_processor(transformers.ImageGPTImageProcessor())


def test_it_is_differentiable() -> None:
    images = torch.zeros(1, 3, SIDE, SIDE, requires_grad=True)
    of_processor(PROCESSORS["blue first"])(images)[:, 0].sum().backward()
    assert images.grad is not None
    assert [bool(plane.any()) for plane in images.grad[0]] == [False, False, True]


BY_SHAPE = {
    "keeps the aspect": transformers.DPTImageProcessor(
        size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14
    ),
    "pads": transformers.Swin2SRImageProcessor(),
    "shortest edge": transformers.CLIPImageProcessor(do_center_crop=False, size={"shortest_edge": 32}),
}


@pytest.mark.parametrize("kind", BY_SHAPE)
@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (100, 40)])
def test_a_size_that_depends_on_the_picture_is_that_of_this_picture(kind: str, shape: tuple[int, int]) -> None:
    theirs = BY_SHAPE[kind](Image.new("RGB", shape[::-1]), return_tensors="pt")["pixel_values"]
    assert of_processor(BY_SHAPE[kind])(torch.zeros(1, 3, *shape)).shape == theirs.shape
