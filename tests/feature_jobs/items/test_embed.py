"""Tests what EMBED takes from an earlier run."""

import datetime as dt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.items import embed
from feature_jobs.items.embed_plan import TO_READ, UNCHANGED
from feature_jobs.items.embed_walk import Tables, WalkedDay
from feature_jobs.store.pieces import Piece, write_piece, write_pieces
from tests.support.embed_rows import (
    DAY,
    WRITTEN,
    Row,
    digest,
    embeddings,
    images,
    reject,
    rejects,
    results,
    vector,
)

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


# ---- What is read for several days ------------------------------------------------------------


def walked(*asked: Row, unchanged: Row) -> WalkedDay:
    """Returns a day that asks for some images, and not for that of one item more."""
    plan = images(*asked, unchanged)
    state = pa.array([TO_READ] * len(asked) + [UNCHANGED])
    before = Tables.before_the_first_day(embeddings({"item_id": 1}), rejects())
    return WalkedDay(DAY, before, plan.append_column("state", state), results())


def test_an_image_that_several_days_ask_for_is_read_once() -> None:
    one, two = ({"item_id": 1, "image_uri": name} for name in ("one.png", "two.png"))
    days = [
        walked({"item_id": 3}, one, unchanged={"item_id": 9}),
        walked(two, {"item_id": 2}, unchanged={"item_id": 3}),
        walked(one, {"item_id": 4, "image_uri": "one.png"}, unchanged={"item_id": 2}),
    ]
    found = embed.all_to_read(days, days[0].before, 5, reuse=True)
    asked = [(row["item_id"], row["image_uri"]) for row in found.to_pylist()]
    expected = [(3, "3.png"), (1, "one.png"), (1, "two.png"), (2, "2.png"), (4, "one.png")]
    assert asked == expected
    assert found["known_sha256"].to_pylist() == [None, digest(1), digest(1), None, None]
    assert found["shard"].to_pylist() == [5] * 5
    assert len(embed.all_to_read(days[:0] or [walked(unchanged=one)], days[0].before, 5, True)) == 0


def test_results_are_read_once_for_all_days_that_are_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(items: list[int]) -> Piece:
        """Writes results, a file for each item, and what lists them."""
        pieces = [
            piece
            for item in items
            for _, piece in write_pieces(
                str(tmp_path / str(item)), results({"item_id": item}), np.zeros(1, np.int64)
            )
        ]
        places = {name: [getattr(piece, name) for piece in pieces] for name in Piece._fields}
        found = write_piece(str(tmp_path / "listed"), pa.table(places))
        assert found
        return found

    read: list[Piece] = []
    real = embed.read_pieces

    def counted(pieces: Any, *args: Any) -> pa.Table:
        some = list(pieces)
        read.extend(some)
        return real(some, *args)

    monkeypatch.setattr(embed, "read_pieces", counted)
    job = SimpleNamespace(staging=str(tmp_path), no_results=results)
    of_shard, of_another = listed([1, 2]), listed([3])
    writer = embed.WriteDay(job)  # type: ignore[arg-type]
    for _ in range(2):
        writer._read_results({of_shard})
        assert writer._results[of_shard]["embedding"].to_pylist() == [vector(1), vector(2)]
        assert len(read) == 3  # the list, and both files
    writer._read_results({of_another})
    assert list(writer._results) == [of_another]  # what the days before needed is let go
