"""The life of a run: its identity, what of it is done already, and how its tables get published.

A *stage* makes one or more tables of one ds. Its `run_id` is a digest of inputs, settings and
versions, so the same work has the same id and is found again: published, staged, or begun. All
writing happens out of sight below `<root>/_staging`. Publishing then links files into place.

What a kill at any point leaves. First publication: nothing is visible before `_SUCCESS`. On
re-publication `_SUCCESS` goes first and returns last, and every file name carries the version, so
that a reader through the manifest, or one that reads `_SUCCESS` before and after, sees one version
whole, or "not ready", or a missing file, and never a mixture. The next run finishes the move.
Not covered: a bare glob during re-publication, and two machines publishing to one disk at once.
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
from feature_jobs.store.partitions import STAGED, Partition, version_of
from pipelines.config import STAGES, Settings
from pipelines.running.layout import staging_folder, table_folder

BEGUN = "made_from.json"  # of what is upstream; the first file of a staging folder
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
    """One job of one ds, planned: nothing of it has run yet.

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
        """Twelve hex digits: the same inputs, settings and versions give the same id."""
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
        return staging_folder(self.root, self.feature_set, self.name, self.ds, name)

    def folder(self, table: Table) -> str:
        """Where the table is published."""
        return table_folder(self.root, self.feature_set, table, self.ds)

    def is_published(self) -> bool:
        """Once forced it is not, until it has been made and published anew: a forced run that was
        killed may have published one of two tables that belong together."""
        return not files.exists(os.path.join(self._forced_staging, BEGUN)) and all(
            partitions.is_published(self.folder(t))
            and self._is_mine(partitions.open_published(self.folder(t)))
            for t in self.tables
        )

    def is_staged(self) -> bool:
        folders = [os.path.join(self.staging, t.name) for t in self.tables]
        return all(
            files.exists(os.path.join(f, STAGED)) and self._is_mine(partitions.open_staged(f))
            for f in folders
        )

    def _is_mine(self, partition: Partition) -> bool:
        """Whether it was made by this run, from what is upstream now. Images are in no run_id, so
        a stage that was made again may hold other content under the same one."""
        return (
            partition.run_id == self.run_id
            and all(stage.is_made() for stage in self.upstream)
            and partition.manifest["made_from"] == self.made_from()
        )

    def is_made(self) -> bool:
        return self.is_published() or self.is_staged()

    def made_from(self) -> dict[str, str]:
        """The versions of all tables upstream; raises InputNotReady where one is not made."""
        return {
            table.name: version_of(stage.partition(table).manifest)
            for stage in self.upstream
            for table in stage.tables
        }

    def shards_done(self) -> int:
        return min(
            len(files.list_names(os.path.join(self.staging, t.name, "receipts")))
            for t in self.tables
        )

    def partition(self, table: Table) -> Partition:
        """This run's table, published or still staged. Raises InputNotReady where it is neither."""
        if self.is_published():
            return partitions.open_published(self.folder(table))
        if self.is_staged():
            return partitions.open_staged(os.path.join(self.staging, table.name))
        raise InputNotReady(
            f"{table.name} of ds {self.ds} has not been made from the present inputs and settings "
            f"(run {self.run_id}). Run `courier {self.name} --ds {self.ds}`, or `courier refresh "
            f"--ds {self.ds}` for the whole night."
        )


# ---- Making --------------------------------------------------------------------------------


# ---- Publishing ------------------------------------------------------------------------------


# ---- The night's own record ------------------------------------------------------------------


@dataclass(frozen=True)
class Night:
    """The stages of one ds that were asked for, in order, and those they read from."""

    settings: Settings
    ds: dt.date
    stages: tuple[Stage, ...]
    upstream: tuple[Stage, ...]

    @property
    def is_whole(self) -> bool:
        return {stage.name for stage in self.stages} == set(STAGES)

    @property
    def run_id(self) -> str:
        return documents.digest([stage.run_id for stage in self.stages])[:12]

    def stage(self, name: str) -> Stage | None:
        """The one of that name that was asked for."""
        return next((stage for stage in self.stages if stage.name == name), None)
