"""Decoding: torchvision's pixels for every kind of file, and a reason for whatever is refused."""

import io
import pickle
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from torchvision.models import ShuffleNet_V2_X1_0_Weights, Swin_T_Weights, WeightsEnum

from courier_model.images import (
    FORMATS,
    REASONS,
    BadImage,
    DecodeLimits,
    Preprocessing,
    decode,
)

STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
SWIN = Preprocessing(224, 232, "bicubic", **STATISTICS)
# Square images of 8 pixels pass through this one unchanged, so that single pixels can be checked.
AS_IS = Preprocessing(8, 8, "bilinear", **STATISTICS)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth ramp plus noise: resampling and cropping mistakes both show."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(0, 150, height), np.linspace(0, 60, width))[..., None]
    return Image.fromarray((ramp + rng.integers(0, 45, (height, width, 3))).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def torchvision_pixels(image: Image.Image, weights: WeightsEnum) -> np.ndarray:
    """The obviously right twin: torchvision's transform with its normalisation switched off."""
    transform = weights.transforms(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (transform(image) * 255).round().byte().numpy()


def reason(data: bytes, preprocessing: Preprocessing = AS_IS, **limits: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, preprocessing, DecodeLimits(**limits))
    assert caught.value.reason in REASONS
    assert str(caught.value)
    return caught.value.reason


def pixel(data: bytes) -> list[int]:
    """The colour of an image of one colour."""
    pixels = decode(data, AS_IS).reshape(3, -1)
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has next to no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


# ---- equal to torchvision --------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [(640, 400), (400, 640), (301, 300), (232, 232), (224, 224), (100, 57), (31, 90), (1, 1)],
)
def test_pixels_equal_torchvisions(size: tuple[int, int]) -> None:
    image = noise(*size)
    pixels = decode(encoded(image, "PNG"), SWIN)
    np.testing.assert_array_equal(pixels, torchvision_pixels(image, Swin_T_Weights.IMAGENET1K_V1))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_pixels_equal_torchvisions_for_any_size_bilinear() -> None:
    preprocessing = Preprocessing(224, 256, "bilinear", **STATISTICS)
    rng = np.random.default_rng(0)
    for width, height in rng.integers(2, 500, (25, 2)).tolist():
        image = noise(width, height)
        expected = torchvision_pixels(image, ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1)
        np.testing.assert_array_equal(decode(encoded(image, "PNG"), preprocessing), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_every_allowed_format_is_decoded(format: str) -> None:
    data = encoded(noise(300, 250), format)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(
        decode(data, SWIN), torchvision_pixels(expected, Swin_T_Weights.IMAGENET1K_V1)
    )


def test_progressive_jpeg_is_decoded() -> None:
    data = encoded(noise(300, 250), "JPEG", progressive=True)
    expected = Image.open(io.BytesIO(data))
    assert expected.info["progressive"]
    np.testing.assert_array_equal(
        decode(data, SWIN), torchvision_pixels(expected, Swin_T_Weights.IMAGENET1K_V1)
    )


# ---- odd kinds of pictures -------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(300, 240), format, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((300, 240) if orientation < 5 else (240, 300))
    np.testing.assert_array_equal(
        decode(data, SWIN), torchvision_pixels(upright, Swin_T_Weights.IMAGENET1K_V1)
    )


def test_a_phone_held_upright_gives_an_upright_picture() -> None:
    # Orientation 6: the stored picture must be turned clockwise, its left side ends on top.
    stored = Image.new("RGB", (8, 8), "blue")
    stored.paste("red", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode(encoded(stored, "PNG", exif=exif.tobytes()), AS_IS)
    assert pixels[:, 0, 7].tolist() == [255, 0, 0]
    assert pixels[:, 7, 0].tolist() == [0, 0, 255]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    for exif in (b"Exif\0\0MM\0*\0", b"Exif\0\0rubbish!", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert pixel(encoded(image, "PNG", exif=exif)) == [1, 2, 3]


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(pixel(data), [255, 0, 0], atol=2)


def test_greyscale_and_bilevel_become_rgb() -> None:
    assert pixel(encoded(Image.new("L", (8, 8), 77), "PNG")) == [77, 77, 77]
    assert pixel(encoded(Image.new("1", (8, 8), 1), "PNG")) == [255, 255, 255]


def test_16_bit_greyscale_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    pixels = decode(encoded(Image.fromarray(values), "PNG"), AS_IS)
    expected = np.round(values / 65535 * 255)
    np.testing.assert_array_equal(pixels, np.stack([expected] * 3))


def test_transparency_lies_over_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")) == [255, 255, 255]
    assert pixel(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "PNG")) == [255, 204, 204]
    assert pixel(encoded(Image.new("LA", (8, 8), (0, 51)), "PNG")) == [204, 204, 204]
    webp = encoded(Image.new("RGBA", (8, 8), (0, 0, 255, 51)), "WEBP", lossless=True)
    assert pixel(webp) == [204, 204, 255]


def test_transparent_palette_and_key_colours_lie_over_white() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixel(encoded(palette, "PNG")) == [40, 50, 60]
    assert pixel(encoded(palette, "PNG", transparency=1)) == [255, 255, 255]
    assert pixel(encoded(palette, "PNG", transparency=b"\0\xff")) == [40, 50, 60]
    assert pixel(encoded(palette, "GIF", transparency=1)) == [255, 255, 255]
    key = encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixel(key) == [255, 255, 255]


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})]
)
def test_an_animation_gives_its_first_frame(format: str, options: dict[str, object]) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(first, format, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert pixel(data) == [255, 0, 0]


def test_a_jpeg_of_several_pictures_gives_its_first() -> None:
    first, second = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert pixel(data) == [0, 0, 0]


# ---- what is refused -------------------------------------------------------------------------


def test_a_file_without_bytes_is_empty() -> None:
    assert reason(b"") == "empty"


def test_a_web_page_named_jpg_is_no_image() -> None:
    assert reason(b"<!DOCTYPE html><html><body>Not found</body></html>") == "not_an_image"
    assert reason(b"x") == "not_an_image"


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_cut_short_is_truncated_wherever_it_is_cut(format: str) -> None:
    data = encoded(noise(64, 64), format)
    assert reason(data[: len(data) // 2]) == "truncated"
    assert reason(data[:24]) == "truncated"


@pytest.mark.parametrize("format", ["TIFF", "ICO", "PPM", "JPEG2000", "EPS", "PCX"])
def test_formats_that_pillow_knows_but_we_do_not_allow_never_reach_their_parser(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(noise(16, 16), format)
    _, accepts = Image.OPEN[format]

    def explode(*_: object) -> None:
        raise AssertionError(f"the parser of {format} was called")

    monkeypatch.setitem(Image.OPEN, format, (explode, accepts))
    assert reason(data) == "unsupported_format"


def test_too_many_bytes_are_refused_unread() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "PNG")
    assert reason(data, max_bytes=len(data) - 1) == "too_many_bytes"
    decode(data, AS_IS, DecodeLimits(max_bytes=len(data)))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_from_its_header(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(_: object) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    assert reason(png_header(*size)) == "too_many_pixels"


def test_the_pixel_limit_is_the_last_size_that_passes() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "PNG")
    assert reason(data, max_pixels=63) == "too_many_pixels"
    decode(data, AS_IS, DecodeLimits(max_pixels=64))


def test_a_line_that_would_explode_in_resizing_is_refused() -> None:
    assert reason(encoded(Image.new("L", (60_000, 1)), "PNG"), SWIN) == "too_many_pixels"
    assert reason(encoded(Image.new("L", (1, 60_000)), "PNG"), SWIN) == "too_many_pixels"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_give_pixels_or_a_reason_and_nothing_else() -> None:
    chance = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(noise(30, 20), name, exif=exif) for name in ("JPEG", "PNG", "WEBP")]
    whole += [encoded(noise(30, 20), name) for name in ("GIF", "BMP")]
    outcomes = set()
    for _ in range(1500):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(min(len(data), chance.choice([120, 10_000])))] = chance.randrange(
                256
            )
        try:
            assert decode(bytes(data), AS_IS).shape == (3, 8, 8)
            outcomes.add("pixels")
        except BadImage as bad:
            outcomes.add(bad.reason)
    assert {"pixels", "truncated", "not_an_image"} <= outcomes


@pytest.mark.parametrize(
    "fault", [MemoryError(), OSError("out of memory error when reading image file")]
)
def test_a_machine_without_memory_is_not_a_bad_image(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise fault

    data = encoded(noise(8, 8), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode(data, AS_IS)


# ---- the rest --------------------------------------------------------------------------------


def test_threads_decode_the_same_pixels() -> None:
    kinds = [encoded(noise(90, 70, seed), name) for seed, name in enumerate(FORMATS * 2)]
    alone = [decode(data, AS_IS) for data in kinds]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode(data, AS_IS), kinds * 8))
    for found, expected in zip(together, alone * 8, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_bad_image_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(BadImage("truncated", "cut short")))  # noqa: S301
    assert (copy.reason, str(copy)) == ("truncated", "cut short")


def test_preprocessing_survives_json() -> None:
    lists = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(SWIN).items()}
    assert Preprocessing.from_dict(lists) == SWIN


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": 233},
        {"input_size": 0},
        {"interpolation": "nearest"},
        {"std": (0.0, 1.0, 1.0)},
        {"mean": (0.0,)},
    ],
)
def test_preprocessing_without_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Preprocessing"):
        replace(SWIN, **change)
