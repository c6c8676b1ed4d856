"""Finds what a day's histories begin from: those of the day before, or the log where they start.

A night reads one day of the log, since `user_histories` and `recent_clicks` of the day before hold
all that the earlier days have to say. A day between them that was never made is told, not bridged:
its clicks would be missing from every history after it.
"""

import datetime as dt
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from feature_jobs.impressions.clicks import HistoryLaw
from feature_jobs.impressions.histories import DAY_US
from feature_jobs.inputs import Source
from feature_jobs.schemas import (
    RECENT_CLICKS,
    USER_HISTORIES,
    USER_SIMSCORES,
    InputNotReady,
    OperatorError,
    Table,
)
from feature_jobs.store import hashing, partitions
from feature_jobs.store.partitions import Partition
from pipelines.config import Settings
from pipelines.planning.shop_tables import ShopTables
from pipelines.running import layout
from pipelines.running.stage import Stage

STATE = (USER_HISTORIES, RECENT_CLICKS)
IMPRESSIONS_PER_CLICK = 8  # at least, as a rule: it only sizes the shards
_ONE_DAY = dt.timedelta(days=1)


@dataclass(frozen=True)
class Before:
    """Holds what is known before ds: histories of the day before, or the log of earlier days.

    The histories are told by their `run_id`, and `partitions` opens them once they are made; of the
    days of the `log` some are `missing`. `log_rows` are the rows of the log by day, as far as the
    window reaches, `ids` the types of user_id and item_id in the histories, None where there are
    none.
    """

    run_id: str | None
    partitions: Callable[[], tuple[Partition, ...]]
    log: tuple[Source, ...]
    missing: tuple[str, ...]
    log_rows: dict[str, int]
    ids: tuple[pa.DataType, pa.DataType] | None = None

    def inputs(self) -> dict[str, Any]:
        """Returns what the id of a run changes with that begins from here."""
        earlier = {"earlier_log": [source.identity() for source in self.log]} if self.log else {}
        return {"histories_before": self.run_id, **earlier}

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
        round(settings.impressions.click_delay_seconds * 1_000_000),
        round(settings.history_lag_seconds * 1_000_000),
        settings.keep_repeats,
        settings.late_days * DAY_US,
    )


def history_settings(settings: Settings) -> dict[str, Any]:
    """Returns what manifests say of the law of histories."""
    return {
        "history_len": settings.history_len,
        "keep_repeats": settings.keep_repeats,
        "late_days": settings.late_days,
        "history_start_ds": settings.history_start_ds and str(settings.history_start_ds),
        **click_settings(settings),
    }


def click_settings(settings: Settings) -> dict[str, Any]:
    return {
        "window_days": settings.window_days,
        "click_delay_seconds": settings.impressions.click_delay_seconds,
        "history_lag_seconds": settings.history_lag_seconds,
        "day_timezone": settings.day_timezone,
    }


def made_before(stage: Stage, settings: Settings) -> Before:
    """Returns what a day begins from whose day before is planned with it."""
    return Before(
        stage.run_id,
        lambda: tuple(stage.partition(table) for table in STATE),
        log=(),
        missing=(),
        log_rows=_within_window(stage.inputs["log_rows"], stage.ds, settings),
        ids=stage.part.ids,
    )


def find_before(
    settings: Settings,
    ds: dt.date,
    shop: ShopTables,
    from_log: bool,
    newest: Callable[[], tuple[Partition, ...]],
) -> Before:
    """Finds what histories of ds begin from; `from_log` passes over the day before.

    `newest` finds the histories of the newest day before ds (`newest_before`).

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
    if from_log or ds == start:
        return _from_log(shop)
    found = newest()
    if not found:
        return _from_log(shop)
    last = dt.date.fromisoformat(found[0].manifest["ds"])
    if last == ds - _ONE_DAY:
        return _day_before(settings, ds, found)
    if _began_from_log(settings, ds):
        return _from_log(shop)
    raise InputNotReady(
        f"Histories of ds {ds} go on from those of the day before, but the newest ones are of "
        f"ds {last}: the clicks from {last + _ONE_DAY} to {ds - _ONE_DAY} would be missing "
        f"from every history. Run `courier histories --start-ds {last + _ONE_DAY} --end-ds "
        f"{ds - _ONE_DAY}` first. Or begin anew: --from-log reads the log of the window once, "
        "and history_start_ds in the settings says that no earlier clicks count."
    )


def _from_log(shop: ShopTables) -> Before:
    (_, *earlier), missing = shop.log
    rows = {str(source.form.ds): source.rows for source in earlier}
    return Before(None, lambda: (), tuple(earlier), tuple(missing), rows)


def newest_before(settings: Settings, ds: dt.date) -> tuple[Partition, ...]:
    """Returns the histories of the newest day before ds; empty for none.

    Histories from before `history_start_ds`, when the world began, do not count.
    """
    start = settings.history_start_ds or dt.date.min
    days = layout.begun_days(settings.root, settings.feature_set, USER_HISTORIES)
    found = (_state_of(settings, day) for day in reversed(days) if start <= day < ds)
    return next(filter(None, found), ())


def _state_of(settings: Settings, ds: dt.date) -> tuple[Partition, ...]:
    """Returns both tables of histories of ds, of one run; empty while they are not."""
    folders = [layout.table_folder(settings.root, settings.feature_set, t, ds) for t in STATE]
    found = [p for p in map(partitions.find_published, folders) if p]
    whole = len(found) == len(STATE) and len({partition.run_id for partition in found}) == 1
    return tuple(found) if whole else ()


def _began_from_log(settings: Settings, ds: dt.date) -> bool:
    """Returns whether the published histories of ds began from the log.

    Where they did, the same command finds nothing to do.
    """
    found = _state_of(settings, ds)
    return bool(found) and found[0].manifest["inputs"]["histories_before"] is None


def _day_before(settings: Settings, ds: dt.date, found: tuple[Partition, ...]) -> Before:
    manifest, mine = found[0].manifest, history_settings(settings)
    if manifest["settings"] != mine:
        theirs = {k: v for k, v in manifest["settings"].items() if mine.get(k) != v}
        raise OperatorError(
            f"Histories of ds {ds - _ONE_DAY} were made with {theirs}, which differs from these "
            f"settings. Those of ds {ds} cannot go on from them: what is kept follows from the "
            "settings. Put the settings back, or begin anew from the log of the window with "
            "--from-log."
        )
    rows = _within_window(manifest["inputs"]["log_rows"], ds - _ONE_DAY, settings)
    if not any(partition.rows for partition in found):  # which says nothing of types either
        return Before(manifest["run_id"], lambda: (), (), (), rows)
    schema = found[0].schema
    ids = schema.field("user_id").type, schema.field("item_ids").type.value_type
    return Before(manifest["run_id"], lambda: found, (), (), rows, ids)


def _within_window(log_rows: dict[str, int], ds: dt.date, settings: Settings) -> dict[str, int]:
    """Returns the entries of `log_rows` that still count for the day after ds."""
    oldest = ds + _ONE_DAY - dt.timedelta(days=settings.window_days)
    return {day: rows for day, rows in log_rows.items() if day >= str(oldest)}


def stale_days(settings: Settings, days: Sequence[dt.date]) -> dict[str, dt.date]:
    """Returns which of `days` are stale, each with the day that was made again without it.

    A day is stale whose histories or SimScores go on from other histories, or come from another
    log, than are published now.
    """
    looked_at = {*days, *(day - _ONE_DAY for day in days)}
    histories = _inputs_of(settings, USER_HISTORIES, looked_at)
    scores = _inputs_of(settings, USER_SIMSCORES, looked_at)
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
    settings: Settings, table: Table, days: Collection[dt.date]
) -> dict[dt.date, tuple[str, dict[str, Any]]]:
    """Returns by day the run_id and the inputs of what is published of a table."""
    found = {}
    for ds in days:
        folder = layout.table_folder(settings.root, settings.feature_set, table, ds)
        if partition := partitions.find_published(folder):
            found[ds] = (partition.run_id, partition.manifest["inputs"])
    return found
