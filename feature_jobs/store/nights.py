"""Says where the records of nights lie, and what readers find in them.

A night's *record* names the version of each table that together are the night of a ds.
`latest.json`, beside the records, says the same of the newest night, so that one read tells which
that is and where its tables lie.
"""

import datetime as dt
import os
import re
from collections.abc import Mapping
from typing import Any

from feature_jobs.schemas import TABLES, TRAINING_ROWS, DataContractError
from feature_jobs.store import files
from feature_jobs.store.documents import digest, parse_json

# Those that a night can have: rows for training are made now and then, and are in no record.
NIGHT_TABLES = tuple(name for name in TABLES if name != TRAINING_ROWS.name)

_TO_READERS = ("ds", "feature_set", "published_at", "tables")
_OF_A_TABLE = {"path", "version", "rows"}


def _folder(root: str, feature_set: str) -> str:
    return os.path.join(root, feature_set, "_nights")


def record_path(root: str, feature_set: str, ds: dt.date) -> str:
    """Returns where the record of a night lies."""
    return os.path.join(_folder(root, feature_set), f"ds={ds}.json")


def latest_path(root: str, feature_set: str) -> str:
    """Returns where it is written which night is the newest."""
    return os.path.join(_folder(root, feature_set), "latest.json")


def recorded_days(root: str, feature_set: str) -> list[dt.date]:
    """Returns the ds of all nights that have a record, ascending."""
    names = files.list_names(_folder(root, feature_set))
    return [day for day in map(_day_of, names) if day]


def _day_of(name: str) -> dt.date | None:
    """Returns the day of a record by its name; None for what else lies there."""
    found = re.fullmatch(r"ds=(\d{4}-\d\d-\d\d)\.json", name)
    try:
        return dt.date.fromisoformat(found[1]) if found else None
    except ValueError:
        return None


def feature_sets(root: str) -> list[str]:
    """Returns the feature sets that have published a night below `root`, sorted."""
    names = [name for name in files.list_names(root) if name[0] != "_"]
    return [name for name in names if files.list_names(_folder(root, name))]


def parse_record(path: str, data: bytes) -> dict[str, Any]:
    """Returns what a record, or `latest.json`, says; raises DataContractError where it is none."""
    found = parse_json(path, data)
    if is_record(found):
        return {"published_at": None, **found}  # earlier versions of COURIER did not note it
    raise DataContractError(
        f"{path} should say of a night its ds, its feature_set, the time at which it was published "
        f"and, of each of its tables, {', '.join(sorted(_OF_A_TABLE))}, and does not, so that "
        "nobody can tell which versions belong together. It was written by COURIER and has since "
        "been damaged: restore it, or delete that file, and run the command again."
    )


def is_record(found: Any) -> bool:
    """Returns whether a document is a night's record, with the one before where it has that."""
    return (
        isinstance(found, dict)
        and _day_of(f"ds={found.get('ds')}.json") is not None
        and isinstance(found.get("feature_set"), str)
        and (found.get("before") is None or is_record(found["before"]))
        and _is_time(found.get("published_at"))
        and isinstance(tables := found.get("tables"), dict)
        and all(map(_is_entry, tables.values()))
        and isinstance(pruned := found.get("pruned", {}), dict)
        and all(isinstance(at, str) for at in pruned.values())
    )


def _is_time(at: Any) -> bool:
    """Returns whether `at` is a time with its offset from UTC, or None: it was not noted."""
    try:
        return at is None or dt.datetime.fromisoformat(at).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() >= _OF_A_TABLE
        and all(isinstance(entry[name], str) for name in ("path", "version"))
    )


def latest_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `latest.json` says where a record is that of the newest night.

    It has a digest of the whole record: of two that name the same versions, such as one that was
    rolled back to, each has a `latest.json` of its own, and none comes twice.
    """
    return {**{name: record[name] for name in _TO_READERS}, "record": digest(record)}


def stands(latest: Mapping[str, Any] | None, record: Mapping[str, Any]) -> bool:
    """Returns whether `latest.json` needs no change for a record: it names that, or a later day."""
    return latest is not None and (latest["ds"] > record["ds"] or latest == latest_of(record))
