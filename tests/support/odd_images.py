"""Makes image files as strangers send them: odd but good with their pixels, bad with a reason.

All of it is made here, so no file of anybody else's is needed. Every picture is so small, and so
smooth where its format is lossy, that what a decoder must show is known without decoding.
"""

import functools
import gzip
import io
import random
import struct
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from courier_model.images import DecodeLimits

WIDTH, HEIGHT = 64, 48

# Levels of 255 that a smooth picture may be off after a good lossy codec, and after rounding twice.
LOSSY, ROUNDED = 10, 1


@dataclass(frozen=True)
class OddImage:
    """Holds a file, and the reason why it is refused or the upright RGB picture that it shows."""

    data: bytes
    expected: str | Image.Image
    tolerance: int = 0  # largest difference of a channel of any pixel from `expected`


@functools.cache
def odd_images() -> dict[str, OddImage]:
    """Returns all odd images by file name, made once, in a fraction of a second."""
    kinds = (
        _jpegs(), _turned(), _pngs(), _transparent_pngs(), _with_metadata(), _others(),
        _no_images(), _unsupported(), _broken(),
    )  # fmt: skip
    found = {name: odd for kind in kinds for name, odd in kind.items()}
    assert len(found) == sum(len(kind) for kind in kinds), "two files of one name"
    return found


# ---- the pictures --------------------------------------------------------------------------------


def _smooth() -> Image.Image:
    """Draws a picture without edges, which lossy codecs keep; no turn or mirror image is alike."""
    x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    return _picture(np.stack([40 + 200 * x, 30 + 120 * y, 220 - 90 * x - 100 * y], -1))


def _grey() -> Image.Image:
    return _smooth().convert("L")


def _quadrants() -> Image.Image:
    """Draws four colours in mode P: the numbers 0 and 1 above, 2 and 3 below."""
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[:, WIDTH // 2 :] += 1
    numbers[HEIGHT // 2 :] += 2
    image = Image.fromarray(numbers)
    image.putpalette([200, 10, 20, 30, 180, 40, 50, 60, 220, 240, 230, 70])
    return image


def _fading() -> np.ndarray:
    """Returns opacity uint8 `[HEIGHT, WIDTH]`: 0 on the left, 255 on the right."""
    return np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().astype(np.uint8))


def _over_white(image: Image.Image, alpha: np.ndarray) -> Image.Image:
    share = alpha[..., None] / 255
    return _picture(np.asarray(image.convert("RGB")) * share + 255 * (1 - share))


def _with_alpha(image: Image.Image, alpha: np.ndarray) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


# ---- the files -----------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """Returns the bytes of an image file; the options are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def png(
    width: int, height: int, depth: int, colour: int, pixels: bytes, interlaced: bool = False,
    transparent: bytes = b"",
) -> bytes:  # fmt: skip
    """Makes a PNG by hand, as Pillow would not; `pixels` begin each row with filter byte 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + (png_chunk(b"tRNS", transparent) if transparent else b"")
        + png_chunk(b"IDAT", zlib.compress(pixels))
        + png_chunk(b"IEND", b"")
    )


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def with_chunk(data: bytes, kind: bytes, body: bytes, late: bool = False) -> bytes:
    """Puts a chunk into a PNG: after its header, or `late` before its end."""
    at = len(data) - 12 if late else 33
    return data[:at] + png_chunk(kind, body) + data[at:]


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """Puts a segment into a JPEG, after its first marker."""
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + data[2:]


def without_segment(data: bytes, marker: int) -> bytes:
    """Takes the first segment of its kind out of a JPEG."""
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def _png_of(
    pixels: np.ndarray, colour: int, interlaced: bool = False, transparent: bytes = b""
) -> bytes:
    """Writes a PNG of `pixels` [height, width, channels] of uint8 or uint16."""
    values = pixels.astype(pixels.dtype.newbyteorder(">"))
    # Adam7: first column and row, step between columns and rows, of each of the seven passes.
    adam7 = ["0088", "4088", "0448", "2044", "0224", "1022", "0112"]
    passes = [tuple(map(int, each)) for each in adam7] if interlaced else [(0, 0, 1, 1)]
    rows = [
        b"\0" + row.tobytes()
        for left, top, across, down in passes
        for row in values[top::down, left::across]
    ]
    height, width = pixels.shape[:2]
    depth = 8 * pixels.itemsize
    return png(width, height, depth, colour, b"".join(rows), interlaced, transparent)


def _jpegs() -> dict[str, OddImage]:
    picture, grey = _smooth(), _grey().convert("RGB")
    baseline = encoded(picture, "JPEG", quality=95)
    black = Image.new("RGB", picture.size)
    made = {
        "baseline.jpg": baseline,
        "progressive.jpg": encoded(picture, "JPEG", quality=95, progressive=True),
        "full-colour-resolution.jpg": encoded(picture, "JPEG", quality=95, subsampling="4:4:4"),
        "stored-as-rgb.jpg": encoded(picture, "JPEG", quality=95, keep_rgb=True),
        "restart-markers.jpg": encoded(picture, "JPEG", quality=95, restart_marker_blocks=1),
        "large-profile.jpg": encoded(picture, "JPEG", quality=95, icc_profile=b"x" * 200_000),
        "comment.jpg": encoded(picture, "JPEG", quality=95, comment=b"<html>"),
        "rubbish-after-the-end.jpg": baseline + b"<!-- served by cache 7 -->" * 50,
        "no-end-marker.jpg": baseline.removesuffix(b"\xff\xd9"),
        "damaged-exif.jpg": encoded(picture, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0"),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG", quality=95),
        "cmyk-not-marked.jpg": without_segment(
            encoded(picture.convert("CMYK"), "JPEG", quality=95), 0xEE
        ),
        "ycck.jpg": _ycck(picture),
        "two-pictures.jpg": encoded(
            picture, "MPO", quality=95, save_all=True, append_images=[black]
        ),
        "named-png.png": baseline,
    }
    return {name: OddImage(data, picture, LOSSY) for name, data in made.items()} | {
        "grey.jpg": OddImage(encoded(_grey(), "JPEG", quality=95), grey, LOSSY),
        "pixel.jpg": OddImage(*_one_colour((200, 40, 90), "JPEG"), LOSSY),
    }


def _one_colour(colour: tuple[int, int, int], format: str) -> tuple[bytes, Image.Image]:
    image = Image.new("RGB", (1, 1), colour)
    return encoded(image, format), image


def _ycck(picture: Image.Image) -> bytes:
    """Encodes CMYK as Photoshop does: YCbCr of the inks, the key beside it, everything inverted."""
    inks = Image.eval(picture, lambda value: 255 - value)
    # Pillow inverts what it stores, hence once more here; key 0 is no ink.
    layers = [
        Image.eval(layer, lambda value: 255 - value) for layer in inks.convert("YCbCr").split()
    ]
    key = Image.new("L", picture.size, 0)
    data = bytearray(encoded(Image.merge("CMYK", [*layers, key]), "JPEG", quality=95))
    transform = data.index(b"Adobe") + 11  # of the Adobe segment: 0 is CMYK, 2 is YCCK
    assert data[transform] == 0
    data[transform] = 2
    return bytes(data)


def _turned() -> dict[str, OddImage]:
    """Makes each EXIF orientation, and one that does not exist; pixels are stored the other way."""
    turns = Image.Transpose
    stored_as = [
        None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE,
        turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270, None,
    ]  # fmt: skip
    found = {}
    for orientation, turn in enumerate(stored_as, 1):
        upright = _smooth()
        stored = upright if turn is None else upright.transpose(turn)
        exif = turned_exif(orientation)
        data = encoded(stored, "JPEG", quality=95, exif=exif)
        found[f"orientation-{orientation}.jpg"] = OddImage(data, upright, LOSSY)
    found["orientation-6.png"] = OddImage(
        encoded(_smooth().transpose(turns.ROTATE_90), "PNG", exif=turned_exif(6)), _smooth()
    )
    return found


def _pngs() -> dict[str, OddImage]:
    picture, grey, quadrants, alpha = _smooth(), _grey(), _quadrants(), _fading()
    pixels, levels = np.asarray(picture), np.asarray(grey)[..., None]
    opacity = np.array([255, 0, 128, 51], np.uint8)
    low = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4))  # bits that 8 cannot hold
    deep = (np.dstack([pixels, alpha]).astype(np.uint16) << 8) + low.astype(np.uint16)
    black = Image.new("RGB", picture.size)
    dots = Image.fromarray(levels[..., 0] > 128)  # mode 1
    rgba, rgb = _with_alpha(picture, alpha), picture
    return {
        "rgb.png": OddImage(encoded(picture, "PNG"), rgb),
        "named-jpeg.jpg": OddImage(encoded(picture, "PNG"), rgb),
        "no-end-chunk.png": OddImage(encoded(picture, "PNG")[:-12], rgb),
        "bilevel.png": OddImage(encoded(dots, "PNG"), dots.convert("RGB")),
        "grey.png": OddImage(encoded(grey, "PNG"), grey.convert("RGB")),
        "grey-16-bit.png": OddImage(
            _png_of(levels.astype(np.uint16) * 257, 0), grey.convert("RGB")
        ),
        "rgb-16-bit.png": OddImage(_png_of(deep[..., :3], 2), rgb, ROUNDED),
        "rgba-16-bit.png": OddImage(_png_of(deep, 6), _over_white(rgb, alpha), 2 * ROUNDED),
        "grey-alpha.png": OddImage(
            encoded(_with_alpha(grey, alpha), "PNG"), _over_white(grey, alpha), ROUNDED
        ),
        "alpha.png": OddImage(encoded(rgba, "PNG"), _over_white(rgb, alpha), ROUNDED),
        "palette.png": OddImage(encoded(quadrants, "PNG"), quadrants.convert("RGB")),
        "palette-alpha.png": OddImage(
            encoded(quadrants, "PNG", transparency=opacity.tobytes()),
            _over_white(quadrants, opacity[np.asarray(quadrants)]),
            ROUNDED,
        ),
        "palette-transparent.png": OddImage(
            encoded(quadrants, "PNG", transparency=1),
            _over_white(quadrants, 255 * (np.asarray(quadrants) != 1)),
        ),
        "transparent-colour.png": OddImage(
            encoded(quadrants.convert("RGB"), "PNG", transparency=(30, 180, 40)),
            _over_white(quadrants, 255 * (np.asarray(quadrants) != 1)),
        ),
        "interlaced.png": OddImage(_png_of(pixels, 2, interlaced=True), rgb),
        "interlaced-16-bit.png": OddImage(_png_of(deep[..., :3], 2, True), rgb, ROUNDED),
        "animated.png": OddImage(encoded(rgb, "PNG", save_all=True, append_images=[black]), rgb),
        "pixel.png": OddImage(*_one_colour((1, 2, 3), "PNG")),
    }


def _transparent_pngs() -> dict[str, OddImage]:
    """Makes a PNG of each kind that names one transparent colour, with that colour in the file.

    Each has four parts; the one at the upper right is transparent, hence white.
    """
    parts = np.asarray(_quadrants())  # 0 to 3
    found = {}
    for depth, levels in {1: [0, 1, 0, 0], 2: [0, 2, 1, 3], 4: [1, 9, 5, 15], 8: [3, 90, 5, 250],
                          16: [300, 25_000, 2_000, 64_000]}.items():  # fmt: skip
        stored = np.array(levels)[parts]
        shown = np.where(parts == 1, 255, np.round(stored / (2**depth - 1) * 255))
        transparent = struct.pack(">H", levels[1])
        rows = b"".join(b"\0" + _packed(row, depth) for row in stored)
        found[f"transparent-grey-{depth}-bit.png"] = OddImage(
            png(WIDTH, HEIGHT, depth, 0, rows, transparent=transparent),
            _picture(shown).convert("RGB"),
        )
    flat = np.asarray(_quadrants().convert("RGB"))
    shown = np.where(parts[..., None] == 1, 255, flat)
    deep = (flat.astype(np.uint16) << 8) + 7  # the low bytes differ from the high ones
    for pixels in (flat, deep):
        depth = 8 * pixels.itemsize
        found[f"transparent-rgb-{depth}-bit.png"] = OddImage(
            _png_of(pixels, 2, transparent=struct.pack(">HHH", *pixels[0, -1])), _picture(shown)
        )
    return found


def _packed(row: np.ndarray, depth: int) -> bytes:
    """Packs samples of 1 to 16 bits as PNG does, the first one highest."""
    bits = row[:, None] >> np.arange(depth)[::-1] & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _with_metadata() -> dict[str, OddImage]:
    """Makes sound pictures with profiles, texts and notes that decoders stumble over."""
    picture = _smooth()
    flat, jpeg = encoded(picture, "PNG"), encoded(picture, "JPEG", quality=95)
    large = zlib.compress(bytes(2**20 + 1))
    bomb = zlib.compress(bytes(2**27))
    chunks = {
        "large-profile": (b"iCCP", b"name\0\0" + large),
        "large-text": (b"zTXt", b"key\0\0" + large),
        "large-international-text": (b"iTXt", b"key\0\1\0en\0key\0" + large),
        "large-xmp": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + large),
        "text-bomb": (b"zTXt", b"key\0\0" + bomb),
        "text-of-unknown-packing": (b"zTXt", b"key\0\7" + large),
        "profile-without-name": (b"iCCP", b""),
        "short-gamma": (b"gAMA", b"\0"),
        "text-called-transparency": (b"tEXt", b"transparency\0none"),
        "text-called-interlace": (b"tEXt", b"interlace\0none"),
        "text-called-xmp": (b"tEXt", b"xmp\0none"),
        "text-called-exif": (b"zTXt", b"exif\0\0" + zlib.compress(b"none")),
        "broken-animation": (b"fcTL", bytes(4)),
    }
    pngs = {
        f"{name}{'-at-the-end' * late}.png": with_chunk(flat, kind, body, late)
        for name, (kind, body) in chunks.items()
        for late in (False, True)
    }
    segments = {
        "short-profile": (0xE2, b"ICC_PROFILE\0"),
        "short-jfif": (0xE0, b"JFIF\0"),
        "short-adobe": (0xEE, b"Adobe"),
        "short-photoshop": (0xED, b"Photoshop 3.0\0008BIM\0\0"),
    }
    jpegs = {f"{name}.jpg": with_segment(jpeg, *segment) for name, segment in segments.items()}
    jpegs["fill-bytes.jpg"] = jpeg[:2] + b"\xff\xff" + with_segment(jpeg, 0xEE, b"Adobe")[2:]
    return {name: OddImage(data, picture) for name, data in pngs.items()} | {
        name: OddImage(data, picture, LOSSY) for name, data in jpegs.items()
    }


def _others() -> dict[str, OddImage]:
    picture, quadrants, alpha = _smooth(), _quadrants(), _fading()
    flat, black = quadrants.convert("RGB"), Image.new("RGB", picture.size)
    frames = {"save_all": True, "append_images": [black]}
    transparent = _over_white(quadrants, 255 * (np.asarray(quadrants) != 2))
    rgba = _with_alpha(picture, alpha)
    return {
        "still.gif": OddImage(encoded(quadrants, "GIF"), flat),
        "animated.gif": OddImage(encoded(quadrants, "GIF", **frames), flat),
        "transparent.gif": OddImage(encoded(quadrants, "GIF", transparency=2), transparent),
        "interlaced.gif": OddImage(encoded(quadrants, "GIF", interlace=True), flat),
        "lossy.webp": OddImage(encoded(picture, "WEBP", quality=95), picture, LOSSY),
        "lossless.webp": OddImage(encoded(picture, "WEBP", lossless=True), picture),
        "alpha.webp": OddImage(
            encoded(rgba, "WEBP", lossless=True, exact=True), _over_white(picture, alpha), ROUNDED
        ),
        "animated.webp": OddImage(encoded(picture, "WEBP", lossless=True, **frames), picture),
        "rgb.bmp": OddImage(encoded(picture, "BMP"), picture),
        "palette.bmp": OddImage(encoded(quadrants, "BMP"), flat),
        "grey.bmp": OddImage(encoded(_grey(), "BMP"), _grey().convert("RGB")),
    }


# ---- what is refused -----------------------------------------------------------------------------


def _refused(reason: str, files: dict[str, bytes]) -> dict[str, OddImage]:
    return {name: OddImage(data, reason) for name, data in files.items()}


def _no_images() -> dict[str, OddImage]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("image.jpg", encoded(_smooth(), "JPEG"))
    files = {
        "one-byte.jpg": b"\xff",
        "two-bytes.jpg": b"\xff\xd8",
        "web-page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "text.jpg": b"The image is being processed. Try again later.\n",
        "error.jpg": b'{"error": {"code": 403, "message": "Access denied"}}',
        "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "document.pdf": encoded(_smooth(), "PDF"),
        "archive.zip": archive.getvalue(),
        "compressed.jpg": gzip.compress(encoded(_smooth(), "JPEG"), mtime=0),
        "random.jpg": random.Random(0).randbytes(5000),
        "zeros.jpg": bytes(5000),
        "late-jpeg.jpg": b"\r\n" + encoded(_smooth(), "JPEG"),
    }
    return _refused("not_an_image", files) | _refused("empty", {"empty.jpg": b""})


def _unsupported() -> dict[str, OddImage]:
    files = {
        f"picture.{format.lower()}": encoded(_smooth(), format)
        for format in ("TIFF", "ICO", "PPM", "JPEG2000", "EPS", "PCX")
    }
    # Box "ftyp" with its brand: all that tells these two formats from each other.
    files["phone.heic"] = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(2000)
    files["picture.avif"] = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(2000)
    return _refused("unsupported_format", files)


def _broken() -> dict[str, OddImage]:
    jpeg, whole_png = encoded(_smooth(), "JPEG", quality=95), encoded(_smooth(), "PNG")
    size = jpeg.index(b"\xff\xc0") + 5  # of the frame header: height and width, two bytes each
    checksum = bytearray(whole_png)
    checksum[29] ^= 1  # of IHDR
    pixels = bytearray(whole_png)
    pixels[len(pixels) // 2] ^= 0xFF
    cut = {
        f"cut-at-{share}.{format.lower()}": data[: len(data) * share // 100]
        for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP")
        for share in (10, 50, 90, 99)
        for data in [encoded(_quadrants() if format == "GIF" else _smooth(), format)]
    }
    del cut["cut-at-99.png"]  # still has all pixels: see "no-end-chunk.png"
    progressive = encoded(_smooth(), "JPEG", quality=95, progressive=True)
    truncated = cut | {
        "header-only.jpg": jpeg[:20],
        "no-pixels.jpg": jpeg[: jpeg.index(b"\xff\xda")],
        "cut-progressive.jpg": progressive[: len(progressive) // 2],
        "no-height.jpg": jpeg[:size] + b"\0\0" + jpeg[size + 2 :],
        "no-size.png": png(0, 0, 8, 2, b""),
        "signature-only.png": whole_png[:8],
        "bad-checksum.png": bytes(checksum),
        "bad-pixels.png": bytes(pixels),
        "too-few-pixels.png": png(64, 64, 8, 2, b"\0" * 9),
    }
    side = struct.pack(">HH", 65_500, 65_500)
    too_large = {
        "impossible-size.jpg": jpeg[:size] + side + jpeg[size + 4 :],
        "bomb.png": png(50_000, 50_000, 8, 2, b"\0" * 9),
        "largest-size.png": png(2**31 - 1, 2**31 - 1, 8, 2, b"\0" * 9),
        "high-line.png": encoded(Image.new("L", (1, 1_000_000)), "PNG"),
        "wide-line.png": encoded(Image.new("L", (1_000_000, 1)), "PNG"),
    }
    return (
        _refused("truncated", truncated)
        | _refused("too_many_pixels", too_large)
        | _refused("too_many_bytes", {"heavy.jpg": jpeg + bytes(DecodeLimits().max_bytes)})
    )
