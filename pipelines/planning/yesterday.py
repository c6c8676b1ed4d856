"""Finds what a day goes on from: the newest day before it, planned with it or published.

A night reads one day of the log, since `user_histories` and `recent_clicks` of the day before hold
all that the earlier days have to say; and images only that may have changed since the newest
embeddings. What a published day goes on from, by the run that it names, stays so while that
*stands*: filling a hole between the two changes no later day, nor does taking that day away
(`courier prune`). It stands also where it was made again and came out the same, or for days whose
clicks, or whose former items, no table shows any more: what changed on a day concerns days after it
as far as the window reaches.

Histories know no holes. A day between them that was never made is told, not bridged: its clicks
would be missing from every history after it.
"""

import contextlib
import datetime as dt
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import pyarrow as pa

from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.histories import DAY_US
from feature_jobs.inputs import Source
from feature_jobs.schemas import ITEM_EMBEDDINGS, InputNotReady, OperatorError
from feature_jobs.store import files, hashing
from feature_jobs.store.partitions import MANIFEST, Partition
from pipelines.config import Settings
from pipelines.planning.made_with import history_settings
from pipelines.planning.shop_tables import ShopTables, days_that_count
from pipelines.running import records, states
from pipelines.running.layout import Layout
from pipelines.running.stage import Planned, Reference, Stage
from pipelines.running.states import Look
from pipelines.stages import EMBED, HISTORIES, Kind

P = TypeVar("P", bound=Planned)

MADE_AGAIN_FOR = "made_again_for"  # in the notes of a manifest: days whose change it was made for
_OF_YESTERDAY = {"previous", "histories_before", "log_rows"}  # inputs that come from there
IMPRESSIONS_PER_CLICK = 8  # at least, as a rule: it only sizes the shards
_ONE_DAY = dt.timedelta(days=1)


# ---- The newest day before ---------------------------------------------------------------------


@dataclass(frozen=True)
class Earlier:
    """Holds what a day goes on from: a stage of an earlier day, planned with it or published.

    `inputs`, `identities` and `settings` are the stage's; `tables` name what it makes. One that
    `is_gone` was taken away since: what is known of it is what the day says that named it.
    """

    ds: dt.date
    run_id: str
    inputs: Mapping[str, Any]
    identities: Mapping[str, str]
    settings: Mapping[str, Any]
    tables: tuple[Reference, ...]
    planned: Planned | None
    published: tuple[Partition, ...] = ()
    is_gone: bool = False

    def as_input(self) -> dict[str, str]:
        """Returns what the id of a run changes with that goes on from here."""
        return {"ds": str(self.ds), "run_id": self.run_id}


def _of_planned(planned: Planned) -> Earlier:
    stage = planned.stage
    return Earlier(
        stage.ds, stage.run_id, stage.inputs, stage.identities, stage.settings, stage.references(),
        planned,
    )  # fmt: skip


def _of_published(kind: Kind, ds: dt.date, found: tuple[Partition, ...]) -> Earlier:
    manifest = found[0].manifest
    tables = tuple(
        Reference(table, ds, partition.run_id, partition.folder)
        for table, partition in zip(kind.tables, found, strict=True)
    )
    return Earlier(
        ds, found[0].run_id, manifest["inputs"], manifest["identities"], manifest["settings"],
        tables, None, found,
    )  # fmt: skip


# Which tables of a day tell whether it hands on the same; rejects are tried again by dates.
_HANDED_ON = {EMBED: (ITEM_EMBEDDINGS,), HISTORIES: HISTORIES.tables}


def reach(settings: Settings, kind: Kind) -> int:
    """Returns for how many days what changed on one may show in tables of `kind`.

    Of ITEM-FEATURES the day before is only compared with. One day more than the window is needed,
    so that the last one has come out as it was, and tells so.
    """
    if kind is HISTORIES:
        return days_that_count(settings) + 1
    return settings.window_days + 2 if kind is EMBED else 0


@dataclass
class Yesterdays:
    """Finds for days that are planned together what each goes on from; `look` reads manifests.

    `planned` are the stages of the days that are planned already, and `changed` the days for whose
    change those of them are made (again) that are not published. With `strict`, what a day names
    stands only as that very run. What was found is remembered.
    """

    layout: Layout
    settings: Settings
    look: Look
    planned: dict[tuple[str, dt.date], Planned]
    changed: dict[tuple[str, dt.date], frozenset[dt.date]]
    strict: bool = False
    found: dict[tuple[Kind, dt.date, dt.date], str | None] = field(default_factory=dict)

    def is_outdated(self, look: Look) -> bool:
        """Returns whether what was found has been published anew or overtaken since, by `look`."""
        now = replace(self, look=look, found={})
        for kind, ds, start in self.found:
            now.before(kind, ds, start)
        return now.found != self.found

    def before(self, kind: Kind, ds: dt.date, start: dt.date = dt.date.min) -> Earlier | None:
        """Returns the newest stage before ds, and not before `start`; None for none.

        Raises InputNotReady where the newest day is being published anew just now: an older one
        would be taken in its place.
        """
        earlier = self._before(kind, ds, start)
        self.found[kind, ds, start] = earlier.run_id if earlier else None
        return earlier

    def _before(self, kind: Kind, ds: dt.date, start: dt.date) -> Earlier | None:
        yesterday = self.planned.get((kind.name, ds - _ONE_DAY))
        if yesterday and start < ds:
            return _of_planned(yesterday)
        days = (day for name, day in self.planned if name == kind.name and start <= day < ds)
        newest = max(days, default=None)
        published = self._newest_published(kind, ds, newest or start)
        if newest is None or (published and published.ds > newest):
            return published
        return _of_planned(self.planned[kind.name, newest])

    def nearest(self, kind: Kind, ds: dt.date) -> Earlier | None:
        """Returns the newest stage before ds, or else the first published from ds on."""
        days = self.look.begun_days(self.layout, kind.tables[0])
        later = (self.at(kind, day) for day in days if day >= ds)
        return self.before(kind, ds) or next(filter(None, later), None)

    def at(self, kind: Kind, ds: dt.date) -> Earlier | None:
        """Returns the stage of a day, planned or published, None for neither."""
        if planned := self.planned.get((kind.name, ds)):
            return _of_planned(planned)
        found = self.published(kind, ds)
        return _of_published(kind, ds, found) if found else None

    def published(self, kind: Kind, ds: dt.date) -> tuple[Partition, ...]:
        """Returns the published tables of a day; empty while they are not, or do not fit.

        Those that feature sets share are of one run. Of others a rollback may have brought back
        one alone, where the other had come out the same; a forced run may have died between two.
        """
        found = [p for p in map(self.look.published, self._folders(kind, ds)) if p]
        if len(found) < len(kind.tables):
            return ()
        runs = sorted({one.run_id for one in found})
        if len(runs) > 1 and kind.is_shared:
            return ()
        forced = (self.layout.staging(kind, ds, f"{run_id}-forced") for run_id in runs)
        is_half = len(found) > 1 and any(map(states.is_half_published, forced))
        return () if is_half else tuple(found)

    def _folders(self, kind: Kind, ds: dt.date) -> list[str]:
        return [self.layout.folder(table, ds) for table in kind.tables]

    def run_id(self, kind: Kind, ds: dt.date) -> str | None:
        """Returns the run that the published stage of ds is of; None where there is none."""
        own = self.published(kind, ds)
        return own[0].run_id if own else None

    def candidates(self, kind: Kind, ds: dt.date) -> Iterator[Earlier | None]:
        """Yields what the stage of ds may go on from.

        First what the published one says it went on from, while that stands; then the newest.
        """
        own = self.published(kind, ds)
        if own and own[0].manifest["inputs"].get("previous") is None:
            yield None
        elif found := self.named(kind, ds, self):
            yield found
        yield self.before(kind, ds)

    def named(self, kind: Kind, ds: dt.date, among: "Yesterdays") -> Earlier | None:
        """Returns what the published stage of ds says it went on from; None unless that stands.

        It is looked for `among` what another feature set has, or this one.
        """
        own = self.published(kind, ds)
        previous = own[0].manifest["inputs"].get("previous") if own else None
        if previous is None:
            return None
        day = dt.date.fromisoformat(previous["ds"])
        return among.standing(kind, ds, own[0], day, previous["run_id"])

    def standing(
        self, kind: Kind, ds: dt.date, own: Partition, day: dt.date, run_id: str
    ) -> Earlier | None:
        """Returns what `own`, published for ds, went on from: the run `run_id` of an earlier `day`.

        It goes by that name also where it was made again since, and nothing of ds would change.
        None where it does not stand.
        """
        found = self.at(kind, day)
        if found is None:
            return self._gone(kind, own, day, run_id)
        if found.run_id == run_id:
            return found
        if self.strict or not self._hands_on_the_same(kind, ds, own, found):
            return None
        return replace(found, run_id=run_id)

    def _gone(self, kind: Kind, own: Partition, day: dt.date, run_id: str) -> Earlier | None:
        """Returns what is known of a run that was taken away; None where that is on its way."""
        if self.strict or any(
            files.exists(os.path.join(f, MANIFEST)) for f in self._folders(kind, day)
        ):
            return None
        said, tables = own.manifest, zip(kind.tables, self._folders(kind, day), strict=True)
        rows = {k: v for k, v in said["inputs"].get("log_rows", {}).items() if k <= str(day)}
        return Earlier(
            day, run_id, {"log_rows": rows}, said["identities"], said["settings"],
            tuple(Reference(table, day, run_id, folder) for table, folder in tables), None,
            is_gone=True,
        )  # fmt: skip

    def _hands_on_the_same(self, kind: Kind, ds: dt.date, own: Partition, found: Earlier) -> bool:
        """Returns whether `found`, no run that `own` of ds names, has the same to say to it."""
        if not self._reaches(kind, ds, found):
            return True
        then = own.manifest["made_from"].get("before", {})
        now = {p.manifest["table"]: p.version for p in self.published_now(found)}
        handed_on = [table.name for table in _HANDED_ON.get(kind, ())]
        return bool(now) and all(then.get(name) == now.get(name) for name in handed_on)

    def _reaches(self, kind: Kind, ds: dt.date, found: Earlier) -> bool:
        """Returns whether what `found` was made again for, or is to be, may show on ds."""
        oldest = ds - dt.timedelta(days=reach(self.settings, kind))
        return any(oldest <= day for day in self.changes_of(kind, found))

    def _is_outdone(self, stage: Stage) -> bool:
        """Returns whether what a published stage went on from was made again under the same run_id.

        Images are in no run_id, so that other vectors may have come of it, or may come. What only
        fills a hole is taken for what was there.
        """
        own = self.published(stage.kind, stage.ds)
        if stage.kind is not EMBED or not own or own[0].run_id != stage.run_id or not stage.before:
            return False
        found = self.at(EMBED, stage.before[0].ds)
        if found is None or found.run_id != _named_run(own[0]):
            return False
        is_to_be_made = not self.published_now(found)
        if is_to_be_made and not self.published(EMBED, found.ds):
            return False
        is_same = all(self.look.is_followed(stage.before, one) for one in own)
        return (is_to_be_made or not is_same) and self._reaches(EMBED, stage.ds, found)

    def published_now(self, earlier: Earlier) -> tuple[Partition, ...]:
        """Returns its tables as they are published; none where they are to be made."""
        if earlier.planned is None:
            return earlier.published
        state = self.look.state(earlier.planned.stage)
        is_there = state.name == states.PUBLISHED and not earlier.planned.stage.forced
        return state.tables if is_there else ()

    def changes_of(self, kind: Kind, earlier: Earlier) -> frozenset[dt.date]:
        """Returns the days for whose change a stage was made again, or is to be; else its own."""
        if found := self.published_now(earlier):
            noted = found[0].manifest["notes"].get(MADE_AGAIN_FOR, [str(earlier.ds)])
            return frozenset(map(dt.date.fromisoformat, noted))
        return self.changed.get((kind.name, earlier.ds), frozenset([earlier.ds]))

    def note(self, planned: P) -> P:
        """Notes which days' changes a planned stage is made for, if it is; returns it noting them.

        Those that it is handed on are followed as far as they reach, and so are those that the
        published one was made again for: days after it may not have followed yet.
        """
        if self._is_outdone(planned.stage):
            planned = _with(planned, follows=True)
        stage, kind = planned.stage, planned.stage.kind
        if self.look.state(stage).name == states.PUBLISHED and not stage.forced:
            return planned
        own = self.published(kind, stage.ds)
        changed = self._handed_on(own[0], stage) if own else frozenset()
        if not (own and changed and _is_alike(own[0], stage)):
            changed |= {stage.ds}
        self.changed[kind.name, stage.ds] = changed
        if not own or (own[0].run_id == stage.run_id and not stage.follows):
            return planned
        earlier = map(dt.date.fromisoformat, own[0].manifest["notes"].get(MADE_AGAIN_FOR, ()))
        changed |= {day for day in earlier if self._oldest(stage) <= day}
        self.changed[kind.name, stage.ds] = changed
        notes = {**stage.notes, MADE_AGAIN_FOR: sorted(map(str, changed))}
        return _with(planned, notes=notes)

    def _oldest(self, stage: Stage) -> dt.date:
        """Returns the first day whose change may show in a stage."""
        return stage.ds - dt.timedelta(days=reach(self.settings, stage.kind))

    def _handed_on(self, own: Partition, stage: Stage) -> frozenset[dt.date]:
        """Returns the days whose changes come from the day before, if `own` names another."""
        found = self.at(stage.kind, stage.before[0].ds) if stage.before else None
        if found is None or (found.run_id == _named_run(own) and not stage.follows):
            return frozenset()
        oldest = self._oldest(stage)
        return frozenset(day for day in self.changes_of(stage.kind, found) if oldest <= day)

    def _newest_published(self, kind: Kind, ds: dt.date, start: dt.date) -> Earlier | None:
        days = self.look.begun_days(self.layout, kind.tables[0])
        if not days:
            records.refuse_other_layout(self.layout, kind.tables[0])
        for day in reversed([day for day in days if start <= day < ds]):
            if found := self.published(kind, day):
                return _of_published(kind, day, found)
            if all(files.exists(os.path.join(f, MANIFEST)) for f in self._folders(kind, day)):
                raise InputNotReady(
                    f"ds {ds} goes on from ds {day}, whose {kind.tables[0].name} are being "
                    "published anew just now, or were when a run of that day died. Run this "
                    f"command again when that has ended, or `courier refresh --ds {day}` to end it."
                )
        return None


def _with(planned: P, **changes: Any) -> P:
    """Returns a planned stage that says something else besides."""
    stage = replace(planned.stage, **changes)
    return cast(P, replace(cast(Any, planned), stage=stage))


def _named_run(own: Partition) -> str | None:
    """Returns the run of an earlier day that a published stage says it went on from."""
    inputs = own.manifest["inputs"]
    previous = inputs.get("previous")
    named: str | None = previous["run_id"] if previous else inputs.get("histories_before")
    return named


def _is_alike(own: Partition, stage: Stage) -> bool:
    """Returns whether a stage differs from what is published by what it goes on from alone."""
    now = stage.as_json()
    mine = [
        {k: v for k, v in said["inputs"].items() if k not in _OF_YESTERDAY}
        for said in (own.manifest, now)
    ]
    same = all(own.manifest[what] == _as_json(now[what]) for what in ("identities", "settings"))
    return mine[0] == _as_json(mine[1]) and same


def _as_json(said: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}


# ---- Histories ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """Holds what is known before ds: histories of the day before, or the log of earlier days.

    Of the days of the `log` some are `missing`. `log_rows` are the rows of the log by day, as far
    as the window reaches, `ids` the types of user_id and item_id in the histories, None where no
    file tells them. Histories that are gone (`Earlier`) are known by name alone.
    """

    run_id: str | None
    tables: tuple[Reference, ...]
    log: tuple[Source, ...]
    missing: tuple[str, ...]
    log_rows: dict[str, int]
    ids: tuple[pa.DataType, pa.DataType] | None = None
    is_gone: bool = False

    def inputs(self) -> dict[str, Any]:
        """Returns what the id of a run changes with that begins from here."""
        earlier = {"earlier_log": [source.identity() for source in self.log]} if self.log else {}
        return {"histories_before": self.run_id, **earlier}

    def partitions(self) -> tuple[Partition, ...]:
        """Returns the histories, as they are made by now."""
        look = Look()
        found = tuple(look.open(table) for table in self.tables)
        return found if any(partition.rows for partition in found) else ()

    def shards(self, files: Sequence[Partition], rows_per_shard: int) -> int:
        """Returns how many shards the clicks from before ds fill."""
        if files:
            return max(len(partition.paths) for partition in files)
        return shards_of_log({str(s.form.ds): s.rows for s in self.log}, rows_per_shard)


def shards_of_log(log_rows: dict[str, int], rows_per_shard: int) -> int:
    """Returns how many shards the users fill whose clicks the log of so many rows holds."""
    return hashing.num_shards(sum(log_rows.values()) // IMPRESSIONS_PER_CLICK, rows_per_shard)


def history_law(settings: Settings) -> HistoryLaw:
    return HistoryLaw(
        settings.history_len,
        settings.window_days * DAY_US,
        round(settings.log.click_delay_seconds * 1_000_000),
        round(settings.history_lag_seconds * 1_000_000),
        settings.keep_repeats,
        settings.late_days * DAY_US,
    )


def find_before(
    settings: Settings, ds: dt.date, shop: ShopTables, from_log: bool, yesterdays: Yesterdays
) -> Before:
    """Finds what histories of ds begin from; `from_log` passes over what is published before it.

    Raises InputNotReady for a gap between ds and the newest histories before it, and OperatorError
    for a day before `history_start_ds`, or histories that were made by another law.
    """
    start = settings.history_start_ds
    if start and ds < start:
        raise OperatorError(
            f"ds {ds} lies before history_start_ds = {start}, from which on the settings say that "
            "there are clicks. All its histories would be empty. Ask for a later day, or correct "
            "history_start_ds."
        )
    is_planned = (HISTORIES.name, ds - _ONE_DAY) in yesterdays.planned
    if ds == start or (from_log and not is_planned):
        return _from_log(shop)
    earlier = yesterdays.before(HISTORIES, ds, start or dt.date.min)
    if earlier is None:
        return _from_log(shop)
    if earlier.ds == ds - _ONE_DAY:
        return _day_before(settings, ds, earlier)
    own = yesterdays.published(HISTORIES, ds)
    if own and own[0].manifest["inputs"]["histories_before"] is None:
        return _from_log(shop)  # as it began; so the same command finds nothing to do
    raise InputNotReady(
        f"Histories of ds {ds} go on from those of the day before, but the newest ones are of "
        f"ds {earlier.ds}: the clicks from {earlier.ds + _ONE_DAY} to {ds - _ONE_DAY} would be "
        f"missing from every history. Run `courier histories --start-ds {earlier.ds + _ONE_DAY} "
        f"--end-ds {ds - _ONE_DAY}` first. Or begin anew: --from-log reads the log of the window "
        "once, and history_start_ds in the settings says that no earlier clicks count."
    )


def befores(
    settings: Settings, ds: dt.date, shop: ShopTables, from_log: bool, yesterdays: Yesterdays
) -> Iterator[Before]:
    """Yields what histories of ds may begin from: as the published ones did, then as `find_before`.

    Those that began from the log stay so, whatever was made before them since.
    """
    own = yesterdays.published(HISTORIES, ds)
    named = own[0].manifest["inputs"]["histories_before"] if own else None
    if own and named is None and not from_log:
        with contextlib.suppress(InputNotReady):
            yield _from_log(shop)
    elif (
        own and named and not from_log and own[0].manifest["settings"] == history_settings(settings)
    ):
        earlier = yesterdays.standing(HISTORIES, ds, own[0], ds - _ONE_DAY, named)
        if earlier:
            yield _day_before(settings, ds, earlier)
    yield find_before(settings, ds, shop, from_log, yesterdays)


def _from_log(shop: ShopTables) -> Before:
    (_, *earlier), missing = shop.log
    rows = {str(source.form.ds): source.rows for source in earlier}
    return Before(None, (), tuple(earlier), tuple(missing), rows)


def _day_before(settings: Settings, ds: dt.date, earlier: Earlier) -> Before:
    mine = history_settings(settings)
    if earlier.settings != mine:
        theirs = {k: v for k, v in earlier.settings.items() if mine.get(k) != v}
        raise OperatorError(
            f"Histories of ds {ds - _ONE_DAY} were made with {theirs}, which differs from these "
            f"settings. Those of ds {ds} cannot go on from them: what is kept follows from the "
            "settings. Put the settings back, or begin anew from the log of the window with "
            "--from-log."
        )
    rows = _within_window(earlier.inputs["log_rows"], ds - _ONE_DAY, settings)
    if earlier.is_gone:
        return Before(earlier.run_id, earlier.tables, (), (), rows, is_gone=True)
    if not earlier.planned and not any(partition.rows for partition in earlier.published):
        # Empty ones say nothing of types either.
        return Before(earlier.run_id, earlier.tables, (), (), rows)
    return Before(earlier.run_id, earlier.tables, (), (), rows, _ids_of(earlier))


def _ids_of(earlier: Earlier) -> tuple[pa.DataType, pa.DataType] | None:
    """Returns the types of user_id and item_id in histories, None where no file has told them."""
    if earlier.planned:
        known = earlier.planned.id_types
        return known and (known[0], known[1])
    schema = earlier.published[0].schema
    return schema.field("user_id").type, schema.field("item_ids").type.value_type


def _within_window(log_rows: dict[str, int], ds: dt.date, settings: Settings) -> dict[str, int]:
    """Returns the entries of `log_rows` that still count for the day after ds."""
    oldest = ds + _ONE_DAY - dt.timedelta(days=settings.window_days)
    return {day: rows for day, rows in log_rows.items() if day >= str(oldest)}
