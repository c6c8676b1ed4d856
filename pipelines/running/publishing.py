"""Publishes what was made, so that no reader ever takes a mixture, whoever dies or meets whom.

A partition is published in five steps: `_SUCCESS` goes; the new files come, under names that carry
the version; the manifest changes, by compare-and-swap; the files that the manifest before named
are put away to `_versions`; `_SUCCESS` comes back, with the new manifest's digest. A reader
through the manifest, or one that reads `_SUCCESS` (which must name the manifest) before and after
the files, sees one version whole, or "not ready", or a missing file, and never a mixture. A version
that comes once more carries the number of its `publication`, so that no `_SUCCESS` comes twice.

*Fenced.* A writer may be asleep at any moment and wake when another has published. So each step
first looks whether the manifest is still the one that the writer knows, and else touches nothing.
On a disk the step holds the partition's own lock meanwhile. A bucket has no lock that spans two
objects; there each write has a precondition of its own: files and `_SUCCESS` are deleted as they
were seen, by generation, before the manifest was looked at, and are always written anew;
`_SUCCESS` is written by its own generation; and whoever has changed the manifest deletes what
others had staged for the partition, so that a copy which is on its way finds no source.

*Killed* at any point, the same run finishes it: each step is skipped where it is done, and nothing
is "published" before the old files are away.

Not covered: two writers of one partition in a bucket that are both awake, one of them without its
lease: a reader by `_SUCCESS` may then meet a file of the other for as long as one request takes.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from feature_jobs.schemas import CourierError
from feature_jobs.store import files, partitions
from feature_jobs.store.documents import to_json
from feature_jobs.store.files import FileInfo
from feature_jobs.store.partitions import MANIFEST, STAGED, SUCCESS, Partition, version_of
from pipelines.running import layout, records
from pipelines.running.layout import Place
from pipelines.running.locks import Locks
from pipelines.running.stage import Night, Stage

T = TypeVar("T")

_AT_ONCE = 32  # files that one step brings in or puts away
_PART = r"part-\d+-of-\d+-([0-9a-f]+)\.parquet"


# ---- A night -----------------------------------------------------------------------------------


def publish_night(night: Night, locks: Locks) -> None:
    """Publishes all tables of a night, then its record, which is "not ready" until then.

    What is published now is looked at before the first step, in the order of the steps: if another
    run publishes the day in between, the first step finds that and raises CourierError.
    """
    root, feature_set = night.settings.root, night.settings.feature_set
    path = layout.night_path(root, feature_set, night.ds)
    waiting = [(stage, publications(stage, locks)) for stage in night.stages]
    found = files.read_if_there(path)
    for stage, tables in waiting:
        for publication in tables:
            publication.run()
        locks.check()
        files.delete_tree(os.path.dirname(stage.staging))  # and what other runs of ds left behind
    before = json.loads(found) if found else None
    if not night.is_whole and not (before and _goes_into(night, before)):
        return
    folders = [stage.folder(table) for stage in night.stages for table in stage.tables]
    if before:
        folders += [os.path.join(root, entry["path"]) for entry in before["tables"].values()]
    parts = [_still_published(folder) for folder in dict.fromkeys(folders)]
    earlier = before and {**before, "before": None}  # one step back is kept, not all
    record = records.night_record(root, feature_set, night.ds, parts, earlier)
    if before is None or before["tables"] != record["tables"]:
        write_record(path, to_json(record), found, locks)


def _still_published(folder: str) -> Partition:
    found = partitions.find_published(folder)
    if found is None:
        raise superseded(folder)
    return found


def write_record(path: str, record: bytes, found: bytes | None, locks: Locks) -> None:
    """Replaces a record while it is the one that was `found`; raises CourierError otherwise."""
    locks.check()
    try:
        files.write_if_unchanged(path, record, found)
    except files.Changed as error:
        raise superseded(path) from error


def _goes_into(night: Night, record: dict[str, Any]) -> bool:
    """Returns whether the stages of `night` take the place of those in a whole night's record.

    They do where nothing of the same ds reads what they make, and the rest is as it was.
    """
    made = {table.name for stage in night.stages for table in stage.tables}
    folders = {
        os.path.join(night.settings.root, entry["path"]): entry["version"]
        for name, entry in record["tables"].items()
        if name not in made
    }
    return {stage.name for stage in night.stages} <= {"histories", "simscore"} and all(
        partitions.published_version(folder) == version for folder, version in folders.items()
    )


# ---- A partition -------------------------------------------------------------------------------


def publications(stage: Stage, locks: Locks) -> list["Publication"]:
    """Returns what is to be done to publish the tables of a staged stage; nothing if they are."""
    if stage.is_published():
        return []
    found = []
    for table in stage.tables:
        place = stage.place(table)
        # The manifest first: whoever changes it deletes then what others had staged.
        manifest = files.read_if_there(os.path.join(place.folder, MANIFEST))
        found.append(publication(stage.staged_folder(table), place, manifest, locks))
    return found


def publication(staged: str, place: Place, found: bytes | None, locks: Locks) -> "Publication":
    """Returns the publication of what the folder `staged` holds, over the manifest `found`.

    The staged files stay readable until the caller deletes them. Raises CourierError where another
    run has deleted them since `found` was read.
    """
    partition = partitions.find_staged(staged)
    if partition is None:
        raise superseded(place.folder)
    manifest = versioned(partition.manifest)
    sources = dict(zip([f["name"] for f in manifest["files"]], partition.paths, strict=True))
    return Publication(manifest, sources, staged, place, found, locks)


def versioned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest with its version, a digest of all content, in it and in file names."""
    version = version_of(manifest)
    end = f"-{version}.parquet"
    named = [
        {**file, "name": file["name"].removesuffix(end).removesuffix(".parquet") + end}
        for file in manifest["files"]
    ]
    return {**manifest, "files": named, "version": version}


@dataclass(frozen=True)
class Publication:
    """Describes one version of a partition on its way to readers.

    `sources` are its files by name, below the folder `staged`; `found` is the manifest that it is
    to replace, None for a first publication.
    """

    manifest: Mapping[str, Any]
    sources: Mapping[str, str]
    staged: str
    place: Place
    found: bytes | None
    locks: Locks

    def run(self) -> None:
        """Publishes it, or finishes that; raises CourierError where `found` is not there any more.

        Publishing again what is published changes nothing.
        """
        if _version_in(self.found) != self.manifest["version"]:
            data = self._replace()
        elif partitions.is_published(self.place.folder):
            return
        else:
            data = self._renew()
        self._put_away_others(data)
        self._announce(data)

    @property
    def _manifest_path(self) -> str:
        return os.path.join(self.place.folder, MANIFEST)

    @property
    def _success_path(self) -> str:
        return os.path.join(self.place.folder, SUCCESS)

    @contextlib.contextmanager
    def _step(self, expected: bytes | None) -> Iterator[None]:
        """Goes into the block only while the manifest is `expected` (None: while there is none)."""
        self.locks.check()
        with files.step(self.place.folder):
            if files.read_if_there(self._manifest_path) != expected:
                raise superseded(self.place.folder)
            yield

    # -- Until the manifest changes --

    @contextlib.contextmanager
    def _step_towards(self) -> Iterator[None]:
        """Goes into the block only while `found` stands, and what is staged has its sources."""
        with self._step(self.found):
            # Who brought the version that stands back meanwhile has left the manifest as it was.
            if not files.exists(os.path.join(self.staged, STAGED)):
                raise superseded(self.place.folder)
            yield

    def _replace(self) -> bytes:
        """Brings the files in and changes the manifest; returns the new one."""
        parent = _version_in(self.found)
        if self.found is not None:
            with self._step_towards():
                files.write_bytes(self._kept_manifest(str(parent)), self.found)
        for names in _batches(self.sources):
            self._retract()  # a writer that this one overtook may have brought it back
            with self._step_towards():
                self._bring_in(names)
        manifest = {k: v for k, v in self.manifest.items() if k != "publication"}
        manifest["parent_version"] = parent
        if times := self._times_replaced():
            manifest["publication"] = times + 1
        data = _manifest_bytes(manifest)
        with self._step_towards():
            self._swap(self._manifest_path, data, self.found)
        return data

    def _renew(self) -> bytes:
        """Returns the manifest that names this version already, though it is not announced.

        It changes where another writer had begun to replace it: the same `_SUCCESS` must never come
        twice, or a reader that saw it before and after would trust what came in between.
        """
        found = self.found or b""
        manifest = json.loads(found)
        times = self._times_replaced()
        if manifest.get("publication", 1) > times:
            return found
        data = _manifest_bytes({**manifest, "publication": times + 1})
        with self._step(found):
            self._swap(self._manifest_path, data, found)
        return data

    def _times_replaced(self) -> int:
        """Returns how often this version was published and replaced, or was about to be."""
        kept = files.read_if_there(self._kept_manifest(self.manifest["version"]))
        return 0 if kept is None else int(json.loads(kept).get("publication", 1))

    def _kept_manifest(self, version: str) -> str:
        return os.path.join(self.place.kept, version, MANIFEST)

    def _retract(self) -> None:
        """Takes `_SUCCESS` away, as it was seen before the manifest was looked at."""
        with contextlib.suppress(FileNotFoundError):
            seen = files.stat(self._success_path)
            with self._step_towards():
                files.delete_seen(seen)

    def _bring_in(self, names: Sequence[str]) -> None:
        try:
            _all_at_once(
                lambda name: files.link(self.sources[name], os.path.join(self.place.folder, name)),
                names,
            )
        except FileNotFoundError as error:  # whoever published meanwhile deleted what was staged
            raise superseded(self.place.folder) from error

    def _swap(self, path: str, data: bytes, found: bytes | None) -> None:
        try:
            files.write_if_unchanged(path, data, found)
        except files.Changed as error:
            raise superseded(self.place.folder) from error

    # -- Once it has changed --

    def _put_away_others(self, data: bytes) -> None:
        """Leaves in the folder the files that the manifest `data` names, and all of them."""
        with self._step(data):
            self._delete_rivals()
        lies_there = {
            os.path.basename(file.path): file
            for file in files.glob(os.path.join(self.place.folder, "part-*.parquet"))
        }
        missing = [name for name in self.sources if name not in lies_there]
        if missing:  # a writer that was overtaken deleted them, as it took them for its own
            with self._step(data):
                self._bring_in(missing)
        others = [file for name, file in lies_there.items() if name not in self.sources]
        kept = self._kept_names({v for file in others if (v := _version_of_part(file))})
        for some in _batches(others):
            with self._step(data):
                _all_at_once(partial(self._put_away, kept), some)

    def _delete_rivals(self) -> None:
        """Deletes what other runs staged for this partition, so that none of it can come in."""
        run, table = os.path.split(self.staged)
        top, mine = os.path.split(run)
        for other in files.list_names(top):
            if other != mine:
                files.delete_tree(os.path.join(top, other, table))

    def _kept_names(self, versions: Iterable[str]) -> set[str]:
        """Returns the names of all files of earlier versions; one never published has none."""
        manifests = [files.read_if_there(self._kept_manifest(version)) for version in versions]
        return {file["name"] for data in manifests if data for file in json.loads(data)["files"]}

    def _put_away(self, kept: set[str], file: FileInfo) -> None:
        """Moves a file of an earlier version, one of `kept`, to where that is kept.

        Another one that is named like a part was left by a run that died before it was published.
        """
        name, version = os.path.basename(file.path), _version_of_part(file)
        if version is None:
            return  # none of ours
        if name in kept:
            try:
                files.link(file.path, os.path.join(self.place.kept, version, name))
            except FileNotFoundError:
                return  # another run was at it, too
        files.delete_seen(file)

    def _announce(self, data: bytes) -> None:
        """Writes `_SUCCESS`, unless another writer has put it there since it was looked at."""
        found = files.read_if_there(self._success_path)
        success = (hashlib.sha256(data).hexdigest() + "\n").encode()
        with self._step(data):
            if found != success:
                self._swap(self._success_path, success, found)


def _batches(some: Iterable[T]) -> Iterator[list[T]]:
    rest = list(some)
    while rest:
        yield rest[:_AT_ONCE]
        rest = rest[_AT_ONCE:]


def _all_at_once(call: Callable[[T], None], some: Sequence[T]) -> None:
    if len(some) == 1:
        call(some[0])
        return
    with ThreadPoolExecutor(len(some)) as pool:
        for _ in pool.map(call, some):
            pass


def _version_of_part(file: FileInfo) -> str | None:
    """Returns the version in a part's name; None for a file that is no part."""
    found = re.fullmatch(_PART, os.path.basename(file.path))
    return found[1] if found else None


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode() + b"\n"


def _version_in(manifest: bytes | None) -> str | None:
    return None if manifest is None else str(json.loads(manifest)["version"])


def superseded(path: str) -> CourierError:
    """Returns the error of a run that found another to have published at `path` meanwhile."""
    return CourierError(
        f"Another run published {path} meanwhile, so this one stopped before it could mix the two. "
        "What that run published stands. Run the same command again when it has ended."
    )
