"""Tells people what lies on disk, and what there is to do about it."""

import datetime as dt
import os
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from feature_jobs.schemas import ITEM_FEATURES, MAIN, TABLES, TRAINING_ROWS, USER_SIMSCORES
from feature_jobs.store import files, partitions
from pipelines.config import Settings
from pipelines.planning.yesterday import stale_days
from pipelines.running import layout, records
from pipelines.running.layout import CHUNK_FOLDER


def collect(settings: Settings) -> dict[str, Any]:
    """Finds what lies below the root of the settings, and what there is to do about it.

    Returns the pins; for each ds its tables and whether its night is whole; days on hold; days that
    are stale, with the day that was made again before them; what is unfinished.
    """
    days: dict[str, dict[str, Any]] = {}
    for table in TABLES.values():
        for ds in layout.published_days(settings.root, settings.feature_set, table):
            folder = layout.table_folder(settings.root, settings.feature_set, table, ds)
            found = partitions.find_published(folder)
            if found is None:
                continue  # it is being replaced just now
            manifest = found.manifest
            entry = {k: manifest[k] for k in ("rows", "version", "run_id", "identities", "notes")}
            entry |= {k: manifest[k] for k in ("clusters", "counts") if k in manifest}
            days.setdefault(str(ds), {})[table.name] = {**entry, "path": folder}
    return {
        "root": settings.root,
        "feature_set": settings.feature_set,
        "pins": [pin.model_dump(mode="json") for pin in settings.pins],
        "days": {
            ds: {
                "whole_night": records.is_whole_night(
                    settings.root, settings.feature_set, dt.date.fromisoformat(ds)
                ),
                "tables": found,
            }
            for ds, found in sorted(days.items())
        },
        "held": {
            str(ds): {
                "since": hold["since"],
                "reason": hold["reason"],
                "rolled_back": records.is_rolled_back(
                    hold, settings.root, settings.feature_set, ds
                ),
            }
            for ds, hold in records.held_days(settings.root, settings.feature_set).items()
        },
        "stale": {ds: str(after) for ds, after in stale_days(settings).items()},
        "staged": [
            run
            for top in (settings.feature_set, "shared")
            for run in _staged(os.path.join(settings.root, "_staging", top))
        ],
    }


def _staged(top: str) -> list[str]:
    """Lists runs that were begun, or made and not published; the next one of ds resumes them.

    A fit of a codebook is none of them: it begins anew.
    """
    return [
        f"{stage} {ds} run {run_id}"
        for stage in files.list_names(top)
        if stage != "fit-codebook"
        for ds in files.list_names(os.path.join(top, stage))
        for run_id in files.list_names(os.path.join(top, stage, ds))
        if not run_id.startswith(CHUNK_FOLDER)
    ]


def render(found: dict[str, Any]) -> str:
    """Returns a table for people: rows by ds and table, then what is to do, then the pins."""
    names = [name for name in TABLES if any(name in d["tables"] for d in found["days"].values())]
    widths = {name: max(len(name), 12) for name in names}
    lines = [f"feature set {found['feature_set']!r} below {found['root']}", ""]
    if not names:
        lines.append("nothing is published yet")
    else:
        heads = "  ".join(name.rjust(widths[name]) for name in names)
        lines.append(f"{'ds':10}  {'night':7}  {heads}")
    for ds, day in found["days"].items():
        rows = "  ".join(
            (f"{day['tables'][n]['rows']:,}" if n in day["tables"] else "-").rjust(widths[n])
            for n in names
        )
        lines.append(f"{ds:10}  {_night_of(day):7}  {rows}")
    lines += _clusters(found["days"])
    lines += [_hold(ds, hold) for ds, hold in found["held"].items()]
    lines += _stale(found)
    lines += [
        f"unfinished: {run} (the same command resumes it)"
        for run in found["staged"]
        if not any(f" ds={ds} " in run for ds in found["held"])
    ]
    for pin in found["pins"]:
        lines.append(
            f"pin from {pin['from_ds']}: encoder {os.path.basename(pin['encoder'])}, codebook "
            f"{os.path.basename(pin['codebook']) if pin['codebook'] else 'none'}"
        )
    return "\n".join(lines)


def _hold(ds: str, hold: Mapping[str, Any]) -> str:
    """Returns what is said of a day on hold, and what there is to do about it."""
    if not hold["rolled_back"]:
        return (
            f"on hold: {ds}, whose rollback has not ended ({hold['reason']}); `courier rollback "
            f"--ds {ds}` goes on with it"
        )
    return (
        f"on hold: {ds}, rolled back at {hold['since']} ({hold['reason']}); `courier rollback --ds "
        f"{ds} --release` lets it be made again"
    )


def _stale(found: Mapping[str, Any]) -> list[str]:
    """Returns a line for each row of days that go on from histories of a day made again.

    A day on hold is passed over: it could not be made.
    """
    lines = []
    rows = groupby(found["stale"].items(), key=lambda pair: (pair[1], pair[0] in found["held"]))
    for (after, is_held), pairs in rows:
        if is_held:
            continue
        row = [ds for ds, _ in pairs]
        scored = all(USER_SIMSCORES.name in found["days"][ds]["tables"] for ds in row)
        command = "simscore" if scored else "histories"  # not all days have what scores need
        lines.append(
            f"stale: {row[0]}, since histories of {after} were made again after it; `courier "
            f"{command} --start-ds {row[0]} --end-ds {row[-1]}` makes them anew"
        )
    return lines


def _clusters(days: Mapping[str, Any]) -> list[str]:
    """Returns how items spread over clusters on the newest day that has them, a line a resolution.

    Each line also tells the share that moved since the day before.
    """
    newest = max(
        (ds for ds, day in days.items() if ITEM_FEATURES.name in day["tables"]), default=""
    )
    if not newest:
        return []
    made = days[newest]["tables"]
    counts = made.get(USER_SIMSCORES.name, {}).get("counts", {})
    lines = []
    for label, c in made[ITEM_FEATURES.name].get("clusters", {}).items():
        moved = _moved("items", c["moved_items"], c["compared_items"])
        if label == MAIN:
            seen = counts.get("moved_impressions", 0), counts.get("compared_impressions", 0)
            moved += _moved("impressions", *seen)
        lines.append(
            f"clusters of {newest}, {label}: {c['used']:,} of {c['clusters']:,} used, perplexity "
            f"{c['perplexity']:,.1f}, largest {c['largest_share']:.1%}, items per cluster "
            f"{c['items_p5']:,.0f} / {c['items_p50']:,.0f} / {c['items_p95']:,.0f} (5, 50, 95 %)"
            f"{moved}"
        )
    return lines


def _moved(what: str, some: int, total: int) -> str:
    return f"; moved {some / total:.1%} of {total:,} {what}" if total else ""


def _night_of(day: dict[str, Any]) -> str:
    """Returns how much of a night is there; training rows are made outside it and begin none."""
    if day["whole_night"]:
        return "whole"
    return "partial" if set(day["tables"]) - {TRAINING_ROWS.name} else "-"
