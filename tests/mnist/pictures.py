"""Pictures of digits like those of a camera: paper, desks, shadows, lines, and no digit at all.

    sheet = picture("hard shadow", [digit], generator)

A picture is the light that its ground and its ink reflect, blurred by a lens, with noise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import gaussian_blur, pil_to_tensor

Map = Tensor  # (H, W), mostly from 0 to 1


def between(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=random).item()


def coordinates(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """y and x of each pixel, in parts of the shorter side and from the middle."""
    y, x = torch.meshgrid(*((torch.arange(n) - (n - 1) / 2) for n in shape), indexing="ij")
    return y / min(shape), x / min(shape)


def beyond(shape: Sequence[int], degrees: float, offset: float, softness: float = 0.002) -> Map:
    """Mark the points whose distance from the middle in a direction is above the offset."""
    y, x = coordinates(shape)
    angle = math.radians(degrees)
    distance = math.cos(angle) * x + math.sin(angle) * y - offset
    return (distance / softness).sigmoid()


def clouds(shape: Sequence[int], power: float, random: torch.Generator) -> Map:
    """Noise at all scales, with amplitudes of frequency ** −power, from 0 to 1."""
    white = torch.fft.rfft2(torch.randn(tuple(shape), generator=random))
    fy, fx = torch.fft.fftfreq(shape[0])[:, None], torch.fft.rfftfreq(shape[1])
    frequency = torch.hypot(fy, fx)
    frequency[0, 0] = math.inf
    noise = torch.fft.irfft2(white * frequency**-power, s=tuple(shape))
    return (noise - noise.min()) / (noise.max() - noise.min())


# Grounds: each function returns the part of the light that the ground reflects.


def desk_around(shape: Sequence[int], random: torch.Generator) -> Map:
    tilt = between(-12, 12, random)
    sides = (
        beyond(shape, tilt + 90 * k, between(0.36, 0.44, random) * shape[k % 2 == 0] / min(shape))
        for k in range(4)
    )
    return on_desk(torch.stack(list(sides)).amax(0), random)


def desk_at_a_side(shape: Sequence[int], random: torch.Generator) -> Map:
    side = 90 * int(between(0, 4, random))
    return on_desk(beyond(shape, side + between(-12, 12, random), 0.4), random)


def desk_in_a_corner(shape: Sequence[int], random: torch.Generator) -> Map:
    corner = 45 + 90 * int(between(0, 4, random))
    offset = between(0.42, 0.55, random) * math.hypot(*shape) / min(shape) / math.sqrt(2)
    return on_desk(beyond(shape, corner + between(-15, 15, random), offset), random)


def on_desk(desk: Map, random: torch.Generator) -> Map:
    wood = between(0.2, 0.6, random) * (0.85 + 0.15 * clouds(desk.shape, 1, random))
    return 1 - desk * (1 - wood)


def shadow(softness: float) -> Callable[[Sequence[int], torch.Generator], Map]:
    def cast(shape: Sequence[int], random: torch.Generator) -> Map:
        depth = between(0.25, 0.65, random)
        edge = between(-0.25, 0.25, random)
        return 1 - depth * beyond(shape, between(0, 360, random), edge, softness)

    return cast


def ruled(shape: Sequence[int], random: torch.Generator) -> Map:
    y, x = coordinates(shape)
    spacing, width = between(0.1, 0.2, random), between(0.002, 0.006, random)
    along = y + math.tan(math.radians(between(-3, 3, random))) * x + between(0, 1, random)
    distance = (along / spacing - (along / spacing).round()).abs() * spacing
    return 1 - between(0.1, 0.35, random) * (-((distance / width) ** 2)).exp()


def plain(shape: Sequence[int], random: torch.Generator) -> Map:
    return torch.ones(tuple(shape))


GROUNDS = {
    "plain": plain,
    "light on dark": plain,
    "several": plain,
    "several on ruled paper": ruled,
    "desk around": desk_around,
    "desk at a side": desk_at_a_side,
    "desk in a corner": desk_in_a_corner,
    "hard shadow": shadow(0.002),
    "soft shadow": shadow(0.06),
    "ruled": ruled,
}
BLANK = {"blank": plain, "blank in a shadow": shadow(0.01), "blank on a desk": desk_around}
NO_DIGIT = (*BLANK, "words", "landscape", "face")
WORDS = ("HELLO", "the", "word", "Torch", "quick brown", "No. 5", "cat\ndog", "illi", "PAID")


def picture(kind: str, digits: Sequence[Map], random: torch.Generator) -> Map:
    """Return the grey levels of a picture; a kind in NO_DIGIT has no use for the digits."""
    shape = [int(between(240, 480, random)) for _ in range(2)]
    if kind == "landscape":
        return photographed(clouds(shape, between(0.8, 2.0, random), random), random)
    if kind == "face":
        return photographed(lit(face(shape, random), random), random)
    if kind == "words":
        return photographed(lit(1 - printed(shape, random), random), random)
    if kind in BLANK:
        return photographed(lit(BLANK[kind](shape, random), random), random)
    ground = GROUNDS[kind](shape, random)
    ink = written(digits, shape, random) * between(0.55, 0.9, random)
    sheet = lit(ground * (1 - ink), random)
    return photographed(1 - sheet if kind == "light on dark" else sheet, random)


def printed(shape: Sequence[int], random: torch.Generator) -> Map:
    """Print a word in a font of Pillow's own."""
    text = WORDS[int(between(0, len(WORDS), random))]
    image = Image.new("L", (shape[1], shape[0]))
    font = ImageFont.load_default(between(20, 70, random))
    place = (0.15 * shape[1], 0.3 * shape[0])
    ImageDraw.Draw(image).text(place, text, fill=255, font=font)
    return pil_to_tensor(image)[0] / 255 * between(0.55, 0.9, random)


def written(digits: Sequence[Map], shape: Sequence[int], random: torch.Generator) -> Map:
    """Write digits in a row, somewhere near the middle."""
    ink = torch.zeros(tuple(shape))
    # A digit's own margins keep it away from the next one.
    side = min(between(0.35, 0.6, random) * min(shape), 0.85 * shape[1] / len(digits))
    top = (shape[0] - side) / 2 + between(-0.06, 0.06, random) * shape[0]
    left = (shape[1] - side * len(digits)) / 2 + between(-0.04, 0.04, random) * shape[1]
    for k, digit in enumerate(digits):
        big = drawn(digit, round(side))
        y = max(0, round(top + between(-0.05, 0.05, random) * side))
        x = max(0, round(left + k * side))
        room = ink[y : y + len(big), x : x + len(big)]
        torch.maximum(room, big[: room.shape[0], : room.shape[1]], out=room)
    return ink


def face(shape: Sequence[int], random: torch.Generator) -> Map:
    """A face with its features, on shoulders, before something out of focus."""
    y, x = coordinates(shape)
    x, y = x - between(-0.1, 0.1, random), y - between(-0.1, 0.1, random)
    scene = between(0.2, 0.8, random) + 0.3 * (clouds(shape, 2.0, random) - 0.5)

    def paint(middle: tuple[float, float], axes: tuple[float, float], softness: float) -> None:
        distance = torch.hypot((y - middle[0]) / axes[0], (x - middle[1]) / axes[1])
        over = ((1 - distance) / softness).sigmoid()
        scene.lerp_(torch.tensor(between(0.1, 0.9, random)), over)

    size = between(0.8, 1.2, random)
    paint((0.55, 0.0), (0.3 * size, 0.4), 0.03)  # shoulders
    paint((-0.05, 0.0), (0.29 * size, 0.22 * size), 0.05)  # hair
    paint((0.0, 0.0), (0.24 * size, 0.18 * size), 0.05)  # face
    for side in (-1, 1):
        paint((-0.04 * size, 0.07 * side * size), (0.015 * size, 0.03 * size), 0.3)  # eye
        paint((-0.08 * size, 0.07 * side * size), (0.008 * size, 0.04 * size), 0.3)  # brow
    paint((0.03 * size, 0.0), (0.05 * size, 0.015 * size), 0.5)  # nose
    paint((0.12 * size, 0.0), (0.015 * size, 0.06 * size), 0.3)  # mouth
    return scene


def drawn(digit: Map, side: int) -> Map:
    """Enlarge the pixels of a digit, with edges as sharp as those of a pen."""
    big = interpolate(digit[None, None], (side, side), mode="bicubic", align_corners=False)[0, 0]
    return ((big - 0.5) * 2 + 0.5).clamp(0, 1)


def lit(sheet: Map, random: torch.Generator) -> Map:
    y, x = coordinates(sheet.shape)
    slope_y, slope_x = between(-0.15, 0.15, random), between(-0.15, 0.15, random)
    return sheet * between(0.7, 0.95, random) * (1 + slope_y * y + slope_x * x)


def photographed(scene: Map, random: torch.Generator) -> Map:
    blurred = gaussian_blur(scene[None], [5, 5], [between(0.4, 1.2, random)])[0]
    noise = between(0.002, 0.02, random) * torch.randn(scene.shape, generator=random)
    return (blurred + noise).clamp(0, 1)
