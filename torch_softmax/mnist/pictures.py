"""Read a picture of one digit, and turn it into an image like those of a data set.

The digit is dark on light or light on dark, on an even ground. Everything else is refused: a
classifier is sure of anything, and its own probability can't tell a desk from an 8.
"""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad
from torchvision.transforms.v2 import functional as transforms

from .. import _checks as checks
from .._checks import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow has others, which run programs
SIDE = 192  # pixels: larger pictures are shrunk to it, as no digit needs more

# Chosen on pictures like those of tests/mnist/pictures.py, of other digits and seeds.
DARK = 0.25  # of the range from black to white: a darker ground is not divided by
FAINT = 0.1  # of the ground's brightness: the least contrast of ink
DEVIATIONS = 6.0  # standard deviations of the ground: the least contrast of ink
EVEN = 0.3  # of the contrast of ink: a pixel with more is not part of an even ground
DIRT = 0.15  # of the area of ink: the largest area that is neither digit nor even ground
SPECK = 0.03  # of the area of the largest part: a smaller part is dirt
SMALL = 0.06  # of the picture's longer side: the least length of a digit
EDGE = 0.3  # of the darkest ink: less is outside of the digit's box
GAP = 0.12  # of the digit's length: the largest distance of a piece, such as the bar of a 5
BROAD = 0.5  # of its length squared: the largest area of a digit
BLOT = 0.5  # of its length: the side of the largest square in a digit
WIDE = 1.6  # times its height: the largest width of a digit


class PictureError(UserError):
    """A picture that can't be used; the message is one line."""


class NoDigitError(PictureError):
    """A picture that does not show one digit on an even ground; the message says why."""


class Frame(NamedTuple):
    """How the images of a data set were made from a cropped digit.

    With `by_mass` the digit keeps its aspect ratio and its centre of mass is in the middle of the
    square; else it stands upright and fills the box, which is in the middle.
    """

    side: int  # pixels of a side of the square that the digit was placed in
    box: tuple[int, int]  # height and width in pixels that it was scaled to fit into
    by_mass: bool
    stroke: float  # the least width in pixels; thinner strokes are thickened
    block: int = 1  # the mean of block × block pixels of the square is a pixel of the image


FRAMES = {
    # LeCun et al., Gradient-based learning applied to document recognition (1998), section III.
    "mnist": Frame(28, (20, 20), by_mass=True, stroke=2.5),
    # Garris et al., NIST form-based handprint recognition system (1994), made upright characters
    # of 32×20 in bitmaps of 32×32, which Alpaydin and Kaynak (1998) counted in blocks of 4×4.
    "digits": Frame(32, (32, 20), by_mass=False, stroke=4.0, block=4),
}


def read_grey(path: Path) -> Tensor:
    """Read a picture as grey levels: float32 (H, W), neither above SIDE, from 0 for black to 1.

    The picture is turned as its EXIF data say. Transparent pixels become black or white, whichever
    contrasts with the rest. Grey is the first principal component of the colours, so that red on
    green of the same brightness is seen; such levels lie between −1 and 1.

    Raises:
        PictureError: The file is not there, or can't be read as a picture in one of `FORMATS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what it reads all the same
            pixels = _decode(path)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} has more pixels than can be read") from error
    except Exception as error:  # of many kinds, depending on the damage
        reason = isinstance(error, OSError) and error.strerror
        problem = f"can't be read: {reason}" if reason else "is no image, or is damaged"
        raise PictureError(f"{path} {problem}") from error
    if len(pixels) == 1:
        return pixels[0] / pixels.max().clamp(min=1)
    colours, alpha = pixels[:3] / 255, pixels[3] / 255
    is_dark = (colours.mean(0) * alpha).sum() < 0.5 * alpha.sum()
    colours = colours * alpha + (1 - alpha) * is_dark
    centred = colours.flatten(1) - colours.mean((1, 2))[:, None]
    direction = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    direction = direction if direction.sum() >= 0 else -direction
    grey: Tensor = torch.tensordot(direction / direction.abs().sum(), colours, 1)
    return grey


def _decode(path: Path) -> Tensor:
    """Return float32 of shape (1, H, W) for more than 8 bits of grey, else (4, H, W) with alpha."""
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
    # Pillow keeps more than 8 bits in modes I, I;16, I;16B and so on, of which it scales only I.
    image = image.convert("I" if image.mode.startswith("I") else "RGBA")
    image.thumbnail((SIDE, SIDE))
    decoded: Tensor = transforms.pil_to_tensor(image)
    return decoded.float()


def normalize(grey: Tensor, frame: Frame) -> Tensor:
    """Find the one digit of a picture, and scale and place it like the images of a data set.

    Args:
        grey: Grey levels of shape (H, W), floating point, with a range of about 1 from black to
            white; the digit may be lighter or darker than its ground.
        frame: How the images of the data set were made.

    Returns:
        Float32 of shape ((side / block)²,), from 0 for the ground to 1 for full ink.

    Raises:
        NoDigitError: The picture does not show one digit on an even ground.

    Example:
        >>> paper = torch.ones(100, 60)
        >>> paper[20:80, 20:35] = 0.2
        >>> normalize(paper, FRAMES["mnist"]).view(28, 28)[14, 11:18].round()
        tensor([0., 1., 1., 1., 1., 1., 0.])
    """
    checks.floating("grey", grey)
    if grey.dim() != 2 or grey.numel() == 0:
        raise ValueError(f"grey must have a shape (H, W) of pixels, got {tuple(grey.shape)}")
    if not grey.isfinite().all():
        raise ValueError("grey must hold finite numbers, got nan or infinity")
    ink = _find_digit(grey.float())
    return _place(ink if frame.by_mass else _stand_up(ink), frame)


def _find_digit(grey: Tensor) -> Tensor:
    """Return how much ink each pixel in the digit's box has, from 0 to 1, or raise."""
    rise = _contrast(grey)
    is_ink = rise >= _otsu_threshold(rise)
    level = float(rise[is_ink].median())
    noise = 1.4826 * float(rise[~is_ink].abs().median())  # a standard deviation, but for outliers
    if not (level > FAINT and level > DEVIATIONS * noise):
        raise NoDigitError("nothing is drawn, or it is too faint")
    drawn = _one_drawing(is_ink)
    _check_digit(_crop(drawn.float()), max(grey.shape))
    is_uneven = (rise.abs() > EVEN * level) & (_dilated(drawn, 7) == 0)
    if is_uneven.sum() > DIRT * drawn.sum():
        raise NoDigitError("the ground is not even")
    floor = min(3 * noise, level / 2)
    ink = ((rise - floor) / (level - floor)).clamp(0, 1) * _dilated(drawn, 5)
    return _crop(ink)


def _contrast(grey: Tensor) -> Tensor:
    """Return how much more ink than the ground each pixel has, in parts of its brightness.

    The ground is fitted to the border, and then to all pixels that are not ink.
    """
    rows, columns = (max(1, side // 20) for side in grey.shape)
    is_border = torch.ones(grey.shape, dtype=torch.bool)
    is_border[rows:-rows, columns:-columns] = False
    rise = _rise(grey, is_border)
    # A cube lets few pixels that differ much outweigh many that differ little.
    sign = -1 if (rise**3).sum() < 0 else 1
    return sign * _rise(grey, sign * rise <= _otsu_threshold(sign * rise))


def _rise(grey: Tensor, is_ground: Tensor) -> Tensor:
    """Return the difference from a quadratic surface fitted to some pixels by least squares."""
    y, x = torch.meshgrid(*((2 * torch.arange(n) + 1) / n - 1 for n in grey.shape), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1)
    # Few pixels leave some terms open, for which the default driver of torch 2.6 finds no fit.
    fit = torch.linalg.lstsq(terms[is_ground], grey[is_ground][:, None], driver="gelsd")
    ground = (terms @ fit.solution)[..., 0]
    rise: Tensor = (grey - ground) / ground.clamp(min=DARK)
    return rise


def _otsu_threshold(values: Tensor) -> float:
    """Return the threshold with the largest variance between two classes (Otsu, 1979)."""
    if values.min() == values.max():
        return float(values.max())
    counts, edges = values.flatten().double().histogram(256)
    middles = (edges[1:] + edges[:-1]) / 2
    below, sums = counts.cumsum(0), (counts * middles).cumsum(0)
    total, mean = below[-1], sums[-1] / below[-1]
    between = (mean * below - sums) ** 2 / (below * (total - below))  # times the total
    is_best = between[:-1] == between[:-1].max()
    return float(edges[1:-1][is_best].mean())  # in the middle of a gap


def _one_drawing(is_ink: Tensor) -> Tensor:
    """Return the largest part of the ink with pieces near it, or raise if there are others."""
    part = _parts(is_ink)
    area = part.flatten().bincount()
    area[0] = 0
    numbers = (area >= SPECK * area.max()).nonzero()[:, 0]
    drawn = torch.isin(part, numbers)
    if torch.cat([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]]).any():
        raise NoDigitError("ink touches the border of the picture")
    largest = int(area.argmax())
    top, bottom, left, right = _box(part == largest)
    gap = GAP * max(bottom - top, right - left)
    for number in set(numbers.tolist()) - {largest}:
        first, last, start, stop = _box(part == number)
        down, across = max(top - last, first - bottom), max(left - stop, start - right)
        # Beside the largest part, only a short piece belongs to it, such as the bar of a 5.
        is_piece = -across > 0.3 * (stop - start) or last - first < (bottom - top) / 2
        if not is_piece or max(down, across) > gap:
            raise NoDigitError("several parts are drawn, not one digit")
    return drawn


def _check_digit(drawn: Tensor, picture_side: int) -> None:
    """Raise unless a cropped mask has the size and shape of a digit."""
    height, width = drawn.shape
    size = max(height, width)
    if size < SMALL * picture_side:
        raise NoDigitError("what is drawn is too small")
    if width > WIDE * height:
        raise NoDigitError("what is drawn is too wide for a digit")
    # A square in the mask vanishes once its edge has been peeled off often enough.
    left = -_dilated(-pad(drawn, (1, 1, 1, 1)), 2 * int(BLOT * size / 2) + 1)
    if drawn.sum() > BROAD * size**2 or left.any():
        raise NoDigitError("what is drawn is too broad for strokes")


def _parts(mask: Tensor) -> Tensor:
    """Give a number to each part of a mask that touches by side or corner, and 0 outside of it."""
    part = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    while True:
        # Each pixel takes the highest number beside it, and then the number of the pixel so named.
        wider = _dilated(part, 3) * mask
        wider = wider.flatten()[wider - 1] * mask
        if wider.equal(part):
            return part
        part = wider


def _dilated(image: Tensor, window: int) -> Tensor:
    """Return the maximum in a square window around each pixel, of an odd number of pixels."""
    # Several times as fast as max_pool2d, which notes the positions too.
    image = image.byte() if image.dtype == torch.bool else image
    wider = pad(image, [window // 2] * 4, value=image.min().item())
    return wider.unfold(0, window, 1).amax(-1).unfold(1, window, 1).amax(-1)


def _box(mask: Tensor) -> list[int]:
    """Return the top, bottom, left and right of what is in a mask."""
    lines = [mask.any(dim).nonzero() for dim in (1, 0)]
    return [int(end) for line in lines for end in (line[0], line[-1] + 1)]


def _crop(ink: Tensor) -> Tensor:
    """Cut out the box of what is drawn."""
    top, bottom, left, right = _box(ink > EDGE * ink.max())
    return ink[top:bottom, left:right]


def _stand_up(ink: Tensor) -> Tensor:
    """Shear ink until its columns don't depend on its rows: x − y · cov(x, y) / var(y)."""
    height, width = ink.shape
    x, y = torch.arange(width) - _centre(ink, 1), torch.arange(height) - _centre(ink, 0)
    slant = float(y @ ink @ x / (y**2 @ ink.sum(1)).clamp(min=1e-6))
    room = math.ceil(abs(slant) * height)
    wider, shear = pad(ink, (room, room))[None], [math.degrees(math.atan(slant)), 0.0]
    bilinear = transforms.InterpolationMode.BILINEAR
    return _crop(transforms.affine(wider, 0.0, [0, 0], 1.0, shear, interpolation=bilinear)[0])


def _centre(ink: Tensor, dim: int) -> float:
    """Return the row (dim 0) or column (dim 1) of the centre of mass."""
    profile = ink.sum(1 - dim)
    return float(profile @ torch.arange(len(profile), dtype=profile.dtype) / profile.sum())


def _place(ink: Tensor, frame: Frame) -> Tensor:
    """Scale cropped ink into a frame's box, and place the box in its square."""

    def scales() -> list[float]:
        factors = [limit / side for limit, side in zip(frame.box, ink.shape, strict=True)]
        return [min(factors)] * 2 if frame.by_mass else factors

    reach = int((frame.stroke / math.sqrt(math.prod(scales())) - _stroke_width(ink)) / 2)
    if reach >= 1:
        ink = _dilated(pad(ink, [reach] * 4), 2 * reach + 1)
    shape = [max(1, round(side * scale)) for side, scale in zip(ink.shape, scales(), strict=True)]
    ink = transforms.resize(ink[None], shape, antialias=True)[0]
    ink = ink / ink.max()
    square = torch.zeros(frame.side, frame.side)
    place = []
    for dim, side in enumerate(shape):
        centre = _centre(ink, dim) if frame.by_mass else side / 2
        start = min(max(0, round(frame.side / 2 - centre)), frame.side - side)
        place.append(slice(start, start + side))
    square[tuple(place)] = ink
    return avg_pool2d(square[None], frame.block).flatten()


def _stroke_width(ink: Tensor) -> float:
    """Estimate 2 · area / perimeter, with the total variation ∑|∇ink| for the perimeter."""
    drawn = pad((ink > ink.max() / 2).float(), (1, 1, 1, 1))
    perimeter = torch.hypot(drawn.diff(dim=0)[:, :-1], drawn.diff(dim=1)[:-1]).sum()
    return float(2 * drawn.sum() / perimeter)
