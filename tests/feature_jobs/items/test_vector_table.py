"""A table of vectors is opened by its footers, which tell type and length before a job begins."""

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.items.vector_table import open_vectors
from feature_jobs.schemas import DataContractError, InputNotReady, OperatorError
from feature_jobs.store import files
from feature_jobs.store.encoder_info import VectorSource
from tests.support.vector_shop import as_column

DS = dt.date(2026, 3, 1)
GOOD = list(np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32))


def write(folder: Path, form: str, name: str = "0", vectors: list = GOOD, ds: dt.date = DS) -> str:
    path = folder / f"ds={ds}" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    column = as_column(vectors, form)
    pq.write_table(pa.table({"sku": range(len(vectors)), "clip": column}), path)
    return f"{folder}/ds={{ds}}/*.parquet"


def source(as_bytes: bool = False, **more: bool) -> VectorSource:
    return VectorSource("as typed", "sku", "clip", as_bytes, **more)


@pytest.mark.parametrize(
    ("form", "width"),
    [("list", None), ("large", None), ("half", None), ("fixed", 16), ("bytes", None)],
)
def test_it_tells_length_type_of_ids_and_versions(
    tmp_path: Path, form: str, width: int | None
) -> None:
    template = write(tmp_path, form)
    table = open_vectors(source(form == "bytes"), template, DS, 16)
    assert table.width == width
    assert (table.source.item_id, table.source.rows) == (pa.int64(), 5)
    (path,) = table.source.paths
    assert table.versions == {path: files.stat(path).version}
    other = table.of_day(DS + dt.timedelta(days=1))
    assert other.source.identity() != table.source.identity()
    assert other.source.paths == table.source.paths


def test_bytes_of_one_width_tell_their_length(tmp_path: Path) -> None:
    template = write(tmp_path, "bytes")
    path = tmp_path / f"ds={DS}" / "0.parquet"
    rows = pq.read_table(path, partitioning=None)
    rows = rows.set_column(1, "clip", rows["clip"].cast(pa.binary(64)))
    pq.write_table(rows, path)
    assert open_vectors(source(True), template, DS).width == 16


def test_vectors_of_another_length_are_refused_by_their_type(tmp_path: Path) -> None:
    template = write(tmp_path, "fixed")
    with pytest.raises(DataContractError, match="have 16 numbers each, but 24 were registered"):
        open_vectors(source(), template, DS, 24)


def test_two_lengths_in_one_table_are_refused_by_their_types(tmp_path: Path) -> None:
    write(tmp_path, "fixed")
    template = write(tmp_path, "fixed", "1", [v[:12] for v in GOOD])
    with pytest.raises(DataContractError, match=r"'clip' of the vectors table is .*16.*but.*12"):
        open_vectors(source(), template, DS)


@pytest.mark.parametrize("are_bytes", [True, False])
def test_bytes_are_taken_for_numbers_only_where_that_is_said(
    tmp_path: Path, are_bytes: bool
) -> None:
    template = write(tmp_path, "bytes" if are_bytes else "list")
    said = "with" if are_bytes else "without"
    with pytest.raises(OperatorError, match=f"register the vectors {said} --as-bytes"):
        open_vectors(source(not are_bytes), template, DS)


def test_a_column_of_whole_numbers_or_of_none_is_refused(tmp_path: Path) -> None:
    template = write(tmp_path, "list")
    with pytest.raises(DataContractError, match=r"lacks the column 'clop'.*mean 'clip'.*--vector"):
        open_vectors(VectorSource("t", "sku", "clop"), template, DS)
    with pytest.raises(DataContractError, match=r"has type int64.*must be a list of floats"):
        open_vectors(VectorSource("t", "sku", "sku"), template, DS)


def test_a_day_that_is_not_there_or_not_whole_is_waited_for(tmp_path: Path) -> None:
    template = write(tmp_path, "list")
    with pytest.raises(InputNotReady, match="vectors table has no partition for ds 2026-03-02"):
        open_vectors(source(), template, DS + dt.timedelta(days=1))
    with pytest.raises(InputNotReady, match="no _SUCCESS"):
        open_vectors(source(require_success=True), template, DS)
    (tmp_path / f"ds={DS}" / "_SUCCESS").touch()
    assert open_vectors(source(require_success=True), template, DS).source.rows == 5
