"""Odd and broken files, one by one, give the right pixels or the right reason."""

import io

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from courier_model.images import REASONS, BadImage, Preprocessing, decode
from tests.support.odd_images import odd_images

ODD = odd_images()
GOOD = [name for name, odd in ODD.items() if not isinstance(odd.expected, str)]
BAD = [name for name, odd in ODD.items() if isinstance(odd.expected, str)]

# Pillow says of EXIF that it cannot read it; the picture is shown as it is stored.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")


def preprocessing(side: int) -> Preprocessing:
    return Preprocessing(side, side, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def opened(name: str) -> Image.Image:
    return Image.open(io.BytesIO(ODD[name].data))


def check(name: str, side: int) -> None:
    """Compares a file with torchvision's resizing of the picture known without decoding."""
    odd = ODD[name]
    assert isinstance(odd.expected, Image.Image)
    assert odd.expected.mode == "RGB"
    resized = F.resize(odd.expected, [side], InterpolationMode.BILINEAR)
    expected = F.pil_to_tensor(F.center_crop(resized, [side])).numpy()
    found = decode(odd.data, preprocessing(side))
    assert np.abs(found.astype(int) - expected).max() <= odd.tolerance


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_file_gives_its_picture(name: str) -> None:
    expected = ODD[name].expected
    assert isinstance(expected, Image.Image)
    check(name, min(expected.size))  # not resized, so that every pixel is looked at


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_file_gives_its_picture_when_made_smaller(name: str) -> None:
    check(name, 8)  # JPEGs are decoded at a reduced scale


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gives_its_reason(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(ODD[name].data, preprocessing(48))
    assert caught.value.reason == ODD[name].expected
    assert "object at 0x" not in str(caught.value)  # which would differ from run to run


def test_the_corpus_has_every_reason_that_bytes_can_give() -> None:
    before_there_are_bytes = {"missing", "forbidden", "unsupported_uri"}
    assert {ODD[name].expected for name in BAD} == set(REASONS) - before_there_are_bytes
    assert len(GOOD) >= 40
    assert len(BAD) >= 40


def test_the_files_are_as_odd_as_their_names_say() -> None:
    assert opened("progressive.jpg").info["progressive"]
    assert b"\xff\xd0" in ODD["restart-markers.jpg"].data
    assert opened("two-pictures.jpg").format == "MPO"
    assert opened("cmyk.jpg").mode == opened("ycck.jpg").mode == "CMYK"
    assert opened("ycck.jpg").info["adobe_transform"] == 2
    assert opened("rgb-16-bit.png").tile[0].args == "RGB;16B"
    assert opened("interlaced.png").info["interlace"]
    assert opened("grey-alpha.png").mode == "LA"
    for name in ("animated.png", "animated.gif", "animated.webp", "two-pictures.jpg"):
        assert opened(name).n_frames == 2, name
    turned = [opened(name).getexif()[0x0112] for name in GOOD if name.startswith("orientation")]
    assert sorted(turned) == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
