"""What says nothing of pixels is taken out of a file unread; what does is as it was."""

import random
import zlib

import pytest
from PIL import Image, PngImagePlugin

from courier_model.image_metadata import without_metadata
from courier_model.images import BadImage, Preprocessing, decode
from tests.support.odd_images import (
    encoded,
    odd_images,
    png_chunk,
    turned_exif,
    with_chunk,
    with_segment,
)

AS_IS = Preprocessing(8, 8, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PICTURE = Image.radial_gradient("L").resize((8, 8)).convert("RGB")
PNG, JPEG = encoded(PICTURE, "PNG"), encoded(PICTURE, "JPEG")
TURN = b'<x tiff:Orientation="6"/>'
XMP_OF_PNG = b"XML:com.adobe.xmp\0%c\0\0\0%b"
XMP_OF_JPEG = b"http://ns.adobe.com/xap/1.0/\0" + TURN


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_file_without_metadata_is_not_copied(format: str) -> None:
    data = encoded(PICTURE, format)
    assert without_metadata(data) is data


def test_of_a_png_stays_what_makes_pixels() -> None:
    data = encoded(PICTURE.convert("P"), "PNG", transparency=1, exif=turned_exif(6))
    data = with_chunk(data, b"iTXt", XMP_OF_PNG % (0, TURN))
    more = data
    for kind in (b"iCCP", b"tEXt", b"zTXt", b"tIME", b"acTL", b"fdAT", b"prVt"):
        more = with_chunk(with_chunk(more, kind, b"some"), kind, b"more", late=True)
    more = with_chunk(more, b"iTXt", XMP_OF_PNG % (1, zlib.compress(TURN)))
    more = with_chunk(more, b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(TURN))
    assert without_metadata(more) == data


def test_of_a_jpeg_stays_what_tells_its_colours_and_its_turn() -> None:
    data = encoded(PICTURE.convert("CMYK"), "JPEG", exif=turned_exif(6))
    data = with_segment(data, 0xE1, XMP_OF_JPEG)
    more = data
    for marker in (*range(0xE2, 0xEE), 0xEF, 0xFE):
        more = with_segment(more, marker, b"more")
    assert without_metadata(more) == data
    assert without_metadata(JPEG + b"\xff\xe2\0\4ab") == JPEG + b"\xff\xe2\0\4ab"


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(PNG, b"eXIf", turned_exif(6)[6:]),
        with_chunk(PNG, b"iTXt", XMP_OF_PNG % (0, TURN)),
        with_segment(JPEG, 0xE1, turned_exif(6)),
        with_segment(JPEG, 0xE1, XMP_OF_JPEG),
    ],
)
def test_a_turn_that_metadata_tell_is_made(data: bytes) -> None:
    plain = decode(JPEG if data.startswith(JPEG[:2]) else PNG, AS_IS)
    turned = plain[:, ::-1].swapaxes(1, 2)
    assert abs(decode(data, AS_IS).astype(int) - turned).max() <= 2  # see `decode`


def test_nothing_is_unpacked_but_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(_: bytes) -> bytes:
        raise AssertionError("a text was unpacked")

    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", explode)
    for name in ("text-bomb.png", "text-bomb-at-the-end.png", "large-profile.png", "large-xmp.png"):
        assert decode(odd_images()[name].data, AS_IS).shape == (3, 8, 8)


def test_rubbish_in_metadata_costs_no_picture() -> None:
    chance = random.Random(0)
    two = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE])
    at = two.index(b"MPF\0")
    index = two[at : at + int.from_bytes(two[at - 2 : at], "big") - 2]
    expected_png, expected_jpeg = decode(PNG, AS_IS), decode(JPEG, AS_IS)
    for _ in range(300):
        kind = chance.choice(
            [b"iCCP", b"tEXt", b"zTXt", b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"fcTL"]
        )
        rubbish = chance.randbytes(chance.randrange(40))
        late = chance.random() < 0.5
        assert (decode(with_chunk(PNG, kind, rubbish, late), AS_IS) == expected_png).all()
        body = bytearray(
            chance.choice([index, b"ICC_PROFILE\0\1\1profile", b"Photoshop 3.0\0008BIM"])
        )
        body[chance.randrange(4, len(body))] = chance.randrange(256)
        data = with_segment(JPEG, chance.choice([0xE2, 0xED]), bytes(body[: chance.randrange(90)]))
        assert (decode(data, AS_IS) == expected_jpeg).all()


def test_a_broken_file_is_left_as_it_is_from_there() -> None:
    for whole in (with_chunk(PNG, b"tEXt", b"key\0text"), with_segment(JPEG, 0xFE, b"text")):
        without = without_metadata(whole)
        for length in range(len(whole)):
            assert without.startswith(without_metadata(whole[:length])[:-20])
    for broken in (b"\0\0\0\0", b"tE\xffT", b"12ab"):
        rest = png_chunk(broken, b"text") + png_chunk(b"tEXt", b"key\0text")
        assert without_metadata(PNG + rest) == PNG + rest
        assert without_metadata(with_chunk(PNG, b"tEXt", b"key\0text") + rest) == PNG + rest
    assert without_metadata(PNG + b"\0\0\0\4tE") == PNG + b"\0\0\0\4tE"
    with pytest.raises(BadImage):
        decode(PNG[:33] + png_chunk(b"\0\0\0\0", b"text") + PNG[33:], AS_IS)
    critical = png_chunk(b"BROK", b"unknown")
    assert critical in without_metadata(PNG[:33] + critical + PNG[33:])
