"""Checks one file of a published table: its bytes, its schema, and every law of its rows.

A file is read once: what is hashed is what is decoded, a row group at a time. A law that a part
keeps when it is written is asked again (`laws`); beside it stands here what was left to the maker
of a table, since the rows alone tell it: means and histograms of scores, times before the end of
the day, one encoder, the hash range of the shard, and what the manifest counts.
"""

import contextlib
import datetime as dt
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_jobs import inputs, laws
from feature_jobs.impressions import layouts
from feature_jobs.impressions.ctr_join import count_samples, positive
from feature_jobs.impressions.scores import mean_scores, sim_buckets, simtier, top_positions
from feature_jobs.impressions.simscore import score_histograms
from feature_jobs.impressions.snapshots import Snapshot, night_at
from feature_jobs.laws import Breach, Breaches
from feature_jobs.schemas import (
    HISTORY_ITEM_IDS,
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    JOINED,
    MAIN,
    SIM_BUCKET,
    TOP_POSITIONS,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    CourierError,
    StorageUnavailable,
    Table,
    Tiers,
    cluster_column,
    cluster_field,
    joined_fields,
    score_field,
    scores_schema,
)
from feature_jobs.store import files, hashing
from feature_jobs.store.encoder_info import dimension_of
from feature_jobs.store.partitions import Partition

BROKEN, REFUSED, NOT_READY = "broken", "refused", "not ready"
WARNING, UNVERIFIED = "warning", "unverified"
_BLOCK_ROWS = 1024  # whose scores are looked at at once, so that they stay in the cache


@dataclass(frozen=True)
class Finding:
    """Tells of one thing that was found in a table, or in the night's record where `table` is "".

    `level` is one of the names above, `law` what ought to hold, or what does not; `text` says where
    it does not, and what is known of it.
    """

    level: str
    table: str
    law: str
    text: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Published:
    """Holds a table of one ds as it is published; `partition` is what its manifest lists."""

    table: Table
    partition: Partition

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def manifest(self) -> dict[str, Any]:
        return self.partition.manifest

    @property
    def settings(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.manifest.get("settings", {})
        return found

    @property
    def is_training_set(self) -> bool:
        """Returns whether its rows are samples of the shop's own: they have no key, and no hash."""
        return not self.table.key

    @cached_property
    def first_schema(self) -> pa.Schema | None:
        """Returns the schema of the first file; None where it is damaged, which is told."""
        try:
            return self.partition.schema
        except (CourierError, OSError, pa.ArrowException):
            return None

    @property
    def is_laid_out(self) -> bool:
        """Returns whether a training set has other columns and types than the join's."""
        return self.settings.get("layout") == "torcheasyrec"

    @property
    def snapshots(self) -> list[Snapshot] | None:
        """Returns the nights that rows may know of by their moments; None where it is one for all.

        They are those that the manifest says.
        """
        name = "nights" if self.is_training_set else "snapshots"
        nights = self.manifest.get("inputs", {}).get(name)
        if nights is None:
            return None
        return [Snapshot(dt.date.fromisoformat(one["ds"]), one["from_us"]) for one in nights]

    @property
    def sharded_by(self) -> str:
        """Names the column by whose hash rows are spread over the files."""
        return "user_id" if self.table.has_users else "item_id"

    def finding(self, law: str, text: str, level: str = BROKEN) -> Finding:
        return Finding(level, self.name, law, text)

    @cached_property
    def limits(self) -> dict[str, int]:
        """Returns the limits of `laws.check` that the manifest tells."""
        if self.is_laid_out:
            return {}
        if self.table is ITEM_EMBEDDINGS:
            return {"embedding": dimension_of(self.settings)}
        if self.table is ITEM_FEATURES:
            return _highest(self.settings) | {"embedding": dimension_of(self.settings)}
        lists = {
            USER_HISTORIES.name: {"item_ids": "history_len"},
            USER_SIMSCORES.name: {"sim_scores": "history_len", TOP_POSITIONS: "top_k"},
            JOINED.name: {"sim_scores": "history_len", TOP_POSITIONS: "top_k"},
        }
        told = lists.get(self.name.partition("/")[0], {}).items()
        longest = {column: self.settings[key] for column, key in told if self.settings.get(key)}
        return longest | (_highest(self.manifest.get("notes", {})) if self.is_training_set else {})

    @property
    def tiers(self) -> Tiers:
        """Returns the tiers of its scores."""
        found: Tiers = self.settings.get("tiers", "courier")
        return found

    @cached_property
    def end_us(self) -> int | None:
        """Returns the end of its day in microseconds since 1970; None where nothing tells it."""
        zone, ds = self.settings.get("day_timezone"), self.manifest["ds"]
        return inputs.day_end(dt.date.fromisoformat(ds), zone) if zone else None


def _highest(said: Mapping[str, Any]) -> dict[str, int]:
    """Returns the highest cluster number that a part of a manifest says of each column."""
    return {cluster_column(label): most for label, most in said.get("max_id", {}).items()}


def command_for(table: str, ds: str) -> str:
    """Returns the command that makes a table of a day; of a training set not all that it needs."""
    family, _, name = table.partition("/")
    if family == JOINED.name:
        return f"courier join --samples … --name {name} --ds {ds}"
    return f"courier refresh --ds {ds}"


@dataclass
class Part:
    """Holds what was found of one file.

    `counts` are those that its rows give of what a manifest counts; `histograms` likewise; `ids`
    are the types of its IDs, where it has rows. It `is_read` where its bytes are a table of the
    right schema, and `is_whole` where its rows are what laws of several tables take them for.
    """

    bytes: int = 0
    rows: int = 0
    is_read: bool = False
    is_whole: bool = False
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    @classmethod
    def together(cls, parts: Sequence["Part"]) -> "Part":
        """Returns what was found of all files of a table."""
        total = cls(
            is_read=all(part.is_read for part in parts),
            is_whole=all(part.is_whole for part in parts),
        )
        for part in parts:
            total.bytes += part.bytes
            total.rows += part.rows
            total.findings += part.findings
            total.counts.update(part.counts)
            total.ids |= part.ids
            for name, bins in part.histograms.items():
                total.histograms[name] = add_bins(total.histograms.get(name), bins)
        return total


def check_part(found: Published, number: int, fast: bool) -> Part:
    """Checks the file `number` of a table; without its checksum where it is to be `fast`."""
    file, path = found.manifest["files"][number], found.partition.paths[number]
    part, name = Part(), file["name"]

    def tell(law: str, text: str) -> None:
        part.findings.append(found.finding(law, text))

    try:
        data = files.read_bytes(path)
    except FileNotFoundError:
        tell("a file of the manifest is not there", f"{path} is gone")
        return part
    except StorageUnavailable as error:
        tell("a file cannot be read", str(error))
        return part
    part.bytes = len(data)
    if len(data) != file["bytes"]:
        tell(
            "a file has not the bytes that the manifest says",
            f"{name} has {len(data):,} bytes, the manifest says {file['bytes']:,}: it was cut "
            "short, or replaced",
        )
    elif not fast and hashlib.sha256(data).hexdigest() != file["sha256"]:
        tell("a file has another content than was published", f"the sha256 of {name} is another")
    if part.findings:
        return part  # what its rows say is that of another file
    try:
        _check_content(found, number, data, part)
    except _Damaged as damage:
        tell("a file cannot be read as Parquet", f"{name} is damaged ({damage})")
    return part


class _Damaged(Exception):
    """Says that a file, or a row group of it, is no Parquet."""


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Raises _Damaged for what pyarrow says in the block, which does nothing but decode."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise _Damaged(str(error).splitlines()[0]) from error


def _check_content(found: Published, number: int, data: bytes, part: Part) -> None:
    file = found.manifest["files"][number]
    with _decoding():
        parquet = pq.ParquetFile(pa.BufferReader(data))
    part.rows = parquet.metadata.num_rows
    if part.rows != file["rows"]:
        told = f"{file['name']} has {part.rows:,} rows, the manifest says {file['rows']:,}"
        part.findings.append(found.finding("rows were lost or doubled", told))
    if wrong := list(_schema_faults(found, parquet)):
        told = f"{file['name']}: {'; '.join(wrong)}"
        part.findings.append(found.finding("the schema is not that of the table", told))
        return
    rows = _Rows(found, number, part)
    for group in range(parquet.num_row_groups):
        with _decoding():
            decoded = parquet.read_row_group(group, use_threads=False)
        rows.look_at(decoded.combine_chunks())
    rows.end(parquet.schema_arrow)
    part.is_read = True


# ---- Schema ------------------------------------------------------------------------------------


def _schema_faults(found: Published, file: pq.ParquetFile) -> Iterator[str]:
    """Yields in words what of a file's schema is not the table's."""
    there = file.schema_arrow
    expected = _expected_schema(found, there)
    if "ds" in there.names:
        yield "ds is inside, which readers take from the folder's name: they would have it twice"
    missing = [name for name in expected.names if name not in there.names]
    more = [name for name in there.names if name not in expected.names and name != "ds"]
    for what, names in (("lacks", missing), ("has besides", more)):
        if names:
            yield f"it {what} {', '.join(names)}"
    if not missing and not more and "ds" not in there.names and there.names != expected.names:
        yield f"its columns stand in another order: {', '.join(there.names)}"
    for name in expected.names:
        if name not in there.names:
            continue
        mine, wanted = there.field(name), expected.field(name)
        if mine.type != wanted.type:
            yield f"{name} is {mine.type} instead of {wanted.type}"
        elif mine.nullable != wanted.nullable:
            yield f"{name} may {'' if mine.nullable else 'not '}be null"
    own = {column.name for column in found.table.columns}  # what is carried is as the shop has it
    paths = [file.schema.column(place).path for place in range(len(file.schema.names))]
    for path in paths:
        name, *inside = path.split(".")
        if name in own and inside not in ([], ["list", "element"]):
            yield f"the values of {name} are named {'.'.join(inside)}, not list.element"


def _expected_schema(found: Published, there: pa.Schema) -> pa.Schema:
    """Returns the schema that a file ought to have, by its own IDs where they may be IDs."""
    if found.is_training_set:
        return _training_set_schema(found, there)
    table, optional = found.table, _optional(found, there)
    names = ("item_id", "user_id", "impression_id", "request_id")
    ids = {name: _id_type(there, name) for name in names}
    if table is USER_SIMSCORES:
        del ids["request_id"]
        own = {column.name for column in table.columns} | {"ds"}
        # From the shop's log.
        carried = [one for one in there if one.name not in own and not score_field(one.name)]
        asked = {*found.settings.get("columns", ()), HISTORY_ITEM_IDS} - set(optional)
        by_night = found.settings.get("features_from") == "previous"
        return scores_schema(
            **ids, columns=asked, tiers=found.tiers, carried=carried, by_night=by_night
        )
    labels = [label for label in found.settings.get("max_id", {}) if label != MAIN]
    return table.schema(**ids, extra=[*map(cluster_field, labels)], without=optional)


def _training_set_schema(found: Published, there: pa.Schema) -> pa.Schema:
    """Returns the samples' own columns, as the first file has them, and ours behind them."""
    said, first = found.settings, there if found.first_schema is None else found.first_schema
    if found.is_laid_out:
        return first
    columns, layout = set(said.get("columns", ())), said.get("layout", layouts.PLAIN)
    columns |= (
        {HISTORY_ITEM_IDS} if said.get("history_item_ids") and layout == layouts.PLAIN else set()
    )
    item_id = _id_type(first, said.get("sample_columns", {}).get("item_id", "item_id"))
    labels, created = said.get("labels", [MAIN]), said.get("created_timestamp", False)
    ours = joined_fields(labels, created, columns, found.tiers, item_id)
    if layout == "fuxictr":
        ours.append(pa.field(layouts.GROUP_ID, pa.int64(), nullable=False))
    names = {field.name for field in ours}
    return pa.schema([*(field for field in first if field.name not in names), *ours])


def _optional(found: Published, there: pa.Schema) -> list[str]:
    """Returns the columns that were not asked for, as the manifest says, or else as is there."""
    asked = {
        ITEM_FEATURES.name: ["embedding", "second_distance"],
        USER_SIMSCORES.name: [HISTORY_ITEM_IDS],
    }
    columns = asked.get(found.name, [])
    return [name for name in columns if not found.settings.get(name, name in there.names)]


_LISTS = ("item_ids", "pv_item_ids")  # of item IDs, in the tables that have no item_id


def _id_type(there: pa.Schema, name: str) -> pa.DataType:
    """Returns the type of a kind of ID in a file: int64, unless it is string there."""
    lists = _LISTS if name == "item_id" else ()
    for column in (name, *lists):
        if column in there.names:
            kind = there.field(column).type
            kind = kind.value_type if pa.types.is_list(kind) else kind
            return pa.string() if pa.types.is_string(kind) else pa.int64()
    return pa.int64()


# ---- Rows --------------------------------------------------------------------------------------


class _Told(NamedTuple):
    """Counts the rows of a part that break a law; names one of them."""

    rows: int
    example: str


class _Rows:
    """Looks at the rows of one file, row group by row group."""

    def __init__(self, found: Published, number: int, part: Part):
        self._found, self._part = found, part
        self._name = found.manifest["files"][number]["name"]
        self._number, self._shards = number, len(found.manifest["files"])
        self._told: dict[str, _Told] = {}
        self._fatal = False
        self._last: pa.Table | None = None
        self._users: list[np.ndarray] = []

    def look_at(self, rows: pa.Table) -> None:
        """Looks at the rows of the next row group, in one chunk a column."""
        if not len(rows):
            return
        found, table = self._found, self._found.table
        if table.key:
            self._look_at_keys(rows)
            self._tell(rows, self._of_shard(rows))
        if self._tell(rows, laws.breaches(table, rows, found.limits)):
            self._fatal = True
        else:
            self._tell(rows, _more_laws(found, rows))
            self._count(rows)

    def _look_at_keys(self, rows: pa.Table) -> None:
        table = self._found.table
        keys = rows.select([table.key, *table.then_by])
        if self._last is not None:  # it goes on where the group before ended
            both = pa.concat_tables([self._last, keys.slice(0, 1)]).combine_chunks()
            self._tell(both, laws.in_order(table, both))
        self._last = keys.slice(len(keys) - 1)

    def _tell(self, rows: pa.Table, breaches: Breaches) -> bool:
        """Notes what breaks a law; returns whether nothing more can be looked at."""
        fatal = False
        for breach in breaches:
            bad = np.flatnonzero(breach.rows)
            if not len(bad):
                continue
            fatal |= breach.fatal
            example = laws.name_row(self._found.table, rows, int(bad[0]))
            before = self._told.get(breach.what, _Told(0, example))
            self._told[breach.what] = _Told(before.rows + len(bad), before.example)
        return fatal

    def _of_shard(self, rows: pa.Table) -> Breaches:
        hashes = hashing.hash_ids(rows[self._found.sharded_by])
        if self._found.table is USER_SIMSCORES:
            self._users.append(hashes)
        elsewhere = hashing.shard_of(hashes, self._shards) != self._number
        key = self._found.sharded_by
        article = "an" if key == "item_id" else "a"
        yield Breach(f"{article} {key} belongs into another file by its hash", elsewhere)

    def _count(self, rows: pa.Table) -> None:
        counts, histograms = _COUNTED.get(self._found.name, _nothing)(rows)
        if self._found.is_training_set:
            counts = _samples(self._found, rows)
        self._part.counts.update(counts)
        for name, bins in histograms.items():
            self._part.histograms[name] = add_bins(self._part.histograms.get(name), bins)

    def end(self, schema: pa.Schema) -> None:
        """Tells what was noted, once all row groups were looked at."""
        part, found = self._part, self._found
        part.is_whole = not self._fatal
        if part.rows and not found.is_training_set:
            part.ids = {
                name: str(_id_type(schema, name))
                for name in ("item_id", "user_id")
                if name == "item_id" or name in schema.names
            }
        if self._users:
            users = pa.array(np.concatenate(self._users))
            part.counts["users"] = pc.count_distinct(users).as_py()
        for law, (rows, example) in self._told.items():
            text = f"{rows:,} of {part.rows:,} rows of {self._name} break it, such as {example}"
            part.findings.append(found.finding(law, text))


def add_bins(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    """Adds two histograms bin by bin; the longer one tells how many bins there are."""
    if one is None:
        return other
    long, short = (one, other) if len(one) >= len(other) else (other, one)
    added = long.copy()
    added[: len(short)] += short
    return added


# ---- What the maker of a table answers for -----------------------------------------------------


def _more_laws(found: Published, rows: pa.Table) -> Breaches:
    """Yields what no law of rows alone can tell when they are written, or leaves to their maker."""
    if found.is_laid_out:
        return
    if found.is_training_set:  # whose other columns are the shop's own
        yield from _derived(rows, found.tiers)
        yield from _of_moments(found, rows)
        return
    for name, identity in found.manifest.get("identities", {}).items():
        if name in rows.column_names:
            other = pc.not_equal(rows[name], identity)
            yield Breach(f"{name} is not that of the manifest", _bool(other))
    if found.end_us is not None:
        yield from _not_after(found, rows, found.end_us)
    if found.table is USER_SIMSCORES:
        yield from _derived(rows, found.tiers)
        if found.snapshots is not None and "feature_ds" in rows.column_names:
            yield from _of_night(rows, rows["event_time"].cast(pa.int64()), found.snapshots)
    ds = pa.scalar(dt.date.fromisoformat(found.manifest["ds"]))
    for name in ("left_catalogue_ds", "last_ds"):
        if name in rows.column_names:
            yield Breach(f"{name} comes after ds", _bool(pc.greater(rows[name], ds)))


def _of_moments(found: Published, rows: pa.Table) -> Breaches:
    """States of a training set what its moments tell, whatever the shop calls their column."""
    column = found.settings.get("sample_columns", {}).get("event_time")
    if column not in rows.column_names or found.snapshots is None or found.end_us is None:
        return
    moments = inputs.to_utc(rows[column], found.settings.get("input_timezone")).cast(pa.int64())
    yield Breach("a sample comes after ds", moments.to_numpy() >= found.end_us)
    yield from _of_night(rows, moments, found.snapshots)


def _of_night(rows: pa.Table, moments: pa.ChunkedArray, snapshots: Sequence[Snapshot]) -> Breaches:
    """States that each row takes the night that its moment may know, as inputs tell."""
    place = night_at(moments.to_numpy(), snapshots)
    days = pa.array([one.ds for one in snapshots], pa.date32())
    expected = days.take(pa.array(place, mask=place < 0))
    same = pc.equal(rows["feature_ds"], expected).combine_chunks().fill_null(False)
    both_null = pc.and_(pc.is_null(rows["feature_ds"]), pc.is_null(expected)).combine_chunks()
    wrong = pc.invert(pc.or_(same, both_null)).to_numpy(zero_copy_only=False)
    yield Breach("feature_ds is not the night that its moment may know", wrong)


def _bool(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of bools, null for false, as an array [n]."""
    found: np.ndarray = pc.fill_null(column, False).to_numpy()
    return found


def _not_after(found: Published, rows: pa.Table, end_us: int) -> Breaches:
    """States that nothing is of a moment after ds, where the table tells of ds alone."""
    if "event_time" in rows.column_names:
        times = rows["event_time"].cast(pa.int64()).to_numpy()
        yield Breach("event_time comes after ds", times >= end_us)
    if found.table is USER_HISTORIES:
        lists = rows["click_times"].combine_chunks()
        late = lists.flatten().cast(pa.int64()).to_numpy() >= end_us
        if late.any():
            of_row = pc.list_parent_indices(lists).to_numpy()[late]
            late = np.bincount(of_row, minlength=len(rows)) > 0
        else:
            late = np.zeros(len(rows), bool)
        yield Breach("a click comes after the end of ds, which histories end at", late)


def _derived(rows: pa.Table, tiers: Tiers) -> Breaches:
    """States that what is made of scores is made of these; their law has been kept by then."""
    scores, mask = _values(rows, "sim_scores"), _values(rows, "sim_mask")
    told = {name: _values(rows, name) for name in _OF_SCORES if name in rows.column_names}
    wrong = {name: np.zeros(len(rows), bool) for name in told}
    for at in range(0, len(rows), _BLOCK_ROWS):
        block = slice(at, at + _BLOCK_ROWS)
        for name, values in told.items():
            made = _made_of(name, scores[block], mask[block], values.shape[-1], tiers)
            other = made != values[block]
            wrong[name][block] = other.any(axis=1) if other.ndim == 2 else other
    for name, what in _OF_SCORES.items():
        if name in wrong:
            yield Breach(f"{name} {what}", wrong[name])


_OF_SCORES = {
    "sim_mean": "is not the mean of the real scores",
    "simtier": "is not the histogram of the real scores",
    SIM_BUCKET: "is not the tier of each real score",
    TOP_POSITIONS: "are not where the largest real scores stand",
}


def _made_of(
    name: str, scores: np.ndarray, mask: np.ndarray, width: int, tiers: Tiers
) -> np.ndarray:
    """Makes the column `name` of some rows, whose lists are `width` long, from their scores."""
    if name == "sim_mean":
        return mean_scores(scores, np.count_nonzero(mask, axis=1))
    if name == "simtier":
        return simtier(scores, mask, tiers)
    if name == SIM_BUCKET:
        return sim_buckets(scores, mask, tiers)
    return top_positions(scores, mask, width)


def _values(rows: pa.Table, name: str) -> np.ndarray:
    """Returns a column of numbers [n], or of lists of numbers that are equally long [n, m]."""
    column = rows[name].chunk(0)
    if not pa.types.is_list(column.type):
        return np.asarray(column.to_numpy())
    return np.asarray(column.flatten().to_numpy()).reshape(len(rows), -1)


# ---- What a manifest counts --------------------------------------------------------------------

Counted = tuple[Mapping[str, int], Mapping[str, np.ndarray]]


def _nothing(_: pa.Table) -> Counted:
    return {}, {}


def _embeddings(rows: pa.Table) -> Counted:
    return {"former_items": len(rows) - _true(rows["in_catalogue"])}, {}


def _rejects(rows: pa.Table) -> Counted:
    found = pc.value_counts(rows["reason"]).to_pylist()
    return {f"rejected_{one['values']}": one["counts"] for one in found}, {}


def _features(rows: pa.Table) -> Counted:
    clusters = [name for name in rows.column_names if name.startswith("cluster_")]
    return {
        "items": len(rows),
        "items_with_cluster": _true(pc.greater(rows["cluster_id"], 0)),
        "items_out_of_scope": len(rows) - _true(rows["in_scope"]),
        **{f"{name} > 0": _true(pc.greater(rows[name], 0)) for name in clusters},
    }, {}


def _histories(rows: pa.Table) -> Counted:
    return {"users": len(rows)}, {}


def _training(rows: pa.Table) -> Counted:
    has_history = pc.greater(pc.list_value_length(rows["click_item_ids"]), 0)
    clicks = _true(pc.list_flatten(rows["pv_clicked"]))
    return {"rows_with_history": _true(has_history), "clicks": clicks}, {}


def _scores(rows: pa.Table) -> Counted:
    counts = {
        "impressions": len(rows),
        "clicks": _true(rows["clicked"]),
        "without_history": _true(pc.equal(rows["history_len"], 0)),
        "scored_impressions": _true(pc.greater(rows["sim_known"], 0)),
    }
    if "feature_ds" in rows.column_names:
        none = rows.filter(pc.is_null(rows["feature_ds"]))
        counts["without_snapshot"] = len(none)
        counts["histories_without_snapshot"] = _true(pc.greater(none["history_len"], 0))
    places = pc.list_value_length(rows["sim_scores"])[0].as_py()  # of each row, by its law
    names = ("history_len", "sim_known", "sim_max")
    scored = {name: rows[name].to_numpy() for name in names}
    # A value that breaks its law, which is told, has no bin, or asks for memory without end.
    has_bins = (scored["history_len"] >= 0) & (scored["history_len"] <= places)
    has_bins &= np.abs(scored["sim_max"]) <= 1
    binned = {name: values[has_bins] for name, values in scored.items()}
    clicked = rows["clicked"].to_numpy()[has_bins]
    return counts, score_histograms(clicked, binned, places)


def _samples(found: Published, rows: pa.Table) -> dict[str, int]:
    counts = {"samples": len(rows)}
    if not found.is_laid_out:
        counts = count_samples(rows)
    label = found.settings.get("label")
    if label in rows.column_names:
        clicked = int(positive(rows[label]).sum())
        counts |= {"positives": clicked, "positives_read": clicked}
    return counts


def _true(column: pa.Array | pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


_COUNTED: dict[str, Callable[[pa.Table], Counted]] = {
    ITEM_EMBEDDINGS.name: _embeddings,
    ITEM_REJECTS.name: _rejects,
    ITEM_FEATURES.name: _features,
    USER_HISTORIES.name: _histories,
    TRAINING_ROWS.name: _training,
    USER_SIMSCORES.name: _scores,
}
