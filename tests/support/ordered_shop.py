"""Makes the small shop of `any_order` on disk, runs commands on it, and reads what they publish."""

import contextlib
import datetime as dt
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.store import files, partitions
from pipelines import cli
from pipelines.config import Settings, load_settings
from pipelines.running import records
from tests.conftest import Artefacts
from tests.support import stub_nights
from tests.support.any_order import CLOSED, DAYS, ONE_DAY, TABLES, Inputs, Key, Log, Seen
from tests.support.ill_disk import watch_disk
from tests.support.stub_nights import HISTORY_LEN, LATE_DAYS, UNKNOWN_FROM, WINDOW_DAYS, Rows
from tests.support.world import UNKNOWN, picture

_CHANGING = {"replace", "link", "unlink", "rmtree", "makedirs"}
_COMPRESSION = ("zstd", "snappy", "gzip", "none")
_HIDDEN = {"_runs", "_locks", "_backfills", "_staging"}
ITEMS = range(1, 8)
DAYS_KEPT = 3  # of user_simscores


class Killed(BaseException):
    """Stands for a process that ends here, and does nothing more."""


class Shop:
    """Is a shop on disk whose own tables follow `inputs`; it publishes below `root`.

    That is a folder beside its tables, or in a bucket.
    """

    def __init__(
        self, folder: Path, artefacts: Artefacts, inputs: Inputs, root: str = "features",
        features_from: str = "same",
    ):  # fmt: skip
        self.folder, self.inputs = folder, inputs
        self.config = folder / f"{os.path.basename(root)}.toml"
        self.out = self.told = ""
        self._contents: dict[tuple[str, str], Rows] = {}
        self._written: dict[tuple[str, dt.date], object] = {}
        self._drawn = 0
        if not inputs.images:
            self.draw_images()
        self.write_inputs()
        self.config.write_text(
            f'root = "{root}"\nfeature_set = "test"\nhistory_len = {HISTORY_LEN}\n'
            f"window_days = {WINDOW_DAYS}\nlate_days = {LATE_DAYS}\nclosed_days = [{CLOSED}]\n"
            '[catalogue]\npath = "catalogue/ds={ds}/*.parquet"\nimage_roots = ["images"]\n'
            '[impressions]\npath = "impressions/ds={ds}/*.parquet"\n'
            "[embed]\nbatch_size = 4\nchunk_items = 4\n"
            f"[retention]\ndays = {{user_simscores = {DAYS_KEPT}}}\ngrace_hours = 0.0\n"
            "[gates]\nlost_addresses.fail = 1.0\n"
            + "".join(
                f"{name}.fail = 1.0\n"
                for name in ("rejects", "balance", "dead_clusters", "churn", "outage")
            )
            + "cluster_drift.fail = inf\n"
            + (f"[simscore]\nfeatures_from = '{features_from}'\n" * (features_from != "same"))
            + f"[[pins]]\nfrom_ds = {DAYS[0]}\nencoder = '{artefacts.encoder}'\n"
            f"codebook = '{artefacts.codebook}'\n"
        )

    # -- The shop's own tables --

    def write_inputs(self) -> None:
        """Writes those partitions, and the images, that `inputs` has otherwise by now."""
        for ds, catalogue in self.inputs.catalogues.items():
            items, has_image, category = zip(*catalogue.rows, strict=True)
            uris = [
                f"{item}.png" if has else None for item, has in zip(items, has_image, strict=True)
            ]
            rows = {"item_id": items, "image_uri": uris, "category": category}
            table = pa.table(rows, schema=_CATALOGUE)
            self._write("catalogue", ds, catalogue, table, catalogue.encoding)
        for ds, log in self.inputs.logs.items():
            self._write("impressions", ds, log, impressions(ds, log), log.encoding)

    def draw_images(self) -> None:
        """Draws all images anew."""
        folder, self._drawn = self.folder / "images", self._drawn + 1
        folder.mkdir(exist_ok=True)
        for item in ITEMS:
            path = folder / f"{item}.png"
            path.write_bytes(picture(item + len(ITEMS) * self._drawn))
            os.utime(path, ns=(10**18 + self._drawn * 10**9,) * 2)
        self.inputs.images.append({item: stub_nights.image_of(str(folder), item) for item in ITEMS})

    def _write(self, name: str, ds: dt.date, what: object, rows: pa.Table, encoding: int) -> None:
        if self._written.get((name, ds)) == what:
            return
        self._written[name, ds] = what
        path = self.folder / name / f"ds={ds}" / "0.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path, compression=_COMPRESSION[encoding % len(_COMPRESSION)])

    # -- Commands --

    @cached_property
    def settings(self) -> Settings:
        return load_settings(str(self.config))

    @property
    def root(self) -> str:
        return self.settings.root

    def run(self, command: str, *args: object) -> int:
        """Runs a command in this process; returns its status, and keeps what it told in `told`."""
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = cli.main([command, "--config", str(self.config), *map(str, args)])
        self.out, self.told = out.getvalue(), errors.getvalue()
        return status

    def run_killed(self, at: int, command: str, *args: object) -> int | None:
        """Runs a command that dies ahead of its `at`-th change of the disk; None where it does."""
        with dying(at), contextlib.suppress(Killed):
            return self.run(command, *args)
        return None

    # -- Reading --

    def seen(self) -> dict[Key, Seen]:
        """Returns what readers find through each manifest that is open."""
        layout, found = self.settings.layout, {}
        for name, kind in TABLES.items():
            (table,) = (table for table in kind.tables if table.name == name)
            for ds in DAYS:
                if partition := partitions.find_published(layout.folder(table, ds)):
                    found[name, ds] = self._seen(name, partition)
        return found

    def _seen(self, name: str, partition: partitions.Partition) -> Seen:
        data, digests = read_listed(partition)
        parts = [name for name in files.list_names(partition.folder) if name[0] not in "._"]
        assert parts == sorted(file["name"] for file in partition.manifest["files"]), partition
        key = name, "".join(digests)
        if key not in self._contents:
            self._contents[key] = self._content(name, data, digests)
        named = partition.manifest["inputs"].get("snapshots")
        nights = named and tuple(dt.date.fromisoformat(one["ds"]) for one in named)
        before = _before(partition)
        return Seen(partition.version, self._contents[key], before, () if named == [] else nights)

    def _content(self, name: str, data: list[bytes], digests: list[str]) -> Rows:
        return stub_nights.read(name, data)

    def record(self, ds: dt.date) -> dict[str, Any] | None:
        """Returns a night's record."""
        return records.read_night(self.settings.layout, ds)

    def holds(self) -> set[dt.date]:
        """Returns the days on hold."""
        return set(records.held_days(self.settings.layout))

    def digest(self) -> dict[str, bytes]:
        """Returns a digest of each file below the root, but for what runs noted of themselves."""
        found = {}
        for folder, below, names in os.walk(self.root):
            below[:] = [name for name in below if name not in _HIDDEN]
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, self.root)] = hashlib.md5(file.read()).digest()
        return found


def _before(partition: partitions.Partition) -> dt.date | None:
    """Returns the day that a partition says it went on from."""
    inputs = partition.manifest["inputs"]
    if inputs.get("previous"):
        return dt.date.fromisoformat(inputs["previous"]["ds"])
    ds = dt.date.fromisoformat(partition.manifest["ds"])
    return ds - ONE_DAY if inputs.get("histories_before") else None


def read_listed(partition: partitions.Partition) -> tuple[list[bytes], list[str]]:
    """Reads the files that a manifest lists; returns them and their sha256, which it says too."""
    data = [files.read_bytes(path) for path in partition.paths]
    digests = [hashlib.sha256(one).hexdigest() for one in data]
    assert digests == [file["sha256"] for file in partition.manifest["files"]], partition
    return data, digests


class RealShop(Shop):
    """Is a shop whose jobs are real: a content is known by the digests of its files."""

    def _content(self, name: str, data: list[bytes], digests: list[str]) -> Rows:
        return (tuple(digests),)


_CATALOGUE = pa.schema(
    [("item_id", pa.int64()), ("image_uri", pa.string()), ("category", pa.string())]
)


def impressions(ds: dt.date, log: Log) -> pa.Table:
    """Returns the impressions of a day; each says its number in the microseconds of its time."""
    start = dt.datetime.combine(ds, dt.time(), dt.UTC)
    times = [start + dt.timedelta(seconds=n * 7919 % 86_000, microseconds=n) for n in log.numbers]
    return pa.table(
        {
            "user_id": [n % 3 for n in log.numbers],
            "item_id": [UNKNOWN if n >= UNKNOWN_FROM else 1 + n % 4 for n in log.numbers],
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "clicked": [n % 2 == 0 for n in log.numbers],
        }
    )


@contextlib.contextmanager
def dying(at: int) -> Iterator[None]:
    """Makes this process die ahead of its `at`-th change of the disk, and change nothing more."""
    changes, counting = 0, threading.Lock()

    def before(what: str, path: str) -> None:
        nonlocal changes
        with counting:
            changes += what in _CHANGING
            if changes >= at:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        watch_disk(patch, before)
        patch.setattr(threading, "excepthook", lambda _: None)  # of threads that die like that
        yield
