"""Palette: mean shift towards the colours, and a picture in those of its palette."""

import pytest
import torch
from trimtab_studio import Palette

import trimtab

LAST = trimtab.Step(index=9, count=10, timestep=1.0, level=trimtab.Level(alpha=1.0, sigma=0.01))


def test_a_pixel_goes_to_the_colour_next_to_it():
    palette = Palette(colours=("#ff0000", "#0000ff"), grain=0)
    image = torch.tensor([[[[0.9, -0.7]], [[-1.0, -0.8]], [[-0.8, 1.0]]]])  # nearly red, nearly blue
    expected = torch.tensor([[[[1.0, -1.0]], [[-1.0, -1.0]], [[-1.0, 1.0]]]])
    torch.testing.assert_close(palette.nearest(image), expected, atol=1e-4, rtol=0)


def test_a_wide_reach_leads_to_the_middle_of_the_colours():
    image = torch.zeros(1, 3, 1, 1)
    palette = Palette(colours=("#ffffff", "#000000"), width=1.0)
    torch.testing.assert_close(palette.nearest(image), torch.zeros(1, 3, 1, 1))


def test_a_grey_image_is_given_the_luma_of_each_colour():
    expected = torch.tensor([[2 * 0.299 - 1], [1.0]])
    torch.testing.assert_close(Palette(colours=("#ff0000", "#ffffff")).palette(torch.zeros(1, 1, 2, 2)), expected)


def test_the_gradient_of_the_loss_is_a_step_of_mean_shift():
    palette = Palette(scale=0.5)
    x0 = torch.linspace(-1, 1, 12).view(2, 1, 2, 3).requires_grad_(True)
    palette.loss(LAST, x0).sum().backward()
    torch.testing.assert_close(x0.grad, 0.5 * (x0.detach() - palette.nearest(x0.detach())))


@pytest.mark.parametrize("colours", [(), ("red",), ("#ffffff", "#12345")])
def test_other_spellings_of_colours_are_refused(colours):
    with pytest.raises(trimtab.ParameterError, match=r"studio\.palette: colours="):
        Palette(colours=colours)


def test_a_picture_is_made_of_the_palette():
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")

    def apart():
        """Mean distance of a pixel from the nearest of three greys, of the range from black to white."""
        generator = torch.Generator().manual_seed(0)
        image = pipe("Pullover", num_inference_steps=12, generator=generator, output_type="pt").images
        return (image[..., None] - torch.tensor([-1.0, 0.0, 1.0])).abs().min(dim=-1).values.mean() / 2

    plain = apart()
    pipe.add_guidance("studio.palette", colours=["#000000", "#808080", "#ffffff"])
    assert apart() < 0.5 * plain
