"""Asks the shards of items what rows need to know of theirs, each item once.

That is for catalogues that are too large for a worker's disk; see `item_vectors`. Questions and
answers travel by way of files (`pieces`). Who asks is known by a key, which comes back with the
answers; what is asked goes to the shards of a night's items, known by the key of the night.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from feature_jobs.items.item_vectors import (
    ItemTables,
    ItemVectors,
    answer,
    items_of_answers,
    items_of_shard,
    no_answers,
)
from feature_jobs.store import documents, hashing, worker_notes
from feature_jobs.store.every_shard import check_all_came
from feature_jobs.store.pieces import Piece, read_each, read_pieces, write_pieces

_ANSWERS_AT_ONCE = 64 * 2**20  # bytes of them that a worker holds, and of a file

Asker = tuple[int, ...]
Wanted = Callable[[Asker, Iterable[Any]], Iterator[tuple[str, pa.Array]]]


class Answer(NamedTuple):
    """Is what an item shard of a `night` answers: to how many items, in how many bytes, and where.

    The bytes are those in memory; a piece is compressed. There is none where it knows no item.
    """

    night: str
    asked: int
    sent: int
    told: Piece | None


def ask_for_items(
    rows: beam.PCollection, nights: Mapping[str, ItemTables], wanted: Wanted, staging: str
) -> beam.PCollection:
    """Returns (asker, `Answer`) of all item shards that were asked.

    `rows` are (asker, piece). Of an asker's pieces `wanted` says which distinct item IDs of which
    night are to be asked for.
    """
    return (
        rows
        | "ForItems" >> beam.GroupByKey()
        | "AskForItems" >> beam.ParDo(AskForItems(nights, wanted, staging))
        | "ByItemShard" >> beam.GroupByKey()
        | "AnswerForItems" >> beam.ParDo(AnswerForItems(nights, staging))
    )


def items_told(
    answers: Sequence[Answer], night: str, asked: int, item_id: pa.DataType, labels: Sequence[str]
) -> ItemVectors:
    """Returns what was answered of so many items of a night, with the cluster IDs of `labels`.

    Raises DataContractError where not all of them were answered for.
    """
    mine = [one for one in answers if one.night == night]
    check_all_came("answers of item shards, by items", sum(one.asked for one in mine), asked)
    told = [one.told for one in mine if one.told]
    return items_of_answers(read_pieces(told, no_answers(item_id, labels)))


class AskForItems(beam.DoFn):
    """Turns an asker's pieces into what it asks of the item shards.

    What comes out is ((key of the night, item shard), (asker, piece of item IDs)).
    """

    def __init__(self, nights: Mapping[str, ItemTables], wanted: Wanted, staging: str):
        self._shards = {night: items.shards for night, items in nights.items()}
        self._wanted, self.staging = wanted, staging

    @worker_notes.refusing
    def process(
        self, element: tuple[Asker, Iterable[Any]]
    ) -> Iterator[tuple[tuple[str, int], tuple[Asker, Piece]]]:
        asker, pieces = element
        for night, ids in self._wanted(asker, pieces):
            shards = hashing.shard_of(hashing.hash_ids(ids), self._shards[night])
            path = _path(self.staging, "asked", *asker, night)
            for shard, piece in write_pieces(path, pa.table({"item_id": ids}), shards):
                yield (night, shard), (asker, piece)


class AnswerForItems(beam.DoFn):
    """Answers what all that ask want to know of an item shard of a night: (asker, `Answer`)."""

    def __init__(self, nights: Mapping[str, ItemTables], staging: str):
        self._nights, self.staging = nights, staging

    @worker_notes.refusing
    def process(
        self, element: tuple[tuple[str, int], Iterable[tuple[Asker, Piece]]]
    ) -> Iterator[tuple[Asker, Answer]]:
        (night, shard), given = element
        questions = sorted(given)  # so that files are the same where this is tried again
        found, matrix = items_of_shard(self._nights[night], shard)
        answers, size = list[tuple[Asker, int, pa.Table]](), 0
        asked = read_each([piece for _, piece in questions])
        for (asker, _), wanted in zip(questions, asked, strict=True):
            rows = answer(wanted["item_id"], found, matrix)
            answers.append((asker, len(wanted), rows))
            size += rows.nbytes
            if size >= _ANSWERS_AT_ONCE:
                yield from self._hand_on(night, shard, answers)
                answers, size = [], 0
        if answers:
            yield from self._hand_on(night, shard, answers)

    def _hand_on(
        self, night: str, shard: int, answers: Sequence[tuple[Asker, int, pa.Table]]
    ) -> Iterator[tuple[Asker, Answer]]:
        """Writes some answers to one file."""
        told = [rows for *_, rows in answers]
        place = np.arange(len(told)).repeat([len(rows) for rows in told])
        path = _path(self.staging, "answered", night, shard)
        pieces = dict(write_pieces(path, pa.concat_tables(told), place))
        for at, (asker, asked, rows) in enumerate(answers):
            yield asker, Answer(night, asked, rows.nbytes, pieces.get(at))


def _path(staging: str, what: str, *key: object) -> str:
    return os.path.join(staging, "pieces", f"{what}-{documents.digest(key)[:16]}")
