"""One job of EMBED for several days makes the bytes that a job a day makes, and does less for it.

Shops are random: see `random_shop`. Images do not change during the days that are compared.
"""

from collections import Counter
from pathlib import Path

from tests.support.embed_jobs import Shop, random_shop

DAYS = 5


def range_of(shop: Shop) -> range:
    return range(shop.old, len(shop.catalogues))


def make_nights(shop: Shop, place: Path, old: Path) -> None:
    for day in range_of(shop):
        shop.make(place, range(day, day + 1), old if day == shop.old else None)


def all_told(shop: Shop, place: Path) -> tuple[list[dict], Counter]:
    """Returns the counts of each day of the range, and the work of all together."""
    told = [shop.told(place, day) for day in range_of(shop)]
    work: Counter = Counter()
    for _, of_day in told:
        work.update(of_day)
    return [counts for counts, _ in told], work


def compare(shop: Shop, seen: Counter) -> None:
    """Makes the range of a shop in one job, in two and in a job a day, and compares."""
    old = shop.make_old_days()
    days, folder = range_of(shop), shop.folder

    make_nights(shop, folder / "nights", old)
    pairs = set(shop.stubs.given)
    counts, work = all_told(shop, folder / "nights")
    shop.stubs.forget()

    shop.make(folder / "one", days, old)
    stubs = shop.stubs
    assert len(stubs.read) == len(set(stubs.read))  # whatever items and days ask for it
    assert len(stubs.given) == len(set(stubs.given))
    assert set(stubs.given) == pairs  # all that the nights read, and nothing else
    shards = max(shop.shards[day] for day in days)
    assert max(Counter(stubs.looked_at).values(), default=0) <= shards
    now, cost = all_told(shop, folder / "one")
    assert now == counts
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
    seen.update({"read_again": work["images_read"] - cost["images_read"]})
    seen.update({"reused": cost["images_reused"]})


def test_one_job_makes_the_bytes_of_two_and_of_a_job_a_day(tmp_path: Path) -> None:
    seen: Counter = Counter()
    for seed in range(16):
        compare(random_shop(tmp_path / str(seed), seed, DAYS), seen)
    assert set(seen) == {
        "catalogue_items", "former_items", "rejects_waiting", "rejected_missing",
        "rejected_not_an_image", "rejected_unsupported_uri", "read_again", "reused",
    }  # fmt: skip
    assert all(n > 20 for n in seen.values()), seen
