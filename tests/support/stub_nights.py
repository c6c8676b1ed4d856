"""Makes the tables of nights without Beam and torch, from functions that a model calls as well.

What such a job writes is as small as it can be, and follows from what the stage names as its inputs
and from nothing else: each table says in its rows which catalogue, images, log and tables of
earlier days it was made from. As real ones do, embeddings keep the items that left the catalogue
for `WINDOW_DAYS`, and histories the log of that many days and of late rows. All else is the real
code: planning, states, locks, sealing, gates, publishing, records.
"""

import contextlib
import datetime as dt
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from courier_model.projection import EMBEDDING_DIM
from feature_jobs import schemas
from feature_jobs.inputs import Source
from feature_jobs.schemas import SIM_TIERS, Table
from feature_jobs.store import partitions
from pipelines.planning.impressions import PlannedHistories, PlannedScores
from pipelines.planning.items import PlannedEmbed, PlannedFeatures
from pipelines.running import beam_options, progress
from pipelines.running.stage import Planned, Reference
from pipelines.running.states import Look, staged_folder

WINDOW_DAYS, LATE_DAYS, HISTORY_LEN = 2, 1, 2
UNKNOWN_FROM = 1000  # impressions numbered from here on are of an item that no catalogue has
_REMEMBERED = WINDOW_DAYS + LATE_DAYS  # days whose log a history holds
_EPOCH = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)

# What a table holds, row by row, as the functions below give it and `read` finds it again.
Rows = tuple[tuple[Any, ...], ...]
Tables = Mapping[str, Rows]


# ---- What the tables of a day hold --------------------------------------------------------------


def embedded(ds: dt.date, catalogue: Rows, images: Mapping[int, str], before: Rows) -> Tables:
    """Returns item_embeddings and item_rejects.

    `catalogue` has item, whether it has an image, and category; `images` what each image holds.
    `before` are the embeddings that the day goes on from.
    """
    there = {item for item, *_ in catalogue}
    rows = [
        (item, images[item], category, None) for item, has_image, category in catalogue if has_image
    ]
    for item, image, category, left in before:
        since = left or ds
        if item not in there and (ds - since).days < WINDOW_DAYS:
            rows.append((item, image, category, since))
    rejects = [(item, category) for item, has_image, category in catalogue if not has_image]
    return {"item_embeddings": tuple(sorted(rows)), "item_rejects": tuple(sorted(rejects))}


def features(made: Tables) -> Tables:
    """Returns item_features, of the embeddings and rejects `made`."""
    rows = [
        (item, category, left is None, fraction(image))
        for item, image, category, left in made["item_embeddings"]
    ]
    rows += [(item, category, True, 0.0) for item, category in made["item_rejects"]]
    return {"item_features": tuple(sorted(rows))}


def histories(ds: dt.date, log: Rows, before: Rows) -> Tables:
    """Returns user_histories, a row for each day whose log they hold, and recent_clicks.

    `log` are the numbers of impressions, `before` the histories that the day goes on from.
    """
    first = ds - dt.timedelta(days=_REMEMBERED - 1)
    kept = [row for row in before if row[0] >= first.toordinal()]
    mine = [(ds.toordinal(), number_of(log))] if log else []
    return {"user_histories": tuple([*kept, *mine]), "recent_clicks": tuple(mine)}


def histories_of_log(ds: dt.date, logs: Mapping[dt.date, Rows]) -> Rows:
    """Returns the histories at the end of ds as the logs of earlier days alone give them."""
    rows: Rows = ()
    for day in sorted(logs):
        if day <= ds:
            rows = histories(day, logs[day], rows)["user_histories"]
    return histories(ds, (), rows)["user_histories"]


def scores(log: Rows, items: Tables, before: Rows) -> Tables:
    """Returns user_simscores, of embeddings and features of all nights and the histories before."""
    known = fraction((items["item_embeddings"], items["item_features"], before))
    return {"user_simscores": tuple((f"{number:08d}", known) for (number,) in sorted(log))}


def number_of(value: object) -> int:
    """Returns 24 bits of a digest of a value."""
    return int(hashlib.sha256(repr(value).encode()).hexdigest()[:6], 16)


def fraction(value: object) -> float:
    """Returns a number from 0 to 1 that float32 holds, other ones for other values."""
    return number_of(value) / 2**24


# ---- Rows as Arrow tables, and back -------------------------------------------------------------


def _embeddings_table(rows: Rows) -> dict[str, Any]:
    vectors = np.eye(EMBEDDING_DIM, dtype=np.float32)[[number_of(row[1]) % 256 for row in rows]]
    return {
        "item_id": [row[0] for row in rows],
        "embedding": list(vectors),
        "image_uri": [f"{row[0]}.png" for row in rows],
        "image_generation": [None] * len(rows),
        "image_size": [1] * len(rows),
        "image_mtime": [None] * len(rows),
        "image_sha256": [row[1] for row in rows],
        "category": [row[2] for row in rows],
        "in_catalogue": [row[3] is None for row in rows],
        "left_catalogue_ds": [row[3] for row in rows],
    }


def _rejects_table(rows: Rows) -> dict[str, Any]:
    day, n = _EPOCH.date(), len(rows)
    return {
        "item_id": [row[0] for row in rows],
        "image_uri": [None] * n,
        "category": [row[1] for row in rows],
        "stage": ["read"] * n,
        "reason": ["unsupported_uri"] * n,
        "message": ["it has none"] * n,
        "attempts": [1] * n,
        "first_ds": [day] * n,
        "last_ds": [day] * n,
        "next_ds": [day + dt.timedelta(days=1)] * n,
    }


def _features_table(rows: Rows) -> dict[str, Any]:
    has_image = [row[3] > 0 for row in rows]
    return {
        "item_id": [row[0] for row in rows],
        "category": [row[1] for row in rows],
        "has_image": has_image,
        "in_scope": [True] * len(rows),
        "in_catalogue": [row[2] for row in rows],
        "cluster_id": [int(has) for has in has_image],
        "centre_distance": [row[3] for row in rows],
        "encoder_id": ["encoder"] * len(rows),
        "codebook_id": ["codebook"] * len(rows),
    }


def _clicks_table(rows: Rows) -> dict[str, Any]:
    return {
        "user_id": [row[0] for row in rows],
        "item_ids": [[1]] * len(rows),
        "click_times": [[_EPOCH + dt.timedelta(seconds=row[1])] for row in rows],
    }


def _scores_table(rows: Rows) -> dict[str, Any]:
    n = len(rows)
    return {
        "impression_id": [row[0] for row in rows],
        "user_id": [1] * n,
        "item_id": [1] * n,
        "event_time": [_EPOCH] * n,
        "clicked": [False] * n,
        "sim_scores": [[row[1], *[0.0] * (HISTORY_LEN - 1)] for row in rows],
        "sim_mask": [[1, *[0] * (HISTORY_LEN - 1)]] * n,
        "history_len": [1] * n,
        "sim_known": [1] * n,
        "sim_max": [row[1] for row in rows],
        "sim_mean": [row[1] for row in rows],
        "simtier": [[1, *[0] * (SIM_TIERS - 1)]] * n,
        "same_cluster": [0] * n,
        "encoder_id": ["encoder"] * n,
        "codebook_id": ["codebook"] * n,
        "feature_ds": [_EPOCH.date()] * n,
    }


_AS_TABLE: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "item_embeddings": _embeddings_table,
    "item_rejects": _rejects_table,
    "item_features": _features_table,
    "user_histories": _clicks_table,
    "recent_clicks": _clicks_table,
    "user_simscores": _scores_table,
}
_COLUMNS = {
    "item_embeddings": ("item_id", "image_sha256", "category", "left_catalogue_ds"),
    "item_rejects": ("item_id", "category"),
    "item_features": ("item_id", "category", "in_catalogue", "centre_distance"),
    "user_histories": ("user_id", "click_times"),
    "recent_clicks": ("user_id", "click_times"),
    "user_simscores": ("impression_id", "sim_max"),
}


def read(table: str, files: Sequence[bytes]) -> Rows:
    """Returns what the Parquet `files` of a table hold."""
    names = list(_COLUMNS[table])
    rows = pa.concat_tables(_read_parquet(data, names) for data in files)
    if "click_times" in names:
        when = pc.subtract(pc.list_flatten(rows["click_times"]), pa.scalar(_EPOCH))
        seconds = pc.divide(when.cast(pa.int64()), 1_000_000)
        rows = rows.set_column(1, "click_times", seconds)
    return tuple(zip(*(rows[name].to_pylist() for name in names), strict=True))


def _read_parquet(data: bytes, names: list[str]) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=names, use_threads=False)  # one thread is the fastest here


# ---- The job ------------------------------------------------------------------------------------


class _Job:
    """Makes the tables of consecutive days below their staging folders, those of `made` by now."""

    def __init__(self) -> None:
        self.look = Look()
        self.made: dict[tuple[str, str], Rows] = {}  # by run_id and table

    def read(self, reference: Reference) -> Rows:
        """Returns what a table holds that an earlier day made, or an earlier one of this job."""
        name = reference.table.name
        if (reference.run_id, name) in self.made:
            return self.made[reference.run_id, name]
        paths = self.look.open(reference).paths
        return read(name, [_bytes_of(path) for path in paths])

    def upstream(self, planned: Planned) -> Tables:
        """Returns what the tables hold that the same day's stages have made."""
        return {
            table.name: read(table.name, [_bytes_of(path) for path in partition.paths])
            for stage in planned.stage.upstream
            for table, partition in zip(stage.tables, self.look.made(stage), strict=True)
        }

    def items(self, planned: PlannedScores) -> Tables:
        """Returns the embeddings and features of the day, or of the nights before that it names."""
        if planned.stage.upstream:
            return self.upstream(planned)
        found: dict[str, Rows] = {"item_embeddings": (), "item_features": ()}
        for reference in planned.stage.snapshots:
            found[reference.table.name] += self.read(reference)
        return found

    def write(self, planned: Planned, tables: Tables, counts: Mapping[str, int]) -> None:
        stage = planned.stage
        for table in stage.tables:
            rows = tables[table.name]
            self.made[stage.run_id, table.name] = rows
            folder, schema = staged_folder(stage, table), _schema(planned, table)
            columns = _AS_TABLE[table.name](rows)
            columns |= {name: columns["cluster_id"] for name in schema.names if name not in columns}
            filled = pa.table(columns, schema=schema)
            mine = dict(counts) if table is stage.tables[0] else {}
            if not partitions.finished(folder, stage.shards):
                partitions.write_part(folder, table, schema, filled, 0, stage.shards, mine)


def _bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _schema(planned: Planned, table: Table) -> pa.Schema:
    if table is schemas.ITEM_FEATURES or table is schemas.USER_SIMSCORES:
        return planned.schema  # type: ignore[attr-defined]
    return table.schema(pa.int64(), pa.int64(), dimension=EMBEDDING_DIM)


def _embed(job: _Job, planned: PlannedEmbed) -> None:
    roots = planned.settings.catalogue.image_roots
    catalogue = catalogue_rows(planned.catalogue)
    images = {item: image_of(roots[0], item) for item, has_image, _ in catalogue if has_image}
    before = job.read(planned.before.tables[0]) if planned.before else ()
    made = embedded(planned.stage.ds, catalogue, images, before)
    counts = {
        "catalogue_items": len(catalogue),
        "items_without_uri": sum(not has_image for _, has_image, _ in catalogue),
        "former_items": sum(left is not None for *_, left in made["item_embeddings"]),
    }
    job.write(planned, made, counts)


def _features(job: _Job, planned: PlannedFeatures) -> None:
    made = features(job.upstream(planned))
    rows = made["item_features"]
    counts = {"items": len(rows), "items_with_cluster": sum(row[3] > 0 for row in rows)}
    job.write(planned, made, counts)


def _histories(job: _Job, planned: PlannedHistories) -> None:
    log = log_rows(planned.log.log)
    made = histories(planned.stage.ds, log, _before(job, planned))
    counts = {"impressions": len(log), "users": len(made["user_histories"])}
    job.write(planned, made, counts)


def _before(job: _Job, planned: PlannedHistories | PlannedScores) -> Rows:
    """Returns the histories that a day goes on from, of the day before or of the log."""
    before, yesterday = planned.log.before, planned.stage.ds - dt.timedelta(days=1)
    if before.tables:
        return job.read(before.tables[0])
    logs = {source.form.ds: log_rows(source) for source in before.log}
    return histories_of_log(yesterday, logs)


def _scores(job: _Job, planned: PlannedScores) -> None:
    log = log_rows(planned.log.log)
    made = scores(log, job.items(planned), _before(job, planned))
    counts = {
        "impressions": len(log),
        "clicks": 0,
        "unknown_items": sum(number >= UNKNOWN_FROM for (number,) in log),
        "scored_impressions": len(log),
        "compared_impressions": 0,
        "moved_impressions": 0,
        "without_history": 0,
    }
    job.write(planned, made, counts)


_JOBS: dict[type[Planned], Callable[[_Job, Any], None]] = {
    PlannedEmbed: _embed,
    PlannedFeatures: _features,
    PlannedHistories: _histories,
    PlannedScores: _scores,
}


@contextlib.contextmanager
def stub_jobs() -> Iterator[None]:
    """Makes nights run these jobs in place of Beam's, during the block."""

    def stub(make: Callable[[_Job, Any], None]) -> classmethod:
        def wire(cls: type, root: Any, days: Sequence[Planned], folder: str) -> None:
            job = _Job()
            for planned in days:
                make(job, planned)

        return classmethod(wire)

    with pytest.MonkeyPatch.context() as patch:
        for kind, make in _JOBS.items():
            patch.setattr(kind, "wire", stub(make))
        patch.setattr(PlannedFeatures, "summarise", lambda self: {})
        patch.setattr(beam_options, "run_pipeline", lambda define, options: define(None))
        patch.setattr(progress, "watch", lambda *_: contextlib.nullcontext())
        for name in ("check_flags", "check_ready"):  # which take longer than a night of these
            patch.setattr(beam_options, name, lambda *_: None)
        yield


# ---- The shop's tables --------------------------------------------------------------------------


def catalogue_rows(source: Source) -> Rows:
    """Returns item, whether it has an image, and category of each row of a day's catalogue."""
    rows = _read_all(source, ["item_id", "image_uri", "category"])
    return tuple(sorted((item, uri is not None, category) for item, uri, category in rows))


def log_rows(source: Source) -> Rows:
    """Returns the numbers of the impressions of a day, each as a row."""
    times = _read_all(source, ["event_time"])
    return tuple(sorted((time.microsecond,) for (time,) in times))


def _read_all(source: Source, names: list[str]) -> list[tuple[Any, ...]]:
    found = [_read_parquet(_bytes_of(path), names) for path in source.paths]
    return [
        row
        for table in found
        for row in zip(*(table[name].to_pylist() for name in names), strict=True)
    ]


def image_of(root: str, item: int) -> str:
    """Returns what tells one image of an item from another."""
    return hashlib.sha256(_bytes_of(os.path.join(root, f"{item}.png"))).hexdigest()
