"""From grey levels to an image of a data set: the ink found, scaled and placed."""

import math

import pytest
import torch

from tests.mnist.drawing import INK, MNIST, PAPER, draw, extent, likeness, on_paper, square, to_grey
from torch_softmax.mnist.characters import NoCharacterError
from torch_softmax.mnist.frames import FRAMES, Frame, normalize


@pytest.fixture
def ink():
    return to_grey(draw())


@pytest.fixture
def expected(ink):
    """What every picture of the same ink should become."""
    return square(ink)


# Where the ink comes to


def test_the_longer_side_is_20_pixels_and_the_aspect_ratio_stays(expected):
    top, bottom = extent(expected, 0)
    left, right = extent(expected, 1)
    assert (bottom - top + 1, right - left + 1) == (20, 15)  # of 80 and 60 drawn pixels


def test_the_centre_of_mass_is_in_the_middle(expected):
    mass = expected.sum()
    for dim in (0, 1):
        centre = expected.sum(1 - dim) @ torch.arange(28.0) / mass
        assert abs(centre - 14) <= 0.5


def test_ink_reaches_from_0_to_1(expected):
    assert expected.min() == 0
    assert expected.max() == 1


def test_scaling_keeps_grey_levels_between(expected):
    assert ((expected > 0.2) & (expected < 0.8)).any()


def test_ink_stays_inside_where_its_centre_of_mass_is_far_out():
    paper = torch.zeros(200, 200)
    paper[110:190, 110:190] = 1
    paper[10:190, 180:190] = 1
    paper[180:190, 10:190] = 1
    pixels = square(paper, Frame(28, (20, 20), by_mass=True, strokes=False))
    assert extent(pixels, 0) == (0, 19)
    assert extent(pixels, 1) == (0, 19)


def test_a_frame_by_its_box_is_in_the_middle(ink):
    pixels = square(ink, Frame(28, (20, 20)))
    assert extent(pixels, 0) == (4, 23)
    assert extent(pixels, 1) == (6, 20)


def test_a_frame_without_aspect_ratio_is_filled(ink):
    pixels = square(ink, Frame(32, (32, 20), keeps_aspect=False))
    assert extent(pixels, 0) == (0, 31)
    assert extent(pixels, 1) == (6, 25)


def test_blocks_are_counted_by_their_mean(ink):
    fine = square(ink, Frame(32, (32, 20), keeps_aspect=False))
    blocks = square(ink, Frame(32, (32, 20), keeps_aspect=False, block=4))
    torch.testing.assert_close(blocks, fine.view(8, 4, 8, 4).mean((1, 3)))


def test_an_upright_frame_takes_the_slant_out():
    slanted = torch.zeros(100, 100)
    for y in range(10, 90):
        slanted[y, 80 - y // 2 - 6 : 80 - y // 2 + 6] = 1
    box = Frame(32, (32, 20), upright=True)
    left, right = extent(square(slanted, box), 1)
    assert right - left + 1 <= 7  # 12 / 80 of 32 are 5, and grey levels on either side


@pytest.mark.parametrize(("stroke", "least"), [(0.0, 0), (2.0, 1), (4.0, 3)])
def test_thin_strokes_are_thickened(stroke, least):
    paper = torch.zeros(400, 400)
    paper[20:380, 200:203] = 1
    columns = square(paper, Frame(28, (20, 20), stroke=stroke)).max(0).values
    assert (columns > 0.9).sum() >= least


def test_thick_strokes_stay(ink):
    frame = Frame(28, (20, 20), stroke=2.0)
    assert square(ink, frame).equal(square(ink, Frame(28, (20, 20))))


# What it may look like


@pytest.mark.parametrize("paper", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pen", [0.0, 0.6, 1.0])
def test_any_two_levels_of_grey(ink, expected, paper, pen):
    if paper != pen:
        torch.testing.assert_close(square(paper + (pen - paper) * ink), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(120, 160), (400, 300), (100, 500)])
@pytest.mark.parametrize("left", [2, 30])
def test_any_place_on_any_size_of_paper(expected, size, left):
    picture = to_grey(draw(size, (left, 40, left + 60, 120)))
    assert likeness(square(on_paper(picture)), expected) > 0.98


@pytest.mark.parametrize("scale", [0.5, 2, 5])
def test_any_size_of_ink(expected, scale):
    sizes = [[round(scale * x) for x in xs] for xs in ((120, 160), (30, 40, 90, 120))]
    picture = to_grey(draw(*sizes, width=round(16 * scale)))
    assert likeness(square(on_paper(picture)), expected) > 0.98


def test_light_that_falls_off(ink, expected):
    light = torch.linspace(0.4, 1, 160)[:, None] * torch.linspace(1, 0.7, 120)
    assert likeness(square(on_paper(ink) * light), expected) > 0.98


@pytest.mark.parametrize("noise", [0.02, 0.08])
def test_noise(ink, expected, noise):
    picture = on_paper(ink) + noise * torch.randn(ink.shape)
    assert likeness(square(picture), expected) > 0.97


def test_specks_of_dirt_are_no_ink(ink, expected):
    picture = on_paper(ink)
    for y, x in ((5, 5), (150, 100), (80, 3)):
        picture[y : y + 3, x : x + 3] = 0
    assert likeness(square(picture), expected) > 0.98


def test_all_parts_are_kept_of_what_need_not_hang_together():
    paper = torch.zeros(100, 100)
    paper[10:20, 20:80] = 1
    paper[60:90, 20:80] = 1
    pixels = square(paper, FRAMES["kmnist"])
    assert extent(pixels, 0)[1] - extent(pixels, 0)[0] == 27
    assert (pixels.any(1).diff() != 0).sum() == 2


def test_an_mnist_like_image_stays_what_it_is(expected):
    torch.testing.assert_close(square(expected), expected, atol=0.2, rtol=0)
    assert likeness(square(expected), expected) > 0.99


# Nothing drawn


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (300, 200)])
@pytest.mark.parametrize("noise", [0, 0.001, 0.05])
def test_a_blank_image(shape, noise):
    with pytest.raises(NoCharacterError, match="nothing is drawn"):
        normalize(PAPER + noise * torch.randn(shape), MNIST)


def test_a_shadow_is_not_drawn():
    light = torch.linspace(0.4, 1, 160)[:, None] * torch.linspace(1, 0.7, 120)
    with pytest.raises(NoCharacterError):
        normalize(PAPER * light, MNIST)


@pytest.mark.parametrize("shape", [(1, 50), (5, 4), (3, 300), (30, 30)])
@pytest.mark.parametrize("name", FRAMES)
def test_a_dot_is_drawn_on_any_shape_but_is_no_stroke(shape, name):
    frame = FRAMES[name]
    picture = torch.full(shape, PAPER)
    picture[shape[0] // 2, shape[1] // 2] = INK
    if frame.strokes:
        with pytest.raises(NoCharacterError):
            normalize(picture, frame)
    else:
        pixels = normalize(picture, frame)
        assert pixels.shape == (1, frame.pixels)
        assert pixels.sum() > 0


@pytest.mark.parametrize(
    ("grey", "error", "message"),
    [
        (torch.zeros(9, 9, dtype=torch.uint8), TypeError, "grey must have a floating-point dtype"),
        ([[0.0]], TypeError, "grey must be a tensor, got list"),
        (torch.zeros(3, 9, 9), ValueError, r"grey must have a shape \(H, W\) .* got \(3, 9, 9\)"),
        (torch.zeros(0, 9), ValueError, r"grey must have a shape \(H, W\) .* got \(0, 9\)"),
        (torch.full((9, 9), math.nan), ValueError, "grey must hold finite numbers"),
    ],
)
def test_bad_grey_levels(grey, error, message):
    with pytest.raises(error, match=message):
        normalize(grey, MNIST)
