"""Tests fitting: which items it sees, what it refuses, and which number each centre gets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.codebooks.codebook import Codebook
from feature_jobs.codebooks.fit_codebook import (
    Fit,
    Sample,
    SampleJob,
    check_distinct,
    draw_sample,
    make_codebook,
    member_means,
    read_sample,
    sampling_shares,
    starting_centres,
    stream_embeddings,
)
from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import arrays, partitions
from tests.support.codebooks import unit_rows

FLOATS = pa.list_(pa.float32())
ENCODER, DS = "tiny-000000000000", "2026-01-05"


def embeddings(points: np.ndarray) -> pa.Table:
    """Returns rows of which every other is a dress, and every tenth no longer in the catalogue."""
    return pa.table(
        {
            "item_id": np.arange(len(points)),
            "embedding": arrays.list_column(points, FLOATS),
            "category": pa.array(["dress", None] * (len(points) // 2), pa.string()),
            "in_catalogue": np.arange(len(points)) % 10 != 0,
        }
    )


def job(fraction: float = 1.0, held_out: float = 0.0, **fields: object) -> SampleJob:
    nowhere = partitions.Partition("", {"files": []})
    return SampleJob(nowhere, 256, None, fraction, held_out, "", **fields)  # type: ignore[arg-type]


def drawn(rows: pa.Table, wanted: SampleJob, held_out: bool = False) -> list[int]:
    found = draw_sample(rows, wanted)
    mine = found["held_out"].to_numpy() == held_out
    ids: list[int] = found["item_id"].filter(pa.array(mine)).to_pylist()
    return ids


# ---- The sample --------------------------------------------------------------------------------


def test_the_sample_holds_catalogue_items_in_scope_only() -> None:
    rows = embeddings(unit_rows(100))
    assert drawn(rows, job()) == [i for i in range(100) if i % 10]
    scoped = drawn(rows, replace(job(), categories=("dress",)))
    assert scoped == [i for i in range(100) if i % 10 and i % 2 == 0]


def test_a_smaller_fraction_draws_a_part_of_the_larger_ones_sample() -> None:
    rows = embeddings(unit_rows(2000))
    samples = [set(drawn(rows, job(f))) for f in (0.1, 0.3, 1.0)]
    assert samples[0] < samples[1] < samples[2]
    assert 0.07 < len(samples[0]) / len(samples[2]) < 0.13


def test_the_order_of_rows_and_other_items_do_not_decide_who_is_drawn() -> None:
    rows = embeddings(unit_rows(500))
    wanted = job(0.3, 0.1)
    expected = set(drawn(rows, wanted))
    backwards = rows.take(pa.array(np.arange(500)[::-1]))
    assert set(drawn(backwards, wanted)) == expected
    assert set(drawn(rows.slice(0, 250), wanted)) == {i for i in expected if i < 250}


def test_held_out_items_are_never_fitted_on() -> None:
    rows = embeddings(unit_rows(2000))
    held_out, fitted = (
        set(drawn(rows, job(0.5, 0.1), held_out=True)),
        set(drawn(rows, job(0.5, 0.1))),
    )
    assert 120 < len(held_out) < 240
    assert not held_out & fitted
    assert set(drawn(rows, job(1.0, 0.1), held_out=True)) == held_out


@given(st.integers(1, 10_000_000), st.integers(1, 1000))
def test_the_fraction_is_a_share_and_aims_at_256_items_per_cluster(items: int, k: int) -> None:
    fraction, held_out = sampling_shares(items, k, 256)
    assert 0 < fraction <= 1
    assert 0 < held_out <= 0.05
    assert items * held_out <= 65_536 * 1.001
    assert fraction == 1 or fraction * items * (1 - held_out) == pytest.approx(256 * k)


def published(folder: Path, parts: list[pa.Table]) -> partitions.Partition:
    files = []
    for number, rows in enumerate(parts):
        name = f"{partitions.part_name(number, len(parts))}.parquet"
        partitions.write_parquet(str(folder / name), rows)
        files.append({"name": name, "rows": len(rows)})
    return partitions.Partition(str(folder), {"files": files})


def test_a_sample_is_read_in_the_order_of_hashes_whatever_the_files(tmp_path: Path) -> None:
    points = unit_rows(300)
    rows = embeddings(points)
    wanted = replace(job(0.6, 0.1), staging=str(tmp_path))
    samples = []
    for cuts in ([300], [100, 200]):
        parts = [rows.slice(sum(cuts[:n]), size) for n, size in enumerate(cuts)]
        for number, part in enumerate(parts):
            sample = draw_sample(part, wanted)
            partitions.write_parquet(str(tmp_path / "sample" / f"{number:05d}.parquet"), sample)
        samples.append(read_sample(replace(wanted, embeddings=published(tmp_path / "e", parts))))
    one, two = samples
    np.testing.assert_array_equal(one.points, two.points)
    np.testing.assert_array_equal(np.sort(one.held_out, axis=0), np.sort(two.held_out, axis=0))
    assert one.fingerprint == two.fingerprint != f"{0:016x}"
    assert len(one.points) == len(drawn(rows, wanted)) > 100
    wanted_points = points[drawn(rows, wanted)]
    np.testing.assert_array_equal(np.sort(one.points, axis=0), np.sort(wanted_points, axis=0))


def test_a_sample_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    rows = embeddings(unit_rows(20))
    wanted = replace(
        job(1.0, 0.1), staging=str(tmp_path),
        embeddings=published(tmp_path / "e", [rows.slice(0, 10), rows.slice(10)]),
    )  # fmt: skip
    partitions.write_parquet(str(tmp_path / "sample" / "00001.parquet"), draw_sample(rows, wanted))
    with pytest.raises(DataContractError, match="that were sampled: 1 of 2 came"):
        read_sample(wanted)


def test_the_stream_has_every_item_in_scope_that_is_not_held_out(tmp_path: Path) -> None:
    points = unit_rows(300)
    rows = embeddings(points)
    wanted = replace(job(0.1, 0.1), embeddings=published(tmp_path, [rows[:100], rows[100:]]))
    streamed = list(stream_embeddings(wanted))
    assert len(streamed) == 2
    expected = points[drawn(rows, job(1.0, 0.1))]
    found = np.concatenate(streamed)
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(expected, axis=0))
    assert not np.array_equal(found, expected)  # in another order


# ---- What is refused ---------------------------------------------------------------------------


def test_more_clusters_than_distinct_points_are_refused_with_the_number() -> None:
    points = np.concatenate([unit_rows(10)] * 5)
    check_distinct(points, 10)
    with pytest.raises(OperatorError, match="at most 10"):
        check_distinct(points, 11)
    with pytest.raises(OperatorError, match="0 distinct"):
        check_distinct(points[:0], 1)


# ---- Starting from another codebook ------------------------------------------------------------


def test_member_means_are_those_of_the_loop() -> None:
    points, rng = unit_rows(300), np.random.default_rng(0)
    numbers = np.array([9, 2, 5, 30], np.int32)
    old = rng.choice([0, 2, 5, 9, 11], 300).astype(np.int32)
    means, members = member_means(points, old, numbers)
    for place, number in enumerate(numbers):
        mine = points[old == number]
        assert members[place] == len(mine)
        expected = mine.mean(axis=0) if len(mine) else np.zeros(256)
        np.testing.assert_allclose(means[place], expected, atol=1e-6)
    assert members.tolist()[3] == 0
    assert members.sum() < 300


def test_a_continued_fit_starts_from_the_largest_old_clusters_with_items() -> None:
    points, anchors = unit_rows(50), unit_rows(4, seed=1)
    members = np.array([5, 0, 9, 7])
    two = starting_centres(points, anchors, members, 2, seed=0)
    np.testing.assert_array_equal(two, anchors[[2, 3]])
    five = starting_centres(points, anchors, members, 5, seed=0)
    np.testing.assert_array_equal(five[:3], anchors[[0, 2, 3]])
    for centre in five[3:]:  # points take the places of what is missing
        assert (points == centre).all(axis=1).any()


# ---- Codebooks ---------------------------------------------------------------------------------


def blobs(count: int, kinds: int, seed: int = 0, noise: float = 0.03) -> np.ndarray:
    """Returns points around `kinds` directions, the same ones whatever the seed."""
    rng = np.random.default_rng(seed)
    points = unit_rows(kinds, seed=99)[rng.integers(0, kinds, count)]
    points = points + rng.normal(size=points.shape) * noise
    unit: np.ndarray = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    return unit


def fitted(
    points: np.ndarray, clusters: int = 4, parent: Codebook | None = None, **asked: object
) -> Codebook:
    fit = Fit({"main": clusters}, **asked)  # type: ignore[arg-type]
    return make_codebook(
        Sample(points, blobs(50, 4, 7), "", {}), fit, ENCODER, DS, parent, [points]
    )


@pytest.mark.parametrize("algorithm", ["lloyd", "single-pass"])
def test_the_same_seed_gives_the_same_codebook_and_another_one_another(algorithm: str) -> None:
    points = unit_rows(200)
    one = fitted(points, algorithm=algorithm)
    assert fitted(points, algorithm=algorithm).info == one.info
    other = fitted(points, algorithm=algorithm, seed=1)
    assert other.info.codebook_id != one.info.codebook_id


def test_the_objective_falls_with_more_clusters_also_on_held_out_items() -> None:
    points = blobs(400, 4)
    found = [fitted(points, clusters).info.resolutions[0] for clusters in (1, 2, 4)]
    for kind in ("objective", "held_out_objective"):
        values = [getattr(resolution, kind) for resolution in found]
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0] / 2


def test_each_resolution_has_its_own_centres_numbers_and_sizes() -> None:
    points = blobs(400, 8)
    fit = Fit({"coarse": 2, "main": 4, "fine": 8})
    book = make_codebook(Sample(points, points[:0], ""), fit, ENCODER, DS)
    for resolution in book.info.resolutions:
        label, clusters = resolution.label, fit.clusters[resolution.label]
        assert book.centres[label].shape == (clusters, 256)
        assert sorted(book.numbers[label]) == list(range(1, clusters + 1))
        assert len(resolution.sizes) == clusters
        assert sum(resolution.sizes) == 400
        assert resolution.held_out_objective is None
        assert (resolution.max_id, resolution.retired) == (clusters, ())
    assert book.info.labels == ("main", "coarse", "fine")
    assert (book.info.parent, book.info.ancestors) == (None, ())


def test_warm_keeps_the_number_of_a_cluster_that_only_drifted() -> None:
    first = fitted(blobs(400, 6), 6)
    second = fitted(blobs(500, 6, seed=1), 6, first, mode="warm")
    assert second.numbers["main"].tolist() == first.numbers["main"].tolist()
    assert second.info.ancestors == (first.info.codebook_id,)
    assert second.info.codebook_id != first.info.codebook_id
    np.testing.assert_allclose(second.centres["main"], first.centres["main"], atol=0.1)


def test_clusters_that_come_get_new_numbers_and_those_that_go_are_retired_for_good() -> None:
    first = fitted(blobs(600, 6), 6)
    gone = fitted(blobs(600, 4, seed=1), 4, first, mode="warm")
    (smaller,) = gone.info.resolutions
    assert len(smaller.retired) == 2
    assert smaller.max_id == 6
    back = fitted(blobs(600, 6, seed=2), 6, gone, mode="warm")
    (larger,) = back.info.resolutions
    assert sorted(back.numbers["main"]) == sorted({*gone.numbers["main"].tolist(), 7, 8})
    assert (larger.max_id, larger.retired) == (8, smaller.retired)


def test_aligned_follows_the_items_to_another_encoders_space() -> None:
    points = blobs(600, 6)
    first = fitted(points, 6)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(256, 256)))[0]
    turned = (points @ rotation).astype(np.float32)
    distance = ((points[:, None] - first.centres["main"][None]) ** 2).sum(axis=2)
    old = first.numbers["main"][distance.argmin(axis=1)]
    sample = Sample(turned, turned[:0], "", {"main": old})
    fit = Fit({"main": 6}, mode="aligned", seed=5)
    book = make_codebook(sample, fit, "other-000000000000", DS, first)
    new = ((turned[:, None] - book.centres["main"][None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (book.numbers["main"][new] == old).mean() == 1.0


def test_fresh_gives_every_cluster_a_number_that_was_never_used() -> None:
    first = fitted(blobs(400, 6), 6)
    second = fitted(blobs(400, 6), 5, first, mode="fresh")
    assert second.numbers["main"].tolist() == [7, 8, 9, 10, 11]
    assert second.info.resolutions[0].retired == (1, 2, 3, 4, 5, 6)
    assert second.info.parent == first.info.codebook_id


def test_a_resolution_that_was_left_out_for_a_while_uses_no_number_twice() -> None:
    points = blobs(400, 6)
    both = Fit({"main": 4, "fine": 6})
    first = make_codebook(Sample(points, points[:0], ""), both, ENCODER, DS)
    without = fitted(points, 4, first, mode="warm")
    again = Fit({"main": 4, "fine": 6}, mode="warm")
    back = make_codebook(Sample(points, points[:0], ""), again, ENCODER, DS, without)
    assert back.numbers["fine"].tolist() == [7, 8, 9, 10, 11, 12]
    assert back.info.resolution("fine").retired == (1, 2, 3, 4, 5, 6)
    assert back.numbers["main"].tolist() == first.numbers["main"].tolist()


def test_what_continues_a_codebook_of_a_later_day_is_as_late_itself() -> None:
    """A codebook dated before its parent would tell a night between the two its own future."""
    points = blobs(400, 6)
    sample = Sample(points, points[:0], "")
    late = make_codebook(sample, Fit({"main": 6}), ENCODER, "2026-01-20")
    warm = make_codebook(sample, Fit({"main": 6}, mode="warm"), ENCODER, "2026-01-15", late)
    assert (warm.info.data_start_ds, warm.info.data_end_ds) == ("2026-01-15", "2026-01-20")
    fresh = make_codebook(sample, Fit({"main": 6}), ENCODER, "2026-01-15", late)
    assert fresh.info.data_end_ds == "2026-01-15"


def test_aligned_without_one_item_in_common_is_refused() -> None:
    points = blobs(400, 6)
    first = fitted(points, 6)
    sample = Sample(points, points[:0], "", {"main": np.zeros(400, np.int32)})
    with pytest.raises(OperatorError, match="Not one of the 400 sampled items had a cluster ID"):
        make_codebook(sample, Fit({"main": 6}, mode="aligned"), "other-0", DS, first)
