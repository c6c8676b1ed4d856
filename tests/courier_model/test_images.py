"""Decoding gives torchvision's pixels, or those of a reduced JPEG, or a reason.

Odd and broken files one by one are in test_odd_images.
"""

import io
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from torchvision.models import ShuffleNet_V2_X1_0_Weights, Swin_T_Weights, WeightsEnum
from torchvision.transforms.v2 import functional as F

from courier_model.images import (
    FORMATS,
    REASONS,
    BadImage,
    DecodeLimits,
    Preprocessing,
    decode,
)
from tests.support.odd_images import encoded, png, turned_exif

STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
SWIN = Preprocessing(224, 232, "bicubic", **STATISTICS)
# Square images of 8 pixels pass through this one unchanged, so that single pixels can be checked.
AS_IS = Preprocessing(8, 8, "bilinear", **STATISTICS)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draws a smooth ramp plus noise, on which resampling and cropping mistakes both show."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(0, 150, height), np.linspace(0, 60, width))[..., None]
    return Image.fromarray((ramp + rng.integers(0, 45, (height, width, 3))).astype(np.uint8))


def torchvision_pixels(image: Image.Image, weights: WeightsEnum) -> np.ndarray:
    """Returns pixels by the obviously right twin: torchvision's transform, not normalising."""
    transform = weights.transforms(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (transform(image) * 255).round().byte().numpy()


def reason(data: bytes, preprocessing: Preprocessing = AS_IS, **limits: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, preprocessing, DecodeLimits(**limits))
    assert caught.value.reason in REASONS
    assert str(caught.value)
    return caught.value.reason


def pixel(data: bytes) -> list[int]:
    """Returns the colour of an image of one colour."""
    pixels = decode(data, AS_IS).reshape(3, -1)
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


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


# ---- JPEGs at a reduced scale ----------------------------------------------------------------


def square_of_8(image: Image.Image, box: tuple[float, ...] | None = None) -> np.ndarray:
    """Returns torchvision's pixels for AS_IS, of the part `box` of the image."""
    width, height = image.size
    size = (8, 8 * height // width) if width < height else (8 * width // height, 8)
    resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box)
    return F.pil_to_tensor(F.center_crop(resized, [8])).numpy()


@pytest.mark.parametrize(
    ("shorter", "scale"),
    [(8, 1), (12, 1), (23, 1), (24, 2), (47, 2), (48, 4), (95, 4), (96, 8), (500, 8)],
)
@pytest.mark.parametrize("upright", [True, False])
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_half_as_much_again(
    shorter: int, scale: int, upright: bool
) -> None:
    size = (shorter, shorter + 1) if upright else (shorter + 1, shorter)
    data = encoded(noise(*size), "JPEG")
    reduced = Image.open(io.BytesIO(data))
    reduced.draft(None, (size[0] // scale, size[1] // scale))
    assert min(reduced.size) == -(-shorter // scale)
    assert scale == 1 or min(reduced.size) >= 12
    expected = square_of_8(reduced, (0, 0, size[0] / scale, size[1] / scale))
    np.testing.assert_array_equal(decode(data, AS_IS), expected)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP"])
def test_no_other_format_is_reduced(format: str) -> None:
    data = encoded(noise(150, 125), format)
    np.testing.assert_array_equal(decode(data, AS_IS), square_of_8(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_reduced_jpeg_is_near_the_whole_one(mode: str, orientation: int) -> None:
    # At 1/8 scale, which divides neither side: a stretch by part of a pixel would show.
    data = encoded(noise(385, 513).convert(mode), "JPEG", exif=turned_exif(orientation))
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    resized = F.resize(whole, [32], F.InterpolationMode.BICUBIC)
    expected = F.pil_to_tensor(F.center_crop(resized, [28])).numpy().astype(int)
    found = decode(data, Preprocessing(28, 32, "bicubic", **STATISTICS))
    assert not np.array_equal(found, expected)  # else it was not reduced
    assert np.abs(found - expected).mean() < 0.8  # levels of 255


def test_a_reduced_jpeg_is_refused_by_its_own_size_and_its_last_bytes() -> None:
    data = encoded(noise(1000, 1000), "JPEG")
    assert reason(data, max_pixels=1000 * 1000 - 1) == "too_many_pixels"
    assert reason(data[:-1000]) == "truncated"
    decode(data, AS_IS, DecodeLimits(max_pixels=1000 * 1000))


# ---- odd kinds of pictures -------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(orientation: int, format: str) -> None:
    data = encoded(noise(300, 240), format, exif=turned_exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((300, 240) if orientation < 5 else (240, 300))
    expected = torchvision_pixels(upright, Swin_T_Weights.IMAGENET1K_V1).astype(int)
    # Quarter turns swap Pillow's two passes of resizing, between which it rounds.
    assert np.abs(decode(data, SWIN) - expected).max() <= (0 if orientation < 5 else 2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    for exif in (b"Exif\0\0MM\0*\0", b"Exif\0\0rubbish!", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert pixel(encoded(image, "PNG", exif=exif)) == [1, 2, 3]


def test_16_bit_greyscale_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    pixels = decode(encoded(Image.fromarray(values), "PNG"), AS_IS)
    expected = np.round(values / 65535 * 255)
    np.testing.assert_array_equal(pixels, np.stack([expected] * 3))


# ---- what is refused -------------------------------------------------------------------------


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
    assert reason(png(*size, 8, 2, b"\0" * 9)) == "too_many_pixels"


def test_the_pixel_limit_is_the_last_size_that_passes() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "PNG")
    assert reason(data, max_pixels=63) == "too_many_pixels"
    decode(data, AS_IS, DecodeLimits(max_pixels=64))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_give_pixels_or_a_reason_and_nothing_else() -> None:
    chance = random.Random(0)
    exif = turned_exif(6)
    whole = [encoded(noise(40, 30), name, exif=exif) for name in ("JPEG", "PNG", "WEBP")]
    whole += [encoded(noise(40, 30), name) for name in ("GIF", "BMP")]
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
        {"jpeg_margin": 0.5},
    ],
)
def test_preprocessing_without_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Preprocessing"):
        replace(SWIN, **change)
