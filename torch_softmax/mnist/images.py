"""Read a picture of any kind as grey levels that tell its colours apart."""

import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from .._checks import UserError

__all__ = ["FORMATS", "ImageError", "read_image"]

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


class ImageError(UserError):
    """A picture that can't be used; the message is one line."""


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
