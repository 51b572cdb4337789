"""Pictures: files of any kind, the digit found and placed like a data set's, and what is refused.

`pytest -rP tests/mnist/test_pictures.py` prints how many pictures of each kind are read right and
wrong, and how many are refused. They are made of MNIST's test digits where it is on disk.
"""

import math
from collections import Counter

import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from tests.mnist.pictures import GROUNDS, NO_DIGIT, picture
from torch_softmax.mnist.pictures import (
    FRAMES,
    SIDE,
    Frame,
    NoDigitError,
    PictureError,
    normalize,
    read_grey,
)

MNIST = FRAMES["mnist"]
PLAIN = ("plain", "light on dark")
PICTURES = 20  # of each kind; the constants were chosen on pictures of other digits and seeds
SURE = 0.9  # the least probability of the digits that are used: a wrong answer is not the model's


@pytest.fixture(scope="module")
def sure(reader):
    """The reader's model, its frame, and test digits of which it is rightly sure, with labels."""
    checkpoint, data = reader
    model = checkpoint.build_model()
    images, labels = data.test[torch.arange(min(len(data.test), 1000))]
    with torch.no_grad():
        is_sure = model.predict_proba(images)[torch.arange(len(labels)), labels] >= SURE
    side = math.isqrt(images.shape[1])
    digits = pad(images[is_sure].view(-1, side, side), [2 if side == 8 else 0] * 4)
    return model, FRAMES[data.name], list(zip(digits, labels[is_sure].tolist(), strict=True))


def told(kind, sure, number=PICTURES):
    """How often pictures of a kind are read right and wrong, and refused."""
    model, frame, digits = sure
    random = torch.Generator().manual_seed(100 + [*GROUNDS, *NO_DIGIT].index(kind))
    counts = Counter()
    for _ in range(number):
        size = int(torch.randint(2, 6, (), generator=random)) if "several" in kind else 1
        chosen = [digits[i] for i in torch.randint(len(digits), (size,), generator=random)]
        grey = picture(kind, [digit for digit, _ in chosen], random)
        shape = [round(side * SIDE / max(grey.shape)) for side in grey.shape]
        try:
            pixels = normalize(resize(grey[None], shape, antialias=True)[0], frame)
        except NoDigitError:
            counts["refused"] += 1
            continue
        is_right = kind in GROUNDS and [int(model(pixels).argmax())] == [k for _, k in chosen]
        counts["right" if is_right else "wrong"] += 1
    print(f"{kind}: {dict(counts)} of {number}")
    return counts


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_pictures_are_read_right(kind, sure):
    assert told(kind, sure, 2 * PICTURES)["right"] >= 0.95 * 2 * PICTURES


@pytest.mark.parametrize("kind", [kind for kind in (*GROUNDS, *NO_DIGIT) if kind not in PLAIN])
def test_other_pictures_are_refused_or_read_right(kind, sure):
    assert told(kind, sure)["wrong"] <= 0.05 * PICTURES


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs_and_their_quarters_are_refused(name):
    photo = pytest.importorskip("sklearn.datasets").load_sample_image(name)
    grey = torch.tensor(photo).float().mean(-1)[::2, ::2] / 255
    quarters = [quarter for half in grey.chunk(2) for quarter in half.chunk(2, 1)]
    for part in (grey, *quarters):
        refusal(part)


# A drawn 7


def draw(scale=1.0, size=(120, 160), left=30, top=40):
    """A 7 of 60 × 80 pixels in white on black, as an image of mode L."""
    image = Image.new("L", [round(scale * side) for side in size])
    outline = [(0, 0), (60, 0), (60, 16), (16, 80), (0, 80), (44, 16), (0, 16)]
    points = [(scale * (left + x), scale * (top + y)) for x, y in outline]
    ImageDraw.Draw(image).polygon(points, fill=255)
    return image


def to_grey(image):
    return pil_to_tensor(image)[0] / 255


def on_paper(ink):
    return 0.9 - 0.7 * ink


def square(grey, frame=MNIST):
    """The pixels in rows."""
    pixels = normalize(grey, frame)
    side = math.isqrt(len(pixels))
    return pixels.view(side, side)


def extent(pixels, dim):
    """The first and the last row (dim 0) or column (dim 1) with ink."""
    at = pixels.any(1 - dim).nonzero()
    return int(at[0]), int(at[-1])


def assert_alike(a, b):
    """Compare images whose centre of mass may be rounded to the next pixel."""
    moved = (a.roll((y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1))
    best = max(torch.corrcoef(torch.stack([m.flatten(), b.flatten()]))[0, 1] for m in moved)
    assert best > 0.97


@pytest.fixture(scope="module")
def ink():
    return to_grey(draw())


@pytest.fixture(scope="module")
def expected(ink):
    """What every picture of this ink should become."""
    return square(ink)


# Where the ink is placed


def test_mnist_is_20_pixels_long_with_its_centre_of_mass_in_the_middle(expected):
    (top, bottom), (left, right) = extent(expected, 0), extent(expected, 1)
    assert (bottom - top + 1, right - left + 1) == (20, 15)
    for dim in (0, 1):
        centre = expected.sum(1 - dim) @ torch.arange(28.0) / expected.sum()
        assert abs(centre - 14) <= 0.5
    assert (expected.min(), expected.max()) == (0, 1)
    assert ((expected > 0.2) & (expected < 0.8)).any()


def test_ink_stays_inside_where_its_centre_of_mass_is_far_out():
    hook = torch.zeros(200, 200)
    hook[10:190, 170:190] = hook[170:190, 10:190] = 1
    hook[110:190, 150:190] = 1
    pixels = square(hook, Frame(20, (20, 20), by_mass=True, stroke=0))
    assert (extent(pixels, 0), extent(pixels, 1)) == ((0, 19), (0, 19))


def test_the_digits_frame_is_filled_and_counted_in_blocks(ink):
    digits = FRAMES["digits"]
    fine = square(ink, digits._replace(block=1))
    assert (extent(fine, 0), extent(fine, 1)) == ((0, 31), (6, 25))
    torch.testing.assert_close(square(ink, digits), fine.view(8, 4, 8, 4).mean((1, 3)))


def test_the_digits_stand_upright():
    slanted = torch.zeros(100, 100)
    for y in range(10, 90):
        slanted[y, 80 - y // 2 - 6 : 80 - y // 2 + 6] = 1
    columns = square(slanted, Frame(32, (32, 20), by_mass=False, stroke=0)).sum(0)
    assert columns.max() < 1.2 * columns[7:25].mean()  # it fills the width of its box evenly


@pytest.mark.parametrize(("stroke", "least"), [(0.0, 0), (2.0, 1), (4.0, 3)])
def test_thin_strokes_are_thickened(stroke, least):
    paper = torch.zeros(400, 400)
    paper[20:380, 200:203] = 1
    columns = square(paper, MNIST._replace(stroke=stroke)).max(0).values
    assert (columns > 0.9).sum() >= least


def test_thick_strokes_stay(ink, expected):
    assert square(ink, MNIST._replace(stroke=0)).equal(expected)


# What the picture may look like


@pytest.mark.parametrize(("paper", "pen"), [(0.0, 1.0), (0.3, 0.6), (1.0, 0.0), (0.6, 0.3)])
def test_any_two_levels_of_grey(ink, expected, paper, pen):
    torch.testing.assert_close(square(paper + (pen - paper) * ink), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "place",
    [{"size": (400, 300)}, {"size": (100, 300)}, {"left": 2}, {"scale": 0.5}, {"scale": 4}],
    ids=str,
)
def test_any_place_and_size(expected, place):
    assert_alike(square(on_paper(to_grey(draw(**place)))), expected)


def test_light_noise_and_dirt(ink, expected):
    paper = on_paper(ink)
    paper[5:8, 5:8] = paper[150:153, 100:103] = 0
    light = torch.linspace(0.5, 1, 160)[:, None] * torch.linspace(1, 0.7, 120)
    noise = 0.04 * torch.randn(ink.shape, generator=torch.Generator().manual_seed(0))
    assert_alike(square(paper * light + noise), expected)


def test_an_image_of_mnist_stays_what_it_is(expected):
    torch.testing.assert_close(square(expected), expected, atol=0.2, rtol=0)


def test_a_piece_near_the_digit_belongs_to_it(ink):
    cut = ink.clone()
    cut[58:61] = 0  # a gap through the stroke
    assert extent(square(cut), 0)[1] - extent(square(cut), 0)[0] == 19


# What is refused


def refusal(grey):
    with pytest.raises(NoDigitError) as info:
        normalize(grey, MNIST)
    return str(info.value)


def box(height, width, shape=(120, 120)):
    """A filled rectangle in the middle."""
    grey = torch.zeros(shape)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    grey[top : top + height, left : left + width] = 1
    return grey


SEVEN = to_grey(draw())


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (torch.cat([SEVEN, SEVEN], 1), "several parts are drawn, not one digit"),
        (torch.cat([SEVEN, SEVEN]), "several parts are drawn, not one digit"),
        (SEVEN[:, 45:], "ink touches the border of the picture"),
        (box(40, 40), "what is drawn is too broad for strokes"),
        (box(8, 60), "what is drawn is too wide for a digit"),
        (box(3, 3), "what is drawn is too small"),
        (SEVEN - 0.6 * pad(torch.ones(35, 50), (5, 65, 120, 5)), "the ground is not even"),
        (0.05 * SEVEN, "nothing is drawn, or it is too faint"),
        (0 * SEVEN, "nothing is drawn, or it is too faint"),
    ],
)
def test_a_line_says_why_a_picture_is_refused(drawn, message):
    assert refusal(on_paper(drawn)) == message


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (300, 200)])
@pytest.mark.parametrize("noise", [0, 0.001, 0.05])
def test_a_blank_picture_of_any_size_is_refused(shape, noise):
    refusal(0.9 + noise * torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 50), (5, 4), (3, 300), (30, 30)])
def test_a_dot_is_refused(shape):
    paper = torch.full(shape, 0.9)
    paper[shape[0] // 2, shape[1] // 2] = 0.2
    refusal(paper)


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


# Files


def painted(mode, paper, pen):
    """The 7 in a colour on a ground."""
    image = Image.new(mode, draw().size, paper)
    image.paste(pen, mask=draw())
    return image


COLOURS = painted("RGB", (250, 240, 200), (20, 40, 160))
GREY = painted("L", 230, 40)
FILES = {
    "grey": ("png", GREY),
    "black and white": ("png", painted("L", 255, 0).convert("1")),
    "light on dark": ("png", painted("L", 10, 220)),
    "colours": ("png", COLOURS),
    "colours of one brightness": ("png", painted("RGB", (0, 130, 0), (255, 0, 0))),
    "two pure colours": ("png", painted("RGB", (0, 200, 0), (200, 0, 0))),
    "palette": ("png", COLOURS.quantize(8)),
    "black on nothing": ("png", painted("RGBA", (255, 255, 255, 0), (0, 0, 0, 255))),
    "black on nothing, stored as black": ("png", painted("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))),
    "white on nothing": ("png", painted("RGBA", (0, 0, 0, 0), (255, 255, 255, 255))),
    "grey with alpha": ("png", painted("LA", (255, 0), (0, 255))),
    "16 bits": ("png", painted("I", 60_000, 3_000).convert("I;16")),
    "JPEG": ("jpg", COLOURS),
    "CMYK JPEG": ("jpg", COLOURS.convert("CMYK")),
    "GIF": ("gif", GREY),
    "BMP": ("bmp", COLOURS),
    "TIFF": ("tiff", GREY),
    "WebP": ("webp", GREY),
    "large": ("png", draw(8).filter(ImageFilter.GaussianBlur(3))),
}


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", FILES)
def test_any_kind_of_file(tmp_path, expected, name):
    suffix, image = FILES[name]
    grey = read_grey(saved(image, tmp_path / f"picture.{suffix}"))
    assert max(grey.shape) <= SIDE
    assert_alike(square(grey), expected)


@pytest.mark.parametrize(
    ("orientation", "turn_back"),
    [(6, Image.Transpose.ROTATE_90), (2, Image.Transpose.FLIP_LEFT_RIGHT)],
)
def test_the_orientation_of_a_photo(tmp_path, expected, orientation, turn_back):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(draw().transpose(turn_back), tmp_path / "photo.jpg", exif=exif)
    assert_alike(square(read_grey(path)), expected)


@pytest.mark.parametrize("image", [Image.new("RGBA", (50, 50)), Image.new("I;16", (50, 50))])
def test_a_file_with_nothing_in_it_is_blank(tmp_path, image):
    refusal(read_grey(saved(image, tmp_path / "blank.png")))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_half_a_file(tmp_path, suffix):
    path = saved(draw(), tmp_path / f"half.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match=f"{path} is no image, or is damaged"):
        read_grey(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_no_picture(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=f"{path} is no image, or is damaged"):
        read_grey(path)


def test_no_file(tmp_path):
    with pytest.raises(PictureError, match="can't be read: No such file or directory"):
        read_grey(tmp_path / "missing.png")


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = saved(draw(), tmp_path / "huge.png")
    with pytest.raises(PictureError, match=f"{path} has more pixels than can be read"):
        read_grey(path)
