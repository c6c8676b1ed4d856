"""The nearest centre is exact in float64 whatever screening rounds, and of each row by itself."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.codebooks import kernels
from feature_jobs.codebooks import nearest as module
from feature_jobs.codebooks.kernels import Kernel
from feature_jobs.codebooks.nearest import CentreSearch
from feature_jobs.store import threads
from tests.support import oracles
from tests.support.codebooks import unit_rows

KERNELS = kernels.present()  # every one that this machine runs, fast or not
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


DIMENSIONS = [16, 17, 64, 255, 257, 768, 2047, 2048]


def crowded(count: int, seed: int, spread: float = 0.5, dimension: int = 256) -> np.ndarray:
    """Returns unit rows about ten directions, so that many are nearly as near as the nearest."""
    kinds = np.random.default_rng(seed).integers(0, 10, count)
    around = unit_rows(10, seed=99, dimension=dimension)[kinds]
    rows = around + spread * unit_rows(count, seed, dimension)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def check(rows: np.ndarray, centres: np.ndarray) -> None:
    """Compares with plain loops in float64, for the runner-up with a loop without the nearest.

    Whichever kernel screens, the bits are the same.
    """
    found, *others = [CentreSearch(centres, k).nearest(rows, second=True) for k in KERNELS]
    less = [CentreSearch(centres, kernel).nearest(rows) for kernel in KERNELS]
    for other in others:
        for part, same in zip(other, found, strict=True):
            np.testing.assert_array_equal(part, same)
    for other in less:
        np.testing.assert_array_equal(other.place, found.place)
        np.testing.assert_array_equal(other.distance, found.distance)
        assert np.isnan(other.second).all()
    rows, centres = rows.astype(np.float64), centres.astype(np.float64)
    expected = [oracles.nearest(row, centres) for row in rows]
    assert found.place.tolist() == [place for place, _ in expected]
    np.testing.assert_allclose(found.distance, [d for _, d in expected], rtol=1e-6)
    rest = [np.delete(centres, place, axis=0) for place, _ in expected]
    second = [oracles.nearest(row, c)[1] for row, c in zip(rows, rest, strict=True)]
    np.testing.assert_allclose(found.second, second, rtol=1e-6)
    assert (found.place.dtype, found.distance.dtype) == (np.int64, np.float32)
    assert found.second.dtype == np.float32


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets tiles of 256 centres, blocks of 32 rows, at most 64 pairs at once and 4 measured."""
    monkeypatch.setattr(module, "_TILE", 256)
    monkeypatch.setattr(module, "_ROWS", 32)
    monkeypatch.setattr(module, "_RANKED", 2)
    monkeypatch.setattr(module, "_MEASURED", 4)


# ---- The nearest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [2, 7, 128, 129, 1000])
def test_the_nearest_is_that_of_the_plain_loop_in_float64(clusters: int) -> None:
    check(crowded(40, seed=1), crowded(clusters, seed=2))


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_vectors_may_have_any_number_of_dimensions(dimension: int) -> None:
    rows, centres = crowded(30, 1, dimension=dimension), crowded(300, 2, dimension=dimension)
    check(rows, centres)
    check(30 * rows + 5, (centres + 5).astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(st.integers(16, 2048), st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 0.05, 1.0]))
def test_no_dimension_is_an_exception(dimension: int, seed: int, spread: float) -> None:
    rows, centres = (crowded(n, seed + n, spread, dimension) for n in (6, 140))
    check(rows, centres)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dimension", [64, 257, 2048])
def test_tiles_and_blocks_of_wide_and_narrow_vectors_change_nothing(dimension: int) -> None:
    check(crowded(70, 1, dimension=dimension), crowded(600, 2, dimension=dimension))


def test_blocks_of_wide_vectors_have_no_more_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, search_block = list[tuple[int, int]](), CentreSearch._search

    def note(self: CentreSearch, rows: Any, *given: Any) -> Any:
        sizes.append(rows.shape)
        return search_block(self, rows, *given)

    monkeypatch.setattr(CentreSearch, "_search", note)
    monkeypatch.setattr(module, "_ROWS", 512)
    for dimension in (64, 256, 768, 2048):
        rows = unit_rows(1500, dimension=dimension)
        CentreSearch(rows[:9]).nearest(rows)
    assert {d: max(n for n, found in sizes if found == d) for _, d in sizes} == {
        64: 512, 256: 512, 768: 170, 2048: 64,
    }  # fmt: skip


@pytest.mark.usefixtures("small_tiles")
def test_tiles_and_blocks_and_crowds_change_nothing() -> None:
    check(crowded(70, seed=1), crowded(600, seed=2))
    check(crowded(40, seed=1, spread=0.01), crowded(300, seed=2, spread=0.01))


def test_the_steps_of_a_gpu_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centres = crowded(70, seed=1), crowded(600, seed=2)
    centres[50:80] = centres[20:50]
    kept = [CentreSearch(centres, kernel).nearest(rows, second=True) for kernel in KERNELS]
    monkeypatch.setattr(module, "_array", lambda tensor: tensor)
    for kernel, expected in zip(KERNELS, kept, strict=True):
        found = CentreSearch(centres, kernel).nearest(rows, second=True)
        for part, same in zip(found, expected, strict=True):
            np.testing.assert_array_equal(part, same)
    check(rows, centres)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_rows_and_centres_may_have_any_scale_and_lie_anywhere(scale: float, shift: float) -> None:
    rows, centres = (
        (scale * (a + shift)).astype(np.float32) for a in (crowded(30, 1), crowded(200, 2))
    )
    check(rows, centres)
    check(100 * rows, centres)


def test_centres_of_unequal_length_are_compared_by_distance_and_not_by_angle() -> None:
    lengths = np.random.default_rng(3).uniform(0, 3, (300, 1)).astype(np.float32)
    check(crowded(50, seed=1), lengths * unit_rows(300, seed=2))


def test_one_coordinate_far_larger_than_the_others_changes_nothing() -> None:
    rows, centres = crowded(30, seed=1), crowded(300, seed=2)
    centres[7, 3] = 50
    check(rows, centres)


def test_a_centre_is_its_own_nearest_at_distance_0() -> None:
    centres = unit_rows(300)
    found = CentreSearch(centres).nearest(centres)
    assert found.place.tolist() == list(range(300))
    assert found.distance.tolist() == [0.0] * 300


@EACH_KERNEL
def test_of_equal_centres_the_first_is_the_nearest_and_the_second_as_far(kernel: Kernel) -> None:
    centres = unit_rows(150)
    search = CentreSearch(np.concatenate([centres, centres, centres]), kernel)
    found = search.nearest(crowded(50, seed=1), second=True)
    assert (found.place < 150).all()
    np.testing.assert_array_equal(found.second, found.distance)
    assert search.nearest(centres).place.tolist() == list(range(150))


@EACH_KERNEL
def test_of_centres_that_are_all_equal_the_first_is_the_nearest(kernel: Kernel) -> None:
    search = CentreSearch(np.ones((700, 256), np.float32), kernel)
    found = search.nearest(unit_rows(100), second=True)
    assert found.place.tolist() == [0] * 100
    np.testing.assert_array_equal(found.second, found.distance)


def test_centres_that_float32_products_cannot_tell_apart_are_told_apart() -> None:
    rng = np.random.default_rng(4)
    base = unit_rows(1)
    centres = (base + rng.normal(size=(300, 256)) * 1e-7).astype(np.float32)
    rows = (base + rng.normal(size=(60, 256)) * 0.05).astype(np.float32)
    plain = (rows @ centres.T - 0.5 * (centres**2).sum(axis=1)).argmax(axis=1)
    check(rows, centres)
    assert (plain != CentreSearch(centres).nearest(rows).place).mean() > 0.1  # not trivial


def between_codes(kernel: Kernel, dimension: int = 256) -> np.ndarray:
    """Returns two sets of values of which rounding swaps the means: float32 [2, dimension].

    The greater mean is rounded down throughout, half of the lesser set up. Codes reach to 1.
    """
    step = 1 / 127 if kernel.whole else 2.0**-8
    fractions = np.stack([np.full(dimension, 0.49), np.tile([0.51, 0.45], dimension // 2)])
    return ((round(0.75 / step) + fractions) * step).astype(np.float32)


@EACH_KERNEL
@pytest.mark.parametrize("dimension", [16, 256, 2048])
def test_centres_whose_order_rounding_swaps_are_told_apart(kernel: Kernel, dimension: int) -> None:
    pair = between_codes(kernel, dimension)
    pair[:, 0] = 1  # as far as codes reach
    centres = np.concatenate([pair, -pair])
    # Along the error, which makes it as large as can be.
    rows = np.full((1, dimension), 100, np.float32)
    check(rows, centres)
    assert CentreSearch(centres, kernel).nearest(rows).place.tolist() == [0]


@EACH_KERNEL
def test_rows_whose_rounding_swaps_the_order_of_centres_find_the_nearest(kernel: Kernel) -> None:
    greater, lesser = between_codes(kernel)
    row = np.concatenate([greater[:126], lesser[:126], [0, 0, 0, 1]]).astype(np.float32)
    centres = np.zeros((4, 256), np.float32)
    centres[0, :126], centres[1, 126:252] = 0.01, 0.01
    centres[2:] = -centres[:2]
    check(row[None], centres)
    assert CentreSearch(centres, kernel).nearest(row[None]).place.tolist() == [0]


@EACH_KERNEL
def test_rows_halfway_between_centres_of_unequal_length_find_the_nearest(kernel: Kernel) -> None:
    centres = np.zeros((3, 256), np.float32)
    centres[1, 0], centres[2, 0] = 2, -2
    rows = np.zeros((400, 256), np.float32)
    rows[:, 0] = 1 + np.tile(np.float32([1e-4, -1e-4]), 200)
    rows[:, 1] = np.linspace(0, 400, 400)  # which only makes the codes of a row coarser
    place = CentreSearch(centres, kernel).nearest(rows).place
    np.testing.assert_array_equal(place, np.tile([1, 0], 200))


@EACH_KERNEL
def test_screening_leaves_few_pairs(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[int] = []

    def count(self: CentreSearch, rows: torch.Tensor, row: torch.Tensor, *given: Any) -> Any:
        pairs.append(len(row))
        return rank(self, rows, row, *given)

    rank = CentreSearch._rank
    monkeypatch.setattr(CentreSearch, "_rank", count)
    centres = unit_rows(1000, seed=2)
    rows = centres + 0.5 * unit_rows(1000, seed=3)
    assert CentreSearch(centres, kernel).nearest(rows).place.tolist() == list(range(1000))
    assert 1000 <= sum(pairs) <= 1100


@EACH_KERNEL
def test_of_one_centre_the_second_is_infinitely_far(kernel: Kernel) -> None:
    found = CentreSearch(unit_rows(1), kernel).nearest(unit_rows(40, seed=1), second=True)
    assert found.place.tolist() == [0] * 40
    assert np.isfinite(found.distance).all()
    assert found.second.tolist() == [np.inf] * 40


def test_no_rows_have_no_nearest() -> None:
    found = CentreSearch(unit_rows(3)).nearest(np.zeros((0, 256), np.float32))
    assert [len(part) for part in found] == [0, 0, 0]


# ---- The distance ------------------------------------------------------------------------------


def written_out(row: np.ndarray, centre: np.ndarray) -> np.float32:
    """Returns the distance by the sum that the module promises: halves onto halves, in float64."""
    squares = [(float(x) - float(c)) ** 2 for x, c in zip(row, centre, strict=True)]
    while len(squares) > 1:
        half = -(-len(squares) // 2)
        more = [*squares[half:], 0.0][:half]  # of an odd number the middle one stays
        squares = [one + other for one, other in zip(squares, more, strict=False)]
    return np.float32(np.sqrt(squares[0]))


@pytest.mark.parametrize("dimension", [16, 255, 256, 768])
def test_distances_have_the_bits_of_the_sum_that_is_written_out(dimension: int) -> None:
    rows, centres = crowded(60, 1, dimension=dimension), crowded(200, 2, dimension=dimension)
    found = CentreSearch(centres).nearest(rows, second=True)
    rest = [np.delete(centres, place, axis=0) for place in found.place]
    expected = [written_out(row, centres[at]) for row, at in zip(rows, found.place, strict=True)]
    second = [
        min(written_out(row, centre) for centre in others)
        for row, others in zip(rows, rest, strict=True)
    ]
    np.testing.assert_array_equal(found.distance, expected)
    np.testing.assert_array_equal(found.second, second)


def test_what_a_faster_sum_may_lose_moves_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centres = crowded(400, seed=1), crowded(500, seed=2)
    centres[100:150] = centres[:50]
    expected = CentreSearch(centres).nearest(rows, second=True)
    quick, rng = module._quick_squared_distance, np.random.default_rng(0)

    def losing(rows: np.ndarray, centres: np.ndarray) -> Any:
        # As much as moves some four in a hundred roots to another float32.
        return quick(rows, centres) * (1 + rng.choice([-9e-9, 9e-9], len(rows)))

    monkeypatch.setattr(module, "_ANY_ORDER", 1e-8)
    monkeypatch.setattr(module, "_quick_squared_distance", losing)
    for second in (False, True):
        found = CentreSearch(centres).nearest(rows, second)
        np.testing.assert_array_equal(found.place, expected.place)
        np.testing.assert_array_equal(found.distance, expected.distance)
    np.testing.assert_array_equal(found.second, expected.second)


@pytest.mark.parametrize("rivals", [0, 1, 200])
def test_how_many_rivals_a_centre_has_leaves_its_distance_alone(rivals: int) -> None:
    rows, centres = crowded(200, seed=1), unit_rows(1)
    near = centres + np.float32(1e-4) * unit_rows(rivals, seed=3)  # which no screening tells apart
    both = np.concatenate([centres, near])
    found = CentreSearch(both).nearest(rows)
    expected = [written_out(row, both[at]) for row, at in zip(rows, found.place, strict=True)]
    np.testing.assert_array_equal(found.distance, expected)


# ---- Each row by itself --------------------------------------------------------------------------

ROWS = crowded(400, seed=1)
CENTRES = crowded(500, seed=2)
SEARCH = CentreSearch(CENTRES)
WHOLE = SEARCH.nearest(ROWS, second=True)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 399), min_size=1, max_size=80))
def test_neither_order_nor_number_nor_company_of_rows_matters(picked: list[int]) -> None:
    found = SEARCH.nearest(ROWS[picked], second=True)
    for part, whole in zip(found, WHOLE, strict=True):
        np.testing.assert_array_equal(part, whole[picked])


@EACH_KERNEL
def test_a_wild_row_changes_no_other_and_one_that_is_not_finite_has_no_distance(
    kernel: Kernel,
) -> None:
    rows = ROWS.copy()
    rows[10], rows[20], rows[30] = 1e6, np.nan, np.inf
    found = CentreSearch(CENTRES, kernel).nearest(rows, second=True)
    others = np.delete(np.arange(400), [10, 20, 30])
    for part, whole in zip(found, WHOLE, strict=True):
        np.testing.assert_array_equal(part[others], whole[others])
    assert found.place[[20, 30]].tolist() == [0, 0]
    assert np.isnan(found.distance[[20, 30]]).all()


def test_as_many_blocks_are_searched_at_once_as_the_budget_of_threads_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "budget", lambda: 3)
    together, search_block = threading.Barrier(3, timeout=30), CentreSearch._search

    def wait(self: CentreSearch, *given: Any) -> Any:
        together.wait()  # raises where fewer than three come
        return search_block(self, *given)

    monkeypatch.setattr(CentreSearch, "_search", wait)
    np.testing.assert_array_equal(
        CentreSearch(CENTRES).nearest(ROWS[:300]).place, WHOLE.place[:300]
    )


def test_threads_may_share_a_search_and_torch_keeps_its_own_number_of_threads() -> None:
    def of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads(), of_a_new_thread()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: SEARCH.nearest(ROWS), range(8)):
            np.testing.assert_array_equal(found.place, WHOLE.place)
    assert (torch.get_num_threads(), of_a_new_thread()) == before


# ---- What it is given ----------------------------------------------------------------------------


def test_centres_and_rows_may_be_read_only_mapped_or_strided(tmp_path: Path) -> None:
    centres, rows = crowded(500, seed=2), ROWS.copy()
    np.save(tmp_path / "centres.npy", np.asfortranarray(centres))
    rows.flags.writeable = False
    for given_centres in (np.load(tmp_path / "centres.npy", mmap_mode="r"), centres[::-1][::-1]):
        search = CentreSearch(given_centres)
        for given_rows in (rows, np.asfortranarray(rows)):
            np.testing.assert_array_equal(search.nearest(given_rows).place, WHOLE.place)
