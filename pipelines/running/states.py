"""Finds what of a stage is done already, and why the rest is to be made.

A stage is *published*, or *staged* (made, and not before readers yet), or *begun*, or *absent*;
*published from something else* where its tables are there by another run, *refused* where it is
staged and may not be published, *held* where its day was rolled back on purpose.
"""

import datetime as dt
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feature_jobs.schemas import ITEM_EMBEDDINGS, GateRefused, InputNotReady, Table
from feature_jobs.store import documents, files, partitions
from feature_jobs.store.documents import parse_json, read_json, write_json
from feature_jobs.store.partitions import Partition
from feature_jobs.store.versions import PACKAGE_VERSIONS
from pipelines.config import Settings
from pipelines.running import records
from pipelines.running.layout import Layout
from pipelines.running.stage import Planned, Reference, Stage
from pipelines.stages import NIGHT, Kind

ABSENT, BEGUN, STAGED, PUBLISHED = "absent", "begun", "staged", "published"
OTHER, REFUSED, HELD = "published from something else", "refused", "held"
NEVER_MADE = "never made"

_BEGUN = "begun.json"  # what it is made from; the first file of a staging folder
_PUBLISHING = "publishing.json"  # of a forced stage: its tables may be partly published
_REFUSED = "refused.json"
# What it means where manifests of scores say nothing of these.
_UNSAID = {
    "features_from": "same", "encoder_id": "that of each night", "codebook_id": "that of each night"
}  # fmt: skip
_OF_THE_DAY_BEFORE = ("previous", "histories_before")  # inputs by which a stage goes on from it


@dataclass(frozen=True)
class Reason:
    """Says in words why a stage is to be made; `of` is the table that was made again, if any."""

    text: str
    of: Reference | None = None


@dataclass(frozen=True)
class State:
    """Tells what of a stage is done, by one of the names above.

    `tables` are its partitions where they are made, `reasons` say why it is to be made,
    `shards_done` how many shards a run that ended early has written whole.
    """

    name: str
    tables: tuple[Partition, ...] = ()
    reasons: tuple[Reason, ...] = ()
    shards_done: int = 0

    @property
    def why(self) -> tuple[str, ...]:
        """Returns the reasons in words, as they are told and noted."""
        return tuple(reason.text for reason in self.reasons)

    @property
    def is_made(self) -> bool:
        return bool(self.tables)


class Look:
    """Looks at what lies below a root at one moment: nothing is read, or listed, twice."""

    def __init__(self) -> None:
        self._begun: dict[tuple[Layout, str], list[dt.date]] = {}
        self._published: dict[str, Partition | None] = {}
        self._staged: dict[tuple[str, str], Partition | None] = {}
        self._made_in: dict[str, str] = {}
        self._states: dict[tuple[str, str], State] = {}
        self._made: dict[tuple[str, str], tuple[bool, tuple[Partition, ...]]] = {}
        self._held: dict[tuple[str, str], bool] = {}

    def begun_days(self, layout: Layout, table: Table) -> list[dt.date]:
        """Returns the ds of a table that have a folder, published or not, ascending."""
        key = layout, table.name
        if key not in self._begun:
            self._begun[key] = layout.begun_days(table)
        return self._begun[key]

    def published(self, folder: str) -> Partition | None:
        """Returns what is published in a folder, None for nothing."""
        if folder not in self._published:
            self._published[folder] = partitions.find_published(folder)
        return self._published[folder]

    def staged(self, stage: Stage, table: Table) -> Partition | None:
        """Returns a table that is made and not published yet, None for none."""
        key = stage.staging, table.name
        if key not in self._staged:
            self._staged[key] = partitions.find_staged(os.path.join(self.made_in(stage), key[1]))
        return self._staged[key]

    def made_in(self, stage: Stage) -> str:
        """Returns the folder in which the tables of a stage are made."""
        if stage.staging not in self._made_in:
            self._made_in[stage.staging] = made_in(stage.staging)
        return self._made_in[stage.staging]

    def state(self, stage: Stage) -> State:
        """Finds the state of a stage: all that is known of it is found here."""
        key = stage.name, stage.staging
        if key not in self._states:
            self._states[key] = self._find(stage)
        return self._states[key]

    def _find(self, stage: Stage) -> State:
        is_published, tables = self._tables(stage)
        if is_published:
            return State(PUBLISHED, tables, (Reason(stage.forced_by),) if stage.forced else ())
        reasons = tuple(self._reasons(stage))
        if self._is_held(stage):
            return State(HELD, reasons=reasons)
        if tables and all(self._goes_on_from_now(stage, table) for table in tables):
            return State(REFUSED if refusal(stage.staging) else STAGED, tables, reasons)
        if done := _shards_done(stage, self.made_in(stage)):
            return State(BEGUN, (), reasons, done)
        is_there = any(self.published(stage.folder(table)) for table in stage.tables)
        return State(OTHER if is_there else ABSENT, (), reasons)

    def _tables(self, stage: Stage) -> tuple[bool, tuple[Partition, ...]]:
        """Returns a stage's tables, made from what is upstream now, and whether they are published.

        There are none where they are neither published nor staged.
        """
        key = stage.name, stage.staging
        if key not in self._made:
            made_from = self.made_from(stage)
            published = [self.published(stage.folder(table)) for table in stage.tables]
            mine = [p for p in published if p and _is_mine(p, stage, made_from)]
            if stage.follows:
                mine = [p for p in mine if self.is_followed(stage.before, p)]
            is_published = len(mine) == len(published) and not _is_forced_now(stage)
            if not is_published:
                staged = [self.staged(stage, table) for table in stage.tables]
                mine = [p for p in staged if p and _is_mine(p, stage, made_from) and _is_told(p)]
            whole = len(mine) == len(stage.tables)
            self._made[key] = is_published, tuple(mine) if whole else ()
        return self._made[key]

    def _goes_on_from_now(self, stage: Stage, partition: Partition) -> bool:
        """Returns whether the day before is, in content, what it was for a staged table."""
        then = partition.manifest["made_from"].get("before", {})
        return all(
            (found := self.find(one)) and then.get(one.table.name) == found.version
            for one in stage.before
        )

    def is_followed(self, before: Sequence[Reference], partition: Partition) -> bool:
        """Returns whether embeddings that a partition was made from are, in content, as then.

        They are taken to be where its manifest does not tell, as those of earlier versions.
        """
        then = partition.manifest["made_from"].get("before", {})
        return all(
            (found := self.find(one)) and then.get(one.table.name, found.version) == found.version
            for one in before if one.table is ITEM_EMBEDDINGS
        )  # fmt: skip

    def _is_held(self, stage: Stage) -> bool:
        """Returns whether the day is on hold: tables of its night that no other set shares."""
        if stage.kind.is_shared or stage.kind not in NIGHT:
            return False
        day = stage.layout.feature_set, str(stage.ds)
        if day not in self._held:
            hold = records.read_hold(stage.layout, stage.ds)
            self._held[day] = hold is not None
        return self._held[day]

    def made_from(self, stage: Stage) -> dict[str, Any] | None:
        """Returns the versions of all tables upstream; None where one is not made.

        Those of nights before are its "snapshots", by ds.
        """
        found = [(one, self._tables(one)[1]) for one in stage.upstream]
        nights = [(one, self.find(one)) for one in stage.snapshots]
        if not all(tables for _, tables in found) or not all(there for _, there in nights):
            return None
        snapshots: dict[str, dict[str, str]] = {}
        for one, there in nights:
            if there:
                snapshots.setdefault(str(one.ds), {})[one.table.name] = there.version
        upstream = {
            table.name: partition.version
            for one, tables in found
            for table, partition in zip(one.tables, tables, strict=True)
        }
        return {**upstream, **({"snapshots": snapshots} if "snapshots" in stage.inputs else {})}

    # -- What is made --

    def made(self, stage: Stage) -> tuple[Partition, ...]:
        """Returns a stage's tables, published or staged; raises InputNotReady where they aren't."""
        if found := self._tables(stage)[1]:
            return found
        names = " and ".join(table.name for table in stage.tables)
        raise InputNotReady(
            f"{names} of ds {stage.ds} {'has' if len(stage.tables) == 1 else 'have'} not been made "
            f"from the present inputs and settings (run {stage.run_id}). Run `courier {stage.name} "
            f"--ds {stage.ds}`, or `courier refresh --ds {stage.ds}` for the whole night."
        )

    def table(self, stage: Stage, table: Table) -> Partition:
        """Returns one of a stage's tables; raises InputNotReady where they are not made."""
        return self.made(stage)[stage.tables.index(table)]

    def find(self, reference: Reference) -> Partition | None:
        """Returns the table that a reference names, published or staged; None for neither."""
        if stage := reference.stage:
            _, tables = self._tables(stage)
            return tables[stage.tables.index(reference.table)] if tables else None
        found = self.published(reference.folder)
        return found if found and found.run_id == reference.run_id else None

    def open(self, reference: Reference) -> Partition:
        """Returns the table that a reference names; raises InputNotReady where it is not there."""
        if reference.stage:
            return self.table(reference.stage, reference.table)
        if found := self.find(reference):
            return found
        raise InputNotReady(
            f"{reference.table.name} of ds {reference.ds} is not there any more as run "
            f"{reference.run_id} made it, from which later days go on. Run this command again."
        )

    # -- Why --

    def _reasons(self, stage: Stage) -> Iterator[Reason]:
        """Yields for what reasons a stage is not simply there."""
        found = [self.published(stage.folder(table)) for table in stage.tables]
        made_from = self.made_from(stage)
        if stage.forced:
            yield Reason(stage.forced_by)
        old = next(filter(None, found), None)
        if old is None:
            yield Reason(NEVER_MADE)
            return
        if not all(found):
            missing = (t.name for t, p in zip(stage.tables, found, strict=True) if p is None)
            yield Reason(f"{', '.join(missing)} not published")
        changes = list(_changes(old, stage))
        again = [one for one in stage.upstream if _was_made_again(one, old, made_from)]
        yield from changes
        if not changes:
            yield from (_again(f"upstream {one.name}", one.references()) for one in again)
            yield from _nights_made_again(old, stage, self)
        if not changes and stage.follows:
            yield _again("previous", stage.before)


def _nights_made_again(old: Partition, stage: Stage, look: Look) -> Iterator[Reason]:
    """Yields the nights that are of other content by now, or are to be, under the same run_id."""
    then = old.manifest["made_from"].get("snapshots", {})
    for night, tables in _by_night(stage).items():
        there = {one.table.name: look.find(one) for one in tables}
        now = {name: found.version if found else None for name, found in there.items()}
        if then.get(night) != now:
            yield _again(f"snapshot of ds {night}", tables)


def _nights_changed(
    then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], stage: Stage
) -> Iterator[Reason]:
    """Yields which nights a stage names otherwise than its published tables do."""
    old = {one["ds"]: one for one in then}
    for one in now:
        if one["ds"] not in old:
            yield Reason(f"snapshot of ds {one['ds']} is new")
        elif any(
            one[name] != run_id for name, run_id in old[one["ds"]].items() if name != "from_us"
        ):
            yield _again(f"snapshot of ds {one['ds']}", _by_night(stage).get(one["ds"], []))
    for ds in sorted(old.keys() - {one["ds"] for one in now}):
        yield Reason(f"snapshot of ds {ds} is not taken any more")


def _by_night(stage: Stage) -> dict[str, list[Reference]]:
    found: dict[str, list[Reference]] = {}
    for one in stage.snapshots:
        found.setdefault(str(one.ds), []).append(one)
    return found


def _was_made_again(upstream: Stage, old: Partition, made_from: Mapping[str, Any] | None) -> bool:
    then = old.manifest["made_from"]
    return made_from is None or any(
        then.get(table.name) != made_from.get(table.name) for table in upstream.tables
    )


def _again(what: str, tables: Sequence[Reference]) -> Reason:
    return Reason(f"{what} made again", next(iter(tables), None))


def _changes(old: Partition, stage: Stage) -> Iterator[Reason]:
    """Yields what was otherwise when the partition `old` was made."""
    for what in ("identities", "settings"):
        then, now = old.manifest[what], _as_json(getattr(stage, what))
        for name in dict.fromkeys([*then, *now]):
            if then.get(name) != now.get(name):
                both = [_told(said.get(name, _UNSAID.get(name))) for said in (then, now)]
                yield Reason(f"{name} was {both[0]}, is {both[1]}")
    then, now = old.manifest["inputs"], _as_json(stage.inputs)
    changed = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    for name in changed:
        if name == "snapshots" and name in then and name in now:
            yield from _nights_changed(then[name], now[name], stage)
        elif name != "log_rows" or len(changed) == 1:  # they follow from the log
            yield _input_changed(name, then.get(name), now.get(name), stage)
    shards = old.manifest.get("shards", len(old.manifest["files"]))  # not told by earlier versions
    if shards != stage.shards and old.manifest["inputs"] == now:
        yield Reason(f"it had {shards} shards, has {stage.shards}")


def _input_changed(name: str, then: Any, now: Any, stage: Stage) -> Reason:
    if upstream := next((one for one in stage.upstream if one.run_id == now), None):
        return _again(f"upstream {upstream.name}", upstream.references())
    what = name.replace("_", " ")
    if isinstance(then, dict) and isinstance(now, dict) and then.get("ds") != now.get("ds"):
        return Reason(f"{what} was ds {then.get('ds')}, is ds {now.get('ds')}")
    if then is None or now is None:
        return Reason(f"{what} {'is new' if then is None else 'is gone'}")
    if isinstance(now, dict) and "digest" in now:
        is_read = {k: v for k, v in now.items() if k != "read_as"}
        rewritten = any(then.get(name) != value for name, value in is_read.items())
        return Reason(f"{what} {'rewritten' if rewritten else 'read by other settings'}")
    if isinstance(then, list) and isinstance(now, list):
        days = [str(one["ds"]) for one in now if one not in then]
        gone = [str(one["ds"]) for one in then if one["ds"] not in {n["ds"] for n in now}]
        return Reason(f"{what} changed: {_few([*days, *gone])}")
    return _again(what, stage.before if name in _OF_THE_DAY_BEFORE else ())


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a manifest holds of it: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def _is_mine(partition: Partition, stage: Stage, made_from: Mapping[str, Any] | None) -> bool:
    """Returns whether a partition was made by this run, from what is upstream now.

    Images are in no run_id, so a stage that was made again may hold other content under the same
    one.
    """
    if partition.run_id != stage.run_id or made_from is None:
        return False
    return _is_among(made_from, partition.manifest["made_from"])


def _is_among(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Returns whether all that is said `now` was said `then`; more may have been.

    A night that was taken away is not spoken of any more.
    """
    return all(
        _is_among(said, then.get(name, {})) if isinstance(said, dict) else then.get(name) == said
        for name, said in now.items()
    )


def _is_told(staged: Partition) -> bool:
    """Returns whether a staged partition says all by which gates judge it.

    One that an earlier version of COURIER left does not, and is made again. What is published needs
    no judgement, and stays.
    """
    return staged.manifest.keys() >= {"histograms", "examples"}


def _is_forced_now(stage: Stage) -> bool:
    """Returns whether a forced run is at the stage, so that what is published counts for nothing.

    A forced stage is not published until it has been made and published anew; nor is any while a
    forced run may have published one of two tables that belong together.
    """
    if stage.forced:
        return files.exists(os.path.join(stage.forced_staging, _BEGUN))
    return is_half_published(stage.forced_staging)


def is_half_published(forced_staging: str) -> bool:
    """Returns whether a forced run may have published one of two tables that belong together."""
    return files.exists(os.path.join(forced_staging, _PUBLISHING))


# ---- A night -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Night:
    """Holds the stages of one ds that were asked for, in order, and those they read from.

    `look` is what planning saw; `is_outdated` says by another look whether what is published of
    other days has changed since the plan was built on it; `again` plans all days anew that were
    planned together.
    """

    settings: Settings
    ds: dt.date
    planned: tuple[Planned, ...]
    upstream: tuple[Stage, ...]
    look: Look
    is_outdated: Callable[[Look], bool] = lambda _: False
    again: Callable[[], Sequence["Night"]] = tuple

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(one.stage for one in self.planned)

    @property
    def is_whole(self) -> bool:
        """Returns whether it consists of all stages of a night."""
        return {stage.kind for stage in self.stages} == set(self.settings.night)

    def is_published(self, kind: Kind) -> bool:
        """Returns whether a stage of the day is published, by whatever run."""
        folders = (self.settings.layout.folder(table, self.ds) for table in kind.tables)
        return all(map(self.look.published, folders))

    @property
    def run_id(self) -> str:
        """Returns the id of all its stages together, twelve hex digits."""
        return documents.digest([stage.run_id for stage in self.stages])[:12]


# ---- What a staging folder says ----------------------------------------------------------------


def made_in(staging: str) -> str:
    """Returns the folder, below a staging folder, in which the tables of its stage are made.

    It is another one each time the stage is begun anew: a worker of before may live on, on a host
    that was cut off, say, and what it still writes is of no table.
    """
    found = _read_begun(staging)
    return os.path.join(staging, found["folder"]) if "folder" in found else staging


def staged_folder(stage: Stage, table: Table) -> str:
    """Returns the folder in which a table is made."""
    return os.path.join(made_in(stage.staging), table.name)


def shards_done(stage: Stage) -> int:
    """Returns how many shards are written whole, of all its tables."""
    return _shards_done(stage, made_in(stage.staging))


def _shards_done(stage: Stage, folder: str) -> int:
    return min(
        len(files.list_names(os.path.join(folder, table.name, "receipts")))
        for table in stage.tables
    )


def begin(stage: Stage, why: Sequence[str], look: Look) -> None:
    """Notes in the staging folder what the stage is made from, and of a forced one that it is.

    Deletes what was begun from another content, or by other versions of packages: no table is a
    mixture of two. What a run that was killed had done of the same stays. `look` has not seen the
    stage. Raises InputNotReady where something upstream is not made.
    """
    for one in stage.upstream:
        look.made(one)
    for night in stage.snapshots:
        look.open(night)
    begun = _read_begun(stage.staging)
    now = {"made_from": _sources(stage, look), "versions": PACKAGE_VERSIONS}
    if {name: begun.get(name) for name in now} != now:
        files.delete_tree(stage.staging)
        _write_begun(stage.staging, {**now, "why": list(why)})


def reopen(stage: Stage) -> None:
    """Lets the tables of a stage be made again, all of them, where it was begun.

    What was expensive, the chunk files, stays.
    """
    if found := _read_begun(stage.staging):
        _write_begun(stage.staging, found)
    for name in files.list_names(stage.staging):
        if not name.endswith(".json"):  # what is noted of the run
            files.delete_tree(os.path.join(stage.staging, name))


def _write_begun(staging: str, begun: Mapping[str, Any]) -> None:
    folder = f"made-{secrets.token_hex(4)}"
    write_json(os.path.join(staging, _BEGUN), {**begun, "folder": folder})


def _read_begun(staging: str) -> dict[str, Any]:
    """Returns what is noted of a stage that was begun; nothing where none was."""
    path = os.path.join(staging, _BEGUN)
    found = files.read_if_there(path)
    return dict(parse_json(path, found)) if found else {}


def _sources(stage: Stage, look: Look) -> dict[str, Any]:
    """Returns the versions of all that a stage is made from; None for what is not made yet."""
    found = _before(stage, look)
    return {**(look.made_from(stage) or {}), **({"before": found} if found else {})}


def _before(stage: Stage, look: Look) -> dict[str, str | None]:
    """Returns the versions of the tables of an earlier day that a stage goes on from."""
    found = {one.table.name: look.find(one) for one in stage.before}
    return {name: partition.version if partition else None for name, partition in found.items()}


def made_from(stage: Stage, look: Look) -> dict[str, Any]:
    """Returns the versions of all that a stage that is made now was made from.

    What is upstream is what it was when the job began: should it have been published anew since,
    the stage counts as not made, and is made again. A day before may have been made by the same
    job.
    """
    path = os.path.join(stage.staging, _BEGUN)
    found: dict[str, Any] = read_json(path)["made_from"]
    if None in found.get("before", {}).values():
        found["before"] = _before(stage, look)
    return found


def note_publishing(stage: Stage) -> None:
    """Notes that the tables of a forced stage begin to be published."""
    write_json(os.path.join(stage.staging, _PUBLISHING), {})


def note_refusal(stage: Stage, error: Exception | None) -> None:
    """Notes beside what was made why it may not be published, or that it may (`error` None)."""
    path = os.path.join(stage.staging, _REFUSED)
    if error is not None:
        write_json(path, {"message": str(error), "table": getattr(error, "table", "")})
    elif files.exists(path):
        files.delete(path)


def refusal(staging: str) -> GateRefused | None:
    """Returns why what lies in a staging folder may not be published, None where nothing says so.

    A later run may find that it may.
    """
    path = os.path.join(staging, _REFUSED)
    found = files.read_if_there(path)
    if found is None:
        return None
    told = parse_json(path, found)
    return GateRefused(told["message"], told.get("table", ""))


def reasons(staging: str) -> list[str]:
    """Returns why the stage of a staging folder was begun; empty where nothing says so."""
    return list(_read_begun(staging).get("why", ()))
