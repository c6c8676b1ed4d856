"""Tests what EMBED takes from an earlier run."""

import datetime as dt

import pytest

from feature_jobs.items import embed
from tests.support.embed_rows import WRITTEN, Row, digest, images, reject, results

# ---- What of an earlier run holds still ------------------------------------------------------

LATER = WRITTEN + dt.timedelta(seconds=1)


@pytest.mark.parametrize(
    ("now", "holds"),
    [
        ({}, True),
        ({"known_sha256": digest(99)}, True),  # it is an embedding of its own
        ({"item_id": 2, "image_uri": "1.png"}, False),
        ({"image_uri": "other.png"}, False),
        ({"image_uri": None}, False),
        ({"image_size": 101}, False),
        ({"image_mtime": LATER}, False),
        ({"image_mtime": None}, False),
        ({"image_generation": 3}, False),
    ],
)
def test_an_embedding_of_an_earlier_run_holds_for_the_same_item_address_and_version(
    now: Row, holds: bool
) -> None:
    done = results({"item_id": 7}, {"item_id": 1}, {"item_id": 8})
    to_read = images({"item_id": 8}, {"item_id": 1, **now}, {"item_id": 9})
    expected = [1, 8] if holds else [8]
    assert embed.still_valid(done, to_read)["item_id"].to_pylist() == expected


@pytest.mark.parametrize(("known", "holds"), [(digest(1), True), (digest(2), False), (None, False)])
def test_an_embedding_that_was_taken_over_holds_while_the_same_bytes_are_known(
    known: str | None, holds: bool
) -> None:
    done = results({"item_id": 1, "embedding": None, "is_embedded": False})
    found = embed.still_valid(done, images({"item_id": 1, "known_sha256": known}))
    assert len(found) == holds


def test_a_reject_of_an_earlier_run_is_tried_once_more() -> None:
    done = results(reject(1), {"item_id": 2}, {**reject(3), "image_sha256": None})
    to_read = images({"item_id": 1}, {"item_id": 2}, {"item_id": 3})
    found = embed.still_valid(done, to_read)
    assert found.to_pylist() == done.slice(1, 1).to_pylist()


def test_of_nothing_nothing_holds() -> None:
    assert len(embed.still_valid(results(), images({"item_id": 1}))) == 0
    assert len(embed.still_valid(results({"item_id": 1}), images())) == 0


def test_what_holds_returns_to_the_shard_that_asks_for_it_now() -> None:
    done = results({"item_id": 1, "shard": 2}, {"item_id": 2, "shard": 2})
    found = embed.still_valid(done, images({"item_id": 2, "shard": 5}, {"item_id": 1, "shard": 4}))
    assert found.schema == done.schema
    assert found["shard"].to_pylist() == [4, 5]


def test_an_item_holds_under_each_of_its_addresses() -> None:
    one, two = ({"item_id": 1, "image_uri": name} for name in ("one.png", "two.png"))
    done = results({**one, "image_sha256": digest(7)}, {**two, "image_sha256": digest(8)})
    for asked in ([one, two], [two, one], [two]):
        found = embed.still_valid(done, images(*asked, {"item_id": 2, "image_uri": "one.png"}))
        assert {row["image_uri"] for row in found.to_pylist()} == {a["image_uri"] for a in asked}
