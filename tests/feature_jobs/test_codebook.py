"""Codebooks: the exact nearest centre, packages that cannot be confused, fits that are refused."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs import codebook as codebooks
from feature_jobs import tables
from feature_jobs.codebook import load_codebook, nearest_centre, read_codebook_info, save_codebook
from feature_jobs.fit_codebook import check_sample, draw_sample, make_codebook, sample_fraction
from feature_jobs.schemas import DataContractError, OperatorError
from tests.support import oracles

FLOATS = pa.list_(pa.float32())


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 256)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embeddings(points: np.ndarray, **columns: object) -> pa.Table:
    return pa.table(
        {
            "item_id": np.arange(len(points)),
            "embedding": tables.list_column(points, FLOATS),
            "category": pa.array(["dress", None] * (len(points) // 2), pa.string()),
            "in_catalogue": np.arange(len(points)) % 10 != 0,
        }
    )


# ---- The nearest centre ------------------------------------------------------------------------


def test_the_nearest_centre_is_that_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    centres, points = unit_rows(30, seed=1), unit_rows(200, seed=2)
    expected = [oracles.nearest(point, centres) for point in points]
    assert len({place for place, _ in expected}) > 20
    for cells in (1 << 25, 100):  # in one block, and three rows at a time
        monkeypatch.setattr(codebooks, "_BLOCK_CELLS", cells)
        place, distance = nearest_centre(centres, points)
        assert place.tolist() == [p for p, _ in expected]
        np.testing.assert_allclose(distance, [d for _, d in expected], rtol=1e-5)


def test_a_centre_is_assigned_to_itself_and_ties_go_to_the_first() -> None:
    centres = unit_rows(10)
    place, distance = nearest_centre(centres, centres)
    assert place.tolist() == list(range(10))
    np.testing.assert_allclose(distance, 0, atol=1e-6)
    twice = np.concatenate([centres, centres])
    assert nearest_centre(twice, centres)[0].tolist() == list(range(10))


def test_no_items_are_assigned_to_nothing() -> None:
    place, distance = nearest_centre(unit_rows(3), np.zeros((0, 256), np.float32))
    assert (place.shape, distance.shape) == ((0,), (0,))


# ---- Packages ----------------------------------------------------------------------------------


def fitted(clusters: int = 4, seed: int = 0) -> codebooks.Codebook:
    sample = embeddings(unit_rows(60)).select(["item_id", "embedding"])
    return make_codebook(sample, clusters, seed, "book", "tiny-000000000000", "2026-01-05")


def test_a_saved_codebook_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    made = fitted()
    loaded = load_codebook(save_codebook(str(tmp_path), made))
    assert loaded.info == made.info
    np.testing.assert_array_equal(loaded.centres, made.centres)
    assert loaded.numbers.tolist() == [1, 2, 3, 4]
    assert loaded.info.max_id == 4
    assert sum(loaded.info.sizes) == 60


def test_the_id_changes_with_centres_numbers_and_encoder() -> None:
    made = fitted()
    ids = {
        made.info.codebook_id,
        codebooks.codebook_id("book", made.centres + 1, made.numbers, made.info.encoder_id),
        codebooks.codebook_id("book", made.centres, made.numbers + 1, made.info.encoder_id),
        codebooks.codebook_id("book", made.centres, made.numbers, "other-000000000000"),
    }
    assert len(ids) == 4


@pytest.mark.parametrize("name", ["centres.npy", "numbers.npy"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "pickled"])
def test_a_damaged_codebook_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    path = Path(save_codebook(str(tmp_path), fitted())) / name
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        path.write_bytes(data[:-4] + bytes(4)[::-1] if data[-4:] != bytes(4) else data[:-1] + b"1")
    elif damage == "missing":
        path.unlink()
    else:
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataContractError, match="is damaged"):
        load_codebook(str(path.parent))


def test_a_folder_without_a_codebook_is_the_operators_mistake(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="is no codebook package"):
        read_codebook_info(str(tmp_path))


# ---- Fitting -----------------------------------------------------------------------------------


def test_a_fit_depends_on_the_seed_and_on_nothing_else() -> None:
    assert fitted().info == fitted().info
    assert fitted(seed=1).info.codebook_id != fitted().info.codebook_id
    sample = embeddings(unit_rows(60)).select(["item_id", "embedding"])
    backwards = sample.take(pa.array(np.arange(60)[::-1]))
    turned = make_codebook(backwards, 4, 0, "book", "tiny-000000000000", "2026-01-05")
    assert turned.info == fitted().info


def test_the_objective_falls_with_more_clusters() -> None:
    objectives = [fitted(clusters).info.objective for clusters in (1, 4, 16, 60)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] == pytest.approx(0, abs=1e-6)


def test_more_clusters_than_distinct_points_are_refused_with_the_number() -> None:
    points = np.concatenate([unit_rows(10)] * 5)
    check_sample(points, 10)
    with pytest.raises(OperatorError, match="at most 10"):
        check_sample(points, 11)
    with pytest.raises(OperatorError, match="0 distinct"):
        check_sample(points[:0], 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0])
def test_rows_that_are_no_unit_vectors_are_refused(value: float) -> None:
    points = unit_rows(10)
    points[3, 5] = value
    with pytest.raises(DataContractError, match="1 of 10 sampled embeddings"):
        check_sample(points, 2)


def test_the_sample_holds_catalogue_items_in_scope_only() -> None:
    rows = embeddings(unit_rows(100))
    everything = draw_sample(rows, None, 1.0)["item_id"].to_pylist()
    assert everything == [i for i in range(100) if i % 10]
    scoped = draw_sample(rows, ("dress",), 1.0)["item_id"].to_pylist()
    assert scoped == [i for i in range(100) if i % 10 and i % 2 == 0]


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_the_fraction_is_a_share_and_aims_at_256_items_per_cluster(items: int, k: int) -> None:
    fraction = sample_fraction(items, k)
    assert 0 < fraction <= 1
    assert fraction == 1 or fraction * items == pytest.approx(256 * k)


def test_a_smaller_fraction_draws_a_part_of_the_larger_ones_sample() -> None:
    rows = embeddings(unit_rows(2000))
    samples = [set(draw_sample(rows, None, f)["item_id"].to_pylist()) for f in (0.1, 0.3, 1.0)]
    assert samples[0] < samples[1] < samples[2]
    assert 0.07 < len(samples[0]) / len(samples[2]) < 0.13


def test_a_damaged_folder_copy_is_told_from_the_original(tmp_path: Path) -> None:
    folder = Path(save_codebook(str(tmp_path / "a"), fitted()))
    other = Path(save_codebook(str(tmp_path / "b"), fitted(seed=1)))
    shutil.copy(other / "centres.npy", folder / "centres.npy")
    with pytest.raises(DataContractError, match="is damaged"):
        load_codebook(str(folder))
