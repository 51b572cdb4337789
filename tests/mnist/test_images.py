"""From a picture to pixels: reading of any kind of file, and the ink found, scaled and placed."""

import math

import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torchvision.transforms.v2.functional import pil_to_tensor

from torch_softmax.mnist.images import (
    FRAMES,
    READ_SIDE,
    BlankImageError,
    Frame,
    ImageError,
    normalize,
    read_image,
)

MNIST = FRAMES["mnist"]
PAPER, INK = 0.9, 0.2


def draw(size=(120, 160), box=(30, 40, 90, 120), width=16):
    """A 7 in white on black, whose strokes just fit in a box, as an image of mode L."""
    left, top, right, bottom = box
    image = Image.new("L", size)
    pen = ImageDraw.Draw(image)
    pen.rectangle((left, top, right - 1, top + width - 1), fill=255)
    pen.polygon(
        [
            (right - width, top),
            (right - 1, top),
            (left + width - 1, bottom - 1),
            (left, bottom - 1),
        ],
        fill=255,
    )
    return image


def to_grey(image):
    """Its pixels as a tensor from 0 to 1."""
    return pil_to_tensor(image)[0] / 255


def on_paper(ink):
    return PAPER + (INK - PAPER) * ink


def square(image, frame=MNIST):
    """The result of a picture as rows of pixels."""
    pixels = normalize(image, frame)
    side = math.isqrt(len(pixels))
    return pixels.view(side, side)


def extent(pixels, dim):
    """The first and the last row (dim 0) or column (dim 1) with ink."""
    at = pixels.any(1 - dim).nonzero()
    return int(at[0]), int(at[-1])


def likeness(a, b):
    """Their correlation, where the centre of mass may be rounded to the next pixel."""
    moved = (a.roll((y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1))
    return max(torch.corrcoef(torch.stack([m.flatten(), b.flatten()]))[0, 1].item() for m in moved)


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
    pixels = square(paper)
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


@pytest.mark.parametrize("size", [(120, 160), (400, 300), (90, 500)])
@pytest.mark.parametrize("left", [0, 30])
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


def test_parts_that_belong_together_are_all_kept():
    paper = torch.zeros(100, 100)
    paper[10:20, 20:80] = 1
    paper[60:90, 20:80] = 1
    pixels = square(paper)
    assert extent(pixels, 0)[1] - extent(pixels, 0)[0] == 19
    assert (pixels.any(1).diff() != 0).sum() == 4


def test_an_mnist_like_image_stays_what_it_is(expected):
    torch.testing.assert_close(square(expected), expected, atol=0.2, rtol=0)
    assert likeness(square(expected), expected) > 0.99


# Nothing drawn


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (300, 200)])
@pytest.mark.parametrize("noise", [0, 0.001, 0.05])
def test_a_blank_image(shape, noise):
    with pytest.raises(BlankImageError, match="nothing is drawn"):
        normalize(PAPER + noise * torch.randn(shape), MNIST)


def test_a_shadow_is_not_drawn():
    light = torch.linspace(0.4, 1, 160)[:, None] * torch.linspace(1, 0.7, 120)
    with pytest.raises(BlankImageError):
        normalize(PAPER * light, MNIST)


@pytest.mark.parametrize("shape", [(1, 50), (5, 4), (3, 300), (30, 30)])
@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_a_dot_is_drawn_on_any_shape(shape, frame):
    picture = torch.full(shape, PAPER)
    picture[shape[0] // 2, shape[1] // 2] = INK
    pixels = normalize(picture, frame)
    assert pixels.shape == (frame.pixels,)
    assert pixels.sum() > 0


# Files


def save(image, path, **options):
    image.save(path, **options)
    return path


def painted(mode, paper, pen):
    """The 7 in a colour on a ground."""
    image = Image.new(mode, draw().size, paper)
    image.paste(pen, mask=draw())
    return image


FILES = {
    "grey": ("png", painted("L", 230, 40)),
    "black and white": ("png", painted("L", 255, 0).convert("1")),
    "light on dark": ("png", painted("L", 10, 220)),
    "colours": ("png", painted("RGB", (250, 240, 200), (20, 40, 160))),
    "colours of one brightness": ("png", painted("RGB", (0, 130, 0), (255, 0, 0))),
    "two pure colours": ("png", painted("RGB", (0, 200, 0), (200, 0, 0))),
    "palette": ("png", painted("RGB", (250, 240, 200), (20, 40, 160)).quantize(8)),
    "black on nothing": ("png", painted("RGBA", (255, 255, 255, 0), (0, 0, 0, 255))),
    "black on nothing, stored as black": ("png", painted("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))),
    "white on nothing": ("png", painted("RGBA", (0, 0, 0, 0), (255, 255, 255, 255))),
    "grey with alpha": ("png", painted("LA", (255, 0), (0, 255))),
    "16 bits": ("png", painted("I", 60_000, 3_000).convert("I;16")),
    "JPEG": ("jpg", painted("RGB", (250, 240, 200), (20, 40, 160))),
    "grey JPEG": ("jpg", painted("L", 230, 40)),
    "CMYK JPEG": ("jpg", painted("RGB", (250, 240, 200), (20, 40, 160)).convert("CMYK")),
    "GIF": ("gif", painted("L", 230, 40)),
    "BMP": ("bmp", painted("RGB", (250, 240, 200), (20, 40, 160))),
    "TIFF": ("tiff", painted("L", 230, 40)),
    "WebP": ("webp", painted("RGB", (250, 240, 200), (20, 40, 160))),
}


@pytest.mark.parametrize("name", FILES)
def test_any_kind_of_file(tmp_path, expected, name):
    suffix, image = FILES[name]
    path = save(image, tmp_path / f"picture.{suffix}")
    assert likeness(square(read_image(path)), expected) > 0.98


@pytest.mark.parametrize(
    ("orientation", "turn_back"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_the_orientation_of_a_photo(tmp_path, expected, orientation, turn_back):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(draw().transpose(turn_back), tmp_path / "photo.jpg", exif=exif)
    assert likeness(square(read_image(path)), expected) > 0.98


def test_a_large_picture_is_shrunk(tmp_path, expected):
    image = draw().resize((1200, 1600)).filter(ImageFilter.GaussianBlur(3))
    grey = read_image(save(image, tmp_path / "large.png"))
    assert grey.shape == (READ_SIDE, READ_SIDE * 3 // 4)
    assert likeness(square(grey), expected) > 0.98


@pytest.mark.parametrize("image", [Image.new("RGBA", (50, 50)), Image.new("I;16", (50, 50))])
def test_a_file_with_nothing_in_it_is_blank(tmp_path, image):
    grey = read_image(save(image, tmp_path / "blank.png"))
    with pytest.raises(BlankImageError):
        normalize(grey, MNIST)


def broken(path):
    """Keep the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_half_a_file(tmp_path, suffix):
    path = save(draw(), tmp_path / f"half.{suffix}")
    broken(path)
    with pytest.raises(ImageError, match=f"{path} is no image, or is damaged"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_no_image(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"{path} is no image, or is damaged"):
        read_image(path)


def test_no_file(tmp_path):
    with pytest.raises(ImageError, match="can't be read: No such file or directory"):
        read_image(tmp_path / "missing.png")


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = save(draw(), tmp_path / "huge.png")
    with pytest.raises(ImageError, match=f"{path} has more pixels than can be read"):
        read_image(path)


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
