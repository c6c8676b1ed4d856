"""Crops and views are cut in the right places, and use no random numbers but their own."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from courier_model.images import Preprocessing, decode
from courier_model.training.augment import centre_crop, random_crop, simclr_view

STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


def squares(n: int, side: int = 36) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, side, side), dtype=np.uint8)


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


# ---- the centre ------------------------------------------------------------------------------

SIZES = [(50, 36), (51, 36), (52, 36), (53, 36), (36, 71), (40, 40), (90, 31), (7, 5)]


@pytest.mark.parametrize("resize_size", [32, 36, 40])
@pytest.mark.parametrize("size", SIZES)
def test_the_centre_of_the_square_is_what_the_encoder_sees_at_night(
    size: tuple[int, int], resize_size: int
) -> None:
    preprocessing = Preprocessing(32, resize_size, "bicubic", **STATISTICS)
    square = decode(png(*size), preprocessing.square())
    assert square.shape == (3, resize_size, resize_size)
    expected = decode(png(*size), preprocessing)
    np.testing.assert_array_equal(centre_crop(square[None], 32)[0], expected)


@pytest.mark.parametrize("resize_size", [33, 34, 35])
@pytest.mark.parametrize("size", SIZES)
def test_with_odd_margins_the_centre_is_at_most_one_pixel_off(
    size: tuple[int, int], resize_size: int
) -> None:
    preprocessing = Preprocessing(32, resize_size, "bilinear", **STATISTICS)
    found = centre_crop(decode(png(*size), preprocessing.square())[None], 32)[0]
    expected = decode(png(*size), preprocessing)
    axis = 2 if size[0] > size[1] else 1
    shifted = [found, np.roll(found, 1, axis), np.roll(found, -1, axis)]
    inner = (slice(None), slice(1, -1), slice(1, -1))  # rolled-in edges aside
    assert any(np.array_equal(s[inner], expected[inner]) for s in shifted)


# ---- random crops ----------------------------------------------------------------------------


def test_a_random_crop_is_a_window_of_its_own_image() -> None:
    # Pixel values that say where they come from: channel 0 the image, 1 the row, 2 the column.
    image, row, column = np.meshgrid(np.arange(200), np.arange(9), np.arange(9), indexing="ij")
    where = np.stack([image, row, column], axis=1).astype(np.uint8)
    crops = random_crop(where, 6, np.random.default_rng(0))
    assert crops.shape == (200, 3, 6, 6)
    top, left = crops[:, 1, 0, 0], crops[:, 2, 0, 0]
    for i, crop in enumerate(crops):
        np.testing.assert_array_equal(crop, where[i, :, top[i] : top[i] + 6, left[i] : left[i] + 6])
    offsets = set(zip(top.tolist(), left.tolist(), strict=True))
    assert offsets == {(y, x) for y in range(4) for x in range(4)}  # the last ones included


def test_a_crop_as_large_as_the_square_is_the_square() -> None:
    given = squares(3)
    np.testing.assert_array_equal(random_crop(given, 36, np.random.default_rng(0)), given)
    assert random_crop(given[:0], 32, np.random.default_rng(0)).shape == (0, 3, 32, 32)


# ---- SimCLR ----------------------------------------------------------------------------------


def test_each_view_has_its_own_random_numbers_and_the_seed_decides_them() -> None:
    given = np.repeat(squares(1), 6, axis=0)
    views = simclr_view(given, 32, seed=1)
    assert views.shape == (6, 3, 32, 32)
    assert views.dtype == np.uint8
    assert len({view.tobytes() for view in views}) == 6
    np.testing.assert_array_equal(simclr_view(given, 32, seed=1), views)
    assert not np.array_equal(simclr_view(given, 32, seed=2), views)


def test_views_leave_the_global_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    views = simclr_view(squares(2), 32, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    np.testing.assert_array_equal(simclr_view(squares(2), 32, seed=1), views)


def test_views_have_the_distortions_of_the_paper() -> None:
    # Two halves of one colour each: only the crop, the flip and the jitter change them.
    given = np.zeros((300, 3, 36, 36), np.uint8)
    given[:, 0, :, :18], given[:, 2, :, 18:] = 200, 100
    views = simclr_view(given, 32, seed=0).astype(int)
    grey = (views[:, 0] == views[:, 1]).all(axis=(1, 2)) & (views[:, 0] == views[:, 2]).all((1, 2))
    assert 0.12 < grey.mean() < 0.28  # p = 0.2
    unjittered = [
        {tuple(p) for p in v.reshape(3, -1).T} >= {(200, 0, 0), (0, 0, 100)} for v in views
    ]
    assert 0.03 < np.mean(unjittered) < 0.3  # p = 0.2 at most: crops may show one half only
    red_left = views[:, 0, :, 0].mean(1) > views[:, 0, :, -1].mean(1)
    red_right = views[:, 0, :, 0].mean(1) < views[:, 0, :, -1].mean(1)
    assert 0.35 < red_left.sum() / (red_left | red_right).sum() < 0.65
