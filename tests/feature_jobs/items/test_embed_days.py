"""One job of EMBED for several days makes the bytes that a job a day makes, and does less for it.

Shops are random: see `random_shop`. Images do not change during the days that are compared.
"""

import datetime as dt
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feature_jobs.items import embed
from feature_jobs.schemas import DataContractError
from feature_jobs.store.pieces import read_all
from tests.support.commands import Killed, die_at_write
from tests.support.embed_jobs import (
    FIRST,
    Shop,
    Stub,
    Stubs,
    catalogue,
    random_shop,
    with_beam,
)
from tests.support.stale_disk import hide_receipts_now_and_then

SEEDS = (0, 2, 7, 14, 22)  # of shops that have every kind of range together, as is tested
BUSY = 17  # of a shop with two old days, where much is read


def range_of(shop: Shop) -> range:
    return range(shop.old, len(shop.catalogues))


def make_nights(shop: Shop, place: Path, old: Path) -> None:
    for day in range_of(shop):
        shop.make(place, range(day, day + 1), old if day == shop.old else None)


def all_told(shop: Shop, place: Path) -> tuple[list[dict], list[dict], Counter]:
    """Returns counts and examples of each day of the range, and the work of all together."""
    told = [shop.told(place, day) for day in range_of(shop)]
    work: Counter = Counter()
    for *_, of_day in told:
        work.update(of_day)
    return [counts for counts, *_ in told], [examples for _, examples, _ in told], work


def compare(shop: Shop, seen: Counter) -> None:
    """Makes the range of a shop in one job, in two and in a job a day, and compares."""
    old = shop.make_old_days()
    days, folder = range_of(shop), shop.folder

    make_nights(shop, folder / "nights", old)
    pairs = set(shop.stubs.given)
    counts, examples, work = all_told(shop, folder / "nights")
    shop.stubs.forget()

    shop.make(folder / "one", days, old)
    stubs = shop.stubs
    assert len(stubs.read) == len(set(stubs.read))  # whatever items and days ask for it
    assert len(stubs.given) == len(set(stubs.given))
    assert set(stubs.given) == pairs  # all that the nights read, and nothing else
    shards = max(shop.shards[day] for day in days)
    assert max(Counter(stubs.looked_at).values(), default=0) <= shards
    now, named, cost = all_told(shop, folder / "one")
    assert (now, named) == (counts, examples)
    assert cost["images_read"] == len(stubs.read)
    assert cost["images_embedded"] == stubs.embedded
    rows = sum(p.rows for day in days for p in shop.partitions_of(folder / "one", day)[:1])
    assert cost["images_unchanged"] + cost["images_embedded"] + cost["images_reused"] == rows

    middle = days[0] + len(days) // 2
    shop.make(folder / "two", range(days[0], middle), old)
    shop.make(folder / "two", range(middle, days[-1] + 1))

    expected = shop.parts(folder / "nights")
    assert len(expected) == 2 * sum(shop.shards[day] for day in days)
    assert shop.parts(folder / "two") == expected
    assert shop.parts(folder / "one") == expected
    for day in days:
        found = {path.name for path in shop.staging(folder / "one", day).iterdir()}
        assert found == {"item_embeddings", "item_rejects"}
    for of_day in counts:
        seen.update(of_day)
    for name in ("rejected", "not_fetched"):
        seen.update({name: sum(len(of_day[name]) for of_day in examples)})
    seen.update({"read_again": work["images_read"] - cost["images_read"]})
    seen.update({"reused": cost["images_reused"]})


def test_one_job_makes_the_bytes_of_two_and_of_a_job_a_day(tmp_path: Path) -> None:
    seen: Counter = Counter()
    for seed in SEEDS:
        compare(random_shop(tmp_path / str(seed), seed), seen)
    assert set(seen) == {
        "catalogue_items", "former_items", "rejects_waiting", "rejected_missing",
        "rejected_not_an_image", "rejected_unsupported_uri", "read_again", "reused",
        "items_without_uri", "items_tried", "items_not_fetched", "rejected", "not_fetched",
    }  # fmt: skip
    assert all(n > 10 for n in seen.values()), seen


def test_shops_have_every_kind_of_range(tmp_path: Path) -> None:
    shops = [random_shop(tmp_path / str(seed), seed) for seed in SEEDS]
    kinds = [(s.reuse, s.same_roots, s.full, s.old > 0) for s in shops]
    for values in zip(*kinds, strict=True):
        assert set(values) == {True, False}
    catalogues = [[shop.catalogues[day] for day in range_of(shop)] for shop in shops]
    assert any(not source.rows for of_days in catalogues for source in of_days)
    assert any(len({source.paths for source in of_days}) == 1 for of_days in catalogues)
    assert all(len({shop.shards[day] for day in range_of(shop)}) > 1 for shop in shops[:3])


def test_the_pipeline_makes_what_its_steps_make(tmp_path: Path) -> None:
    shop = random_shop(tmp_path, BUSY)
    old = shop.make_old_days()
    shop.make(tmp_path / "steps", range_of(shop), old)
    shop.run = with_beam
    shop.make(tmp_path / "beam", range_of(shop), old)
    expected = shop.parts(tmp_path / "steps")
    assert len(expected) > 10
    assert shop.parts(tmp_path / "beam") == expected


def test_the_second_walk_looks_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = random_shop(tmp_path, BUSY)
    old, looks = shop.make_old_days(), []
    real = embed.WalkShard.process

    def process(step: embed.WalkShard, element: Any) -> Iterator[Any]:
        before = len(shop.stubs.looked_at)
        yield from real(step, element)
        looks.append((before, len(shop.stubs.looked_at) - before))

    monkeypatch.setattr(embed.WalkShard, "process", process)
    shop.make(tmp_path / "one", range_of(shop), old)
    assert all(before > 0 and then == 0 for before, then in looks)
    assert len(looks) == max(shop.shards[day] for day in range_of(shop))


def test_one_snapshot_for_all_days_is_read_once(tmp_path: Path) -> None:
    days = range(4)
    uris = {n: f"{n % 3}.png" for n in range(9)}
    of_days = [catalogue(tmp_path, FIRST + dt.timedelta(day), uris, "all") for day in days]
    files = {f"{n}.png": Stub(n) for n in range(3)}
    shop = Shop(tmp_path, of_days, [1, 2, 1, 4], 0, Stubs(files), files)
    job = shop.job(tmp_path / "one", days)
    assert job.catalogues == [0, 0, 0, 0]
    shop.make(tmp_path / "one", days)
    pieces = list((tmp_path / "one/job-0/catalogue").iterdir())
    assert len(pieces) == len(of_days[0].groups())
    make_nights(shop, tmp_path / "nights", tmp_path)
    assert shop.parts(tmp_path / "one") == shop.parts(tmp_path / "nights")


def test_an_item_twice_in_the_catalogue_of_any_day_refuses_all_and_writes_nothing(
    tmp_path: Path,
) -> None:
    files = {"1.png": Stub(1)}
    of_days = [
        catalogue(tmp_path, FIRST + dt.timedelta(day), {n: "1.png" for n in range(4)})
        for day in range(3)
    ]
    twice = Path(of_days[1].paths[0])
    shutil.copy(twice, twice.with_name("copy.parquet"))
    of_days[1] = catalogue(tmp_path, of_days[1].form.ds, {})
    shop = Shop(tmp_path, of_days, [1, 1, 1], 0, Stubs(files), files)
    with pytest.raises(DataContractError, match=f"of ds {of_days[1].form.ds} holds 2 items twice"):
        shop.make(tmp_path / "one", range(3))
    assert shop.parts(tmp_path / "one") == {}


# ---- Killed ----------------------------------------------------------------------------------


def good_pairs(place: Path) -> set[tuple[int, str]]:
    """Returns the items and addresses that chunk files have an embedding of."""
    rows = [
        row for path in place.glob("chunks-*/*.arrow") for row in read_all(str(path)).to_pylist()
    ]
    return {(row["item_id"], row["image_uri"]) for row in rows if not row["reason"]}


def test_a_killed_range_goes_on_without_embedding_or_writing_anything_again(tmp_path: Path) -> None:
    shop = random_shop(tmp_path, BUSY, days=3)
    old, days = shop.make_old_days(), range_of(shop)
    with pytest.MonkeyPatch.context() as patch:
        written = die_at_write(patch, None)
        shop.make(tmp_path / "whole", days, old)
    expected, resumed, left_out = shop.parts(tmp_path / "whole"), 0, 0
    for at in range(1, len(written), len(written) // 7):
        place = tmp_path / f"killed-at-{at}"
        with pytest.MonkeyPatch.context() as patch:
            die_at_write(patch, at)
            with pytest.raises(Killed):
                shop.make(place, days, old)
        had = good_pairs(place)
        receipts = set(map(str, place.rglob("receipts/*.json")))
        shop.stubs.forget()
        with pytest.MonkeyPatch.context() as patch:
            again = die_at_write(patch, None)
            shop.make(place, days, old)
        assert not had & set(shop.stubs.given)
        assert not receipts & set(again)
        assert shop.parts(place) == expected
        resumed += len(had)
        left_out += len(receipts)
    assert resumed > 20
    assert left_out > 5


def test_a_chunk_that_is_tried_again_is_what_the_first_try_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = random_shop(tmp_path, BUSY)
    old, pieces = shop.make_old_days(), 0
    real = embed.EmbedChunk.embed_chunk

    def twice(step: embed.EmbedChunk, element: Any) -> Iterator[Any]:
        nonlocal pieces
        first = list(real(step, element))
        given = list(shop.stubs.given)
        assert list(real(step, element)) == first
        assert shop.stubs.given == given
        pieces += len(first)
        yield from first

    monkeypatch.setattr(embed.EmbedChunk, "embed_chunk", twice)
    shop.make(tmp_path / "one", range_of(shop), old)
    assert pieces > 1


def test_workers_that_are_shown_old_names_write_no_part_without_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = random_shop(tmp_path, BUSY, days=3)
    old, days, place = shop.make_old_days(), range_of(shop), tmp_path / "one"
    shop.make(place, days, old)
    whole = shop.parts(place)
    next(place.rglob("receipts/*.json")).unlink()
    hide_receipts_now_and_then(monkeypatch)
    shop.make(place, days, old)
    monkeypatch.undo()
    assert shop.parts(place) == whole


def test_a_range_that_is_there_is_neither_walked_nor_looked_at_again(tmp_path: Path) -> None:
    shop = random_shop(tmp_path, BUSY)
    old, days = shop.make_old_days(), range_of(shop)
    shop.make(tmp_path / "one", days, old)
    shop.stubs.forget()
    with pytest.MonkeyPatch.context() as patch:
        written = die_at_write(patch, None)
        shop.make(tmp_path / "one", days, old)
    assert {Path(path).parent.name for path in written} <= {"catalogue"}
    assert shop.stubs.looked_at == shop.stubs.given == []


def test_chunk_files_of_another_number_of_shards_do_no_harm(tmp_path: Path) -> None:
    """As after a kill when a day more, of more shards, makes the range another one."""
    shop = random_shop(tmp_path, BUSY)
    old, days = shop.make_old_days(), range_of(shop)
    shop.make(tmp_path / "one", days, old)
    for day in days:
        shutil.rmtree(shop.staging(tmp_path / "one", day))
        shop.shards[day] *= 2
    shop.make(tmp_path / "one", days, old)
    shop.make(tmp_path / "fresh", days, old)
    assert shop.parts(tmp_path / "one") == shop.parts(tmp_path / "fresh")
