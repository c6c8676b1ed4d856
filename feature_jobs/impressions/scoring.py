"""Makes columns of rows, an item and a history each: scores, and what follows of them and of items.

Whose rows these are, impressions of a night's log or samples of a training set, and how their
histories came about is for the caller to say. What a row gets follows from its item, its history
and what is known of the items alone, never from the rows beside it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.impressions.scores import mean_scores, sim_scores, simtier
from feature_jobs.items.item_vectors import FoundItems, ItemVectors
from feature_jobs.store import arrays

_BLOCK_ROWS = 4096  # scored at once
_ITEM_IDS = "history_item_ids"


@dataclass(frozen=True)
class ScoreForm:
    """Says what is made of a row: scores of the first `length` places of its history.

    `columns` are those made on request.
    """

    length: int
    columns: tuple[str, ...] = ()


class Coded(NamedTuple):
    """Holds rows as codes into distinct `item_ids`.

    These are `shown` int32 [n], `histories` int32 [h, L] with -1 = none, and which of these each
    row has, `history_of` int64 [n], ascending.
    """

    item_ids: pa.Array
    shown: np.ndarray
    histories: np.ndarray
    history_of: np.ndarray


@dataclass(frozen=True)
class Scored:
    """Holds what was made of rows, in their order: numbers by column, [n] or [n, m] each.

    `coded` are the rows themselves, and `found` what is known of their distinct items.
    """

    form: ScoreForm
    columns: dict[str, np.ndarray]
    coded: Coded
    found: FoundItems

    def arrow(self, at: np.ndarray | slice = slice(None)) -> dict[str, pa.Array]:
        """Returns all columns that the form asks for by name, of all rows or of those `at` [m]."""
        made = {name: _column(values[at]) for name, values in self.columns.items()}
        if _ITEM_IDS in self.form.columns:
            made[_ITEM_IDS] = self._item_ids(at)
        return made

    def _item_ids(self, at: np.ndarray | slice) -> pa.Array:
        past = self.coded.histories[self.coded.history_of[at]]
        flat = self.coded.item_ids.take(pa.array(past[past >= 0]))
        return arrays.list_array((past >= 0).sum(axis=1), flat)


def score_rows(rows: pa.Table, items: ItemVectors, form: ScoreForm) -> Scored:
    """Scores `rows` [n], whose `item_id` stands beside a `history`, item IDs newest first.

    A history is null where it is that of the row before; the fewer others there are, the less is
    read. Raises ValueError where the first one is null.
    """
    coded = _coded(rows, form.length)
    found = items.look_up(coded.item_ids)
    return Scored(form, _score(items.vectors, found, coded), coded, found)


def unfolded(history: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Returns the lists of a folded column, and which of them each row has: int64 [n], ascending.

    Raises ValueError where the first row's is null.
    """
    lists = history.combine_chunks()
    place = lists.is_valid().to_numpy(zero_copy_only=False).cumsum() - 1
    if len(place) and place[0] < 0:
        raise ValueError("the first of some rows has no row before it whose history it could have")
    return lists.drop_null(), place


def _coded(rows: pa.Table, length: int) -> Coded:
    lists, place = unfolded(rows["history"])
    # Rows that came from afar may be neighbours now, with equal histories at several places.
    new = arrays.differ_from_before(lists)
    lists = lists.filter(pa.array(new))
    both = pa.concat_arrays([rows["item_id"].combine_chunks(), lists.flatten()])
    encoded = pc.dictionary_encode(both)
    codes = encoded.indices.to_numpy()
    shown, clicked = codes[: len(rows)], codes[len(rows) :]
    histories = arrays.padded_codes(lists, clicked, length)
    return Coded(encoded.dictionary, shown, histories, (np.cumsum(new) - 1)[place])


def _score(vectors: np.ndarray, found: FoundItems, coded: Coded) -> dict[str, np.ndarray]:
    """Returns the columns that are made of scores, [n, ...] each, block by block."""
    n = len(coded.shown)
    made: dict[str, np.ndarray] = {}
    vector, cluster = np.append(found.vector, -1), np.append(found.cluster, 0)  # at -1: none
    for at in range(0, max(1, n), _BLOCK_ROWS):
        rows = slice(at, at + _BLOCK_ROWS)
        items, of = coded.shown[rows], coded.history_of[rows]
        first, end = (of[0], of[-1] + 1) if n else (0, 0)
        block = _score_block(
            vectors, vector, cluster, items, coded.histories[first:end], of - first
        )
        made = made or {k: np.empty((n, *v.shape[1:]), v.dtype) for k, v in block.items()}
        for name, values in block.items():
            made[name][rows] = values
    return made


def _score_block(
    vectors: np.ndarray,
    vector: np.ndarray,
    cluster: np.ndarray,
    items: np.ndarray,
    past: np.ndarray,
    of: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns the columns that are made of scores of a block, [b, ...] each.

    Its `items` [b] have the histories `past` [h, L] `of` [b]; they are codes, of which `vector` and
    `cluster` tell the row of `vectors` and the cluster ID.
    """
    scores, mask = sim_scores(vectors, vector[items], vector[past], of)
    known = mask.sum(axis=1, dtype=np.int32)
    largest = np.where(mask, scores, -np.inf).max(axis=1, initial=-np.inf)
    own = cluster[items]
    same = cluster[past][of] == np.where(own > 0, own, -1)[:, None]
    return {
        "sim_scores": scores,
        "sim_mask": mask,
        "history_len": (past >= 0).sum(axis=1, dtype=np.int32)[of],
        "sim_known": known,
        "sim_max": np.where(known > 0, largest, 0.0).astype(np.float32),
        "sim_mean": mean_scores(scores, known),
        "simtier": simtier(scores, mask),
        "same_cluster": np.count_nonzero(same, axis=1).astype(np.int32),
    }


def _column(values: np.ndarray) -> pa.Array:
    """Returns a column of numbers [n], or of lists of numbers [n, m]."""
    kind = pa.from_numpy_dtype(values.dtype)
    return arrays.list_column(values, pa.list_(kind)) if values.ndim == 2 else pa.array(values)
