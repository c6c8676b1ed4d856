"""A file that is written in memory has the bytes that it has anywhere, whatever its size."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.store import memory_files


def test_what_fits_is_written_once() -> None:
    calls = []
    found = memory_files.written(10, lambda sink: calls.append(sink.write(b"0123456789")))
    assert (found.to_pybytes(), len(calls)) == (b"0123456789", 1)


@pytest.mark.parametrize("size", [0, 1, 1_000_000])
def test_a_parquet_file_is_whole_whether_it_fits_or_not(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_files, "_HEADS", 1)
    rows = pa.table({"a": np.random.default_rng(0).random(10_000)})
    calls = []

    def write(sink: pa.NativeFile) -> None:
        calls.append(sink)
        pq.write_table(rows, sink, row_group_size=1_000)

    found = memory_files.written(size, write)
    expected = pa.BufferOutputStream()
    write(expected)
    assert found.equals(expected.getvalue())
    assert len(calls) == (2 if size == 1_000_000 else 3)
    assert pq.read_table(pa.BufferReader(found)).equals(rows)


def test_what_cannot_be_written_to_a_buffer_that_grows_either_is_raised() -> None:
    calls = []

    def write(sink: pa.NativeFile) -> None:
        calls.append(sink)
        raise OSError(f"no codec, {len(calls)}")

    with pytest.raises(OSError, match="no codec, 2"):
        memory_files.written(10, write)
