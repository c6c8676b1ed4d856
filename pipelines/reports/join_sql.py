"""Writes the SQL that joins samples to published nights and scores as `courier join` does.

A statement makes the training set of one day, its columns and rows in the order of the command. It
names files, not folders: what it reads is what the nights' records and manifests name, until one of
them is published anew. Nothing is scored on the way: a sample whose score is not published has
zeros, and a history_len of 0.
"""

import datetime as dt
import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from feature_jobs.impressions import layouts
from feature_jobs.impressions.scoring import ScoreForm
from feature_jobs.impressions.snapshots import Snapshot
from feature_jobs.schemas import (
    HISTORY_ITEM_IDS,
    SAME_CLUSTER,
    SIM_TIERS,
    TOP_POSITIONS,
    InputNotReady,
    OperatorError,
    cluster_column,
)
from feature_jobs.store import files
from pipelines.planning.joins import PlannedJoin
from pipelines.running.states import Night

Dialect = Literal["duckdb", "spark"]

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_NAMES = ("_file", "file_row_number", "_metadata")  # which the statement, or Spark, takes itself
_YEAR_1 = dt.datetime.min.replace(tzinfo=dt.UTC)


@dataclass(frozen=True)
class SqlNight:
    """Is a night as the statement reads it: the files of `item_features`, by their full paths.

    `created_us` is when it was first published, in microseconds since 1970, None where nobody noted
    it.
    """

    snapshot: Snapshot
    item_features: Sequence[str]
    created_us: int | None


@dataclass(frozen=True)
class JoinQuery:
    """Holds what the statement of one day of samples is made of; files are full paths.

    `ds` is the day of the `samples`, in the order of their rows, and of the `scores`, the files of
    `user_simscores`. These were made with `features_from`; a score is taken where it is of the
    sample's own night. `labels` are those of the codebook's further resolutions. Columns
    `on_request` are lists of so many whole numbers, or one for 0; None is a list of any length.
    """

    ds: dt.date
    samples: Sequence[str]
    user_id: str
    item_id: str
    event_time: str
    nights: Sequence[SqlNight]
    scores: Sequence[str]
    features_from: Literal["previous", "same"]
    history_len: int
    labels: Sequence[str] = ()
    created_timestamp: bool = False
    on_request: Mapping[str, int | None] = field(default_factory=dict)


def show_sql(dialect: Dialect, query: JoinQuery) -> str:
    """Returns the statement, which ends with a semicolon, below comments that say how to run it.

    Raises InputNotReady where there is no night to join.
    """
    if not query.nights:
        raise InputNotReady(
            f"No night is published that the samples of ds {query.ds} could know, so that there is "
            "nothing to join them to. Run `courier refresh` for the days before it first."
        )
    sql = _DIALECTS[dialect]
    return "\n".join(
        [
            sql.head,
            "WITH samples AS (",
            *_samples(sql, query),
            "),",
            "items AS (",
            *_items(sql, query),
            "),",
            "scores AS (",
            *_scores(sql, query),
            ")",
            *_joined(sql, query),
            "ORDER BY samples._file, samples.file_row_number;",
        ]
    )


def query_of(night: Night) -> JoinQuery:
    """Returns what the statement of a planned day of a training set is made of.

    Raises OperatorError where no published scores may be taken, and for what it cannot do.
    """
    (planned,) = night.planned
    assert isinstance(planned, PlannedJoin)
    _refuse_without(planned)
    asked, samples = planned.asked, planned.samples
    found = [
        SqlNight(
            one.snapshot, one.features.paths,
            int(one.created.timestamp() * 1_000_000) if one.created else None,
        )
        for one in planned.nights
    ]  # fmt: skip
    user, item, time = (asked.columns[name] for name in ("user_id", "item_id", "event_time"))
    return JoinQuery(
        planned.stage.ds, samples.paths, user, item, time, found,
        planned.scores.paths if planned.scores else (), asked.features_from,
        planned.settings.history_len, planned.stage.settings["labels"][1:],
        asked.created_timestamp, _on_request(planned.form),
    )  # fmt: skip


def _refuse_without(planned: PlannedJoin) -> None:
    asked = planned.asked
    if planned.scores is None:
        raise OperatorError(
            f"--show-sql prints a query for published scores, and those of ds {planned.stage.ds} "
            f"are {planned.scores_told}. Let nights be scored as the join asks "
            '([simscore] features_from = "previous"), ask as they are (--features-from same), or '
            "run the join without it, which scores samples on the way."
        )
    if asked.layout != layouts.PLAIN or planned.form.tiers != "courier":
        raise OperatorError(
            "--show-sql prints a query for the plain layout and COURIER's own tiers, and these "
            f"samples are asked for with layout {asked.layout} and tiers {planned.form.tiers}. Run "
            "the join without it."
        )
    names = [field.name for field in planned.samples.carried]
    if taken := [name for name in names if name.lower() in _NAMES]:
        raise OperatorError(
            f"The samples of ds {planned.stage.ds} have columns named {', '.join(taken)}, by which "
            "the query of --show-sql tells the place of each row, or Spark that of its file. "
            "Engines would refuse it, or take one for the other, and rows would come in another "
            "order. Rename them where the samples are written, or run the join without it."
        )


def _on_request(form: ScoreForm) -> dict[str, int | None]:
    """Returns how many places the columns have that the settings ask for."""
    found: dict[str, int | None] = {}
    for name in form.columns:
        if name == HISTORY_ITEM_IDS:
            found[name] = None
        elif name == TOP_POSITIONS:
            found[name] = form.top_k
        else:
            found[name] = 0 if name.startswith(SAME_CLUSTER) else form.length
    return found


# ---- Dialects ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dialect:
    """Is what differs: how files are read, and how a few things are spelt."""

    head: str
    quote: str
    moment: str  # the type of a moment in time
    place: str  # what tells of a row its file and its place in that
    without: str  # that leaves columns out of a *
    zeros: str
    nothing: str
    read: Callable[[Sequence[str], bool], list[str]]

    def name(self, column: str) -> str:
        return f"{self.quote}{column.replace(self.quote, 2 * self.quote)}{self.quote}"

    def at(self, moment_us: int) -> str:
        """Returns the literal of a moment, in microseconds since 1970; before year 1, of that."""
        moment = _EPOCH + max(dt.timedelta(microseconds=moment_us), _YEAR_1 - _EPOCH)
        return f"{self.moment} '{moment.isoformat(' ', 'microseconds')}'"


def _read_by_duckdb(paths: Sequence[str], with_places: bool) -> list[str]:
    """Returns one thing to select from. DuckDB takes every path for a pattern."""
    listed = ", ".join("'" + glob.escape(path).replace("'", "''") + "'" for path in paths)
    places = ", filename = '_file', file_row_number = true" if with_places else ""
    return [f"read_parquet([{listed}], hive_partitioning = false{places})"]


def _read_by_spark(paths: Sequence[str], with_places: bool) -> list[str]:
    """Returns a thing to select from for each folder: Spark takes one pattern, not a list."""
    found = []
    for folder, together in groupby(sorted(paths), os.path.dirname):
        names = [_spark_literal(os.path.basename(path)) for path in together]
        one = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        at = f"{'' if files.is_remote(folder) else 'file:'}{_spark_literal(folder)}/{one}"
        found.append(f"parquet.`{at.replace('`', '``')}`")
    return found


def _spark_literal(path: str) -> str:
    return re.sub(r"([\\{}\[\]*?,])", r"\\\1", path)


_DIALECTS: dict[Dialect, _Dialect] = {
    "duckdb": _Dialect(
        head="""\
-- For DuckDB, which needs its extension httpfs and a secret of TYPE gcs for what lies in a bucket.
-- Files are in the order of their names. COPY (…) TO 'set.parquet' writes the rows in theirs.""",
        quote='"',
        moment="TIMESTAMPTZ",
        place="",
        without="EXCLUDE",
        zeros="repeat([CAST(0 AS {})], {})",
        nothing="[]",
        read=_read_by_duckdb,
    ),
    "spark": _Dialect(
        head="""\
-- For Spark SQL, from 4.0 on, which reads no times in nanoseconds. Files are in the order of their
-- names. Rows keep theirs where the result is collected, or written by one task; where several do,
-- each file is sorted, and the next one goes on from it.""",
        quote="`",
        moment="TIMESTAMP",
        place=", _metadata.file_path AS _file, _metadata.row_index AS file_row_number",
        without="EXCEPT",
        zeros="array_repeat(CAST(0 AS {}), {})",
        nothing="array()",
        read=_read_by_spark,
    ),
}


# ---- What is joined ----------------------------------------------------------------------------


def _samples(sql: _Dialect, query: JoinQuery) -> list[str]:
    """Returns what selects the samples, each with the ds of its night."""
    moment = f"CAST({sql.name(query.event_time)} AS {sql.moment})"  # which may be in nanoseconds
    lines = ["  CASE"]
    for night in _overtaking(query.nights):
        begins, ds = sql.at(night.snapshot.from_us), _date(night.snapshot.ds)
        lines.append(f"    WHEN {moment} >= {begins} THEN {ds}")
    chosen = "\n".join([*lines, "  END AS feature_ds"])
    return _union(f"SELECT *,\n{chosen}{sql.place}", sql.read(query.samples, True))


def _overtaking(nights: Sequence[SqlNight]) -> list[SqlNight]:
    """Returns the nights that are the newest when they come, the last of them first.

    One that came late, after a newer one or with it, is known to no sample.
    """
    found: list[SqlNight] = []
    for night in sorted(nights, key=lambda one: one.snapshot.ds, reverse=True):
        if not found or night.snapshot.from_us < found[-1].snapshot.from_us:
            found.append(night)
    return found


def _items(sql: _Dialect, query: JoinQuery) -> list[str]:
    columns = ", ".join(["item_id", "has_image", "in_scope", *_clusters(sql, query)])
    lines: list[str] = []
    for night in _overtaking(query.nights):
        select = f"SELECT {_date(night.snapshot.ds)} AS ds, {columns}"
        lines += ["  UNION ALL"] if lines else []
        lines += _union(select, sql.read(night.item_features, False))
    return lines


def _clusters(sql: _Dialect, query: JoinQuery) -> list[str]:
    return ["cluster_id", *(sql.name(cluster_column(label)) for label in query.labels)]


def _scores(sql: _Dialect, query: JoinQuery) -> list[str]:
    """Returns what selects the scores, and of rows that are equal in user, item and time one.

    All of these have equal scores. Those of a table that is not `previous` are of the night of ds.
    """
    is_told = query.features_from == "previous"
    night = "feature_ds" if is_told else f"{_date(query.ds)} AS feature_ds"
    (source,) = sql.read(query.scores, False)  # all of them lie in one folder
    return [
        f"  SELECT user_id, item_id, event_time, {night}, {', '.join(_zeros(sql, query))}",
        f"  FROM {source}",
        "  WHERE impression_id IN (",
        "    SELECT min(impression_id)",
        f"    FROM {source}",
        "    GROUP BY user_id, item_id, event_time",
        "  )",
    ]


def _zeros(sql: _Dialect, query: JoinQuery) -> dict[str, str]:
    """Returns the columns that are made of scores, each with what a sample without one has."""
    return {
        "sim_scores": sql.zeros.format("FLOAT", query.history_len),
        "sim_mask": sql.zeros.format("TINYINT", query.history_len),
        "history_len": "0",
        "sim_known": "0",
        "sim_max": "CAST(0 AS FLOAT)",
        "sim_mean": "CAST(0 AS FLOAT)",
        "simtier": sql.zeros.format("INT", SIM_TIERS),
        "same_cluster": "0",
        **{name: _zero(sql, places) for name, places in query.on_request.items()},
    }


def _zero(sql: _Dialect, places: int | None) -> str:
    if places is None:
        return sql.nothing
    return sql.zeros.format("INT", places) if places else "0"


def _joined(sql: _Dialect, query: JoinQuery) -> list[str]:
    """Returns what selects the columns of the join, from samples, items and scores."""
    columns = [
        f"samples.* {sql.without} (_file, file_row_number)",
        "samples.feature_ds IS NOT NULL AS has_night",
        "items.item_id IS NOT NULL AS item_known",
        *(f"coalesce(items.{name}, false) AS {name}" for name in ("has_image", "in_scope")),
        *(f"coalesce(items.{name}, 0) AS {name}" for name in _clusters(sql, query)),
        *(f"coalesce(scores.{c}, {zero}) AS {c}" for c, zero in _zeros(sql, query).items()),
        *([_created(sql, query)] if query.created_timestamp else []),
    ]
    user, item, moment = (
        f"samples.{sql.name(name)}" for name in (query.user_id, query.item_id, query.event_time)
    )
    return [
        "SELECT " + ",\n  ".join(columns),
        "FROM samples",
        f"LEFT JOIN items ON items.ds = samples.feature_ds AND items.item_id = {item}",
        f"LEFT JOIN scores ON scores.user_id = {user} AND scores.item_id = {item}",
        f"  AND scores.event_time = CAST({moment} AS {sql.moment})",
        "  AND scores.feature_ds IS NOT DISTINCT FROM samples.feature_ds",
    ]


def _created(sql: _Dialect, query: JoinQuery) -> str:
    whens = [
        f"WHEN {_date(night.snapshot.ds)} THEN "
        f"{'NULL' if night.created_us is None else sql.at(night.created_us)}"
        for night in _overtaking(query.nights)
    ]
    cases = "\n    ".join(["CAST(CASE samples.feature_ds", *whens])
    return f"{cases}\n  END AS {sql.moment}) AS night_created"


def _union(select: str, sources: Sequence[str]) -> list[str]:
    """Returns lines that select the same of all `sources`."""
    indented = select.replace("\n", "\n  ")
    found = [f"  {indented}\n  FROM {source}" for source in sources]
    return "\n  UNION ALL\n".join(found).split("\n")


def _date(ds: dt.date) -> str:
    return f"DATE '{ds}'"
