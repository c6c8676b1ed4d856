"""Publishing: how what was made comes before readers, and how an earlier version comes back."""

import contextlib
import datetime as dt
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from feature_jobs.schemas import TABLES, CourierError, OperatorError
from feature_jobs.store import files, partitions
from feature_jobs.store.documents import read_json, write_json
from feature_jobs.store.partitions import MANIFEST, SUCCESS, Partition, version_of
from pipelines.config import Settings
from pipelines.running import layout, records
from pipelines.running.stage import Night, Stage

KEPT = "_versions"

_LATER = ", or within five minutes where that was killed on another machine"


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


def publish(stage: Stage) -> None:
    """Publishes all tables of a staged stage, then deletes its staging.

    A stage that is published already is left alone.
    """
    if not stage.is_published():
        for table in stage.tables:
            staged = partitions.open_staged(os.path.join(stage.staging, table.name))
            publish_partition(staged, stage.folder(table))
    files.delete_tree(os.path.dirname(stage.staging))  # and what other runs of ds left behind


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
    manifest = read_json(path if files.exists(path) else os.path.join(target, MANIFEST))
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
    if resumed and partitions.is_published(target):
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


def publish_night(night: Night) -> None:
    """All tables, then the night's own record, which is wrong and so "not ready" until then."""
    settings = night.settings
    for stage in night.stages:
        with _shared(settings):
            publish(stage)
    root, feature_set = settings.root, settings.feature_set
    before = records.read_night(root, feature_set, night.ds)
    if night.is_whole or (before and _goes_into(night, before)):
        folders = [stage.folder(table) for stage in night.stages for table in stage.tables]
        if before:
            folders += [os.path.join(root, entry["path"]) for entry in before["tables"].values()]
        parts = [partitions.open_published(folder) for folder in dict.fromkeys(folders)]
        earlier = before and {**before, "before": None}  # one step back is kept, not all
        record = records.night_record(root, feature_set, night.ds, parts, earlier)
        if before is None or before["tables"] != record["tables"]:
            write_json(layout.night_path(root, feature_set, night.ds), record)


def _goes_into(night: Night, record: dict[str, Any]) -> bool:
    """Whether the stages of `night` take the place of those in the record of a whole night: nothing
    of the same ds reads what they make, and the rest is as it was."""
    made = {table.name for stage in night.stages for table in stage.tables}
    folders = {
        os.path.join(night.settings.root, entry["path"]): entry["version"]
        for name, entry in record["tables"].items()
        if name not in made
    }
    return {stage.name for stage in night.stages} <= {"histories", "simscore"} and all(
        partitions.is_published(folder)
        and partitions.open_published(folder).manifest["version"] == version
        for folder, version in folders.items()
    )


def _shared(settings: Settings) -> AbstractContextManager[files.Held]:
    """Holds the tables that other feature sets publish as well."""
    return files.lock(f"{settings.root}/shared", wait=True)


def roll_back(settings: Settings, ds: dt.date) -> dict[str, str]:
    """Brings back the night of ds that was whole before the present one; returns its versions.

    Tables that other feature sets share stay as they are. The record is changed first: until every
    table is what it names, the night is "not ready", and the same command goes on after a kill.
    Raises OperatorError, with nothing changed, where a version is not kept.
    """
    root, feature_set = settings.root, settings.feature_set
    with exclusive(root, feature_set):
        record = records.read_night(root, feature_set, ds)
        if record and records.is_whole_night(root, feature_set, ds):
            record = _turned(record)
        wanted = _own_versions(record, root) if record else {}
        if not wanted or not all(has_version(f, v) for f, v in wanted.items()):
            raise OperatorError(
                f"There is no earlier night of ds {ds} to bring back: it was published once, or "
                "the version before is not kept any more. What is published stays as it is."
            )
        write_json(layout.night_path(root, feature_set, ds), record)
        for folder, version in wanted.items():
            bring_back(folder, version)
    return {os.path.relpath(folder, root): version for folder, version in wanted.items()}


def _turned(record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the night before, with the present one as the one before that."""
    if not record["before"]:
        return None
    own = {k: v for k, v in record["before"]["tables"].items() if not TABLES[k].shared}
    return {
        **record["before"],
        "tables": {**record["tables"], **own},
        "before": {**record, "before": None},
    }


def _own_versions(record: dict[str, Any], root: str) -> dict[str, str]:
    """The versions that a record names, by folder, of the tables that no other set shares."""
    return {
        os.path.join(root, entry["path"]): entry["version"]
        for name, entry in record["tables"].items()
        if not TABLES[name].shared
    }
