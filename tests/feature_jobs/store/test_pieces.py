"""Rows that travel as pieces of files arrive whole, each at its key."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_jobs.store import faults, local
from feature_jobs.store.pieces import (
    Piece,
    made_from,
    read_all,
    read_pieces,
    write_piece,
    write_pieces,
)
from tests.support.ill_disk import watch_disk

NOTHING = pa.table({"row": pa.array([], pa.int64()), "name": pa.array([], pa.string())})


def numbered(count: int) -> pa.Table:
    return pa.table({"row": np.arange(count), "name": [f"n{i}" for i in range(count)]})


def written(path: Path, rows: pa.Table, keys: list[int]) -> dict[int, Piece]:
    found = list(write_pieces(str(path), rows, np.array(keys, np.int64)))
    assert len(dict(found)) == len(found)  # one piece for each key
    return dict(found)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.integers(0, 6), max_size=40))
def test_every_row_arrives_at_its_key_in_the_order_in_which_it_left(
    tmp_path: Path, keys: list[int]
) -> None:
    rows = numbered(len(keys))
    pieces = written(tmp_path / "rows", rows, keys)
    assert list(pieces) == sorted(set(keys))
    for key, piece in pieces.items():
        expected = [row for row, its in enumerate(keys) if its == key]
        found = read_pieces([piece], NOTHING)
        assert found["row"].to_pylist() == expected
        assert found["name"].to_pylist() == [f"n{row}" for row in expected]


def test_the_pieces_of_a_key_from_several_files_are_put_together(tmp_path: Path) -> None:
    rows, pieces = numbered(12), []
    for number, keys in enumerate(([0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0])):
        part = rows.slice(4 * number, 4)
        found = written(tmp_path / f"{number}", part, keys)
        pieces += [piece for key, piece in found.items() if key == 1]
    assert len(pieces) == 2
    expected = [1, 3, 4, 5, 6, 7]
    for order in (pieces, pieces[::-1]):
        assert sorted(read_pieces(order, NOTHING)["row"].to_pylist()) == expected


def test_several_pieces_of_one_file_are_read_together(tmp_path: Path) -> None:
    pieces = written(tmp_path / "rows", numbered(9), [2, 0, 1] * 3)
    found = read_pieces([pieces[2], pieces[0]], NOTHING)
    assert sorted(found["row"].to_pylist()) == [0, 1, 3, 4, 6, 7]
    assert read_pieces(pieces.values(), NOTHING).sort_by("row").equals(numbered(9))


def test_some_columns_can_be_read_alone(tmp_path: Path) -> None:
    vectors = [[float(n)] * 256 for n in range(6)]
    rows = (
        numbered(6)
        .append_column("vector", pa.array(vectors))
        .append_column("half", pa.array([n if n % 2 else None for n in range(6)]))
    )
    pieces = list(written(tmp_path / "rows", rows, [1, 0, 0, 1, 1, 0]).values())
    whole = read_pieces(pieces, NOTHING)
    for columns in (["row", "half"], ["vector"], rows.column_names):
        assert read_pieces(pieces, NOTHING, columns).equals(whole.select(columns))


def test_no_rows_make_no_file_and_no_piece(tmp_path: Path) -> None:
    assert written(tmp_path / "rows", numbered(0), []) == {}
    assert list(tmp_path.iterdir()) == []


def test_where_no_piece_came_there_is_what_was_asked_for_instead() -> None:
    assert read_pieces([], NOTHING) is NOTHING


def test_a_slice_is_written_without_the_rest_of_its_table(tmp_path: Path) -> None:
    rows = pa.table({"row": np.arange(1000), "bytes": [bytes(1000)] * 1000})
    part = rows.slice(500, 10)
    (piece,) = written(tmp_path / "part", part, [3] * 10).values()
    assert read_pieces([piece], rows).equals(part)
    assert os.path.getsize(piece.path) < 20_000


@pytest.mark.parametrize("keys", [[0] * 6, [3, 1, 2, 3, 1, 2]])
def test_all_rows_of_a_file_can_be_read_at_once(tmp_path: Path, keys: list[int]) -> None:
    pieces = written(tmp_path / "rows", numbered(6), keys)
    (path,) = {piece.path for piece in pieces.values()}
    assert read_all(path).sort_by("row").equals(numbered(6))


def test_what_a_piece_stands_for_stays_when_other_rows_are_written_in_its_place(
    tmp_path: Path,
) -> None:
    first = written(tmp_path / "rows", numbered(4), [0, 0, 1, 1])
    assert written(tmp_path / "rows", numbered(4), [0, 0, 1, 1]) == first  # a worker tries again
    written(tmp_path / "rows", numbered(2), [1, 0])
    assert read_pieces([first[1]], NOTHING)["row"].to_pylist() == [2, 3]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shard_without_rows_stands_in_the_way_of_no_piece(tmp_path: Path) -> None:
    pieces = written(tmp_path / "rows", numbered(2), [0, 0])
    assert read_pieces([b"", pieces[0], b""], NOTHING).equals(numbered(2))
    assert read_pieces([b""], NOTHING) is NOTHING


def test_columns_keep_their_types_nulls_and_lists(tmp_path: Path) -> None:
    time = pa.timestamp("us", tz="UTC")
    rows = pa.table(
        {
            "list": pa.array([[1.0, 2.0], None, []], pa.list_(pa.float32())),
            "time": pa.array([None, 5, 6], pa.int64()).cast(time),
            "text": pa.chunked_array([["a"], [None, "c"]], pa.string()),
        }
    )
    pieces = written(tmp_path / "rows", rows, [1, 0, 1])
    assert read_pieces([pieces[1]], rows).equals(rows.take([0, 2]).combine_chunks())
    assert read_pieces([pieces[0]], rows).to_pylist() == rows.slice(1, 1).to_pylist()


def test_a_piece_that_a_shared_folder_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, looks = written(tmp_path / "rows", numbered(3), [0, 0, 0])[0], Counter[str]()

    def look(what: str, path: str) -> None:
        looks[path] += 1
        if looks[path] < 3:
            raise FileNotFoundError(errno.ENOENT, "no such file as far as is known", path)

    monkeypatch.setattr(faults, "_LOOK_AGAIN_SECONDS", 0.001)
    watch_disk(monkeypatch, look)
    assert read_pieces([piece], NOTHING).equals(numbered(3))
    assert looks == {piece.path: 3}
    monkeypatch.setattr(faults, "LATE_SECONDS", 0.01)
    with pytest.raises(FileNotFoundError):
        read_pieces([piece._replace(path=f"{tmp_path}/nowhere.arrow")], NOTHING)


def test_a_piece_that_is_written_once_more_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, opened = written(tmp_path / "rows", numbered(3), [0, 0, 0])[0], list[str]()

    class Stale(local._CountedFile):
        def readinto(self, buffer: Any, /) -> int:
            if len(opened) < 3:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.name)
            return super().readinto(buffer)

        def readall(self) -> bytes:
            raise AssertionError("a piece is not read as a whole")

    def open_stale(path: str) -> Stale:
        opened.append(path)
        return Stale(path)

    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(local, "_CountedFile", open_stale)
    assert read_pieces([piece], NOTHING).equals(numbered(3))
    assert opened == [piece.path] * 3


def test_a_piece_knows_how_many_rows_it_has(tmp_path: Path) -> None:
    found = dict(write_pieces(str(tmp_path / "x"), numbered(5), np.array([1, 0, 1, 1, 0])))
    assert {key: piece.rows for key, piece in found.items()} == {0: 2, 1: 3}
    whole = write_piece(str(tmp_path / "y"), numbered(5))
    assert whole is not None
    assert whole.rows == 5
    assert read_pieces([whole], NOTHING).equals(numbered(5))
    assert write_piece(str(tmp_path / "z"), numbered(0)) is None


def test_what_a_part_is_made_from_goes_by_the_rows_and_not_by_where_they_lie(
    tmp_path: Path,
) -> None:
    keys = np.array([1, 0, 1, 1, 0])
    pieces = [piece for _, piece in write_pieces(str(tmp_path / "x"), numbered(5), keys)]
    found = made_from(pieces)
    assert (found.pieces, found.rows) == (2, 5)
    again = [piece for _, piece in write_pieces(str(tmp_path / "a" / "y"), numbered(5), keys)]
    assert made_from(reversed(again)) == found
    other = [piece for _, piece in write_pieces(str(tmp_path / "x"), numbered(5), 1 - keys)]
    assert made_from(other) != found
    assert made_from(pieces[:1]) != found
    assert made_from([]).rows == 0


def test_a_file_that_is_known_by_some_columns_is_named_by_them_alone(tmp_path: Path) -> None:
    keys, columns = np.array([1, 0, 1, 1, 0]), numbered(5).column_names
    rows = numbered(5).append_column("bulk", pa.array([f"{n}" * 9 for n in range(5)]))

    def write(rows: pa.Table, keys: np.ndarray) -> dict[int, Piece]:
        return dict(write_pieces(str(tmp_path / "x"), rows, keys, None, columns))

    found = write(rows, keys)
    for key, piece in found.items():
        assert read_pieces([piece], rows).equals(rows.filter(pa.array(keys == key)))
    longer = rows.append_column("more", pa.nulls(5, pa.int8()))
    assert write(longer, keys) == found  # the same rows, whatever lies beside
    assert {p.path for p in write(rows, 1 - keys).values()} != {p.path for p in found.values()}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
