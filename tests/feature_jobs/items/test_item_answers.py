"""Every asker gets what the item shards know of its items, and nobody's answer is missed."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.items import item_answers
from feature_jobs.items.item_answers import (
    Answer,
    AnswerForItems,
    Asker,
    AskForItems,
    items_told,
)
from feature_jobs.items.item_vectors import ItemTables
from feature_jobs.schemas import DataContractError
from feature_jobs.store import hashing, partitions
from feature_jobs.store.pieces import Piece
from tests.support.codebooks import unit_rows

ITEMS, SHARDS = 400, 4
NIGHTS = {
    name: ItemTables(
        partitions.Partition("", {"files": [{"name": str(n)} for n in range(SHARDS)]}),
        partitions.Partition("", {"files": []}), None, False, 256,
    )
    for name in ("monday", "tuesday")
}  # fmt: skip
VECTORS = unit_rows(ITEMS)


def shard_of_items(tables: ItemTables, shard: int) -> tuple[pa.Table, np.ndarray]:
    """Stands in for the tables: item n has cluster n, or n + 1000 on Tuesday; each fifth no image.

    Items from 300 on are not there on Tuesday.
    """
    is_tuesday = tables is NIGHTS["tuesday"]
    ids = np.arange(300 if is_tuesday else ITEMS)
    ids = ids[hashing.shard_of(hashing.hash_ids(pa.array(ids)), SHARDS) == shard]
    scores = ids % 5 > 0
    row = np.where(scores, np.cumsum(scores) - 1, -1)
    clusters = pa.array(ids + 1000 * is_tuesday, pa.int32())
    none = pa.array(np.zeros(len(ids), np.int32))
    columns = {"item_id": ids, "cluster_id": clusters, "old_cluster_id": none, "row": row}
    return pa.table(columns), VECTORS[ids[scores]]


def wanted_of(asker: Asker, pieces: Iterable[Any]) -> Iterator[tuple[str, pa.Array]]:
    for night, first, count in pieces:
        yield night, pa.array(np.arange(first, first + count))


def ask(questions: dict[Asker, list[tuple[str, int, int]]], staging: Path) -> dict[Asker, list]:
    """Runs both steps by hand; returns the answers that each asker gets."""
    asked: dict[tuple[str, int], list[tuple[Asker, Piece]]] = {}
    step = AskForItems(NIGHTS, wanted_of, str(staging))
    for question in questions.items():
        for key, piece in step.process(question):
            asked.setdefault(key, []).append(piece)
    answers: dict[Asker, list[Answer]] = {asker: [] for asker in questions}
    for element in asked.items():
        for asker, answer in AnswerForItems(NIGHTS, str(staging)).process(element):
            answers[asker].append(answer)
    return answers


@pytest.fixture(autouse=True)
def _shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_answers, "items_of_shard", shard_of_items)


QUESTIONS: dict[Asker, list[tuple[str, int, int]]] = {
    (0, 0): [("monday", 0, 50), ("tuesday", 280, 40)],
    (0, 1): [("tuesday", 0, 7)],
    (1, 0): [("monday", 390, 30)],
    (1, 1): [("monday", 5000, 3)],
}


@pytest.mark.parametrize("at_once", [1, 10_000, 2**30])
def test_each_asker_is_told_of_its_items_of_each_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(item_answers, "_ANSWERS_AT_ONCE", at_once)
    answers = ask(QUESTIONS, tmp_path)
    for asker, questions in QUESTIONS.items():
        for night, first, count in questions:
            ids = np.arange(first, first + count)
            found = items_told(answers[asker], night, count, pa.int64(), ())
            told = found.look_up(pa.array(ids))
            known = ids < (ITEMS if night == "monday" else 300)
            assert told.known.tolist() == known.tolist()
            assert (told.cluster[known] == ids[known] + 1000 * (night == "tuesday")).all()
            scores = known & (ids % 5 > 0)
            assert ((told.vector >= 0) == scores).all()
            mine = found.vectors[told.vector[scores]].reshape(-1, VECTORS.shape[1])
            np.testing.assert_array_equal(mine, VECTORS[ids[scores]])
    files = len(list(tmp_path.rglob("answered-*")))
    assert files == {1: 15, 10_000: 11, 2**30: 8}[at_once]


def test_an_answer_that_did_not_come_is_missed(tmp_path: Path) -> None:
    (answers,) = ask({(0, 0): [("monday", 0, 50)]}, tmp_path).values()
    with pytest.raises(DataContractError, match="answers of item shards, by items"):
        items_told(answers[1:], "monday", 50, pa.int64(), ())
    with pytest.raises(DataContractError, match="answers of item shards, by items"):
        items_told([*answers, answers[0]], "monday", 50, pa.int64(), ())


def test_what_beam_carries_does_not_grow_with_the_items(tmp_path: Path) -> None:
    sizes = []
    for count in (10, 400):
        (answers,) = ask({(0, 0): [("monday", 0, count)]}, tmp_path / str(count)).values()
        sizes.append(max(len(repr(tuple(answer))) for answer in answers))
        assert sum(answer.sent for answer in answers) > count * 4 * 256 // 2
    assert sizes[1] < sizes[0] + 10
