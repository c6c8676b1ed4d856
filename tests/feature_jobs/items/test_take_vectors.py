"""TAKE-VECTORS survives kills, lost rows and files that change, and reads no table whole."""

import datetime as dt
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from feature_jobs import inputs
from feature_jobs.items import take_vectors, vector_rows
from feature_jobs.store import partitions
from tests.support.commands import Capture, counts, courier, paragraph, published
from tests.support.ordered_shop import Killed, dying
from tests.support.vector_shop import make_vector_shop, vectors_of_day, write_vectors
from tests.support.world import DAYS, World

D = 32
DAY = DAYS[0]


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_vector_shop(tmp_path / "shop", D, "lists")
    world.rows_per_shard = 2
    return world


def embed(world: World, day: dt.date = DAY, *args: str) -> int:
    return courier(world, "embed", "--ds", str(day), *args)


def parts(world: World) -> dict[str, bytes]:
    return {k: v for k, v in published(world).items() if k.endswith(".parquet")}


def test_killed_anywhere_it_goes_on_and_makes_the_same(world: World) -> None:
    assert embed(world) == 0
    whole = parts(world)
    shutil.rmtree(world.root)
    at, deaths = 3, 0
    while True:
        try:
            with dying(at):
                ended = embed(world)
            break
        except Killed:
            at, deaths = at + 9, deaths + 1
    assert ended == 0
    assert deaths > 4
    assert parts(world) == whole


def test_parts_that_are_made_are_not_made_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = list[str](), partitions.write_part

    def write_part(folder: str, table: Any, *args: Any, **more: Any) -> None:
        if len(made) == 5:
            raise MemoryError("of this worker")
        made.append(table.name)
        real(folder, table, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(partitions, "write_part", write_part)
        with pytest.raises(Exception, match="of this worker"):
            embed(world)
    before, taken = len(made), list[int]()
    made.clear()
    real_day = vector_rows.take_day
    monkeypatch.setattr(vector_rows, "take_day", lambda *args: taken.append(1) or real_day(*args))
    assert embed(world) == 0
    shards = len(list((world.root / "test/item_embeddings" / f"ds={DAY}").glob("*.parquet")))
    assert 0 < before // 2 <= shards - len(taken)


def test_the_number_of_files_and_batches_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(world) == 0
    whole = parts(world)
    write_vectors(world, DAY, list(vectors_of_day(DAY, D).items()), files=5)
    monkeypatch.setattr(take_vectors, "_BATCH_BYTES", 2 * 4 * D)
    sizes, real = list[int](), inputs.read_in_batches

    def read(group: Any, wanted: Any, size: int) -> Any:
        for rows in real(group, wanted, size):
            sizes.append(len(rows))
            yield rows

    monkeypatch.setattr(take_vectors, "read_in_batches", read)
    assert embed(world) == 0
    assert max(sizes) == 2
    assert parts(world) == whole


def test_a_file_that_is_written_while_it_is_read_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = inputs.read_in_batches

    def read(group: Any, wanted: Any, size: int) -> Any:
        yield from real(group, wanted, size)
        if group.path.endswith("1.parquet"):
            pq.write_table(pq.read_table(group.path, partitioning=None), group.path)

    with monkeypatch.context() as patch:
        patch.setattr(take_vectors, "read_in_batches", read)
        assert embed(world) == 1
    assert "1.parquet was written anew, or taken away, while it was read" in paragraph(capsys)
    assert published(world) == {}
    assert embed(world) == 0


def test_vectors_that_a_runner_loses_are_told(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = take_vectors.ReadVectors.process

    def lossy(self: Any, element: Any) -> Any:
        yield from list(real(self, element))[1:]

    with monkeypatch.context() as patch:
        patch.setattr(take_vectors.ReadVectors, "process", lossy)
        assert embed(world) == 1
    assert "vectors_read reached its tables" in paragraph(capsys)
    assert published(world) == {}
    assert embed(world) == 0
    assert counts(world, "item_embeddings", DAY)["vectors_read"] == len(vectors_of_day(DAY, D))
