"""Publishes what was made, so that no reader ever takes a mixture, whoever dies or meets whom.

A partition is published in six steps: `_SUCCESS` goes; the new files come, under names that carry
the version; the manifest changes, by compare-and-swap; the files of the version before are put
away to `_versions`; `_files.txt`, the list of the full paths for engines that take one, is written
anew; `_SUCCESS` comes back, with the new manifest's digest. A reader through the manifest or the
list, or one that reads `_SUCCESS` (which must name the manifest) before and after the files, sees
one version whole, or "not ready", or a missing file, and never a mixture.

*Fenced.* A writer may be asleep at any moment and wake when another has published. So each step
first looks whether the manifest is still the one that the writer knows, and else touches nothing.
On a disk the step holds the partition's own lock meanwhile. A bucket has no lock that spans two
objects; there each write has a precondition of its own: files and `_SUCCESS` are deleted as they
were seen, by generation, before the manifest was looked at, and are always written anew;
`_SUCCESS` and the list are written by their own generation, the list also where it says the same,
so that whoever saw the one before fails; and whoever has changed the manifest deletes what others
had staged for the partition, so that a copy which is on its way finds no source.

*Claimed.* Before the first file comes in, the manifest that stands changes too: the number of its
`publication` goes up. A `_SUCCESS` that another writer has on its way names a manifest then that
is there no more, and none is ever written twice.

*The same rows*, made again from other inputs, are the same version in the same files: the manifest
alone changes, its `publication` with it, and `_SUCCESS` follows. A file that is not as the manifest
says any more (a disk lost some of it) is replaced by that which was made again, at once and whole.

*Killed* at any point, the same run finishes it: each step is skipped where it is done, and nothing
is "published" before the old files are away. A part that no manifest ever named was left by a run
that died, and is deleted: what it was copied from is still staged, or will be made again.
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
from feature_jobs.store import files, nights, partitions
from feature_jobs.store.documents import parse_json, to_json
from feature_jobs.store.files import FileInfo
from feature_jobs.store.partitions import (
    FILE_LIST,
    MANIFEST,
    STAGED,
    SUCCESS,
    Partition,
    shard_name,
    version_of,
)
from pipelines import stages
from pipelines.running import records, states
from pipelines.running.layout import CHUNK_FOLDER, Layout, Place, date_of, days_of_job
from pipelines.running.locks import Locks
from pipelines.running.stage import Stage
from pipelines.running.states import PUBLISHED, Look, Night
from pipelines.stages import Kind

T = TypeVar("T")

_AT_ONCE = 64  # files that one step brings in or puts away
_TRIES = 5
_OF_PUBLISHING = {"parent_version", "publication"}  # what a manifest says of itself
_PART = r"part-\d+-of-\d+-([0-9a-f]+)\.parquet"


# ---- A night -----------------------------------------------------------------------------------


def publish_night(night: Night, locks: Locks) -> None:
    """Publishes all tables of a night, then its record, which is "not ready" until then.

    Last comes `latest.json`, which names the newest night's record.

    What is published now is looked at before the first step, in the order of the steps: if another
    run publishes the day in between, the first step finds that and raises CourierError.
    """
    layout = night.settings.layout
    path = layout.night_path(night.ds)
    look = Look()
    waiting = [(stage, publications(stage, look, locks)) for stage in night.stages]
    found = files.read_if_there(path)
    before = nights.parse_record(path, found) if found else None
    for stage, tables in waiting:
        for table in tables:
            table.run()
        _tidy_up(stage, bool(tables), locks)
    if night.is_whole or (before and _goes_into(night, before)):
        _record_night(night, found, before, locks)
    renew_latest(layout, locks)


def _record_night(
    night: Night, found: bytes | None, before: Mapping[str, Any] | None, locks: Locks
) -> None:
    """Writes the record of a night whose tables are published, in place of `before`.

    That is what was `found`; one that says the same stays.
    """
    layout = night.settings.layout
    folders = {table.name: stage.folder(table) for stage in night.stages for table in stage.tables}
    if before and not night.is_whole:
        there = {name: records.folder_of(before, name, layout) for name in before["tables"]}
        folders = {**there, **folders}
    parts = [_still_published(folder) for folder in folders.values()]
    record = records.night_record(layout, night.ds, parts, before)
    if before is None or any(before.get(k) != record[k] for k in ("tables", "gates")):
        write_record(layout.night_path(night.ds), to_json(record), found, locks)


def _tidy_up(stage: Stage, has_published: bool, locks: Locks) -> None:
    """Deletes what a stage had staged; and what other runs of ds left, if it has published.

    A run that found nothing to do must not take the work of another that was refused.
    """
    top, mine = os.path.split(stage.staging)
    left = files.list_names(top) if has_published else [mine]
    locks.check()  # after the look: what another run stages from now on is none of it
    for name in left:
        files.delete_tree(os.path.join(top, name))
    if not files.list_names(top):
        files.delete_tree(top)


def tidy_jobs(night: Night, locks: Locks) -> None:
    """Deletes what jobs left that died, and chunk files that nobody needs now, of a night's stages.

    A job is at work only while its days have folders, which it makes first; and only then can a
    chunk file be needed that was there before.
    """
    for stage in night.stages:
        tidy_jobs_of(stage.layout, stage.kind, locks)


def tidy_jobs_of(layout: Layout, kind: Kind, locks: Locks) -> None:
    """Deletes what jobs of a kind left that died, as `tidy_jobs` does."""
    top = layout.kind_folder(kind)
    chunks = files.find(os.path.join(top, CHUNK_FOLDER + "*", "*"))
    names = files.list_names(top)  # after the look for chunks: none of them is of a later job
    unfinished = [day for name in names if name.startswith("ds=") and (day := date_of(name))]
    locks.check()
    for name in names:
        ends = days_of_job(name)
        if ends and not any(ends[0] <= day <= ends[1] for day in unfinished):
            files.delete_tree(os.path.join(top, name))
    if unfinished:
        return
    for paths in _batches(chunks):
        _all_at_once(_delete_if_there, paths)
    for name in names:
        folder = os.path.join(top, name)
        if name.startswith(CHUNK_FOLDER) and not files.list_names(folder):
            files.delete_tree(folder)


def _delete_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        files.delete(path)


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


def renew_latest(layout: Layout, locks: Locks) -> None:
    """Makes `latest.json` name the newest night, as its record stands; it never goes back a day.

    Whoever changes a record does this last. The record is looked at after the file that is to be
    replaced: a writer that was asleep in between, while another changed the record and then that
    file, finds the file changed, and looks again.
    """
    path, days = layout.latest_path, layout.recorded_days()
    while days:
        with contextlib.suppress(files.Changed), files.step(os.path.dirname(path)):
            seen, latest = _seen(path), records.read_latest(layout)
            record = records.read_night(layout, days[-1])
            if record and not nights.stands(latest, record):
                locks.check()
                files.replace_seen(path, to_json(nights.latest_of(record)), seen)
            return


def _goes_into(night: Night, record: Mapping[str, Any]) -> bool:
    """Returns whether the stages of `night` take the place of those in a whole night's record.

    They do where they are of the night, nothing else of the same ds reads what they make, and the
    rest is as it was.
    """
    made = {table.name for stage in night.stages for table in stage.tables}
    if not made <= record["tables"].keys():
        return False  # a night of items alone
    folders = {
        records.folder_of(record, name, night.settings.layout): entry["version"]
        for name, entry in record["tables"].items()
        if name not in made
    }
    last = {stages.HISTORIES, stages.SIMSCORE}
    return {stage.kind for stage in night.stages} <= last and all(
        partitions.published_version(folder) == version for folder, version in folders.items()
    )


# ---- A partition -------------------------------------------------------------------------------


def publications(stage: Stage, look: Look, locks: Locks) -> list["Publication"]:
    """Returns what is to be done to publish the tables of a staged stage; nothing if they are."""
    if look.state(stage).name == PUBLISHED:
        return []
    if stage.forced:
        states.note_publishing(stage)
    found = []
    for table in stage.tables:
        place = stage.place(table)
        # The manifest first: whoever changes it deletes then what others had staged.
        manifest = files.read_if_there(os.path.join(place.folder, MANIFEST))
        found.append(publication(states.staged_folder(stage, table), place, manifest, locks))
    return found


def publication(staged: str, place: Place, replaces: bytes | None, locks: Locks) -> "Publication":
    """Returns the publication of what the folder `staged` holds, over the manifest `replaces`.

    The staged files stay readable until the caller deletes them. Raises CourierError where another
    run has deleted them since `replaces` was read.
    """
    partition = partitions.find_staged(staged)
    if partition is None:
        raise superseded(place.folder)
    manifest = versioned(partition.manifest)
    sources = dict(zip([f["name"] for f in manifest["files"]], partition.paths, strict=True))
    return Publication(manifest, sources, staged, place, replaces, locks)


def versioned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest with its version, a digest of all content, in it and in file names."""
    version = version_of(manifest)
    end = f"-{version}.parquet"
    named = [{**file, "name": shard_name(file["name"]) + end} for file in manifest["files"]]
    return {**manifest, "files": named, "version": version}


@dataclass(frozen=True)
class Publication:
    """Describes one version of a partition on its way to readers.

    `sources` are its files by name, below the folder `staged`; `replaces` is the manifest that it
    is to replace, None for a first publication.
    """

    manifest: Mapping[str, Any]
    sources: Mapping[str, str]
    staged: str
    place: Place
    replaces: bytes | None
    locks: Locks

    def run(self) -> None:
        """Publishes it, or finishes that; raises CourierError where another run has come first.

        Publishing again what is published changes nothing, but for files that are missing or
        damaged, and a list of files that names another place: that of a partition that was moved.
        """
        if self._version_in(self.replaces) != self.manifest["version"]:
            data = self._replace()
        else:
            damaged = self._damaged()
            if self._says_the_same() and self._is_published() and not damaged:
                return
            data = self._renew()
            self._mend(data, damaged)
        self._put_away_others(data)
        self._list_files(data)
        self._announce(data)

    def _is_published(self) -> bool:
        found = partitions.find_published(self.place.folder)
        return found is not None and files.read_if_there(self._list_path) == self._file_list

    @property
    def _manifest_path(self) -> str:
        return os.path.join(self.place.folder, MANIFEST)

    @property
    def _success_path(self) -> str:
        return os.path.join(self.place.folder, SUCCESS)

    @property
    def _list_path(self) -> str:
        return os.path.join(self.place.folder, FILE_LIST)

    @property
    def _file_list(self) -> bytes:
        """Returns the full paths of the manifest's files in its order, one a line."""
        names = [file["name"] for file in self.manifest["files"]]
        return "".join(f"{os.path.join(self.place.folder, name)}\n" for name in names).encode()

    def _version_in(self, manifest: bytes | None) -> str | None:
        return None if manifest is None else str(self._parsed(manifest)["version"])

    def _parsed(self, manifest: bytes) -> dict[str, Any]:
        found: dict[str, Any] = parse_json(self._manifest_path, manifest)
        return found

    @contextlib.contextmanager
    def _step(self, expected: bytes | None) -> Iterator[None]:
        with _step(self.place.folder, self.locks, expected):
            yield

    # -- Until the manifest changes --

    @contextlib.contextmanager
    def _step_towards(self, expected: bytes | None) -> Iterator[None]:
        """Goes into the block only while `expected` stands, and what is staged has its sources."""
        with self._step(expected):
            # Whoever finished what stands, meanwhile, has left the manifest as it was.
            if not files.exists(os.path.join(self.staged, STAGED)):
                raise superseded(self.place.folder)
            yield

    def _replace(self) -> bytes:
        """Brings the files in and changes the manifest; returns the new one."""
        claimed = self._claim()
        for names in _batches(self.sources):
            # Looked at before the manifest: another writer may have brought it back.
            success = _seen(self._success_path)
            with self._step_towards(claimed):
                if success:
                    files.delete_seen(success)
                self._bring_in(names)
        manifest = {k: v for k, v in self.manifest.items() if k != "publication"}
        manifest["parent_version"] = self._version_in(self.replaces)
        if times := self._times_replaced(self.manifest["version"]):
            manifest["publication"] = times + 1
        data = _manifest_bytes(manifest)
        with self._step_towards(claimed):
            self._swap(self._manifest_path, data, claimed)
        return data

    def _claim(self) -> bytes | None:
        """Takes `_SUCCESS` away, and makes the manifest that stands another one; returns that.

        The kept one comes first: it counts how often the version was, or was about to be, replaced.
        """
        if self.replaces is None:
            return None
        if success := _seen(self._success_path):
            with self._step_towards(self.replaces):
                files.delete_seen(success)
        old = self._parsed(self.replaces)
        if files.read_if_there(self._kept_manifest(old["version"])) == self.replaces:
            return self.replaces  # claimed before, by a run that died: nobody announces that
        times = max(old.get("publication", 1), self._times_replaced(old["version"]))
        claimed = _manifest_bytes({**old, "publication": times + 1})
        with self._step_towards(self.replaces):
            files.write_bytes(self._kept_manifest(old["version"]), claimed)
        with self._step_towards(self.replaces):
            self._swap(self._manifest_path, claimed, self.replaces)
        return claimed

    def _says_the_same(self) -> bool:
        """Returns whether the manifest that stands says all that this one does."""
        both = self._parsed(self.replaces or b"{}"), self.manifest
        one, other = ({k: v for k, v in m.items() if k not in _OF_PUBLISHING} for m in both)
        return one == other

    def _renew(self) -> bytes:
        """Returns the manifest of a version whose files are there already.

        It is that of this run where another one says otherwise from what the same rows were made.
        It changes too where it is not announced and another writer had begun to replace it: the
        same `_SUCCESS` must never come twice, or a reader that saw it before and after would trust
        what came in between.
        """
        found = self.replaces or b""
        there, times = self._parsed(found), self._times_replaced(self.manifest["version"])
        if self._says_the_same():
            if there.get("publication", 1) > times:
                return found
            data = _manifest_bytes({**there, "publication": times + 1})
        else:
            times = max(times, there.get("publication", 1))
            mine = {**self.manifest, "parent_version": there.get("parent_version")}
            data = _manifest_bytes({**mine, "publication": times + 1})
        with self._step(found):
            self._swap(self._manifest_path, data, found)
        return data

    def _damaged(self) -> list[str]:
        """Returns the names of the files that are missing, or not as the manifest says."""
        listed = self.manifest["files"]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            whole = pool.map(self._is_whole, listed)
            return [
                file["name"] for file, is_whole in zip(listed, whole, strict=True) if not is_whole
            ]

    def _is_whole(self, file: Mapping[str, Any]) -> bool:
        """Returns whether a file of the manifest is the one that was made again.

        A disk is asked for its sha256. A bucket has a checksum of its own, and of both files: so
        neither is read.
        """
        path = os.path.join(self.place.folder, file["name"])
        try:
            if files.stat(path).size != file["bytes"]:
                return False
            found = files.checksum(path)
            return found == file["sha256"] or found == files.checksum(self.sources[file["name"]])
        except FileNotFoundError:
            return False

    def _mend(self, data: bytes, damaged: Sequence[str]) -> None:
        """Replaces damaged files: none is ever away, so that whoever reads needs not ask again."""
        for names in _batches(damaged):
            with self._step(data):
                self._bring_in(names)

    def _times_replaced(self, version: str) -> int:
        """Returns how often a version was published and replaced, or was about to be."""
        kept = files.read_if_there(self._kept_manifest(version))
        return 0 if kept is None else int(self._parsed(kept).get("publication", 1))

    def _kept_manifest(self, version: str) -> str:
        return os.path.join(self.place.kept, version, MANIFEST)

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
        self._delete_rivals(data)
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

    def _delete_rivals(self, data: bytes) -> None:
        """Deletes what other runs staged for this partition, so that none of it can come in.

        Listed before the manifest is looked at: what a later writer stages is none of it.
        """
        run, table = os.path.split(self.staged)
        top, mine = os.path.split(run)
        rivals = [name for name in files.list_names(top) if name != mine]
        with self._step(data):
            for name in rivals:
                files.delete_tree(os.path.join(top, name, table))

    def _kept_names(self, versions: Iterable[str]) -> set[str]:
        """Returns the names of all files of earlier versions; one never published has none."""
        manifests = [files.read_if_there(self._kept_manifest(version)) for version in versions]
        return {file["name"] for data in manifests if data for file in self._parsed(data)["files"]}

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
                if files.exists(file.path):
                    raise
                return  # another run was at it, too
        files.delete_seen(file)

    def _list_files(self, data: bytes) -> None:
        """Writes the list of files, in place of any that is there.

        One that comes in between is looked at again: it is that of a writer that was overtaken, or
        of one that has overtaken this one.
        """
        for _ in range(_TRIES):
            seen = _seen(self._list_path)
            with self._step(data), contextlib.suppress(files.Changed):
                files.replace_seen(self._list_path, self._file_list, seen)
                return
        raise superseded(self.place.folder)

    def _announce(self, data: bytes) -> None:
        """Writes `_SUCCESS`, in place of one that names another manifest than what stands.

        One that comes in between is looked at again: it is that of a writer that was overtaken, or
        of one that has overtaken this one.
        """
        success = (hashlib.sha256(data).hexdigest() + "\n").encode()
        for _ in range(_TRIES):
            found = files.read_if_there(self._success_path)
            with self._step(data):
                if found == success:
                    return
                with contextlib.suppress(files.Changed):
                    files.write_if_unchanged(self._success_path, success, found)
                    return
        raise superseded(self.place.folder)


@contextlib.contextmanager
def _step(folder: str, locks: Locks, expected: bytes | None) -> Iterator[None]:
    """Goes into the block only while the manifest is `expected` (None: while there is none)."""
    locks.check()
    with files.step(folder):
        if files.read_if_there(os.path.join(folder, MANIFEST)) != expected:
            raise superseded(folder)
        yield


# ---- Taking away -------------------------------------------------------------------------------


def withdraw(place: Place, seen: Sequence[FileInfo], locks: Locks) -> None:
    """Takes a partition from before readers for good: the files that were `seen` in its folder.

    `_SUCCESS` goes first, then the manifest, the parts, the list. Whatever another has written in
    between stays, as it was not seen; the manifest was seen before it is looked at here. Killed at
    any point, the same call finishes it. Raises CourierError where another run publishes meanwhile.
    """
    by_name = {os.path.relpath(file.path, place.folder): file for file in seen}
    manifest = files.read_if_there(os.path.join(place.folder, MANIFEST))
    if manifest is not None:
        _note_withdrawn(place, manifest, locks)
    for name in (SUCCESS, MANIFEST):
        if name in by_name:
            with _step(place.folder, locks, manifest):
                files.delete_seen(by_name.pop(name))
    listed = [by_name.pop(FILE_LIST)] if FILE_LIST in by_name else []
    for some in (*_batches(by_name.values()), *_batches(listed)):
        with _step(place.folder, locks, None):
            _all_at_once(files.delete_seen, some)
    with _step(place.folder, locks, None):
        files.delete_empty(place.folder)


def _note_withdrawn(place: Place, manifest: bytes, locks: Locks) -> None:
    """Notes among the kept versions that this one is replaced, though nothing takes its place.

    Whoever publishes it again counts from there: its `_SUCCESS` must not come twice, or a reader
    that saw it before and after would trust what it found in between.
    """
    path = os.path.join(place.folder, MANIFEST)
    found = partitions.parse_manifest(path, manifest)
    kept_path = os.path.join(place.kept, found["version"], MANIFEST)
    kept = files.read_if_there(kept_path)
    counted = parse_json(kept_path, kept).get("publication", 1) if kept else 0
    times = max(found.get("publication", 1) + 1, counted)
    with _step(place.folder, locks, manifest):
        files.write_bytes(kept_path, _manifest_bytes({**found, "publication": times}))


def _seen(path: str) -> FileInfo | None:
    """Returns what is known of a file, None where there is none."""
    try:
        return files.stat(path)
    except FileNotFoundError:
        return None


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


def superseded(path: str) -> CourierError:
    """Returns the error of a run that found another to have published at `path` meanwhile."""
    return CourierError(
        f"Another run published {path} meanwhile, so this one stopped before it could mix the two. "
        "What that run published stands. Run the same command again when it has ended."
    )
