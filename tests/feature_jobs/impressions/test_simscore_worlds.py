"""In two hundred random shops each row is what plain loops make of it, either way embeddings come.

The steps of the job are those of the pipeline, called one after the other without Beam: a run of
Beam costs a second.
"""

import datetime as dt
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.pvalue import TaggedOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs import inputs
from feature_jobs.impressions import simscore
from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.histories import DAY_US, HistoriesJob, HistoryDay, ReadClicks
from feature_jobs.impressions.scoring import ScoreForm
from feature_jobs.impressions.simscore import (
    BROADCAST,
    SHUFFLE,
    ItemSnapshot,
    SimscoreDay,
    SimscoreJob,
)
from feature_jobs.impressions.snapshots import Snapshot, always
from feature_jobs.items.item_answers import AnswerForItems, AskForItems
from feature_jobs.items.item_vectors import ItemTables
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    TIMESTAMP,
    USER_SIMSCORES,
    cluster_field,
    scores_schema,
)
from feature_jobs.store import arrays, broadcast, documents, hashing, partitions, worker_notes
from tests.support import oracles
from tests.support.codebooks import unit_rows

FIRST = dt.date(2026, 3, 1)
NUMBER = FIRST.toordinal()
START = (NUMBER - dt.date(1970, 1, 1).toordinal()) * DAY_US
DAYS = [HistoryDay(NUMBER + k, START + k * DAY_US, START + (k + 1) * DAY_US) for k in range(2)]
TICK = DAY_US // 6
VECTORS = dict(enumerate(unit_rows(8)))
LENGTH = 3
EVERY = (
    "history_cluster_fine", "history_cluster_ids", "history_item_ids", "same_cluster_fine",
    "sim_bucket", "top_positions",
)  # fmt: skip
FORM = ScoreForm(LENGTH, EVERY, top_k=2)

# An item: whether it has an image, whether it is in scope, its cluster.
item = st.tuples(st.booleans(), st.booleans(), st.integers(1, 2))
# An impression: its day, user, item (some are unknown), tick, whether and how many ticks later it
# was clicked.
impression = st.tuples(
    st.integers(0, 1), st.integers(0, 2), st.integers(0, 9), st.integers(-2, 5), st.booleans(),
    st.integers(0, 7),
)  # fmt: skip


def fine(item: int) -> int:
    """Returns the cluster ID of an item in the resolution `fine`."""
    return item % 3 + 1


# A night: its day, how many ticks after the end of it it is available, its items.
night = st.tuples(
    st.integers(-2, 0), st.integers(0, 5), st.lists(item, min_size=1, max_size=8)
)  # fmt: skip


def vector(number: int, day: int) -> np.ndarray:
    """Returns the embedding of an item, which is another one in each night."""
    return VECTORS[(number + day) % len(VECTORS)]


def write_items(folder: Path, drawn: list[tuple], shards: int, day: int = 0) -> ItemTables:
    """Writes `item_features` and `item_embeddings` of the drawn items, by shards."""
    ids = pa.array(np.arange(len(drawn)))
    features = ITEM_FEATURES.schema(
        pa.int64(), extra=[cluster_field("fine")], without=["embedding", "second_distance"]
    )
    embeddings = ITEM_EMBEDDINGS.schema(pa.int64())
    of = hashing.shard_of(hashing.hash_ids(ids), shards)
    for shard in range(shards):
        mine = [(n, drawn[n]) for n in np.flatnonzero(of == shard)]
        rows = [
            {"item_id": n, "has_image": image, "in_scope": scope, "in_catalogue": True,
             "cluster_id": cluster if image and scope else 0, "centre_distance": 0.0,
             "cluster_fine": fine(n) if image and scope else 0,
             "encoder_id": "e",
             "codebook_id": "c", "category": None}
            for n, (image, scope, cluster) in mine
        ]  # fmt: skip
        made = pa.Table.from_pylist(rows, arrays.plain(features.empty_table()).schema)
        partitions.write_part(
            str(folder / "features"), ITEM_FEATURES, features, made, shard, shards
        )
        rows = [
            {"item_id": n, "embedding": vector(n, day).tolist(), "image_uri": "x", "image_size": 1,
             "image_sha256": "", "in_catalogue": True}
            for n, (image, _, _) in mine
            if image
        ]  # fmt: skip
        made = pa.Table.from_pylist(rows, arrays.plain(embeddings.empty_table()).schema)
        path = str(folder / "embeddings")
        partitions.write_part(path, ITEM_EMBEDDINGS, embeddings, made, shard, shards)
    found = [
        partitions.Partition(str(folder / name), {"files": partitions.receipts(str(folder / name))})
        for name in ("features", "embeddings")
    ]
    return ItemTables(found[0], found[1], None, False, 256, ("fine",))


def snapshot(folder: Path, items: ItemTables, of: Snapshot) -> ItemSnapshot:
    """Names what a night's items are called by: the copy of a machine, encoder and codebook."""
    key = documents.digest([str(folder), str(of.ds)])[:16]
    return ItemSnapshot(of, items, key, f"e{of.ds}", f"c{of.ds}")


def write_log(folder: Path, drawn: list[tuple], day: int) -> inputs.Source:
    mine = [row for row in drawn if row[0] == day]
    event = [DAYS[day].start_us + row[3] * TICK for row in mine]
    columns = {
        "user_id": pa.array([f"u{row[1]}" for row in mine], pa.string()),
        "item_id": pa.array([row[2] for row in mine], pa.int64()),
        "event_time": pa.array(event, pa.int64()).cast(TIMESTAMP),
        "clicked": pa.array([row[4] for row in mine], pa.bool_()),
        "click_time": pa.array(
            [e + row[5] * TICK for e, row in zip(event, mine, strict=True)], pa.int64()
        ).cast(TIMESTAMP),
    }
    ds = FIRST + dt.timedelta(days=day)
    path = folder / "log" / str(ds)
    path.mkdir(parents=True)
    pq.write_table(pa.table(columns), path / "0.parquet", row_group_size=4)
    (path / "_SUCCESS").touch()
    names = {name: name for name in columns}
    return inputs.open_source("impressions", str(folder / "log" / "{ds}"), ds, names)


def by_key(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def run(job: SimscoreJob, log: list[inputs.Source]) -> None:
    """Runs the pipeline of `define_simscore` by hand."""
    histories = job.histories
    assert histories is not None
    clicks = ReadClicks(histories.law, "UTC", histories.shards, job.staging)
    groups = [group for day in log for group in day.groups()]
    told = [found for group in groups for found in clicks.process(group)]
    read = [found for g in groups for found in simscore.ReadImpressions(job).process(g)]
    assert all(isinstance(found, TaggedOutput) for found in read)
    users = by_key(found.value for found in read if found.tag == "by_user")
    chunks = by_key(found for found in told if not isinstance(found, TaggedOutput))
    add = simscore.AddHistories(job, histories)
    rows = by_key(
        pair
        for shard in range(histories.shards)
        for pair in add.process(
            (shard, {"impressions": users.get(shard, []), "clicks": chunks.get(shard, [])})
        )
    )
    answers: dict[Any, list[Any]] = {}
    if job.embeddings_by == SHUFFLE:
        nights = {night.broadcast_key: night.items for day in job.days for night in day.nights}
        ask = AskForItems(nights, partial(simscore._wanted_items, job), job.staging)
        asked = by_key(pair for element in rows.items() for pair in ask.process(element))
        tell = AnswerForItems(nights, job.staging)
        answers = by_key(pair for element in asked.items() for pair in tell.process(element))
    for place, day in enumerate(job.days):
        for shard in range(day.shards):
            found = {"rows": rows.get((place, shard), [])}
            if job.embeddings_by == SHUFFLE:
                found["items"] = answers.get((place, shard), [])
            list(simscore.ScoreShard(job).process(((place, shard), found)))
    assert worker_notes.refused(job.staging) == []


def expected_rows(
    drawn: list[tuple],
    items_at: Callable[[int], tuple[dt.date | None, int, list[tuple]]],
    day: int,
    law: HistoryLaw,
) -> list[tuple[Any, ...]]:
    """Returns what rows are to be; `items_at` a moment gives the night, its number, its items."""
    clicks = [
        (f"u{row[1]}", row[2], DAYS[row[0]].start_us + (row[3] + row[5]) * TICK)
        for row in drawn
        if row[4] and row[0] <= day
    ]
    found = []
    for row in drawn:
        if row[0] != day:
            continue
        moment = DAYS[day].start_us + row[3] * TICK
        ds, number, items = items_at(moment)
        vectors = {
            n: vector(n, number) for n, (image, scope, _) in enumerate(items) if image and scope
        }
        cluster = {n: items[n][2] for n in vectors}
        past = oracles.history(
            clicks, f"u{row[1]}", moment, LENGTH, law.window_us, law.lag_us, law.keep_repeats
        )
        scores, mask = oracles.score(row[2], past, vectors, LENGTH)
        same = sum(row[2] in cluster and cluster.get(i) == cluster[row[2]] for i in past)
        key = (f"u{row[1]}", row[2], moment, row[4])
        clusters = [[cluster.get(i, 0) for i in past], [fine(i) * (i in cluster) for i in past]]
        found.append((key, past, mask, same, scores, clusters, ds))
    return sorted(found, key=lambda r: r[0])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(item, min_size=1, max_size=8),
    st.lists(impression, max_size=25),
    st.sampled_from([(1, 1), (2, 1), (2, 4), (1, 2)]),
    st.booleans(),
    st.sampled_from([0, TICK]),
)
def test_rows_of_random_worlds_are_what_plain_loops_make_of_them(
    items: list[tuple], drawn: list[tuple], shards: tuple[int, int], repeats: bool, lag: int
) -> None:
    law = HistoryLaw(LENGTH, DAY_US, 0, lag, repeats, late_us=DAY_US)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = write_items(folder, items, shards[0])
        own = [always(dt.date.fromordinal(day.number)) for day in DAYS]
        nights = [(snapshot(folder, known, of),) for of in own]
        found, told = made_both_ways(folder, drawn, nights, shards, law)
    for day, rows in enumerate(found):
        check(rows, expected_rows(drawn, lambda _, d=day: (own[d].ds, 0, items), day, law))
        check_told(told[day], rows.to_pylist(), drawn, day, lambda _: len(items))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(night, max_size=3, unique_by=lambda one: one[0]),
    st.lists(impression, max_size=25),
    st.sampled_from([(1, 1), (2, 1), (2, 4), (1, 2)]),
)
def test_each_impression_takes_the_night_that_its_moment_may_know(
    drawn_nights: list[tuple], drawn: list[tuple], shards: tuple[int, int]
) -> None:
    """Nights are missing, late and overtaken; both days may know the same ones."""
    law = HistoryLaw(LENGTH, DAY_US, 0, 0, False, late_us=DAY_US)
    since = {
        FIRST + dt.timedelta(days=day): START + (day + 1) * DAY_US + ticks * TICK
        for day, ticks, _ in drawn_nights
    }
    items = {FIRST + dt.timedelta(days=day): (day, drawn) for day, _, drawn in drawn_nights}

    def items_at(moment: int) -> tuple[dt.date | None, int, list[tuple]]:
        ds = oracles.night_at(moment, since.items())
        return (ds, *(items[ds] if ds else (0, [])))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = tuple(
            snapshot(
                folder, write_items(folder / str(ds), mine, shards[day % 2], day),
                Snapshot(ds, since[ds]),
            )
            for ds, (day, mine) in items.items()
        )  # fmt: skip
        found, told = made_both_ways(folder, drawn, [known, known], shards, law)
    for day, rows in enumerate(found):
        check(rows, expected_rows(drawn, items_at, day, law))
        check_told(
            told[day], rows.to_pylist(), drawn, day, lambda moment: len(items_at(moment)[2])
        )  # fmt: skip


def made_both_ways(
    folder: Path,
    drawn: list[tuple],
    nights: list[tuple[ItemSnapshot, ...]],
    shards: tuple[int, int],
    law: HistoryLaw,
) -> tuple[list[pa.Table], list[tuple[dict, dict, dict]]]:
    """Returns the rows of both days and what is told of them, which are the same both ways."""
    schema = scores_schema(pa.int64(), pa.string(), pa.string(), EVERY, by_night=True)
    log = [write_log(folder, drawn, day) for day in range(2)]
    found, told = {}, {}
    for way in (BROADCAST, SHUFFLE):
        days = tuple(
            SimscoreDay(day, False, mine, n, schema, str(folder / way / str(day.number)))
            for day, mine, n in zip(DAYS, nights, shards, strict=True)
        )
        job = HistoriesJob(
            law, tuple(DAYS), (), max(shards), pa.string(), pa.int64(), "UTC", str(folder / way)
        )
        run(SimscoreJob(days, job, FORM, way, str(folder / way)), log)
        for one in (one for day in days for one in day.nights):
            broadcast.discard(one.broadcast_key)
        found[way] = [read_scores(day) for day in days]
        told[way] = [read_receipts(day) for day in days]
    assert found[BROADCAST] == found[SHUFFLE]
    assert told[BROADCAST] == told[SHUFFLE]
    return found[BROADCAST], told[BROADCAST]


def read_scores(day: SimscoreDay) -> pa.Table:
    folder = Path(day.staging) / USER_SIMSCORES.name
    parts = [partitions.read_parquet(str(path)) for path in sorted(folder.glob("*.parquet"))]
    assert len(parts) == day.shards
    return pa.concat_tables(parts)


def check(rows: pa.Table, expected: list[tuple[Any, ...]]) -> None:
    found = rows.to_pylist()
    for row in found:
        moment = (row["event_time"] - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(
            microseconds=1
        )
        row["key"] = (row["user_id"], row["item_id"], moment, row["clicked"])
    found.sort(key=lambda row: row["key"])
    assert len(found) == len(expected)
    for row, (key, past, mask, same, scores, clusters, ds) in zip(found, expected, strict=True):
        assert row["feature_ds"] == ds
        assert (row["encoder_id"], row["codebook_id"]) == ((f"e{ds}", f"c{ds}") if ds else ("", ""))
        assert (row["key"], row["history_item_ids"], row["sim_mask"]) == (key, past, mask)
        assert (row["history_len"], row["sim_known"]) == (len(past), sum(mask))
        assert row["same_cluster"] == same
        assert len(row["sim_scores"]) == LENGTH
        np.testing.assert_allclose(row["sim_scores"], scores, atol=2e-6)
        real = [s for s, known in zip(row["sim_scores"], mask, strict=True) if known]
        np.testing.assert_allclose(row["sim_max"], max(real, default=0.0), atol=1e-6)
        np.testing.assert_allclose(row["sim_mean"], np.mean(real) if real else 0.0, atol=1e-6)
        assert row["simtier"] == oracles.tiers(row["sim_scores"], mask)
        assert row["sim_bucket"] == oracles.buckets(row["sim_scores"], mask)
        assert row["top_positions"] == oracles.top_positions(row["sim_scores"], mask, 2)
        empty = [0] * (LENGTH - len(past))
        assert row["history_cluster_ids"] == clusters[0] + empty
        assert row["history_cluster_fine"] == clusters[1] + empty
        assert row["same_cluster_fine"] == (clusters[1].count(fine(key[1])) if any(mask) else 0)


def read_receipts(day: SimscoreDay) -> tuple[dict, dict, dict]:
    """Returns the counts, the histograms and the examples of a day, of all its parts."""
    found = partitions.receipts(str(Path(day.staging) / USER_SIMSCORES.name))
    assert len(found) == day.shards
    counts = partitions.sum_counts(found)
    return counts, partitions.sum_histograms(found), partitions.first_examples(found)


def check_told(
    told: tuple[dict, dict, dict],
    rows: list[dict],
    drawn: list[tuple],
    day: int,
    items_at: Callable[[int], int],
) -> None:
    """Checks what is told of a day; the number of items of a moment is 0 where it has no night."""
    counts, histograms, examples = told
    mine = [row for row in drawn if row[0] == day]
    known = [(row, items_at(DAYS[day].start_us + row[3] * TICK)) for row in mine]
    unknown = [row[2] for row, items in known if items and row[2] >= items]
    assert counts["impressions"] == len(rows)
    shown = Counter(row["user_id"] for row in rows)
    clicks = Counter(row["user_id"] for row in rows if row["clicked"])
    assert counts["users"] == len(shown)
    assert counts["impressions_by_user_squared"] == sum(n * n for n in shown.values())
    assert counts["clicks_by_user_squared"] == sum(n * n for n in clicks.values())
    assert counts["clicks"] == counts.get("clicks_with_time", 0) == sum(row[4] for row in mine)
    assert counts["scored_impressions"] == sum(row["sim_known"] > 0 for row in rows)
    assert counts["late_impressions"] == sum(row[3] < 0 for row in mine)
    assert counts["unknown_items"] == len(unknown)
    named = examples.get("unknown_items", [])
    assert set(unknown).issuperset(named)
    assert len(named) == min(3, len(set(unknown)))
    without = [row for row in rows if row["feature_ds"] is None]
    assert counts["without_snapshot"] == len(without)
    assert counts["histories_without_snapshot"] == sum(row["history_len"] > 0 for row in without)
    assert counts["without_history"] == sum(row["history_len"] == 0 for row in rows)
    lengths = [row["history_len"] for row in rows]
    assert histograms["history_len"] == [lengths.count(n) for n in range(LENGTH + 1)]
    for name, clicked in (("sim_max_clicked", True), ("sim_max_unclicked", False)):
        real = [r["sim_max"] for r in rows if r["sim_known"] and r["clicked"] == clicked]
        bins = [min(199, int((score + 1) / 2 * 200)) for score in real]
        assert histograms[name] == [bins.count(n) for n in range(200)]
