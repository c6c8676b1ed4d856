"""Tests scores against closed forms and plain loops, and that nothing else decides their bits."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_jobs.impressions import scores as scores_module
from feature_jobs.impressions.scores import (
    mean_scores,
    sim_buckets,
    sim_scores,
    simtier,
    tier_of,
    top_positions,
)
from feature_jobs.items.item_vectors import whole_steps
from feature_jobs.schemas import Tiers
from tests.support import oracles
from tests.support.codebooks import unit_rows


@pytest.mark.parametrize("run_rows", [16, 3, 1])
@pytest.mark.parametrize("at_once", [512, 7])
@pytest.mark.parametrize("places", [64, 3])
def test_scores_equal_the_loop_however_rows_share_histories(
    monkeypatch: pytest.MonkeyPatch, run_rows: int, at_once: int, places: int
) -> None:
    rng = np.random.default_rng(0)
    vectors = unit_rows(20)
    sizes = rng.integers(1, 9, 30)  # of runs of neighbours with one history
    past, of = rng.integers(-1, 20, (30, 4)), np.arange(30).repeat(sizes)
    shown = rng.integers(-1, 20, len(of))
    named = dict(enumerate(vectors))
    expected = [
        oracles.score(int(i), [int(j) for j in past[k]], named, 4)
        for i, k in zip(shown, of, strict=True)
    ]
    monkeypatch.setattr(scores_module, "_RUN_ROWS", run_rows)
    monkeypatch.setattr(scores_module, "_NUMBERS_AT_ONCE", at_once * 256)
    monkeypatch.setattr(scores_module, "_PLACES_AT_ONCE", places)
    scores, mask = sim_scores(vectors, shown, past, of)
    np.testing.assert_allclose(scores, [s for s, _ in expected], atol=1e-6)
    assert mask.tolist() == [m for _, m in expected]
    assert (mask == 0).any()
    assert (mask == 1).any()


def test_a_vector_and_itself_score_1_its_opposite_minus_1_and_none_beyond() -> None:
    x = unit_rows(50, seed=3)
    itself, opposite = np.arange(50), np.arange(50, 100)
    both = np.stack([itself, opposite], axis=1)
    scores, _ = sim_scores(np.concatenate([x, -x]), itself, both, itself)
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    np.testing.assert_allclose(scores[:, 1], -1, atol=1e-6)
    assert np.abs(scores).max() <= 1


@pytest.mark.parametrize(
    ("score", "tier"),
    [(-1.0, 0), (-0.95, 0), (-0.85, 1), (-0.05, 9), (0.0, 10), (0.05, 10), (0.95, 19), (1.0, 19)],
)
def test_a_score_falls_into_its_tier(score: float, tier: int) -> None:
    counts = simtier(np.array([[score]], np.float32), np.array([[1]], np.int8))
    assert counts.shape == (1, 20)
    assert np.flatnonzero(counts[0]).tolist() == [tier]


def test_tiers_count_real_scores_only_and_equal_the_loop() -> None:
    rng = np.random.default_rng(1)
    scores = rng.uniform(-1, 1, (40, 7)).astype(np.float32)
    mask = rng.integers(0, 2, (40, 7)).astype(np.int8)
    expected = [
        oracles.tiers(s.tolist(), m.tolist()) for s, m in zip(scores, mask, strict=True)
    ]  # fmt: skip
    assert simtier(scores, mask).tolist() == expected
    assert simtier(scores, mask).sum(axis=1).tolist() == mask.sum(axis=1).tolist()


EDGES = np.arange(-10, 11, dtype=np.float32) / np.float32(10)


@pytest.mark.parametrize(
    ("score", "tier"),
    [(-1.0, 0), (-0.95, 1), (-0.1, 9), (-0.05, 10), (-0.0, 10), (0.0, 10), (1e-45, 11), (0.1, 11),
     (0.3, 13), (0.7, 17), (0.9, 19), (0.95, 20), (1.0, 20)],
)  # fmt: skip
def test_the_tiers_of_muse_end_at_tenths_which_are_theirs(score: float, tier: int) -> None:
    found = simtier(np.array([[score]], np.float32), np.array([[1]], np.int8), "muse")
    assert (found.shape, found.dtype) == ((1, 22), np.float32)
    assert np.flatnonzero(found[0]).tolist() == [tier]
    assert found[0, tier] == np.float32(np.log(2))


def test_the_float32_numbers_beside_an_edge_are_on_their_side_of_it() -> None:
    above, below = (np.nextafter(EDGES, np.float32(end)) for end in (2, -2))
    tiers = np.arange(21)
    assert tier_of(EDGES[None], "muse")[0].tolist() == tiers.tolist()
    assert tier_of(below[None, 1:], "muse")[0].tolist() == tiers[1:].tolist()
    assert tier_of(above[None, :-1], "muse")[0].tolist() == (tiers[:-1] + 1).tolist()


def test_the_tiers_of_muse_are_those_of_its_arithmetic() -> None:
    scores = np.random.default_rng(5).uniform(-1, 1, (100, 1000)).astype(np.float32)
    told = np.clip(np.ceil(np.float32(10) * scores).astype(int) + 10, 0, 21)
    np.testing.assert_array_equal(tier_of(scores, "muse"), told)


def drawn_scores(rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Draws scores by tenths, so that many are equal and at edges, and which are real."""
    rng = np.random.default_rng(3)
    mask = rng.integers(0, 2, (rows, 7)).astype(np.int8)
    mask[0], mask[1] = 0, 1
    return np.where(mask > 0, rng.choice(EDGES, (rows, 7)), np.float32(0)), mask


def test_the_tiers_of_muse_count_what_is_not_real_as_0_and_equal_the_loop() -> None:
    scores, mask = drawn_scores()
    found = simtier(scores, mask, "muse")
    np.testing.assert_allclose(found, [oracles.muse_tiers(s.tolist()) for s in scores], rtol=1e-7)
    assert found[0, 10] == np.float32(np.log(8))
    assert simtier(scores[:0], mask[:0], "muse").shape == (0, 22)


@pytest.mark.parametrize("tiers", ["courier", "muse"])
def test_a_bucket_is_the_tier_of_a_real_score_and_0_without(tiers: Tiers) -> None:
    scores, mask = drawn_scores()
    found = sim_buckets(scores, mask, tiers)
    assert found.dtype == np.int32
    rows = zip(scores.tolist(), mask.tolist(), strict=True)
    assert found.tolist() == [oracles.buckets(s, m, tiers == "muse") for s, m in rows]
    assert found.max() <= (20 if tiers == "courier" else 21)


@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_top_positions_are_places_of_the_largest_real_scores_the_newer_first(k: int) -> None:
    scores, mask = drawn_scores()
    found = top_positions(scores, mask, k)
    assert (found.shape, found.dtype) == ((40, k), np.int32)
    rows = zip(scores.tolist(), mask.tolist(), strict=True)
    assert found.tolist() == [oracles.top_positions(s, m, k) for s, m in rows]
    assert not found[0].any()
    nothing = np.zeros((2, 0), np.float32)
    assert top_positions(nothing, nothing.astype(np.int8), k).tolist() == [[0] * k] * 2


def test_of_equal_scores_the_newer_place_comes_first() -> None:
    scores = np.array([[-0.5, 0.5, 0.5, 0.0, -0.0]], np.float32)
    mask = np.array([[1, 1, 1, 0, 1]], np.int8)
    assert top_positions(scores, mask, 5).tolist() == [[2, 3, 5, 1, 0]]


def test_means_are_of_real_scores_and_0_without_any() -> None:
    rng = np.random.default_rng(2)
    scores = rng.uniform(-1, 1, (40, 50)).astype(np.float32)
    known = rng.integers(0, 50, 40)
    known[0] = 0
    scores[np.arange(50) >= known[:, None]] = 0
    expected = [
        np.mean(s[:k].astype(np.float64)) if k else 0 for s, k in zip(scores, known, strict=True)
    ]
    np.testing.assert_allclose(mean_scores(scores, known), expected, atol=1e-7)
    assert mean_scores(scores, known).dtype == np.float32


# ---- Bits --------------------------------------------------------------------------------------

# Of OpenBLAS; a CPU runs some of them, and a build knows some.
KERNELS = {
    "x86_64": ("Prescott", "Nehalem", "Sandybridge", "Haswell", "Zen", "SkylakeX", "Cooperlake",
               "SapphireRapids"),
    "aarch64": ("ARMV8", "CORTEXA53", "NEOVERSEN1", "NEOVERSEV1"),
}.get(platform.machine(), ())  # fmt: skip
SCORE = """
import sys, numpy as np, threadpoolctl
from feature_jobs.impressions.scores import mean_scores, sim_scores
world = np.load(sys.argv[1])
scores, mask = sim_scores(*(world[name] for name in ("vectors", "shown", "past", "of")))
np.save(sys.argv[2], np.column_stack([scores, mean_scores(scores, mask.sum(axis=1))]))
pools = threadpoolctl.threadpool_info()
print(*(pool["architecture"] for pool in pools if pool["internal_api"] == "openblas"))
"""
World = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module", params=[256])
def world(request: pytest.FixtureRequest) -> World:
    """Draws vectors, impressions, histories, and which of these each impression has.

    The vectors are longer than 1 by what embeddings may be, with components of all sizes.
    """
    rng, items, length, d = np.random.default_rng(4), 200, 50, request.param
    vectors = rng.normal(size=(items, d)) * rng.lognormal(0, 2, (items, d))
    vectors *= 1.0009 / np.linalg.norm(vectors, axis=1, keepdims=True)
    of = np.arange(40).repeat(rng.integers(1, 20, 40))
    shown, past = rng.integers(-1, items, len(of)), rng.integers(-1, items, (40, length))
    past[:, 7] = shown[np.searchsorted(of, np.arange(40))]  # some are their own history
    return whole_steps(vectors.astype(np.float32)), shown, past, of


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("world", [17, 256, 2048], indirect=True)
def test_scores_are_exact_sums_rounded_once(world: World) -> None:
    vectors, shown, past, of = world
    scores, mask = sim_scores(*world)
    steps = [[int(x) for x in row] for row in vectors.astype(np.float64) * 2**26]
    assert np.abs(scores).max() == 1  # cut there
    for row in range(0, len(of), 9):
        for place, item in enumerate(past[of[row]]):
            if mask[row, place]:
                exact = sum(x * y for x, y in zip(steps[shown[row]], steps[item], strict=True))
                assert scores[row, place] == np.float32(np.clip(exact / 2**52, -1, 1))


@pytest.mark.parametrize("world", [256, 2048], indirect=True)
@pytest.mark.parametrize("at_a_time", [1, 3, 64])
def test_company_and_place_leave_the_bits_of_a_score_alone(world: World, at_a_time: int) -> None:
    vectors, shown, past, of = world
    scores, _ = sim_scores(*world)
    for rows in (
        np.arange(len(of)),
        np.arange(len(of)).repeat(2),
        np.arange(0, len(of), 2),
        np.random.default_rng(6).permutation(len(of)),
    ):
        for at in range(0, len(rows), at_a_time):
            some = rows[at : at + at_a_time]
            kept, new = np.unique(of[some], return_inverse=True)
            order = np.argsort(new, kind="stable")
            found, _ = sim_scores(vectors, shown[some][order], past[kept], new[order])
            assert same_bits(found, scores[some[order]])


def test_means_do_not_depend_on_the_order_of_scores(world: World) -> None:
    scores, mask = sim_scores(*world)
    known = mask.sum(axis=1)
    means = mean_scores(scores, known)
    for seed in range(20):
        mixed = np.random.default_rng(seed).permutation(scores, axis=1)
        assert same_bits(mean_scores(mixed, known), means)


def test_every_kernel_that_the_cpu_runs_gives_the_same_bits(world: World, tmp_path: Path) -> None:
    names = dict(zip(("vectors", "shown", "past", "of"), world, strict=True))
    np.savez(tmp_path / "world.npz", **names)
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    told = [{"OPENBLAS_CORETYPE": kernel} for kernel in KERNELS]
    told.append({"NPY_DISABLE_CPU_FEATURES": " ".join(features)})  # numpy's own sums
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCORE, tmp_path / "world.npz", tmp_path / f"{n}.npy"],
            env=os.environ | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of a kernel that the CPU cannot run
            text=True,
        )
        for n, more in enumerate(told)
    ]
    taken = [process.communicate()[0].split() for process in started]
    scores, mask = sim_scores(*world)
    expected = np.column_stack([scores, mean_scores(scores, mask.sum(axis=1))])
    ran = [n for n, process in enumerate(started) if not process.returncode]
    assert len(told) - 1 in ran
    for n in ran:
        assert same_bits(np.load(tmp_path / f"{n}.npy"), expected), (told[n], taken[n])
    if platform.machine() == "x86_64":
        kernels = {kernel for n in ran for kernel in taken[n]}
        assert len(kernels) > 1, kernels
