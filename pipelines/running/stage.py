"""Describes a stage of one day as data: what it reads, makes and depends on.

A *stage* makes one or more tables of one ds. Its `run_id` is a digest of inputs, settings and
artefacts, so the same work has the same id and is found again: published, staged, or begun
(`states`). Versions of packages are noted and do not decide. All writing happens out of sight below
`<root>/_staging`, until `publishing` brings it before readers.
"""

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from feature_jobs.schemas import Table
from feature_jobs.store import documents
from pipelines.running.layout import Layout, Place
from pipelines.stages import Kind


@dataclass(frozen=True)
class Reference:
    """Names a table of an earlier day as one run made it; as its `stage` does, where it is planned.

    It is published in `folder`, or will be.
    """

    table: Table
    ds: dt.date
    run_id: str
    folder: str
    stage: "Stage | None" = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Stage:
    """Describes what is to be made of one ds.

    `inputs` are what the work depends on, `identities` the artefacts it uses, `notes` what a reader
    of the manifest should know. `upstream` are stages of the same ds, `before` the tables of an
    earlier day that it goes on from, by name, `snapshots` those of nights before it that it reads
    as they are now. A `forced` stage is made again although it is published, for the reason
    `forced_by`. One that `follows` counts as published only where it was made from the content that
    `before` has now: images are in no run_id, so that the id alone does not tell.
    """

    kind: Kind
    ds: dt.date
    layout: Layout
    shards: int
    inputs: Mapping[str, Any]
    identities: Mapping[str, str]
    settings: Mapping[str, Any]
    upstream: tuple["Stage", ...] = ()
    before: tuple[Reference, ...] = ()
    snapshots: tuple[Reference, ...] = ()
    input_rows: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    forced_by: str = ""
    follows: bool = False

    @cached_property
    def run_id(self) -> str:
        """Returns twelve hex digits: the same inputs, settings and artefacts give the same id."""
        parts = [
            self.name, str(self.ds), [t.name for t in self.tables], dict(self.inputs),
            dict(self.identities), dict(self.settings), self.shards,
        ]  # fmt: skip
        return documents.digest(parts)[:12]

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def tables(self) -> tuple[Table, ...]:
        return self.kind.tables

    @property
    def forced(self) -> bool:
        return bool(self.forced_by)

    def as_json(self) -> dict[str, Any]:
        """Returns all that it says, as a JSON document holds it."""
        return {
            "stage": self.name,
            "ds": str(self.ds),
            "run_id": self.run_id,
            "tables": [self.folder(table) for table in self.tables],
            "shards": self.shards,
            "input_rows": self.input_rows,
            "inputs": dict(self.inputs),
            "identities": dict(self.identities),
            "settings": dict(self.settings),
            "upstream": {stage.name: stage.run_id for stage in self.upstream},
            "before": {str(one.ds): one.run_id for one in self.before},
            "notes": dict(self.notes),
        }

    # -- Where it lies --

    @cached_property
    def staging(self) -> str:
        return self.forced_staging if self.forced else self._staging(self.run_id)

    @cached_property
    def forced_staging(self) -> str:
        """Returns the staging folder of the same run where it is forced."""
        return self._staging(self.run_id + "-forced")

    def _staging(self, name: str) -> str:
        return self.layout.staging(self.kind, self.ds, name)

    def place(self, table: Table) -> Place:
        """Returns where the table is published, and where its earlier versions are kept."""
        return self._places[table.name]

    @cached_property
    def _places(self) -> dict[str, Place]:
        return {table.name: self.layout.place(table, self.ds) for table in self.tables}

    def folder(self, table: Table) -> str:
        """Returns the folder in which the table is published."""
        return self.place(table).folder

    def references(self) -> tuple[Reference, ...]:
        """Returns what names its tables to a stage that reads them."""
        return tuple(
            Reference(table, self.ds, self.run_id, self.folder(table), self)
            for table in self.tables
        )


class Planned(ABC):
    """Holds a stage with what its job must know of the day: a class for each kind of stage."""

    stage: Stage

    @property
    def id_types(self) -> tuple[pa.DataType, ...] | None:
        """Returns the types of the IDs in its first table; None where no file tells them."""
        return None

    def continues(self, earlier: "Planned") -> bool:
        """Returns whether it can be one job with the stage of the day before it."""
        return True

    @classmethod
    @abstractmethod
    def wire(cls, root: Any, days: Sequence[Self], folder: str) -> None:
        """Defines the one job of all `days` below a pipeline root; `folder` is that attempt's own.

        All that the stages read of others is made by then.
        """

    def all_is_told(self) -> bool:
        """Returns whether all that `summarise` reads of workers is there, but for receipts."""
        return True

    def came_in(self) -> Mapping[str, int]:
        """Returns what the job read, by the names under which its parts count what reached them.

        Nothing, but for those whose tables would look whole if rows were lost on the way.
        """
        return {}

    @property
    def images(self) -> int:
        """Returns at how many images it looks, as far as footers tell them: 0, but for EMBED."""
        return 0

    @property
    def items_known(self) -> int | None:
        """Returns how many items the day had whose embeddings it takes over; None for no such."""
        return None

    def copies(self, folder: str) -> Sequence[str]:
        """Names, by their keys, the copies that an attempt's job left on this machine.

        The attempts at a job, each with a `folder`, share them. None, unless a kind says so.
        """
        return ()

    def summarise(self) -> Mapping[str, Any]:
        """Returns what else the manifests say of all shards together, once they are made."""
        return {}
