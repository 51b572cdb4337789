"""Make the images of a data set out of drawn characters: scaled and placed, grey levels and all.

pixels = normalize(read_image(path), FRAMES["mnist"])
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad
from torchvision.transforms.v2 import functional as transforms

from .. import _checks as checks
from .characters import find_characters, find_drawing
from .ink import crop, dilated, resize, stroke_width

__all__ = ["FRAMES", "Frame", "normalize"]


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
        strokes: Whether it is made of strokes that hang together, so that several in a picture
            can be told apart, and what is none; or else all that is drawn is one.
    """

    side: int
    box: tuple[int, int]
    by_mass: bool = False
    keeps_aspect: bool = True
    upright: bool = False
    stroke: float = 0.0
    block: int = 1
    strokes: bool = True

    @property
    def pixels(self) -> int:
        """The number of pixels of an image."""
        return (self.side // self.block) ** 2


FRAMES = {
    # LeCun et al., Gradient-based learning applied to document recognition (1998), section III.
    "mnist": Frame(28, (20, 20), by_mass=True, stroke=2.5),
    # Xiao et al., Fashion-MNIST (2017), section 2: the longest edge fills the image. How well it
    # does on pictures of a person's own has not been measured, nor whether KMNIST is the same.
    "fashion-mnist": Frame(28, (28, 28), strokes=False),
    "kmnist": Frame(28, (28, 28), strokes=False),
    # Garris et al., NIST form-based handprint recognition system (1994), made upright characters
    # of 32×20 in bitmaps of 32×32, which Alpaydin and Kaynak (1998) counted in blocks of 4×4.
    "digits": Frame(32, (32, 20), keeps_aspect=False, upright=True, stroke=4.0, block=4),
}


def normalize(grey: Tensor, frame: Frame) -> Tensor:
    """Crop each drawn character, scale it and place it as the images of a data set were.

    Args:
        grey: Grey levels of shape (H, W), floating point, with a range of about 1 from black to
            white; the ink may be lighter or darker than its ground.
        frame: Of the data set.

    Returns:
        Float32 of shape (characters, (side / block)²), from 0 for the ground to 1 for full ink,
        the characters from left to right.

    Raises:
        TypeError: Grey is no tensor of a floating-point dtype.
        ValueError: It has no shape (H, W), or a level is not finite.
        NoCharacterError: Nothing is drawn, or what is seen is no row of characters.

    Example:
        >>> paper = torch.ones(100, 60)
        >>> paper[20:80, 10:25] = 0.2
        >>> image = normalize(paper, FRAMES["mnist"]).view(28, 28)
        >>> image[14, 11:18].round()
        tensor([0., 1., 1., 1., 1., 1., 0.])
        >>> image.any(1).sum()
        tensor(20)
    """
    checks.floating("grey", grey)
    if grey.dim() != 2 or grey.numel() == 0:
        raise ValueError(f"grey must have a shape (H, W) of pixels, got {tuple(grey.shape)}")
    if not grey.isfinite().all():
        raise ValueError("grey must hold finite numbers, got others")
    find = find_characters if frame.strokes else find_drawing
    return torch.stack([_image(ink, frame) for ink in find(grey.float())])


def _image(ink: Tensor, frame: Frame) -> Tensor:
    if frame.upright:
        ink = _stand_up(ink)
    # The second look sees only the character, and so in finer detail.
    return _place(crop(ink), frame)


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
    ink = resize(ink, shape)
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
    reach = int((stroke - stroke_width(ink)) / 2)
    if reach < 1:
        return ink
    return dilated(pad(ink, [reach] * 4), 2 * reach + 1)
