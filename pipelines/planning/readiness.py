"""Waits until the shop's tables of the days that are asked for are there, and whole.

A table is whole where its `_SUCCESS` is there, if the settings ask for one, else once its files
have stood still for `settle_minutes`. Nothing but that is waited for: what a night would refuse in
the settings, or in a table that is there, is told at once.
"""

import datetime as dt
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from zoneinfo import ZoneInfo

from feature_jobs import inputs
from feature_jobs.schemas import InputNotReady
from feature_jobs.store import day_names
from feature_jobs.store.encoder_info import EncoderInfo
from feature_jobs.store.files import FileInfo
from pipelines.config import Settings
from pipelines.planning.pinned import PinnedArtefacts
from pipelines.planning.shop_tables import ShopTables
from pipelines.running.estimates import duration
from pipelines.stages import EMBED, Kind

POLL_SECONDS = 30.0
TELL_SECONDS = 600.0  # what is still waited for is told so often,
_NAMED = 3  # and of so many tables by name

Table = tuple[str, dt.date]  # "catalogue", "vectors" or "impressions", of a day


def wait_for_inputs(
    settings: Settings,
    days: Sequence[dt.date],
    kinds: Collection[Kind],
    wait: dt.timedelta | None,
    deadline: dt.time | None,
    say: Callable[[str], None],
    allow_overlap: bool = False,
) -> None:
    """Waits until the tables of `days` that stages of these `kinds` read are there, and whole.

    It waits no longer than `wait`, nor beyond the next moment at which clocks of day_timezone show
    the `deadline`; with neither it does not look. `say` gets what is waited for, at first and now
    and then.

    Raises InputNotReady where a table is not there by then. Raises OperatorError and
    DataContractError at once for a pin that does not hold (but for an overlap, if allowed), and for
    a table that is there and breaks its contract.
    """
    if wait is None and deadline is None:
        return
    known = dict[str, Any]()  # encoders by folder, read once
    waiting = _Waiting(settings, say, known)
    end = _end(settings, waiting.since, wait, deadline)
    for ds in days:
        _check_pins(settings, ds, kinds, allow_overlap)
    wanted = _tables(settings, days, kinds, known)
    while missing := waiting.look(wanted):
        waiting.tell(missing, end)
        if (left := end - time.time()) <= 0:
            raise waiting.gave_up(missing)
        time.sleep(min(POLL_SECONDS, left))
        wanted = list(missing)
    waiting.tell_end()


def next_moment(clock: dt.time, zone: ZoneInfo, after: float) -> float:
    """Returns the next moment after `after` at which clocks of `zone` show `clock`.

    Moments are in seconds since 1970. Where clocks are put back it may come twice, and where they
    are put forward a time that they leave out is so much later.
    """
    today = dt.datetime.fromtimestamp(after, zone).date()
    moments = []
    for day in (today, today + dt.timedelta(days=1)):
        first, second = (
            dt.datetime.combine(day, clock.replace(fold=fold), zone).timestamp() for fold in (0, 1)
        )
        moments += [first, max(first, second)]
    return next(moment for moment in moments if moment > after)


def _end(
    settings: Settings, since: float, wait: dt.timedelta | None, deadline: dt.time | None
) -> float:
    """Returns when waiting ends, whichever of the two comes first."""
    ends = [] if wait is None else [since + wait.total_seconds()]
    if deadline is not None:
        ends.append(next_moment(deadline, ZoneInfo(settings.day_timezone), since))
    return min(ends)


def _check_pins(
    settings: Settings, ds: dt.date, kinds: Collection[Kind], allow_overlap: bool
) -> None:
    pinned = PinnedArtefacts(settings, ds, allow_overlap)
    users = [kind for kind in kinds if "pin" in kind.uses]
    if users:
        pinned.overlap("encoder", pinned.encoder.data_end_ds)
    if any(kind is not EMBED for kind in users):
        pinned.overlap("codebook", pinned.codebook.data_end_ds)


def _tables(
    settings: Settings, days: Sequence[dt.date], kinds: Collection[Kind], known: dict[str, Any]
) -> list[Table]:
    """Returns the tables that are read; one snapshot for all days is that of the first."""
    used = set[str]().union(*(kind.uses for kind in kinds))
    one_snapshot = not day_names.has_day(settings.catalogue.path)
    found = []
    for ds in days:
        if "catalogue" in used:
            found.append(("catalogue", days[0] if one_snapshot else ds))
            source = PinnedArtefacts(settings, ds, known=known).encoder.vectors
            if source is not None:
                found.append(("vectors", ds if day_names.has_day(source.path) else days[0]))
        if "impressions" in used:
            found.append(("impressions", ds))
    return list(dict.fromkeys(found))


def _ask_for_it(name: str) -> str:
    """Says how a table is waited for until it has a `_SUCCESS`."""
    if name == "vectors":
        return "register them with --require-success"
    return f"set require_success under [{name}] in the settings"


class _Waiting:
    """Looks at tables again and again, and tells what is missing; it began at `since`."""

    def __init__(self, settings: Settings, say: Callable[[str], None], known: dict[str, Any]):
        self._settings, self._say, self._known = settings, say, known
        self.since = time.time()
        self._seen: dict[Table, tuple[object, float]] = {}  # the files of a table, and since when
        self._told: tuple[list[Table], float] | None = None

    def look(self, tables: Sequence[Table]) -> dict[Table, str]:
        """Returns which of the tables are not there, or not whole, and why."""
        found = ((table, self._why_missing(*table)) for table in tables)
        return {table: why for table, why in found if why}

    def _why_missing(self, name: str, ds: dt.date) -> str:
        shop = ShopTables(self._settings, ds, self._say)
        path, require_success = self._place(name, ds)
        closed = day_names.has_day(path) and ds in self._settings.closed_days
        try:
            found = inputs.list_files(name, path, ds, require_success, closed)
            if found and not require_success and (why := self._why_moving(name, ds, found)):
                return why
            match name:
                case "catalogue":
                    shop.catalogue(ds)
                case "vectors":
                    shop.vectors(ds, self._encoder(ds))
                case _:
                    shop.impressions(ds)
        except InputNotReady as error:
            return str(error)
        return ""

    def _encoder(self, ds: dt.date) -> EncoderInfo:
        return PinnedArtefacts(self._settings, ds, known=self._known).encoder

    def _place(self, name: str, ds: dt.date) -> tuple[str, bool]:
        """Returns the template of a table, and whether a `_SUCCESS` says that it is whole."""
        if name == "vectors":
            of = self._encoder(ds).vectors
            assert of is not None
            return self._settings.full_template(of.path), of.require_success
        section = self._settings.catalogue if name == "catalogue" else self._settings.log
        return section.path, section.require_success

    def _why_moving(self, name: str, ds: dt.date, found: Sequence[FileInfo]) -> str:
        """Returns why files may not be whole yet; empty where they have stood still for so long."""
        now, settle = time.time(), self._settings.settle_minutes
        files = [(file.path, file.version) for file in found]
        if self._seen.get((name, ds), ((), now))[0] != files:
            self._seen[name, ds] = files, now
        newest = max(found, key=lambda file: file.written_us or 0)
        # What was written long ago need not be watched; a clock that goes wrong is not believed.
        still_since = self._seen[name, ds][1]
        if newest.written_us is not None:
            still_since = min(still_since, newest.written_us / 1e6)
        if now - still_since >= 60 * settle:
            return ""
        return (
            f"The {name} table of ds {ds} may still be written: {newest.path} and the files beside "
            f"it have stood still for {duration(now - still_since)}, and count as whole after "
            f"settle_minutes = {settle:g}. A table that is read before it is whole lacks rows. Run "
            f"the command again later; or where its writer leaves a _SUCCESS, {_ask_for_it(name)}, "
            "and nothing is waited for but that."
        )

    # -- Telling --

    def tell(self, missing: Mapping[Table, str], end: float) -> None:
        """Tells what is missing, where that is news or was not told for long."""
        now, tables = time.time(), list(missing)
        if self._told and self._told[0] == tables and now - self._told[1] < TELL_SECONDS:
            return
        so_far = f", {duration(now - self.since)} so far" if self._told else ""
        self._say(f"waiting until {self._moment(end)} for {self._names(tables)}{so_far}")
        self._told = tables, now

    def tell_end(self) -> None:
        if self._told:
            self._say(f"all inputs are there, after {duration(time.time() - self.since)}")

    def gave_up(self, missing: Mapping[Table, str]) -> InputNotReady:
        waited = duration(time.time() - self.since)
        return InputNotReady(
            f"Waited for {waited}, since {self._moment(self.since)}, for "
            f"{self._names(list(missing))}, and gave up. The first: {next(iter(missing.values()))}"
        )

    def _names(self, tables: Sequence[Table]) -> str:
        """Names tables with the places where they are looked for, the first few of them."""
        told = [
            f"{name} of ds {ds} ({day_names.name_of(self._place(name, ds)[0], ds)})"
            for name, ds in tables[:_NAMED]
        ]
        more = f" and {len(tables) - _NAMED:,} more" if len(tables) > _NAMED else ""
        return ", ".join(told) + more

    def _moment(self, at: float) -> str:
        zone = self._settings.day_timezone
        return f"{dt.datetime.fromtimestamp(at, ZoneInfo(zone)):%Y-%m-%d %H:%M} {zone}"
