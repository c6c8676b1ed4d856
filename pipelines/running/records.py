"""Keeps the records of days: which versions together are a night, and which days are on hold."""

import datetime as dt
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from feature_jobs.schemas import TABLES, DataContractError, GateRefused, OperatorError, Table
from feature_jobs.store import files, nights, partitions
from feature_jobs.store.documents import parse_json
from feature_jobs.store.partitions import Partition
from pipelines.running.layout import Layout, date_of

# ---- Nights ------------------------------------------------------------------------------------


def night_record(
    layout: Layout,
    ds: dt.date,
    parts: Sequence[Partition],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns which version of each table together is the night of ds, and which were before.

    It has what gates had to say of them, which of them were accepted, and since when its own
    versions are there. `before` is the record that stands there now. A night that lost a table,
    which was pruned, is none to go back to.
    """
    entries = {
        p.manifest["table"]: {
            "path": os.path.relpath(p.folder, layout.root_of(TABLES[p.manifest["table"]])),
            "version": p.manifest["version"],
            "run_id": p.run_id,
            "rows": p.rows,
        }
        for p in parts
    }
    record = {
        "ds": str(ds),
        "feature_set": layout.feature_set,
        "published_at": _published_at({"tables": entries}, before),
        "tables": entries,
        "gates": [gate for part in parts for gate in part.manifest.get("gates", ())],
        "before": None,
    }
    if before is None:
        return record
    pruned = {name: at for name, at in before.get("pruned", {}).items() if name not in entries}
    if pruned:
        record["pruned"] = pruned
    if own_versions(before) == own_versions(record):
        # Shared tables alone changed: the way back stays.
        return {**record, "before": before["before"]}
    if "pruned" in before:
        return record
    return {**record, "before": {**before, "before": None}}  # one step back is kept, not all


def _published_at(record: Mapping[str, Any], before: Mapping[str, Any] | None) -> str | None:
    """Returns when the versions of a night's own tables first were one, as far as records tell.

    What was published, brought back or made of shared tables since does not matter: it is from then
    on that a feature could have been read. To the microsecond, as clicks are told.
    """
    while before:
        if own_versions(before) == own_versions(record):
            return before.get("published_at")  # none in those of earlier versions of COURIER
        before = before["before"]
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")


def without_pruned(
    record: Mapping[str, Any], tables: Collection[str], now: dt.datetime
) -> dict[str, Any]:
    """Returns a night's record that names some tables no more, and says when they were pruned.

    There is no way back from it: what it would bring back are parts of two nights.
    """
    pruned = dict.fromkeys(tables, now.isoformat(timespec="seconds"))
    return {
        **record,
        "tables": {name: one for name, one in record["tables"].items() if name not in pruned},
        "pruned": {**record.get("pruned", {}), **pruned},
        "before": None,
    }


def read_night(layout: Layout, ds: dt.date) -> dict[str, Any] | None:
    """Reads the record of a night, whole or not; None where there is none."""
    return _read_record(layout.night_path(ds))


def read_latest(layout: Layout) -> dict[str, Any] | None:
    """Reads which night is the newest, as its record says it; None where that is not written."""
    return _read_record(layout.latest_path)


def is_latest_written(layout: Layout, record: Mapping[str, Any]) -> bool:
    """Returns whether `latest.json`, the last step of a night, names its record or a later day."""
    return nights.stands(read_latest(layout), record)


def _read_record(path: str) -> dict[str, Any] | None:
    data = files.read_if_there(path)
    return None if data is None else nights.parse_record(path, data)


def refuse_other_layout(layout: Layout, table: Table) -> None:
    """Raises OperatorError where the newest night has a table elsewhere than `layout` says.

    To be asked where no day of it is found: else a shop whose settings changed would begin anew
    without a word, and what only the earlier nights know would be lost.
    """
    days = layout.recorded_days()
    record = read_night(layout, days[-1]) if days else None
    if record is None or table.name not in record["tables"]:
        return
    there = record["tables"][table.name]["path"]
    here = os.path.relpath(layout.folder(table, days[-1]), layout.root_of(table))
    below_root = os.path.join(layout.root, there)
    moved = layout.root_of(table) != layout.root and partitions.is_published(below_root)
    if here == there and not moved:
        return
    setting = "[output] user_root" if here == there else "[output] partition"
    raise OperatorError(
        f"{table.name} of ds {days[-1]}, the newest night, was published at {below_root}, but by "
        f"{setting} of these settings it would lie at {layout.folder(table, days[-1])}. Nights "
        "would go on from nothing, as if there had been none before. Set it back, move the folders "
        "of all days to where the settings say, or begin a new feature_set or root."
    )


def is_whole(
    record: Mapping[str, Any],
    layout: Layout,
    find: Callable[[str], Partition | None] = partitions.find_published,
) -> bool:
    """Returns whether every table that a night's record names is published in that version.

    So it is without those that were pruned since, unless all were. `find` finds what is published
    in a folder.
    """
    return bool(record["tables"]) and all(
        (found := find(folder_of(record, name, layout))) and found.version == entry["version"]
        for name, entry in record["tables"].items()
    )


def folder_of(record: Mapping[str, Any], table: str, layout: Layout) -> str:
    """Returns the folder of a table that a night's record names."""
    return os.path.join(layout.root_of(TABLES[table]), record["tables"][table]["path"])


def own_tables_stand(record: Mapping[str, Any], layout: Layout) -> bool:
    """Returns whether the tables that no other feature set shares are what a record names."""
    return all(
        partitions.published_version(folder_of(record, name, layout)) == version
        for name, version in own_versions(record).items()
    )


def own_versions(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the version that a record names of each table that no other feature set shares."""
    return {
        name: entry["version"]
        for name, entry in record["tables"].items()
        if not TABLES[name].shared
    }


# ---- Holds -------------------------------------------------------------------------------------

_OF_A_HOLD = {"since", "reason", "record"}


def read_hold(layout: Layout, ds: dt.date) -> dict[str, Any] | None:
    """Reads the hold of a day: since when, why, which versions; None where it has none.

    Raises DataContractError where it is damaged: nobody can tell then what it holds.
    """
    path = layout.hold_path(ds)
    data = files.read_if_there(path)
    if data is None:
        return None
    hold = parse_json(path, data)
    if isinstance(hold, dict) and hold.keys() >= _OF_A_HOLD and nights.is_record(hold["record"]):
        return hold
    raise DataContractError(
        f"{path} should say since when a day is on hold, the reason, and the record of its night, "
        "and does not, so that nobody can tell what may be published or deleted. It was written by "
        f"`courier rollback` and has since been damaged: restore it, or delete that file, say "
        f"`courier rollback --ds {ds}` if the day is still to be held, and run the command again."
    )


def held_days(layout: Layout) -> dict[dt.date, dict[str, Any]]:
    """Returns the holds of all days that have one, by day."""
    folder = os.path.dirname(layout.hold_path(dt.date.min))
    days = [day for day in map(date_of, files.list_names(folder)) if day]
    found = {day: read_hold(layout, day) for day in days}
    return {day: hold for day, hold in found.items() if hold}


def is_rolled_back(hold: Mapping[str, Any], layout: Layout, ds: dt.date) -> bool:
    """Returns whether the night that a hold names is published and recorded, to the last step."""
    record = read_night(layout, ds)
    return (
        record is not None
        and own_versions(record) == own_versions(hold["record"])
        and own_tables_stand(hold["record"], layout)
        and is_latest_written(layout, record)
    )


def refuse_held(layout: Layout, days: Sequence[dt.date], tables: Sequence[Table]) -> None:
    """Raises GateRefused where `tables` of a day on hold would be published.

    A hold is one feature set's; tables that others share are not held, nor are training sets.
    """
    if all(table.shared or table.name not in TABLES for table in tables):
        return
    for ds in days:
        if hold := read_hold(layout, ds):
            raise GateRefused(
                f"ds {ds} of the feature set {layout.feature_set!r} is on hold: its night was "
                f"rolled back at {hold['since']} ({hold['reason']}), and nothing may publish over "
                f"it until it is released. Say `courier rollback --ds {ds} --release` once what "
                "was wrong is mended, and run the command again."
            )
