"""What the search for ink is made of: parts, windows, grounds and the width of strokes."""

import pytest
import torch
from torch.nn.functional import max_pool2d

from torch_softmax.mnist.ink import closed_ground, dilated, find_ink, parts, stroke_width


@pytest.fixture
def spiral():
    """A line of one pixel from the corner to the middle, with a gap of one pixel all along."""
    mask = torch.zeros(41, 41, dtype=torch.bool)
    for turn in range(0, 20, 2):
        last = 40 - turn
        mask[turn, turn : last + 1] = mask[turn : last + 1, last] = True
        mask[last, turn : last + 1] = mask[turn + 2 : last + 1, turn] = True
        mask[turn + 2, turn : turn + 2] = True
    return mask


@pytest.mark.parametrize("density", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_parts_are_those_that_scipy_finds(density):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = torch.rand(31, 47) < density
    expected, count = ndimage.label(mask.numpy(), torch.ones(3, 3).numpy())
    pairs = torch.stack([parts(mask).flatten(), torch.from_numpy(expected).flatten()]).unique(dim=1)
    # One number for each, and 0 for what is outside.
    assert pairs.shape[1] == count + bool((~mask).any())
    assert pairs[0].unique().numel() == pairs[1].unique().numel() == pairs.shape[1]
    assert (parts(mask) > 0).equal(mask)


def test_a_long_winding_line_is_one_part(spiral):
    assert parts(spiral).unique().numel() == 2


@pytest.mark.parametrize("window", [1, 3, 9, 41])
def test_the_maximum_in_a_window_is_that_of_a_pool(window):
    image = torch.randn(17, 23)
    pooled = max_pool2d(image[None], window, stride=1, padding=window // 2)[0]
    assert dilated(image, window).equal(pooled)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_closed_ground_has_no_strokes_and_all_edges_of_a_desk(sign):
    desk = torch.full((60, 100), 0.9)
    desk[:, 40:] = 0.4
    picture = desk.clone()
    picture[10:50, 20:26] = 0.65  # darker than its sheet
    picture[10:50, 65:71] = 0.65  # lighter than its desk
    expected = desk.clone()
    if sign < 0:
        expected[10:50, 65:71] = 0.65
    else:
        expected[10:50, 20:26] = 0.65
    assert closed_ground(picture, sign, 11).levels.equal(expected)


def test_the_darker_of_two_inks():
    picture = torch.full((60, 60), 0.9)
    picture[::6] = 0.4
    picture[10:50, 20:26] = 0.1
    ground = closed_ground(picture, -1, 11)
    assert find_ink(picture, ground).mask.any(1).sum() == 43
    assert find_ink(picture, ground, darkest=True).mask.any(1).sum() == 40


@pytest.mark.parametrize("width", [2, 5, 12])
def test_the_width_of_a_long_stroke(width):
    ink = torch.zeros(100, 40)
    ink[5:95, 10 : 10 + width] = 1
    assert stroke_width(ink) == pytest.approx(width, rel=0.15)
