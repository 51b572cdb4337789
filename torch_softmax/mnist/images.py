"""Turn a picture of one drawn character into pixels like those of a data set's images.

    pixels = normalize(read_image(path), FRAMES["mnist"])

What is drawn is told from its ground by the ground alone: a smooth surface through the pixels at
the border, and then through all that are not ink. It is cropped, scaled and placed as the images
of the data set were, grey levels and all.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad
from torchvision.transforms.v2 import functional as transforms

from .. import _checks as checks
from .._checks import UserError

__all__ = [
    "FORMATS",
    "FRAMES",
    "BlankImageError",
    "Frame",
    "ImageError",
    "normalize",
    "read_image",
]

FORMATS = {  # Pillow's names for them; it has others, some of which run programs
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}

READ_SIDE = 512  # pixels: larger pictures are shrunk to it, as no character needs more
SEARCH_SIDE = 160  # pixels of the copy in which ink is looked for, fast and with less noise
BORDER = 20  # a border is one part in so many of a side
NOISE_DEVIATIONS = 3.0  # standard deviations of the ground that are still ground
BLANK_DEVIATIONS = 6.0  # and that a character must exceed
BLANK_CONTRAST = 0.03  # of the ground's brightness, that a character must exceed too
DARK = 0.25  # of the range from black to white: a ground below it need not be lit paper
INK_LEVEL = 0.9  # the quantile of inked pixels that counts as full ink
EDGE = 0.3  # of the darkest ink: less is outside of the character's box
SPECK = 0.05  # of the largest part's area: a smaller part is dirt


class ImageError(UserError):
    """A picture that can't be used; the message is one line."""


class BlankImageError(ImageError):
    """A picture in which nothing is drawn."""


@dataclass(frozen=True)
class Frame:
    """How the images of a data set were made from a cropped character.

    Args:
        side: Pixels of the square that it was placed in.
        box: Height and width in pixels that it was scaled to fit into.
        by_mass: Whether its centre of mass came to the middle of the square, or else its box.
        keeps_aspect: Whether it kept its aspect ratio, or else filled the box.
        upright: Whether it was sheared until it stood upright.
        stroke: Pixels that strokes are wide at the least; thinner ones are thickened to it.
        block: The mean of block × block pixels of the square made one pixel of the image.
    """

    side: int
    box: tuple[int, int]
    by_mass: bool = False
    keeps_aspect: bool = True
    upright: bool = False
    stroke: float = 0.0
    block: int = 1

    @property
    def pixels(self) -> int:
        """The number of pixels of an image."""
        return (self.side // self.block) ** 2


FRAMES = {
    # LeCun et al., Gradient-based learning applied to document recognition (1998), section III.
    "mnist": Frame(28, (20, 20), by_mass=True, stroke=2.5),
    # Xiao et al., Fashion-MNIST (2017), section 2: the longest edge fills the image. How well it
    # does on pictures of a person's own has not been measured, nor whether KMNIST is the same.
    "fashion-mnist": Frame(28, (28, 28)),
    "kmnist": Frame(28, (28, 28)),
    # Garris et al., NIST form-based handprint recognition system (1994), made upright characters
    # of 32×20 in bitmaps of 32×32, which Alpaydin and Kaynak (1998) counted in blocks of 4×4.
    "digits": Frame(32, (32, 20), keeps_aspect=False, upright=True, stroke=4.0, block=4),
}


def read_image(path: Path) -> Tensor:
    """Read a picture as grey levels that tell its colours apart.

    It is turned as its EXIF data say, and what is transparent becomes a ground that contrasts with
    what is not. Grey is the direction in which the colours differ most, their first principal
    component, so that red on green of the same brightness is seen.

    Args:
        path: Of the file.

    Returns:
        Float32 of shape (H, W), neither above READ_SIDE, from 0 for black to 1 for white; where
        colours of one brightness are told apart, from −1 to 1.

    Raises:
        ImageError: There is no such file, or it is no picture that can be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what it reads all the same
            pixels = _decode(path)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} has more pixels than can be read") from error
    except Exception as error:  # of many kinds, as the damage will have it
        reason = isinstance(error, OSError) and error.strerror
        raise ImageError(
            f"{path} can't be read: {reason}" if reason else f"{path} is no image, or is damaged"
        ) from error
    if len(pixels) == 1:
        return pixels[0] / pixels.max().clamp(min=1)
    return _grey(_opaque(pixels / 255))


def _decode(path: Path) -> Tensor:
    """Return float32 of shape (1, H, W) for more than 8 bits of grey, else (4, H, W) with alpha."""
    with Image.open(path, formats=sorted(set(FORMATS.values()))) as file:
        image = ImageOps.exif_transpose(file)
    # Pillow keeps more than 8 bits in modes I, I;16, I;16B and so on, of which it scales only I.
    image = image.convert("I" if image.mode.startswith("I") else "RGBA")
    image.thumbnail((READ_SIDE, READ_SIDE))
    decoded: Tensor = transforms.pil_to_tensor(image)
    return decoded.float()


def _opaque(colours: Tensor) -> Tensor:
    """Lay (4, H, W) with an alpha channel on black or white, whichever is farther from it."""
    rgb, alpha = colours[:3], colours[3]
    brightness = (rgb.mean(0) * alpha).sum() / alpha.sum()
    return rgb * alpha + (1 - alpha) * (brightness < 0.5)


def _grey(colours: Tensor) -> Tensor:
    """Project (3, H, W) on the direction of the largest variance."""
    flat = colours.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    direction = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    if direction.sum() < 0:
        direction = -direction
    grey: Tensor = direction @ flat / direction.abs().sum()
    return grey.view(colours.shape[1:])


def normalize(grey: Tensor, frame: Frame) -> Tensor:
    """Crop a drawn character, scale it and place it as the images of a data set were.

    Args:
        grey: Grey levels of shape (H, W), floating point, with a range of about 1 from black to
            white; the ink may be lighter or darker than its ground.
        frame: Of the data set.

    Returns:
        Float32 of shape ((side / block)²,), from 0 for the ground to 1 for full ink.

    Raises:
        TypeError: Grey is no tensor of a floating-point dtype.
        ValueError: It has no shape (H, W), or a level is not finite.
        BlankImageError: Nothing is drawn.

    Example:
        >>> paper = torch.ones(100, 60)
        >>> paper[20:80, 10:22] = 0.2
        >>> image = normalize(paper, FRAMES["mnist"]).view(28, 28)
        >>> image[14, 11:18]
        tensor([0., 1., 1., 1., 1., 0., 0.])
        >>> image.any(1).sum()
        tensor(20)
    """
    checks.floating("grey", grey)
    if grey.dim() != 2 or grey.numel() == 0:
        raise ValueError(f"grey must have a shape (H, W) of pixels, got {tuple(grey.shape)}")
    if not grey.isfinite().all():
        raise ValueError("grey must hold finite numbers, got others")
    ink = _crop(_ink(grey.float()))
    if frame.upright:
        ink = _stand_up(ink)
    # The second look sees only the character, and so in finer detail.
    return _place(_crop(ink), frame)


def _ink(grey: Tensor) -> Tensor:
    """Return how much ink each pixel has, from 0 to 1."""
    small = _shrink(grey, SEARCH_SIDE)
    rise = _contrast(small, _surface(small, _is_border(small), small.shape))
    # Ink is on one side of its ground; a cube lets few pixels far off outweigh many near it.
    sign = -1 if (rise**3).sum() < 0 else 1
    rise = sign * rise
    if rise.max() < BLANK_CONTRAST:
        raise BlankImageError("nothing is drawn")
    is_ground = rise < _otsu_threshold(rise)

    rise = sign * _contrast(small, _surface(small, is_ground, small.shape))
    threshold = _otsu_threshold(rise)
    is_ground = rise < threshold
    level = float(rise[~is_ground].quantile(INK_LEVEL))
    if level < max(BLANK_CONTRAST, BLANK_DEVIATIONS * _deviation(rise[is_ground])):
        raise BlankImageError("nothing is drawn")

    rise = sign * _contrast(grey, _surface(small, is_ground, grey.shape))
    noise = min(NOISE_DEVIATIONS * _deviation(rise[rise < threshold]), level / 2)
    return ((rise - noise) / (level - noise)).clamp(0, 1)


def _contrast(image: Tensor, ground: Tensor) -> Tensor:
    """Return how much brighter an image is than its ground, in parts of the ground's brightness.

    So paper in the shade counts as much as paper in the light. The blackness of a screen is not
    divided by.
    """
    return (image - ground) / ground.clamp(min=DARK)


def _shrink(image: Tensor, longest: int) -> Tensor:
    """Scale (H, W) so that neither side is longer; a smaller image stays as it is."""
    scale = longest / max(image.shape)
    if scale >= 1:
        return image
    return _resize(image, [max(1, round(side * scale)) for side in image.shape])


def _resize(image: Tensor, shape: list[int]) -> Tensor:
    resized: Tensor = transforms.resize(image[None], shape, antialias=True)[0]
    return resized


def _is_border(image: Tensor) -> Tensor:
    margin = max(1, min(image.shape) // BORDER)
    is_border = torch.ones(image.shape, dtype=torch.bool)
    is_border[margin:-margin, margin:-margin] = False
    return is_border


def _surface(image: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """Fit a quadratic surface to some pixels by least squares, and return it in a shape."""
    fit = torch.linalg.lstsq(_quadratic_terms(image.shape)[at], image[at][:, None]).solution
    surface: Tensor = _quadratic_terms(shape) @ fit
    return surface[..., 0]


def _quadratic_terms(shape: torch.Size) -> Tensor:
    """Return 1, x, y, x², xy and y² at each pixel, (H, W, 6), with x and y from −1 to 1."""
    y, x = torch.meshgrid(*((2 * torch.arange(n) + 1) / n - 1 for n in shape), indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1)


def _otsu_threshold(values: Tensor) -> float:
    """Return what divides values into two classes of the largest variance between them.

    Source: Otsu, A threshold selection method from gray-level histograms (1979).
    """
    counts, edges = values.flatten().double().histogram(256)
    middles = (edges[1:] + edges[:-1]) / 2
    below, sums = counts.cumsum(0), (counts * middles).cumsum(0)
    total, mean = below[-1], sums[-1] / below[-1]
    between = (mean * below - sums) ** 2 / (below * (total - below))  # times the total
    best = between[:-1].max()
    return float(edges[1:-1][between[:-1] == best].mean())  # between both where there is a gap


def _deviation(values: Tensor) -> float:
    """Estimate a standard deviation around 0, by the median so that a few outliers don't count."""
    return 1.4826 * float(values.abs().median())


def _crop(ink: Tensor) -> Tensor:
    """Cut out the box of what is drawn, without dirt around it."""
    small = _shrink(ink, SEARCH_SIDE)
    is_drawn = _without_specks(small > EDGE * small.max())
    box = []
    for dim, side in enumerate(ink.shape):
        at = is_drawn.any(1 - dim).nonzero()
        scale = side / small.shape[dim]
        box.append(slice(int(at[0] * scale), math.ceil((at[-1] + 1) * scale)))
    return ink[tuple(box)]


def _without_specks(mask: Tensor) -> Tensor:
    """Keep the parts of a mask that are not tiny beside its largest part."""
    part = _parts(mask)
    area = part.flatten().bincount()
    area[0] = 0
    return (area >= SPECK * area.max())[part]


def _parts(mask: Tensor) -> Tensor:
    """Number the parts of a mask that touch by side or corner, and 0 outside of it."""
    part = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    while True:
        # Each pixel takes the highest number beside it, and then that of the pixel so numbered.
        grown = max_pool2d(part[None].float(), 3, stride=1, padding=1)[0].long() * mask
        grown = grown.flatten()[grown - 1] * mask
        if grown.equal(part):
            return part
        part = grown


def _stand_up(ink: Tensor) -> Tensor:
    """Shear ink until its columns don't depend on its rows: x − y · cov(x, y) / var(y)."""
    height, width = ink.shape
    x, y = torch.arange(width) - _centre(ink, 1), torch.arange(height) - _centre(ink, 0)
    slant = float(y @ ink @ x / (y**2 @ ink.sum(1)).clamp(min=1e-6))
    room = math.ceil(abs(slant) * height)
    degrees = math.degrees(math.atan(slant))
    sheared: Tensor = transforms.affine(
        pad(ink, (room, room))[None],
        angle=0,
        translate=[0, 0],
        scale=1,
        shear=[degrees, 0],
        interpolation=transforms.InterpolationMode.BILINEAR,
    )[0]
    return sheared


def _centre(ink: Tensor, dim: int) -> float:
    """Return the row (dim 0) or column (dim 1) of the centre of mass."""
    profile = ink.sum(1 - dim)
    return float(profile @ torch.arange(len(profile), dtype=profile.dtype) / profile.sum())


def _place(ink: Tensor, frame: Frame) -> Tensor:
    """Scale cropped ink into a frame's box, and the box into its square."""
    ink = _thicken(ink, frame.stroke / math.sqrt(math.prod(_scales(ink, frame))))
    scales = _scales(ink, frame)
    shape = [max(1, round(side * scale)) for side, scale in zip(ink.shape, scales, strict=True)]
    ink = _resize(ink, shape)
    ink = ink / ink.max()
    square = torch.zeros(frame.side, frame.side)
    top, left = (_start(ink, dim, frame) for dim in (0, 1))
    square[top : top + shape[0], left : left + shape[1]] = ink
    return avg_pool2d(square[None], frame.block).flatten()


def _scales(ink: Tensor, frame: Frame) -> list[float]:
    """Return the factors by which ink fits into a frame's box, in height and width."""
    scales = [limit / side for limit, side in zip(frame.box, ink.shape, strict=True)]
    return [min(scales)] * 2 if frame.keeps_aspect else scales


def _start(ink: Tensor, dim: int, frame: Frame) -> int:
    """Return the row (dim 0) or column (dim 1) of the square at which ink begins."""
    side = ink.shape[dim]
    if not frame.by_mass:
        return (frame.side - side) // 2
    return min(max(0, round(frame.side / 2 - _centre(ink, dim))), frame.side - side)


def _thicken(ink: Tensor, stroke: float) -> Tensor:
    """Widen strokes that are thinner than so many pixels, and not beyond it."""
    reach = int((stroke - _stroke_width(ink)) / 2)
    if reach < 1:
        return ink
    return max_pool2d(pad(ink, [2 * reach] * 4)[None], 2 * reach + 1, stride=1)[0]


def _stroke_width(ink: Tensor) -> float:
    """Estimate 2 · area / perimeter, with the total variation ∑|∇ink| for the perimeter.

    Source: Fleming and Rishel, An integral formula for total gradient variation (1960).
    """
    is_drawn = ink > ink.max() / 2  # for noise would count as many short perimeters
    padded = pad(is_drawn.float(), (1, 1, 1, 1))
    down, right = padded[1:, :-1] - padded[:-1, :-1], padded[:-1, 1:] - padded[:-1, :-1]
    return float(2 * padded.sum() / torch.hypot(down, right).sum())
