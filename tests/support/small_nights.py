"""Makes nights of one small table without a job: publishing and rolling back are tried on them.

A night is told by the values of its one column, so that whoever reads files of two nights sees it.
"""

import datetime as dt
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feature_jobs.schemas import ITEM_FEATURES, Table
from feature_jobs.store import files, partitions
from feature_jobs.store.documents import write_json
from feature_jobs.store.files import FileInfo
from feature_jobs.store.partitions import FILE_LIST, MANIFEST, STAGED, SUCCESS, Partition
from feature_jobs.tables import LATEST, NightNotReady, open_night
from pipelines import stages
from pipelines.running import records
from pipelines.running.layout import Layout, Place
from pipelines.running.locks import Locks
from pipelines.running.publishing import publish_night
from pipelines.running.rollback import carry_out, plan_rollback
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import Look, Night

DS = dt.date(2026, 3, 1)
NOW = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
Values = list[int]


def stage_partition(
    folder: str, values: Values, shards: int = 2, run_id: str = "r", table: Table = ITEM_FEATURES
) -> Partition:
    """Writes a staged partition of `shards` files with the given values."""
    listed = []
    for shard in range(shards):
        name = f"{partitions.part_name(shard, shards)}.parquet"
        rows = pa.table({"x": values[shard::shards]})
        size, sha256 = partitions.write_parquet(os.path.join(folder, name), rows)
        listed.append({"name": name, "rows": len(rows), "bytes": size, "sha256": sha256})
    manifest = {
        "table": table.name, "run_id": run_id, "files": listed, "rows": len(values),
        "counts": {}, "histograms": {}, "examples": {}, "made_from": {}, "notes": {},
        "identities": {}, "settings": {}, "inputs": {}, "values": values,
    }  # fmt: skip
    write_json(os.path.join(folder, STAGED), manifest)
    staged = partitions.find_staged(folder)
    assert staged
    return staged


def is_whole_night(layout: Layout, ds: dt.date) -> bool:
    """Returns whether the night's record stands and every table is the version that it names."""
    record = records.read_night(layout, ds)
    return record is not None and records.is_whole(record, layout)


@dataclass(frozen=True)
class Sight:
    """Is what one look at a night shows to its readers.

    `success` is `_SUCCESS`, where it names the manifest; `globbed` are the values of all files that
    a glob finds, `through_manifest` those of the manifest's files, None for "ask again". `listed`
    is the list of files, None for none, and `there` has the files by their paths.
    """

    success: bytes | None
    globbed: Values
    through_manifest: Values | None
    listed: bytes | None
    there: dict[str, bytes]

    def through(self, listed: bytes | None) -> Values | None:
        """Returns the values of the files that a list names, None for "ask again"."""
        paths = None if listed is None else listed.decode().splitlines()
        if paths is None or not self.there.keys() >= set(paths):
            return None
        return sorted(value for path in paths for value in values_in(self.there[path]))


class Shop:
    """Is a root with one feature set, whose nights consist of one table; and the night of `ds`."""

    def __init__(self, root: str, ds: dt.date = DS):
        self.ds = ds
        self.settings: Any = SimpleNamespace(
            root=root, on_published=(), layout=Layout(root, "test", root)
        )
        self.place: Place = self.settings.layout.place(ITEM_FEATURES, ds)
        self._bytes: dict[str, tuple[tuple, bytes]] = {}

    def night(self, values: Values, run: str = "") -> Night:
        """Plans the night that publishes `values`; of the same ones, `run` tells one from another.

        They come from other inputs then, and come out the same.
        """
        stage = Stage(
            stages.ITEM_FEATURES, self.ds, self.settings.layout, shards=2,
            inputs={"values": values, **({"run": run} if run else {})}, identities={}, settings={},
        )  # fmt: skip
        return _WholeNight(self.settings, self.ds, (JustAStage(stage),), (), Look())

    def make(self, values: Values, run: str = "") -> Night:
        """Makes what the night publishes, unless that is there already."""
        night = self.night(values, run)
        (stage,) = night.stages
        if not Look().state(stage).is_made:
            folder = os.path.join(stage.staging, ITEM_FEATURES.name)
            stage_partition(folder, values, run_id=stage.run_id)
        return night

    def publish(self, values: Values, run: str = "") -> None:
        """Makes and publishes a night."""
        publish_night(self.make(values, run), Locks())

    def roll_back(self) -> None:
        """Rolls the day back, whatever holds it."""
        hold = records.read_hold(self.settings.layout, self.ds)
        if hold and records.is_rolled_back(hold, self.settings.layout, self.ds):
            return
        carry_out(plan_rollback(self.settings, self.ds, "a test"), Locks(), NOW)

    # -- What readers see --

    def look(self) -> Sight:
        """Looks once, as every reader does: for `_SUCCESS`, manifest and list, then the files."""
        success = files.read_if_there(os.path.join(self.place.folder, SUCCESS))
        manifest = files.read_if_there(os.path.join(self.place.folder, MANIFEST))
        listed = files.read_if_there(os.path.join(self.place.folder, FILE_LIST))
        found = files.glob(os.path.join(self.place.folder, "*.parquet"))
        paths = {file.path: self._read(file) for file in found}
        there = {os.path.basename(path): data for path, data in paths.items()}
        named = manifest is not None and hashlib.sha256(manifest).hexdigest().encode()
        return Sight(
            success if success is not None and success.strip() == named else None,
            sorted(v for data in there.values() for v in values_in(data)),
            None if manifest is None else _through(json.loads(manifest), there),
            listed,
            paths,
        )

    def _read(self, file: FileInfo) -> bytes:
        """Reads a file; one that was read before, and is the same still, from memory."""
        if self._bytes.get(file.path, ((), b""))[0] != file.version:
            self._bytes[file.path] = (file.version, files.read_bytes(file.path))
        return self._bytes[file.path][1]

    def newest(self) -> tuple[dt.date, Values] | None:
        """Opens the newest night; returns its ds and its values, None for "ask again"."""
        try:
            night = open_night(self.settings.root, "test", LATEST)
            data = [self._read(files.stat(path)) for path in night[ITEM_FEATURES.name].paths]
        except (NightNotReady, FileNotFoundError):
            return None
        return night.ds, sorted(value for one in data for value in values_in(one))

    def published(self) -> Values | None:
        """Returns the values of the night, whole by every measure there is, None if it is not."""
        sight, newest = self.look(), self.newest()
        if newest is None or newest[0] < self.ds:
            return None
        whole = is_whole_night(self.settings.layout, self.ds)
        found = [sight.globbed, sight.through_manifest, sight.through(sight.listed)]
        found += [newest[1]] if newest[0] == self.ds else []
        if sight.success is None or not whole or any(one != sight.globbed for one in found):
            return None
        return sight.globbed

    def kept(self) -> list[Values]:
        """Returns the values of each earlier version that is kept whole."""
        found, there = [], {}
        for file in files.glob(os.path.join(self.place.kept, "*", "*.parquet")):
            folder, name = os.path.split(file.path)
            there.setdefault(folder, {})[name] = file
        for folder, parts in there.items():
            manifest = files.read_if_there(os.path.join(folder, MANIFEST))
            if manifest is not None:  # else whoever wanted to put it there could not
                data = {name: self._read(file) for name, file in parts.items()}
                found.append(_through(json.loads(manifest), data))
        return sorted(values for values in found if values is not None)


def _through(manifest: dict[str, Any], there: dict[str, bytes]) -> Values | None:
    """Returns the values of a manifest's files, by name in `there`; None where one is missing."""
    found = Values()
    for file in manifest["files"]:
        if file["name"] not in there:
            return None
        assert hashlib.sha256(there[file["name"]]).hexdigest() == file["sha256"]
        found += values_in(there[file["name"]])
    return sorted(found)


_ROOT = b"{root}"  # in the place of the root, where a list of files names it


def contents(shop: Shop) -> dict[str, bytes]:
    """Returns all files of a shop, by their paths from its root; lists of files name none."""
    top = shop.settings.root
    patterns = [f"{top}/{'/'.join('*' * depth)}" for depth in range(1, 9)]
    paths = [path for pattern in patterns for path in files.find(pattern) if files.exists(path)]
    found = {path.removeprefix(top): files.read_bytes(path) for path in paths}
    lists = {path for path in found if os.path.basename(path) == FILE_LIST}
    return found | {path: found[path].replace(top.encode(), _ROOT) for path in lists}


def shop_of(contents: dict[str, bytes], root: str) -> Shop:
    """Returns a new shop that has these files."""
    for path, data in contents.items():
        files.write_bytes(root + path, data.replace(_ROOT, root.encode()))
    return Shop(root)


@dataclass(frozen=True)
class JustAStage(Planned):
    """Is a stage whose job makes nothing."""

    stage: Stage

    @classmethod
    def wire(cls, root: Any, days: Sequence["JustAStage"], folder: str) -> None:
        pass


class _WholeNight(Night):
    """Is a night that its one stage makes whole."""

    @property
    def is_whole(self) -> bool:
        return True


@functools.cache
def values_in(data: bytes) -> Values:
    """Returns the values of a Parquet file."""
    found: Values = pq.read_table(pa.BufferReader(data))["x"].to_pylist()
    return found


class Readers:
    """Readers that look again and again: none accepts a mixture, or an earlier newest night."""

    def __init__(self, shop: Shop, whole: list[Values]):
        self._shop, self._whole = shop, whole
        self._moments: list[Sight] = []
        self._lists = set[bytes | None]()
        self._newest = dt.date.min

    def poll(self) -> None:
        """Looks once: for the newest night, through the manifest, and every list ever read."""
        if newest := self._shop.newest():
            ds, values = newest
            assert values in self._whole
            assert ds >= self._newest
            self._newest = ds
        sight = self._shop.look()
        self._lists.add(sight.listed)
        for found in (sight.through_manifest, *map(sight.through, self._lists)):
            assert found is None or found in self._whole
        self._moments.append(sight)

    def check(self) -> None:
        """Asserts that between the first and the last sight of a `_SUCCESS` its night was whole."""
        marks = [sight.success for sight in self._moments]
        for success in set(marks) - {None}:
            first, last = marks.index(success), len(marks) - marks[::-1].index(success)
            named = self._moments[first].globbed
            assert named in self._whole
            for sight in self._moments[first:last]:
                assert sight.globbed == named
                assert sight.through(sight.listed) == named
