"""Finds what a day goes on from: the newest day before it, planned with it or published.

A night reads one day of the log, since `user_histories` and `recent_clicks` of the day before hold
all that the earlier days have to say; and images only that may have changed since the newest
embeddings. What a published day goes on from, by the run that it names, stays so while that run
stands: filling a hole between the two changes no later day.

Histories know no holes. A day between them that was never made is told, not bridged: its clicks
would be missing from every history after it.
"""

import contextlib
import datetime as dt
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.histories import DAY_US
from feature_jobs.inputs import Source
from feature_jobs.schemas import (
    USER_HISTORIES,
    USER_SIMSCORES,
    InputNotReady,
    OperatorError,
    Table,
)
from feature_jobs.store import files, hashing
from feature_jobs.store.partitions import MANIFEST, Partition
from pipelines.config import Settings
from pipelines.planning.made_with import history_settings
from pipelines.planning.shop_tables import ShopTables
from pipelines.running import records, states
from pipelines.running.layout import Layout
from pipelines.running.stage import Planned, Reference
from pipelines.running.states import Look
from pipelines.stages import HISTORIES, Kind

IMPRESSIONS_PER_CLICK = 8  # at least, as a rule: it only sizes the shards
_ONE_DAY = dt.timedelta(days=1)


# ---- The newest day before ---------------------------------------------------------------------


@dataclass(frozen=True)
class Earlier:
    """Holds what a day goes on from: a stage of an earlier day, planned with it or published.

    `inputs`, `identities` and `settings` are the stage's; `tables` name what it makes.
    """

    ds: dt.date
    run_id: str
    inputs: Mapping[str, Any]
    identities: Mapping[str, str]
    settings: Mapping[str, Any]
    tables: tuple[Reference, ...]
    planned: Planned | None
    published: tuple[Partition, ...] = ()

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


@dataclass
class Yesterdays:
    """Finds for days that are planned together what each goes on from; `look` reads manifests.

    `planned` are the stages of the days that are planned already. What was found is remembered.
    """

    layout: Layout
    look: Look
    planned: dict[tuple[str, dt.date], Planned]
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
        found = among.at(kind, dt.date.fromisoformat(previous["ds"]))
        return found if found and found.run_id == previous["run_id"] else None

    def _newest_published(self, kind: Kind, ds: dt.date, start: dt.date) -> Earlier | None:
        days = self.layout.begun_days(kind.tables[0])
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


# ---- Histories ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """Holds what is known before ds: histories of the day before, or the log of earlier days.

    Of the days of the `log` some are `missing`. `log_rows` are the rows of the log by day, as far
    as the window reaches, `ids` the types of user_id and item_id in the histories, None where no
    file tells them.
    """

    run_id: str | None
    tables: tuple[Reference, ...]
    log: tuple[Source, ...]
    missing: tuple[str, ...]
    log_rows: dict[str, int]
    ids: tuple[pa.DataType, pa.DataType] | None = None

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
    if own and own[0].manifest["inputs"]["histories_before"] is None and not from_log:
        with contextlib.suppress(InputNotReady):
            yield _from_log(shop)
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


# ---- Days that are stale -----------------------------------------------------------------------


def stale_days(settings: Settings, days: Sequence[dt.date], look: Look) -> dict[str, dt.date]:
    """Returns which of `days` are stale, each with the day that was made again without it.

    A day is stale whose histories or SimScores go on from other histories, or come from another
    log, than are published now.
    """
    looked_at = {*days, *(day - _ONE_DAY for day in days)}
    histories = _inputs_of(settings, USER_HISTORIES, looked_at, look)
    scores = _inputs_of(settings, USER_SIMSCORES, looked_at, look)
    stale: dict[str, dt.date] = {}
    for ds in sorted((histories | scores).keys() & set(days)):
        yesterday = ds - _ONE_DAY
        now, _ = histories.get(yesterday, (None, {}))
        for _, inputs in (found[ds] for found in (histories, scores) if ds in found):
            before = inputs.get("histories_before")
            if before and str(yesterday) in stale:
                stale[str(ds)] = stale[str(yesterday)]
            elif before and now and before != now:
                stale[str(ds)] = yesterday
        if ds in histories and ds in scores and str(ds) not in stale:
            one, other = (found[ds][1]["impressions"] for found in (histories, scores))
            if one != other:
                stale[str(ds)] = ds
    return stale


def _inputs_of(
    settings: Settings, table: Table, days: Collection[dt.date], look: Look
) -> dict[dt.date, tuple[str, dict[str, Any]]]:
    """Returns by day the run_id and the inputs of what is published of a table."""
    found = {}
    for ds in days:
        folder = settings.layout.folder(table, ds)
        if partition := look.published(folder):
            found[ds] = (partition.run_id, partition.manifest["inputs"])
    return found
