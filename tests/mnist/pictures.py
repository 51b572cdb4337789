"""Pictures of digits as a camera takes them: paper, desks, shadows, lines, and no digit at all.

    sheet = picture("shadow, hard", [digit], generator)

A picture is what its ground and its ink reflect, times the light that falls on it, blurred by a
lens, with noise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import gaussian_blur

Map = Tensor  # (H, W), mostly from 0 to 1


def between(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=random).item()


def coordinates(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """y and x of each pixel, in parts of the shorter side and from the middle."""
    y, x = torch.meshgrid(*((torch.arange(n) - (n - 1) / 2) for n in shape), indexing="ij")
    return y / min(shape), x / min(shape)


def beyond(shape: Sequence[int], degrees: float, offset: float, softness: float = 0.002) -> Map:
    """Where a point is farther from the middle in a direction than the offset."""
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


# What the paper lies on, is lit by and is ruled with: each returns a factor of the light reflected.


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
    "several, ruled": ruled,
    "several, shadow, hard": shadow(0.002),
    "desk around": desk_around,
    "several, desk around": desk_around,
    "desk at a side": desk_at_a_side,
    "desk in a corner": desk_in_a_corner,
    "shadow, hard": shadow(0.002),
    "shadow, soft": shadow(0.06),
    "ruled": ruled,
}
BLANK = {"blank": plain, "blank, shadow": shadow(0.01), "blank, desk around": desk_around}
NOTHING = (*BLANK, "landscape", "portrait")
KINDS = (*GROUNDS, *NOTHING)


def picture(kind: str, digits: Sequence[Map], random: torch.Generator) -> Map:
    """Return the grey levels of a picture; of what shows nothing, the digits are not used."""
    shape = [int(between(240, 480, random)) for _ in range(2)]
    if kind == "landscape":
        return photographed(clouds(shape, between(0.8, 2.0, random), random), random)
    if kind == "portrait":
        return photographed(lit(portrait(shape, random), random), random)
    if kind in BLANK:
        return photographed(lit(BLANK[kind](shape, random), random), random)
    ground = GROUNDS[kind](shape, random)
    # A row must not run off the sheet.
    width = 0.6 if "desk around" in kind else 0.85
    ink = written(digits, shape, width, random) * between(0.55, 0.9, random)
    sheet = lit(ground * (1 - ink), random)
    return photographed(1 - sheet if kind == "light on dark" else sheet, random)


def written(
    digits: Sequence[Map], shape: Sequence[int], width: float, random: torch.Generator
) -> Map:
    """Write digits in a row, somewhere near the middle, in a part of the width at the most."""
    ink = torch.zeros(tuple(shape))
    # A digit's own margins keep it away from the next one.
    side = between(0.35, 0.6, random) * min(shape)
    side = min(side, width * shape[1] / len(digits))
    left = (shape[1] - side * len(digits)) / 2
    top = (shape[0] - side) / 2
    top += between(-0.06, 0.06, random) * shape[0]
    left += between(-0.04, 0.04, random) * shape[1]
    for k, digit in enumerate(digits):
        big = drawn(digit, round(side))
        y = round(top + between(-0.05, 0.05, random) * side)
        x = round(left + k * side)
        y, x = max(0, y), max(0, x)
        room = ink[y : y + len(big), x : x + len(big)]
        torch.maximum(room, big[: room.shape[0], : room.shape[1]], out=room)
    return ink


def portrait(shape: Sequence[int], random: torch.Generator) -> Map:
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
