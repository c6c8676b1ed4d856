"""Finds the published nights that samples of a day may know, and since when each is available."""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from feature_jobs import inputs
from feature_jobs.impressions import layouts
from feature_jobs.impressions.ctr_join import JoinNight
from feature_jobs.impressions.snapshots import Snapshot, after_its_day, always, night_at
from feature_jobs.items.item_vectors import ItemTables, broadcast_bytes
from feature_jobs.schemas import ITEM_EMBEDDINGS, USER_HISTORIES, InputNotReady, Table
from feature_jobs.schemas import ITEM_FEATURES as FEATURES_TABLE
from feature_jobs.store import documents
from feature_jobs.store.encoder_info import dimension_of
from feature_jobs.store.partitions import Partition
from pipelines.config import Settings
from pipelines.running import records
from pipelines.running.states import Look

_AT_ONCE = 16


@dataclass(frozen=True)
class JoinAsked:
    """Holds what is asked of a training set.

    `samples` is the template of their paths, `columns` maps user_id, item_id and event_time to
    theirs, and `label` names their column of labels, None for none. `features_from` says whether a
    sample takes the newest night that is available at its moment ("previous") or that of its own ds
    ("same"); `as_of` since when a night is: a delay after its day, or since it was really
    published. Its history is that of its moment, or of its night. With `created_timestamp` the set
    says when nights were published, with `mixed_encoders` its scores may be of several encoders.
    The `layout` is that of a framework, or plain.
    """

    name: str
    samples: str
    columns: Mapping[str, str]
    input_timezone: str | None = None
    label: str | None = None
    features_from: Literal["previous", "same"] = "previous"
    history_as_of: Literal["moment", "night"] = "moment"
    as_of: Literal["day", "created"] = "day"
    created_timestamp: bool = False
    layout: str = layouts.PLAIN
    mixed_encoders: bool = False


@dataclass(frozen=True)
class NightThere:
    """Holds a published night that samples may know: since when, and its tables."""

    snapshot: Snapshot
    created: dt.datetime | None
    features: Partition
    embeddings: Partition
    histories: Partition | None = None

    @property
    def codebook(self) -> tuple[str, tuple[str, ...]]:
        """Returns the id of its codebook, and those of the ancestors."""
        manifest = self.features.manifest
        return manifest["identities"]["codebook_id"], tuple(manifest["settings"]["ancestors"])

    @property
    def encoder_id(self) -> str:
        return str(self.features.manifest["identities"]["encoder_id"])

    @property
    def max_ids(self) -> dict[str, int]:
        """Returns the highest cluster number by label."""
        return dict(self.features.manifest["settings"]["max_id"])

    @property
    def dimension(self) -> int:
        """Returns the dimension of its embeddings."""
        return dimension_of(self.embeddings.manifest["settings"])

    @property
    def copied_bytes(self) -> int:
        """Returns about how many bytes a worker's copy of its items takes."""
        return broadcast_bytes(self.features.rows, self.dimension)

    def as_input(self) -> dict[str, Any]:
        """Returns what the id of a run changes with that takes features of it."""
        tables = {"item_features": self.features, "item_embeddings": self.embeddings}
        if self.histories:
            tables["user_histories"] = self.histories
        versions = {name: partition.version for name, partition in tables.items()}
        return {"ds": str(self.snapshot.ds), "from_us": self.snapshot.from_us, **versions}

    @property
    def version(self) -> str:
        """Names what is taken of it."""
        return documents.digest([self.features.version, self.embeddings.version])[:16]

    def key(self, folder: str) -> str:
        """Names the machine's copies of its items that the job in `folder` makes: no other does."""
        return documents.digest([self.version, folder])[:16]

    def as_worker_knows_it(
        self, labels: Sequence[str], embedding_dtype: Literal["float32", "float16"], folder: str
    ) -> JoinNight:
        """Returns the night as the workers know it, with cluster IDs of `labels` for scores."""
        tables = self.features.slim(), self.embeddings.slim()
        return JoinNight(
            self.snapshot,
            int(self.created.timestamp() * 1_000_000) if self.created else None,
            ItemTables(*tables, None, False, self.dimension, tuple(labels), embedding_dtype),
            self.histories.slim() if self.histories else None,
            self.key(folder),
        )


@dataclass(frozen=True)
class _Recorded:
    """Is a night as its record says: since when samples may know it, and when it was published."""

    snapshot: Snapshot
    created: dt.datetime | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Nights:
    """Finds the nights that are published, as `asked` takes them, for all days of a command.

    `look` reads manifests, and `say` is told of nights that cannot be taken. What records say is
    read once.
    """

    settings: Settings
    asked: JoinAsked
    look: Look
    say: Callable[[str], None]
    _read: dict[dt.date, _Recorded | None] = field(default_factory=dict, init=False)

    def of(self, ds: dt.date, earliest_us: int) -> tuple[NightThere, ...]:
        """Returns the nights that samples of ds may know, the earliest of which is of that moment.

        Raises InputNotReady where one of them is being published just now.
        """
        end_us = inputs.day_end(ds, self.settings.day_timezone)
        needed = _needed(self._known(ds, earliest_us), earliest_us, end_us)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return tuple(pool.map(self._open, needed))

    def first(self) -> list[NightThere]:
        """Returns the first night that is there, alone; nothing where there is none."""
        first = next(filter(None, map(self._recorded, self._days)), None)
        return [self._open(first)] if first else []

    def _known(self, ds: dt.date, earliest_us: int) -> list[_Recorded]:
        """Returns the nights that a sample of ds may know by what records say, and maybe more."""
        is_same = self.asked.features_from == "same"
        days = [day for day in self._days if (day == ds if is_same else day < ds)]
        if self.asked.as_of == "created":  # an older one may have come late
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                return [one for one in pool.map(self._recorded, days) if one]
        found = list[_Recorded]()
        for one in filter(None, map(self._recorded, reversed(days))):
            found.append(one)
            if one.snapshot.from_us <= earliest_us:
                break
        return found

    @cached_property
    def _days(self) -> list[dt.date]:
        return self.settings.layout.recorded_days()

    def _recorded(self, ds: dt.date) -> _Recorded | None:
        if ds not in self._read:
            self._read[ds] = self._read_record(ds)
        return self._read[ds]

    def _read_record(self, ds: dt.date) -> _Recorded | None:
        """Returns what the record of a night says; None for one without features as asked."""
        record = records.read_night(self.settings.layout, ds)
        if record is None:
            return None
        if lacking := [one.name for one in self._tables if one.name not in record["tables"]]:
            self.say(f"WARNING: the night of ds {ds} has no {lacking[0]}: an older one is taken")
            return None
        created = record["published_at"] and dt.datetime.fromisoformat(record["published_at"])
        snapshot = self._snapshot(ds, created)
        return None if snapshot is None else _Recorded(snapshot, created, record)

    @property
    def _tables(self) -> list[Table]:
        histories = [USER_HISTORIES] if self.asked.history_as_of == "night" else []
        return [FEATURES_TABLE, ITEM_EMBEDDINGS, *histories]

    def _open(self, night: _Recorded) -> NightThere:
        ds, found = night.snapshot.ds, list[Partition]()
        for table in self._tables:
            there = self.look.published(self.settings.layout.folder(table, ds))
            version = night.record["tables"][table.name]["version"]
            if there is None or not (there.version == version or table.shared):
                raise InputNotReady(
                    f"{table.name} of ds {ds}, which samples are joined with, is not what the "
                    "night's record names: the night is being published just now, or was when a "
                    f"run died. Run this command again when it is there; `courier refresh --ds {ds}"
                    "` ends it."
                )
            found.append(there)
        features, embeddings, *histories = found
        return NightThere(night.snapshot, night.created, features, embeddings, *histories)

    def _snapshot(self, ds: dt.date, created: dt.datetime | None) -> Snapshot | None:
        if self.asked.as_of == "created":
            if created is None:
                self.say(f"WARNING: nobody noted when the night of ds {ds} was published")
                return None
            from_us = int(created.timestamp() * 1_000_000)
            if self.asked.features_from == "previous":  # its histories are of the end of its day
                from_us = max(from_us, inputs.day_end(ds, self.settings.day_timezone))
            return Snapshot(ds, from_us)
        if self.asked.features_from == "same":
            return always(ds)
        delay = round(self.settings.availability_delay_hours * 3_600_000_000)
        return after_its_day(ds, self.settings.day_timezone, delay)


def _needed(nights: Sequence[_Recorded], earliest_us: int, end_us: int) -> list[_Recorded]:
    """Returns those of the nights that a moment from the earliest to the end of the day takes.

    They are in the order of their days.
    """
    snapshots = [night.snapshot for night in nights]
    moments = [earliest_us, *(s.from_us for s in snapshots if earliest_us < s.from_us < end_us)]
    taken = set(night_at(np.array(moments, np.int64), snapshots).tolist())
    kept = [night for at, night in enumerate(nights) if at in taken]
    return sorted(kept, key=lambda night: night.snapshot.ds)
