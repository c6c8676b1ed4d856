"""Jobs hand each other JSON, columns, chunks of a shuffle and word of a refusal without loss."""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings

from feature_jobs.schemas import (
    EMBEDDING_DIM,
    CourierError,
    DataContractError,
    OperatorError,
    StorageUnavailable,
)
from feature_jobs.store import arrays, documents, encoder_info, hashing, worker_notes
from tests.support.table_rows import FLOATS, KEYS, SHARDS, embeddings

# ---- JSON and identities ---------------------------------------------------------------------


def test_equal_values_have_one_digest_and_others_another() -> None:
    value = {"b": [1, 2.5, None], "a": {"y": "é", "x": True}}
    again = {"a": {"x": True, "y": "é"}, "b": [1, 2.5, None]}
    assert documents.canonical_json(value) == '{"a":{"x":true,"y":"é"},"b":[1,2.5,null]}'.encode()
    assert documents.digest(value) == documents.digest(again)
    assert documents.digest(value) == hashlib.sha256(documents.canonical_json(value)).hexdigest()
    assert len({documents.digest(v) for v in (value, [1, 2], [2, 1], ["1", 2], 1, "1", None)}) == 7


def test_json_survives_the_file_and_damage_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    documents.write_json(path, {"name": "衣服", "rows": 3})
    assert documents.read_json(path) == {"name": "衣服", "rows": 3}
    with pytest.raises(FileNotFoundError):
        documents.read_json(str(tmp_path / "none.json"))
    for damaged in (Path(path).read_bytes()[:-4], b"\xff\xfe", b""):
        Path(path).write_bytes(damaged)
        with pytest.raises(DataContractError) as found:
            documents.read_json(path)
        assert path in str(found.value)
        assert "\n" not in str(found.value)


ENCODER = encoder_info.EncoderInfo(
    encoder_id="demo-0123456789ab",
    backbone="resnet18",
    preprocessing={"input_size": 96},
    categories=("dress", "shirt"),
    data_start_ds="2026-01-01",
    data_end_ds=None,
    weights="random",
)


@pytest.mark.parametrize("categories", [("dress", "shirt"), (), None])
def test_what_an_encoder_package_says_survives_the_file(
    tmp_path: Path, categories: tuple[str, ...] | None
) -> None:
    info = replace(ENCODER, categories=categories)
    encoder_info.write_encoder_info(str(tmp_path), info)
    assert encoder_info.read_encoder_info(str(tmp_path)) == info


@pytest.mark.parametrize("missing", [None, "encoder_id", "categories", "weights"])
def test_a_folder_that_is_no_encoder_package_is_refused(
    tmp_path: Path, missing: str | None
) -> None:
    if missing:
        encoder_info.write_encoder_info(str(tmp_path), ENCODER)
        fields = documents.read_json(str(tmp_path / "encoder.json"))
        del fields[missing]
        documents.write_json(str(tmp_path / "encoder.json"), fields)
    with pytest.raises(OperatorError) as refused:
        encoder_info.read_encoder_info(str(tmp_path))
    assert refused.value.exit_status == 2
    assert str(tmp_path) in str(refused.value)
    assert (missing or "No such file") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ['["a", "b"]', "3", '{"categories": null, "more": 1}'])
def test_json_that_describes_no_encoder_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "encoder.json").write_text(content)
    with pytest.raises(OperatorError, match="no encoder package"):
        encoder_info.read_encoder_info(str(tmp_path))


def test_a_file_in_place_of_an_encoder_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder").write_text("weights")
    with pytest.raises(OperatorError, match="no encoder package"):
        encoder_info.read_encoder_info(str(tmp_path / "encoder"))


def test_a_null_category_is_in_scope_only_where_all_are() -> None:
    category = pa.chunked_array([["dress", None], ["car", "dress"]])
    assert encoder_info.in_scope(category, None).tolist() == [True] * 4
    assert encoder_info.in_scope(category, ("dress", "shirt")).tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert encoder_info.in_scope(category, ()).tolist() == [False] * 4


# ---- Arrow and numpy -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("f4", pa.float32()), ("i1", pa.int8()), ("i4", pa.int32())]
)
def test_a_matrix_survives_as_a_list_column(
    shape: tuple[int, int], dtype: str, kind: pa.DataType
) -> None:
    matrix = np.arange(shape[0] * shape[1]).reshape(shape).astype(dtype)
    column = arrays.list_column(matrix, pa.list_(kind))
    assert column.type == pa.list_(kind)
    assert column.to_pylist() == matrix.tolist()
    column.validate(full=True)


def test_a_transposed_matrix_keeps_its_rows() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert arrays.list_column(matrix, FLOATS).to_pylist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_embeddings_survive_as_a_column_however_it_is_chunked_and_sliced(rows: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((rows, EMBEDDING_DIM)).astype(np.float32)
    column = arrays.list_column(matrix, FLOATS)
    whole = pa.chunked_array([column.slice(0, rows // 2), column.slice(rows // 2)], FLOATS)
    for found, expected in (
        (arrays.embedding_matrix(whole), matrix),
        (arrays.embedding_matrix(whole.slice(1)), matrix[1:]),
        (arrays.embedding_matrix(pa.chunked_array([column.slice(rows // 2)])), matrix[rows // 2 :]),
    ):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_a_slice_travels_without_the_rest_of_its_table() -> None:
    _, rows = embeddings(1000)
    whole, part = arrays.to_ipc(rows), arrays.to_ipc(rows.slice(500, 10))
    assert arrays.from_ipc([part], rows).equals(rows.slice(500, 10))
    assert len(whole) > 1000 * 4 * EMBEDDING_DIM
    assert len(part) < len(whole) / 50


def test_chunks_without_rows_leave_the_others_alone() -> None:
    rows, otherwise = pa.table({"a": [1, 2]}), pa.table({"a": pa.array([], pa.int64())})
    chunks = [b"", arrays.to_ipc(rows), b"", arrays.to_ipc(rows.slice(1))]
    assert arrays.from_ipc(chunks, otherwise)["a"].to_pylist() == [1, 2, 2]
    assert arrays.from_ipc([b"", b""], otherwise) is otherwise
    assert arrays.from_ipc([], otherwise) is otherwise


@settings(max_examples=80, deadline=None, derandomize=True)
@given(KEYS, SHARDS)
def test_splitting_by_shard_loses_and_doubles_no_row(keys: list, shards: int) -> None:
    kind = pa.string() if keys and isinstance(keys[0], str) else pa.int64()
    keys = keys + keys[:7]  # several rows of one key
    table = pa.table({"k": pa.array(keys, kind), "row": pa.array(range(len(keys)), pa.int64())})
    split = list(hashing.split_by_shard(table, "k", shards))
    numbers = [shard for shard, _ in split]
    assert numbers == sorted(set(numbers))
    rows = []
    for shard, chunk in split:
        part = arrays.from_ipc([chunk], table)
        assert len(part) > 0
        assert set(hashing.shard_of(hashing.hash_ids(part["k"]), shards)) == {shard}
        assert part["row"].to_pylist() == sorted(part["row"].to_pylist())  # in order of arrival
        rows += part.to_pylist()
    assert sorted(rows, key=lambda row: row["row"]) == table.to_pylist()


def test_a_table_without_rows_goes_to_no_shard() -> None:
    for kind in (pa.int64(), pa.string()):
        assert list(hashing.split_by_shard(pa.table({"k": pa.array([], kind)}), "k", 8)) == []


# ---- What workers tell the launcher ------------------------------------------------------------


class Worker:
    """Looks to `refusing` as a DoFn does."""

    def __init__(self, staging: Path):
        self.staging = str(staging)

    @worker_notes.refusing
    def process(self, element: Exception | int) -> Iterator[int]:
        if isinstance(element, Exception):
            raise element
        yield element

    @worker_notes.refusing
    def write(self, element: Exception | None) -> None:
        if element:
            raise element


@pytest.mark.parametrize(
    "kind", [DataContractError, OperatorError, StorageUnavailable, CourierError]
)
def test_what_is_refused_reaches_the_launcher_word_for_word(
    tmp_path: Path, kind: type[CourierError]
) -> None:
    worker = Worker(tmp_path)
    assert list(worker.process(1)) == [1]
    assert worker_notes.refused(worker.staging) == []
    assert list(worker.process(kind("item 7 is »null«"))) == []
    (found,) = worker_notes.refused(worker.staging)
    assert type(found) is kind
    assert str(found) == "item 7 is »null«"


def test_once_anything_is_refused_no_worker_does_more(tmp_path: Path) -> None:
    assert list(Worker(tmp_path).write(None)) == []
    assert list(Worker(tmp_path).write(DataContractError("no"))) == []
    assert list(Worker(tmp_path).process(1)) == []


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(5)])
def test_what_is_not_for_the_operator_is_raised(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        list(Worker(tmp_path).process(error))
    assert os.listdir(tmp_path) == []


def test_a_heartbeat_is_one_file_that_grows_with_what_is_counted(tmp_path: Path) -> None:
    heartbeat = worker_notes.Heartbeat(str(tmp_path))
    heartbeat.add(done=1)
    heartbeat.add(done=4, rejected_missing=1)  # too soon to be written
    (name,) = os.listdir(tmp_path / "progress")
    assert documents.read_json(str(tmp_path / "progress" / name)) == {"done": 1}
    heartbeat.write()
    assert os.listdir(tmp_path / "progress") == [name]
    told = documents.read_json(str(tmp_path / "progress" / name))
    assert told == {"done": 5, "rejected_missing": 1}


def test_workers_that_begin_as_copies_of_one_have_heartbeats_of_their_own(tmp_path: Path) -> None:
    one = worker_notes.Heartbeat(str(tmp_path))
    other = copy.deepcopy(one)
    one.add(done=1)
    other.add(done=2)
    found = [json.loads(path.read_text()) for path in (tmp_path / "progress").iterdir()]
    assert sorted(told["done"] for told in found) == [1, 2]


def test_a_warning_of_many_workers_is_told_once(tmp_path: Path) -> None:
    assert worker_notes.warnings(str(tmp_path)) == []
    for message in ("no »CUDA« here", "another", "no »CUDA« here"):
        worker_notes.warn(str(tmp_path), message)
    assert sorted(worker_notes.warnings(str(tmp_path))) == ["another", "no »CUDA« here"]
