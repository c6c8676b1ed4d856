"""Brings the night back that was published before the present one, and holds the day there.

A rolled-back day stays so: the *hold* that a rollback writes first keeps every later run, such as a
scheduler's retry, from publishing what was rejected. It names the versions that are to come back,
so that the command can be killed anywhere and typed again, and never goes the other way.
"""

import contextlib
import datetime as dt
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from feature_jobs.schemas import TABLES, DataContractError, OperatorError, Table
from feature_jobs.store import files, nights, partitions
from feature_jobs.store.documents import parse_json, to_json, write_json
from feature_jobs.store.partitions import MANIFEST, STAGED
from pipelines.config import Settings
from pipelines.running import locks, records
from pipelines.running.layout import Place
from pipelines.running.locks import Locks
from pipelines.running.publishing import publication, renew_latest, superseded, write_record
from pipelines.stages import kind_of

_AT_ONCE = 16


@dataclass(frozen=True)
class Version:
    """Describes a version that comes back, as it lies there.

    `paths` are its files by name, `replaces` is the manifest that stands in its place.
    """

    table: Table
    place: Place
    manifest: Mapping[str, Any]
    paths: Mapping[str, str]
    replaces: bytes | None

    @property
    def name(self) -> str:
        """Returns the version's own name, a digest."""
        return str(self.manifest["version"])


@dataclass(frozen=True)
class Rollback:
    """Holds what a rollback will do, found out before any of it is done."""

    settings: Settings
    ds: dt.date
    reason: str
    record: dict[str, Any]  # of the night that comes back
    replaces: bytes | None  # the record that stands there now
    versions: tuple[Version, ...]
    hold: dict[str, Any] | None  # that stands there already


# ---- Planning ----------------------------------------------------------------------------------


def plan_rollback(settings: Settings, ds: dt.date, reason: str) -> Rollback:
    """Finds the night that comes back, and reads all of its files: each must be what it was.

    A day that is on hold goes to the versions that its hold names. Raises OperatorError where
    there is no earlier night or a version of it is not kept any more, DataContractError where a
    file of it is damaged; nothing has changed then.
    """
    layout = settings.layout
    path = layout.night_path(ds)
    found = files.read_if_there(path)
    record = nights.parse_record(path, found) if found else None
    hold = records.read_hold(layout, ds)
    if hold:
        wanted = hold["record"]
    elif record and records.own_tables_stand(record, layout):
        wanted = _turned(record)
    else:  # a publication that was never finished: back to the night that it would have replaced
        wanted = record
    if not wanted:
        raise OperatorError(
            f"There is no earlier night of ds {ds} to bring back: it was published once, or not "
            "at all, or tables of it were pruned. What is published stays as it is."
        )
    own = records.own_versions(wanted)
    versions = tuple(_find(settings, ds, TABLES[name], version) for name, version in own.items())
    reason = hold["reason"] if hold else reason
    return Rollback(settings, ds, reason, wanted, found, versions, hold)


def _turned(record: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the record of the night before, with the present one as the one before that.

    Tables that other feature sets share stay as they are.
    """
    if not record["before"]:
        return None
    own = {k: v for k, v in record["before"]["tables"].items() if not TABLES[k].shared}
    return {
        **record["before"],
        "tables": {**record["tables"], **own},
        "before": {**record, "before": None},
    }


def _find(settings: Settings, ds: dt.date, table: Table, version: str) -> Version:
    """Returns a version as it lies there, published, kept, or half put away; looks at all files."""
    place = settings.layout.place(table, ds)
    found = files.read_if_there(os.path.join(place.folder, MANIFEST))
    kept = os.path.join(place.kept, version)
    for data in (files.read_if_there(os.path.join(kept, MANIFEST)), found):
        if data and (manifest := parse_json(kept, data))["version"] == version:
            break
    else:
        raise OperatorError(
            f"The version {version} of {table.name} of ds {ds}, which the night before consists "
            f"of, is not kept any more: there is no {kept}. What is published stays as it is."
        )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        paths = pool.map(lambda file: _intact(file, (kept, place.folder)), manifest["files"])
        return Version(table, place, manifest, dict(paths), found)


def _intact(file: Mapping[str, Any], folders: tuple[str, ...]) -> tuple[str, str]:
    """Returns the name of a file and where it lies whole; raises DataContractError if nowhere."""
    damaged = ""
    for folder in folders:
        path = os.path.join(folder, file["name"])
        with contextlib.suppress(FileNotFoundError):
            if files.stat(path).size == file["bytes"] and files.sha256(path) == file["sha256"]:
                return file["name"], path
            damaged = f" (at {path} there is another content)"
    raise DataContractError(
        f"{file['name']} of the night before is missing or damaged below {folders[0]}{damaged}. "
        "Bringing that night back would lose rows, so what is published stays as it is. Restore "
        "the file, or make the day again with `courier refresh`."
    )


# ---- Doing -------------------------------------------------------------------------------------


def roll_back(
    settings: Settings, ds: dt.date, reason: str, dry_run: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Brings the night before back and holds the day; returns what is told of it.

    Raises as `plan_rollback` does, and CourierError where another run is at the same tables.
    """
    if done := _done_before(settings, ds):
        return done
    if dry_run:
        plan = plan_rollback(settings, ds, reason)
        return _told(settings, ds, "would be published again", plan.reason, plan.record)
    with _holding(settings, ds, say) as held:
        if done := _done_before(settings, ds):
            return done
        plan = plan_rollback(settings, ds, reason)
        carry_out(plan, held, dt.datetime.now(dt.UTC))
    return _told(settings, ds, "is published again", plan.reason, plan.record)


def _holding(
    settings: Settings, ds: dt.date, say: Callable[[str], None]
) -> AbstractContextManager[Locks]:
    own = [table for table in TABLES.values() if not table.shared]
    return locks.holding(settings.layout.lock_folders(own, [ds]), say)


def _done_before(settings: Settings, ds: dt.date) -> dict[str, Any] | None:
    """Returns what is told where an earlier rollback of the day did it all, else None."""
    hold = records.read_hold(settings.layout, ds)
    if not hold or not records.is_rolled_back(hold, settings.layout, ds):
        return None
    return _told(settings, ds, "is rolled back already", hold["reason"], hold["record"])


def carry_out(plan: Rollback, held: Locks, now: dt.datetime) -> None:
    """Does what was planned: hold, record, tables, then `latest.json`; the hold begins `now`.

    The record changes before the tables: until every table is what it names, the night is "not
    ready", and the same command goes on after a kill. Each file is written anew, since another
    writer may be about to delete the one it saw.
    """
    layout, ds = plan.settings.layout, plan.ds
    hold = layout.hold_path(ds)
    since = plan.hold["since"] if plan.hold else now.isoformat(timespec="seconds")
    if plan.hold is None:
        told = {"ds": str(ds), "since": since, "reason": plan.reason, "record": plan.record}
        write_record(hold, to_json(told), None, held)
    # The time makes it another record than any before: a writer that waits with its own finds out.
    record = to_json({**plan.record, "rolled_back": since})
    held.check()
    try:
        files.write_if_unchanged(layout.night_path(ds), record, plan.replaces)
    except files.Changed as error:
        if plan.hold is None:  # it would name a night that is not the one before any more
            files.delete(hold)
        raise superseded(layout.night_path(ds)) from error
    for version in plan.versions:
        _bring_back(plan.settings, ds, version, held)
    renew_latest(layout, held)


def _bring_back(settings: Settings, ds: dt.date, version: Version, held: Locks) -> None:
    """Publishes a version again, from copies of its files; then deletes what runs of ds staged."""
    kind, name = kind_of(version.table), f"rollback-{version.name}"
    run = settings.layout.staging(kind, ds, name)
    if partitions.published_version(version.place.folder) != version.name:
        _publish_copy(version, os.path.join(run, version.table.name), held)
    top = os.path.dirname(run)
    left = files.list_names(top)
    held.check()
    for name in left:
        files.delete_tree(os.path.join(top, name))


def _publish_copy(version: Version, staged: str, held: Locks) -> None:
    def copy(part: tuple[str, str]) -> None:
        held.check()
        files.link(part[1], os.path.join(staged, part[0]))

    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(copy, version.paths.items()))
        write_json(os.path.join(staged, STAGED), version.manifest)
    except FileNotFoundError as error:  # another rollback of the same day has ended meanwhile
        raise superseded(version.place.folder) from error
    publication(staged, version.place, version.replaces, held).run()


def release(
    settings: Settings, ds: dt.date, dry_run: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Lifts the hold of a day; returns what is told of it.

    Raises OperatorError where the day has none, CourierError where a rollback is at work on it.
    """
    with _holding(settings, ds, say) as held:
        hold = records.read_hold(settings.layout, ds)
        if hold is None:
            raise OperatorError(
                f"ds {ds} of the feature set {settings.layout.feature_set!r} is not on hold, so "
                "that there is nothing to release. `courier status` lists the days that are."
            )
        if not dry_run:
            held.check()
            files.delete(settings.layout.hold_path(ds))
    action = "would be released" if dry_run else "is released"
    return _told(settings, ds, action, hold["reason"], None)


# ---- Telling -----------------------------------------------------------------------------------


def _told(
    settings: Settings, ds: dt.date, action: str, reason: str, record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns what a command says: what it did, and which versions come back."""
    own = records.own_versions(record) if record else {}
    return {
        "ds": str(ds),
        "feature_set": settings.layout.feature_set,
        "action": action,
        "reason": reason,
        "tables": {name: record["tables"][name] for name in own} if record else {},
    }


def render(told: Mapping[str, Any]) -> str:
    """Returns what a rollback or a release says to people."""
    ds, action, reason = told["ds"], told["action"], told["reason"]
    if not told["tables"]:
        return f"ds {ds} {action}; it was on hold: {reason}"
    lines = [
        f"{entry['path']}: version {entry['version']} {action} ({entry['rows']:,} rows)"
        for entry in told["tables"].values()
    ]
    verb = "would be" if action.startswith("would") else "is"
    lines.append(
        f"ds {ds} {verb} on hold ({reason}), until `courier rollback --ds {ds} --release` lets it "
        "be made again"
    )
    return "\n".join(lines)
