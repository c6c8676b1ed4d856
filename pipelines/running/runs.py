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

import contextlib
import datetime as dt
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from typing import Any

from feature_jobs import __version__
from feature_jobs.schemas import (
    CourierError,
    InputNotReady,
    Table,
)
from feature_jobs.store import files, tables
from feature_jobs.store.tables import MANIFEST, STAGED, SUCCESS, Partition

KEPT = "_versions"
_LATER = ", or within five minutes where that was killed on another machine"
_BEGUN = "made_from.json"  # of what is upstream; the first file of a staging folder
_OF_RECEIPT = ("counts", "work")  # what no manifest says of a single file
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
        return tables.digest(parts)[:12]

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
        return not files.exists(os.path.join(self._forced_staging, _BEGUN)) and all(
            tables.is_published(self.folder(t))
            and self._is_mine(tables.open_published(self.folder(t)))
            for t in self.tables
        )

    def is_staged(self) -> bool:
        folders = [os.path.join(self.staging, t.name) for t in self.tables]
        return all(
            files.exists(os.path.join(f, STAGED)) and self._is_mine(tables.open_staged(f))
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
            return tables.open_published(self.folder(table))
        if self.is_staged():
            return tables.open_staged(os.path.join(self.staging, table.name))
        raise InputNotReady(
            f"{table.name} of ds {self.ds} has not been made from the present inputs and settings "
            f"(run {self.run_id}). Run `courier {self.name} --ds {self.ds}`, or `courier refresh "
            f"--ds {self.ds}` for the whole night."
        )


def staging_folder(root: str, feature_set: str, name: str, ds: dt.date, run_id: str) -> str:
    """Out of readers' sight; apart for each feature set, so that they never meet half-way."""
    return os.path.join(root, "_staging", feature_set, name, f"ds={ds}", run_id)


def table_folder(root: str, feature_set: str, table: Table, ds: dt.date) -> str:
    """The folder of one partition: below `shared` for a table that no encoder touches."""
    return os.path.join(root, "shared" if table.shared else feature_set, table.name, f"ds={ds}")


def _date_of(name: str) -> dt.date | None:
    """The date in a folder's name ds=YYYY-MM-DD; None for a folder that is none of ours."""
    try:
        return dt.date.fromisoformat(name.removeprefix("ds="))
    except ValueError:
        return None


def feature_sets(root: str) -> list[str]:
    """The feature sets that have published a night below `root`."""
    names = [name for name in files.list_names(root) if name[0] != "_"]
    return [n for n in names if files.list_names(os.path.join(root, n, "_nights"))]


def begun_days(root: str, feature_set: str, table: Table) -> list[dt.date]:
    """The ds that have a folder, published or not, ascending."""
    folder = os.path.dirname(table_folder(root, feature_set, table, dt.date.min))
    names = [name for name in files.list_names(folder) if name.startswith("ds=")]
    return [day for day in map(_date_of, names) if day]


def published_days(root: str, feature_set: str, table: Table) -> list[dt.date]:
    """The ds of all published partitions of a table, ascending."""
    days = begun_days(root, feature_set, table)
    return [d for d in days if tables.is_published(table_folder(root, feature_set, table, d))]


def latest_before(
    root: str, feature_set: str, wanted: Sequence[Table], ds: dt.date
) -> tuple[Partition, ...]:
    """The partitions of the newest day before ds that has all of the `wanted` tables, since those
    of several days do not go together; empty where the world begins."""
    for day in reversed(begun_days(root, feature_set, wanted[0])):
        folders = [table_folder(root, feature_set, table, day) for table in wanted]
        if day < ds and all(map(tables.is_published, folders)):
            return tuple(map(tables.open_published, folders))
    return ()


@contextlib.contextmanager
def exclusive(root: str, feature_set: str) -> Iterator[None]:
    """Holds a feature set; raises CourierError at once where another run holds it."""
    try:
        with files.lock(os.path.join(root, feature_set)):
            yield
    except BlockingIOError as error:
        raise CourierError(
            f"Another run is writing the feature set {feature_set!r} below {root}. Two at once "
            "would do the same work twice and publish over each other. Wait for it, or stop it: "
            f"its lock is freed when its process ends{_LATER if files.is_remote(root) else ''}."
        ) from error


# ---- Making --------------------------------------------------------------------------------


def make(stages: Sequence[Stage], run_pipeline: Callable[[Callable[[Any], None]], None]) -> None:
    """Runs one job for stages of consecutive days below their staging folders, and seals the
    tables it made.

    Raises a worker's CourierError word for word; nothing is published in any case.
    """
    for stage in stages:
        _forget_other_content(stage)
    first = stages[0]
    try:
        run_job(lambda root: first.define(root, stages), first.staging, run_pipeline)
    finally:
        for stage in stages:
            stage.clean(stage)
    for stage in stages:
        for table in stage.tables:
            seal(stage, table)


def run_job(
    define: Callable[[Any], None],
    staging: str,
    run_pipeline: Callable[[Callable[[Any], None]], None],
) -> None:
    """Runs the job that `define` wires to write below `staging`.

    Raises a worker's CourierError word for word.
    """
    files.delete_tree(os.path.join(staging, "errors"))
    try:
        run_pipeline(define)
    except Exception as error:
        if found := _told(staging, error):
            raise found from error
        raise
    if errors := tables.refused(staging):
        raise errors[0]


def _told(staging: str, error: Exception) -> CourierError | None:
    """The CourierError that a job ended for: what is left of it where no worker could leave it, as
    when the store of the staging folder was away too, or else one that was left before."""
    if found := tables.courier_error_in(error):
        return found
    with contextlib.suppress(OSError, CourierError):
        return next(iter(tables.refused(staging)), None)
    return None


def force(stage: Stage) -> None:
    """From now on, by the first file of its staging folder, the stage counts as unpublished. What a
    forced run that was killed had done stays."""
    _forget_other_content(stage)


def _forget_other_content(stage: Stage) -> None:
    """Deletes what was begun from another content of the tables upstream."""
    path = os.path.join(stage.staging, _BEGUN)
    now = stage.made_from()
    if not files.exists(path) or tables.read_json(path) != now:
        files.delete_tree(stage.staging)
        tables.write_json(path, now)


def seal(stage: Stage, table: Table) -> None:
    """Writes what a manifest will say beside the parts, after every shard has its receipt."""
    folder = os.path.join(stage.staging, table.name)
    parts = tables.receipts(folder)
    if len(parts) != stage.shards:
        raise CourierError(
            f"{table.name} of ds {stage.ds} has {len(parts)} of {stage.shards} parts although its "
            f"job ended well ({folder}). The table would lack rows. Run the command again; if it "
            "happens again, delete that folder."
        )
    manifest = {
        "table": table.name,
        "ds": str(stage.ds),
        "feature_set": None if table.shared else stage.feature_set,
        "run_id": stage.run_id,
        "files": [{k: v for k, v in part.items() if k not in _OF_RECEIPT} for part in parts],
        "rows": sum(part["rows"] for part in parts),
        "counts": tables.sum_counts(parts),
        "identities": dict(stage.identities),
        "inputs": dict(stage.inputs),
        "made_from": stage.made_from(),
        "settings": dict(stage.settings),
        "notes": dict(stage.notes),
        "versions": PACKAGE_VERSIONS,
        **stage.summarise(stage.staging),
    }
    tables.write_json(os.path.join(folder, STAGED), manifest)


def counts_of(stage: Stage) -> dict[str, int]:
    """Counts and rows of all tables that the stage made."""
    manifests = {table.name: stage.partition(table).manifest for table in stage.tables}
    counts = {f"{name}_rows": m["rows"] for name, m in manifests.items()}
    for manifest in manifests.values():
        counts.update(manifest["counts"])
    return counts


def clusters_of(*stages: Stage) -> dict[str, Any]:
    """How the items spread over clusters, by resolution; empty where no stage assigns any."""
    manifests = [stage.partition(table).manifest for stage in stages for table in stage.tables]
    found = [manifest.get("clusters", {}) for manifest in manifests]
    return {label: entry for clusters in found for label, entry in clusters.items()}


def work_of(stage: Stage) -> dict[str, float]:
    """What making the stage's tables cost, interrupted runs included; empty once published."""
    receipts = [tables.receipts(os.path.join(stage.staging, t.name)) for t in stage.tables]
    return tables.sum_counts((part for parts in receipts for part in parts), "work")


def reopen(stage: Stage) -> None:
    """Undoes the sealing of a stage whose tables were refused, so that the next run makes them
    again. What was expensive, the chunk files, stays."""
    for table in stage.tables:
        files.delete_tree(os.path.join(stage.staging, table.name))


# ---- Publishing ------------------------------------------------------------------------------


def publish(stage: Stage) -> None:
    """Publishes all tables of a staged stage, then deletes its staging.

    A stage that is published already is left alone.
    """
    if not stage.is_published():
        for table in stage.tables:
            staged = tables.open_staged(os.path.join(stage.staging, table.name))
            publish_partition(staged, stage.folder(table))
    files.delete_tree(os.path.dirname(stage.staging))  # and what other runs of ds left behind


def version_of(manifest: Mapping[str, Any]) -> str:
    """The version of a partition, published or yet to be: a digest of all that a manifest says."""
    return str(manifest.get("version") or tables.digest(dict(manifest))[:12])


def versioned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its version, a digest of all content, in it and in every file's name."""
    version = version_of(manifest)
    files = [
        {**file, "name": file["name"].removesuffix(".parquet") + f"-{version}.parquet"}
        for file in manifest["files"]
    ]
    return {**manifest, "files": files, "version": version}


def publish_partition(staged: Partition, target: str) -> None:
    """Publishes a staged partition at `target`, in place of what is published there.

    Can be killed and called again at any point: every step is skipped where it is done, and the
    staged files stay readable until the caller deletes them.
    """
    manifest = versioned(staged.manifest)
    sources = dict(zip([f["name"] for f in manifest["files"]], staged.paths, strict=True))
    replace_partition(manifest, sources, target)


def has_version(target: str, version: str) -> bool:
    """Whether `version` is the published one, or is kept beside it."""
    current = _current(target)
    kept = os.path.join(target, KEPT, version, MANIFEST)
    return files.exists(kept) or (current is not None and json.loads(current)["version"] == version)


def bring_back(target: str, version: str) -> None:
    """Publishes a kept version of a partition again; the present one is kept in its place.

    Can be killed and called again at any point, like `publish_partition`.
    """
    kept = os.path.join(target, KEPT, version)
    path = os.path.join(kept, MANIFEST)
    manifest = tables.read_json(path if files.exists(path) else os.path.join(target, MANIFEST))
    sources = {f["name"]: os.path.join(kept, f["name"]) for f in manifest["files"]}
    replace_partition(manifest, sources, target)


def _current(target: str) -> bytes | None:
    path = os.path.join(target, MANIFEST)
    return files.read_bytes(path) if files.exists(path) else None


def replace_partition(manifest: dict[str, Any], sources: Mapping[str, str], target: str) -> None:
    """Makes `manifest` the published version of `target`; `sources` are its files by name."""
    current = _current(target)
    old = json.loads(current) if current else None
    resumed = old is not None and old["version"] == manifest["version"]
    if resumed and tables.is_published(target):
        return
    files.delete(os.path.join(target, SUCCESS))
    if old is not None and not resumed and current is not None:
        kept = os.path.join(target, KEPT, old["version"], MANIFEST)
        files.write_bytes(kept, current)
    for name, source in sources.items():
        path = os.path.join(target, name)
        if not files.exists(path):
            files.link(source, path)
    if resumed:
        data = current or b""
    else:
        parent = old["version"] if old else None
        data = json.dumps({**manifest, "parent_version": parent}, indent=1).encode() + b"\n"
        try:
            files.write_if_unchanged(os.path.join(target, MANIFEST), data, current)
        except files.Changed as error:
            raise CourierError(
                f"Another run published {target} just now, so this one stopped before it could mix "
                "the two. Run the same command again when the other has ended."
            ) from error
    _put_away(target, keep={file["name"] for file in manifest["files"]})
    success = hashlib.sha256(data).hexdigest() + "\n"
    files.write_bytes(os.path.join(target, SUCCESS), success.encode())


def _put_away(target: str, keep: set[str]) -> None:
    """Moves files of other versions to `_versions`; those of a version never published go."""
    for name in files.list_names(target):
        match = re.fullmatch(r"part-\d+-of-\d+-([0-9a-f]+)\.parquet", name)
        if match and name not in keep:
            kept = os.path.join(target, KEPT, match[1])
            if files.exists(os.path.join(kept, MANIFEST)):
                files.move(os.path.join(target, name), os.path.join(kept, name))
            else:
                files.delete(os.path.join(target, name))


# ---- The night's own record ------------------------------------------------------------------


def night_path(root: str, feature_set: str, ds: dt.date) -> str:
    return os.path.join(root, feature_set, "_nights", f"ds={ds}.json")


def night_record(
    root: str,
    feature_set: str,
    ds: dt.date,
    partitions: list[Partition],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Which version of each table together is the night of ds, and which ones were before."""
    entries = {
        p.manifest["table"]: {
            "path": os.path.relpath(p.folder, root),
            "version": p.manifest["version"],
            "run_id": p.run_id,
            "rows": p.rows,
        }
        for p in partitions
    }
    return {"ds": str(ds), "feature_set": feature_set, "tables": entries, "before": before}


def read_night(root: str, feature_set: str, ds: dt.date) -> dict[str, Any] | None:
    """The record of a night, whole or not; None where there is none."""
    path = night_path(root, feature_set, ds)
    return tables.read_json(path) if files.exists(path) else None


def is_whole_night(root: str, feature_set: str, ds: dt.date) -> bool:
    """Whether the night's record stands and every table is the version that it names."""
    record = read_night(root, feature_set, ds)
    return record is not None and all(
        tables.is_published(os.path.join(root, entry["path"]))
        and tables.open_published(os.path.join(root, entry["path"])).manifest["version"]
        == entry["version"]
        for entry in record["tables"].values()
    )
