"""Tables keep every row in their files, and a reader sees a whole partition or none."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_REJECTS,
    USER_HISTORIES,
    DataContractError,
    InputNotReady,
)
from feature_jobs.store import arrays, documents, hashing, partitions
from feature_jobs.store.partitions import MadeFrom
from tests.support.table_rows import KEYS, SHARDS, embeddings


def histories(users: Sequence[int | str], items: type = int) -> tuple[pa.Schema, pa.Table]:
    """Returns a `user_histories` of `users`, of 1, 2, 3, 1, … items, after its schema."""
    kinds = {int: pa.int64(), str: pa.string()}
    schema = USER_HISTORIES.schema(kinds[items], kinds[type(users[0]) if users else int])
    item_ids = [[items(u) for u in range(1 + i % 3)] for i in range(len(users))]
    times = [[1_000_000 * t for t in range(len(row), 0, -1)] for row in item_ids]
    columns = {"user_id": users, "item_ids": item_ids, "click_times": times}
    return schema, pa.table(columns, schema=arrays.plain(schema.empty_table()).schema)


def write_table(
    folder: str, schema: pa.Schema, rows: pa.Table, shards: int
) -> partitions.Partition:
    shard = hashing.shard_of(hashing.hash_ids(rows["user_id"]), shards)
    for i in range(shards):
        mine = rows.filter(pa.array(shard == i))
        partitions.write_part(folder, USER_HISTORIES, schema, mine, i, shards)
    return partitions.Partition(
        folder, {"files": partitions.receipts(folder), "run_id": "r", "version": "v"}
    )


# ---- Parts -----------------------------------------------------------------------------------


def test_a_part_is_there_once_its_receipt_is_and_holds_the_rows(tmp_path: Path) -> None:
    folder = str(tmp_path)
    schema, rows = histories([5, -3, 9, 0])
    source = MadeFrom(2, 4, "d1")
    assert partitions.receipts(folder) == []
    assert not partitions.has_part(folder, 3, 4, source)
    assert partitions.finished(folder, 4) == frozenset()
    partitions.write_part(
        folder, USER_HISTORIES, schema, rows, 3, 4, {"clicks": 6}, made_from=source,
        histograms={"length": np.array([0, 4])}, examples={"unknown": [9, -3, 5, 0]},
    )  # fmt: skip
    assert partitions.has_part(folder, 3, 4, source)
    assert not partitions.has_part(folder, 3, 8, source)
    assert not partitions.has_part(folder, 2, 4, source)
    assert partitions.finished(folder, 4) == {3}
    assert partitions.finished(folder, 8) == frozenset()

    (receipt,) = partitions.receipts(folder)
    (path,) = tmp_path.glob("*.parquet")
    data = path.read_bytes()
    assert path.name == f"part-00003-of-00004-{hashlib.sha256(data).hexdigest()[:12]}.parquet"
    assert receipt == {
        "name": path.name,
        "rows": 4,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "counts": {"clicks": 6},
        "histograms": {"length": [0, 4]},
        "examples": {"unknown": [9, -3, 5]},
        "work": {},
        "made_from": {"pieces": 2, "rows": 4, "digest": "d1"},
    }
    found = partitions.read_parquet(str(tmp_path / receipt["name"]))
    assert found.to_pylist() == rows.sort_by("user_id").to_pylist()


def test_a_second_attempt_that_made_other_rows_changes_no_file_of_the_first(tmp_path: Path) -> None:
    folder = str(tmp_path)
    counted = []
    for users in ([5, -3], [5, 9, 0], [5, -3]):
        schema, rows = histories(users)
        partitions.write_part(folder, USER_HISTORIES, schema, rows, 0, 1, {"users": len(users)})
        counted.append(partitions.receipts(folder))
    first, second, again = (receipt for (receipt,) in counted)
    assert first == again
    assert first["name"] != second["name"]
    for receipt in (first, second):
        data = (tmp_path / receipt["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == receipt["sha256"]
        found = partitions.read_parquet(str(tmp_path / receipt["name"]))
        assert len(found) == receipt["rows"] == receipt["counts"]["users"]


def test_what_is_no_part_has_no_name_of_a_shard() -> None:
    assert partitions.shard_name("part-00001-of-00002-0a1b-ff.parquet") == "part-00001-of-00002"
    with pytest.raises(ValueError, match="is no part"):
        partitions.shard_name("_manifest.json")


def test_receipts_come_in_shard_order_and_their_counts_add_up(tmp_path: Path) -> None:
    schema, rows = histories([1])
    for shard, counts in ((10, {"b": 1}), (2, {"a": 2, "b": 3}), (0, None)):
        work = {"seconds": shard / 4}
        partitions.write_part(str(tmp_path), USER_HISTORIES, schema, rows, shard, 16, counts, work)
    found = partitions.receipts(str(tmp_path))
    assert [receipt["name"][5:10] for receipt in found] == ["00000", "00002", "00010"]
    assert partitions.sum_counts(found) == {"a": 2, "b": 4}
    assert partitions.sum_counts(found, "work") == {"seconds": 3.0}
    assert partitions.sum_counts([]) == {}


def test_histograms_of_parts_add_up_bin_by_bin_and_the_first_examples_stay() -> None:
    parts = [
        {"histograms": {"a": [1, 2]}, "examples": {"x": [], "y": ["é"]}},
        {"histograms": {"b": [3], "a": [10, 20, 30]}, "examples": {"x": [7, 5], "y": ["a", "é"]}},
        {"histograms": {"a": [100]}, "examples": {"x": [5, 9, 1]}},
        {"histograms": {}, "examples": {}},
    ]
    assert partitions.sum_histograms(parts) == {"a": [111, 22, 30], "b": [3]}
    assert partitions.first_examples(parts) == {"x": [7, 5, 9], "y": ["é", "a"]}
    assert (partitions.sum_histograms([]), partitions.first_examples([])) == ({}, {})


@pytest.mark.parametrize("users", [[5, -3, 9, 0, -(2**63)], ["b", "é", "", "a", "ab", "B"]])
def test_rows_of_a_part_are_sorted_by_key_whatever_their_order_before(
    tmp_path: Path, users: list
) -> None:
    schema, rows = histories(users)
    orders = [rows, rows.take(list(range(len(users)))[::-1])]
    for i, arrived in enumerate(orders):
        partitions.write_part(str(tmp_path / str(i)), USER_HISTORIES, schema, arrived, 0, 1)
    first, second = (partitions.receipts(str(tmp_path / str(i)))[0] for i in range(2))
    assert first == second  # and so the same bytes
    found = partitions.read_parquet(str(tmp_path / "0" / first["name"]))["user_id"].to_pylist()
    assert found == sorted(users, key=lambda u: u.encode() if isinstance(u, str) else u)
    assert found != users


@pytest.mark.parametrize("column", ["item_id", "embedding", "image_uri", "in_catalogue"])
def test_a_null_where_none_may_be_is_refused_and_leaves_no_part(
    tmp_path: Path, column: str
) -> None:
    schema, rows = embeddings(5)
    mask = pa.array([False, False, True, False, False])
    gap = pc.if_else(mask, pa.scalar(None, rows[column].type), rows[column])
    broken = rows.set_column(rows.column_names.index(column), column, gap)
    with pytest.raises(DataContractError, match=f"item_embeddings.{column} must not be null"):
        partitions.write_part(str(tmp_path), ITEM_EMBEDDINGS, schema, broken, 0, 1)
    assert os.listdir(tmp_path) == []
    partitions.write_part(
        str(tmp_path), ITEM_EMBEDDINGS, schema, rows, 0, 1
    )  # nulls where they may be
    assert partitions.finished(str(tmp_path), 1) == {0}


def test_a_part_that_was_made_from_other_rows_is_not_taken_for_this_one(tmp_path: Path) -> None:
    folder, (schema, rows) = str(tmp_path), histories([5, -3])
    source = MadeFrom(2, 2, "d1")
    partitions.write_part(folder, USER_HISTORIES, schema, rows, 0, 1, made_from=source)
    for other in (MadeFrom(1, 2, "d1"), MadeFrom(2, 1, "d1"), MadeFrom(2, 2, "d2")):
        assert not partitions.has_part(folder, 0, 1, other)


def test_a_part_whose_receipt_does_not_say_what_it_was_made_from_is_not_trusted(
    tmp_path: Path,
) -> None:
    folder, (schema, rows) = str(tmp_path), histories([5, -3])
    partitions.write_part(folder, USER_HISTORIES, schema, rows, 0, 1)
    assert not partitions.has_part(folder, 0, 1, MadeFrom(2, 2, "d1"))


@pytest.mark.parametrize("lacks", ["made_from", "histograms", "examples"])
def test_a_part_whose_receipt_is_of_an_earlier_version_is_made_again(
    tmp_path: Path, lacks: str
) -> None:
    folder, (schema, rows) = str(tmp_path), histories([5, -3])
    source = MadeFrom(2, 2, "d1")
    partitions.write_part(folder, USER_HISTORIES, schema, rows, 0, 1, made_from=source)
    assert partitions.has_part(folder, 0, 1, source)
    (path,) = (tmp_path / "receipts").iterdir()
    receipt = json.loads(path.read_text())
    del receipt[lacks]
    path.write_text(json.dumps(receipt))
    assert not partitions.has_part(folder, 0, 1, source)
    assert partitions.finished(folder, 1) == frozenset()


@pytest.mark.parametrize("went_in", [1, 3])
def test_a_part_with_other_rows_than_went_into_it_is_refused_and_not_written(
    tmp_path: Path, went_in: int
) -> None:
    schema, rows = histories([5, -3])
    source = MadeFrom(1, went_in, "d1")
    with pytest.raises(DataContractError, match=f"has 2 rows, but {went_in} went into it"):
        partitions.write_part(str(tmp_path), USER_HISTORIES, schema, rows, 0, 1, made_from=source)
    assert os.listdir(tmp_path) == []


def test_a_part_needs_every_column_and_leaves_out_further_ones(tmp_path: Path) -> None:
    schema, rows = histories([2, 1])
    with pytest.raises(KeyError, match="click_times"):
        partitions.write_part(
            str(tmp_path), USER_HISTORIES, schema, rows.drop_columns("click_times"), 0, 1
        )
    rows = rows.append_column("ds", pa.array(["2026-01-01"] * 2))
    partitions.write_part(str(tmp_path), USER_HISTORIES, schema, rows, 0, 1)
    (receipt,) = partitions.receipts(str(tmp_path))
    found = partitions.read_parquet(str(tmp_path / receipt["name"])).column_names
    assert found == ["user_id", "item_ids", "click_times"]


# ---- Sizes -----------------------------------------------------------------------------------


@pytest.fixture
def groups_of() -> Iterator[Callable[[int], None]]:
    """Gives what limits row groups, until the test ends."""
    yield partitions.limit_row_groups
    partitions.limit_row_groups(partitions.ROW_GROUP_BYTES)


def sizes_of_groups(path: Path) -> list[tuple[int, int]]:
    """Returns rows and uncompressed bytes of each row group."""
    footer = pq.read_metadata(path)
    groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]


def test_a_row_group_has_at_most_so_many_rows_and_so_many_bytes(
    tmp_path: Path, groups_of: Callable[[int], None]
) -> None:
    path, numbers = tmp_path / "x", pa.table({"x": np.arange(40_000)})
    partitions.write_parquet(str(path), numbers)
    assert [rows for rows, _ in sizes_of_groups(path)] == [32_768, 40_000 - 32_768]
    _, rows = embeddings(1000)  # of a thousand bytes each
    groups_of(100_000)
    partitions.write_parquet(str(path), rows)
    sizes = sizes_of_groups(path)
    assert sum(count for count, _ in sizes) == 1000
    assert max(size for _, size in sizes) <= 100_000
    assert len(sizes) < 20
    assert pq.read_table(path)["item_id"].to_pylist() == rows["item_id"].to_pylist()


def test_rows_larger_than_the_mean_and_narrow_numbers_keep_row_groups_to_the_limit_too(
    tmp_path: Path, groups_of: Callable[[int], None]
) -> None:
    """Parquet stores an int8 in four bytes; and all long lists may stand side by side."""
    sizes = np.where(np.arange(2000) < 100, 1000, 1)
    lists = arrays.list_array(sizes, pa.array(np.arange(sizes.sum()) % 100, pa.int8()))
    path = tmp_path / "x"
    groups_of(50_000)
    partitions.write_parquet(str(path), pa.table({"x": lists}))
    assert max(size for _, size in sizes_of_groups(path)) <= 50_000
    groups_of(10)  # less than a row
    partitions.write_parquet(str(path), pa.table({"x": lists.slice(0, 5)}))
    assert [rows for rows, _ in sizes_of_groups(path)] == [1] * 5


def folded(folder: str) -> partitions.Partition:
    """Returns the partition of a table's parts, folded."""
    parts = partitions.fold(folder, USER_HISTORIES, partitions.receipts(folder))
    return partitions.Partition(folder, {"files": parts})


@settings(max_examples=40, deadline=None, derandomize=True)
@given(keys=KEYS, parts=SHARDS, readers=SHARDS, file=st.sampled_from([1, 3000, 10**6]))
def test_parts_fold_into_files_that_hold_every_row_in_its_range_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, keys: list, parts: int, readers: int, file: int
) -> None:
    schema, rows = histories(keys)
    folder = str(tmp_path_factory.mktemp("table"))
    made = write_table(folder, schema, rows, parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "_FOLDED_FILE", file)
        found = folded(folder)
        assert folded(folder) == found  # as after a kill
    assert len(found.paths) in (1, 2, 4, 8, 16, 32, 64)
    assert len(found.paths) <= parts
    assert found.rows == len(keys)
    for shard in range(readers):
        mine, theirs = (
            one.read_shard(shard, readers, "user_id").sort_by("user_id") for one in (found, made)
        )
        assert mine.equals(theirs)
    for path, told in zip(found.paths, found.manifest["files"], strict=True):
        ids = partitions.read_parquet(path)["user_id"].to_pylist()
        assert ids == sorted(ids)
        assert pq.read_schema(path).equals(made.schema, check_metadata=True)
        data = Path(path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (told["bytes"], told["sha256"])
        assert len(ids) == told["rows"]


def test_as_few_files_as_keep_to_their_size_are_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    schema, rows = histories(list(range(1000)))
    made = write_table(folder, schema, rows, 16)
    size = sum(file["bytes"] for file in made.manifest["files"])
    for file, count in ((2 * size, 1), (size // 2, 4), (size // 10, 16), (1, 16)):
        monkeypatch.setattr(partitions, "_FOLDED_FILE", file)
        assert len(folded(folder).paths) == count
    monkeypatch.setattr(partitions, "_FOLDED_FILE", size)
    monkeypatch.setattr(partitions, "_FOLDED_TABLE", size - 1)
    assert folded(folder).manifest["files"] == made.manifest["files"]


def test_parts_without_rows_fold_into_one_file_without_rows(tmp_path: Path) -> None:
    schema, rows = histories([])
    write_table(str(tmp_path), schema, rows, 8)
    found = folded(str(tmp_path))
    assert [file["rows"] for file in found.manifest["files"]] == [0]
    assert found.schema.equals(schema)


# ---- What readers find -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Writes a part of `item_embeddings` as it lies in a published folder."""
    folder = tmp_path_factory.mktemp("root") / "production/item_embeddings/ds=2026-01-06"
    partitions.write_part(str(folder), ITEM_EMBEDDINGS, *embeddings(300), 0, 1)
    (receipt,) = partitions.receipts(str(folder))
    shutil.rmtree(folder / "receipts")  # they stay in the staging folder
    return str(folder / receipt["name"])


def test_a_part_is_zstd_with_compliant_lists_of_nullable_elements(part: str) -> None:
    file = pq.ParquetFile(part)
    for index in range(file.metadata.num_columns):
        assert file.metadata.row_group(0).column(index).compression == "ZSTD"
    assert "embedding.list.element" in [column.path for column in file.schema]
    schema = file.schema_arrow
    assert schema.field("embedding").type.value_field.nullable
    assert {f.name for f in schema if f.nullable} == {
        "image_generation", "image_mtime", "category", "left_catalogue_ds",
    }  # fmt: skip
    assert schema.field("image_mtime").type == pa.timestamp("us", tz="UTC")


def test_every_column_says_what_it_means_and_none_is_the_ds(part: str) -> None:
    schema = pq.read_schema(part)
    assert schema.names == [column.name for column in ITEM_EMBEDDINGS.columns]
    assert "ds" not in schema.names
    for column in ITEM_EMBEDDINGS.columns:
        meaning = schema.field(column.name).metadata[b"meaning"].decode()
        assert meaning == column.meaning.replace("[d]", "[256]")


def test_lists_of_floats_have_no_dictionary_and_ids_have_one(part: str) -> None:
    group = pq.ParquetFile(part).metadata.row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(3)}
    assert "RLE_DICTIONARY" in encodings["item_id"]
    assert "RLE_DICTIONARY" not in encodings["embedding.list.element"]


def test_pyarrow_pandas_and_duckdb_read_the_same_rows_with_a_plain_path(part: str) -> None:
    _, rows = embeddings(300)
    rows = rows.sort_by("item_id")
    expected = arrays.embedding_matrix(rows["embedding"], 256)

    arrow = pq.read_table(part)
    assert arrow.column_names == rows.column_names
    np.testing.assert_array_equal(arrays.embedding_matrix(arrow["embedding"], 256), expected)

    frame = pd.read_parquet(part)
    assert frame["item_id"].tolist() == list(range(300))
    np.testing.assert_array_equal(np.stack(frame["embedding"]), expected)

    with duckdb.connect() as database:
        query = "SELECT item_id, embedding, category FROM read_parquet(?)"
        found = database.execute(query, [part]).fetchall()
    assert [row[0] for row in found] == list(range(300))
    np.testing.assert_array_equal(np.array([row[1] for row in found], np.float32), expected)
    assert [row[2] for row in found] == rows["category"].to_pylist()


def test_a_reader_of_the_folder_may_take_ds_from_its_name(part: str) -> None:
    folder = os.path.dirname(part)
    arrow = pq.read_table(os.path.dirname(folder), filters=[("ds", "=", "2026-01-06")])
    assert arrow.column_names[-1] == "ds"
    assert len(arrow) == 300
    with duckdb.connect() as database:
        query = "SELECT DISTINCT CAST(ds AS VARCHAR) FROM read_parquet(?, hive_partitioning=true)"
        assert database.execute(query, [folder + "/*.parquet"]).fetchall() == [("2026-01-06",)]


def test_our_own_reader_makes_no_column_of_the_folders_name(part: str) -> None:
    assert partitions.read_parquet(part).column_names == embeddings(1)[1].column_names
    assert partitions.read_parquet(part, ["category", "item_id"]).num_columns == 2
    # No "not null" and no comments, which would hinder joining them with other rows.
    schema = partitions.read_parquet(part).schema
    assert all(field.nullable and not field.metadata for field in schema)
    assert schema.metadata is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(keys=KEYS, files=SHARDS, readers=SHARDS)
def test_readers_of_all_shards_get_every_row_once_however_many_files_there_are(
    tmp_path_factory: pytest.TempPathFactory, keys: list, files: int, readers: int
) -> None:
    schema, rows = histories(keys)
    folder = str(tmp_path_factory.mktemp("table"))
    partition = write_table(folder, schema, rows, files)
    assert (len(partition.paths), partition.rows) == (files, len(keys))
    found = []
    for shard in range(readers):
        mine = partition.read_shard(shard, readers, "user_id", ["user_id", "item_ids"])
        assert mine.schema == rows.select(["user_id", "item_ids"]).schema
        assert set(hashing.shard_of(hashing.hash_ids(mine["user_id"]), readers)) <= {shard}
        found += mine.to_pylist()
    expected = rows.select(["user_id", "item_ids"]).to_pylist()
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_a_reader_of_as_many_shards_opens_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, rows = histories(list(range(100)))
    partition = write_table(str(tmp_path), schema, rows, 4)
    opened: list[str] = []
    read = partitions.read_parquet

    def count(path: str, columns: Sequence[str] | None = None) -> pa.Table:
        opened.append(path)
        return read(path, columns)

    monkeypatch.setattr(partitions, "read_parquet", count)
    for readers, files in ((4, 1), (8, 1), (2, 2), (1, 4)):
        opened.clear()
        assert len(partition.read_shard(0, readers, "user_id")) > 0
        assert len(opened) == files


@settings(max_examples=40, deadline=None, derandomize=True)
@given(keys=KEYS, files=SHARDS, data=st.data())
def test_rows_are_looked_up_by_their_keys_however_many_files_there_are(
    tmp_path_factory: pytest.TempPathFactory, keys: list, files: int, data: st.DataObject
) -> None:
    schema, rows = histories(keys)
    folder, kind = str(tmp_path_factory.mktemp("table")), rows["user_id"].type
    partition = write_table(folder, schema, rows, files)
    wanted = [key for key in keys if data.draw(st.booleans())]
    unknown = [] if pa.types.is_string(kind) else [2**40]
    found = partition.look_up(pa.array(wanted + unknown, kind), "user_id", ["item_ids", "user_id"])
    asked = rows.select(["item_ids", "user_id"])
    expected = asked.filter(pc.is_in(rows["user_id"], value_set=pa.array(wanted, kind)))
    assert found.schema == asked.schema
    assert sorted(found.to_pylist(), key=repr) == sorted(expected.to_pylist(), key=repr)


def test_what_holds_none_of_the_keys_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "_ROW_GROUP_ROWS", 5)
    schema, rows = histories(list(range(100)))
    partition = write_table(str(tmp_path), schema, rows, 4)
    read: list[tuple[int, tuple[str, ...]]] = []
    real = pq.ParquetFile.read_row_group

    def note(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        read.append((group, tuple(columns)))
        return real(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", note)
    assert partition.look_up(pa.array([], pa.int64()), "user_id", ["user_id"]).num_rows == 0
    assert read == []
    columns = ("user_id", "item_ids")
    assert partition.look_up(pa.array([17]), "user_id", columns)["user_id"].to_pylist() == [17]
    (shard,) = hashing.shard_of(hashing.hash_ids(pa.array([17])), 4).tolist()
    mine = pq.ParquetFile(partition.path(shard))
    groups = [real(mine, n)["user_id"].to_pylist() for n in range(mine.num_row_groups)]
    assert len(groups) > 2
    looked_at = [group for group, of in read if of == ("user_id",)]
    assert looked_at == list(range(len(groups)))  # keys, of that file alone
    assert [group for group, of in read if of == columns] == [
        place for place, keys in enumerate(groups) if 17 in keys
    ]


def test_a_part_without_rows_keeps_the_schema(tmp_path: Path) -> None:
    schema = ITEM_REJECTS.schema(pa.string())
    partitions.write_part(str(tmp_path), ITEM_REJECTS, schema, arrays.empty_rows(schema), 0, 1)
    partition = partitions.Partition(str(tmp_path), {"files": partitions.receipts(str(tmp_path))})
    assert partition.rows == 0
    assert partition.schema.equals(schema)
    assert len(partition.read_shard(1, 2, "item_id")) == 0


# ---- Partitions ------------------------------------------------------------------------------


def publish(folder: Path, manifest: dict) -> None:
    documents.write_json(str(folder / "_manifest.json"), manifest)
    digest = hashlib.sha256((folder / "_manifest.json").read_bytes()).hexdigest()
    (folder / "_SUCCESS").write_text(digest + "\n")


def test_a_partition_is_what_its_manifest_lists(tmp_path: Path) -> None:
    schema, rows = histories([1, 2, 3])
    partition = write_table(str(tmp_path), schema, rows, 2)
    publish(tmp_path, partition.manifest)
    (tmp_path / "part-00000-of-00002-old.parquet").write_text("of another version")
    assert partitions.is_published(str(tmp_path))
    found = partitions.open_published(str(tmp_path))
    assert found == partition
    assert [partitions.shard_name(os.path.basename(path)) for path in found.paths] == [
        "part-00000-of-00002",
        "part-00001-of-00002",
    ]
    assert (found.rows, found.run_id) == (3, "r")
    assert found.schema.names == schema.names


@pytest.mark.parametrize(
    "lacking", ["folder", "everything", "_SUCCESS", "_manifest.json", "agreement"]
)
def test_no_partition_is_open_unless_success_names_its_manifest(
    tmp_path: Path, lacking: str
) -> None:
    folder = tmp_path / "ds=2026-01-06"
    if lacking != "folder":
        folder.mkdir()
    if lacking not in ("folder", "everything"):
        publish(folder, {"files": [], "run_id": "r", "version": "v"})
        assert partitions.is_published(str(folder))
    if lacking in ("_SUCCESS", "_manifest.json"):
        (folder / lacking).unlink()
    if lacking == "agreement":  # a manifest of the next version, whose _SUCCESS is still to come
        documents.write_json(
            str(folder / "_manifest.json"), {"files": [], "run_id": "next", "version": "w"}
        )
    assert not partitions.is_published(str(folder))
    with pytest.raises(InputNotReady) as refused:
        partitions.open_published(str(folder))
    assert refused.value.exit_status == 4
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data + b" "])
def test_a_damaged_manifest_is_never_read(tmp_path: Path, damage) -> None:
    publish(tmp_path, {"files": [], "run_id": "r", "version": "v"})
    path = tmp_path / "_manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputNotReady):
        partitions.open_published(str(tmp_path))


def test_a_staged_partition_is_open_to_us_and_to_nobody_else(tmp_path: Path) -> None:
    assert partitions.find_staged(str(tmp_path)) is None
    documents.write_json(
        str(tmp_path / "_staged.json"), {"files": [], "run_id": "r", "version": "v"}
    )
    assert partitions.find_staged(str(tmp_path)).run_id == "r"
    assert not partitions.is_published(str(tmp_path))
