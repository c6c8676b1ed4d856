"""Says what must be visible of a small shop whose commands come in any order.

The model knows what the shop's own tables hold and what readers have found so far, and judges what
they find next: a stage of a day is *right* where its tables hold what follows from today's inputs,
from the same day's tables upstream and from those of the day that it goes on from, all as they are
visible now. It knows nothing of runs, files and locks.
"""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipelines.stages import EMBED, HISTORIES, ITEM_FEATURES, NIGHT, SIMSCORE, Kind
from tests.support import stub_nights
from tests.support.stub_nights import UNKNOWN_FROM, Rows, Tables

DAYS = tuple(dt.date(2026, 3, day) for day in range(1, 8))
CLOSED = DAYS[3]  # with a catalogue, and no log
COMES_LATE = DAYS[4]  # its log is not there at the beginning
DONE, USAGE, REFUSED, NOT_READY = 0, 2, 3, 4
ONE_DAY = dt.timedelta(days=1)
TABLES = {table.name: kind for kind in NIGHT for table in kind.tables}

Key = tuple[str, dt.date]  # a table of a day


# ---- The shop's own tables ----------------------------------------------------------------------


@dataclass(frozen=True)
class Catalogue:
    """Is the catalogue of a day: `version` says which items, `is_bad` that most have no image."""

    version: int = 0
    is_bad: bool = False
    encoding: int = 0  # the same rows in other bytes

    @property
    def rows(self) -> Rows:
        items = (1, 2, 3, 4 + self.version % 4)
        return tuple(
            (item, not self.is_bad or item == 1, ("dress", "shirt")[(item + self.version) % 2])
            for item in items
        )

    def after(self, change: str) -> "Catalogue":
        """Returns the catalogue that takes its place."""
        if change == "rewritten":
            return replace(self, encoding=self.encoding + 1)
        if change == "replaced":
            return replace(self, version=self.version + 1)
        return replace(self, is_bad=not self.is_bad)


@dataclass(frozen=True)
class Log:
    """Is the log of a day: the numbers of its impressions."""

    numbers: tuple[int, ...] = (0, 1)
    encoding: int = 0

    @property
    def rows(self) -> Rows:
        return tuple((number,) for number in self.numbers)

    @property
    def is_bad(self) -> bool:
        """Returns whether so many impressions are of unknown items that a gate refuses."""
        return max(self.numbers) >= UNKNOWN_FROM

    def after(self, change: str) -> "Log":
        """Returns the log that takes its place."""
        if change == "rewritten":
            return replace(self, encoding=self.encoding + 1)
        good = [n for n in self.numbers if n < UNKNOWN_FROM]
        bad = [n for n in self.numbers if n >= UNKNOWN_FROM]
        if change == "late rows":
            good.append(len(good))
        else:
            bad = [] if bad else [UNKNOWN_FROM + n for n in good]
        return replace(self, numbers=(*good, *bad))


@dataclass
class Inputs:
    """Holds what the shop's own tables and images hold, and what the images held before."""

    catalogues: dict[dt.date, Catalogue] = field(
        default_factory=lambda: dict.fromkeys(DAYS, Catalogue())
    )
    logs: dict[dt.date, Log] = field(
        default_factory=lambda: {ds: Log() for ds in DAYS if ds not in (CLOSED, COMES_LATE)}
    )
    images: list[Mapping[int, str]] = field(default_factory=list)  # by item; the newest is last

    def log_rows(self, ds: dt.date) -> Rows:
        return self.logs[ds].rows if ds in self.logs else ()

    def is_there(self, ds: dt.date) -> bool:
        """Returns whether a day has all its inputs."""
        return ds in self.logs or ds == CLOSED

    def is_bad(self, ds: dt.date) -> bool:
        """Returns whether gates refuse what is made of a day, unless they are accepted."""
        return self.catalogues[ds].is_bad or (ds in self.logs and self.logs[ds].is_bad)

    def mend(self) -> None:
        """Mends all that is bad, and brings the log that comes late."""
        self.catalogues = {ds: replace(c, is_bad=False) for ds, c in self.catalogues.items()}
        logs = {ds: self.logs.get(ds, Log()) for ds in DAYS if ds != CLOSED}
        self.logs = {ds: log.after("mended") if log.is_bad else log for ds, log in logs.items()}


# ---- What readers find --------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Is what a reader finds of a table of a day: version and content.

    `before` is the day that its manifest says it went on from, None for none; `nights` are those
    that it names to be scored with, None where it is scored with its own.
    """

    version: str
    content: Rows
    before: dt.date | None
    nights: tuple[dt.date, ...] | None = None


Sight = Mapping[Key, Seen]


@dataclass(frozen=True)
class Arguments:
    """Holds what the tables of a stage follow from; `before` are those that it goes on from."""

    kind: Kind
    ds: dt.date
    inputs: Rows
    images: Mapping[int, str]
    upstream: Tables
    before: tuple[Rows, ...]

    def tables(self) -> Tables:
        """Returns what stub jobs make of it."""
        before = self.before[0] if self.before else ()
        if self.kind is EMBED:
            there = {item: self.images[item] for item, has_image, _ in self.inputs if has_image}
            return stub_nights.embedded(self.ds, self.inputs, there, before)
        if self.kind is ITEM_FEATURES:
            return stub_nights.features(self.upstream)
        if self.kind is HISTORIES:
            return stub_nights.histories(self.ds, self.inputs, before)
        return stub_nights.scores(self.inputs, self.upstream, before)


class Model:
    """Judges what readers find."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs

    def makes(self, arguments: Arguments, tables: Tables) -> bool:
        """Returns whether these are the tables that follow from the arguments."""
        return arguments.tables() == tables

    def learn(self, ds: dt.date, sight: Sight) -> None:
        """Takes what is visible of a day for right."""

    def is_right(self, kind: Kind, ds: dt.date, sight: Sight) -> bool:
        """Returns whether a stage shows what follows from what is visible now."""
        names = [table.name for table in kind.tables]
        if any((name, ds) not in sight for name in names):
            return False
        tables = {name: sight[name, ds].content for name in names}
        return any(self.makes(one, tables) for one in self._arguments(kind, ds, sight))

    def is_whole(self, ds: dt.date, sight: Sight) -> bool:
        return all(self.is_right(kind, ds, sight) for kind in NIGHT)

    def _arguments(self, kind: Kind, ds: dt.date, sight: Sight) -> list[Arguments]:
        """Returns what a stage may have been made from; none where something is not there."""
        upstream = [t.name for one in _UPSTREAM[kind] for t in one.tables]
        named = sight[kind.tables[0].name, ds].nights
        nights = (ds,) if named is None else named
        if any((name, night) not in sight for name in upstream for night in nights):
            return []
        made = {
            name: tuple(row for night in nights for row in sight[name, night].content)
            for name in upstream
        }
        if kind is ITEM_FEATURES:
            return [Arguments(kind, ds, (), {}, made, ())]
        before = self._before(kind, ds, sight)
        if before is None:
            return []
        if kind is EMBED:
            rows = tuple(sorted(self.inputs.catalogues[ds].rows))
            return [Arguments(kind, ds, rows, i, made, before) for i in self.inputs.images]
        return [Arguments(kind, ds, self.inputs.log_rows(ds), {}, made, before)]

    def _before(self, kind: Kind, ds: dt.date, sight: Sight) -> tuple[Rows, ...] | None:
        """Returns what a stage says that it goes on from; None where that is not there."""
        named = sight[kind.tables[0].name, ds].before
        if named is None and kind is EMBED:
            return ()
        if named is None:
            logs = {day: log.rows for day, log in self.inputs.logs.items() if day < ds}
            return (stub_nights.histories_of_log(ds - ONE_DAY, logs),)
        earlier = EMBED if kind is EMBED else HISTORIES
        found = [sight.get((table.name, named)) for table in earlier.tables]
        return tuple(one.content for one in found if one) if all(found) else None

    def can_be_planned(self, days: Sequence[dt.date], sight: Sight) -> bool:
        """Returns whether all inputs of days are there, and their histories have no gap."""
        known = {ds for name, ds in sight if name == HISTORIES.tables[0].name}
        for ds in days:
            earlier = [day for day in known if day < ds]
            own = sight.get((HISTORIES.tables[0].name, ds))
            begins = not earlier or (own is not None and own.before is None)
            if not self.inputs.is_there(ds) or not (begins or ds - ONE_DAY in earlier):
                return False
            known.add(ds)
        return True


class Witness(Model):
    """Judges tables of jobs that it cannot do itself: from the same arguments come the same tables.

    What it has learnt, it knows for all shops that are alike, in `known`.
    """

    def __init__(self, inputs: Inputs, known: dict[str, Tables]):
        super().__init__(inputs)
        self._known = known

    def makes(self, arguments: Arguments, tables: Tables) -> bool:
        return self._known.get(repr(arguments), tables) == tables

    def learn(self, ds: dt.date, sight: Sight) -> None:
        for kind in NIGHT:
            tables = {table.name: sight[table.name, ds].content for table in kind.tables}
            for arguments in self._arguments(kind, ds, sight):
                self._known[repr(arguments)] = tables


_UPSTREAM: dict[Kind, tuple[Kind, ...]] = {
    EMBED: (), ITEM_FEATURES: (EMBED,), HISTORIES: (), SIMSCORE: (EMBED, ITEM_FEATURES),
}  # fmt: skip
