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

from feature_jobs.impressions.scores import (
    mean_scores,
    sim_buckets,
    sim_scores,
    simtier,
    top_positions,
)
from feature_jobs.items.item_vectors import FoundItems, ItemVectors
from feature_jobs.schemas import (
    HISTORY_ITEM_IDS,
    MAIN,
    SAME_CLUSTER,
    SIM_BUCKET,
    TOP_POSITIONS,
    Tiers,
    resolution_of,
)
from feature_jobs.store import arrays

_BLOCK_ROWS = 4096  # scored at once


@dataclass(frozen=True)
class ScoreForm:
    """Says what is made of a row: scores of the first `length` places of its history.

    `columns` are those made on request: history_item_ids and what `score_field` knows. `tiers` are
    those of simtier and sim_bucket, and `top_k` of top_positions.
    """

    length: int
    columns: tuple[str, ...] = ()
    tiers: Tiers = "courier"
    top_k: int = 10

    @property
    def limits(self) -> dict[str, int]:
        """Returns what `laws.check` must know of it: how long lists are."""
        return {"sim_scores": self.length, TOP_POSITIONS: self.top_k}

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns the resolutions besides the main one whose cluster IDs are needed."""
        return tuple(
            sorted({label for name in self.columns if (label := resolution_of(name))} - {MAIN})
        )


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
        if HISTORY_ITEM_IDS in self.form.columns:
            made[HISTORY_ITEM_IDS] = self._item_ids(at)
        return made

    def _item_ids(self, at: np.ndarray | slice) -> pa.Array:
        past = self.coded.histories[self.coded.history_of[at]]
        flat = self.coded.item_ids.take(pa.array(past[past >= 0]))
        return arrays.list_array((past >= 0).sum(axis=1), flat)


def score_rows(rows: pa.Table, items: ItemVectors, form: ScoreForm) -> Scored:
    """Scores `rows` [n], whose `item_id` stands beside a `history`, item IDs newest first.

    A history is null where it is that of the row before; the fewer others there are, the less is
    read. `items` have the cluster IDs of `form.labels`. Raises ValueError where the first history
    is null.
    """
    coded = _coded(rows, form.length)
    found = items.look_up(coded.item_ids)
    return Scored(form, _score(items.vectors, found, coded, form), coded, found)


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


def _score(
    vectors: np.ndarray, found: FoundItems, coded: Coded, form: ScoreForm
) -> dict[str, np.ndarray]:
    """Returns the columns that are made of numbers, [n, ...] each, block by block."""
    n, items = len(coded.shown), found.and_none()
    made: dict[str, np.ndarray] = {}
    for at in range(0, max(1, n), _BLOCK_ROWS):
        rows = slice(at, at + _BLOCK_ROWS)
        of = coded.history_of[rows]
        first, end = (of[0], of[-1] + 1) if n else (0, 0)
        block = _Block(items, coded.shown[rows], coded.histories[first:end], of - first)
        columns = _columns_of(block, vectors, form)
        made = made or {k: np.empty((n, *v.shape[1:]), v.dtype) for k, v in columns.items()}
        for name, values in columns.items():
            made[name][rows] = values
    return made


class _Block(NamedTuple):
    """Holds some rows, whose items `shown` [b] have the histories `past` [h, L] `of` [b].

    They are codes, which tell the places of what is known of `items`; -1 is no item.
    """

    items: FoundItems
    shown: np.ndarray
    past: np.ndarray
    of: np.ndarray


def _columns_of(block: _Block, vectors: np.ndarray, form: ScoreForm) -> dict[str, np.ndarray]:
    """Returns the columns that are made of numbers of a block, [b, ...] each."""
    items, shown, past, of = block
    scores, mask = sim_scores(vectors, items.vector[shown], items.vector[past], of)
    known = mask.sum(axis=1, dtype=np.int32)
    largest = np.where(mask, scores, -np.inf).max(axis=1, initial=-np.inf)
    return {
        "sim_scores": scores,
        "sim_mask": mask,
        "history_len": (past >= 0).sum(axis=1, dtype=np.int32)[of],
        "sim_known": known,
        "sim_max": np.where(known > 0, largest, 0.0).astype(np.float32),
        "sim_mean": mean_scores(scores, known),
        "simtier": simtier(scores, mask, form.tiers),
        "same_cluster": _same_cluster(block, MAIN),
        **_on_request(block, scores, mask, form),
    }


def _same_cluster(block: _Block, label: str) -> np.ndarray:
    """Counts the history items whose cluster ID is that of the row's item; int32 [b]."""
    cluster = block.items.clusters(label)
    own = cluster[block.shown]
    same = cluster[block.past][block.of] == np.where(own > 0, own, -1)[:, None]
    return np.count_nonzero(same, axis=1).astype(np.int32)


def _on_request(
    block: _Block, scores: np.ndarray, mask: np.ndarray, form: ScoreForm
) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for name in form.columns:
        label = resolution_of(name)
        if name == SIM_BUCKET:
            made[name] = sim_buckets(scores, mask, form.tiers)
        elif name == TOP_POSITIONS:
            made[name] = top_positions(scores, mask, form.top_k)
        elif label and name.startswith(SAME_CLUSTER):
            made[name] = _same_cluster(block, label)
        elif label:
            made[name] = block.items.clusters(label)[block.past][block.of]
    return made


def _column(values: np.ndarray) -> pa.Array:
    """Returns a column of numbers [n], or of lists of numbers [n, m]."""
    kind = pa.from_numpy_dtype(values.dtype)
    return arrays.list_column(values, pa.list_(kind)) if values.ndim == 2 else pa.array(values)
