"""Joins samples to nights the slow, obviously right way: row by row, from what lies on disk.

Nothing of the code that is judged is used: nights are read by their records and manifests, clicks
from the shop's log. Numbers are those of the command to the bit, so that tables can be compared
whole: see `check_join`.
"""

import datetime as dt
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support import oracles

ALWAYS = -(2**63)  # in microseconds, before all moments
_TIME = pa.timestamp("us", tz="UTC")
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_US = dt.timedelta(microseconds=1)
_TYPES = {
    "feature_ds": pa.date32(), "has_night": pa.bool_(), "item_known": pa.bool_(),
    "has_image": pa.bool_(), "in_scope": pa.bool_(), "cluster_id": pa.int32(),
    "sim_scores": pa.list_(pa.float32()), "sim_mask": pa.list_(pa.int8()),
    "history_len": pa.int32(), "sim_known": pa.int32(), "sim_max": pa.float32(),
    "sim_mean": pa.float32(), "simtier": pa.list_(pa.int32()), "same_cluster": pa.int32(),
    "night_created": _TIME,
}  # fmt: skip


@dataclass(frozen=True)
class Law:
    """Holds the settings that a join goes by; times are in microseconds."""

    day_timezone: str = "UTC"
    history_len: int = 50
    window_us: int = 30 * 86_400_000_000
    click_delay_us: int = 0
    lag_us: int = 0
    late_us: int = 2 * 86_400_000_000
    keep_repeats: bool = False
    availability_delay_us: int = 6 * 3_600_000_000


class Names(NamedTuple):
    """Names the columns of samples."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    event_time: str = "event_time"


@dataclass(frozen=True)
class Options:
    """Holds the options of the command that change what comes out."""

    features_from: str = "previous"
    history_as_of: str = "moment"
    as_of: str = "day"
    created_timestamp: bool = False


@dataclass(frozen=True)
class PublishedNight:
    """Holds what is published of a night: rows of `item_features`, vectors, histories by user."""

    ds: dt.date
    created_us: int
    features: Mapping[Any, Mapping[str, Any]]
    vectors: Mapping[Any, np.ndarray]
    histories: Mapping[Any, list[Any]]


# ---- What lies on disk -------------------------------------------------------------------------


def read_nights(root: Path, feature_set: str) -> list[PublishedNight]:
    """Returns the nights that have a record below `root`."""
    return [_read_night(root, path) for path in (root / feature_set / "_nights").glob("ds=*.json")]


def _read_night(root: Path, path: Path) -> PublishedNight:
    record = json.loads(path.read_text())
    items, embedded, past = (
        _read_table(root / record["tables"][name]["path"])
        for name in ("item_features", "item_embeddings", "user_histories")
    )
    created = dt.datetime.fromisoformat(record["published_at"])
    return PublishedNight(
        dt.date.fromisoformat(record["ds"]),
        (created - _EPOCH) // _US,
        {row["item_id"]: row for row in items},
        {row["item_id"]: np.array(row["embedding"], np.float32) for row in embedded},
        {row["user_id"]: row["item_ids"] for row in past},
    )


def _read_table(folder: Path) -> list[dict[str, Any]]:
    manifest = json.loads((folder / "_manifest.json").read_text())
    rows: list[dict[str, Any]] = []
    for file in manifest["files"]:
        rows += pq.ParquetFile(folder / file["name"]).read().to_pylist()
    return rows


def read_clicks(
    log: Mapping[dt.date, Iterable[Path]], law: Law
) -> dict[dt.date, list[oracles.Click]]:
    """Returns the clicks of the shop's log by the day that logged them; `log` are its files."""
    return {day: [c for path in paths for c in _clicks_in(path, law)] for day, paths in log.items()}


def _clicks_in(path: Path, law: Law) -> list[oracles.Click]:
    rows = pq.ParquetFile(path).read()
    moments = {
        name: rows[name].cast(pa.int64()).to_pylist() if name in rows.column_names else None
        for name in ("event_time", "click_time")
    }
    missing = [None] * len(rows)
    listed = [
        {"user": user, "item": item, "event_time": event, "click_time": click, "clicked": clicked}
        for user, item, event, click, clicked in zip(
            rows["user_id"].to_pylist(), rows["item_id"].to_pylist(), moments["event_time"] or (),
            moments["click_time"] or missing, rows["clicked"].to_pylist(), strict=True,
        )
    ]  # fmt: skip
    return oracles.clicks_of(listed, law.click_delay_us)


# ---- Moments -----------------------------------------------------------------------------------


def midnight(day: dt.date, timezone: str) -> int:
    """Returns the first moment of a day, in microseconds since 1970."""
    first = dt.datetime.combine(day, dt.time(), ZoneInfo(timezone))
    return (first.astimezone(dt.UTC) - _EPOCH) // _US


def available_from(night: PublishedNight, law: Law, options: Options) -> int:
    """Returns the first moment that may know a night; that of its own day is always known."""
    end = midnight(night.ds + dt.timedelta(days=1), law.day_timezone)
    if options.as_of == "created":
        is_own = options.features_from == "same"
        return night.created_us if is_own else max(night.created_us, end)
    if options.features_from == "same":
        return ALWAYS
    return end + law.availability_delay_us


def night_of(
    moment: int, nights: Iterable[PublishedNight], law: Law, options: Options
) -> PublishedNight | None:
    """Returns the newest night that a moment may know, None for none."""
    best = None
    for night in nights:
        if available_from(night, law, options) <= moment and (best is None or night.ds > best.ds):
            best = night
    return best


# ---- The join ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlowJoin:
    """Joins the samples of `ds` to `nights`; `clicks` are by the day that logged them.

    With features from "same" all samples, late ones too, may know the night of `ds` and no other:
    as `user_simscores` of ds does.
    """

    ds: dt.date
    nights: list[PublishedNight]
    clicks: Mapping[dt.date, list[oracles.Click]]
    labels: tuple[str, ...]
    law: Law
    options: Options

    def of(self, samples: pa.Table, names: Names) -> pa.Table:
        """Returns `samples` with the columns of the join."""
        # A night's histories are as of the end of its day: of the sample's own day, of its future.
        assert (self.options.features_from, self.options.history_as_of) != ("same", "night")
        moments = samples[names.event_time].cast(_TIME, safe=False).cast(pa.int64())
        columns = (samples[names.user_id], samples[names.item_id], moments)
        rows = [
            self.row(user, item, moment)
            for user, item, moment in zip(*(c.to_pylist() for c in columns), strict=True)
        ]
        for name in self.names:
            values = pa.array([row[name] for row in rows], _TYPES.get(name, pa.int32()))
            samples = samples.append_column(name, values)
        return samples

    @property
    def known(self) -> list[PublishedNight]:
        """Returns the nights among which the newest is looked for."""
        is_same = self.options.features_from == "same"
        return [night for night in self.nights if night.ds == self.ds or not is_same]

    @property
    def names(self) -> list[str]:
        """Returns the names of the columns that come after those of the samples."""
        found = [name for name in _TYPES if name != "night_created"]
        at = found.index("cluster_id") + 1
        found[at:at] = [f"cluster_{label}" for label in self.labels]
        return [*found, *(["night_created"] if self.options.created_timestamp else [])]

    def row(self, user: Any, item: Any, moment: int) -> dict[str, Any]:
        """Returns what a sample is joined to."""
        night = night_of(moment, self.known, self.law, self.options)
        mine = night.features.get(item) if night else None
        made: dict[str, Any] = {
            "feature_ds": night and night.ds,
            "has_night": night is not None,
            "night_created": night and night.created_us,
            "item_known": mine is not None,
        }
        for name in ("has_image", "in_scope"):
            made[name] = bool(mine and mine[name])
        for name in ("cluster_id", *(f"cluster_{label}" for label in self.labels)):
            made[name] = mine[name] if mine else 0
        past = self.history(user, moment, night)
        return {**made, **self.scores(item, past, night)}

    def history(self, user: Any, moment: int, night: PublishedNight | None) -> list[Any]:
        """Returns the items of a user's history, newest first."""
        law = self.law
        if self.options.history_as_of == "night":
            return night.histories.get(user, [])[: law.history_len] if night else []
        if moment < midnight(self.ds, law.day_timezone) - law.late_us:
            return []
        known = [click for day, logged in self.clicks.items() if day <= self.ds for click in logged]
        return oracles.history(
            known, user, moment, law.history_len, law.window_us, law.lag_us, law.keep_repeats
        )

    def scores(self, item: Any, past: list[Any], night: PublishedNight | None) -> dict[str, Any]:
        """Returns the columns that are made of scores."""
        features = night.features if night else {}
        cluster = {other: row["cluster_id"] for other, row in features.items()}
        scores, mask = [0.0] * self.law.history_len, [0] * self.law.history_len
        same = 0
        for place, other in enumerate(past):
            same += cluster.get(item, 0) > 0 and cluster[item] == cluster.get(other, 0)
            if night and _has_score(item, features) and _has_score(other, features):
                scores[place] = _cosine(night.vectors[item], night.vectors[other])
                mask[place] = 1
        real = [score for score, known in zip(scores, mask, strict=True) if known]
        return {
            "sim_scores": scores,
            "sim_mask": mask,
            "history_len": len(past),
            "sim_known": len(real),
            "sim_max": max(real, default=0.0),
            "sim_mean": sum(round(score * 2**30) for score in real) / 2**30 / (len(real) or 1),
            "simtier": oracles.tiers(scores, mask),
            "same_cluster": same,
        }


def _has_score(item: Any, features: Mapping[Any, Mapping[str, Any]]) -> bool:
    return item in features and features[item]["has_image"] and features[item]["in_scope"]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the product of two unit vectors in steps of 2^-26, as a float32 has it."""
    steps = [np.rint(vector.astype(np.float64) * 2**26) / 2**26 for vector in (one, other)]
    exact = math.fsum((steps[0] * steps[1]).tolist())
    return float(np.clip(np.float32(exact), -1, 1))


# ---- Comparing ---------------------------------------------------------------------------------


def check_join(found: pa.Table, expected: pa.Table) -> None:
    """Asserts that two tables have the same columns in the same order, and the same rows."""
    assert found.column_names == expected.column_names
    for name in expected.column_names:
        assert found[name].type == expected[name].type, name
    assert len(found) == len(expected)
    for at, (one, other) in enumerate(zip(found.to_pylist(), expected.to_pylist(), strict=True)):
        differ = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
        assert not differ, f"row {at} differs; found and expected are {differ}"
