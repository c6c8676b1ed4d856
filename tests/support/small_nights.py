"""Makes nights of one small table without a job: publishing and rolling back are tried on them.

A night is told by the values of its one column, so that whoever reads files of two nights sees it.
"""

import datetime as dt
import functools
import hashlib
import json
import os
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feature_jobs.schemas import ITEM_FEATURES
from feature_jobs.store import files, partitions
from feature_jobs.store.documents import write_json
from feature_jobs.store.files import FileInfo
from feature_jobs.store.partitions import MANIFEST, STAGED, SUCCESS, Partition
from pipelines.running import layout, records
from pipelines.running.layout import Place
from pipelines.running.locks import Locks
from pipelines.running.publishing import publish_night
from pipelines.running.rollback import carry_out, plan_rollback
from pipelines.running.stage import Night, Stage

DS = dt.date(2026, 3, 1)
NOW = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
Values = list[int]


def stage_partition(folder: str, values: Values, shards: int = 2, run_id: str = "r") -> Partition:
    """Writes a staged partition of `shards` files with the given values."""
    listed = []
    for shard in range(shards):
        name = f"{partitions.part_name(shard, shards)}.parquet"
        rows = pa.table({"x": values[shard::shards]})
        size, sha256 = partitions.write_parquet(os.path.join(folder, name), rows)
        listed.append({"name": name, "rows": len(rows), "bytes": size, "sha256": sha256})
    manifest = {
        "table": ITEM_FEATURES.name, "run_id": run_id, "files": listed, "rows": len(values),
        "counts": {}, "made_from": {}, "notes": {}, "values": values,
    }  # fmt: skip
    write_json(os.path.join(folder, STAGED), manifest)
    staged = partitions.find_staged(folder)
    assert staged
    return staged


class Shop:
    """Is a root with one feature set, whose nights consist of one table."""

    def __init__(self, root: str):
        self.settings: Any = SimpleNamespace(root=root, feature_set="test")
        self.place: Place = layout.place_of(root, "test", ITEM_FEATURES, DS)
        self._bytes: dict[str, tuple[tuple, bytes]] = {}

    def night(self, values: Values) -> Night:
        """Plans the night that publishes `values`."""
        stage = Stage(
            "item-features", DS, self.settings.root, "test", tables=(ITEM_FEATURES,), shards=2,
            inputs={"values": values}, identities={}, settings={}, define=lambda *_: None,
        )  # fmt: skip
        return _WholeNight(self.settings, DS, (stage,), ())

    def make(self, values: Values) -> Night:
        """Makes what the night publishes, unless that is there already."""
        night = self.night(values)
        (stage,) = night.stages
        if not stage.is_made():
            folder = os.path.join(stage.staging, ITEM_FEATURES.name)
            stage_partition(folder, values, run_id=stage.run_id)
        return night

    def publish(self, values: Values) -> None:
        """Makes and publishes a night."""
        publish_night(self.make(values), Locks())

    def roll_back(self) -> None:
        """Rolls the day back, whatever holds it."""
        hold = records.read_hold(self.settings.root, "test", DS)
        if hold and records.is_rolled_back(hold, self.settings.root, "test", DS):
            return
        carry_out(plan_rollback(self.settings, DS, "a test"), Locks(), NOW)

    # -- What readers see --

    def through_manifest(self) -> Values | None:
        """Returns what a reader through the manifest gets; None for "ask again"."""
        manifest = files.read_if_there(os.path.join(self.place.folder, MANIFEST))
        if manifest is None:
            return None
        there, found = {file.path: file for file in self._glob()}, Values()
        for entry in json.loads(manifest)["files"]:
            path = os.path.join(self.place.folder, entry["name"])
            if path not in there:
                return None
            data = self._read(there[path])
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
            found += values_in(data)
        return sorted(found)

    def look(self) -> tuple[bytes | None, Values]:
        """Returns `_SUCCESS`, where it names the manifest, and the values that a glob reads."""
        success = files.read_if_there(os.path.join(self.place.folder, SUCCESS))
        if success is not None:
            manifest = files.read_if_there(os.path.join(self.place.folder, MANIFEST))
            named = manifest is not None and hashlib.sha256(manifest).hexdigest().encode()
            success = success if success.strip() == named else None
        return success, sorted(v for file in self._glob() for v in values_in(self._read(file)))

    def _glob(self) -> list[FileInfo]:
        return files.glob(os.path.join(self.place.folder, "*.parquet"))

    def _read(self, file: FileInfo) -> bytes:
        """Reads a file; one that was read before, and is the same still, from memory."""
        if self._bytes.get(file.path, ((), b""))[0] != file.version:
            self._bytes[file.path] = (file.version, files.read_bytes(file.path))
        return self._bytes[file.path][1]

    def published(self) -> Values | None:
        """Returns the values of the night, whole by every measure there is, None if it is not."""
        success, globbed = self.look()
        whole = records.is_whole_night(self.settings.root, "test", DS)
        if success is None or not whole or globbed != self.through_manifest():
            return None
        return globbed

    def kept(self) -> list[Values]:
        """Returns the values of each earlier version that is kept whole."""
        found = []
        for version in files.list_names(self.place.kept):
            folder = os.path.join(self.place.kept, version)
            data = files.read_if_there(os.path.join(folder, MANIFEST))
            if data is None:
                continue  # whoever wanted to put it there could not
            manifest = json.loads(data)
            paths = [os.path.join(folder, file["name"]) for file in manifest["files"]]
            if all(map(files.exists, paths)):
                found.append(sorted(v for p in paths for v in values_in(files.read_bytes(p))))
        return sorted(found)


def copied(shop: Shop, root: str) -> Shop:
    """Returns a shop like another one, with all that lies below its root."""
    top = shop.settings.root
    for pattern in (f"{top}/{'/'.join('*' * depth)}" for depth in range(1, 9)):
        for path in files.find(pattern):
            if files.exists(path):
                files.write_bytes(root + path.removeprefix(top), files.read_bytes(path))
    return Shop(root)


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
    """Readers that look again and again: none of them may ever accept a mixture."""

    def __init__(self, shop: Shop, whole: list[Values]):
        self._shop, self._whole = shop, whole
        self._moments: list[tuple[bytes | None, Values]] = []

    def poll(self) -> None:
        """Looks once, each way."""
        found = self._shop.through_manifest()
        assert found is None or found in self._whole
        self._moments.append(self._shop.look())

    def check(self) -> None:
        """Asserts that between the first and the last sight of a `_SUCCESS` its night was whole."""
        marks = [success for success, _ in self._moments]
        for success in set(marks) - {None}:
            first, last = marks.index(success), len(marks) - marks[::-1].index(success)
            named = self._moments[first][1]
            assert named in self._whole
            for _, values in self._moments[first:last]:
                assert values == named
