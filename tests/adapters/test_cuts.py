"""What a batch of training sees of its images: parts of one shape at random places, or the middle."""

from __future__ import annotations

import pytest
import torch

from trimtab.adapters.cuts import middle_parts, random_parts, side_to_cut_from
from trimtab.adapters.pairs import crop_and_resize

ASPECTS = torch.tensor([0.5, 0.75, 1.0, 1.5]).repeat(500)
"""Height by width of many images."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(64, 64), (80, 48), (48, 80)])
def test_parts_lie_within_their_images_and_are_not_distorted(size: tuple[int, int]) -> None:
    top, left, height, width = random_parts(ASPECTS, size, 0.75, 0.5, seeded()).boxes.unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    torch.testing.assert_close(height * ASPECTS / width, torch.full_like(width, size[0] / size[1]))


def test_the_area_of_a_part_and_its_place_are_drawn() -> None:
    top, left, height, width = random_parts(ASPECTS, (64, 64), 0.75, 0.5, seeded()).boxes.unbind(1)
    largest = torch.minimum(ASPECTS, 1 / ASPECTS)  # a square's share of the image
    area = height * width / largest
    assert 0.75 <= area.min() < 0.76 and 0.99 < area.max() <= 1 + 1e-6
    assert area.mean().item() == pytest.approx(0.875, abs=0.01)
    for before, part in ((top, height), (left, width)):
        place = before / (1 - part).clamp(min=1e-6)
        assert place[part < 0.99].mean().item() == pytest.approx(0.5, abs=0.02)
    whole = random_parts(torch.ones(50), (64, 64), 1.0, 0.5, seeded())
    torch.testing.assert_close(whole.boxes, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(50, 4))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_so_many_are_mirrored(share: float) -> None:
    mirrored = random_parts(ASPECTS, (64, 64), 0.75, share, seeded()).mirrored
    assert mirrored.float().mean().item() == pytest.approx(share, abs=0.03)


def test_a_part_shows_what_lies_in_its_box() -> None:
    across = torch.linspace(0, 1, 256).expand(4, 3, 256, 256)
    for images, axis in ((across, 1), (across.mT, 0)):
        parts = random_parts(torch.ones(4), (32, 32), 0.25, 0.5, seeded())
        for part, box, mirrored in zip(parts(images), parts.boxes, parts.mirrored.tolist(), strict=True):
            assert part.shape == (3, 32, 32)
            ends = part[0, 16, [0, -1]] if axis == 1 else part[0, [0, -1], 16]
            ends = ends.flip(0) if axis == 1 and mirrored else ends
            expected = torch.stack([box[axis], box[axis] + box[axis + 2]])
            torch.testing.assert_close(ends, expected, rtol=0, atol=0.02)


def test_what_is_drawn_follows_from_the_generator_alone() -> None:
    first, again, other = (random_parts(ASPECTS, (64, 64), 0.75, 0.5, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.boxes, again.boxes) and torch.equal(first.mirrored, again.mirrored)
    assert not torch.equal(first.boxes, other.boxes)


def test_the_middle_is_cut_and_mirrored_of_a_whole_batch() -> None:
    images = torch.rand(3, 3, 32, 32, generator=seeded())
    expected = crop_and_resize(images, 24, 16)
    for share, flipped in ((0.0, False), (1.0, True)):
        assert torch.equal(middle_parts((24, 16), share, seeded())(images), expected.flip(-1) if flipped else expected)


def test_no_part_of_a_square_image_is_enlarged() -> None:
    side = side_to_cut_from(512, 1.5, 0.75)
    for height, width in ((512 * 1.5**0.5, 512 / 1.5**0.5), (512, 512)):
        parts = random_parts(torch.ones(100), (round(height), round(width)), 0.75, 0.5, seeded())
        assert (parts.boxes[:, 2] * side).min() >= height - 2
        assert (parts.boxes[:, 3] * side).min() >= width - 2
