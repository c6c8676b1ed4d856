"""Tests the cluster IDs of a shard's items, and what a night tells of its clusters.

Days that are made together have the bytes of days made one by one.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.codebooks.codebook import Codebook, save_codebook
from feature_jobs.codebooks.nearest import CodebookSearch
from feature_jobs.drift import population_stability_index
from feature_jobs.items import item_features
from feature_jobs.items.item_features import (
    FeaturesJob,
    SamePicture,
    count_clusters,
    define_item_features,
    features_of,
    most_frequent_picture,
    read_clusters,
    summarise_clusters,
)
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    MAIN,
    DataContractError,
    Table,
    cluster_field,
)
from feature_jobs.store import arrays, files, hashing, partitions
from feature_jobs.store.partitions import Partition, part_name
from pipelines.running.beam_options import pipeline_options, run_pipeline
from tests.support import embed_rows
from tests.support.codebooks import by_hand, unit_rows

POINTS = unit_rows(12)
NUMBERS = np.array([2, 3, 5, 9])


LABELS = ("main", "coarse")


def book() -> Codebook:
    centres = {"main": POINTS[:4], "coarse": POINTS[:1]}
    return by_hand(centres, {"main": NUMBERS, "coarse": np.array([7])}, "tiny-000000000000")


def embedded(points: np.ndarray) -> pa.Table:
    n = len(points)
    return pa.table(
        {
            "item_id": pa.chunked_array([pa.array(np.arange(n))]),
            "embedding": arrays.list_column(points, pa.list_(pa.float32())),
            "category": pa.chunked_array([pa.array(["dress"] * n, pa.string())]),
            "in_catalogue": np.ones(n, bool),
        }
    )


NO_REJECTS = pa.table({"item_id": pa.array([], pa.int64()), "category": pa.array([], pa.string())})


def features(points: np.ndarray) -> pa.Table:
    return features_of(embedded(points), NO_REJECTS, CodebookSearch(book()), None, second=True)


def test_a_centre_has_its_own_number_and_distance_zero() -> None:
    rows = features(POINTS[:4])
    assert rows["cluster_id"].to_pylist() == NUMBERS.tolist()
    assert rows["cluster_coarse"].to_pylist() == [7] * 4
    np.testing.assert_allclose(rows["centre_distance"].to_numpy(), 0, atol=1e-6)
    assert (rows["second_distance"].to_numpy() > 0.5).all()


def test_an_unrelated_item_changes_no_other_ones_id() -> None:
    alone = features(POINTS[4:8]).slice(0, 4)
    among = features(POINTS[4:]).slice(0, 4)
    assert alone.equals(among)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.0])
def test_an_embedding_that_is_no_unit_vector_is_refused_and_named(value: float) -> None:
    points = POINTS.copy()
    points[5, 0] = value
    with pytest.raises(DataContractError, match=r"1 rows whose embedding .* item_id 5"):
        features(points)


def test_what_moved_since_the_day_before_is_counted_by_the_cluster_it_left() -> None:
    rows = pa.table(
        {
            "item_id": np.arange(6),
            "cluster_id": pa.array([2, 3, 3, 5, 0, 9], pa.int32()),
            "cluster_coarse": pa.array([7] * 6, pa.int32()),
        }
    )
    before = pa.table(
        {"item_id": [1, 2, 3, 4, 0], "cluster_id": pa.array([5, 5, 5, 5, 2], pa.int32())}
    )
    found = told_of(rows, before)
    main, coarse = found["main"], found["coarse"]
    assert (main["compared_items"], main["moved_items"]) == (4, 2)
    assert main["most_moved"] == [{"cluster_id": 5, "moved": 2, "of": 3}]
    assert main["moved_examples"] == [1, 2]
    assert (main["items"], main["used"], main["dead"], main["items_max"]) == (5, 4, 0, 2)
    assert (coarse["compared_items"], coarse["moved_items"]) == (0, 0)  # the column is new
    assert (coarse["items_before"], coarse["population_stability_index"]) == (0, None)
    other = told_of(rows, before, of_another_lineage=True)["main"]
    assert (other["compared_items"], other["moved_items"]) == (4, 4)
    assert (other["items_before"], other["population_stability_index"]) == (5, None)
    assert other["moved_examples"] == [0, 1, 2]


def told_of(
    rows: pa.Table, before: pa.Table | None, of_another_lineage: bool = False
) -> dict[str, dict[str, Any]]:
    counts = count_clusters(rows, before, LABELS, of_another_lineage)
    return summarise_clusters(counts, book().info, of_another_lineage)


def test_sizes_are_compared_with_those_of_all_items_of_the_day_before() -> None:
    """Items are gone since then and new ones there; 4 is a number that was retired."""
    numbers_before, numbers = [2] * 30 + [3] * 50 + [4] * 20 + [0] * 7, [2] * 60 + [5] * 40
    before = pa.table(
        {"item_id": np.arange(107), "cluster_id": pa.array(numbers_before, pa.int32())}
    )
    rows = pa.table(
        {
            "item_id": np.arange(90, 190),
            "cluster_id": pa.array(numbers, pa.int32()),
            "cluster_coarse": pa.array([7] * 100, pa.int32()),
        }
    )
    found = told_of(rows, before)["main"]
    assert (found["items_before"], found["compared_items"]) == (100, 10)
    # Of 2, 3, 4, 5 and 9, where no item ever was.
    expected = population_stability_index(np.array([30, 50, 20, 0, 0]), np.array([60, 0, 0, 40, 0]))
    assert found["population_stability_index"] == pytest.approx(expected)
    assert expected > 1
    same = told_of(rows, rows)["main"]
    assert same["population_stability_index"] == pytest.approx(0, abs=1e-12)


def test_on_the_first_day_nothing_can_have_moved() -> None:
    found = told_of(features(POINTS), None)
    assert (found["main"]["compared_items"], found["main"]["most_moved"]) == (0, [])
    assert (found["main"]["items_before"], found["main"]["moved_examples"]) == (0, [])
    assert found["main"]["population_stability_index"] is None
    assert found["main"]["items"] == 12
    assert sum(found["coarse"][k] for k in ("used", "dead")) == 1


@pytest.mark.parametrize("items", [np.arange(12), [f"i{n:02}" for n in range(12)]])
def test_clusters_without_items_are_dead_and_shards_add_up(items: Sequence) -> None:
    rows = features(POINTS[:2])
    parts = [count_clusters(part, None, LABELS, False) for part in (rows[:1], rows[1:])]
    found = summarise_clusters(pa.concat_tables(parts), book().info, False)["main"]
    assert (found["items"], found["used"], found["dead"]) == (2, 2, 2)

    numbers = pa.array([2, 3, 5, 9] * 3, pa.int32())
    before = pa.table({"item_id": items, "cluster_id": numbers, "cluster_coarse": numbers})
    rows = before.set_column(1, "cluster_id", pa.array([2, 2, 2, 9] * 3, pa.int32()))
    whole = told_of(rows, before)
    parts = [count_clusters(rows[n : n + 4], before[n : n + 4], LABELS, False) for n in (0, 4, 8)]
    together = summarise_clusters(pa.concat_tables(parts), book().info, False)
    for found in (whole, together):
        assert sorted(found["main"].pop("moved_examples")) == [items[1], items[2], items[5]]
    assert together == whole
    assert (whole["main"]["items_before"], whole["main"]["moved_items"]) == (12, 6)


# ---- Days that are made together ---------------------------------------------------------------

ITEMS = 40
SHARDS = (2, 2, 4, 4, 2)  # of each day: the catalogue grows and shrinks
CODEBOOK = (0, 0, 1, 1, 1)  # of each day: on the third one of another lineage begins
CATEGORIES = ("dress",)


def write_table(folder: Path, table: Table, schema: pa.Schema, rows: pa.Table, n: int) -> Partition:
    """Writes a table of items in `n` parts; returns it as a partition."""
    of = hashing.shard_of(hashing.hash_ids(rows["item_id"]), n)
    for shard in range(n):
        part = rows.filter(pa.array(of == shard))
        partitions.write_part(str(folder), table, schema, part, shard, n)
    return Partition(str(folder), {"files": partitions.receipts(str(folder))})


def write_codebooks(root: Path) -> list[str]:
    """Writes two codebooks of which neither is an ancestor of the other; returns their folders."""
    first = by_hand({MAIN: POINTS[:4]}, {MAIN: NUMBERS}, "tiny-000000000000")
    both = {MAIN: POINTS[4:9], "coarse": POINTS[4:6]}
    second = by_hand(both, {MAIN: np.arange(1, 6), "coarse": np.array([7, 8])}, "tiny-1")
    return [save_codebook(str(root), codebook) for codebook in (first, second)]


def write_items(root: Path, day: int) -> tuple[Partition, Partition]:
    """Writes what EMBED made of a day: embeddings that change, out of scope, rejected, gone."""
    rng = np.random.default_rng(day)
    points = unit_rows(ITEMS, seed=0)
    changed = rng.random(ITEMS) < 0.3
    points[changed] = unit_rows(ITEMS, seed=day)[changed]
    kept = [n for n in range(ITEMS) if n % 7 != day and n % 9]
    rows = embed_rows.embeddings(
        *({"item_id": n, "embedding": points[n].tolist(),
           "category": "boat" if n % 5 == 0 else "dress"} for n in kept)
    )  # fmt: skip
    rejected = embed_rows.rejects(*({"item_id": n} for n in range(0, ITEMS, 9)))
    tables = ((ITEM_EMBEDDINGS, embed_rows.EMBEDDINGS, rows),
              (ITEM_REJECTS, embed_rows.REJECTS, rejected))  # fmt: skip
    made = [
        write_table(root / t.name / str(day), t, schema, r, SHARDS[day]) for t, schema, r in tables
    ]
    return made[0], made[1]


def jobs_below(
    top: Path, items: Sequence[tuple[Partition, Partition]], codebooks: Sequence[str]
) -> list[FeaturesJob]:
    """Returns the job of each day; what is before it is known by the names of its parts."""
    found: list[FeaturesJob] = []
    for day, book in enumerate(CODEBOOK):
        extra = [cluster_field("coarse")] if book else []
        schema = ITEM_FEATURES.schema(pa.int64(), extra=extra, without=["embedding"])
        previous = None
        if day:
            folder = str(top / str(day - 1) / ITEM_FEATURES.name)
            previous = partitions.to_be_made(folder, SHARDS[day - 1])
        found.append(
            FeaturesJob(
                *items[day], codebooks[book], CATEGORIES, schema, previous,
                day > 0 and CODEBOOK[day - 1] != book, str(top / str(day)),
                SHARDS[day],
            )
        )  # fmt: skip
    return found


def run(jobs: Sequence[FeaturesJob]) -> None:
    options = pipeline_options({}, "item-features", [])
    run_pipeline(lambda root: define_item_features(root, jobs, jobs[0].staging), options)


def made_below(top: Path) -> dict[str, bytes]:
    """Returns all parts, receipts and counts below `top`."""
    paths = [path for path in top.rglob("*") if path.is_file()]
    return {str(path.relative_to(top)): path.read_bytes() for path in paths}


def test_days_made_together_have_the_bytes_of_days_made_one_by_one(tmp_path: Path) -> None:
    codebooks = write_codebooks(tmp_path / "codebooks")
    items = [write_items(tmp_path, day) for day in range(len(SHARDS))]
    one_by_one = jobs_below(tmp_path / "alone", items, codebooks)
    for job in one_by_one:
        run([job])
    run(jobs_below(tmp_path / "together", items, codebooks))
    expected = made_below(tmp_path / "alone")
    assert made_below(tmp_path / "together") == expected
    assert len(expected) == 3 * sum(SHARDS)  # a part, its receipt and its counts

    clusters = [
        read_clusters(job.staging, job.shards, job.codebook_folder, job.of_another_lineage)[MAIN]
        for job in one_by_one
    ]
    assert [found["compared_items"] > 10 for found in clusters] == [False, True, True, True, True]
    moved = [found["moved_items"] for found in clusters]
    assert 0 < moved[1] < clusters[1]["compared_items"]
    assert moved[2] == clusters[2]["compared_items"]  # of another lineage
    before = [found["items_before"] for found in clusters]
    assert before == [0, *(found["items"] for found in clusters[:-1])]
    drift = [found["population_stability_index"] for found in clusters]
    assert [of_day is None for of_day in drift] == [True, False, True, False, False]

    # What was made before a job died is not made again, and what lacks is.
    again = jobs_below(tmp_path / "together", items, codebooks)
    kept = Path(again[0].staging, "cluster_counts", "00000.parquet")
    lost = Path(again[3].staging, "cluster_counts", "00002.parquet")
    made_at = kept.stat().st_mtime_ns
    files.delete(str(lost))
    os.unlink(Path(again[4].staging, ITEM_FEATURES.name, "receipts", f"{part_name(1, 2)}.json"))
    run(again)
    assert made_below(tmp_path / "together") == expected
    assert kept.stat().st_mtime_ns == made_at


# ---- Equal pictures ----------------------------------------------------------------------------


def same_pictures(folder: Path) -> tuple[Partition, Partition]:
    """Writes 40 items in four shards: all even ones are in cluster 2, and those by 4 are equal."""
    placeholder = embed_rows.digest(1000)
    rows = embed_rows.embeddings(
        *({"item_id": n, "image_sha256": placeholder if n % 4 == 0 or n % 2 else
           embed_rows.digest(n)} for n in range(ITEMS))
    )  # fmt: skip
    features = pa.table(
        {"item_id": np.arange(ITEMS), "cluster_id": np.where(np.arange(ITEMS) % 2, 1, 2)}
    ).cast(pa.schema({"item_id": pa.int64(), "cluster_id": pa.int32()}))
    embedded = write_table(folder / "e", ITEM_EMBEDDINGS, embed_rows.EMBEDDINGS, rows, 4)
    of = hashing.shard_of(hashing.hash_ids(features["item_id"]), 4)
    names = [f"{part_name(shard, 4)}.parquet" for shard in range(4)]
    for shard, name in enumerate(names):
        path = str(folder / "f" / name)
        partitions.write_parquet(path, features.filter(pa.array(of == shard)))
    return embedded, Partition(str(folder / "f"), {"files": [{"name": name} for name in names]})


def test_the_picture_that_most_items_of_a_cluster_have_is_found_over_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = same_pictures(tmp_path)
    found = most_frequent_picture(*tables, MAIN, 2)
    assert found == SamePicture(embed_rows.digest(1000), 0, ITEMS // 4, ITEMS // 2)
    monkeypatch.setattr(item_features, "_LOOKED_AT", 8)
    sample = most_frequent_picture(*tables, MAIN, 2)
    assert sample.sha256 == found.sha256
    assert 8 <= sample.looked_at < found.looked_at
    assert 0 < sample.items < found.items
