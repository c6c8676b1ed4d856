"""Tests the loader of joined training sets: no row is lost, torn or read twice, in known orders."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from courier_model import ctr_data
from courier_model.ctr_data import CtrBatches
from feature_jobs.schemas import CourierError, DataContractError, InputNotReady, OperatorError
from feature_jobs.store.arrays import list_column
from tests.support import joined_rows
from tests.test_imports import ROOT

PLACES, ROWS = 5, 1_003
COLUMNS = ["row", "clicked", "sim_mean", "sim_scores", "sim_mask", "simtier"]
Batches = list[dict[str, Tensor]]


def rows_of(numbers: np.ndarray) -> pa.Table:
    """Returns rows whose every column tells their number."""
    places = numbers[:, None] + np.arange(PLACES)
    return pa.table(
        {
            "row": numbers,
            "user_id": [f"user-{n}" for n in numbers],
            "clicked": numbers % 3 == 0,
            "sim_mean": numbers.astype(np.float32),
            "sim_scores": list_column(places.astype(np.float32), pa.list_(pa.float32())),
            "sim_mask": list_column((places % 2).astype(np.int8), pa.list_(pa.int8())),
            "simtier": pa.FixedSizeListArray.from_arrays(
                pa.array(places.reshape(-1).astype(np.int32)), PLACES
            ),
        }
    )


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Writes files with few and many row groups, one of them without rows."""
    found = []
    for at, numbers in enumerate(np.split(np.arange(ROWS), [400, 400, 990])):
        found.append(str(tmp_path / f"part-{at}.parquet"))
        pq.write_table(rows_of(numbers), found[-1], row_group_size=[400, 1, 70, 3][at])
    return found


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctr_data, "_MIXED_ROWS", 100)


def read(batches: CtrBatches, workers: int = 0, epoch: int = 0) -> Batches:
    batches.set_epoch(epoch)
    return list(DataLoader(batches, batch_size=None, num_workers=workers))


def order(batches: Batches) -> list[int]:
    return torch.cat([batch["row"] for batch in batches]).tolist()


# ---- What is yielded ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_row_is_read_once_an_epoch(paths: list[str], workers: int, world_size: int) -> None:
    found = []
    for rank in range(world_size):
        batches = CtrBatches(paths, COLUMNS, 32, rank=rank, world_size=world_size)
        found.append(order(read(batches, workers)))
    assert sorted(number for share in found for number in share) == list(range(ROWS))
    sizes = [len(numbers) for numbers in found]
    assert max(sizes) - min(sizes) <= max(workers, 1)


def test_more_shards_than_rows_lose_and_repeat_none(tmp_path: Path) -> None:
    path = str(tmp_path / "part.parquet")
    pq.write_table(rows_of(np.arange(5)), path)
    shares = [read(CtrBatches([path], ["row"], 32, rank=r, world_size=8)) for r in range(8)]
    assert sorted(number for share in shares if share for number in order(share)) == list(range(5))


def test_a_row_is_whole_and_has_the_types_of_its_columns(paths: list[str]) -> None:
    for batch in read(CtrBatches(paths, COLUMNS, 32)):
        numbers = batch["row"].numpy()
        expected = rows_of(numbers)
        assert list(batch) == COLUMNS
        for name in COLUMNS:
            wanted = np.array(expected[name].to_pylist()).astype(batch[name].numpy().dtype)
            assert np.array_equal(batch[name].numpy(), wanted), name
    types = {name: str(column.dtype).removeprefix("torch.") for name, column in batch.items()}
    assert types == {
        "row": "int64", "clicked": "bool", "sim_mean": "float32",
        "sim_scores": "float32", "sim_mask": "int8", "simtier": "int32",
    }  # fmt: skip
    assert batch["sim_scores"].shape == (len(numbers), PLACES)


def test_all_batches_but_the_last_are_full(paths: list[str]) -> None:
    sizes = [len(batch["row"]) for batch in read(CtrBatches(paths, COLUMNS, 64))]
    assert sizes == [64] * (ROWS // 64) + [ROWS % 64]


# ---- Their order -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_order_follows_from_seed_and_epoch(paths: list[str], workers: int) -> None:
    def ordered(seed: int, epoch: int) -> list[int]:
        return order(read(CtrBatches(paths, COLUMNS, 32, seed=seed), workers, epoch))

    first = ordered(7, 0)
    assert ordered(7, 0) == first
    others = [ordered(7, 1), ordered(8, 0)]
    assert all(other != first and sorted(other) == sorted(first) for other in others)
    assert others[0] != others[1]


def test_workers_that_live_on_are_told_of_the_epoch(paths: list[str]) -> None:
    batches = CtrBatches(paths, COLUMNS, 32)
    loader = DataLoader(batches, batch_size=None, num_workers=2, persistent_workers=True)
    found = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        found.append(order(list(loader)))
    assert found[0] == found[2] != found[1]


def test_rows_of_many_row_groups_are_mixed(paths: list[str]) -> None:
    first = order(read(CtrBatches(paths, COLUMNS, 32)))[:32]
    assert np.abs(np.diff(first)).min() >= 1
    assert np.mean(np.abs(np.diff(first)) > 3) > 0.5  # not as they lie in a file


# ---- What is refused ---------------------------------------------------------------------------


def write(path: Path, **columns: object) -> str:
    pq.write_table(pa.table({"row": np.arange(4), **columns}), path)
    return str(path)


def refusal(kind: type[CourierError], paths: list[str], columns: list[str], **given: int) -> str:
    with pytest.raises(kind) as refused:
        read(CtrBatches(paths, columns, **{"batch_size": 2, **given}))
    return str(refused.value)


def test_columns_that_are_no_tensors_are_refused_before_a_row_is_read(paths: list[str]) -> None:
    assert "no column cluster" in refusal(OperatorError, paths, ["row", "cluster"])
    assert "user_id" in refusal(OperatorError, paths, ["row", "user_id"])


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "gone.parquet" in refusal(InputNotReady, [str(tmp_path / "gone.parquet")], ["row"])


def test_a_file_that_is_torn_is_told(paths: list[str]) -> None:
    Path(paths[2]).write_bytes(Path(paths[2]).read_bytes()[:-9])
    assert f"{paths[2]} is no Parquet file" in refusal(DataContractError, paths, ["row"])


@pytest.mark.parametrize(
    "given", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}], ids=str
)
def test_a_call_that_gives_no_batch_is_refused(paths: list[str], given: dict[str, int]) -> None:
    assert "mend the call" in refusal(OperatorError, paths, ["row"], **given)


def test_no_file_or_no_column_is_refused(paths: list[str]) -> None:
    assert "0 files" in refusal(OperatorError, [], ["row"])
    assert "0 columns" in refusal(OperatorError, paths, [])


def test_nulls_are_refused(tmp_path: Path) -> None:
    labels = write(tmp_path / "a.parquet", clicked=[True, None, False, True])
    assert "clicked" in refusal(DataContractError, [labels], ["clicked"])
    inside = write(tmp_path / "b.parquet", tags=[[1, 2], [3, None], [1, 2], [1, 2]])
    assert "nulls" in refusal(DataContractError, [inside], ["tags"])
    lists = write(tmp_path / "c.parquet", tags=[[1, 2], None, [1, 2], [1, 2]])
    assert "tags" in refusal(DataContractError, [lists], ["tags"])


def test_lists_of_unequal_lengths_are_refused(tmp_path: Path) -> None:
    ragged = write(tmp_path / "a.parquet", tags=[[1], [1, 2, 3], [1, 2], [1, 2]])
    assert "tags" in refusal(DataContractError, [ragged], ["tags"])
    two = write(tmp_path / "b.parquet", tags=[[1, 2]] * 4)
    three = write(tmp_path / "c.parquet", tags=[[1, 2, 3]] * 4)
    assert "one file and another" in refusal(DataContractError, [two, three], ["tags"])


# ---- The page ----------------------------------------------------------------------------------


def test_the_pages_lines_train_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = joined_rows.joined(300).rename_columns({"label": "clicked"})
    day = tmp_path / "features/demo/joined/ctr/ds=2026-01-07"
    day.mkdir(parents=True)
    pq.write_table(drawn, day / "part-0.parquet")
    manifest = {
        "notes": {"max_id": joined_rows.MAX_IDS},
        "settings": {"history_len": joined_rows.PLACES},
    }
    (day / "_manifest.json").write_text(json.dumps(manifest))
    page = (
        (ROOT / "pipelines/docs/ctr.md")
        .read_text()
        .partition("## PyTorch")[2]
        .partition("\n## ")[0]
    )
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    known = dict[str, Any]()
    exec(script, known)
    assert 0 < known["loss"].item() < 2
