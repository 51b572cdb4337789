"""Find the characters of a picture, from left to right, or say why there are none to be read.

A character is a connected part of the ink that is made of strokes: much longer than wide, with an
edge all around it against the ground, whole inside the picture, and clear of what the border cuts
off. It is looked for on one ground after the other (see `mnist.ink`): first the smooth one, then
those of ever smaller windows, dark ink and light. The first on which all that is seen makes a row
of characters is believed. Where there is none, the picture is refused: a classifier is sure of
anything, and its own probability can't tell a desk from an 8.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ink import (
    DARK,
    INK_LEVEL,
    NOTHING,
    SPECK,
    Ground,
    Ink,
    NoCharacterError,
    areas,
    closed_ground,
    crop,
    dilated,
    find_ink,
    grown,
    parts,
    resize,
    shades,
    shrink,
    smooth_ground,
    stroke_width,
)

__all__ = ["NoCharacterError", "find_characters", "find_drawing"]

# Chosen on synthetic pictures, of which tests/mnist/pictures.py makes others.
WINDOWS = (2, 4, 8, 12)  # the shorter side is so many windows long
MOST = 10  # characters in a picture
STROKE = 0.28  # of its length: the mean width of a character's strokes at the most
BLOT = 0.44  # of its length: the width of its broadest place at the most
HOLE = 0.003  # of its area: a smaller hole is dirt
FLAT = 2.0  # times its height: the width of a character at the most
SHORT = 0.4  # of the tallest character: the least height of another
SEEN = 2 / 3  # of the edge around it that must show the contrast of ink
SEEN_IN_WINDOW = 0.95  # the same on the ground of a window, which takes faces for ground too
DIRT = 0.25  # of the ink's area: what else may stand out
GAP = 0.15  # of a character's size: pieces of it that are nearer belong to it


def find_drawing(grey: Tensor) -> list[Tensor]:
    """Return the ink of all that is drawn in a picture as one, whatever it is.

    Args:
        grey: Grey levels of shape (H, W).

    Returns:
        A list of one tensor: ink from 0 to 1, cropped to its box.

    Raises:
        NoCharacterError: Nothing is drawn.
    """
    small = shrink(grey)
    ground = smooth_ground(small)
    ink = find_ink(small, ground)
    return [crop(shades(grey, ground, ink.threshold, ink.level))]


def find_characters(grey: Tensor) -> list[Tensor]:
    """Return the ink of each character of a row, from left to right.

    Args:
        grey: Grey levels of shape (H, W).

    Returns:
        For each character its ink from 0 to 1, cropped to its box.

    Raises:
        NoCharacterError: What is seen is no row of characters.
    """
    small = shrink(grey)
    reasons = []
    for grounds in _grounds(small):
        rows = []
        for ground in grounds:
            # Ruled lines are paler than ink; in a window, the darkest may lie within a stroke.
            for darkest in (False,) if ground.window else (False, True):
                try:
                    rows.append(_Row.find(small, ground, darkest))
                    break
                except NoCharacterError as error:
                    reasons.append(str(error))
        if rows:
            # What is light within a dark character, and dark within a light one, is smaller.
            return max(rows, key=lambda row: row.extent).cut_out(grey)
    raise NoCharacterError(next((why for why in reasons if why != NOTHING), NOTHING))


def _grounds(small: Tensor) -> Iterator[list[Ground]]:
    yield [smooth_ground(small)]
    for windows in WINDOWS:
        window = min(small.shape) // windows // 2 * 2 + 1
        yield [closed_ground(small, sign, window) for sign in (-1, 1)]


@dataclass
class _Part:
    """Pixels that hang together, or the pieces of a character."""

    mask: Tensor

    def __post_init__(self) -> None:
        rows, columns = (self.mask.any(dim).nonzero() for dim in (1, 0))
        self.top, self.bottom = int(rows[0]), int(rows[-1]) + 1
        self.left, self.right = int(columns[0]), int(columns[-1]) + 1
        self.height, self.width = self.bottom - self.top, self.right - self.left
        self.size = max(self.height, self.width)
        self.area = int(self.mask.sum())

    @cached_property
    def stroke(self) -> float:
        """How wide its strokes are, on average."""
        return stroke_width(self.mask.float())

    def around(self, margin: int) -> tuple[slice, slice]:
        """Its box, and so many pixels around it."""
        return (
            slice(max(0, self.top - margin), self.bottom + margin),
            slice(max(0, self.left - margin), self.right + margin),
        )

    def holds(self, piece: "_Part") -> bool:
        """Whether a smaller part is a piece of the same character, as the bar of a 5 is."""
        down = max(self.top, piece.top) - min(self.bottom, piece.bottom)
        across = max(self.left, piece.left) - min(self.right, piece.right)
        is_piece = -across > 0.3 * piece.width or piece.height < self.height / 2
        return is_piece and max(down, across) < GAP * self.size


@dataclass
class _Row:
    """Characters from left to right, and the ground and the ink in which they were found."""

    ground: Ground
    ink: Ink
    characters: list[_Part]

    @classmethod
    def find(cls, small: Tensor, ground: Ground, darkest: bool) -> "_Row":
        """Find a row on a ground, or raise what speaks against it."""
        ink = find_ink(small, ground, darkest=darkest)
        part = parts(ink.mask)
        is_cut = torch.zeros(int(part.max()) + 1, dtype=torch.bool)
        is_cut[torch.cat([part[0], part[-1], part[:, 0], part[:, -1]])] = True
        is_cut[0] = False
        area = areas(part) * ~is_cut
        if area.max() == 0:
            raise NoCharacterError("all that is drawn touches the border of the picture")
        numbers = (area >= SPECK * area.max()).nonzero()[:, 0].tolist()
        if len(numbers) > 3 * MOST:  # pieces
            raise NoCharacterError(f"{len(numbers)} parts are too many for characters")
        characters = _join([_Part(part == number) for number in numbers])
        if len(characters) > MOST:
            raise NoCharacterError(f"{len(characters)} parts are too many for characters")
        least = SEEN_IN_WINDOW if ground.window else SEEN
        for character in characters:
            _check_strokes(character, ink.mask, ground.window)
            if _seen_edge(small, ground, character, ink) < least:
                raise NoCharacterError("what is drawn fades into its ground")
            if is_cut[part[character.around(character.height // 2)]].any():
                raise NoCharacterError("what is drawn is too near to what the border cuts off")
        _check_row(characters)
        drawn = torch.stack([character.mask for character in characters]).any(0)
        is_dirt = (ink.rise.abs() > 0.3 * ink.level) & ~grown(drawn, 3) & ~is_cut[part]
        if is_dirt.sum() > DIRT * drawn.sum():
            raise NoCharacterError("there is too much beside what is drawn")
        return cls(ground, ink, characters)

    @property
    def extent(self) -> int:
        """The area of the box of all."""
        every = _Part(torch.stack([character.mask for character in self.characters]).any(0))
        return every.height * every.width

    def cut_out(self, grey: Tensor) -> list[Tensor]:
        """Return the ink of each character in a picture of any size."""
        drawn = torch.stack([character.mask for character in self.characters]).any(0)
        inks = []
        for character in self.characters:
            others = drawn & ~character.mask
            near = grown(character.mask, 2 + int(character.stroke / 2)) & ~others
            level = float(self.ink.rise[character.mask].quantile(INK_LEVEL))
            ink = shades(grey, self.ground, self.ink.threshold, level)
            inks.append(crop(ink * (resize(near.float(), grey.shape) > 0.5)))
        return inks


def _join(pieces: list[_Part]) -> list[_Part]:
    """Join the pieces of characters, and sort these from left to right."""
    whole: list[_Part] = []
    for piece in sorted(pieces, key=lambda piece: -piece.area):
        for k, part in enumerate(whole):
            if part.holds(piece):
                whole[k] = _Part(part.mask | piece.mask)
                break
        else:
            whole.append(piece)
    return sorted(whole, key=lambda part: part.left)


def _check_strokes(part: _Part, ink: Tensor, window: int) -> None:
    """Raise unless a part is long and thin, and fits the window that it was found by."""
    stroke = part.stroke
    if stroke > STROKE * part.size or _broadest(part.mask) > BLOT * part.size:
        raise NoCharacterError("what is drawn is too broad for a stroke")
    if part.width > FLAT * part.height:
        raise NoCharacterError("what is drawn is too flat for a character")
    if _is_sheet(part, ink):
        raise NoCharacterError("what is seen is a sheet, and nothing to be read on it")
    # A narrower window would see pieces of a stroke, a wider one the edge of something else.
    if window and not 1.5 * stroke < window <= 1.5 * part.height:
        raise NoCharacterError("what is drawn has strokes of many widths")


def _broadest(mask: Tensor) -> int:
    """Return the side of the largest square in a mask, by peeling off its edge."""
    left = pad(mask.float(), (1, 1, 1, 1))
    layers = 0
    while left.any():
        left = -dilated(-left, 3)
        layers += 1
    return 2 * layers


def _is_sheet(part: _Part, ink: Tensor) -> bool:
    """Whether a part of the ink is a sheet on a desk, whose holes are what is written on it.

    Filled in, it is too broad for strokes; so may a 0 be, but the holes of a character are broad
    beside its strokes, and two at the most.
    """
    ground = parts(~pad(part.mask, (1, 1, 1, 1)))
    filled = ground != ground[0, 0]
    if stroke_width(filled.float()) <= STROKE * part.size:
        return False
    area = areas(ground * filled)
    numbers = (area >= HOLE * part.area).nonzero()[:, 0].tolist()
    # Paper within a 0 is no part of the 0.
    holes = [_Part((ground[1:-1, 1:-1] == number) & ~ink) for number in numbers]
    return len(holes) > 2 or any(
        hole.size >= part.size / 16 and hole.stroke < min(part.stroke / 2, STROKE * hole.size)
        for hole in holes
    )


def _seen_edge(small: Tensor, ground: Ground, part: _Part, ink: Ink) -> float:
    """Return how much of a part's edge is a step of at least half the level of its ink.

    The step may take half the width of a stroke, as that of a blurred one does.
    """
    reach = max(2, round(0.6 * part.stroke))
    ring = grown(part.mask, reach + 1) & ~grown(part.mask, reach - 1) & ~ink.mask
    shade = ground.sign * small
    window = 2 * reach + 5
    nearest = dilated(shade.masked_fill(~part.mask, -math.inf), window)
    step = (nearest - shade) / ground.levels.clamp(min=DARK)
    return float((step[ring] >= ink.level / 2).float().mean())


def _check_row(characters: list[_Part]) -> None:
    """Raise unless characters are of like height, and stand beside each other."""
    tallest = max(character.height for character in characters)
    if any(character.height < SHORT * tallest for character in characters):
        raise NoCharacterError("what is drawn is of very different heights")
    for a, b in pairwise(characters):
        together = min(a.bottom, b.bottom) - max(a.top, b.top)
        overlap = a.right - b.left
        if together < 0.3 * min(a.height, b.height) or overlap > 0.5 * min(a.width, b.width):
            raise NoCharacterError("what is drawn is no single row of characters")
