"""Draws what the demo shop's items look like: garments.

A picture is drawn in four steps: outline (type and cut) -> fabric (colour and pattern) -> pose ->
background. The garment is drawn at twice its size, since Pillow's polygons are not antialiased.
Outlines live in a unit square, y downwards. The same generator state gives the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Ints = npt.NDArray[np.int64]
Texts = npt.NDArray[np.str_]
Points = list[tuple[float, float]]
Pixels = npt.NDArray[Any]  # floats
Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "black": (36, 36, 40),
    "white": (244, 243, 240),
    "grey": (142, 143, 146),
    "red": (205, 30, 38),
    "orange": (226, 122, 30),
    "yellow": (242, 220, 52),
    "green": (46, 140, 72),
    "blue": (38, 84, 190),
    "purple": (122, 54, 176),
    "pink": (240, 118, 178),
}
PATTERNS = ("plain", "stripes", "checks", "dots")
# Codes of a colour and a pattern nobody has a taste for: that of an image which could not be read.
NO_COLOUR, NO_PATTERN = len(COLOURS), len(PATTERNS)

_BACKDROPS: tuple[Rgb, ...] = (
    (225, 220, 212),
    (196, 160, 116),
    (120, 84, 58),
    (112, 118, 124),
    (170, 190, 200),
    (150, 40, 44),
    (64, 78, 70),
    (232, 214, 170),
)


@dataclass(frozen=True)
class Items:
    """Holds all items that the shop ever has; arrays `[items]`.

    `colour` and `pattern` are codes: positions in COLOURS and PATTERNS, or NO_COLOUR and
    NO_PATTERN. `fault` is "" for a good image, "missing", or how its file is broken.
    """

    item_id: Ints
    image_uri: Texts
    category: Texts
    colour: Ints
    pattern: Ints
    fault: Texts


@dataclass(frozen=True)
class Outline:
    """Describes the outline that a type and a cut give.

    `parts` are filled with fabric, `shades` with its darker tone, `seams` are lines.
    """

    parts: list[Points]
    shades: list[Points]
    seams: list[Points]


# ---------------------------------------------------------------------------- outline


def _mirrored(half: Points) -> Points:
    """Closes the outline of a right half: (distance from the vertical axis, y), downwards."""
    return [(0.5 + x, y) for x, y in half] + [(0.5 - x, y) for x, y in reversed(half)]


def _both_sides(line: Points) -> list[Points]:
    return [[(0.5 + x, y) for x, y in line], [(0.5 - x, y) for x, y in line]]


def _arc(
    centre: tuple[float, float], radii: tuple[float, float], start: float, stop: float
) -> Points:
    """Returns points on an ellipse from angle `start` to `stop`, in turns.

    0 points right and 0.25 down.
    """
    turns = np.linspace(start, stop, 25) * math.tau
    return [
        (centre[0] + radii[0] * math.cos(turn), centre[1] + radii[1] * math.sin(turn))
        for turn in turns
    ]


def _dress(length: float, width: float) -> Outline:
    hem, flare, waist = 0.62 + 0.29 * length, 0.15 + 0.2 * width, 0.115 + 0.03 * width
    half = [(0, 0.22), (0.055, 0.07), (0.1, 0.07), (0.115, 0.2), (0.165, 0.27), (waist, 0.44)]
    belt = _mirrored([(waist + 0.01, 0.425), (waist + 0.01, 0.455)])
    pleats = [[(0.3 * waist, 0.47), (0.35 * flare, hem)], [(0.7 * waist, 0.47), (0.7 * flare, hem)]]
    seams = [line for pleat in pleats for line in _both_sides(pleat)] if width > 0.5 else []
    return Outline([_mirrored([*half, (flare, hem), (0, hem + 0.03)])], [belt], seams)


def _t_shirt(length: float, width: float) -> Outline:
    body, hem = 0.16 + 0.08 * width, 0.64 + 0.22 * length
    half = [
        (0.08, 0.16),
        (body + 0.02, 0.2),
        (body + 0.19, 0.37),
        (body + 0.11, 0.45),
        (body, 0.36),
    ]
    neck = _arc((0.5, 0.16), (0.08, 0.065), 0, 0.5)
    cuffs = _both_sides([(body + 0.165, 0.35), (body + 0.085, 0.43)])
    hem_seam = _mirrored([(body + 0.01, hem - 0.03)])
    return Outline([_mirrored([*half, (body + 0.015, hem)])], [neck], [*cuffs, hem_seam])


def _trousers(length: float, width: float) -> Outline:
    hem, waist, ankle = 0.46 + 0.46 * length, 0.145 + 0.02 * width, 0.135 + 0.13 * width
    hip, inner = waist + 0.03 + 0.03 * width, 0.05 - 0.02 * width
    half = [
        (0, 0.08),
        (waist, 0.08),
        (hip, 0.26),
        (ankle, hem),
        (inner, hem),
        (0.01, 0.36),
        (0, 0.35),
    ]
    waistband = _mirrored([(waist + 0.01, 0.07), (waist + 0.01, 0.115)])
    pockets = _both_sides([(waist - 0.05, 0.13), (hip, 0.21)])
    creases = _both_sides([(0.6 * hip, 0.3), ((ankle + inner) / 2, hem)])
    return Outline([_mirrored(half)], [waistband], [*pockets, *creases, [(0.5, 0.12), (0.5, 0.3)]])


def _skirt(length: float, width: float) -> Outline:
    hem, flare = 0.5 + 0.38 * length, 0.15 + 0.21 * width
    half = [(0, 0.18), (0.12, 0.18), (0.155 + 0.01 * width, 0.32), (flare, hem), (0, hem + 0.03)]
    waistband = _mirrored([(0.14, 0.17), (0.14, 0.225)])
    folds = (0.25, 0.55, 0.8) if width > 0.5 else (0.45,)
    pleats = [side for at in folds for side in _both_sides([(0.12 * at, 0.25), (flare * at, hem)])]
    return Outline([_mirrored(half)], [waistband], pleats)


def _hat(length: float, width: float) -> Outline:
    top, crown, brim = 0.4 - 0.18 * length, 0.17 + 0.03 * width, 0.24 + 0.18 * width
    dome = [
        *_arc((0.5, top + 0.14), (crown, 0.14), 0.5, 1.0),
        (0.51 + crown, 0.64),
        (0.49 - crown, 0.64),
    ]
    rim = _arc((0.5, 0.64), (brim, 0.05 + 0.03 * width), 0, 1)
    ribbon = [
        (0.49 - crown, 0.56),
        (0.51 + crown, 0.56),
        (0.51 + crown, 0.625),
        (0.49 - crown, 0.625),
    ]
    crease = _arc((0.5, top + 0.05), (0.09, 0.04), 0.05, 0.45)
    return Outline([dome, rim], [ribbon], [crease])


def _jacket(length: float, width: float) -> Outline:
    body, hem = 0.16 + 0.07 * width, 0.6 + 0.3 * length
    half = [
        (0.075, 0.11),
        (body + 0.02, 0.16),
        (body + 0.18, 0.66),
        (body + 0.095, 0.69),
        (body, 0.36),
    ]
    neck = [(0.425, 0.11), (0.575, 0.11), (0.5, 0.3)]
    lapels = _both_sides([(0.075, 0.11), (0.13, 0.22), (0.09, 0.25), (0, 0.36)])
    pockets = _both_sides([(0.06, hem - 0.13), (0.14, hem - 0.14)])
    cuffs = _both_sides([(body + 0.165, 0.61), (body + 0.08, 0.64)])
    buttons = [_arc((0.53, y), (0.012, 0.012), 0, 1) for y in np.arange(0.4, hem - 0.05, 0.09)]
    front = [(0.5, 0.3), (0.5, hem)]
    return Outline(
        [_mirrored([*half, (body + 0.02, hem)])],
        [neck, *buttons],
        [*lapels, *pockets, *cuffs, front],
    )


def _charger(length: float, width: float) -> Outline:
    side, bottom = 0.1 + 0.05 * width, 0.58 + 0.08 * length
    prongs = [[(x, 0.22), (x + 0.035, 0.22), (x + 0.035, 0.35), (x, 0.35)] for x in (0.425, 0.54)]
    wave = [
        (0.5 + 0.09 * math.sin(9 * (y - bottom)), y) for y in np.linspace(bottom - 0.01, 0.95, 20)
    ]
    cable = [*((x - 0.016, y) for x, y in wave), *((x + 0.016, y) for x, y in reversed(wave))]
    lamp = _arc((0.5, 0.46), (0.02, 0.02), 0, 1)
    return Outline([_mirrored([(side, 0.34), (side, bottom)]), *prongs, cable], [*prongs, lamp], [])


_OUTLINES: dict[str, Callable[[float, float], Outline]] = {
    "dress": _dress,
    "t-shirt": _t_shirt,
    "trousers": _trousers,
    "skirt": _skirt,
    "hat": _hat,
    "jacket": _jacket,
    "charger": _charger,
}
TYPES = tuple(_OUTLINES)


# ---------------------------------------------------------------------------- fabric


def _grid(side: int) -> npt.NDArray[np.float32]:
    """Returns the y and the x of each pixel, 0..1: [2, side, side]."""
    grid: npt.NDArray[np.float32] = np.indices((side, side), dtype=np.float32) / np.float32(side)
    return grid


def _accent_share(pattern: str, side: int, rng: np.random.Generator) -> Pixels:
    """Returns how much of the second colour each pixel takes, 0..1, [side, side].

    It is under half in all.
    """
    y, x = _grid(side)
    along, across = (y, x) if rng.random() < 0.5 else (x, y)
    period = rng.uniform(0.07, 0.11)
    rows, columns = np.floor(along / period), along / period % 1
    share: Pixels = np.zeros((side, side))
    if pattern == "stripes":
        share = 1.0 * (columns < 0.42)
    elif pattern == "checks":
        share = 0.5 * (columns < 0.42) + 0.5 * (across / period % 1 < 0.42)
    elif pattern == "dots":
        # Every second row of dots is shifted by half a period.
        sideways = (across / period + rows / 2) % 1
        share = 1.0 * (np.hypot(columns - 0.5, sideways - 0.5) < 0.31)
    return share


def _fabric(colour: str, pattern: str, side: int, rng: np.random.Generator) -> Pixels:
    """Makes cloth of a colour and pattern with soft folds: [side, side, 3]."""
    base = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 5, size=3), 0, 255)
    accent = np.array((40, 44, 60) if base.mean() > 150 else (240, 238, 232))
    share = _accent_share(pattern, side, rng)[..., None]
    y, x = _grid(side)
    folds = np.sin(rng.uniform(10, 18) * x + rng.uniform(-4, 4) * y + rng.uniform(0, math.tau))
    cloth: Pixels = (base + (accent - base) * share) * (0.95 + 0.06 * folds)[..., None]
    return cloth


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _garment(outline: Outline, fabric: Pixels) -> Image.Image:
    """Cuts the outline out of the fabric, RGBA, as large as the fabric."""
    side = len(fabric)
    cloth = _image(fabric)
    mean = fabric.mean(axis=(0, 1))
    # Seams of a dark cloth have to be lighter than it to be seen.
    tone = tuple(int(part) for part in (mean * 0.55 if mean.mean() > 70 else mean + 55))
    mask = Image.new("L", (side, side))
    for part in outline.parts:
        ImageDraw.Draw(mask).polygon([(x * side, y * side) for x, y in part], fill=255)
    pen = ImageDraw.Draw(cloth)
    for shade in outline.shades:
        pen.polygon([(x * side, y * side) for x, y in shade], fill=tone)
    for seam in outline.seams:
        pen.line([(x * side, y * side) for x, y in seam], fill=tone, width=max(1, side // 110))
    # Blur and threshold round the corners, as cloth does.
    soft = mask.filter(ImageFilter.GaussianBlur(side / 90))
    cloth.paste(tone, mask=soft.point(lambda value: 255 * (value < 180)))
    cloth.putalpha(soft.point(lambda value: 255 * (value > 127)))
    return cloth


# ---------------------------------------------------------------------------- pose and background


def _posed(garment: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Halves the garment's size, turns it by up to 18 degrees, scales and shifts it a little."""
    side, angle = garment.width, math.radians(rng.uniform(-18, 18))
    left, top, right, bottom = garment.getchannel("A").getbbox() or (0, 0, side, side)
    # A small thing is photographed from nearer, but not so near that a short cut looks long.
    zoom = rng.uniform(0.78, 0.92) * math.sqrt(side / max(right - left, bottom - top))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x0, y0 = side / 2 + rng.uniform(-0.04, 0.04, size=2) * side
    # Pillow wants the map from output to input: undo the shift, then turn and scale about the
    # garment's middle.
    x1, y1 = (left + right) / 2, (top + bottom) / 2
    inverse = (cos, sin, x1 - cos * x0 - sin * y0, -sin, cos, y1 + sin * x0 - cos * y0)
    bilinear = Image.Resampling.BILINEAR
    return garment.transform(garment.size, Image.Transform.AFFINE, inverse, bilinear).reduce(2)


def _backdrop(garment_colour: Rgb, side: int, rng: np.random.Generator) -> Pixels:
    """Draws a wall, planks, tiles or a cloth, not in the garment's colour: [side, side, 3]."""
    apart = [tone for tone in _BACKDROPS if math.dist(tone, garment_colour) > 100]
    tone = np.array(apart[rng.integers(len(apart))]) + rng.normal(0, 8, size=3)
    y, x = _grid(side)
    kind, step = rng.integers(4), rng.uniform(0.16, 0.3)
    light = 1.08 - 0.2 * y
    if kind == 1:  # planks, each of its own brightness, with a grain
        plank = rng.uniform(0.86, 1.08, size=8)[np.floor(x / step).astype(int)]
        grain = 0.03 * np.sin(90 * x + 6 * np.sin(7 * y))
        light = plank * (1 - 0.35 * (x / step % 1 < 0.04)) + grain
    elif kind == 2:  # tiles
        light = 1.02 - 0.2 * ((x / step % 1 < 0.04) | (y / step % 1 < 0.04))
    elif kind == 3:  # a cloth with folds
        phase = rng.uniform(8, 20) * (x + rng.uniform(-1, 1) * y)
        light = 1 + 0.1 * np.sin(phase + 2 * np.sin(5 * y))
    backdrop: Pixels = tone * light[..., None] + rng.normal(0, 4, size=(side, side, 1))
    return backdrop


def draw_item(
    type_: str,
    colour: str,
    pattern: str,
    size: int,
    rng: np.random.Generator,
    cut: tuple[float, float] | None = None,
) -> Image.Image:
    """Draws a picture of an item, RGB, `size` x `size`.

    `cut` is (short 0..1 long, slim 0..1 wide), drawn when None.
    """
    length, width = cut or np.clip(rng.integers(0, 2, 2) + rng.normal(0, 0.12, 2), 0, 1)
    fabric = _fabric(colour, pattern, 2 * size, rng)
    garment = _posed(_garment(_OUTLINES[type_](length, width), fabric), rng)
    picture = _image(_backdrop(COLOURS[colour], size, rng))
    alpha = garment.getchannel("A")
    shadow = ImageChops.offset(
        alpha.filter(ImageFilter.GaussianBlur(size / 50)), size // 60, size // 40
    )
    picture.paste((20, 18, 16), mask=shadow.point(lambda value: value * 0.5))
    picture.paste(garment, mask=alpha)
    return picture
