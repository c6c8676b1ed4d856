"""Publishes many days of all tables of a night without a job, for tests of what becomes of them.

Each table of a day has two small files; a night is told by one number, which its rows hold.
"""

import datetime as dt
import os
from collections.abc import Iterable, Sequence
from typing import Any

from feature_jobs.schemas import TABLES, Table
from feature_jobs.store import files, partitions
from feature_jobs.store.documents import to_json
from feature_jobs.store.partitions import MANIFEST
from pipelines import stages
from pipelines.config import Catalogue, Impressions, Retention, Settings
from pipelines.running import records, retention, rollback
from pipelines.running.layout import Layout
from pipelines.running.locks import Locks
from pipelines.running.publishing import publication
from pipelines.stages import kind_of
from tests.support.small_nights import stage_partition

FIRST = dt.date(2026, 3, 1)
WINDOW, LATE = 3, 1
OF_A_NIGHT = [table for kind in stages.NIGHT for table in kind.tables]


def day(number: int) -> dt.date:
    """Returns the day of a number, 1 for the first."""
    return FIRST + dt.timedelta(days=number - 1)


class SmallDays:
    """Is a feature set below a root, of which `retention` says what is kept."""

    def __init__(self, root: str, feature_set: str = "test", **keeps: Any):
        self.settings = Settings(
            root=root,
            feature_set=feature_set,
            window_days=WINDOW,
            late_days=LATE,
            catalogue=Catalogue(path="/shop/items", image_roots=("/shop/images",)),
            impressions=Impressions(path="/shop/{ds}"),
            retention=Retention(**keeps),
        )

    @property
    def layout(self) -> Layout:
        return self.settings.layout

    def publish(self, table: Table, number: int, value: int) -> None:
        """Publishes a table of a day."""
        place = self.layout.place(table, day(number))
        staging = self.layout.staging(kind_of(table), day(number), f"run-{value}")
        manifest = files.read_if_there(os.path.join(place.folder, MANIFEST))
        staged = os.path.join(staging, table.name)
        stage_partition(staged, [value] * 4, run_id=f"run-{value}", table=table)
        publication(staged, place, manifest, Locks()).run()
        files.delete_tree(os.path.dirname(staging))

    def night(self, number: int, value: int = 0, tables: Sequence[Table] = OF_A_NIGHT) -> None:
        """Publishes all tables of a night, then its record."""
        for table in tables:
            self.publish(table, number, value or number)
        self.record(number, tables)

    def record(self, number: int, tables: Sequence[Table] = OF_A_NIGHT) -> None:
        """Writes the record of what is published of a night."""
        ds, before = day(number), records.read_night(self.layout, day(number))
        parts = [partitions.open_published(self.layout.folder(table, ds)) for table in tables]
        record = records.night_record(self.layout, ds, parts, before)
        files.write_bytes(self.layout.night_path(ds), to_json(record))

    def nights(self, numbers: Iterable[int], *tables: Table) -> "SmallDays":
        """Publishes nights of all tables, or of some."""
        for number in numbers:
            self.night(number, tables=tables or OF_A_NIGHT)
        return self

    def roll_back(self, number: int) -> None:
        rollback.roll_back(self.settings, day(number), "a test", False, lambda _: None)

    def prune(self, hours: float = 0.0, dry_run: bool = False) -> retention.Pruned:
        """Prunes, so many hours from now."""
        now = dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)
        return retention.prune(self.settings, dry_run, lambda _: None, now)

    # -- What is there --

    def days(self, table: Table) -> list[int]:
        """Returns the numbers of the days of which a table is published."""
        return [(ds - FIRST).days + 1 for ds in self.layout.published_days(table)]

    def kept(self, table: Table, number: int) -> list[int]:
        """Returns the values of the earlier versions of a partition that are whole, ascending."""
        place = self.layout.place(table, day(number))
        found = []
        for name in files.list_names(place.kept):
            folder = os.path.join(place.kept, name)
            data = files.read_if_there(os.path.join(folder, MANIFEST))
            if data is None:
                continue
            manifest = partitions.parse_json(MANIFEST, data)
            if all(files.exists(os.path.join(folder, f["name"])) for f in manifest["files"]):
                found.append(manifest["values"][0])
        return sorted(found)

    def recorded(self, number: int) -> dict[str, Any]:
        found = records.read_night(self.layout, day(number))
        assert found
        return found

    def contents(self) -> dict[str, bytes]:
        """Returns all files below the root."""
        return {file.path: files.read_bytes(file.path) for file in files.below(self.settings.root)}


ALL_TABLES = list(TABLES.values())
