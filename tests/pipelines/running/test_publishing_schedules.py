"""Publishing is fenced: a writer may stop anywhere for another one, and loses nothing of either.

On a disk a writer is stopped between calls of the system, in a bucket between requests. The numbers
of schedules that were tried are printed (`pytest -s`).
"""

import datetime as dt

import pytest

from feature_jobs.store import files
from tests.support.schedules import Calls, Schedule
from tests.support.small_nights import DS, Readers, Shop, contents, shop_of
from tests.support.writers import (
    FIRST,
    MINE,
    NIGHTS,
    OLD,
    OTHER,
    SECOND,
    begin,
    nothing_is_lost,
    refused,
    stage,
)


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_a_writer_that_stops_anywhere_for_another_leaves_what_that_one_published(
    folder: str, calls: Calls, first: str, second: str
) -> None:
    before, mine, expected = FIRST[first]
    other = SECOND[second]
    shop = begin(f"{folder}/begun", before)
    stage(shop, first)
    begun = contents(shop)
    stop_at, ended, overtaken = 0, False, 0
    while not ended:
        stop_at += 1
        shop = shop_of(begun, f"{folder}/{stop_at}")
        readers = Readers(shop, NIGHTS)
        came_late, others = False, None

        def run_other(shop: Shop = shop) -> None:
            nonlocal came_late, others
            told = refused(other, shop)
            if "Another run published" in told:  # the first was amid the step that changes it
                told = refused(other, shop)
            assert told == "" or "There is no earlier night" in told
            came_late = told != ""
            with calls.quietly():
                others = shop.published()

        schedule = Schedule(calls, stop_at, run_other, readers.poll)
        with pytest.MonkeyPatch.context() as patch, schedule.running(patch):
            told = refused(mine, shop)
        assert told == "" or "Another run published" in told
        stopped = told != ""
        readers.poll()
        readers.check()
        ended = not schedule.was_stopped
        if ended:
            assert shop.published() == expected
            break
        overtaken += stopped
        stands = shop.published()
        if stopped:
            assert stands == others, schedule.stopped_at
            nothing_is_lost(shop, stands, [*before, others])
        else:  # one came after the other, and a rollback goes back to what was there then
            assert stands in (expected, others, *before), schedule.stopped_at
            nothing_is_lost(shop, stands, [*before, *([] if came_late else [others])])
        for again in (other, mine):  # one more run of either
            told = refused(again, shop)
            assert told == "" or "There is no earlier night" in told
            now = shop.published()
            assert now in NIGHTS
            nothing_is_lost(shop, now, [*before, stands])
    assert stop_at > 15
    assert overtaken or (first, second) == ("publishes", "rolls back")
    print(f"\n{first}, the other {second}: {stop_at - 1} schedules, overtaken in {overtaken}")  # noqa: T201


_OF_RECORDS = 20  # calls at the end of a publication, for record and latest.json, and some more


@pytest.mark.parametrize("days", [1, -1], ids=["a later day", "an earlier day"])
def test_of_two_days_in_any_order_the_later_one_is_the_newest(
    folder: str, calls: Calls, days: int
) -> None:
    """The first writer stops for one of another day, which had been published before.

    They meet at what follows their tables, so that only there it stops.
    """
    other_day = DS + dt.timedelta(days=days)
    Shop(f"{folder}/begun", other_day).publish(OLD)
    shop = Shop(f"{folder}/begun")
    stage(shop, "publishes")
    begun = contents(shop)

    def run(stop_at: int) -> Schedule:
        shop = shop_of(begun, f"{folder}/{stop_at}")
        other = Shop(shop.settings.root, other_day)
        record_there = list[bool]()

        def run_other() -> None:
            with calls.quietly():
                record_there.append(files.exists(shop.settings.layout.night_path(DS)))
            other.publish(OTHER)

        readers = Readers(shop, NIGHTS)
        schedule = Schedule(calls, stop_at, run_other, readers.poll)
        with pytest.MonkeyPatch.context() as patch, schedule.running(patch):
            shop.publish(MINE)
        readers.poll()
        if not schedule.was_stopped:
            other.publish(OTHER)
        newest = (DS, MINE) if days < 0 else (other_day, OTHER)
        assert shop.newest() == newest, schedule.stopped_at
        assert (shop.published(), other.published()) == (MINE, OTHER)
        came_first.extend(record_there)
        return schedule

    came_first = list[bool]()
    last = run(10**6).calls_made
    for stop_at in range(last - _OF_RECORDS, last + 1):
        assert run(stop_at).was_stopped
    assert came_first[0] is False
    assert sum(came_first) >= 4
    print(f"\nthe other on {other_day}: {len(came_first)} schedules")  # noqa: T201
