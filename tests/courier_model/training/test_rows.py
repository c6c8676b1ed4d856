"""Batches show every image once and nothing undecodable, and are the same whoever makes them."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from courier_model.images import Preprocessing, decode
from courier_model.training.image_cache import ImageCache
from courier_model.training.rows import (
    Batch,
    RowBatches,
    TrainingSet,
    batches,
    build_sets,
)
from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import files
from tests.support.world import picture

SMALL = Preprocessing(32, 36, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ITEMS = 12
REPOST = 7  # has the bytes of item 2
MISSING, BROKEN, NO_URI, UNKNOWN = 8, 9, 10, 11
INT64 = pa.int64()
BAD = {MISSING, BROKEN, NO_URI, UNKNOWN}


def training_rows(rows: list[dict[str, Any]], ids: pa.DataType = INT64) -> pa.Table:
    """Makes the table `training_rows` of rows of `pv` (item → clicked), `clicks` and `user`."""
    labels = [list(row["pv"].values()) for row in rows]
    return pa.table(
        {
            "user_id": pa.array([row.get("user", 1) for row in rows], pa.int64()),
            "request_id": pa.array([f"r{n}" for n in range(len(rows))]),
            "chunk": pa.array([0] * len(rows), pa.int32()),
            "event_time": pa.array([7] * len(rows), pa.timestamp("us", "UTC")),
            "pv_item_ids": pa.array([list(row["pv"]) for row in rows], pa.list_(ids)),
            "pv_clicked": pa.array(labels, pa.list_(pa.bool_())),
            "click_item_ids": pa.array([row["clicks"] for row in rows], pa.list_(ids)),
        }
    )


def random_rows(count: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        pv = rng.permutation(ITEMS)[: rng.integers(1, 6)].tolist()
        clicks = rng.permutation(ITEMS)[: rng.integers(0, 6)].tolist()
        labels = (rng.random(len(pv)) < 0.4).tolist()
        pvs = dict(zip(pv, labels, strict=True))
        rows.append({"pv": pvs, "clicks": clicks, "user": int(rng.integers(5))})
    return training_rows(rows)


CATALOGUE = pa.table(
    {
        "item_id": pa.array([30, *range(UNKNOWN)][::-1]),  # 30 occurs in no row
        "image_uri": [None if n == NO_URI else f"{n}.png" for n in (30, *range(UNKNOWN))][::-1],
        "title": [None if n == 3 else f"title {n}" for n in (30, *range(UNKNOWN))][::-1],
    }
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    for number in range(REPOST):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / f"{REPOST}.png").write_bytes(picture(2))
    (folder / f"{BROKEN}.png").write_bytes(picture(BROKEN)[:99])
    return str(folder)


@pytest.fixture(scope="module")
def rows() -> TrainingSet:
    (found,) = build_sets([random_rows(50)], CATALOGUE)
    assert found.items["item_id"].to_pylist() == list(range(ITEMS))  # so that code = item ID
    return found


@pytest.fixture(scope="module")
def cache(root: str, rows: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> ImageCache:
    folder = tmp_path_factory.mktemp("cache")
    return ImageCache(str(folder), rows.items["image_uri"], [root], SMALL)


def make(rows: TrainingSet, cache: ImageCache, **changes: Any) -> RowBatches:
    settings = {"views": 1, "augmentation": "crop", "size": 32, "batch_rows": 8, "seed": 3}
    return RowBatches(rows, cache, **(settings | changes))


def assert_same(found: Batch, expected: Batch) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, name), value), name
        else:
            assert getattr(found, name) == value, name


# ---- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [pa.int64(), pa.string()])
def test_rows_become_codes_of_one_table_of_items(ids: pa.DataType) -> None:
    def name(number: int) -> Any:
        return f"item-{number:02}" if ids == pa.string() else number

    def table(rows: list[tuple[dict[int, bool], list[int], int]]) -> pa.Table:
        return training_rows(
            [
                {"pv": {name(n): y for n, y in pv.items()}, "clicks": [*map(name, c)], "user": u}
                for pv, c, u in rows
            ],
            ids,
        )

    train = table([({5: True, 2: False}, [9, 5], 70), ({}, [], 60)])
    held_out = table([({n: False for n in (4, 3, 2, 1, 0)}, [4], 60)])
    catalogue = pa.table(
        {
            "item_id": pa.array([name(n) for n in (77, 9, 5, 2, 4, 3)], ids),
            "image_uri": ["g.png", "i.png", None, "c.png", "e.png", "d.png"],
            "title": ["G", "I", "F", None, "E", "D"],
        }
    )
    # Chunks of a table must not matter, nor that a table is a slice.
    twice = pa.concat_tables([train, train]).slice(1, 2)
    first, second, third = build_sets([train, held_out, twice], catalogue)
    assert first.items is second.items
    assert first.items.to_pydict() == {
        "item_id": [name(n) for n in (0, 1, 2, 3, 4, 5, 9)],
        "image_uri": [None, None, "c.png", "d.png", "e.png", None, "i.png"],
        "title": [None, None, None, "D", "E", "F", "I"],
    }
    assert first.pv.tolist() == [[5, 2, -1, -1, -1], [-1] * 5]
    assert first.clicked.tolist() == [[True] + [False] * 4, [False] * 5]
    assert first.clicks.tolist() == [[6, 5, -1, -1, -1], [-1] * 5]
    assert first.users.tolist() == [0, 1]
    assert first.moments.tolist() == [7, 7]
    assert second.pv.tolist() == [[4, 3, 2, 1, 0]]
    assert second.users.tolist() == [1]
    assert third.pv.tolist() == first.pv.tolist()[::-1]
    assert third.clicked.tolist() == first.clicked.tolist()[::-1]
    assert {a.dtype for a in (first.pv, first.clicks, first.users)} == {np.dtype(np.int64)}


def test_rows_to_train_on_have_a_clicked_pv_and_an_earlier_click() -> None:
    table = training_rows(
        [
            {"pv": {1: True}, "clicks": [2], "user": 0},
            {"pv": {1: False}, "clicks": [2], "user": 1},
            {"pv": {1: True}, "clicks": [], "user": 2},
            {"pv": {1: False, 3: True}, "clicks": [1, 2], "user": 3},
        ]
    )
    (rows,) = build_sets([table], CATALOGUE)
    assert rows.with_anchor().users.tolist() == [0, 3]
    assert rows.with_history().users.tolist() == [0, 1, 3]
    assert rows.with_anchor().pv.tolist() == rows.pv[[0, 3]].tolist()


def test_rows_that_break_the_contract_are_named() -> None:
    table = training_rows([{"pv": {1: True}, "clicks": []}, {"pv": {1: True}, "clicks": [2] * 6}])
    with pytest.raises(DataContractError, match="click_item_ids: request r1 has 6 entries"):
        build_sets([table], CATALOGUE)
    labels = pa.array([[True], [True, False]])
    table = training_rows([{"pv": {1: True}, "clicks": []}, {"pv": {2: True}, "clicks": []}])
    table = table.set_column(table.schema.get_field_index("pv_clicked"), "pv_clicked", labels)
    with pytest.raises(DataContractError, match="r1 has 1 pv_item_ids but 2 pv_clicked"):
        build_sets([table], CATALOGUE)


# ---- one batch -------------------------------------------------------------------------------


def test_a_batch_shows_each_row_its_images_and_each_image_once(
    rows: TrainingSet, cache: ImageCache
) -> None:
    chosen = np.arange(20)
    batch = make(rows, cache, augmentation="centre", titles=True).load(chosen, step=0)
    assert batch.images.shape == (1, REPOST, 3, 32, 32)  # 7 pictures, however many rows show them
    assert batch.bad_images == len(BAD)
    assert len(set(batch.keys.tolist())) == REPOST
    assert len({image.numpy().tobytes() for image in batch.images[0]}) == REPOST

    def image(item: int) -> np.ndarray:
        return decode(picture(2 if item == REPOST else item), SMALL)

    assert batch.titles is not None
    assert set(batch.titles) == {"" if n == 3 else f"title {n}" for n in range(REPOST)}
    masked = closed_up = 0
    for row in chosen:
        # A masked PV keeps its place; masked clicks leave none.
        for place, item in enumerate(rows.pv[row]):
            found = batch.pv[row, place]
            assert (found < 0) == (item < 0 or item in BAD)
            assert batch.clicked[row, place] == (rows.clicked[row, place] and found >= 0)
            masked += bool(item >= 0 and found < 0 and rows.clicked[row, place])
            if found >= 0:
                np.testing.assert_array_equal(batch.images[0, found], image(item))
                assert batch.titles[found] in {f"title {n}" for n in (item, 2)} | {""}
        good = [item for item in rows.clicks[row] if item >= 0 and item not in BAD]
        closed_up += any(item in BAD for item in rows.clicks[row, :2]) and len(good) > 0
        assert (batch.clicks[row] >= 0).tolist() == [k < len(good) for k in range(5)]
        for found, item in zip(batch.clicks[row], good, strict=False):
            np.testing.assert_array_equal(batch.images[0, found], image(item))
    assert masked  # else the masks were never tried
    assert closed_up


def test_items_of_equal_bytes_share_a_place(rows: TrainingSet, cache: ImageCache) -> None:
    table = training_rows([{"pv": {2: True, REPOST: False}, "clicks": [REPOST, 2, 1]}])
    full = pa.concat_tables([table, random_rows(50)])
    (both,) = build_sets([full], CATALOGUE)
    batch = make(both, cache).load(np.array([0]), step=0)
    assert batch.images.shape[1] == 2
    assert batch.pv[0, 0] == batch.pv[0, 1] == batch.clicks[0, 0] == batch.clicks[0, 1]
    assert batch.clicks[0, 2] not in (batch.clicks[0, 0], -1)


def test_a_batch_without_any_good_image_is_empty_and_no_error(
    rows: TrainingSet, cache: ImageCache
) -> None:
    table = training_rows([{"pv": {MISSING: True}, "clicks": [BROKEN]}])
    (both,) = build_sets([pa.concat_tables([table, random_rows(50)])], CATALOGUE)
    for augmentation in ("crop", "simclr"):
        batch = make(both, cache, views=2, augmentation=augmentation).load(np.array([0]), step=0)
        assert batch.images.shape == (2, 0, 3, 32, 32)
        assert (batch.pv < 0).all()
        assert not batch.clicked.any()
        assert (batch.clicks < 0).all()
        assert batch.bad_images == 2


@pytest.mark.parametrize("augmentation", ["crop", "simclr"])
def test_views_differ_and_so_do_steps(
    augmentation: str, rows: TrainingSet, cache: ImageCache
) -> None:
    dataset = make(rows, cache, views=2, augmentation=augmentation)
    one, again, other = (dataset.load(np.arange(9), step) for step in (0, 0, 1))
    assert_same(again, one)
    assert not torch.equal(one.images[0], one.images[1])
    assert not torch.equal(one.images, other.images)
    assert torch.equal(one.keys, other.keys)


# ---- steps, epochs, ranks, workers -----------------------------------------------------------


def row_keys(batch: Batch) -> list[tuple[Any, ...]]:
    """Returns what each row shows, by content, without regard to the places in `images`."""
    keys = torch.cat([batch.keys, torch.zeros(1, dtype=torch.int64)])
    columns = (keys[batch.pv], batch.clicked, keys[batch.clicks])
    return [tuple(map(tuple, row)) for row in zip(*(c.tolist() for c in columns), strict=True)]


def test_an_epoch_shows_each_row_once_and_the_next_one_in_another_order(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows,) = build_sets([random_rows(50)], CATALOGUE)
    dataset = make(rows, cache)
    assert dataset.steps_per_epoch == 6
    seen: list[list[int]] = []
    monkeypatch.setattr(dataset, "load", lambda chosen, step: seen.append(chosen.tolist()))
    for step in range(12):
        dataset[step]
    epochs = [[row for rows in part for row in rows] for part in (seen[:6], seen[6:])]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 48
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # others are left out
    seen.clear()
    for step in (0, 6):
        dataset[step]
    assert seen == [epochs[0][:8], epochs[1][:8]]  # going back and forth changes nothing


def test_the_slices_of_two_ranks_make_the_joint_batch(rows: TrainingSet, cache: ImageCache) -> None:
    joint = make(rows, cache)
    ranks = [make(rows, cache, rank=rank, world=2) for rank in (0, 1)]
    for step in (0, 5, 6):
        slices = [row_keys(rank[step]) for rank in ranks]
        assert [len(s) for s in slices] == [4, 4]
        assert slices[0] + slices[1] == row_keys(joint[step])


def test_batches_depend_neither_on_workers_nor_on_the_first_step(
    rows: TrainingSet, cache: ImageCache
) -> None:
    dataset = make(rows, cache, views=2, titles=True)
    expected = list(batches(dataset, 0, 9, workers=0))
    assert [batch.step for batch in expected] == list(range(9))
    for first, workers in ((4, 2), (4, 0)):
        found = list(batches(make(rows, cache, views=2, titles=True), first, 9, workers))
        assert len(found) == 9 - first
        for batch, right in zip(found, expected[first:], strict=True):
            assert_same(batch, right)


def test_a_fault_of_the_disk_in_a_worker_stops_the_parent(
    rows: TrainingSet, root: str, tmp_path: Path
) -> None:
    fresh = ImageCache(str(tmp_path / "cache"), rows.items["image_uri"], [root], SMALL)
    (tmp_path / "cache" / "pixels").unlink()
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\]"):
        list(batches(make(rows, fresh), 0, 4, workers=1))


def test_a_fault_of_the_disk_is_no_bad_image(
    rows: TrainingSet, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: str, _limit: int) -> bytes:
        raise OSError(errno.EIO, "the disk is ill")

    monkeypatch.setattr(files, "read_bytes", fail)
    dataset = make(rows, ImageCache(None, rows.items["image_uri"], [root], SMALL))
    with pytest.raises(OSError, match="the disk is ill"):
        dataset[0]


def test_batches_that_cannot_be_made_are_refused(rows: TrainingSet, cache: ImageCache) -> None:
    with pytest.raises(OperatorError, match="50 rows to take batches of 51"):
        make(rows, cache, batch_rows=51)
    with pytest.raises(OperatorError, match="8 rows cannot be shared evenly by 3"):
        make(rows, cache, world=3)
    with pytest.raises(ValueError, match="augmentation"):
        make(rows, cache, augmentation="mixup")


INTERRUPTED = """
import os, pickle, signal, sys
from courier_model.training.rows import batches

if __name__ == "__main__":
    told = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.append(1))
    with open(sys.argv[1], "rb") as file:
        found = iter(batches(pickle.load(file), 0, 9, workers=1))
    steps = [next(found).step]
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)
    steps += [next(found).step for _ in range(5)]
    print(steps, len(told))
    # `found` still lives when Python ends, as it does in the traceback of an error.
"""


def test_workers_outlast_signals_to_the_group_and_do_not_hold_up_the_end(
    rows: TrainingSet, cache: ImageCache, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(INTERRUPTED)
    (tmp_path / "dataset").write_bytes(pickle.dumps(make(rows, cache)))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "dataset")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, text=True, start_new_session=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout == "[0, 1, 2, 3, 4, 5] 2\n"
