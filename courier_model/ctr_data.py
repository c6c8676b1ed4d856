"""Feeds a PyTorch model with a joined training set in the plain layout.

Row groups are decoded by pyarrow and become arrays without Python for any row: what it costs beyond
decoding is a shuffled copy. `pipelines/docs/ctr.md` has a training loop around it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from feature_jobs.schemas import DataContractError, InputNotReady, OperatorError
from feature_jobs.store import files

_MIXED_ROWS = 1 << 16  # at least, that are shuffled together, if there are as many

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Rows:
    """Names rows start..stop-1 of a row group of a file, told by its place in the list."""

    file: int
    group: int
    start: int
    stop: int


class CtrBatches(IterableDataset[dict[str, Tensor]]):
    """Yields all rows of Parquet files once an epoch, shuffled, in batches of tensors by column.

    A number or boolean becomes a tensor [rows], a list, of one length in all rows, one of
    [rows, places]; the type is the column's own. Only the last batch of a worker has fewer rows
    than `batch_size`. The order follows from `seed`, the epoch (`set_epoch`, as for torch's
    DistributedSampler), and how many ranks and workers there are.

    Row groups are put into a random order and shared out in stretches of equal numbers of rows
    (±1) among `world_size` ranks and the workers of each one's DataLoader, to which this goes with
    `batch_size=None`. Each shuffles its rows in pools of some 65,000, of several row groups where
    those are smaller. A rank may have one batch more than another: see torch's `Join`.

    Raises OperatorError for a column that is missing or of another type, InputNotReady for a file
    that is not there, DataContractError for one that cannot be read; while it is read, also for
    nulls or lists of unequal lengths.
    """

    def __init__(
        self,
        paths: Sequence[str],
        columns: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not paths or not columns or batch_size < 1 or not 0 <= rank < world_size:
            raise OperatorError(
                f"{len(paths)} files, {len(columns)} columns, batch_size {batch_size}, rank {rank} "
                f"of {world_size} were given. At least one file and one column, a batch of a row "
                "and a rank below world_size are needed for a batch: mend the call."
            )
        self._paths, self._columns = list(paths), list(columns)
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._footers = [_footer(path, self._columns) for path in self._paths]
        self._groups = [
            _Rows(at, group, 0, footer.row_group(group).num_rows)
            for at, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        ]
        # Shared, so that workers that live on from epoch to epoch are told too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Makes the iterations that begin from now on those of another epoch, in another order."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        shards, shard = self._world_size * workers, self._rank * workers + number
        epoch = int(self._epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._groups))
        mine = _stretch([self._groups[at] for at in order], shard, shards)
        # Beside other workers each decodes in one thread.
        read = (self._read(rows, use_threads=worker is None) for rows in mine)
        yield from _batches(
            read, self._batch_size, np.random.default_rng([self._seed, epoch, shard])
        )

    def _read(self, rows: _Rows, use_threads: bool) -> Arrays:
        """Reads some rows of a row group; a column is an array [rows] or [rows, places]."""
        path = self._paths[rows.file]
        with (
            files.open_input(path) as data,
            pq.ParquetFile(data, metadata=self._footers[rows.file], pre_buffer=True) as file,
        ):
            found = file.read_row_group(rows.group, self._columns, use_threads=use_threads)
        found = found.slice(rows.start, rows.stop - rows.start)
        return {name: _array(found[name].combine_chunks(), name, path) for name in self._columns}


# ---- Files -----------------------------------------------------------------------------------


def _footer(path: str, columns: Sequence[str]) -> pq.FileMetaData:
    """Reads a file's footer; raises where the file or a column is not there or no tensor."""
    try:
        with files.open_input(path) as data, pq.ParquetFile(data) as file:
            schema, footer = file.schema_arrow, file.metadata
    except FileNotFoundError as error:
        raise InputNotReady(
            f"{path} is not there. It was given as a file of the training set: join that day "
            "first, or name the files that there are."
        ) from error
    except pa.ArrowInvalid as error:
        raise DataContractError(
            f"{path} is no Parquet file that can be read ({error}). It was given as a file of the "
            "training set: join that day again, or leave the file out."
        ) from error
    for name in columns:
        if name not in schema.names:
            raise OperatorError(
                f"{path} has no column {name}, which a batch should hold. It has "
                f"{', '.join(schema.names)}."
            )
        if not _is_number(_inner(schema.field(name).type)):
            raise OperatorError(
                f"Column {name} of {path} is of type {schema.field(name).type}: a tensor is made "
                "of numbers, booleans, or lists of these. Leave the column out, or make it a "
                "number before the join."
            )
    return footer


def _inner(type: pa.DataType) -> pa.DataType:
    is_list = pt.is_list(type) or pt.is_large_list(type) or pt.is_fixed_size_list(type)
    return type.value_type if is_list else type


def _is_number(type: pa.DataType) -> bool:
    return pt.is_boolean(type) or pt.is_integer(type) or pt.is_floating(type)


def _array(column: pa.Array, name: str, path: str) -> np.ndarray:
    """Returns a column as an array [rows], or [rows, places] of lists; a view where it can be."""
    values = column
    shape: tuple[int, ...] = (len(column),)
    if _inner(column.type) != column.type:
        values = column.flatten()
        places = len(values) // max(len(column), 1)
        ends = np.diff(np.asarray(column.value_lengths().fill_null(-1)))
        if len(values) != len(column) * places or ends.any():
            raise _unequal(name, path)
        shape = (len(column), places)
    if column.null_count or values.null_count:
        raise DataContractError(
            f"Column {name} of {path} holds nulls, of which no tensor can be made: a label or a "
            "number of yours that is missing in some rows. Fill it before the join, or leave the "
            "column out."
        )
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _unequal(name: str, path: str) -> DataContractError:
    return DataContractError(
        f"Lists of column {name}, in {path}, differ in length; a tensor needs one length in all "
        "rows. Lists of COURIER's are padded to it: a column of yours should be too, or be left "
        "out; days joined with different settings are no one training set."
    )


# ---- Rows ------------------------------------------------------------------------------------


def _stretch(groups: Sequence[_Rows], shard: int, shards: int) -> list[_Rows]:
    """Returns the rows of a shard, of groups laid end to end and cut into equal stretches."""
    sizes = np.array([rows.stop for rows in groups], np.int64)
    ends = np.cumsum(sizes)
    total = int(sizes.sum())
    low, high = total * shard // shards, total * (shard + 1) // shards
    start = np.clip(low - (ends - sizes), 0, sizes)  # of each group
    stop = np.clip(high - (ends - sizes), 0, sizes)
    return [
        _Rows(rows.file, rows.group, int(first), int(last))
        for rows, first, last in zip(groups, start, stop, strict=True)
        if first < last
    ]


def _pools(read: Iterator[Arrays]) -> Iterator[list[Arrays]]:
    """Gathers what is read until it holds enough rows to be shuffled."""
    pool, rows = [], 0
    for arrays in read:
        pool.append(arrays)
        rows += _count(arrays)
        if rows >= _MIXED_ROWS:
            yield pool
            pool, rows = [], 0
    if pool:
        yield pool


def _batches(
    read: Iterator[Arrays], batch_size: int, rng: np.random.Generator
) -> Iterator[dict[str, Tensor]]:
    """Shuffles rows within pools; what fills no batch goes into the next pool."""
    rest: list[Arrays] = []
    for pool in _pools(read):
        arrays = _end_to_end([*rest, *pool])
        order = rng.permutation(_count(arrays))
        whole = len(order) - len(order) % batch_size
        for at in range(0, whole, batch_size):
            yield _tensors(arrays, order[at : at + batch_size])
        rest = [{name: values[order[whole:]] for name, values in arrays.items()}]
    for left in rest:
        if _count(left):
            yield _tensors(left, np.arange(_count(left)))


def _count(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _tensors(arrays: Arrays, rows: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values[rows]) for name, values in arrays.items()}


def _end_to_end(parts: Sequence[Arrays]) -> Arrays:
    """Joins rows of several row groups; raises DataContractError where their lists differ."""
    joined = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if len({column.shape[1:] for column in columns}) > 1:
            raise _unequal(name, "one file and another")
        joined[name] = np.concatenate(columns) if len(columns) > 1 else columns[0]
    return joined
