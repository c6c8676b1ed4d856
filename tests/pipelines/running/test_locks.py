"""Locks: by family and day, in one order; those of shared tables are waited for."""

import datetime as dt
import threading
from pathlib import Path

import pytest

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    CourierError,
)
from feature_jobs.store import faults, files, gcs, local
from pipelines.running import locks
from pipelines.running.layout import Layout

ONE, TWO = dt.date(2026, 3, 1), dt.date(2026, 3, 2)


def test_locks_are_taken_by_family_and_day_and_those_of_shared_tables_lie_below_shared() -> None:
    layout = Layout("/root", "test", "/root")
    tables = [ITEM_FEATURES, USER_SIMSCORES, USER_HISTORIES, ITEM_EMBEDDINGS]
    assert layout.lock_folders(tables, [TWO, ONE]) == [
        "/root/test/_locks/items/ds=2026-03-01",
        "/root/test/_locks/items/ds=2026-03-02",
        "/root/shared/_locks/impressions/ds=2026-03-01",
        "/root/test/_locks/impressions/ds=2026-03-01",
        "/root/shared/_locks/impressions/ds=2026-03-02",
        "/root/test/_locks/impressions/ds=2026-03-02",
    ]
    assert layout.lock_folders([TRAINING_ROWS], [ONE]) == [
        "/root/shared/_locks/training/ds=2026-03-01"
    ]


def folders(root: Path, feature_set: str, ds: dt.date) -> list[str]:
    layout = Layout(str(root), feature_set, str(root))
    return layout.lock_folders([ITEM_FEATURES, USER_SIMSCORES], [ds])


def test_two_runs_of_the_same_tables_and_day_exclude_each_other(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        locks.holding(folders(tmp_path, "a", ONE), said.append),
        locks.holding(folders(tmp_path, "b", ONE), said.append),
        locks.holding(folders(tmp_path, "a", TWO), said.append),
        pytest.raises(CourierError, match="Another run is writing the same tables") as refused,
        locks.holding(folders(tmp_path, "a", ONE), said.append),
    ):
        pytest.fail("it is held")
    assert refused.value.exit_status == 1
    assert "items/ds=2026-03-01" in str(refused.value)
    assert said == []
    with locks.holding(folders(tmp_path, "a", ONE), said.append):
        pass  # all were given back


def test_shared_tables_are_waited_for_and_that_is_said(tmp_path: Path) -> None:
    shared = Layout(str(tmp_path), "a", str(tmp_path)).lock_folders([USER_HISTORIES], [ONE])
    order: list[str] = []
    waits = threading.Event()

    def say(message: str) -> None:
        order.append(message)
        waits.set()

    def run() -> None:
        with locks.holding(shared, say):
            order.append("second")

    with locks.holding(shared, order.append):
        thread = threading.Thread(target=run)
        thread.start()
        assert waits.wait(30)
        order.append("first")
    thread.join(30)
    assert "another run is at the tables of" in order[0]
    assert order[1:] == ["first", "second"]


def test_locks_of_a_disk_are_asked_as_one_however_many_days_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of publishing asks: the locks of all days would be asked for each day."""
    asked: list[object] = []
    monkeypatch.setattr(local._Kept, "check", lambda kept: asked.append(kept))
    with locks.holding([*folders(tmp_path, "a", ONE), *folders(tmp_path, "a", TWO)], print) as held:
        held.check()
    assert len(asked) == 1


def test_a_lock_in_a_bucket_that_cannot_be_renewed_is_not_relied_upon(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.holding([f"{bucket}/night", f"{bucket}/other"], print) as held:
        held.check()
        monkeypatch.setattr(gcs, "LOCK_FREE_SECONDS", 0.0)
        with pytest.raises(CourierError, match="could not be renewed in time") as lost:
            held.check()
    assert "stopped before it wrote anything more" in str(lost.value)


def test_one_thread_renews_all_locks_of_a_process(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "LOCK_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.01)
    names = [f"{bucket}/{n}" for n in range(4)]
    with locks.holding(names, print):
        at_first = [files.stat(f"{name}/.tmp-lock").generation for name in names]
        assert [thread.name for thread in threading.enumerate()].count("lease-renewal") == 1
        threading.Event().wait(0.5)
        now = [files.stat(f"{name}/.tmp-lock").generation for name in names]
        assert all(a != b for a, b in zip(at_first, now, strict=True))
    assert not any(files.exists(f"{name}/.tmp-lock") for name in names)
