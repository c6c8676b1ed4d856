"""Tests scores against closed forms and plain loops, and that nothing else decides their bits."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feature_jobs.impressions import scores as scores_module
from feature_jobs.impressions.scores import mean_scores, sim_scores, simtier
from feature_jobs.items.item_vectors import whole_steps
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
    monkeypatch.setattr(scores_module, "_VECTORS_AT_ONCE", at_once)
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


@pytest.fixture(scope="module")
def world() -> World:
    """Draws vectors, impressions, histories, and which of these each impression has.

    The vectors are longer than 1 by what embeddings may be, with components of all sizes.
    """
    rng, items, length = np.random.default_rng(4), 200, 50
    vectors = rng.normal(size=(items, 256)) * rng.lognormal(0, 2, (items, 256))
    vectors *= 1.0009 / np.linalg.norm(vectors, axis=1, keepdims=True)
    of = np.arange(40).repeat(rng.integers(1, 20, 40))
    shown, past = rng.integers(-1, items, len(of)), rng.integers(-1, items, (40, length))
    past[:, 7] = shown[np.searchsorted(of, np.arange(40))]  # some are their own history
    return whole_steps(vectors.astype(np.float32)), shown, past, of


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


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
