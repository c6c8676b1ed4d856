"""Publishing is fenced: a writer may stop anywhere for another one, and loses nothing of either.

On a disk a writer is stopped between calls of the system, in a bucket between requests. The numbers
of schedules that were tried are printed (`pytest -s`).
"""

import pytest

from tests.support.schedules import Calls, Schedule
from tests.support.small_nights import Readers, Shop, contents, shop_of
from tests.support.writers import FIRST, NIGHTS, SECOND, begin, nothing_is_lost, refused, stage


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
