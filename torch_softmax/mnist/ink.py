"""How much ink each pixel of a picture has: its contrast with the ground that it lies on.

There are two kinds of ground. `smooth_ground` is a quadratic surface through the pixels at the
border, and then through all that are not ink: right for a sheet in even light that fills the
picture. `closed_ground` asks each pixel's neighbourhood alone: where ink is dark, it is the lowest
level that a square window finds as its maximum anywhere around the pixel, the morphological
closing. It takes strokes away that are narrower than the window, and leaves all edges of what is
wider as sharp as they are: those of a sheet, a desk and a shadow.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as transforms

from .images import ImageError

SEARCH_SIDE = 160  # pixels of the copy in which ink is looked for, fast and with less noise
BORDER = 20  # a border is one part in so many of a side
NOISE_DEVIATIONS = 3.0  # standard deviations of the ground that are still ground
BLANK_DEVIATIONS = 6.0  # and that a character must exceed
BLANK_CONTRAST = 0.03  # of the ground's brightness, that a character must exceed too
DARK = 0.25  # of the range from black to white: a ground below it need not be lit paper
INK_LEVEL = 0.9  # the quantile of inked pixels that counts as full ink
EDGE = 0.3  # of the darkest ink: less is outside of the character's box
SPECK = 0.05  # of the largest part's area: a smaller part is dirt

NOTHING = "nothing is drawn"


class NoCharacterError(ImageError):
    """A picture in which no character is found; the message says what is seen instead."""


class Ground(NamedTuple):
    """What ink lies on.

    Args:
        levels: Grey levels of shape (H, W).
        sign: −1 where ink is darker, 1 where it is lighter.
        window: Pixels of the side of the window that found it; 0 for a smooth surface.
    """

    levels: Tensor
    sign: int
    window: int = 0

    def rise(self, image: Tensor) -> Tensor:
        """Return how much more ink than the ground an image of any size of it has."""
        return self.sign * _contrast(image, resize(self.levels, image.shape))


class Ink(NamedTuple):
    """The pixels that stand out from a ground.

    Args:
        rise: How much each pixel does, of shape (H, W).
        threshold: The least that counts as ink.
        level: That of full ink.
    """

    rise: Tensor
    threshold: float
    level: float

    @property
    def mask(self) -> Tensor:
        """Where there is ink."""
        return self.rise >= self.threshold


def smooth_ground(image: Tensor) -> Ground:
    """Fit a surface to what is not ink; its sign is that of what stands out from the border."""
    surface = _surface(image, _is_border(image))
    rise = _contrast(image, surface)
    # Ink is on one side of its ground; a cube lets few pixels far off outweigh many near it.
    sign = -1 if (rise**3).sum() < 0 else 1
    rise = sign * rise
    if rise.max() >= BLANK_CONTRAST:
        surface = _surface(image, rise < _otsu_threshold(rise))
    return Ground(surface, sign)


def closed_ground(image: Tensor, sign: int, window: int) -> Ground:
    """Take away what is narrower than an odd window and darker (sign −1) or lighter (sign 1)."""
    closed = sign * dilated(-dilated(-sign * image, window), window)
    # A maximum of noise lies above its mean.
    return Ground(closed + (image - closed).median(), sign, window)


def find_ink(image: Tensor, ground: Ground, *, darkest: bool = False) -> Ink:
    """Tell ink from its ground by a threshold, or the darker of two inks by a second one."""
    rise = ground.rise(image)
    if rise.max() < BLANK_CONTRAST:
        raise NoCharacterError(NOTHING)
    threshold = _otsu_threshold(rise)
    if darkest:
        threshold = _otsu_threshold(rise[rise >= threshold])
    is_ground = rise < threshold
    level = float(rise[~is_ground].quantile(INK_LEVEL))
    if level < max(BLANK_CONTRAST, BLANK_DEVIATIONS * _deviation(rise[is_ground])):
        raise NoCharacterError(NOTHING)
    return Ink(rise, threshold, level)


def shades(grey: Tensor, ground: Ground, threshold: float, level: float) -> Tensor:
    """Return how much ink each pixel has, from 0 for the ground and its noise to 1 for a level."""
    rise = ground.rise(grey)
    noise = min(NOISE_DEVIATIONS * _deviation(rise[rise < threshold]), level / 2)
    return ((rise - noise) / (level - noise)).clamp(0, 1)


def _contrast(image: Tensor, ground: Tensor) -> Tensor:
    """Return how much brighter an image is than its ground, in parts of the ground's brightness.

    So paper in the shade counts as much as paper in the light. The blackness of a screen is not
    divided by.
    """
    return (image - ground) / ground.clamp(min=DARK)


def shrink(image: Tensor, longest: int = SEARCH_SIDE) -> Tensor:
    """Scale (H, W) so that neither side is longer; a smaller image stays as it is."""
    scale = longest / max(image.shape)
    if scale >= 1:
        return image
    return resize(image, [max(1, round(side * scale)) for side in image.shape])


def resize(image: Tensor, shape: "torch.Size | list[int]") -> Tensor:
    """Scale (H, W) to another shape."""
    resized: Tensor = transforms.resize(image[None], list(shape), antialias=True)[0]
    return resized


def grown(mask: Tensor, reach: int) -> Tensor:
    """Widen a mask by so many pixels."""
    return dilated(mask.byte(), 2 * reach + 1) > 0


def dilated(image: Tensor, window: int) -> Tensor:
    """Return the maximum in a square window around each pixel, of an odd number of pixels."""
    # Several times as fast as max_pool2d, which notes the places too.
    wider = pad(image, [window // 2] * 4, value=image.min().item())
    return wider.unfold(0, window, 1).amax(-1).unfold(1, window, 1).amax(-1)


def _is_border(image: Tensor) -> Tensor:
    margin = max(1, min(image.shape) // BORDER)
    is_border = torch.ones(image.shape, dtype=torch.bool)
    is_border[margin:-margin, margin:-margin] = False
    return is_border


def _surface(image: Tensor, at: Tensor) -> Tensor:
    """Fit a quadratic surface to some pixels by least squares."""
    terms = _quadratic_terms(image.shape)
    # Few pixels leave some terms open, for which the default driver of torch 2.6 finds no fit.
    fit = torch.linalg.lstsq(terms[at], image[at][:, None], driver="gelsd")
    surface: Tensor = terms @ fit.solution
    return surface[..., 0]


def _quadratic_terms(shape: torch.Size) -> Tensor:
    """Return 1, x, y, x², xy and y² at each pixel, (H, W, 6), with x and y from −1 to 1."""
    y, x = torch.meshgrid(*((2 * torch.arange(n) + 1) / n - 1 for n in shape), indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1)


def _otsu_threshold(values: Tensor) -> float:
    """Return what divides values into two classes of the largest variance between them.

    Source: Otsu, A threshold selection method from gray-level histograms (1979).
    """
    if values.min() == values.max():
        return float(values.max())
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


def crop(ink: Tensor) -> Tensor:
    """Cut out the box of what is drawn, without dirt around it."""
    small = shrink(ink)
    is_drawn = _without_specks(small > EDGE * small.max())
    box = []
    for dim, side in enumerate(ink.shape):
        at = is_drawn.any(1 - dim).nonzero()
        scale = side / small.shape[dim]
        box.append(slice(int(at[0] * scale), math.ceil((at[-1] + 1) * scale)))
    return ink[tuple(box)]


def _without_specks(mask: Tensor) -> Tensor:
    """Keep the parts of a mask that are not tiny beside its largest part."""
    part = parts(mask)
    area = areas(part)
    return (area >= SPECK * area.max())[part]


def areas(part: Tensor) -> Tensor:
    """Count the pixels of each part by its number, and none of 0, which is outside."""
    area = part.flatten().bincount()
    area[0] = 0
    return area


def parts(mask: Tensor) -> Tensor:
    """Number the parts of a mask that touch by side or corner, and 0 outside of it."""
    part = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    while True:
        # Each pixel takes the highest number beside it, and then that of the pixel so numbered.
        wider = dilated(part, 3) * mask
        wider = wider.flatten()[wider - 1] * mask
        if wider.equal(part):
            return part
        part = wider


def stroke_width(ink: Tensor) -> float:
    """Estimate 2 · area / perimeter, with the total variation ∑|∇ink| for the perimeter.

    Source: Fleming and Rishel, An integral formula for total gradient variation (1960).
    """
    is_drawn = ink > ink.max() / 2  # for noise would count as many short perimeters
    padded = pad(is_drawn.float(), (1, 1, 1, 1))
    down, right = padded[1:, :-1] - padded[:-1, :-1], padded[:-1, 1:] - padded[:-1, :-1]
    return float(2 * padded.sum() / torch.hypot(down, right).sum())
