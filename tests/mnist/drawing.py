"""A drawn 7, and how alike two images are."""

import math

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import pil_to_tensor

from torch_softmax.mnist.frames import FRAMES, normalize

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
    (pixels,) = normalize(image, frame)
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
