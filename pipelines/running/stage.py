"""Describes a stage of one day: its identity, and what of it is done already.

A *stage* makes one or more tables of one ds. Its `run_id` is a digest of inputs, settings and
versions, so the same work has the same id and is found again: published, staged, or begun. All
writing happens out of sight below `<root>/_staging`, until `publishing` brings it before readers.
"""

import datetime as dt
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from typing import Any

from feature_jobs import __version__
from feature_jobs.schemas import (
    InputNotReady,
    Table,
)
from feature_jobs.store import documents, files, partitions
from feature_jobs.store.partitions import Partition, version_of
from pipelines.config import STAGES, Settings
from pipelines.running.layout import Place, place_of, staging_of

BEGUN = "made_from.json"  # of what is upstream; the first file of a staging folder
_PUBLISHING = "publishing.json"  # of a forced stage: its tables may be partly published
# The packages that decide which bytes are made.
PACKAGE_VERSIONS = {
    "courier": __version__,
    **{
        name: installed(name)
        for name in ("apache-beam", "numpy", "pillow", "pyarrow", "torch", "torchvision")
    },
}


@dataclass(frozen=True)
class Stage:
    """Describes one job of one ds, planned: nothing of it has run yet.

    `inputs` are what the work depends on, `identities` the artefacts it uses, `notes` what a reader
    of the manifest should know. A `forced` stage is made again although it is published (`force`).
    `define` wires the job below a pipeline root, once everything upstream is made: for this stage,
    the first of those it is given, and where they can be one job for those of the days after it,
    each of which has its `part`. `clean` frees what it left on this machine; `summarise` makes of
    what lies in the staging folder what else the manifests say of all shards together.
    """

    name: str
    ds: dt.date
    root: str
    feature_set: str
    tables: tuple[Table, ...]
    shards: int
    inputs: Mapping[str, Any]
    identities: Mapping[str, str]
    settings: Mapping[str, Any]
    define: Callable[[Any, Sequence["Stage"]], None]
    upstream: tuple["Stage", ...] = ()
    input_rows: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    clean: Callable[["Stage"], None] = lambda _: None
    summarise: Callable[[str], Mapping[str, Any]] = lambda _: {}
    forced: bool = False
    part: Any = None

    @property
    def run_id(self) -> str:
        """Returns twelve hex digits: the same inputs, settings and versions give the same id."""
        parts = [
            self.name, str(self.ds), [t.name for t in self.tables], dict(self.inputs),
            dict(self.identities), dict(self.settings), self.shards, PACKAGE_VERSIONS,
        ]  # fmt: skip
        return documents.digest(parts)[:12]

    @property
    def staging(self) -> str:
        return self._forced_staging if self.forced else self._staging(self.run_id)

    @property
    def _forced_staging(self) -> str:
        return self._staging(self.run_id + "-forced")

    def _staging(self, name: str) -> str:
        return staging_of(self.root, self.feature_set, self.tables[0], self.ds, name)

    def staged_folder(self, table: Table) -> str:
        """Returns the folder in which the table is made."""
        return os.path.join(self.staging, table.name)

    def note_publishing(self) -> None:
        """Notes that the tables of a forced stage begin to be published."""
        documents.write_json(os.path.join(self.staging, _PUBLISHING), {})

    def place(self, table: Table) -> Place:
        """Returns where the table is published, and where its earlier versions are kept."""
        return place_of(self.root, self.feature_set, table, self.ds)

    def folder(self, table: Table) -> str:
        """Returns the folder in which the table is published."""
        return self.place(table).folder

    def is_published(self) -> bool:
        """Returns whether its tables are published, made by this run from what is upstream now.

        A forced stage is not, until it has been made and published anew; nor is any while a forced
        run may have published one of two tables that belong together.
        """
        mark = BEGUN if self.forced else _PUBLISHING
        if files.exists(os.path.join(self._forced_staging, mark)):
            return False
        found = (partitions.find_published(self.folder(table)) for table in self.tables)
        return all(partition is not None and self._is_mine(partition) for partition in found)

    def is_staged(self) -> bool:
        """Returns whether its tables are made, but not published yet."""
        found = (partitions.find_staged(self.staged_folder(table)) for table in self.tables)
        return all(partition is not None and self._is_mine(partition) for partition in found)

    def _is_mine(self, partition: Partition) -> bool:
        """Returns whether it was made by this run, from what is upstream now.

        Images are in no run_id, so a stage that was made again may hold other content under the
        same one.
        """
        return (
            partition.run_id == self.run_id
            and all(stage.is_made() for stage in self.upstream)
            and partition.manifest["made_from"] == self.made_from()
        )

    def is_made(self) -> bool:
        """Returns whether its tables are published or staged."""
        return self.is_published() or self.is_staged()

    def made_from(self) -> dict[str, str]:
        """Returns the versions of all tables upstream; raises InputNotReady if one is not made."""
        return {
            table.name: version_of(stage.partition(table).manifest)
            for stage in self.upstream
            for table in stage.tables
        }

    def shards_done(self) -> int:
        """Returns how many shards are written whole, of all its tables."""
        return min(
            len(files.list_names(os.path.join(self.staging, t.name, "receipts")))
            for t in self.tables
        )

    def partition(self, table: Table) -> Partition:
        """Returns this run's table, published or staged; raises InputNotReady if it is neither."""
        if self.is_published():
            return partitions.open_published(self.folder(table))
        staged = partitions.find_staged(self.staged_folder(table))
        if staged and self.is_staged():
            return staged
        raise InputNotReady(
            f"{table.name} of ds {self.ds} has not been made from the present inputs and settings "
            f"(run {self.run_id}). Run `courier {self.name} --ds {self.ds}`, or `courier refresh "
            f"--ds {self.ds}` for the whole night."
        )


@dataclass(frozen=True)
class Night:
    """Holds the stages of one ds that were asked for, in order, and those they read from.

    `is_outdated` looks whether what is published of other days has changed since the plan was built
    on it; `again` plans all days anew that were planned together.
    """

    settings: Settings
    ds: dt.date
    stages: tuple[Stage, ...]
    upstream: tuple[Stage, ...]
    is_outdated: Callable[[], bool] = lambda: False
    again: Callable[[], Sequence["Night"]] = tuple

    @property
    def is_whole(self) -> bool:
        """Returns whether it consists of all stages of a night."""
        return {stage.name for stage in self.stages} == set(STAGES)

    @property
    def run_id(self) -> str:
        """Returns the id of all its stages together, twelve hex digits."""
        return documents.digest([stage.run_id for stage in self.stages])[:12]

    def stage(self, name: str) -> Stage | None:
        """Returns the stage of that name, None where it was not asked for."""
        return next((stage for stage in self.stages if stage.name == name), None)
