"""Tells people how the last night went, what is next and to be done, and which days are there.

What it costs follows what it prints: of earlier days nothing is read but their names. The days
shown are planned anew, to see what is stale, for which the inputs of each are looked at.
"""

import contextlib
import datetime as dt
import os
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from feature_jobs import inputs
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    MAIN,
    TABLES,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
    GateRefused,
    InputNotReady,
    OperatorError,
)
from feature_jobs.store import files
from feature_jobs.store.documents import read_json
from pipelines.backfill_plan import stale_days
from pipelines.config import Settings
from pipelines.planning.pinned import PinnedArtefacts
from pipelines.running import announcing, records, states
from pipelines.running.layout import Layout, date_of
from pipelines.running.states import NEVER_MADE, Look
from pipelines.stages import KINDS, Kind

DAYS_SHOWN = 14
_ONE_DAY = dt.timedelta(days=1)
# What people call a table in a narrow column.
_SHORT = {
    "item_embeddings": "embeddings", "item_rejects": "rejects", "item_features": "features",
    "user_histories": "histories", "recent_clicks": "recent", "user_simscores": "simscores",
    "training_rows": "training",
}  # fmt: skip


# ---- Finding -----------------------------------------------------------------------------------


def collect(
    settings: Settings, start: dt.date | None = None, end: dt.date | None = None
) -> dict[str, Any]:
    """Finds what lies below the root of the settings, and what there is to do about it.

    Returns the pins; the last night and the next; for each ds from `start` to `end`, of the last
    fourteen where no `start` is given, its tables and whether its night is whole; days on hold;
    those that are stale, with the reasons, by stage; what is unfinished; training sets with all
    their days.
    """
    known = _known_days(settings)
    asked = [day for day in known if (start or day) <= day <= (end or day)]
    shown = asked if start else asked[-DAYS_SHOWN:]
    look = Look()
    days = {str(day): _day(settings, day, look) for day in shown}
    last = max((ds for ds, day in days.items() if _is_begun(day)), default=None)
    return {
        "root": settings.root,
        "feature_set": settings.feature_set,
        "pins": [pin.model_dump(mode="json") for pin in settings.pins],
        "asked": bool(start or end),
        "last": last and {"ds": last, **_last_run(settings, last)},
        "next": None if start or end else _next(settings, last),
        "earlier_days": 0 if start else len(asked) - len(shown),
        "days": days,
        "held": {
            str(ds): {
                "since": hold["since"],
                "reason": hold["reason"],
                "rolled_back": records.is_rolled_back(hold, settings.layout, ds),
            }
            for ds, hold in records.held_days(settings.layout).items()
        },
        "candidates": {
            name: _days_of(settings.layout.of(name)) for name in settings.layout.candidates()
        },
        "stale": {str(ds): day.reasons for ds, day in stale_days(settings, shown).items()},
        "staged": [run for kind in KINDS for run in _staged(settings, kind)],
        "training_sets": {
            table.name.partition("/")[2]: [str(ds) for ds in settings.layout.begun_days(table)]
            for table in settings.layout.training_sets()
        },
    }


def _days_of(candidate: Layout) -> list[str]:
    """Returns the days that a candidate has embedded."""
    return [str(ds) for ds in candidate.begun_days(ITEM_EMBEDDINGS)]


def _known_days(settings: Settings) -> list[dt.date]:
    begun = (settings.layout.begun_days(table) for table in TABLES.values())
    return sorted({day for days in begun for day in days})


def _day(settings: Settings, ds: dt.date, look: Look) -> dict[str, Any]:
    tables = {}
    for table in TABLES.values():
        folder = settings.layout.folder(table, ds)
        found = look.published(folder)
        if found is None:
            continue  # it is not there, or is being replaced just now
        manifest = found.manifest
        entry = {k: manifest[k] for k in ("rows", "version", "run_id", "identities", "notes")}
        entry |= {k: manifest[k] for k in ("clusters", "counts", "gates") if k in manifest}
        tables[table.name] = {**entry, "path": folder}
    record = records.read_night(settings.layout, ds)
    whole = record is not None and records.is_whole(record, settings.layout, look.published)
    return {
        "whole_night": whole,
        "pruned": sorted(record.get("pruned") or ()) if record else [],
        "announced": not (whole and record and announcing.is_due(settings, record)),
        "has_codebook": _has_codebook(settings, ds),
        "tables": tables,
    }


def _has_codebook(settings: Settings, ds: dt.date) -> bool:
    """Returns whether a codebook is pinned for ds."""
    pins = [pin for pin in settings.pins if pin.from_ds <= ds]
    return bool(pins) and max(pins, key=lambda pin: pin.from_ds).codebook is not None


def _is_begun(day: Mapping[str, Any]) -> bool:
    """Returns whether anything of a night is there; training rows are made outside it."""
    return bool(set(day["tables"]) - {TRAINING_ROWS.name})


def _last_run(settings: Settings, ds: str) -> dict[str, Any]:
    """Returns when the last run of ds ended, how long it took, and why it made anything again.

    Empty where no run is noted.
    """
    top = settings.layout.runs_folder(dt.date.fromisoformat(ds))
    paths = [os.path.join(top, run_id, "run.json") for run_id in files.list_names(top)]
    runs = [read_json(path) for path in paths if files.exists(path)]
    newest = max(runs, key=lambda run: _moment(run["ended"]), default=None)
    if newest is None:
        return {}
    ended = _moment(newest["ended"])
    why = {name: stage.get("why", ()) for name, stage in newest["stages"].items()}
    again = {name: list(told) for name, told in why.items() if told and NEVER_MADE not in told}
    return {
        "published": f"{ended:%Y-%m-%d %H:%M} UTC",
        "seconds": round((ended - _moment(newest["started"])).total_seconds(), 1),
        "made_again": again,
    }


def _moment(noted: str | float) -> dt.datetime:
    """Returns a time that a run noted; earlier versions noted seconds since 1970."""
    if isinstance(noted, str):
        return dt.datetime.fromisoformat(noted)
    return dt.datetime.fromtimestamp(noted, dt.UTC)


def _next(settings: Settings, last: str | None) -> dict[str, Any] | None:
    """Returns the day after the last night, and which tables of the shop it waits for."""
    if last is None:
        return None
    ds = dt.date.fromisoformat(last) + _ONE_DAY
    used, waits = set[str]().union(*(kind.uses for kind in settings.night)), []
    for name, (template, require_success) in _inputs_of(settings, ds, used).items():
        closed = ds in settings.closed_days
        try:
            inputs.find_files(name, template, ds, require_success, closed)
        except InputNotReady:
            waits.append(name)
        except (DataContractError, OperatorError):  # which `courier refresh` will tell
            waits.append(f"{name} (refused as they are)")
    return {"ds": str(ds), "waits_for": waits}


def _inputs_of(
    settings: Settings, ds: dt.date, used: Collection[str]
) -> dict[str, tuple[str, bool]]:
    """Returns the template of each table that a night reads, and whether it needs a _SUCCESS."""
    sections = {"catalogue": settings.catalogue, "impressions": settings.impressions}
    found = {
        name: (section.path, section.require_success)
        for name, section in sections.items()
        if section is not None and name in used
    }
    with contextlib.suppress(OperatorError):  # of a pin, which `courier refresh` will tell
        source = PinnedArtefacts(settings, ds).encoder.vectors
        if source is not None:
            found["vectors"] = settings.full_template(source.path), source.require_success
    return found


def _staged(settings: Settings, kind: Kind) -> list[dict[str, Any]]:
    """Lists runs that were begun, or made and not published; the next one of ds resumes them.

    A fit of a codebook is none of them: it begins anew.
    """
    found, top = [], settings.layout.kind_folder(kind)
    for name in files.list_names(top):
        if not (ds := name.startswith("ds=") and date_of(name)):
            continue  # what jobs share
        for run_id in files.list_names(os.path.join(top, name)):
            staging = os.path.join(top, name, run_id)
            run = {"stage": kind.name, "ds": str(ds), "run_id": run_id}
            if refusal := states.refusal(staging):
                run |= {"refused": str(refusal), "gates": refusal.table}
            found.append({**run, "why": states.reasons(staging)})
    return found


def check_day(found: Mapping[str, Any], ds: dt.date) -> None:
    """Raises for a night of ds that is not whole, by what `collect` found of it.

    Raises GateRefused where it is on hold or was refused, else InputNotReady.
    """
    if hold := found["held"].get(str(ds)):
        raise GateRefused(f"ds {ds} is on hold: {hold['reason']}.")
    day = found["days"].get(str(ds))
    if day and day["whole_night"]:
        return
    refused = [run for run in found["staged"] if run["ds"] == str(ds) and "refused" in run]
    if refused:
        raise GateRefused(refused[-1]["refused"], refused[-1]["gates"])
    told = _night_of(day) if day and _is_begun(day) else "not there"
    raise InputNotReady(f"The night of ds {ds} is {told}. `courier refresh --ds {ds}` makes it.")


# ---- Telling -----------------------------------------------------------------------------------


def render(found: Mapping[str, Any], tables: bool = False) -> str:
    """Returns what people read: the last night, what is next and to do, days, then the pins.

    With `tables` each day has a line, with the rows of its tables, and each training set one with
    its days. No line has more than 100
    columns, but for a command or a path that is longer.
    """
    days, last, following = found["days"], found["last"], found["next"]
    told = [] if days else [f"nothing is published {'of that' if found['asked'] else 'yet'}"]
    told += (
        [
            _last(last, days[last["ds"]], last["ds"] in found["held"]),
            *_gates(last["ds"], days[last["ds"]]),
            *_clusters(days),
        ]
        if last
        else []
    )
    told += [_following(following)] if following else []
    told += [_hold(ds, hold) for ds, hold in found["held"].items()]
    told += _stale(found)
    told += [
        f"candidate: {name} holds the embeddings of {len(days)} days, {days[0]} to {days[-1]}; "
        "once nights of that encoder are whole it may be deleted"
        for name, days in found["candidates"].items()
        if days
    ]
    unfinished = [run for run in found["staged"] if run["ds"] not in found["held"]]
    told += [line for run in unfinished for line in (_unfinished(run), *_table_of(run))]
    listed = _rows(days) if tables else _compact(days)
    if found["earlier_days"]:
        listed.append(f"{found['earlier_days']:,} earlier days: --start-ds shows them")
    pins = [
        f"pin from {pin['from_ds']}: encoder {os.path.basename(pin['encoder'])}, codebook "
        f"{os.path.basename(pin['codebook']) if pin['codebook'] else 'none'}"
        for pin in found["pins"]
    ]
    sets = [
        f"training set {name}: {len(days):,} {'day' if len(days) == 1 else 'days'}, {_row(days)}"
        for name, days in found["training_sets"].items()
        if tables and days
    ]
    blocks = [
        [f"feature set {found['feature_set']!r} below {found['root']}"],
        [_wrapped(text) for text in told],
        listed if days else [],
        sets,
        [_wrapped(text) for text in pins],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _wrapped(text: str) -> str:
    """Breaks a text into lines, but no command in it."""
    whole = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        whole, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\0", " ")


def _last(last: Mapping[str, Any], day: Mapping[str, Any], is_held: bool) -> str:
    """Returns how the last night went."""
    tables = day["tables"]
    told = [_night_of(day)]
    if "published" in last:
        told.append(f"published {last['published']}, in {last['seconds']:,.1f} s")
        told += [f"{k} made again: {', '.join(why)}" for k, why in last["made_again"].items()]
    if features := tables.get(ITEM_FEATURES.name):
        counts = features["counts"]
        clustered = counts["items_with_cluster"]
        told.append(f"{counts['items']:,} items, {clustered:,} of them clustered")
    if scores := tables.get(USER_SIMSCORES.name):
        counts = scores["counts"]
        share = 1 - counts.get("without_history", 0) / max(1, counts["impressions"])
        told.append(f"{counts['impressions']:,} impressions, {share:.1%} with a history")
    if not day["announced"]:
        again = f"`courier {'rollback' if is_held else 'refresh'} --ds {last['ds']}` calls it"
        told.append(f"on_published has not ended well for it yet: {again}")
    return f"newest night: {last['ds']}, " + "; ".join(told)


def _gates(ds: str, day: Mapping[str, Any]) -> list[str]:
    """Returns what gates had to say of a night that is published."""
    found = [gate for table in day["tables"].values() for gate in table.get("gates", ())]
    return [
        f"of ds {ds}, {gate['text']}" + (f": {gate['reason']}" if "reason" in gate else "")
        for gate in found
    ]


def _following(following: Mapping[str, Any]) -> str:
    ds, waits = following["ds"], following["waits_for"]
    if waits:
        return f"next: {ds}, which waits for {' and '.join(waits)}"
    return f"next: {ds}, whose inputs are there; `courier refresh --ds {ds}` makes it"


def _unfinished(run: Mapping[str, Any]) -> str:
    why = f" ({'; '.join(run['why'])})" if run["why"] else ""
    named = f"{run['stage']} {run['ds']} run {run['run_id']}{why}"
    if "refused" in run:
        return f"refused: {named}: {run['refused']}"
    return f"unfinished: {named} (the same command resumes it)"


def _table_of(run: Mapping[str, Any]) -> list[str]:
    """Returns the table of the gates that refuse a run, if any do."""
    return [f"  {line}" for line in run.get("gates", "").splitlines()]


def _compact(days: Mapping[str, Any]) -> list[str]:
    """Returns a line for each row of days that are alike."""
    lines = []
    for told, row in groupby(days, key=lambda ds: _told_of(days[ds])):
        lines.append(f"{_row([*row]):24}  {told}")
    return lines


def _row(days: Sequence[str]) -> str:
    """Returns the first and the last of ascending days, as people read it."""
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _told_of(day: Mapping[str, Any]) -> str:
    told = _night_of(day) if _is_begun(day) else ""
    trained = "training rows" if TRAINING_ROWS.name in day["tables"] else ""
    return ", ".join(filter(None, (told, trained))) or "nothing whole"


def _night_of(day: Mapping[str, Any]) -> str:
    """Returns how much of a night is there."""
    if day["whole_night"]:
        pruned = f", but for {', '.join(day['pruned'])}, pruned" if day["pruned"] else ""
        return f"whole{pruned}"
    why = "" if day["has_codebook"] else " (no codebook is pinned for it)"
    return f"not whole: {_stages(day)}{why}"


def _stages(day: Mapping[str, Any]) -> str:
    """Returns which stages of a night are there."""
    made = {
        "embeddings": ITEM_EMBEDDINGS, "item features": ITEM_FEATURES,
        "histories": USER_HISTORIES, "SimScores": USER_SIMSCORES,
    }  # fmt: skip
    return ", ".join(name for name, table in made.items() if table.name in day["tables"])


def _rows(days: Mapping[str, Any]) -> list[str]:
    """Returns the rows of each table of each day, in at most 100 columns."""
    heads = "".join(short.rjust(11) for short in _SHORT.values())
    lines = [f"{'ds':10}  {'night':7}{heads}"]
    for ds, day in days.items():
        night = "whole" if day["whole_night"] else "partial" if _is_begun(day) else "-"
        rows = "".join(_number(day["tables"].get(name)).rjust(11) for name in _SHORT)
        lines.append(f"{ds:10}  {night:7}{rows}")
    return lines


def _number(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    rows = entry["rows"]
    return f"{rows:,}" if rows < 10**8 else f"{rows / 1e6:,.1f} M"


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
    """Returns a line for each row of days that are stale alike, and what to do about it."""
    stale = found["stale"]
    if not stale:
        return []
    lines = []
    for why, row in groupby(stale, key=lambda ds: stale[ds]):
        days = _row([*row])
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
        lines.append(f"stale: {days} ({told})")
    ends = f"--start-ds {min(stale)} --end-ds {max(stale)}"
    return [*lines, f"`courier backfill --cascade {ends}` makes anew what is stale"]


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
