"""Makes batches of pixels out of training rows.

A training row (COURIER appendix §4) is one user at one moment: up to five page-view items (PVs)
with click labels, and the up to five items clicked before, newest first. A batch holds every
distinct image of its rows once per view, however many rows show it, and rows that point into them.

Batches go by their global *step*: step -> rows -> pixels is a pure function of the settings, so
that neither the number of workers nor a restart changes what is trained on.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from courier_model.training.augment import Pixels, centre_crop, random_crop, simclr_view
from feature_jobs.schemas import (
    ROW_CLICKS,
    ROW_PVS,
    CourierError,
    DataContractError,
    OperatorError,
)

AUGMENTATIONS = ("centre", "crop", "simclr")

Codes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# What a stream of random numbers is for, so that no two uses of one seed share a stream.
_ORDER, _PIXELS = 0, 1

_PIECE = 256  # images


# ---- Rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSet:
    """Holds training rows as arrays; codes are places in `items`, and -1 pads to the right."""

    pv: Codes  # [rows, 5]
    clicked: Flags  # [rows, 5], False where there is no PV
    clicks: Codes  # [rows, 5], newest first
    users: Codes  # [rows], codes of users
    moments: Codes  # [rows], microseconds
    items: pa.Table  # item_id, image_uri (nullable), title (nullable), sorted by item_id

    def __len__(self) -> int:
        return len(self.users)

    def with_anchor(self) -> TrainingSet:
        """Returns the rows to train on: with a clicked PV and an earlier click to predict it by."""
        return self.take(self.clicked.any(axis=1) & (self.clicks[:, 0] >= 0))

    def with_history(self) -> TrainingSet:
        """Returns the rows with an earlier click, for the held-out measure."""
        return self.take(self.clicks[:, 0] >= 0)

    def take(self, keep: Flags | Codes) -> TrainingSet:
        """Returns the rows of a mask bool [rows], or of row numbers."""
        return TrainingSet(
            self.pv[keep], self.clicked[keep], self.clicks[keep], self.users[keep],
            self.moments[keep], self.items,
        )  # fmt: skip


def build_sets(rows: Sequence[pa.Table], catalogue: pa.Table) -> list[TrainingSet]:
    """Builds a set of each table of rows, over one table of items and one numbering of users.

    `rows` have the columns of `training_rows` (lists unpadded, clicks newest first); `catalogue`
    has item_id (unique), image_uri and title. `items` are those that occur in the rows; one that
    the catalogue lacks has no image_uri, and so will be masked.

    Raises DataContractError for a list longer than a row holds, and for PVs without a label each.
    """
    lists = [table[name] for table in rows for name in ("pv_item_ids", "click_item_ids")]
    found = pa.chunked_array([chunk.flatten() for column in lists for chunk in column.chunks])
    item_ids = pc.unique(found).sort()
    user_ids = pc.unique(pa.chunked_array([c for t in rows for c in t["user_id"].chunks]))
    at = pc.index_in(item_ids, value_set=catalogue["item_id"])
    # Large strings, since `take` joins chunks, and all URIs of a large shop exceed 2 GiB.
    columns = {
        name: catalogue[name].cast(pa.large_string()).take(at) for name in ("image_uri", "title")
    }
    items = pa.table({"item_id": item_ids, **columns})
    return [_build_set(table, items, user_ids) for table in rows]


def _build_set(rows: pa.Table, items: pa.Table, user_ids: pa.Array) -> TrainingSet:
    pvs, labels = _lengths(rows, "pv_item_ids", ROW_PVS), _lengths(rows, "pv_clicked", ROW_PVS)
    if not np.array_equal(pvs, labels):
        row = int(np.flatnonzero(pvs != labels)[0])
        raise DataContractError(
            f"training_rows: request {rows['request_id'][row]} has {pvs[row]} pv_item_ids but "
            f"{labels[row]} pv_clicked; expected one label for each. Make the table again."
        )
    clicked = np.zeros((len(rows), ROW_PVS), bool)
    clicked[_filled(pvs, ROW_PVS)] = _flat(rows["pv_clicked"])
    return TrainingSet(
        pv=_codes(rows["pv_item_ids"], pvs, ROW_PVS, items["item_id"]),
        clicked=clicked,
        clicks=_codes(
            rows["click_item_ids"],
            _lengths(rows, "click_item_ids", ROW_CLICKS),
            ROW_CLICKS,
            items["item_id"],
        ),
        users=pc.index_in(rows["user_id"], value_set=user_ids).to_numpy().astype(np.int64),
        moments=rows["event_time"].cast(pa.int64()).to_numpy(),
        items=items,
    )


def _lengths(rows: pa.Table, name: str, longest: int) -> Codes:
    """Returns the lengths of a list column, int64 [rows]."""
    lengths = pc.list_value_length(rows[name]).to_numpy().astype(np.int64)
    if lengths.max(initial=0) > longest:
        row = int(lengths.argmax())
        raise DataContractError(
            f"training_rows.{name}: request {rows['request_id'][row]} has {lengths[row]} entries, "
            f"a row holds at most {longest}. Make the table again."
        )
    return lengths


def _filled(lengths: Codes, width: int) -> Flags:
    """Tells which places of the padded lists hold an entry, bool [rows, width]."""
    return np.arange(width) < lengths[:, None]


def _flat(lists: pa.ChunkedArray) -> np.ndarray:
    """Returns all entries of a list column, row by row."""
    chunks = [chunk.flatten() for chunk in lists.chunks]
    return pa.chunked_array(chunks, lists.type.value_type).to_numpy()


def _codes(lists: pa.ChunkedArray, lengths: Codes, width: int, item_ids: pa.ChunkedArray) -> Codes:
    """Turns lists of item IDs into places in `item_ids`, int64 [rows, width] padded with -1."""
    flat = pa.chunked_array([chunk.flatten() for chunk in lists.chunks], lists.type.value_type)
    codes = np.full((len(lengths), width), -1, np.int64)
    codes[_filled(lengths, width)] = pc.index_in(flat, value_set=item_ids).to_numpy()
    return codes


# ---- Batches ---------------------------------------------------------------------------------


@dataclass
class Batch:
    """Holds the rows of one step; places point into the second axis of `images`."""

    step: int
    images: Tensor  # uint8 [views, n, 3, S, S], each distinct image once per view
    keys: Tensor  # int64 [n], equal for equal image bytes and for nothing else
    pv: Tensor  # int64 [B, 5], -1 = masked: absent, missing or undecodable
    clicked: Tensor  # bool [B, 5], False where masked
    clicks: Tensor  # int64 [B, 5], newest first, the valid ones first, then -1
    titles: list[str] | None  # [n], "" where there is none; only when asked for
    bad_images: int  # distinct items of the batch whose image is missing or undecodable

    def pin_memory(self) -> Batch:
        """Pins the tensors; the DataLoader calls this, so that copying to the GPU need not wait."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: t.pin_memory() for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


class Squares(Protocol):
    """Has the images of items, as `ImageCache` has."""

    def read(self, codes: Codes) -> tuple[Pixels, Codes, Flags]: ...


class RowBatches(Dataset[Batch]):
    """Makes the batch of each step, for one rank.

    Every epoch has its own order of all rows, drawn from the seed and the epoch, and is cut into
    batches of `batch_rows` over all ranks; a rank takes its slice of each, in order. The rows of
    the incomplete tail are left out, others in each epoch. `augmentation` is "centre" (what the
    encoder sees at night), "crop" or "simclr"; `size` is the side of the images in pixels. Random
    numbers depend on seed, step and rank only.

    Raises OperatorError when there are fewer rows than a batch has, or it cannot be shared evenly.
    """

    def __init__(
        self, rows: TrainingSet, cache: Squares, views: int, augmentation: str, size: int,
        batch_rows: int, seed: int, rank: int = 0, world: int = 1, titles: bool = False,
    ) -> None:  # fmt: skip
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation is {augmentation!r}, expected one of {AUGMENTATIONS}")
        if batch_rows < 1 or batch_rows % world:
            raise OperatorError(
                f"A batch of {batch_rows} rows cannot be shared evenly by {world} processes. Take "
                f"a multiple of {world}."
            )
        if len(rows) < batch_rows:
            raise OperatorError(
                f"There are {len(rows):,} rows to take batches of {batch_rows:,} from. Take "
                "smaller batches, or train on more days."
            )
        # Tensors, since worker processes share those, where each gets a copy of a numpy array.
        self._rows = tuple(map(torch.from_numpy, (rows.pv, rows.clicked, rows.clicks)))
        self._titles = rows.items["title"] if titles else None
        self._cache = cache
        self._views, self._augmentation, self._size = views, augmentation, size
        self._batch_rows, self._seed, self._rank, self._world = batch_rows, seed, rank, world
        self._order: tuple[int, Codes] = (-1, np.zeros(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        return len(self._rows[0]) // self._batch_rows

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a step; raises OSError for faults of the disk."""
        return self.load(self.rows_of(step), step)

    def rows_of(self, step: int) -> Codes:
        """Returns the numbers of the rows of a step, int64 `[B]`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, _ORDER, epoch])
            self._order = epoch, rng.permutation(len(self._rows[0]))
        share = self._batch_rows // self._world
        start = number * self._batch_rows + self._rank * share
        return self._order[1][start : start + share]

    def items_of(self, rows: Codes) -> Codes:
        """Returns the distinct items that rows show, sorted codes int64 `[m]`."""
        pv, _, clicks = (column.numpy()[rows] for column in self._rows)
        codes = np.unique(np.concatenate([pv, clicks], axis=1))
        return codes[codes >= 0]

    def load(self, rows: Codes, step: int) -> Batch:
        """Loads the batch of the row numbers `rows`, int64 `[B]`; `step` seeds the augmentation."""
        pv, clicked, clicks = (column.numpy()[rows] for column in self._rows)
        codes = self.items_of(rows)
        squares, keys, good = self._cache.read(codes)
        # Items of equal key share a place: `first` is the item that stands for each place [n].
        keys, first, places = np.unique(keys[good], return_index=True, return_inverse=True)
        first = np.flatnonzero(good)[first]
        place = np.full(len(codes), -1, np.int64)  # of each item
        place[good] = places
        pv, clicks = (_places(column, codes, place) for column in (pv, clicks))
        return Batch(
            step=step,
            images=self._augment(squares, first, step),
            keys=torch.from_numpy(keys),
            pv=torch.from_numpy(pv),
            clicked=torch.from_numpy(clicked & (pv >= 0)),
            clicks=torch.from_numpy(valid_first(clicks)),
            titles=None if self._titles is None else _texts(self._titles, codes[first]),
            bad_images=int((~good).sum()),
        )

    def _augment(self, squares: Pixels, chosen: Codes, step: int) -> Tensor:
        """Turns the `chosen` of squares uint8 [m, 3, R, R] into views [views, n, 3, S, S]."""
        rng = np.random.default_rng([self._seed, _PIXELS, step, self._rank])
        views = np.empty((self._views, len(chosen), 3, self._size, self._size), np.uint8)
        for view in views:
            # In pieces, so that there are no further copies of all pixels, which may be gigabytes.
            for start in range(0, len(chosen), _PIECE):
                piece = slice(start, start + _PIECE)
                view[piece] = self._view(squares[chosen[piece]], rng)
        return torch.from_numpy(views)

    def _view(self, squares: Pixels, rng: np.random.Generator) -> Pixels:
        if self._augmentation == "simclr":
            return simclr_view(squares, self._size, seed=int(rng.integers(2**63)))
        if self._augmentation == "crop":
            return random_crop(squares, self._size, rng)
        return centre_crop(squares, self._size)


def _places(items: Codes, codes: Codes, place: Codes) -> Codes:
    """Turns item codes into places of their images, both padded with -1; `codes` are sorted."""
    at = np.searchsorted(codes, items)  # 0 for padding
    return np.where(items >= 0, np.append(place, -1)[at], -1)


def valid_first(places: Codes) -> Codes:
    """Moves the masked places of int64 [rows, n] to the end of each row, the order else kept."""
    order = np.argsort(places < 0, axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


def _texts(column: pa.ChunkedArray, codes: Codes) -> list[str]:
    return pc.fill_null(column.take(pa.array(codes)), "").to_pylist()


def batches(dataset: RowBatches, first_step: int, last_step: int, workers: int) -> Iterator[Batch]:
    """Yields the batches of the steps `first_step` <= step < `last_step`, in order.

    They are made by `workers` processes, or in this one for 0. An error of a worker is raised here,
    as the same class. Workers end with the iteration, or with this process, even when it is killed.
    A script that calls this with workers must guard its top level by `if __name__ == "__main__":`,
    since Python imports it once more in each worker.
    """
    several: dict[str, Any] = {}
    if workers:
        atexit.register(_kill_workers)
        several = {
            # Not fork: this process may hold CUDA, NCCL and Arrow threads, whose locks a forked
            # child would inherit in whatever state they are, and might wait on for ever. Not
            # forkserver: its children outlive a killed parent, since their own parent lives on.
            "multiprocessing_context": "spawn",
            "worker_init_fn": _leave_signals_to_the_parent,
            # One batch ready per worker. A batch may have gigabytes of pixels in shared memory,
            # and a second one each does not help: a worker's turn comes once in `workers` steps.
            "prefetch_factor": 1,
        }
    loader = DataLoader(
        _Reporting(dataset),
        batch_size=None,  # the dataset makes whole batches
        sampler=range(first_step, last_step),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **several,
    )
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield found


class _Reporting(Dataset[Batch | Exception]):
    """Returns errors as values, since the DataLoader would put a traceback into their message."""

    def __init__(self, dataset: RowBatches) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self._dataset[step]
        except (CourierError, OSError) as error:
            return error


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ignores Ctrl-C and SIGTERM, which may reach all: the parent finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    """Kills workers: multiprocessing sends SIGTERM, which ours ignore, and then waits for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
