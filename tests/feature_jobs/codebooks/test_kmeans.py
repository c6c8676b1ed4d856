"""Tests Lloyd's k-means, the single pass beside its plain loop, and what a fit asks beforehand."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.codebooks import kmeans
from feature_jobs.codebooks.kmeans import SinglePass, count_distinct, estimate, first_centres, lloyd
from feature_jobs.codebooks.nearest import CentreSearch
from tests.support import processes
from tests.support.codebooks import unit_rows


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def mixture(count: int, kinds: int, seed: int = 0, noise: float = 0.6) -> np.ndarray:
    """Returns unit vectors about `kinds` directions, some often and some seldom (Zipf)."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, kinds + 1)
    kind = rng.choice(kinds, count, p=chance / chance.sum())
    middles = unit(np.random.default_rng(99).normal(size=(kinds, 256)))
    widths = rng.uniform(0.2, 1.8, (kinds, 256)) / 16  # of each kind another one in each direction
    return unit(middles[kind] + noise * widths[kind] * rng.normal(size=(count, 256)))


def objective(points: np.ndarray, centres: np.ndarray) -> float:
    return float((CentreSearch(centres).nearest(points).distance.astype(float) ** 2).mean())


# ---- Lloyd -------------------------------------------------------------------------------------


def test_lloyd_depends_on_the_seed_and_on_nothing_else() -> None:
    points = mixture(3000, 40)
    first, again, other = (lloyd(points, 16, seed) for seed in (3, 3, 4))
    assert (first.shape, first.dtype) == ((16, 256), np.float32)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_lloyd_ends_where_points_are_the_means_of_their_centres() -> None:
    points = mixture(1000, 8, noise=0.1)
    centres = lloyd(points, 8, seed=1)
    place = CentreSearch(centres).nearest(points).place
    for at in range(8):
        np.testing.assert_allclose(centres[at], points[place == at].mean(axis=0), atol=1e-5)


def test_lloyd_begins_with_the_centres_that_it_is_given() -> None:
    points = mixture(3000, 12, noise=0.1)
    # Half a kind's direction is nearest to that kind still; each centre keeps its place.
    middles = unit(np.random.default_rng(99).normal(size=(12, 256)))
    for order in (np.arange(12), np.arange(12)[::-1]):
        centres = lloyd(points, 12, seed=5, start=middles[order] / 2)
        assert ((centres @ middles[order].T).argmax(axis=1) == np.arange(12)).all()
        np.testing.assert_allclose(unit(centres), middles[order], atol=0.05)


# ---- The single pass ---------------------------------------------------------------------------


def plain_pass(
    points: np.ndarray, start: np.ndarray, epoch_rows: int, threshold: float
) -> tuple[np.ndarray, int]:
    """Runs METHOD §6 with plain loops.

    Tells also how many centres were left without a point and moved.
    """
    clusters, moved = len(start), 0
    centres = [c.astype(np.float64) for c in start]
    before = [(c * epoch_rows / 2 / clusters, epoch_rows / 2 / clusters) for c in centres]
    queue = list(points.astype(np.float64))
    while True:
        epoch, queue = queue[:epoch_rows], queue[epoch_rows:]
        mine: list[list[np.ndarray]] = [[] for _ in centres]
        for x in epoch:
            mine[int(np.argmin([((x - c) ** 2).sum() for c in centres]))].append(x)
        spread = [
            sum(((x - c) ** 2).sum() for x in xs) for c, xs in zip(centres, mine, strict=True)
        ]
        sums = [(sum(xs, np.zeros(256)), float(len(xs))) for xs in mine]
        if len(epoch) < epoch_rows:  # unfinished: joined with the one before
            sums = [(s + t, n + m) for (s, n), (t, m) in zip(sums, before, strict=True)]
        for at, (total, count) in enumerate(sums):
            if count:
                mean = [np.sign(v) * max(abs(v) - threshold, 0) for v in total / count]
                centres[at] = np.array(mean, np.float32).astype(np.float64)
        if not queue:
            return np.array(centres, np.float32), moved
        lonely = [at for at in range(clusters) if not mine[at]]
        widest = sorted(range(clusters), key=lambda at: -spread[at])
        sign = np.array([-1, 1] * 128) / 1024
        for at, wide in zip(lonely, widest, strict=False):
            centres[at], centres[wide] = centres[wide] * (1 + sign), centres[wide] * (1 - sign)
            sums[wide] = (sums[wide][0] / 2, sums[wide][1] / 2)
            sums[at] = sums[wide]
            moved += 1
        before, epoch_rows, threshold = sums, epoch_rows * 2, threshold / np.sqrt(2)


def a_start(clusters: int = 6) -> np.ndarray:
    """Returns first centres of which one is so far away that no point comes to it."""
    start = mixture(clusters, 12, seed=7)
    start[2] *= 9
    return start


@pytest.mark.parametrize("threshold", [0.0, 0.02])
@pytest.mark.parametrize("rows", [0, 11, 20, 60, 61, 250])
def test_a_single_pass_is_the_plain_loop(rows: int, threshold: float) -> None:
    points, start = mixture(rows, 12), a_start()
    expected, moved = plain_pass(points, start, 20, threshold)
    assert moved == (0 if rows <= 20 else 1), "of the epochs, one leaves a centre alone"
    assert bool((expected == 0).any()) == (threshold > 0)
    single_pass = SinglePass(start, threshold, epoch_rows=20)
    single_pass.add(points)
    np.testing.assert_allclose(single_pass.centres(), expected, atol=2e-6)
    assert single_pass.centres().dtype == np.float32


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=8))
def test_how_a_stream_is_cut_does_not_matter(cuts: list[int]) -> None:
    points, start = mixture(90, 12), a_start()
    whole, parts = (SinglePass(start, 0.02, epoch_rows=20) for _ in range(2))
    whole.add(points)
    for part in np.split(points, sorted(cuts)):
        parts.add(part)
        parts.centres()  # asking changes nothing
    np.testing.assert_array_equal(parts.centres(), whole.centres())


def test_the_threshold_takes_small_coordinates_and_shrinks_by_root_2_each_epoch() -> None:
    point = np.zeros((1, 256), np.float32)
    point[0, :4] = (0.8, -0.5, 0.09, -0.04)
    single_pass = SinglePass(point, 0.1, epoch_rows=8)
    for epoch, expected in enumerate([(0.7, -0.4, 0, 0), (0.7293, -0.4293, 0.0193, 0)]):
        single_pass.add(np.repeat(point, 8 * 2**epoch, axis=0))
        np.testing.assert_allclose(single_pass.centres()[0, :4], expected, atol=1e-4)
    single_pass.add(np.repeat(point, 32, axis=0))
    assert single_pass.centres()[0, 3] == 0
    assert single_pass.centres()[0, 2] == pytest.approx(0.09 - 0.05)


def test_a_single_pass_ends_as_near_to_the_points_as_lloyd_within_3_percent() -> None:
    points, clusters = mixture(20_000, 300), 64
    single_pass = SinglePass(first_centres(points[: 32 * clusters], clusters, seed=1))
    start = objective(points, single_pass.centres())
    single_pass.add(points)
    reference = objective(points, lloyd(points[: 256 * clusters], clusters, seed=2))
    assert start > 1.02 * reference  # or the pass would have had nothing to do
    assert objective(points, single_pass.centres()) < 1.03 * reference


# ---- Before a fit ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 255), st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0, 1e-30])),
        min_size=1,
    )
)
def test_distinct_rows_are_counted_as_by_sorting_them(cells: list[tuple[int, float]]) -> None:
    points = np.zeros((len(cells), 256), np.float32)
    for row, (column, value) in enumerate(cells):
        points[row, column] = value
        points[row, column // 2] = value
    assert count_distinct(points) == len(np.unique(points, axis=0))


@pytest.mark.parametrize("dimension", [16, 17, 64, 2047])
def test_distinct_rows_of_any_dimension_are_counted(dimension: int) -> None:
    points = np.tile(np.eye(dimension, dtype=np.float32), (1 + 10_000 // dimension, 1))
    assert count_distinct(points) == dimension
    points[-1, -1] = 3  # the last column of an odd number counts too
    assert count_distinct(points) == dimension + 1


@pytest.mark.parametrize("dimension", [64, 767])
def test_lloyds_and_the_single_pass_take_any_dimension(dimension: int) -> None:
    kinds = unit_rows(8, seed=5, dimension=dimension)
    points = kinds.repeat(400, axis=0) + 0.02 * unit_rows(3200, dimension=dimension)
    points = np.random.default_rng(0).permutation(points.astype(np.float32))
    start = kinds + np.float32(0.1) * unit_rows(8, seed=6, dimension=dimension)
    assert objective(points, start) > 0.005
    single = SinglePass(start, epoch_rows=200)
    for at in range(0, len(points), 900):
        single.add(points[at : at + 900])
    for centres in (lloyd(points, 8, 1, start), single.centres()):
        assert (centres.shape, centres.dtype) == ((8, dimension), np.float32)
        assert objective(points, centres) == pytest.approx(0.02**2, rel=0.05)


def test_distinct_rows_of_round_numbers_and_of_several_blocks_are_counted() -> None:
    assert count_distinct(np.zeros((0, 256), np.float32)) == 0
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), (10_000, 256))
    assert count_distinct(np.concatenate([signs, signs[::-1]])) == 10_000
    assert count_distinct(np.concatenate([np.eye(256), -np.eye(256)]).astype(np.float32)) == 512


def test_estimates_grow_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_seconds_per_product", lambda *_: 1e-9)
    small = estimate("lloyd", 100_000, 0, [1000], 256)
    large = estimate("lloyd", 1_000_000, 0, [1000], 256)
    assert 8 < large.bytes / small.bytes < 11
    assert large.seconds == pytest.approx(10 * small.seconds)
    wide = estimate("lloyd", 100_000, 0, [1000], 2048)
    assert wide.bytes - small.bytes == 4 * (2048 - 256) * (100_000 + 3 * 1000)
    several = estimate("lloyd", 100_000, 0, [1000, 1000, 16_000], 256)
    assert small.bytes < several.bytes < small.bytes + (64 << 20)
    assert several.seconds > 5 * small.seconds
    short, long = (estimate("single-pass", 32_000, rows, [1000], 256) for rows in (10**6, 10**8))
    assert short.bytes == long.bytes
    assert long.seconds > 20 * short.seconds
    both = estimate("single-pass", 32_000, 10**6, [1000, 10_000], 256)
    assert both.bytes > long.bytes + 10_000 * 256 * 40


MEASURE = """
import re, sys
import numpy as np
from feature_jobs.codebooks import kmeans
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
what, n, k = sys.argv[1], *map(int, sys.argv[2:])
kmeans.lloyd(np.ones((64, 256), np.float32), 2, 0, iterations=1)  # what is loaded at the first use
kmeans.SinglePass(np.eye(2, 256, dtype=np.float32)).add(np.ones((64, 256), np.float32))
open("/proc/self/clear_refs", "w").write("5")  # the peak is what is held now
before = peak()
points = np.random.default_rng(0).standard_normal((n, 256), np.float32)
if what == "lloyd":
    kmeans.lloyd(points, k, 0, iterations=2)
else:
    single_pass = kmeans.SinglePass(points[:k], epoch_rows=n // 3)
    single_pass.add(points)
    single_pass.centres()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("algorithm", "slack"), [("lloyd", 0), ("single-pass", 256 << 20)])
def test_memory_is_what_was_estimated(algorithm: str, slack: int) -> None:
    process = processes.start(MEASURE, algorithm, 12_000, 8000)
    measured = int(process.communicate(timeout=60)[0])
    expected = estimate(algorithm, 12_000, 12_000, [8000], 256).bytes
    assert 4 * 256 * 12_000 < measured <= 1.1 * expected
    assert expected < 1.5 * measured + slack
