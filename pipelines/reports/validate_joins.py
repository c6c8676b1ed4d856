"""Checks what must hold between the published tables of a day, and of their manifests' counts.

Items and clicks are compared shard by shard: of each table the columns that tell are read again,
which are few of its bytes, and nothing of a whole table is ever held.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    RECENT_CLICKS,
    USER_HISTORIES,
    DataContractError,
    cluster_column,
)
from pipelines.reports.validate_parts import Finding, Part, Published
from pipelines.running import gates
from pipelines.stages import EMBED, KINDS, SIMSCORE, TRAINING_ROWS, Kind
from pipelines.stages import ITEM_FEATURES as FEATURES


@dataclass(frozen=True)
class Checked:
    """Holds a published table and what was found of all its files together."""

    found: Published
    part: Part

    @property
    def counts(self) -> Mapping[str, int]:
        """Returns what its manifest counts."""
        counts: Mapping[str, int] = self.found.manifest.get("counts", {})
        return counts

    def input_rows(self, name: str) -> int | None:
        """Returns the rows of an input as the manifest names it; None where it does not."""
        given = self.found.manifest.get("inputs", {}).get(name)
        newest = given[0] if isinstance(given, list) and given else given  # the log, newest first
        return newest.get("rows") if isinstance(newest, dict) else None


Tables = Mapping[str, Checked]


def check_joins(tables: Tables, pool: Executor) -> Iterator[Finding]:
    """Yields what breaks a law of several tables, of those whose rows allow to ask."""
    read = {name: table for name, table in tables.items() if table.part.is_read}
    yield from _row_counts(read)
    yield from _id_types(read)
    whole = {name: table for name, table in tables.items() if table.part.is_whole}
    for table in whole.values():
        yield from _counted(table, whole)
    yield from _shard_by_shard(whole, pool)


# ---- Counts ------------------------------------------------------------------------------------


def _counted(table: Checked, tables: Tables) -> Iterator[Finding]:
    """Yields where a table's rows give other numbers than its manifest, or than its inputs had."""
    found, mine, said = table.found, dict(table.part.counts), dict(table.counts)
    if found.table is ITEM_REJECTS and ITEM_EMBEDDINGS.name in tables:
        # EMBED counts its reasons beside the embeddings; one that no row has is counted as none.
        beside = tables[ITEM_EMBEDDINGS.name].counts
        reasons = {name: n for name, n in beside.items() if name.startswith("rejected_")}
        said = dict.fromkeys(mine, 0) | reasons
        mine = dict.fromkeys(reasons, 0) | mine
    for label, clusters in found.manifest.get("clusters", {}).items():
        said[f"{cluster_column(label)} > 0"] = clusters["items"]
    wrong = [
        f"{name} is {said[name]:,} in the manifest and {mine[name]:,} in the rows"
        for name in sorted(said)
        if name in mine and mine[name] != said[name]
    ]
    wrong += _histograms(table)
    if wrong:
        yield found.finding("the manifest counts other rows", "; ".join(wrong))
    rows = table.input_rows("impressions")
    if rows is not None and table.counts.get("impressions", rows) != rows:
        told = f"its impressions are {table.counts['impressions']:,}, those of its input {rows:,}"
        yield found.finding("not every impression reached the table", told)


def _histograms(table: Checked) -> Iterator[str]:
    said: Mapping[str, list[int]] = table.found.manifest.get("histograms", {})
    for name, bins in table.part.histograms.items():
        if name in said:
            mine, theirs = np.array(bins), np.array(said[name])
            length = max(len(mine), len(theirs))
            padded = [np.pad(one, (0, length - len(one))) for one in (mine, theirs)]
            if (padded[0] != padded[1]).any():
                yield f"the histogram {name} is another than the rows give"


_INPUT_OF = {EMBED: "catalogue", SIMSCORE: "impressions", TRAINING_ROWS: "log"}


def _row_counts(tables: Tables) -> Iterator[Finding]:
    """Yields where a stage made more or fewer rows than went into it, as its gate would say."""
    for kind in KINDS:
        first = kind.tables[0].name
        together = (EMBED, kind) if kind is FEATURES else (kind,)
        if any(table.name not in tables for one in together for table in one.tables):
            continue
        input_rows = tables[first].input_rows(_INPUT_OF[kind]) if kind in _INPUT_OF else 0
        if input_rows is None:
            continue
        counts = {one: _counts_of(one, tables) for one in together}
        try:
            gates.check_laws(kind, input_rows, counts)
        except DataContractError as error:  # which speaks of what is not published yet
            told = str(error).partition(". ")[0]
            yield tables[first].found.finding("rows were lost or doubled", told)

    for table in tables.values():
        samples = table.input_rows("samples") if table.found.is_training_set else None
        if samples is not None and samples != table.part.rows:
            told = f"{table.part.rows:,} rows were made of {samples:,} samples"
            yield table.found.finding("rows were lost or doubled", told)


def _counts_of(kind: Kind, tables: Tables) -> dict[str, int]:
    """Returns what is counted of a stage, its rows as they are there."""
    counts: dict[str, int] = {}
    for table in kind.tables:
        checked = tables[table.name]
        counts |= {**checked.counts, f"{table.name}_rows": checked.part.rows}
        if "former_items" in checked.part.counts:
            counts["former_items"] = checked.part.counts["former_items"]
    return counts


def _id_types(tables: Tables) -> Iterator[Finding]:
    for name in ("item_id", "user_id"):
        kinds: dict[str, list[str]] = {}
        for table in tables.values():
            if name in table.part.ids:
                kinds.setdefault(table.part.ids[name], []).append(table.found.name)
        if len(kinds) > 1:
            told = "; ".join(f"{kind} in {', '.join(names)}" for kind, names in kinds.items())
            fewest = min(kinds.values(), key=len)
            yield tables[fewest[0]].found.finding("IDs are of two types", f"{name} is {told}")


# ---- Rows, shard by shard ----------------------------------------------------------------------


class _Told(NamedTuple):
    """Tells of a shard what breaks a law: so many `rows` of a table, for `example` one item."""

    table: str
    law: str
    rows: int
    example: str


Check = Callable[[Tables, int, int], Iterator[_Told]]


def _shard_by_shard(tables: Tables, pool: Executor) -> Iterator[Finding]:
    told: dict[tuple[str, str], list[_Told]] = {}
    for one in _in_pool(tables, pool):
        told.setdefault((one.table, one.law), []).append(one)
    for (name, law), found in told.items():
        rows = sum(one.rows for one in found)
        text = f"{rows:,} rows break it{found[0].example}"
        yield tables[name].found.finding(law, text)


def _in_pool(tables: Tables, pool: Executor) -> Iterator[_Told]:
    for names, check in _CHECKS.items():
        if all(name in tables for name in names):
            shards = max(len(tables[name].found.partition.paths) for name in names)
            told = partial(_all_of, check, tables, shards)
            for found in pool.map(told, range(shards)):
                yield from found


def _all_of(check: Check, tables: Tables, shards: int, shard: int) -> list[_Told]:
    return list(check(tables, shard, shards))


def _read(tables: Tables, name: str, shard: int, shards: int, *columns: str) -> pa.Table:
    found = tables[name].found
    return found.partition.read_shard(shard, shards, found.sharded_by, columns)


def _features(tables: Tables, shard: int, shards: int) -> Iterator[_Told]:
    """States that items with a feature row are those embedded and those rejected, each once."""
    read = ("item_id", "category", "in_catalogue")
    features = _read(tables, ITEM_FEATURES.name, shard, shards, *read, "has_image")
    embedded = _read(tables, ITEM_EMBEDDINGS.name, shard, shards, *read)
    rejected = _read(tables, ITEM_REJECTS.name, shard, shards, "item_id", "category")
    inside = pa.array(np.ones(len(rejected), bool))
    rejected = rejected.append_column("in_catalogue", inside)
    has_image = features["has_image"]
    for name, theirs, mine in (
        (ITEM_EMBEDDINGS.name, embedded, features.filter(has_image)),
        (ITEM_REJECTS.name, rejected, features.filter(pc.invert(has_image))),
    ):
        image = "an image" if theirs is embedded else "no image"
        yield from _lacking(
            f"an item with {image} is not in {name}", mine["item_id"], theirs["item_id"]
        )
        yield from _lacking(
            f"an item of {name} has no row with {image}", theirs["item_id"], mine["item_id"]
        )
        if mine["item_id"].equals(theirs["item_id"]):
            for column in read[1:]:
                yield from _other(f"{column} is not that of {name}", mine, theirs, column)


def _lacking(law: str, ids: pa.ChunkedArray, known: pa.ChunkedArray) -> Iterator[_Told]:
    """Tells which of `ids` are not `known`; both ascend and are unique, as their laws say."""
    if ids.equals(known):
        return
    lacking = ids.filter(pc.invert(pc.is_in(ids, value_set=known.combine_chunks())))
    if len(lacking):
        yield _Told(ITEM_FEATURES.name, law, len(lacking), f", such as item_id {lacking[0]}")


def _other(law: str, mine: pa.Table, theirs: pa.Table, column: str) -> Iterator[_Told]:
    """Tells in which rows of two tables of the same items a column differs, null as a value."""
    if mine[column].equals(theirs[column]):
        return
    same = pc.fill_null(pc.equal(mine[column], theirs[column]), False)
    both_null = pc.and_(pc.is_null(mine[column]), pc.is_null(theirs[column]))
    ids = mine["item_id"].filter(pc.invert(pc.or_(same, both_null)))
    yield _Told(ITEM_FEATURES.name, law, len(ids), f", such as item_id {ids[0]}")


def _embeddings(tables: Tables, shard: int, shards: int) -> Iterator[_Told]:
    """States that no item is both embedded and rejected."""
    embedded = _read(tables, ITEM_EMBEDDINGS.name, shard, shards, "item_id")["item_id"]
    rejected = _read(tables, ITEM_REJECTS.name, shard, shards, "item_id")["item_id"]
    both = rejected.filter(pc.is_in(rejected, value_set=embedded.combine_chunks()))
    if len(both):
        law = "an item has an embedding and is a reject too"
        yield _Told(ITEM_REJECTS.name, law, len(both), f", such as item_id {both[0]}")


def _clicks(tables: Tables, shard: int, shards: int) -> Iterator[_Told]:
    """States that no click of a user's history is among those that it does not show."""
    columns = ("user_id", "item_ids", "click_times")
    shown = _read(tables, USER_HISTORIES.name, shard, shards, *columns)
    recent = _read(tables, RECENT_CLICKS.name, shard, shards, *columns)
    users = recent["user_id"].combine_chunks()
    shown = shown.filter(pc.is_in(shown["user_id"], value_set=users))
    if not len(shown):
        return
    one, other = _by_click(shown), _by_click(recent)
    twice = one.join(other, one.column_names, join_type="inner", use_threads=False)
    if len(twice):
        yield _Told(RECENT_CLICKS.name, "a click is in user_histories too", len(twice), "")


def _by_click(rows: pa.Table) -> pa.Table:
    """Returns a row for each click of a row for each user."""
    items, times = rows["item_ids"].combine_chunks(), rows["click_times"].combine_chunks()
    return pa.table(
        {
            "user_id": rows["user_id"].take(pc.list_parent_indices(items)),
            "item_id": items.flatten(),
            "click_time": times.flatten(),
        }
    )


_CHECKS: dict[tuple[str, ...], Check] = {
    (ITEM_EMBEDDINGS.name, ITEM_REJECTS.name): _embeddings,
    (ITEM_EMBEDDINGS.name, ITEM_REJECTS.name, ITEM_FEATURES.name): _features,
    (USER_HISTORIES.name, RECENT_CLICKS.name): _clicks,
}
