"""Calls the shop's own command, `on_published` in the settings, for each night that is published.

It is called when all tables and the record of a night stand, at least once for each set of
versions: a command that failed, or a run that died before it had ended, leaves the night to the
next run. What it needs is in its environment.
"""

import datetime as dt
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from feature_jobs.schemas import CourierError
from feature_jobs.store import files
from feature_jobs.store.documents import parse_json, write_json
from pipelines.config import Settings
from pipelines.running import records
from pipelines.running.layout import Layout

_SHOWN = 2000  # of the bytes of what a command had said, the last ones


def is_due(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Returns whether the night of a record is still to be announced.

    One that lost a table since, which was pruned, is not.
    """
    if not settings.on_published:
        return False
    path = settings.layout.announced_path(dt.date.fromisoformat(record["ds"]))
    found = files.read_if_there(path)
    return found is None or not _versions(record).items() <= parse_json(path, found).items()


def announce(
    settings: Settings, ds: dt.date, say: Callable[[str], None], again: str = "refresh"
) -> None:
    """Calls the command for the night of ds, where that is whole and is still to be announced.

    No lock is held meanwhile: of two runs both may call it. Raises CourierError where the command
    cannot be started or fails, which `courier <again>` mends; the night stays published.
    """
    layout = settings.layout
    record = records.read_night(layout, ds) if settings.on_published else None
    if record is None or not records.is_whole(record, layout) or not is_due(settings, record):
        return
    command, told = list(settings.on_published), {**os.environ, **environment(record, layout)}
    try:
        status, said = _run(command, told)
    except OSError as error:
        raise _failed(ds, command, f"could not be started ({error})", again) from error
    if status:
        how = f"ended with status {status}{f': {said}' if said else ''}"
        raise _failed(ds, command, how, again)
    if said:
        say(said)
    write_json(layout.announced_path(ds), _versions(record))


def _run(command: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Returns how a command ended, and the end of what it said.

    That goes to a file, not a pipe, which what it left running would keep open.
    """
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=said,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        said.seek(max(0, said.seek(0, os.SEEK_END) - _SHOWN))
        return done.returncode, said.read().decode(errors="replace").strip()


def environment(record: Mapping[str, Any], layout: Layout) -> dict[str, str]:
    """Returns what the command is told of a night: its ds, and paths and versions of all tables."""
    told = {"COURIER_DS": record["ds"], "COURIER_FEATURE_SET": layout.feature_set}
    for name, version in _versions(record).items():
        told[f"COURIER_PATH_{name.upper()}"] = records.folder_of(record, name, layout)
        told[f"COURIER_VERSION_{name.upper()}"] = version
    return told


def _versions(record: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["version"] for name, entry in record["tables"].items()}


def _failed(ds: dt.date, command: list[str], how: str, again: str) -> CourierError:
    return CourierError(
        f"The night of ds {ds} is published, but whoever waits for it was not told: the command "
        f"on_published, {' '.join(command)}, {how.rstrip('.')}. Its tables stand. Mend what "
        f"failed; `courier {again} --ds {ds}` calls the command again and changes no table."
    )
