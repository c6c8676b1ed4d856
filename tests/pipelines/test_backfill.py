"""`courier backfill`: what it makes, and what it does when days fail or others are at them.

Tables are made by stub jobs; all else is the real code.
"""

import contextlib
import datetime as dt
import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from feature_jobs.schemas import ITEM_EMBEDDINGS, StorageUnavailable
from feature_jobs.store import faults, files, partitions
from pipelines import backfill, nightly
from pipelines.running import beam_options, beside
from pipelines.running.cluster_jobs import NotRun
from pipelines.running.states import Night
from tests.conftest import Artefacts
from tests.support.any_order import Catalogue, Log
from tests.support.ill_disk import watch_disk
from tests.support.ordered_shop import Shop
from tests.support.schedules import CHANGING
from tests.support.six_days import (
    ALL,
    DAYS,
    DONE,
    FAILED,
    NOT_READY,
    REFUSED,
    USAGE,
    computed,
    contents,
    run_ids,
    six_days,
    whole_nights,
)
from tests.support.sleeping import instead_of_sleep
from tests.support.stub_nights import UNKNOWN_FROM
from tests.support.world import make_codebook, make_encoder


@pytest.fixture
def shop(tmp_path: Path, artefacts: Artefacts) -> Iterator[Shop]:
    with six_days(tmp_path, artefacts) as shop:
        yield shop


# ---- What it makes -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 4])
def test_in_steps_it_makes_what_nights_make(shop: Shop, artefacts: Artefacts, step: int) -> None:
    assert shop.run("backfill", *ALL, "--step-days", step) == DONE
    assert "backfill: 6 of 6 days done" in shop.told
    nights = Shop(shop.folder, artefacts, shop.inputs, "nights")
    for ds in DAYS:
        assert nights.run("refresh", "--ds", ds) == DONE
    hidden = ("_backfills",)
    mine = {
        path: data for path, data in shop.digest().items() if not any(h in path for h in hidden)
    }
    assert {p: d for p, d in mine.items() if p.endswith(".parquet")} == {
        p: d for p, d in nights.digest().items() if p.endswith(".parquet")
    }
    assert run_ids(shop) == run_ids(nights)


def test_another_encoder_within_the_range_is_taken_from_its_day_on(
    shop: Shop, artefacts: Artefacts, tmp_path: Path
) -> None:
    """Its nights go on from none of the other's vectors, and are those of commands day by day."""
    encoder = make_encoder(tmp_path, seed=1, name="other")
    book = make_codebook(tmp_path, encoder)
    text = shop.config.read_text() + f"[[pins]]\nfrom_ds = {DAYS[3]}\nencoder = '{encoder}'\n"
    shop.config.write_text(f"{text}codebook = '{artefacts.codebook}'\n")
    assert shop.run("backfill", *ALL) == USAGE
    assert f"The pin from {DAYS[3]} mixes two encoders" in shop.told
    assert not Path(shop.root).exists()
    shop.config.write_text(f"{text}codebook = '{book}'\n")
    assert shop.run("backfill", *ALL, "--step-days", 4) == DONE, shop.told
    found = contents(shop)
    layout = shop.settings.layout
    by_day = {ds: partitions.find_published(layout.folder(ITEM_EMBEDDINGS, ds)) for ds in DAYS}
    used = [os.path.basename(pin) for pin in (artefacts.encoder, encoder)]
    assert [one and one.manifest["identities"]["encoder_id"] for one in by_day.values()] == [
        *[used[0]] * 3, *[used[1]] * 3
    ]  # fmt: skip
    files.delete_tree(shop.root)
    for ds in DAYS:
        assert shop.run("refresh", "--ds", ds) == DONE, shop.told
    assert contents(shop) == found


def test_how_far_it_is_stands_below_the_root_after_each_step(shop: Shop) -> None:
    real, seen = nightly.make_nights, []

    def noted() -> list[dict[str, Any]]:
        return [
            json.loads(Path(path).read_text()) for path in shop.settings.layout.backfill_paths()
        ]

    def make(*args: Any) -> Any:
        seen.append([one["left"] for one in noted()])
        return real(*args)

    with mock.patch.object(nightly, "make_nights", make):
        assert shop.run("backfill", *ALL, "--step-days", 3) == DONE
    assert seen == [[], [[str(ds) for ds in DAYS[3:]]]]
    (state,) = noted()
    assert state["made"] == [str(ds) for ds in DAYS]
    assert state["left"] == []
    assert [step["start_ds"] for step in state["steps"]] == [str(DAYS[0]), str(DAYS[3])]


def test_killed_anywhere_it_goes_on(shop: Shop, artefacts: Artefacts) -> None:
    plain = Shop(shop.folder, artefacts, shop.inputs, "plain")
    assert plain.run("backfill", *ALL, "--step-days", 2) == DONE
    at, deaths = 7, 0
    while shop.run_killed(at, "backfill", *ALL, "--step-days", 2) is None:
        at, deaths = at + 31, deaths + 1
    assert deaths > 8
    assert contents(shop) == contents(plain)
    assert whole_nights(shop) == list(DAYS)


@pytest.mark.parametrize("ends", [(0, 3), (2, 5)])
def test_a_part_of_the_days_may_be_there(shop: Shop, ends: tuple[int, int]) -> None:
    first, last = (DAYS[n] for n in ends)
    assert shop.run("refresh", "--start-ds", first, "--end-ds", last) == DONE
    before = shop.seen()
    assert shop.run("backfill", *ALL) == DONE
    assert whole_nights(shop) == list(DAYS)
    after = shop.seen()
    assert {key: after[key] for key in before} == before


# ---- Days that fail ----------------------------------------------------------------------------


def test_a_refused_day_stops_what_goes_on_from_it_and_not_the_rest(shop: Shop) -> None:
    """Its histories are made, and items of later days go on from the day before it."""
    shop.inputs.catalogues[DAYS[2]] = Catalogue(is_bad=True)  # most items have no image
    shop.write_inputs()
    assert shop.run("backfill", *ALL) == REFUSED
    assert whole_nights(shop) == [ds for ds in DAYS if ds != DAYS[2]]
    assert ("user_histories", DAYS[2]) in shop.seen()
    assert ("item_features", DAYS[2]) not in shop.seen()
    assert re.search(rf"{DAYS[2]}  embed +3  .*image_coverage", shop.out)
    assert "of 6 days: 5 made, 0 left as they were, 1 not made" in shop.out
    assert "1 day of 6 is not made" in shop.told
    assert shop.run("backfill", *ALL, "--cascade") == DONE
    shop.inputs.catalogues[DAYS[2]] = Catalogue()
    shop.write_inputs()
    assert shop.run("backfill", "--failed") == DONE
    assert whole_nights(shop) == list(DAYS)
    assert shop.run("backfill", "--failed") == DONE
    assert "nothing to do" in shop.out


def test_a_day_whose_log_is_refused_stops_histories_after_it_and_no_items(shop: Shop) -> None:
    shop.inputs.logs[DAYS[2]] = Log((UNKNOWN_FROM, UNKNOWN_FROM + 1))  # no histories come of it
    shop.write_inputs()
    assert shop.run("backfill", *ALL, "--max-failures", 5) == REFUSED
    assert whole_nights(shop) == list(DAYS[:2])
    features = {ds for name, ds in shop.seen() if name == "item_features"}
    assert features >= set(DAYS) - {DAYS[2]}


def test_a_range_beyond_the_log_makes_what_is_there(shop: Shop) -> None:
    beyond = DAYS[-1] + dt.timedelta(days=2)
    assert shop.run("backfill", *ALL[:2], "--end-ds", beyond) == NOT_READY
    assert whole_nights(shop) == list(DAYS)
    assert "2 days of 8 are not made" in shop.told


def test_days_of_which_nothing_can_be_made_are_tried_again_by_name(shop: Shop) -> None:
    beyond = [DAYS[-1] + dt.timedelta(days=n) for n in (1, 2)]
    ends = ("--start-ds", beyond[0], "--end-ds", beyond[1])
    assert shop.run("backfill", *ends) == NOT_READY
    assert shop.run("backfill", "--failed") == NOT_READY
    assert "of 2 days: 0 made, 0 left as they were, 2 not made" in shop.out


def test_it_ends_after_as_many_failures_as_may_be(shop: Shop) -> None:
    for ds in (DAYS[1], DAYS[3], DAYS[5]):
        shop.inputs.catalogues[ds] = Catalogue(is_bad=True)
    shop.write_inputs()
    assert shop.run("backfill", *ALL, "--max-failures", 2, "--step-days", 1) == REFUSED
    assert whole_nights(shop) == [DAYS[0], DAYS[2]]
    assert f"not tried: 2 days from {DAYS[4]} on" in shop.out
    assert computed(shop, "--failed") == [DAYS[1], *DAYS[3:]]


def test_a_day_that_a_job_dies_of_is_found_and_left_out(shop: Shop) -> None:
    real = nightly.make_nights

    def make(nights: Any, *args: Any) -> Any:
        if DAYS[3] in {night.ds for night in nights} and len(nights[0].stages) > 1:
            raise RuntimeError("a worker ran out of memory")
        return real(nights, *args)

    with mock.patch.object(nightly, "make_nights", make):
        assert shop.run("backfill", *ALL) == FAILED
    assert whole_nights(shop) == [ds for ds in DAYS if ds != DAYS[3]]
    assert re.search(rf"{DAYS[3]}  - +1  RuntimeError: a worker ran out of memory", shop.out)
    assert "Traceback" in shop.told
    assert shop.run("backfill", "--failed") == DONE
    assert whole_nights(shop) == list(DAYS)


def test_a_store_that_is_full_ends_it_at_once_and_nothing_is_lost(shop: Shop) -> None:
    real, tried = nightly.make_nights, []

    def make(nights: Any, *args: Any) -> Any:
        tried.append(nights[0].ds)
        if nights[0].ds == DAYS[2]:
            raise StorageUnavailable("… could not be written: its disk is full.")
        return real(nights, *args)

    with mock.patch.object(nightly, "make_nights", make):
        assert shop.run("backfill", *ALL, "--step-days", 2) == FAILED
    assert "its disk is full" in shop.told
    assert "of 6 days: 2 made" in shop.out
    assert tried == [DAYS[0], DAYS[2]]
    assert whole_nights(shop) == list(DAYS[:2])
    assert shop.run("backfill", *ALL) == DONE
    assert whole_nights(shop) == list(DAYS)


def test_a_root_that_cannot_be_written_is_told_at_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(faults, "FORBIDDEN_SECONDS", 0.01)
    tried = []

    def read_only(what: str, path: str) -> None:
        if what in (*CHANGING, "makedirs"):
            tried.append(path)
            raise OSError(errno.EROFS, "Read-only file system", path)

    with monkeypatch.context() as patch:
        watch_disk(patch, read_only)
        assert shop.run("backfill", *ALL, "--dry-run") == DONE
        assert tried == []
        assert shop.run("backfill", *ALL) == FAILED
    assert re.search(r"may not be read or written.*Read-only", shop.told)
    assert not Path(shop.root).exists()
    assert shop.run("backfill", *ALL) == DONE


def test_the_worst_status_is_that_of_the_command(shop: Shop) -> None:
    shop.inputs.catalogues[DAYS[1]] = Catalogue(is_bad=True)
    shop.write_inputs()
    for path in (shop.folder / "impressions" / f"ds={DAYS[4]}").iterdir():
        path.unlink()
    assert shop.run("backfill", *ALL, "--json") == REFUSED
    told = json.loads(shop.out)
    assert {ds: one["status"] for ds, one in told["failed"].items()} == {
        str(DAYS[1]): REFUSED, str(DAYS[4]): NOT_READY, str(DAYS[5]): NOT_READY
    }  # fmt: skip
    assert told["made"] == [str(DAYS[n]) for n in (0, 2, 3)]


# ---- Others at the same days -------------------------------------------------------------------


def test_another_backfill_of_some_of_the_days_is_told(shop: Shop) -> None:
    other = shop.settings.layout.backfill_lock(DAYS[3], DAYS[5])
    with files.lock(other):
        assert shop.run("backfill", *ALL) == FAILED
        assert "Another backfill is at some of the days" in shop.told
        assert shop.run("backfill", *ALL[:2], "--end-ds", DAYS[2]) == DONE  # days of its own
    assert shop.run("backfill", *ALL) == DONE


def test_a_day_that_another_run_is_at_is_waited_for_and_those_before_it_are_made(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_first = []
    folders = shop.settings.layout.lock_folders(nightly._tables_of(shop.settings.night), [DAYS[2]])
    lock = files.lock(next(folder for folder in folders if "/items/" in folder))
    lock.__enter__()

    def pause(_: float) -> None:
        made_first.extend(whole_nights(shop))
        lock.__exit__(None, None, None)

    instead_of_sleep(monkeypatch, backfill, pause)
    assert shop.run("backfill", *ALL) == DONE
    assert made_first == list(DAYS[:2])
    assert f"another run is at ds {DAYS[2]}: waiting" in shop.told
    assert whole_nights(shop) == list(DAYS)


def test_a_job_that_is_written_into_a_jar_is_not_taken_for_a_bad_day(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try would write another one over it."""
    asked = list[int]()

    def make_nights(nights: Sequence[Night], *_: object) -> None:
        asked.append(len(nights))
        raise NotRun("The job is written into /shop/job.jar and has not run")

    monkeypatch.setattr(nightly, "make_nights", make_nights)
    monkeypatch.setattr(beside, "running", None)
    into_jar = ("--runner=portable", "--job_endpoint=x:1", "--output_executable_path=/shop/job.jar")
    assert shop.run("backfill", *ALL, "--step-days", 3, "--", *into_jar) == NOT_READY
    assert asked == [3]
    assert "has not run" in shop.told


@pytest.mark.parametrize("is_local", [True, False])
def test_histories_are_made_beside_items_where_workers_are_elsewhere(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    """By the command for them, of days that readers see nothing of yet."""
    assert shop.run("refresh", "--ds", DAYS[0]) == DONE
    begun: list[list[str]] = []

    @contextlib.contextmanager
    def running(command: Sequence[str]) -> Iterator[None]:
        begun.append(list(command))
        yield

    monkeypatch.setattr(beside, "running", running)
    monkeypatch.setattr(beam_options, "is_local", lambda _: is_local)
    shop.inputs.catalogues[DAYS[0]] = Catalogue(1)
    shop.write_inputs()
    assert shop.run("backfill", *ALL, "--step-days", 3, "--", "--direct_num_workers=1") == DONE
    ends = ["--start-ds", str(DAYS[3]), "--end-ds", str(DAYS[5])]
    expected = ["histories", "--config", str(shop.config), *ends, "--", "--direct_num_workers=1"]
    assert begun == ([] if is_local else [expected])
