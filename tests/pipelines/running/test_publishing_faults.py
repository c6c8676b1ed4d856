"""Publishing bears each call of the store failing, once or for good, and loses nothing by it.

The numbers of faults that were tried are printed (`pytest -s`).
"""

import errno

import pytest
import requests

from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import faults
from tests.support.schedules import CHANGING, Calls
from tests.support.small_nights import Readers, contents, shop_of
from tests.support.writers import FIRST, NIGHTS, begin, nothing_is_lost, stage


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("first", FIRST)
def test_a_call_that_fails_is_waited_for_or_loses_nothing(
    folder: str, calls: Calls, monkeypatch: pytest.MonkeyPatch, first: str, lasts: bool
) -> None:
    if lasts:
        monkeypatch.setattr(faults, "RETRY_SECONDS", 0.005)
    before, mine, expected = FIRST[first]
    shop = begin(f"{folder}/begun", before)
    stage(shop, first)
    begun = contents(shop)
    fail_at, ended, failures = 0, False, 0
    while not ended:
        fail_at += 1
        shop = shop_of(begun, f"{folder}/{fail_at}")
        readers = Readers(shop, NIGHTS)
        made = 0

        def fail(what: str, path: str, fail_at: int = fail_at, readers: Readers = readers) -> None:
            nonlocal made
            made += 1
            if made == fail_at or (lasts and made > fail_at):
                if path.startswith("http"):
                    raise requests.exceptions.ConnectionError("the way is cut")
                raise OSError(errno.ESTALE, "the disk is ill", path)
            if what in CHANGING:
                with calls.quietly():
                    readers.poll()

        calls.before = fail
        try:
            mine(shop)
            failed = False
        except StorageUnavailable:
            failed = True
        calls.before = lambda *_: None
        readers.poll()
        readers.check()
        ended = made < fail_at
        assert not failed or lasts
        failures += failed
        stands = shop.published()
        if not failed:
            assert stands == expected
        assert shop.look().through_manifest in [None, *NIGHTS]
        if stands is not None:  # else all can be brought back
            nothing_is_lost(shop, stands, before)
        mine(shop)
        stands = shop.published()
        assert stands == expected
        nothing_is_lost(shop, stands, before)
    assert fail_at > 15
    assert (failures > 15) == lasts  # a left-over ".tmp-" file alone is not worth a failure
    print(f"\n{first}, a call fails {'for good' if lasts else 'once'}: {fail_at - 1} faults")  # noqa: T201
