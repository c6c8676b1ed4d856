"""Validates what is published: every law and gate again, whoever made it and whatever came since.

Of each day and each table: `_SUCCESS` names the manifest, the manifest names all files that an
engine would read and no others, and the rows of each keep every law (`validate_parts`); tables fit
each other (`validate_joins`), what they were made from, and the night's record; a sample of scores
is computed again from the shop's own log, as `audit` does. Nothing is written. All that is found is
told: a damaged file ends nothing but its own check.
"""

import datetime as dt
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    TABLES,
    USER_SIMSCORES,
    DataContractError,
    GateRefused,
    InputNotReady,
    Table,
)
from feature_jobs.store import files, threads
from feature_jobs.store.partitions import MANIFEST, STAGED, SUCCESS, Partition
from feature_jobs.store.protocol import is_hidden
from pipelines.config import Settings
from pipelines.reports import audit, audit_joins
from pipelines.reports.validate_joins import Checked, check_joins
from pipelines.reports.validate_manifests import (
    check_latest,
    check_made_from,
    check_manifest,
    check_record,
    parse_manifest,
    pruned_tables,
)
from pipelines.reports.validate_parts import (
    BROKEN,
    NOT_READY,
    REFUSED,
    UNVERIFIED,
    WARNING,
    Finding,
    Part,
    Published,
    check_part,
    command_for,
)
from pipelines.reports.validate_training_sets import check_nights, check_training_set
from pipelines.running import gates, progress, records, states
from pipelines.running.judging import judge_published
from pipelines.running.layout import Layout
from pipelines.running.states import Look
from pipelines.stages import KINDS

_LEVELS = (BROKEN, REFUSED, NOT_READY, WARNING, UNVERIFIED)
_OF_GATES = {gates.FAIL: REFUSED, gates.WARN: WARNING, gates.ACCEPTED: WARNING}


@dataclass
class Day:
    """Holds what was found of a day: its tables, what they took, and what is wrong with them.

    `judged` is what gates say against it, which is among the findings too. It took `seconds`, of
    which `file_seconds` for the files themselves.
    """

    ds: dt.date
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    judged: list[gates.Finding] = field(default_factory=list)
    recomputed: int = 0
    seconds: float = 0.0
    file_seconds: float = 0.0

    @property
    def rows(self) -> int:
        return sum(table["rows"] for table in self.tables.values())

    @property
    def bytes(self) -> int:
        return sum(table["bytes"] for table in self.tables.values())

    @property
    def rate(self) -> float:
        """Returns the megabytes of files that were checked in a second."""
        return self.bytes / 1e6 / max(self.file_seconds, 1e-9)

    def of_level(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def as_json(self) -> dict[str, Any]:
        return {
            "ds": str(self.ds),
            "sound": not any(map(self.of_level, (BROKEN, REFUSED, NOT_READY))),
            "rows": self.rows,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "file_seconds": round(self.file_seconds, 3),
            "mb_per_second": round(self.rate, 1),
            "recomputed_impressions": self.recomputed,
            "tables": self.tables,
            "gates": [gate.as_json() for gate in self.judged],
            "findings": [finding.as_json() for finding in self.findings],
        }


def validate(settings: Settings, days: Sequence[dt.date], fast: bool) -> list[Day]:
    """Validates all that is published of `days`; without checksums where it is to be `fast`.

    Raises OperatorError where the tables lie elsewhere than the settings say.
    """
    if not settings.layout.begun_days(ITEM_EMBEDDINGS):
        records.refuse_other_layout(settings.layout, ITEM_EMBEDDINGS)
    return [_validate_day(settings, ds, fast) for ds in days]


def _validate_day(settings: Settings, ds: dt.date, fast: bool) -> Day:
    started, day, layout = time.monotonic(), Day(ds), settings.layout
    record = files.read_if_there(layout.night_path(ds))
    every = [*TABLES.values(), *layout.training_sets()]
    opened = [_Opened(layout, table, ds) for table in every]
    tables = {one.table.name: one.found for one in opened if one.found}
    night = {name: found for name, found in tables.items() if not found.is_training_set}
    there = pruned_tables(record, layout.night_path(ds))
    pruned = {name: at for name, at in there.items() if name not in tables}
    day.findings += [x for one in opened for x in one.findings if one.table.name not in pruned]
    day.findings += [
        Finding(UNVERIFIED, name, "it was pruned", f"at {at}, as [retention] of the settings says")
        for name, at in pruned.items()
    ]
    if not tables and not day.findings:
        told = f"`courier refresh --ds {ds}` makes it"
        day.findings.append(Finding(NOT_READY, "", "nothing is published of this day", told))
    for found in tables.values():
        day.findings += check_manifest(found, settings, ds)
        if found.is_training_set:
            day.findings += check_training_set(found, ds)
    with ThreadPoolExecutor(threads.budget()) as pool:
        began = time.monotonic()
        checked = _check_files(tables, fast, ds, pool)
        day.file_seconds = time.monotonic() - began
        day.findings += [finding for one in checked.values() for finding in one.part.findings]
        joins = check_joins(checked, pool)
        between = list(_as_far_as_known("the tables were not compared", joins))
    changing = _names_of(day.findings, NOT_READY)
    made_from = check_made_from(tables, layout, changing, pruned)
    between += _as_far_as_known("what the tables were made from was not compared", made_from)
    for found in tables.values():
        if found.is_training_set:
            nights = check_nights(found, layout)
            between += _as_far_as_known("the nights of a training set were not compared", nights)
    between += check_record(record, night, layout, ds, changing)
    between += check_latest(layout, ds)
    between += _recompute(settings, day, checked, _names_of(day.findings + between, BROKEN))
    for found in tables.values():
        if found.is_training_set and not found.is_laid_out:
            broken = _names_of(day.findings, BROKEN)
            between += _join_again(settings, ds, found) if found.name not in broken else ()
    between += judge_again(settings, day) if night else ()
    changed = [one for one in opened if not one.stands()]
    for one in changed:  # what was read of it is of two versions
        day.findings = [x for x in day.findings if x.table != one.table.name] + [one.not_ready]
    is_over = not changed and files.read_if_there(layout.night_path(ds)) == record
    if not is_over or _is_waiting(layout, ds):
        between = [_not_ready(ds, finding) for finding in between]
    day.findings = sorted(day.findings + between, key=lambda found: _LEVELS.index(found.level))
    day.tables = {name: _described(table) for name, table in checked.items()}
    day.seconds = time.monotonic() - started
    return day


def _as_far_as_known(otherwise: str, found: Iterable[Finding]) -> Iterator[Finding]:
    """Yields what is `found`, up to what lies elsewhere or is gone and so cannot be read."""
    try:
        yield from found
    except audit.ILL as error:
        told = f"not all of what they are compared with can be read ({error})"
        yield Finding(UNVERIFIED, "", otherwise, told)


def _is_waiting(layout: Layout, ds: dt.date) -> bool:
    """Returns whether a stage of ds is made, may be published, and has tables that are not yet.

    Tables are published one after another, and each stage's are staged until all of them are.
    """
    for kind in KINDS:
        top = os.path.dirname(layout.staging(kind, ds, "any"))
        for run in (os.path.join(top, name) for name in files.list_names(top)):
            made_in = states.made_in(run)
            staged = (os.path.join(made_in, table.name, STAGED) for table in kind.tables)
            if all(map(files.exists, staged)) and not states.refusal(run):
                return True
    return False


def _not_ready(ds: dt.date, finding: Finding) -> Finding:
    """Returns what is told of tables that do not fit while those of ds are published."""
    if finding.level not in (BROKEN, REFUSED):
        return finding
    return replace(finding, level=NOT_READY, text=f"{finding.text}; {_just_now(ds)}")


def _just_now(ds: dt.date, table: str = "") -> str:
    return (
        f"ds {ds} is being published just now, or a run died at it: ask again, or run "
        f"`{command_for(table, str(ds))}`"
    )


def _names_of(findings: Iterable[Finding], level: str) -> set[str]:
    return {finding.table for finding in findings if finding.level == level}


def _described(checked: Checked) -> dict[str, Any]:
    manifest, part = checked.found.manifest, checked.part
    told = {name: manifest[name] for name in ("version", "run_id")}
    return {"rows": part.rows, "bytes": part.bytes, "files": len(manifest["files"]), **told}


def judge_again(settings: Settings, day: Day) -> Iterator[Finding]:
    """Asks all gates about a day as it is published; only what they say against it is told.

    Each stage is asked about by itself: what one lacks is told, and keeps no other from it.
    """
    look = Look()
    for kind in settings.night:
        try:
            judged = judge_published(settings, day.ds, kind, look)
        except audit.ILL as error:
            what = "what a manifest does not say: " if isinstance(error, KeyError) else ""
            law, told = "its gates were not asked again", f"they judge by {what}{error}"
            told = str(error) if isinstance(error, InputNotReady) else told
            yield Finding(UNVERIFIED, kind.tables[0].name, law, told)
            continue
        against = [one for one in judged if one.level in _OF_GATES]
        day.judged += against
        for one in against:
            yield Finding(_OF_GATES[one.level], "", f"gate {one.name}", _told(one))


def _told(gate: gates.Finding) -> str:
    """Returns what is told of a gate, the value that it saw, and its limits."""
    observed, warn, fail = map(gate.number, (gate.observed, gate.limits.warn, gate.limits.fail))
    if gate.level == gates.ACCEPTED:
        return f"{gate.text} ({observed}), which was accepted"
    return f"{gate.text} ({observed}; it warns at {warn}, and refuses at {fail})"


# ---- Opening -----------------------------------------------------------------------------------


class _Opened:
    """Opens what is published of a table of one ds: `found`, None with `findings` that say why."""

    def __init__(self, layout: Layout, table: Table, ds: dt.date):
        self.table, self._ds = table, ds
        self._folder = layout.folder(table, ds)
        self.found: Published | None = None
        self.findings: list[Finding] = []
        self._success = files.read_if_there(os.path.join(self._folder, SUCCESS))
        path = os.path.join(self._folder, MANIFEST)
        manifest = files.read_if_there(path)
        if manifest is None:
            self._without_manifest()
        elif self._success is None or self._success.strip() != _digest(manifest):
            self.findings.append(self.not_ready)
        else:
            self._parse(path, manifest)

    @property
    def not_ready(self) -> Finding:
        """Returns what is told of a table that has no `_SUCCESS` of its manifest."""
        return Finding(
            NOT_READY, self.table.name, "_SUCCESS does not name the manifest",
            _just_now(self._ds, self.table.name),
        )  # fmt: skip

    def _without_manifest(self) -> None:
        if self._success is not None:
            self._tell("the manifest is not there", f"{self._folder} has a {SUCCESS} alone")
        elif any(not is_hidden(name) for name in files.list_names(self._folder)):
            self.findings.append(self.not_ready)

    def _parse(self, path: str, data: bytes) -> None:
        try:
            manifest = parse_manifest(path, data)
        except DataContractError as error:
            self._tell("the manifest cannot be read", str(error))
            return
        self.found = Published(self.table, Partition(self._folder, manifest))

    def _tell(self, law: str, text: str) -> None:
        self.findings.append(Finding(BROKEN, self.table.name, law, text))

    def stands(self) -> bool:
        """Returns whether what was opened is what is published still."""
        return files.read_if_there(os.path.join(self._folder, SUCCESS)) == self._success


def _digest(manifest: bytes) -> bytes:
    return hashlib.sha256(manifest).hexdigest().encode()


# ---- Files -------------------------------------------------------------------------------------


def _check_files(
    tables: Mapping[str, Published], fast: bool, ds: dt.date, pool: ThreadPoolExecutor
) -> dict[str, Checked]:
    """Checks all files of a day, as many at once as there are cores."""
    todo = [(found, n) for found in tables.values() for n in range(len(found.manifest["files"]))]
    total = sum(found.manifest["files"][n]["bytes"] for found, n in todo)
    parts: dict[str, list[Part]] = {name: [] for name in tables}
    with progress.counting_bytes(f"validate {ds}", total) as add:

        def check(one: tuple[Published, int]) -> Part:
            part = check_part(*one, fast)
            add(part.bytes)
            return part

        for (found, _), part in zip(todo, pool.map(check, todo), strict=True):
            parts[found.name].append(part)
    return {name: Checked(tables[name], Part.together(found)) for name, found in parts.items()}


# ---- A sample, computed again ------------------------------------------------------------------


def _recompute(
    settings: Settings, day: Day, checked: Mapping[str, Checked], broken: set[str]
) -> Iterator[Finding]:
    """Computes the scores of a bucket of users again, where all that they are made of is whole."""
    scores = checked.get(USER_SIMSCORES.name)
    if scores is None or not scores.part.rows or settings.impressions is None:
        return
    found = scores.found
    is_of_ds = found.settings.get("features_from", "same") == "same"
    items = {ITEM_EMBEDDINGS.name, ITEM_FEATURES.name} if is_of_ds else set[str]()
    needed = {USER_SIMSCORES.name} | items
    without = sorted((needed - set(checked)) | (needed & broken))
    if without:
        why = f"{', '.join(without)} cannot be relied on"
    else:
        try:
            report = audit.recompute(settings, day.ds)
        except audit.ILL as error:
            why = f"what they are made from cannot be read any more ({error})"
        else:
            for leak in report.leaks:
                yield found.finding("scores are not what their inputs give", leak)
            unverified = [x.text for x in report.findings if x.level == audit.UNVERIFIED]
            if not unverified:
                day.recomputed = report.impressions
                return
            why = "; ".join(unverified)
    yield found.finding("no score was computed again", why, UNVERIFIED)


def _join_again(settings: Settings, ds: dt.date, found: Published) -> Iterator[Finding]:
    """Joins a bucket of users of a training set again, where all that it is made of is there."""
    try:
        report = audit_joins.recompute_set(settings, ds, found.table)
    except audit.ILL as error:
        why = f"what it is made from cannot be read any more ({error})"
        yield found.finding("no sample was joined again", why, UNVERIFIED)
        return
    for leak in report.leaks:
        yield found.finding("rows are not what their inputs give", leak)
    for one in report.findings:
        if one.level == audit.UNVERIFIED:
            yield found.finding("no sample was joined again", one.text, UNVERIFIED)


# ---- Telling -----------------------------------------------------------------------------------


def render(days: Iterable[Day]) -> str:
    """Writes a line for each day, and below it what is wrong with it."""
    lines = [f"{'ds':10}  {'tables':>6}  {'rows':>15}  {'MB':>11}  {'MB/s':>7}"]
    for day in days:
        rate = f"{day.bytes / 1e6:11,.1f}  {day.rate:7,.1f}"
        lines.append(f"{day.ds}  {len(day.tables):6}  {day.rows:15,}  {rate}  {_summary(day)}")
        for _, alike in groupby(day.findings, key=lambda x: (x.level, x.table, x.law)):
            first, *others = alike
            more = f" (and {len(others):,} more like it)" if others else ""
            where = first.table or "night"
            lines.append(f"  {first.level:10}  {where}: {first.law}: {first.text}{more}")
    return "\n".join(lines)


def _summary(day: Day) -> str:
    counted = Counter(finding.level for finding in day.findings)
    told = [f"{counted[level]:,} {level}" for level in _LEVELS if counted[level]]
    again = f"{day.recomputed:,} impressions scored again" if day.recomputed else ""
    sound = "" if any(counted[level] for level in _LEVELS[:3]) else "sound"
    return ", ".join(filter(None, [sound, *told, again]))


def refuse(days: Sequence[Day]) -> None:
    """Raises for the worst that was found: DataContractError, GateRefused, then InputNotReady."""
    if broken := _all_of(BROKEN, days):
        raise DataContractError(
            f"{_counted(broken, days, 'law is', 'laws are')} broken. The first: "
            f"{_named(*broken[0])}. A model trained on such tables is quietly wrong. "
            f"{_remedy(*broken[0])}"
        )
    if refused := _all_of(REFUSED, days):
        raise GateRefused(
            f"{_counted(refused, days, 'gate', 'gates')} would refuse what is published. The "
            f"first: {_named(*refused[0])}. A model had better not be trained on that. Mend what "
            f"the gate speaks of and make the day again, or {_bring_back(refused[0][0])}.",
            gates.table([one for day in days for one in day.judged if one.level == gates.FAIL]),
        )
    if missing := _all_of(NOT_READY, days):
        raise InputNotReady(
            f"{_counted(missing, days, 'thing', 'things')} cannot be validated yet. The first: "
            f"{_named(*missing[0])}."
        )


# What to do about laws that begin so; `{again}` is the command that makes the day again.
REMEDIES = {
    ("a file ", "the manifest is not there", "the manifest cannot be read"): (
        "What is damaged is made again by `{again} --remake`."
    ),
    ("there is a file too many",): (
        "What the manifest names is right: take the other away, where nobody reads it."
    ),
    ("the file list names other files",): "`{again} --remake` writes the list anew.",
    ("an upstream was made again since",): (
        "A stage was run alone, or a run died: `{again}` makes what follows from it."
    ),
    ("the night's record",): "A stage was run alone, or a run died: `{again}` writes it anew.",
    ("latest.json",): "Delete latest.json: `{again}` writes it anew.",
    ("scores are not what", "rows are not what"): (
        "Make the day again, `{again} --remake`; if it stays, it is a fault of COURIER: please "
        "report it."
    ),
}


def _remedy(ds: dt.date, finding: Finding) -> str:
    again = command_for(finding.table, str(ds))
    for laws, remedy in REMEDIES.items():
        if finding.law.startswith(laws):
            return remedy.format(again=again)
    if "/" in finding.table:  # a training set, which no rollback brings back
        return f"Make it again, `{again} --remake`."
    return f"Make the day again, `{again} --remake --full`, or {_bring_back(ds)}."


def _bring_back(ds: dt.date) -> str:
    return f"bring back what was published of the same day before: `courier rollback --ds {ds}`"


def _all_of(level: str, days: Sequence[Day]) -> list[tuple[dt.date, Finding]]:
    return [(day.ds, finding) for day in days for finding in day.of_level(level)]


def _counted(
    found: Sequence[tuple[dt.date, Finding]], days: Sequence[Day], one: str, many: str
) -> str:
    """Returns where how many findings are, as a sentence begins."""
    number = f"{len(found):,} {one if len(found) == 1 else many}"
    if len(days) == 1:
        return f"Of ds {days[0].ds} {number}"
    return f"Of {len({ds for ds, _ in found}):,} of {len(days):,} days {number}"


def _named(ds: dt.date, finding: Finding) -> str:
    return f"ds {ds}, {finding.table or 'the night'}: {finding.law}: {finding.text}"
