"""Decodes image files into pixels: the one definition that nightly inference and training share.

What an encoder sees must not depend on where it runs, so everything between the file's bytes and
the uint8 pixels is here, with Pillow alone. The encoder itself divides by mean and std, so pixels
travel as uint8, a quarter of the size of floats. Training decodes to `Preprocessing.square` and
cuts its crops out of that (`augment`).

Bytes come from strangers: formats, bytes and pixels are bounded before anything is decoded.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from courier_model.image_metadata import without_metadata

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

REASONS = (
    # found by the reader, before there are bytes
    "missing",
    "forbidden",
    "unsupported_uri",
    # found here
    "empty",
    "too_many_bytes",
    "too_many_pixels",
    "unsupported_format",
    "not_an_image",
    "truncated",  # begins as an image of an allowed format; the rest is cut short or broken
)

_INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# JPEGs are decoded at 1/2, 1/4 or 1/8 scale where that leaves the shorter side this many times as
# long as resizing makes it. What it costs at the least favourable sizes, against decoding in full,
# on 42 pictures made of photographs, 224 pixels: channels differ by 1.1 levels of 255 on average
# and 31 at most; cosines of embeddings are 0.9996 or more (untrained swin_t), 0.9998 (ResNet-18).
# Saving the JPEG once more at quality 75 does more harm. 2 would halve the difference, and leave
# sources of 800 and 1600 pixels at twice the scale, which takes 2.2 and 1.6 times as long.
JPEG_MARGIN = 1.5

# EXIF orientation -> the turn that makes the picture upright (EXIF 2.3, tag 0x0112). Not
# ImageOps.exif_transpose: that also rewrites the EXIF block, and fails where the block is damaged.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises for a broken file: OSError when it cannot be identified or decoded, SyntaxError
# and ValueError from the format's own parser, struct.error from its EXIF parser; the others from a
# parser that meets less, or something else, than it looks for. Caught only around opening and
# loading, so that a mistake of ours is never taken for a bad image.
_BROKEN_FILE = (
    OSError, SyntaxError, ValueError, struct.error, IndexError, TypeError, KeyError, EOFError,
)  # fmt: skip

# Bits of a sample in a PNG without alpha, by Pillow's name for what is stored.
_DEPTHS = {"L;2": 2, "L;4": 4, "L": 8, "RGB": 8, "RGB;16B": 16}

# All of Pillow's plugins, once, at import: it would otherwise load them during the first decodes,
# while other threads walk its table of formats.
Image.init()


class BadImage(Exception):
    """Says that an image cannot be used: a bad row, never a reason to stop a job.

    `reason` is one of REASONS (for tables and counters), `str()` the message for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, message)  # both in args, so that it survives pickling
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class DecodeLimits:
    """Bounds what an image costs; Pillow's own bound of 179 M pixels holds besides `max_pixels`."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class Preprocessing:
    """Describes the way from a picture to what the network sees, part of the encoder's identity.

    The shorter side becomes `resize_size` pixels, the centre square of `input_size` pixels is cut
    out, and values scaled to 0..1 are normalised as `(x - mean) / std` per channel (RGB). A JPEG
    may be decoded at a scale that leaves its shorter side `jpeg_margin` x `resize_size` pixels.
    Raises ValueError when a value makes no sense.
    """

    input_size: int
    resize_size: int
    interpolation: str  # "bilinear" | "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    jpeg_margin: float = JPEG_MARGIN

    def __post_init__(self) -> None:
        if not 1 <= self.input_size <= self.resize_size:
            raise ValueError(f"expected 1 <= input_size <= resize_size: {self}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation is not one of {sorted(_INTERPOLATIONS)}: {self}")
        if self.jpeg_margin < 1:
            raise ValueError(f"a jpeg_margin below 1 leaves too few pixels: {self}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need three values each, std above 0: {self}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Inverts `dataclasses.asdict`, also after JSON has turned tuples into lists."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def square(self) -> Preprocessing:
        """Returns the preprocessing for training: the resized picture's centre square, uncut."""
        return replace(self, input_size=self.resize_size)


def decode(
    data: bytes, preprocessing: Preprocessing, limits: DecodeLimits = DecodeLimits()
) -> npt.NDArray[np.uint8]:
    """Decodes what the encoder sees: uint8 RGB `[3, input_size, input_size]`, C-contiguous.

    Equal, pixel for pixel, to torchvision's evaluation transform before its normalisation, on the
    RGB picture: first frame of animations, transparency over white, 16-bit greyscale scaled to 8
    bits. Colour profiles are ignored, as torchvision does; they, texts and other metadata are not
    even read (`image_metadata`), so that none is too large or too broken. In a CMYK JPEG 255 is no
    ink, as Adobe stores it, with and without Adobe's marker (APP14): so Pillow, Chrome and Firefox
    take all of them. Where a PNG of 16 bits a channel names its one transparent colour, the upper
    8 bits decide. Two exceptions:

    - A JPEG whose shorter side is at least 2 x `jpeg_margin` x `resize_size` is decoded at a
      reduced scale, 2 to 5 times as fast, which gives nearly the same (see `JPEG_MARGIN`).
    - What EXIF turns is made upright after resizing, when it is small. By a quarter turn, some
      pixels differ by 1 or 2 levels of 255 from resizing the upright picture.

    Safe to call from several threads. Raises BadImage with one of the reasons "empty",
    "too_many_bytes", "too_many_pixels", "unsupported_format", "not_an_image", "truncated".
    """
    image = _open(data, limits)
    size = _resized_size(image.size, preprocessing.resize_size)
    _check_pixels(image.size, size, limits.max_pixels)
    box = _reduce(image, preprocessing)
    _match_transparency(image)
    turn = _load(image)
    picture = _rgb(image).resize(size, _INTERPOLATIONS[preprocessing.interpolation], box)
    if turn is not None:
        picture = picture.transpose(turn)
    picture = _crop(picture, preprocessing.input_size)
    # Packed plane by plane in C, which takes half as long as turning [S, S, 3] round in numpy.
    planes = bytearray().join(picture.tobytes("raw", channel) for channel in "RGB")
    return np.frombuffer(planes, np.uint8).reshape(3, picture.height, picture.width)


def _reduce(image: Image.Image, preprocessing: Preprocessing) -> Box | None:
    """Lets a JPEG be decoded at a smaller scale; of all allowed formats it alone can be.

    Returns the picture's box in the reduced one. Where the scale does not divide the sides these
    are fractions, since the last column and row reach beyond the picture.
    """
    enough = int(preprocessing.jpeg_margin * preprocessing.resize_size)
    _, box = image.draft(None, (enough, enough)) or (None, None)
    return box


def _open(data: bytes, limits: DecodeLimits) -> ImageFile.ImageFile:
    """Reads the header only; no pixel is decoded."""
    if not data:
        raise BadImage("empty", "the file has 0 bytes")
    if len(data) > limits.max_bytes:
        raise BadImage("too_many_bytes", f"{len(data)} bytes, allowed are {limits.max_bytes}")
    try:
        return Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except _BROKEN_FILE as error:
        raise _why_unopened(data, error) from error


def _why_unopened(data: bytes, error: Exception) -> BadImage:
    """Tells why an image did not open, going by its first 16 bytes.

    A format that is not allowed must not reach its parser.
    """
    prefix = data[:16].ljust(16, b"\0")  # some of Pillow's tests fail on less
    # A format without such a test (None) cannot be told from any other file.
    known = [name for name, (_, accepts) in Image.OPEN.items() if accepts and accepts(prefix)]
    if prefix[4:11] == b"ftyphei":  # what phones take; Pillow alone does not know it
        known = ["HEIC"]
    if any(name in FORMATS for name in known):
        # Pillow's general error says no more than the address of our BytesIO.
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        return BadImage("truncated", f"begins as {known[0]} but the header is broken{detail}")
    if known:
        allowed = ", ".join(FORMATS)
        return BadImage("unsupported_format", f"looks like {known[0]}; allowed are {allowed}")
    return BadImage("not_an_image", f"begins with {prefix!r}, which no known image format does")


def _check_pixels(size: tuple[int, int], resized: tuple[int, int], max_pixels: int) -> None:
    """Bounds the picture and its resized form: a line of 1 x 1,000,000 would grow 50,000-fold."""
    width, height = size
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height} pixels, allowed are {max_pixels}")
    if resized[0] * resized[1] > max_pixels:
        raise BadImage(
            "too_many_pixels",
            f"{width} x {height} pixels: so narrow that it would become {resized[0]} x "
            f"{resized[1]} when resized, allowed are {max_pixels} pixels",
        )


def _match_transparency(image: ImageFile.ImageFile) -> None:
    """Turns the transparent colour of a PNG into what Pillow's pixels, which have 8 bits, show.

    Pillow leaves it as it stands in the file, where samples may have 2, 4 or 16.
    """
    stored = image.tile[0].args if image.tile else None
    if isinstance(stored, str) and stored in _DEPTHS and "transparency" in image.info:
        depth = _DEPTHS[stored]
        colour = np.array(image.info["transparency"])
        most = (1 << depth) - 1
        shown = colour >> 8 if depth == 16 else (colour & most) * (255 // most)
        image.info["transparency"] = tuple(shown.tolist()) if shown.ndim else int(shown)


def _load(image: Image.Image) -> Image.Transpose | None:
    """Decodes the pixels in place; returns the turn that makes the picture upright."""
    try:
        image.load()
    except _BROKEN_FILE as error:
        if "out of memory" in str(error):  # Pillow's codecs say it with an OSError; not the file's
            raise MemoryError(str(error)) from error
        raise BadImage("truncated", f"the pixels cannot be decoded: {error}") from error
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN_FILE:
        return None  # damaged EXIF: shown as stored, as browsers do


def _rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode that the allowed formats can have to RGB."""
    if image.mode.startswith("I"):
        # 16-bit greyscale. Pillow would clip at 255, which turns nearly everything white.
        # 257 = 65535 / 255, so this rounds to the nearest 8-bit value.
        values = np.array(image, dtype=np.uint32)
        values[values == image.info.get("transparency", -1)] = 65535  # over white
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
    layer = image.convert("RGBA")
    picture = Image.new("RGB", layer.size, "white")
    picture.paste(layer, mask=layer.getchannel("A"))
    return picture


def _resized_size(size: tuple[int, int], resize_size: int) -> tuple[int, int]:
    """Scales a size to a shorter side of `resize_size`; rounds the longer down like torchvision."""
    width, height = size
    if width <= height:
        return resize_size, int(resize_size * height / width)
    return int(resize_size * width / height), resize_size


def _crop(picture: Image.Image, size: int) -> Image.Image:
    """Cuts out the centre square, rounding halves to even like torchvision's center_crop."""
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return picture.crop((left, top, left + size, top + size))
