"""A walk through days makes both tables of each, and asks beforehand for all that must be read."""

import datetime as dt
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.items import embed_walk
from feature_jobs.items.embed_plan import REJECTED, TO_READ, UNCHANGED, WAITING, Sightings
from feature_jobs.items.embed_walk import Tables, WalkedDay
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS
from feature_jobs.store import partitions
from tests.support.embed_rows import (
    CATALOGUE,
    DAY,
    EMBEDDINGS,
    REJECTS,
    VERSIONS,
    WRITTEN,
    Row,
    catalogue,
    day,
    digest,
    embeddings,
    reject,
    rejects,
    results,
    vector,
)

# ---- The tables of a day ---------------------------------------------------------------------

NEW = 100  # added to an item's number: the number of its new vector and digest
NOW = {
    "image_generation": None, "image_size": 200, "image_mtime": WRITTEN + dt.timedelta(seconds=1)
}  # fmt: skip
NO_REASON = {"stage": None, "reason": None, "message": None}

# What may have become of an item: its state in the plan, and its row of the results.
LATER = {**NOW, "image_size": 300}  # another attempt at the plan, after the images were read
EMBEDDED, REUSED, BROKEN = "embedded", "reused", "broken"
KINDS = (UNCHANGED, WAITING, REJECTED, EMBEDDED, REUSED, BROKEN)
GOOD = {UNCHANGED, EMBEDDED, REUSED}
HAD_EMBEDDING = {UNCHANGED, REUSED}


def result_of(item: int, kind: str) -> list[Row]:
    if kind == EMBEDDED:
        return [{"item_id": item, "image_sha256": digest(item + NEW), **NOW,
                 "embedding": vector(item + NEW)}]  # fmt: skip
    if kind == REUSED:
        return [{"item_id": item, "embedding": None, "is_embedded": False, **NOW}]
    return [reject(item)] if kind == BROKEN else []


class Shard:
    """Holds the inputs of a day: items 0, 1, … by what becomes of them and who is offered.

    Every item that may have one has a row in the rejects of the day before.
    """

    def __init__(self, kinds: list[tuple[str, bool]]):
        self.kinds = dict(enumerate(kind for kind, _ in kinds))
        self.inside = {item: inside for item, (_, inside) in enumerate(kinds)}
        had = [item for item, kind in self.kinds.items() if kind in HAD_EMBEDDING]
        self.previous = embeddings(*({"item_id": item} for item in reversed(had)))
        self.rejects = rejects(
            *(
                {"item_id": item, "attempts": 3, "first_ds": day(-9), "next_ds": day(2)}
                for item, kind in self.kinds.items()
                if kind == WAITING or (item % 2 and kind not in HAD_EMBEDDING)
            )
        )
        place = {item: row for row, item in enumerate(self.previous["item_id"].to_pylist())}
        self.plan = self._table(place)
        self.results = results(*(r for i, k in self.kinds.items() for r in result_of(i, k)))

    def _table(self, place: dict[int, int]) -> pa.Table:
        texts = pa.schema([(name, pa.string()) for name in (*NO_REASON, "state")])
        others = pa.schema(
            [
                ("in_catalogue", pa.bool_()),
                ("left_catalogue_ds", pa.date32()),
                ("previous_row", pa.int32()),
            ]
        )
        missing = {"stage": "read", "reason": "missing", "message": "not there"}
        rows = [
            {
                "item_id": item, "image_uri": f"{item}.png", "category": "coat", **LATER,
                "in_catalogue": self.inside[item], "previous_row": place.get(item),
                "left_catalogue_ds": None if self.inside[item] else day(-1),
                **(missing if kind == REJECTED else NO_REASON),
                "state": kind if kind in (UNCHANGED, WAITING, REJECTED) else TO_READ,
            }
            for item, kind in self.kinds.items()
        ]  # fmt: skip
        return pa.Table.from_pylist(rows, pa.schema([*CATALOGUE, *VERSIONS, *others, *texts]))

    def walked(self) -> WalkedDay:
        before = Tables.before_the_first_day(self.previous.drop_columns("embedding"), self.rejects)
        return WalkedDay(DAY, before, self.plan, embed_walk.outcomes(self.plan, self.results))

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Returns embeddings, with vectors, and rejects, as they are written."""
        tables = self.walked().tables
        found = embed_walk.with_vectors(tables.embeddings, self.results, self.previous)
        assert set(found.column_names) == set(EMBEDDINGS.names)
        assert set(tables.rejects.column_names) == set(REJECTS.names)
        return found, tables.rejects.sort_by("item_id")


def possible(kind: str, inside: bool) -> bool:
    """A reject that waits is in the catalogue: former items have none."""
    return inside or kind != WAITING


EVERY_KIND = [(k, inside) for k in KINDS for inside in (True, False) if possible(k, inside)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(EVERY_KIND), max_size=25))
def test_embeddings_and_rejects_together_are_the_catalogue_each_item_once(
    kinds: list[tuple[str, bool]],
) -> None:
    shard = Shard(kinds)
    found, refused = shard.tables()
    inside = found.filter(found["in_catalogue"])["item_id"].to_pylist()
    catalogue = [item for item, its in shard.inside.items() if its]
    assert sorted(inside + refused["item_id"].to_pylist()) == catalogue
    former = found.filter(pa.compute.invert(found["in_catalogue"]))["item_id"].to_pylist()
    good = [item for item, kind in shard.kinds.items() if kind in GOOD]
    assert former == [item for item in good if not shard.inside[item]]
    counts = embed_walk.count(shard.walked())
    work = embed_walk.work_of(found, shard.results)
    assert counts["catalogue_items"] == len(catalogue)
    assert counts["former_items"] == len(former)
    of = list(shard.kinds.values()).count
    assert work["images_unchanged"] == of(UNCHANGED)
    assert work["images_embedded"] == of(EMBEDDED)
    assert work["images_reused"] == of(REUSED)
    assert work["images_read"] == of(EMBEDDED) + of(REUSED) + of(BROKEN)
    assert counts["rejects_waiting"] == of(WAITING)
    rejected = sum(n for name, n in counts.items() if name.startswith("rejected_"))
    assert rejected == len(refused)


def test_every_embedding_has_the_version_digest_and_vector_of_its_image() -> None:
    shard = Shard(EVERY_KIND)
    found, _ = shard.tables()
    rows = {row["item_id"]: row for row in found.to_pylist()}
    assert set(rows) == {item for item, kind in shard.kinds.items() if kind in GOOD}
    for item, row in rows.items():
        kind = shard.kinds[item]
        number = item + NEW if kind == EMBEDDED else item
        assert row["embedding"] == vector(number)
        assert row["image_sha256"] == digest(number)
        version = (row["image_generation"], row["image_size"], row["image_mtime"])
        assert version == ((None, 100, WRITTEN) if kind == UNCHANGED else tuple(NOW.values()))
        assert row["category"] == "coat"  # today's, whatever became of the image
        assert row["left_catalogue_ds"] == (None if shard.inside[item] else day(-1))


def test_every_reject_counts_the_days_on_which_it_was_tried_and_one_that_waits_stays() -> None:
    shard = Shard([(WAITING, True), (REJECTED, True), (REJECTED, True), (BROKEN, True)] * 2)
    _, refused = shard.tables()
    past = {row["item_id"]: row for row in shard.rejects.to_pylist()}
    assert len(refused) == 8
    assert set(past) == {0, 1, 3, 4, 5, 7}
    for row in refused.to_pylist():
        item, kind = row["item_id"], shard.kinds[row["item_id"]]
        before = past.get(item)
        if kind == WAITING:
            assert row == {**(before or {}), "category": "coat"}
            continue
        stage, reason = ("read", "missing") if kind == REJECTED else ("decode", "truncated")
        assert (row["stage"], row["reason"]) == (stage, reason)
        assert row["message"] == ("not there" if kind == REJECTED else f"as it is, {item}")
        assert (row["first_ds"], row["attempts"]) == ((day(-9), 4) if before else (DAY, 1))
        assert row["last_ds"] == DAY
        assert row["next_ds"] == day(8 if before else 1)


def test_what_became_of_an_image_for_another_day_changes_nothing() -> None:
    shard = Shard(EVERY_KIND)
    expected, asked = shard.tables(), len(shard.walked().result_rows)
    of_other_days = {UNCHANGED: BROKEN, WAITING: EMBEDDED}
    others = [
        row
        for item, kind in shard.kinds.items()
        if kind in of_other_days
        for row in result_of(item, of_other_days[kind])
    ]
    shard.results = pa.concat_tables([results(*others), shard.results])
    assert len(others) == 3
    assert shard.tables() == expected
    assert len(shard.walked().result_rows) == asked


def test_a_former_item_without_a_usable_image_is_in_neither_table() -> None:
    found, refused = Shard([(REJECTED, False), (BROKEN, False)]).tables()
    assert len(found) == len(refused) == 0


def test_a_shard_without_items_makes_two_empty_tables_that_can_be_written(tmp_path: Any) -> None:
    found, refused = Shard([]).tables()
    for table, rows in ((ITEM_EMBEDDINGS, found), (ITEM_REJECTS, refused)):
        schema = table.schema(pa.int64())
        partitions.write_part(str(tmp_path / table.name), table, schema, rows, 0, 1)
        (receipt,) = partitions.receipts(str(tmp_path / table.name))
        assert receipt["rows"] == 0


# ---- Many days -------------------------------------------------------------------------------


def test_the_tables_of_many_days_do_not_fall_into_ever_more_chunks() -> None:
    days = [  # on each an item comes and another one goes, and stays as a former one
        embed_walk.Day(day(number), catalogue({"item_id": number}), number > 0, number > 0)
        for number in range(6)
    ]
    nothing = Tables.before_the_first_day(embeddings().drop_columns("embedding"), rejects())
    seen = pa.table(
        {
            "image_uri": [f"{number}.png" for number in range(6)],
            **{field.name: pa.array([200] * 6).cast(field.type) for field in VERSIONS},
            **{name: pa.nulls(6, pa.string()) for name in NO_REASON},
        }
    )
    walk = embed_walk.walk(days, nothing, Sightings([], seen), window_days=30)
    last = list(walk)[-1].tables.embeddings
    assert len(last) == 6
    assert {column.num_chunks for column in last.columns} == {1}


# ---- What is told ----------------------------------------------------------------------------

MISSING, FORBIDDEN, NO_PATH = (
    {"stage": "read", "reason": reason, "message": "as it is"}
    for reason in ("missing", "forbidden", "unsupported_uri")
)


def walk_one_day(found: dict[int, Row], read: list[Row], uris: dict[int, str | None]) -> WalkedDay:
    """Walks items 1 to 11 through DAY: what their addresses are, what was found and read there.

    Items 1, 2, 7, 9 and 11 had an embedding, 9 and 11 as former items, and 5 and 6 were rejects.
    """
    left = {"in_catalogue": False, "left_catalogue_ds": day(-1)}
    before = embeddings(
        *({"item_id": n} for n in (1, 2, 7)), *({"item_id": n, **left} for n in (9, 11))
    )
    tables = Tables.before_the_first_day(
        before.drop_columns("embedding"),
        rejects({"item_id": 5, **MISSING}, {"item_id": 6, **MISSING, "next_ds": day(2)}),
    )
    here = [{"item_id": n, "image_uri": uri} for n, uri in uris.items()]
    kinds = pa.schema(
        [("image_uri", pa.string()), *VERSIONS, *((n, pa.string()) for n in NO_REASON)]
    )
    as_it_was = {"image_generation": None, "image_size": 100, "image_mtime": WRITTEN}
    seen = [
        {"image_uri": uri, **NO_REASON, **({} if "reason" in found.get(n, {}) else as_it_was),
         **found.get(n, {})}
        for n, uri in uris.items()
    ]  # fmt: skip
    sightings = Sightings([], pa.Table.from_pylist(seen, kinds))
    today = embed_walk.Day(DAY, catalogue(*here), reuse=True, same_roots=True)
    (walked,) = embed_walk.walk([today], tables, sightings, 30, results(*read))
    return walked


def test_what_was_not_fetched_is_told_of_what_was_tried_and_was_no_reject_before() -> None:
    uris = {n: f"{n}.png" for n in range(1, 12) if n != 9} | {4: None, 10: "https://x/10.png"}
    found = {2: MISSING, 3: FORBIDDEN, 4: NO_PATH, 5: MISSING, 10: NO_PATH, 11: MISSING, 7: NOW}
    gone = {**reject(8), **MISSING, "image_sha256": None}  # between the look and the reading
    walked = walk_one_day(found, [{**reject(7), **NOW}, gone], uris)
    assert embed_walk.count(walked) == {
        "catalogue_items": 10,
        "former_items": 1,
        "items_without_uri": 1,
        "items_tried": 6,  # 1, 2, 3, 7, 8, 11
        "items_not_fetched": 4,  # 2, 3, 8, 11
        "rejects_waiting": 1,
        "rejected_missing": 5,
        "rejected_forbidden": 1,
        "rejected_unsupported_uri": 2,
        "rejected_truncated": 1,
    }
    assert embed_walk.examples(walked) == {"rejected": [2, 3, 5], "not_fetched": [2, 3, 8]}


def test_where_all_is_well_nothing_is_told_to_be_amiss() -> None:
    walked = walk_one_day({}, [], {n: f"{n}.png" for n in (1, 2, 7)})
    counts = embed_walk.count(walked)
    assert (counts["items_tried"], counts["items_not_fetched"]) == (3, 0)
    assert embed_walk.examples(walked) == {"rejected": [], "not_fetched": []}


def test_the_work_of_a_day_is_the_sum_of_its_results_by_device() -> None:
    gpu = {"device": "cuda_bf16"}
    same = {"item_id": 5, "is_embedded": False, "forward_seconds": 0.0}
    done = results({"item_id": 1}, {"item_id": 2, **gpu}, {"item_id": 3, **gpu}, reject(4), same)
    assert embed_walk.work_of(embeddings(*({"item_id": n} for n in range(9))), done) == {
        "images_unchanged": 5,
        "images_read": 5,
        "images_embedded": 3,
        "images_reused": 1,
        "bytes_read": 500,
        "io_seconds": 1.25,
        "decode_seconds": 2.5,
        "forward_seconds": 3.0,
        "embedded_on_cpu_fp32": 1,
        "embedded_on_cuda_bf16": 2,
    }
    nothing = embed_walk.work_of(embeddings(), results())
    assert len(nothing) == 8
    assert not any(nothing.values())
