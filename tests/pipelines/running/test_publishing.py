"""Publishing: killed at any point it leaves no mixture, and the next run finishes it."""

import datetime as dt
import hashlib
import json
import os
from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.schemas import (
    CourierError,
    DataContractError,
    InputNotReady,
    StorageUnavailable,
)
from feature_jobs.store import documents, files, partitions, worker_notes
from feature_jobs.store.partitions import MANIFEST, STAGED, SUCCESS
from pipelines.running import making, publishing
from pipelines.running.stage import Stage

STEPS = ("delete", "write_bytes", "link", "move", "delete_tree")


class Killed(Exception):
    """Stands for a process that ends here."""


def stage(folder: Path, values: list[int], shards: int = 2) -> partitions.Partition:
    """A staged partition of `shards` files with the given values."""
    files = []
    for shard in range(shards):
        name = f"part-{shard:05d}-of-{shards:05d}.parquet"
        path = str(folder / name)
        partitions.write_parquet(path, pa.table({"x": values[shard::shards]}))
        data = Path(path).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        files.append(
            {"name": name, "rows": len(values[shard::shards]), "bytes": len(data), "sha256": sha256}
        )
    manifest = {"table": "t", "run_id": "r", "files": files, "counts": {}, "values": values}
    documents.write_json(str(folder / STAGED), manifest)
    return partitions.open_staged(str(folder))


def through_manifest(target: str) -> list[int] | None:
    """What a reader through the manifest gets: sorted values, or None for "ask again"."""
    try:
        manifest = json.loads(files.read_bytes(os.path.join(target, MANIFEST)))
        found = []
        for file in manifest["files"]:
            data = files.read_bytes(os.path.join(target, file["name"]))
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
            found += _values(data)
        return sorted(found)
    except FileNotFoundError:
        return None


def _values(data: bytes) -> list[int]:
    return pq.read_table(pa.BufferReader(data))["x"].to_pylist()


def look(target: str) -> tuple[bytes | None, list[int]]:
    """`_SUCCESS` and the values that a bare glob would read at this moment."""
    path = os.path.join(target, SUCCESS)
    success = files.read_bytes(path) if files.exists(path) else None
    found = [file.path for file in files.glob(os.path.join(target, "*.parquet"))]
    return success, sorted(v for f in found for v in _values(files.read_bytes(f)))


def interrupt(
    monkeypatch: pytest.MonkeyPatch, at: int | None, before_each: Callable[[], None]
) -> list[str]:
    """Makes the `at`-th step of storage raise Killed; calls `before_each` before every step."""
    steps: list[str] = []
    for name in STEPS:
        real = getattr(files, name)

        def step(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            before_each()
            if len(steps) == at:
                raise Killed(f"before {_name}")
            steps.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(files, name, step)
    return steps


def version_of(target: str, which: str = "version") -> str:
    return json.loads(Path(target, MANIFEST).read_text())[which]


OLD, NEW = [1, 2, 3, 4], [5, 6, 7, 8, 9]


def test_a_published_partition_is_what_was_staged(tmp_path: Path) -> None:
    target = str(tmp_path / "t")
    with pytest.raises(InputNotReady, match="No published partition"):
        partitions.open_published(target)
    publishing.publish_partition(stage(tmp_path / "s", OLD), target)
    published = partitions.open_published(target)
    assert through_manifest(target) == OLD
    assert published.manifest["parent_version"] is None
    assert all(published.manifest["version"] in path for path in published.paths)


def test_publishing_the_same_again_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "t"
    publishing.publish_partition(stage(tmp_path / "s", OLD), str(target))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in target.iterdir()}
    assert len(before) == 4
    publishing.publish_partition(stage(tmp_path / "s2", OLD), str(target))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in target.iterdir()} == before


@pytest.mark.parametrize("first", [True, False], ids=["first publication", "re-publication"])
def test_killed_at_any_step_no_reader_accepts_a_mixture_and_the_next_run_finishes(
    tmp_path: Path, first: bool
) -> None:
    killed_at = 0
    while True:
        folder = tmp_path / str(killed_at)
        target = str(folder / "t")
        if not first:
            publishing.publish_partition(stage(folder / "old", OLD), target)
        new = stage(folder / "new", NEW)
        moments = [look(target)]
        with pytest.MonkeyPatch.context() as patch:

            def watch(target: str = target, moments: list[Any] = moments) -> None:
                assert through_manifest(target) in (None, OLD, NEW)
                moments.append(look(target))

            steps = interrupt(patch, killed_at, watch)
            try:
                publishing.publish_partition(new, target)
                ended = True
            except Killed:
                ended = False
        moments.append(look(target))
        check_readers(moments)
        publishing.publish_partition(new, target)  # the next run
        assert through_manifest(target) == NEW
        assert look(target)[1] == NEW
        assert partitions.is_published(target)
        if not first:
            old = version_of(target, "parent_version")
            assert publishing.has_version(target, old)
            publishing.bring_back(target, old)
            assert look(target)[1] == OLD
        if ended:
            break
        killed_at += 1
    assert len(steps) >= 4


def check_readers(moments: list[tuple[bytes | None, list[int]]]) -> None:
    """Whoever reads `_SUCCESS`, then files, then the same `_SUCCESS` has one version whole."""
    accepted = 0
    for before, between, after in combinations_with_replacement(range(len(moments)), 3):
        success = moments[before][0]
        if success is not None and success == moments[after][0]:
            assert moments[between][1] in (OLD, NEW)
            accepted += 1
    assert accepted or moments[0][0] is None


def test_another_version_after_a_kill_leaves_no_file_of_the_one_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "t"
    publishing.publish_partition(stage(tmp_path / "old", OLD), str(target))
    lost = stage(tmp_path / "lost", [0, 0, 0])
    with monkeypatch.context() as patch:
        interrupt(patch, 4, lambda: None)
        with pytest.raises(Killed):
            publishing.publish_partition(lost, str(target))
    assert len(list(target.glob("*.parquet"))) > 2
    publishing.publish_partition(stage(tmp_path / "new", NEW), str(target))
    assert look(str(target))[1] == NEW
    publishing.bring_back(str(target), version_of(str(target), "parent_version"))
    assert look(str(target))[1] == OLD


def test_rolled_back_versions_can_be_brought_back_again(tmp_path: Path) -> None:
    target = str(tmp_path / "t")
    publishing.publish_partition(stage(tmp_path / "old", OLD), target)
    old = version_of(target)
    assert not publishing.has_version(target, "000000000000")
    publishing.publish_partition(stage(tmp_path / "new", NEW), target)
    new = version_of(target)
    for version, expected in ((old, OLD), (new, NEW), (new, NEW), (old, OLD)):
        assert publishing.has_version(target, version)
        publishing.bring_back(target, version)
        assert look(target)[1] == expected
        assert through_manifest(target) == expected


def test_bringing_back_killed_at_any_step_goes_on_and_never_the_other_way(tmp_path: Path) -> None:
    killed_at, ended = 0, False
    while not ended:
        target = str(tmp_path / str(killed_at) / "t")
        publishing.publish_partition(stage(tmp_path / f"{killed_at}-old", OLD), target)
        old = version_of(target)
        publishing.publish_partition(stage(tmp_path / f"{killed_at}-new", NEW), target)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, killed_at, lambda: None)
            try:
                publishing.bring_back(target, old)
                ended = True
            except Killed:
                pass
        publishing.bring_back(target, old)
        assert look(target)[1] == OLD
        assert partitions.is_published(target)
        killed_at += 1
    assert killed_at > 4


def stage_of(root: Path) -> Stage:
    return Stage(
        name="embed", ds=dt.date(2026, 3, 1), root=str(root), feature_set="test", tables=(),
        shards=1, inputs={}, identities={}, settings={}, define=lambda *_: None,
    )  # fmt: skip


AWAY = "gs://b/x could not be reached. Try again."
TRACEBACK = f"""Traceback (most recent call last):
  File "x.py", line 7, in process
feature_jobs.schemas.StorageUnavailable: {AWAY}

During handling of the above exception, another exception occurred:

feature_jobs.schemas.StorageUnavailable: gs://b/errors/y could not be [while running 'ParDo(X)']
"""


@pytest.mark.parametrize("how", ["itself", "cause", "context", "text"])
def test_of_a_job_that_fails_the_error_that_led_to_it_is_told(tmp_path: Path, how: str) -> None:
    def fail(_: Callable) -> None:
        if how == "text":  # of a worker in another process
            raise RuntimeError(TRACEBACK)
        try:
            raise StorageUnavailable(AWAY)
        except StorageUnavailable as error:
            if how == "itself":
                raise
            if how == "cause":
                raise RuntimeError("Beam failed") from error
            raise StorageUnavailable("gs://b/x [while running 'ParDo(X)']")  # noqa: B904

    with pytest.raises(StorageUnavailable) as told:
        making.make([stage_of(tmp_path)], fail)
    assert str(told.value) == AWAY


def test_of_a_job_that_fails_what_was_left_before_is_told(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)

    def leave(_: Callable) -> None:
        left = {"kind": "DataContractError", "message": "two rows of item 3"}
        documents.write_json(f"{stage.staging}/errors/x.json", left)
        raise RuntimeError("Beam failed")

    with pytest.raises(DataContractError, match="two rows of item 3"):
        making.make([stage], leave)


def test_a_job_that_fails_for_another_reason_fails_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Callable) -> None:
        def away(_: str) -> None:
            raise StorageUnavailable(AWAY)

        monkeypatch.setattr(worker_notes, "refused", away)
        raise RuntimeError("Beam failed")

    with pytest.raises(RuntimeError, match="Beam failed"):
        making.make([stage_of(tmp_path)], fail)


def test_two_runs_of_one_feature_set_exclude_each_other(tmp_path: Path) -> None:
    with (
        publishing.exclusive(str(tmp_path), "a"),
        publishing.exclusive(str(tmp_path), "b"),
        pytest.raises(CourierError, match="Another run is writing the feature set 'a'") as caught,
        publishing.exclusive(str(tmp_path), "a"),
    ):
        pass
    assert caught.value.exit_status == 1
