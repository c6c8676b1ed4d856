"""Prunes what the settings keep no longer: days, earlier versions, and what dead runs have staged.

What goes is found day by day, and once more under the locks of the day, without which nothing is
deleted: a day on which a run is at work is skipped. Days count back from the newest night that is
whole, so that a shop which stopped loses nothing. Never deleted are

- a day on hold, and all versions that a hold or a night's record names, with the night before it;
  of tables that feature sets share, those of every set, so that the last one that names a version
  lets it go;
- one of the tables of a kind of stage without the other: nights take them for one;
- histories and embeddings that a night, or a recomputation of the window, may still go on from:
  `window_days`, what comes late, and a day more; and those of the last day before a hole;
- packages and candidates, which are no tables of a night, and days of training sets, of which only
  earlier versions go.

A day goes in this order: the night's record says that it lost the table, and has no way back from
then on; `publishing.withdraw` takes the partition from before readers; earlier versions go. No
reader gets a mixture of it, and killed at any point, the next run finishes it.
"""

import datetime as dt
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from feature_jobs.schemas import (
    TABLES,
    CourierError,
    DataContractError,
    StorageUnavailable,
    Table,
)
from feature_jobs.store import files, partitions
from feature_jobs.store.documents import to_json
from feature_jobs.store.files import FileInfo
from feature_jobs.store.nights import parse_record
from feature_jobs.store.partitions import MANIFEST
from pipelines.config import Settings
from pipelines.running import locks, records, states
from pipelines.running.layout import Layout, date_of
from pipelines.running.locks import Locks
from pipelines.running.publishing import superseded, tidy_jobs_of, withdraw
from pipelines.stages import EMBED, HISTORIES, KINDS, Kind, kind_of

DAY, VERSION, STAGED = "published", "earlier versions", "staged"

_AT_ONCE = 64
_OF_DAMAGE = (AttributeError, LookupError, TypeError, ValueError)  # what no check foresaw
_DAY_SECONDS = 86_400
_GO_ON = (EMBED, HISTORIES)  # a day of these is made from the day before


@dataclass(frozen=True)
class Gone:
    """Describes what goes, or would: a day of a table, a version of it, or what a run had staged.

    `what` is one of the names above, `name` the table's or, of what is staged, the stage's. All
    `files` below `folder` go; none where the partition stays for `others`, whose nights name it.
    """

    what: str
    name: str
    ds: dt.date
    folder: str
    files: tuple[FileInfo, ...]
    others: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass
class Pruned:
    """Tells what a prune took away, or would, by day; `skipped` says why of the days left alone.

    Of those some are `damaged`: no prune to come will do more of them.
    """

    feature_set: str
    dry_run: bool
    newest: dt.date | None
    gone: list[Gone] = field(default_factory=list)
    skipped: dict[dt.date, str] = field(default_factory=dict)
    damaged: set[dt.date] = field(default_factory=set)

    def skip(self, ds: dt.date, error: Exception, say: Callable[[str], None]) -> None:
        """Notes that a day is left as it is, and says why; a run at work is nothing to warn of."""
        is_busy = isinstance(error, BlockingIOError)
        self.skipped[ds] = "a run is at work on it" if is_busy else str(error)
        if isinstance(error, DataContractError):
            self.damaged.add(ds)
        say(f"{'' if is_busy else 'WARNING: '}ds {ds} is left as it is: {self.skipped[ds]}")

    def as_json(self) -> dict[str, Any]:
        """Returns what `courier prune --json` prints: sums by table, or stage, and by what went."""
        return {
            "feature_set": self.feature_set,
            "dry_run": self.dry_run,
            "newest_night": self.newest and str(self.newest),
            "gone": [
                {
                    "table": name, "what": what, "days": sorted({str(one.ds) for one in some}),
                    **_sums(some),
                    "stays_for": sorted({other for one in some for other in one.others}),
                }
                for (name, what), some in self.together().items()
            ],
            "skipped": {str(ds): why for ds, why in self.skipped.items()},
            "damaged": sorted(map(str, self.damaged)),
            **_sums(self.gone),
        }  # fmt: skip

    def together(self) -> dict[tuple[str, str], list[Gone]]:
        """Returns what goes by the name of its table or stage, and by what it is."""
        found: dict[tuple[str, str], list[Gone]] = {}
        for one in self.gone:
            found.setdefault((one.name, one.what), []).append(one)
        return found


def _sums(gone: Sequence[Gone]) -> dict[str, int]:
    return {"files": sum(len(x.files) for x in gone), "bytes": sum(x.bytes for x in gone)}


# ---- Pruning -----------------------------------------------------------------------------------


def prune(
    settings: Settings,
    dry_run: bool,
    say: Callable[[str], None],
    now: dt.datetime | None = None,
) -> Pruned:
    """Deletes what the settings keep no longer, of their feature set and of tables it shares.

    Returns what went; nothing has changed where it was but a `dry_run`. Raises StorageUnavailable
    where the store cannot be reached or written to; what went until then is gone whole.
    """
    keeping = Keeping(settings, now or dt.datetime.now(dt.UTC))
    told = Pruned(settings.feature_set, dry_run, keeping.newest)
    for ds, error in keeping.damaged.items():
        told.skip(ds, error, say)
    for ds in keeping.days():
        if ds in keeping.damaged:
            continue
        try:
            planned = keeping.of_day(ds, documents(settings.layout, ds))
            told.gone += planned if dry_run or not planned else take_away(keeping, ds)
        except StorageUnavailable:
            raise
        except (BlockingIOError, CourierError) as error:
            told.skip(ds, error, say)
    if not dry_run:
        for kind in KINDS:
            tidy_jobs_of(settings.layout, kind, Locks())
    return told


def prune_by_the_night(settings: Settings, say: Callable[[str], None]) -> None:
    """Prunes after a night where the settings ask for it: what fails is warned of, and no more."""
    if not settings.retention.by_the_night:
        return
    try:
        told = prune(settings, False, say)
    except (CourierError, OSError, *_OF_DAMAGE) as error:
        say(f"WARNING: the night is published, but not all was pruned after it: {error}")
        return
    if told.gone:
        say(f"pruned: {_amount(told.gone)}")


def take_away(keeping: "Keeping", ds: dt.date) -> list[Gone]:
    """Deletes what goes of a day, as it is found under its locks; returns that.

    Raises BlockingIOError where a run is at work on the day, CourierError where one was.
    """
    layout = keeping.layout
    with locks.holding_at_once(layout.lock_folders(keeping.tables, [ds])) as held:
        mine = documents(layout, ds)  # ahead of the look at the tables, as the fence goes by it
        gone = keeping.of_day(ds, mine)
        _take_out_of_record(layout.night_path(ds), mine, gone, keeping.now)
        for one in gone:
            held.check()
            if one.what != DAY:
                _delete(one)
            elif not one.others:
                withdraw(layout.place(TABLES[one.name], ds), one.files, held)
    return gone


def _take_out_of_record(
    path: str, mine: "Documents", gone: Sequence[Gone], now: dt.datetime
) -> None:
    """Makes the night's record name no more what goes; raises CourierError where it has changed.

    So it does where the record need not change: what was found is not what is published then.
    """
    recorded = mine.record["tables"] if mine.record else {}
    lost = [one.name for one in gone if one.what == DAY and one.name in recorded]
    if mine.record and lost:
        try:
            data = to_json(records.without_pruned(mine.record, lost, now))
            files.write_if_unchanged(path, data, mine.data)
        except files.Changed as error:
            raise superseded(path) from error
    elif files.read_if_there(path) != mine.data:
        raise superseded(path)


def _delete(gone: Gone) -> None:
    """Deletes what no reader was promised, marks first: what is half gone is never taken for whole.

    Each file by itself, so that whoever is killed leaves nothing that the next does not find.
    """
    marks = [file for file in gone.files if _is_mark(file.path)]
    rest = [file for file in gone.files if not _is_mark(file.path)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for some in (marks, rest):
            for _ in pool.map(files.delete_seen, some):
                pass
    files.delete_empty(os.path.dirname(gone.folder))


def _is_mark(path: str) -> bool:
    return path.endswith(".json")


# ---- What is kept ------------------------------------------------------------------------------


class Keeping:
    """Finds what the settings keep no longer, at a moment; `newest` is the night they count from.

    `tables` are those of nights, and the training sets. Nothing is expired where no night is whole,
    and no day of a training set. `damaged` says of which newer days no one can tell.
    """

    def __init__(self, settings: Settings, now: dt.datetime):
        self.layout, self.now = settings.layout, now
        self._settings, self._retention = settings, settings.retention
        self.damaged = dict[dt.date, DataContractError]()
        self.newest = self._newest_night()
        self.tables = [*TABLES.values(), *self.layout.training_sets()]
        self._begun = {table: self.layout.begun_days(table) for table in self.tables}
        self._kept = {table: self.layout.kept_days(table) for table in self.tables}
        self._others = [
            self.layout.of(name)
            for name in self.layout.feature_sets()
            if name != settings.feature_set
        ]

    def days(self) -> list[dt.date]:
        """Returns the days of which something may go, ascending."""
        found = {ds for kind in KINDS for ds in _staged_days(self.layout.kind_folder(kind))}
        for table in self.tables:
            found |= {ds for ds in self._begun[table] if self._is_old(table, ds)}
            found |= set(self._kept[table])
        return sorted(found)

    def of_day(self, ds: dt.date, mine: "Documents") -> list[Gone]:
        """Finds what goes of a day, by what lies there now; `mine` are its own `documents`."""
        others = {other.feature_set: documents(other, ds) for other in self._others}
        held = [name for name, found in {"": mine, **others}.items() if found.is_held]
        gone = list[Gone]()
        for table in self.tables:
            named = {name: found.versions(table) for name, found in others.items() if table.shared}
            is_held = bool(held) if table.shared else mine.is_held
            expired = not is_held and self._is_expired(table, ds)
            if expired and ds in self._begun[table]:
                gone += self._day(table, ds, mine, named)
            protected = set[str]().union(*named.values())
            protected |= set() if expired else mine.versions(table)
            gone += self._versions(table, ds, expired, protected)
        return gone + [one for kind in KINDS for one in self._staged(kind, ds)]

    def _newest_night(self) -> dt.date | None:
        """Returns the newest day whose night is whole, None where none is.

        Newer days whose documents cannot be read are noted, and passed over: fewer days go so.
        """
        for ds in reversed(self.layout.recorded_days()):
            try:
                record = records.read_night(self.layout, ds)
                if record and records.is_whole(record, self.layout):
                    return ds
            except DataContractError as error:
                self.damaged[ds] = error
        return None

    # -- Days --

    def _is_old(self, table: Table, ds: dt.date) -> bool:
        """Returns whether a day lies before those that are kept of a table."""
        kind = kind_of(table)
        days = self._retention.days_of(kind)
        if days is None or self.newest is None:
            return False
        if kind in _GO_ON:
            days = max(days, _days_gone_on_from(self._settings))
        return ds <= self.newest - dt.timedelta(days=days)

    def _is_expired(self, table: Table, ds: dt.date) -> bool:
        return self._is_old(table, ds) and not self._is_gone_on_from(table, ds)

    def _is_gone_on_from(self, table: Table, ds: dt.date) -> bool:
        """Returns whether the day after is still to be made: a hole, and not what was pruned."""
        after, begun, kind = ds + dt.timedelta(days=1), self._begun[table], kind_of(table)
        if kind not in _GO_ON or ds not in begun:
            return False
        together = [one for one in kind.tables if ds in self._begun[one]]
        if after in begun and all(self._is_published(one, after) for one in together):
            return False
        record = records.read_night(self.layout, after)
        return record is None or table.name not in record.get("pruned", {})

    def _is_published(self, table: Table, ds: dt.date) -> bool:
        """Returns whether a day is published; one whose manifest is damaged is to be made again."""
        try:
            return partitions.is_published(self.layout.folder(table, ds))
        except DataContractError:
            return False

    def _day(
        self, table: Table, ds: dt.date, mine: "Documents", named: Mapping[str, set[str]]
    ) -> Iterator[Gone]:
        """Yields a partition; without files where other sets name it, while this one does too."""
        folder = self.layout.folder(table, ds)
        there = tuple(files.below(folder))
        path = os.path.join(folder, MANIFEST)
        found = files.read_if_there(path)
        version = (
            partitions.parse_manifest(path, found)["version"]
            if found and any(named.values())
            else None
        )
        stays_for = tuple(name for name, versions in named.items() if version in versions)
        if not stays_for:
            yield Gone(DAY, table.name, ds, folder, there)
        elif mine.record and table.name in mine.record["tables"]:
            yield Gone(DAY, table.name, ds, folder, (), stays_for)

    # -- Earlier versions --

    def _versions(
        self, table: Table, ds: dt.date, expired: bool, protected: set[str]
    ) -> Iterator[Gone]:
        """Yields the earlier versions that go: of an expired day all but the `protected` ones."""
        if ds not in self._kept[table]:
            return
        place = self.layout.place(table, ds)
        names = files.list_names(place.kept)
        keep = 0 if expired else self._retention.versions
        if len(names) <= keep:
            return
        now = partitions.published_version(place.folder)
        if not now and not expired and files.exists(os.path.join(place.folder, MANIFEST)):
            return  # a run died while it replaced one: which are the earlier ones is not settled
        found = [
            Gone(VERSION, table.name, ds, folder, tuple(files.below(folder)))
            for folder in (os.path.join(place.kept, name) for name in names if name != now)
        ]
        for one in sorted(found, key=_written_us, reverse=True)[keep:]:
            named = os.path.basename(one.folder) in protected
            if not named and self._is_older(one, self._retention.grace_hours):
                yield one

    # -- What is staged --

    def _staged(self, kind: Kind, ds: dt.date) -> Iterator[Gone]:
        """Yields what runs staged that died or were refused long ago.

        Not that of a forced run that may have published one of two tables: it tells that.
        """
        top = os.path.join(self.layout.kind_folder(kind), f"ds={ds}")
        for folder in (os.path.join(top, name) for name in files.list_names(top)):
            one = Gone(STAGED, kind.name, ds, folder, tuple(files.below(folder)))
            is_old = self._is_older(one, self._retention.staging_hours)
            if is_old and not states.is_half_published(folder):
                yield one

    def _is_older(self, one: Gone, hours: float) -> bool:
        return _written_us(one) <= (self.now.timestamp() - hours * 3600) * 1_000_000


def _written_us(one: Gone) -> int:
    """Returns when the newest file was written: of an earlier version, when it was replaced.

    Its manifest is written there by then.
    """
    return max((file.written_us or 0 for file in one.files), default=0)


def _days_gone_on_from(settings: Settings) -> int:
    """Returns how many days of histories and embeddings the window needs, and what it goes on from.

    Clicks that come late count in the days before it.
    """
    log = settings.impressions
    delay = math.ceil(log.click_delay_seconds / _DAY_SECONDS) if log else 0
    return settings.window_days + settings.late_days + delay + 1


def _staged_days(top: str) -> list[dt.date]:
    names = [name for name in files.list_names(top) if name.startswith("ds=")]
    return [day for day in map(date_of, names) if day]


@dataclass(frozen=True)
class Documents:
    """Holds what a feature set says of a day: the night's record, whose bytes are `data`, the hold.

    Each is None where there is none.
    """

    data: bytes | None
    record: dict[str, Any] | None
    hold: dict[str, Any] | None

    @property
    def is_held(self) -> bool:
        return self.hold is not None

    def versions(self, table: Table) -> set[str]:
        """Returns all versions of a table that they name, the night before included."""
        found, left = set[str](), [self.record, self.hold and self.hold["record"]]
        while left:
            if one := left.pop():
                if entry := one["tables"].get(table.name):
                    found.add(entry["version"])
                left.append(one.get("before"))
        return found


def documents(layout: Layout, ds: dt.date) -> Documents:
    """Reads what a feature set says of a day."""
    path = layout.night_path(ds)
    data = files.read_if_there(path)
    record = parse_record(path, data) if data else None
    return Documents(data, record, records.read_hold(layout, ds))


# ---- Telling -----------------------------------------------------------------------------------


def render(told: Pruned) -> str:
    """Returns what people read: a line for each table and what went of it, then the sum."""
    lines = []
    for (name, what), some in told.together().items():
        some_go = [one for one in some if not one.others]
        if some_go:
            lines.append(f"{name}, {what}: {_days(some_go)}: {_amount(some_go)}")
        if stay := [one for one in some if one.others]:
            others = sorted({other for one in stay for other in one.others})
            lines.append(
                f"{name}, {what}: {_days(stay)}: named no more, but kept for {', '.join(others)}"
            )
    verb = "would go" if told.dry_run else "gone"
    lines.append(f"{verb}: {_amount(told.gone)}" if told.gone else "nothing to prune")
    if told.skipped:
        days = ", ".join(f"ds {ds}" for ds in sorted(told.skipped))
        number = len(told.skipped)
        left = "day left as it is" if number == 1 else "days left as they are"
        lines.append(f"{number:,} {left}: {days}")
    return "\n".join(lines)


def damaged(told: Pruned) -> CourierError:
    """Returns the error with which a prune ends that could not tell what goes of some days."""
    days = ", ".join(f"ds {ds}" for ds in sorted(told.damaged))
    return CourierError(
        f"Documents are damaged by which it is told what may go of {days}, so that nothing of it "
        "was deleted, nor will be; all else was pruned. Mend what the warnings above name, and run "
        "the command again."
    )


def _days(some: Sequence[Gone]) -> str:
    days = sorted({one.ds for one in some})
    if len(days) == 1:
        return f"ds {days[0]}"
    return f"{len(days):,} days, ds {days[0]} to {days[-1]}"


def _amount(some: Sequence[Gone]) -> str:
    number = sum(len(one.files) for one in some)
    return f"{number:,} {'file' if number == 1 else 'files'}, {_size(sum(x.bytes for x in some))}"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
