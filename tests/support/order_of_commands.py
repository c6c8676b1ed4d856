"""Runs commands on a small shop in any order, kills some, and looks at what readers find."""

import datetime as dt
import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pipelines.stages import EMBED, HISTORIES, SIMSCORE
from tests.conftest import Artefacts
from tests.support.any_order import (
    CLOSED,
    COMES_LATE,
    DAYS,
    DONE,
    NOT_READY,
    ONE_DAY,
    REFUSED,
    TABLES,
    USAGE,
    Inputs,
    Key,
    Log,
    Model,
    Seen,
)
from tests.support.ordered_shop import DAYS_KEPT, Shop
from tests.support.stub_nights import LATE_DAYS

RAN: Counter[str] = Counter()

some_day = st.runner().flatmap(lambda order: st.sampled_from(order.horizon))
open_day = some_day.filter(lambda ds: ds != CLOSED)
# Ahead of which change of the disk a command dies, if it has not ended before; half of them do not.
_MOMENTS = [*range(1, 40, 3), *range(40, 200, 16)]
moments = st.sampled_from([*[None] * len(_MOMENTS), *_MOMENTS])


class AnyOrder(RuleBasedStateMachine):
    """Runs commands of days of the `horizon`, and looks after each at what readers find."""

    folder: ClassVar[Path]
    artefacts: ClassVar[Artefacts]
    horizon: ClassVar[tuple[dt.date, ...]] = DAYS
    features_from: ClassVar[str] = "same"

    @initialize(count=st.sampled_from([5, 3, 0, 4]))
    def open_shop(self, count: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.inputs = Inputs()
        self.shop, self.model = self.open(), self.judge()
        self.sight, self.files = self.shop.seen(), self.shop.digest()
        self.is_straight = True  # each day was made from the one before, and nothing twice
        if count:
            self.change_log(COMES_LATE, "late rows")
            self.refresh(self.horizon[0], count, remake=False, kill_at=None)

    def open(self, root: str = "features") -> Shop:
        return Shop(self.folder, self.artefacts, self.inputs, root, self.features_from)

    def judge(self) -> Model:
        return Model(self.inputs)

    # -- The shop's own tables change --

    @rule(ds=some_day, change=st.sampled_from(["replaced", "rewritten", "broken or mended"]))
    def change_catalogue(self, ds: dt.date, change: str) -> None:
        self.inputs.catalogues[ds] = self.inputs.catalogues[ds].after(change)

    @rule(ds=open_day, change=st.sampled_from(["late rows", "rewritten", "broken or mended"]))
    def change_log(self, ds: dt.date, change: str) -> None:
        self.inputs.logs[ds] = self.inputs.logs.get(ds, Log()).after(change)

    @rule()
    def draw_images(self) -> None:
        self.shop.draw_images()
        self.is_straight = False

    @rule(ds=some_day)
    def remake_of_other_images(self, ds: dt.date) -> None:
        """Makes a day again, by the same run, of which other vectors come; later ones follow."""
        self.draw_images()
        self.refresh(ds, 1, remake=True, kill_at=None)
        self.cascade(step_days=3, kill_at=None)

    # -- Commands --

    @rule(ds=some_day, count=st.integers(1, 3), remake=st.booleans(), kill_at=moments)
    def refresh(self, ds: dt.date, count: int, remake: bool, kill_at: int | None) -> None:
        days = self.days(ds, count)
        args = ["refresh", "--start-ds", days[0], "--end-ds", days[-1]]
        self.make_nights([*args, *["--remake"] * remake], days, (), kill_at)

    @rule(ds=some_day, kill_at=moments)
    def refresh_one(self, ds: dt.date, kill_at: int | None) -> None:
        self.make_nights(["refresh", "--ds", ds], [ds], (), kill_at)

    @rule(ds=some_day, kill_at=moments)
    def accept(self, ds: dt.date, kill_at: int | None) -> None:
        accepted = ("image_coverage", "unknown_items")
        args = ["refresh", "--ds", ds, "--reason", "a test"]
        args += [word for name in accepted for word in ("--accept", name)]
        self.make_nights(args, [ds], accepted, kill_at)

    @rule(ds=some_day, kill_at=moments)
    def roll_back(self, ds: dt.date, kill_at: int | None) -> None:
        """Brings back what a night's record says was before; a day on hold stays as it is."""
        record, is_held = self.shop.record(ds), ds in self.shop.holds()
        before = record and record["before"]
        status = self.command(["rollback", "--ds", ds], [ds], kill_at)
        if not before and not is_held:
            assert status == USAGE
            return self.nothing_changed([ds])
        assert status == DONE, self.shop.told
        assert ds in self.shop.holds()
        self.is_straight = False
        RAN["rolled back"] += not is_held
        if is_held:
            return self.nothing_changed([ds])
        for name, kind in TABLES.items():
            then = record if kind.is_shared else before
            assert self.sight[name, ds].version == then["tables"][name]["version"]
        self.record_stands(ds)

    @rule(ds=some_day, kill_at=moments)
    def reject_night(self, ds: dt.date, kill_at: int | None) -> None:
        """Makes a night of another catalogue and rolls it back; then a range leaves it out."""
        self.change_catalogue(ds, "replaced")
        self.refresh_one(ds, kill_at=None)
        self.roll_back(ds, kill_at)
        self.refresh(max(self.horizon[0], ds - ONE_DAY), 3, remake=False, kill_at=None)

    @precondition(lambda self: self.shop.holds())
    @rule(at=st.integers(0, len(DAYS) - 1))
    def release(self, at: int) -> None:
        held = sorted(self.shop.holds())
        self.release_day(held[at % len(held)])

    def release_day(self, ds: dt.date) -> None:
        assert self.command(["rollback", "--ds", ds, "--release"], [ds]) == DONE, self.shop.told
        assert ds not in self.shop.holds()
        assert all("/_holds/" in path for path in self.changed_of(ds))

    @rule(ds=open_day, of_log=st.booleans(), then=st.sampled_from(["left", "accepted", "mended"]))
    def bad_night(self, ds: dt.date, of_log: bool, then: str) -> None:
        """Breaks what a day is made of, or mends it, and makes it; lets it pass, or mends it."""
        change = self.change_log if of_log else self.change_catalogue
        change(ds, "broken or mended")
        self.refresh_one(ds, kill_at=None)
        if then == "accepted":
            self.accept(ds, kill_at=None)
        elif then == "mended":
            change(ds, "broken or mended")
            self.refresh_one(ds, kill_at=None)

    # -- Backfills --

    @rule(
        ds=some_day, count=st.integers(1, len(DAYS)), only=st.sampled_from(["", "--only-missing"]),
        step_days=st.integers(1, 3), kill_at=moments,
    )  # fmt: skip
    def backfill(
        self, ds: dt.date, count: int, only: str, step_days: int, kill_at: int | None
    ) -> None:
        days, was, held = self.days(ds, count), self.sight, self.shop.holds()
        pruned = self.pruned()
        there = [day for day in days if day in pruned or (only and self.shop.record(day))]
        wanted = [day for day in days if day not in held and day not in there]
        bad = [day for day in wanted if self.inputs.is_bad(day)]
        is_ready = self.model.can_be_planned(wanted, was)
        must = is_ready and self.must_be_refused(wanted, bad)
        args = ["backfill", "--start-ds", days[0], "--end-ds", days[-1]]
        status = self.command(
            [*args, "--step-days", step_days, *filter(None, [only])], days, kill_at
        )
        if held & set(days) or must:
            assert status == REFUSED, self.shop.told
        elif not is_ready:
            assert status == NOT_READY or (bad and status == REFUSED), self.shop.told
        else:
            assert status == DONE or (bad and status == REFUSED), self.shop.told
        self.nothing_changed(set(there) - held)
        self.nothing_held_changed(held)
        self.is_right_or_as_it_was(days, was)
        for day in wanted if status == DONE else ():
            self.must_be_whole(day)

    @rule(step_days=st.integers(1, 3), kill_at=moments)
    def cascade(self, step_days: int, kill_at: int | None) -> None:
        """Makes anew what is stale of all days: then all that is visible is right."""
        held, was = self.shop.holds(), self.sight
        args = ["backfill", "--cascade", "--step-days", step_days]
        status = self.command(args, DAYS, kill_at)
        bad = {ds for ds in DAYS if self.inputs.is_bad(ds)} - held
        assert status == DONE or (bad and status == REFUSED), self.shop.told
        self.nothing_held_changed(held)
        left = bad | held | self.pruned()
        for name, ds in self.sight:
            if ds not in left:
                assert self.model.is_right(TABLES[name], ds, self.sight), (name, ds)
        assert set(self.sight) == set(was)
        assert self.run(["status", "--json", "--start-ds", DAYS[0]]) == DONE
        blocked = {str(ds) for ds in DAYS if any(day <= ds for day in bad)}
        assert set(json.loads(self.shop.out)["stale"]) <= blocked

    @rule(kill_at=moments)
    def late(self, kill_at: int | None) -> None:
        """Makes again the newest days whose log grew, and no others."""
        held, was = self.shop.holds(), self.sight
        newest = max((ds for _, ds in was), default=DAYS[0])
        scores = SIMSCORE.tables[0].name
        grown = {
            ds
            for ds, log in self.inputs.logs.items()
            if (scores, ds) in was and len(was[scores, ds].content) < len(log.numbers)
            and ds >= newest - LATE_DAYS * ONE_DAY
        } - held  # fmt: skip
        bad = {ds for ds in grown if self.inputs.is_bad(ds)}
        status = self.command(["backfill", "--late"], DAYS, kill_at)
        assert status == DONE or (bad and status == REFUSED), self.shop.told
        for ds in grown - bad:
            self.must_be_whole(ds)
        whole = {ds for ds in DAYS if (scores, ds) in was}
        self.nothing_changed(whole - grown - held)
        self.nothing_held_changed(held)

    @rule(kill_at=moments)
    def prune(self, kill_at: int | None) -> None:
        """Takes old scores away, and changes nothing else that is visible."""
        held, was = self.shop.holds(), self.sight
        assert self.command(["prune"], DAYS, kill_at) == DONE, self.shop.told
        assert {key: seen for key, seen in was.items() if key in self.sight} == self.sight
        newest = max((ds for _, ds in was), default=DAYS[0])
        for name, ds in was.keys() - self.sight.keys():
            assert TABLES[name] is SIMSCORE
            assert newest - ds >= DAYS_KEPT * ONE_DAY
            assert name in self.shop.record(ds)["pruned"]
            self.is_straight = False
            RAN["pruned"] += 1
        for ds in held:  # versions that neither the hold nor the record names may go
            assert all(path.startswith("_versions/") for path in self.changed_of(ds))

    def pruned(self) -> set[dt.date]:
        """Returns the days of which tables were pruned, and not made again since."""
        found = {ds: self.shop.record(ds) for ds in self.horizon}
        return {ds for ds, record in found.items() if record and record.get("pruned")}

    @rule()
    def settle(self) -> None:
        """Mends all: then a backfill makes all days, and they are those of a fresh root."""
        self.inputs.mend()
        for ds in sorted(self.shop.holds()):
            self.release_day(ds)
        self.cascade(step_days=3, kill_at=None)
        self.backfill(self.horizon[0], len(DAYS), only="", step_days=len(DAYS), kill_at=None)
        assert self.run(["status", "--json", "--start-ds", DAYS[0]]) == DONE
        assert json.loads(self.shop.out)["stale"] == {}
        if self.is_straight and not self.pruned() and self.goes_day_by_day():
            fresh = self.open("fresh")
            for ds in self.horizon:
                assert fresh.run("refresh", "--ds", ds) == DONE, fresh.told
            RAN["commands"] += len(self.horizon)
            RAN["equal to a fresh root"] += 1
            found = fresh.seen()
            assert {k: v.content for k, v in self.sight.items()} == {
                k: v.content for k, v in found.items()
            }
            shutil.rmtree(fresh.root)

    def goes_day_by_day(self) -> bool:
        """Returns whether each day went on from the one before it."""
        firsts = [(table.name, ds) for table in (EMBED.tables[0], HISTORIES.tables[0])
                  for ds in self.horizon[1:]]  # fmt: skip
        scores = {ds: self.sight[SIMSCORE.tables[0].name, ds].nights for ds in self.horizon}
        return all(self.sight[name, ds].before == ds - ONE_DAY for name, ds in firsts) and all(
            nights is None or nights == self.horizon[max(0, place - 3) : place][::-1]
            for place, nights in enumerate(scores.values())
        )

    def days(self, ds: dt.date, count: int) -> list[dt.date]:
        return [day for day in self.horizon if ds <= day][:count]

    def nothing_held_changed(self, days: Collection[dt.date]) -> None:
        """Asserts that of days on hold no byte of the feature set's own tables has changed.

        Histories are those of all sets; the night's record names the ones that are there.
        """
        for ds in days:
            changed = self.changed_of(ds)
            assert all(path.startswith(("shared/", "_versions/shared/", "test/_nights/"))
                       for path in changed), changed  # fmt: skip
            self.record_stands(ds)

    def is_right_or_as_it_was(self, days: Collection[dt.date], was: Mapping[Key, Seen]) -> None:
        """Asserts that of each stage of these days, if anything has changed, it is right by now."""
        for (name, ds), seen in self.sight.items():
            if ds in days and seen != was.get((name, ds)):
                assert self.model.is_right(TABLES[name], ds, self.sight), (name, ds)

    # -- What holds of nights that are made --

    def make_nights(
        self, args: list[Any], days: list[dt.date], accepted: Collection[str],
        kill_at: int | None,
    ) -> None:  # fmt: skip
        """Refreshes days, and asserts how that ends and what of each is visible then."""
        model, held = self.model, self.shop.holds()
        free = [ds for ds in days if ds not in held]
        is_ready = model.can_be_planned(free, self.sight)
        bad = [ds for ds in free if self.inputs.is_bad(ds) and not accepted]
        must = bool(bad) if "--remake" in args else self.must_be_refused(free, bad)
        status = self.command(args, days, kill_at)
        if not is_ready:
            assert status == NOT_READY, self.shop.told
            return self.nothing_changed(days)
        if held & set(days) or must:
            assert status == REFUSED, self.shop.told
        else:
            assert status == DONE or (status == REFUSED and bad), self.shop.told
        for place, ds in enumerate(free):
            if model.is_whole(ds, self.sight) and self.changed_of(ds):
                self.record_stands(ds)
            elif status == DONE or not bad or place < free.index(bad[0]):
                self.must_be_whole(ds)
            else:
                self.nothing_changed([ds])
        self.nothing_changed(held & set(days))

    def must_be_refused(self, days: list[dt.date], bad: Collection[dt.date]) -> bool:
        """Returns whether the first of days is to be made, as far as it is bad.

        Of later ones the days before them decide, which change meanwhile.
        """
        ds = days[0] if days else None
        if ds is None or ds not in bad:
            return False
        log = self.inputs.logs.get(ds)
        judged = {
            EMBED: self.inputs.catalogues[ds].is_bad,
            SIMSCORE: log is not None and log.is_bad,
        }
        return any(is_bad and not self.model.is_right(kind, ds, self.sight)
                   for kind, is_bad in judged.items())  # fmt: skip

    def must_be_whole(self, ds: dt.date) -> None:
        """Asserts that all of a night is right, and that its record says so."""
        assert self.model.is_whole(ds, self.sight), ds
        self.model.learn(ds, self.sight)
        self.record_stands(ds)

    def record_stands(self, ds: dt.date) -> None:
        """Asserts that a night's record names what is visible."""
        record = self.shop.record(ds)
        assert record
        assert {*record["tables"], *record.get("pruned", ())} == set(TABLES)
        for name, entry in record["tables"].items():
            assert entry["version"] == self.sight[name, ds].version, (name, ds)

    # -- What holds of every command --

    def command(
        self, args: list[Any], days: Collection[dt.date], kill_at: int | None = None
    ) -> int:
        """Runs a command, which dies on the way if it is told where, and then the same again.

        Asserts that other days than its own stay as they are; that while it was dead, readers found
        what was there before or what came of it; and that, if it ended well, to type it again
        changes no byte. Returns its status.
        """
        self.shop.write_inputs()
        self.was, self.was_files, while_dead = self.sight, self.files, {}
        if kill_at is not None:
            RAN["commands"] += 1
            if self.shop.run_killed(kill_at, *args) is None:
                RAN["died"] += 1
                while_dead = self.look()
        status = self.run(args)
        self.sight, self.files = self.look(), self.shop.digest()
        for key, seen in while_dead.items():
            found = [sight[key].content for sight in (self.was, self.sight) if key in sight]
            assert seen.content in found, key
        self.nothing_changed(set(DAYS) - set(days))
        if status == DONE and "--release" not in args:
            assert self.run(args) == DONE, self.shop.told
            changed = different(self.files, self.shop.digest())
            if "--remake" in args:  # its manifests may tell otherwise for what it was made
                changed = [path for path in changed if path.endswith(".parquet")]
            if args == ["prune"]:  # what a day leaves of its versions, it finds when it comes again
                changed = [path for path in changed if not path.startswith("_versions/")]
            assert changed == []
            self.files = self.shop.digest()
        return status

    def run(self, args: list[Any]) -> int:
        status = self.shop.run(*args)
        RAN["commands"] += 1
        RAN[f"ended with {status}"] += 1
        assert "Traceback" not in self.shop.told
        return status

    def look(self) -> dict[Key, Seen]:
        sight = self.shop.seen()
        RAN["versions read"] += len(sight)
        return sight

    def changed_of(self, ds: dt.date) -> list[str]:
        return [path for path in different(self.was_files, self.files) if f"ds={ds}" in path]

    def nothing_changed(self, days: Collection[dt.date]) -> None:
        """Asserts that of these days no byte that anybody reads has changed."""
        for ds in days:
            assert self.changed_of(ds) == []


def different(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    return [path for path in one | other if one.get(path) != other.get(path)]
