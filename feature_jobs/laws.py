"""Checks what must hold of each published table (DESIGN §3), on the rows of one part.

A table's law is one pure function of rows in memory. It yields what can be wrong, each time with
the rows of which it is true; `check` raises for the first of them. Parts are checked when they are
written, so that nothing downstream has to ask.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.schemas import (
    EMBEDDING_DIM,
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    MAIN,
    RECENT_CLICKS,
    ROW_CLICKS,
    ROW_PVS,
    SIM_TIERS,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
    Table,
    cluster_column,
)

_UNIT_ERROR = 2e-3  # of a squared length
_MEAN_ERROR = 1e-6  # of rounding

Most = Mapping[str, int]
Breaches = Iterator[tuple[str, np.ndarray]]


def check(table: Table, rows: pa.Table, most: Most | None = None) -> None:
    """Raises DataContractError where `rows` break the law of `table`.

    `most` says how large the values of a column may be, or how long its lists.
    """
    law = LAWS[table.name]
    for laid_down in (_in_order(table, rows), law(rows, most or {})):
        for what, where in laid_down:
            bad = np.flatnonzero(where)
            if len(bad):
                key = "a row" if table.key == "user_id" else rows[table.key][int(bad[0])]
                raise DataContractError(
                    f"{table.name} breaks its law: {what}, in {len(bad):,} of {len(rows):,} rows "
                    f"of a part, for example at {table.key} {key}. Whoever joins the table counts "
                    "on it. This is a fault of COURIER: please report it."
                )


def check_unit(points: np.ndarray, ids: pa.ChunkedArray) -> None:
    """Raises DataContractError where `points` float32 [n, 256] are not finite unit vectors.

    The points are those of the items `ids` [n].
    """
    bad = np.flatnonzero(_not_unit(points))
    if len(bad):
        raise DataContractError(
            f"item_embeddings holds {len(bad):,} rows whose embedding is no finite unit vector of "
            f"{EMBEDDING_DIM} floats, for example that of item_id {ids[int(bad[0])]}. Distances to "
            "it mean nothing, and its cluster ID would be arbitrary. Run `courier embed --full` "
            "for this ds."
        )


# ---- The laws --------------------------------------------------------------------------------


def _clicks_of_users(rows: pa.Table, most: Most) -> Breaches:
    """States the law of user_histories and recent_clicks: aligned lists, newest first."""
    items, times = _lists(rows["item_ids"]), _lists(rows["click_times"])
    yield "a user has no click", items.sizes == 0
    yield "item_ids and click_times are not aligned", items.sizes != times.sizes
    yield "item_ids are more than history_len", items.sizes > most.get("item_ids", np.inf)
    yield "there is a null in a list", items.have(items.is_null()) | times.have(times.is_null())
    yield "click_times are not newest first", times.rise(times.values.cast(pa.int64()).to_numpy())


def _training_rows(rows: pa.Table, _: Most) -> Breaches:
    pvs, labels = _lists(rows["pv_item_ids"]), _lists(rows["pv_clicked"])
    clicks = _lists(rows["click_item_ids"])
    yield "pv_item_ids and pv_clicked are not aligned", pvs.sizes != labels.sizes
    yield f"pv_item_ids are not 1 to {ROW_PVS}", (pvs.sizes < 1) | (pvs.sizes > ROW_PVS)
    yield f"click_item_ids are more than {ROW_CLICKS}", clicks.sizes > ROW_CLICKS
    nulls = (found.have(found.is_null()) for found in (pvs, labels, clicks))
    yield "there is a null in a list", np.logical_or.reduce(list(nulls))
    yield "clicked items do not come first", labels.rise(_numbers(labels.values).astype(np.int8))
    yield "a chunk is below 0", _numbers(rows["chunk"]) < 0


def _item_embeddings(rows: pa.Table, _: Most) -> Breaches:
    vectors = _lists(rows["embedding"])
    yield f"an embedding has not {EMBEDDING_DIM} floats", vectors.sizes != EMBEDDING_DIM
    yield "an embedding is no finite unit vector", _not_unit(vectors.matrix(EMBEDDING_DIM))
    left = _numbers(pc.is_valid(rows["left_catalogue_ds"]))
    yield "left_catalogue_ds and in_catalogue disagree", left == _numbers(rows["in_catalogue"])
    yield "an image_size is below 0", _numbers(rows["image_size"]) < 0


def _item_rejects(rows: pa.Table, _: Most) -> Breaches:
    stages = pa.array(["read", "decode"], rows["stage"].type)
    yield "a stage is neither read nor decode", ~_numbers(pc.is_in(rows["stage"], stages))
    yield "attempts are fewer than one", _numbers(rows["attempts"]) < 1
    first, last, next_ds = (
        _numbers(rows[name].cast(pa.int32())) for name in ("first_ds", "last_ds", "next_ds")
    )
    yield "first_ds, last_ds and next_ds are not in order", (first > last) | (last >= next_ds)


def _item_features(rows: pa.Table, most: Most) -> Breaches:
    has_feature = _numbers(rows["has_image"]) & _numbers(rows["in_scope"])
    for name in rows.column_names:
        if name == cluster_column(MAIN) or name.startswith(cluster_column("")):
            ids = _numbers(rows[name])
            yield f"{name} is out of range", (ids < 0) | (ids > most.get(name, np.inf))
            yield f"{name} is not where an item has a feature", (ids > 0) != has_feature
    distance = _numbers(rows["centre_distance"])
    yield "a centre_distance is below 0 or not finite", ~(np.isfinite(distance) & (distance >= 0))
    yield "an item without a feature has a centre_distance", (distance != 0) & ~has_feature
    if "second_distance" in rows.column_names:
        second = _numbers(rows["second_distance"])
        nearer = ~(second >= distance) & (second != 0)
        yield "a second_distance is below centre_distance", nearer | np.isinf(second)
    if "embedding" in rows.column_names:
        vectors = _lists(rows["embedding"])
        yield f"an embedding has not {EMBEDDING_DIM} floats", vectors.sizes != EMBEDDING_DIM
        points = vectors.matrix(EMBEDDING_DIM)
        yield "an embedding is no finite unit vector", _not_unit(points) & has_feature
        yield "an item without a feature has an embedding", points.any(axis=1) & ~has_feature


def _user_simscores(rows: pa.Table, most: Most) -> Breaches:
    scores, masks, tiers = (_lists(rows[name]) for name in ("sim_scores", "sim_mask", "simtier"))
    length = most.get("sim_scores", int(scores.sizes[0]) if len(rows) else 0)
    yield "sim_scores are not history_len long", scores.sizes != length
    yield "sim_mask is not aligned with sim_scores", masks.sizes != length
    yield f"simtier has not {SIM_TIERS} tiers", tiers.sizes != SIM_TIERS
    score, mask, tier = scores.matrix(length), masks.matrix(length), tiers.matrix(SIM_TIERS)
    real, (past, known, largest, mean, same) = (
        mask == 1,
        (
            _numbers(rows[name])
            for name in ("history_len", "sim_known", "sim_max", "sim_mean", "same_cluster")
        ),
    )
    yield "a sim_mask is neither 0 nor 1", ((mask != 0) & ~real).any(axis=1)
    yield "a score is out of -1 to 1 or not finite", ~(np.abs(score) <= 1).all(axis=1)
    yield "a score is not 0 where it is masked", ((score != 0) & ~real).any(axis=1)
    yield "history_len is out of range", (past < 0) | (past > length)
    yield "a place after the history is real", (real & (np.arange(length) >= past[:, None])).any(1)
    yield "sim_known is not the number of real scores", known != real.sum(axis=1)
    yield "simtier does not add up to sim_known", (tier.sum(1) != known) | (tier < 0).any(axis=1)
    best = np.where(real, score, -np.inf).max(axis=1, initial=-np.inf)
    yield "sim_max is not the largest real score", largest != np.where(known > 0, best, 0)
    yield (
        "sim_mean is larger than sim_max, or not 0 without a score",
        ~(np.where(known > 0, mean <= largest + _MEAN_ERROR, mean == 0)),
    )
    yield "same_cluster is out of range", (same < 0) | (same > past)
    if "history_item_ids" in rows.column_names:
        items = _lists(rows["history_item_ids"])
        yield "history_item_ids are not history_len long", items.sizes != past


LAWS: dict[str, Callable[[pa.Table, Most], Breaches]] = {
    USER_HISTORIES.name: _clicks_of_users,
    RECENT_CLICKS.name: _clicks_of_users,
    TRAINING_ROWS.name: _training_rows,
    ITEM_EMBEDDINGS.name: _item_embeddings,
    ITEM_REJECTS.name: _item_rejects,
    ITEM_FEATURES.name: _item_features,
    USER_SIMSCORES.name: _user_simscores,
}


# ---- What laws are made of --------------------------------------------------------------------


def _in_order(table: Table, rows: pa.Table) -> Breaches:
    """States that rows ascend by the table's key, which is unique."""
    equal, falls = np.ones(max(0, len(rows) - 1), bool), np.zeros(len(rows), bool)
    for name in (table.key, *table.then_by):
        column = rows[name]
        before, after = column[:-1], column[1:]
        falls[1:] |= equal & _numbers(pc.greater(before, after))
        equal &= _numbers(pc.equal(before, after))
    key = ", ".join((table.key, *table.then_by))
    yield f"rows are not in the order of {key}", falls
    yield f"{key} is not unique", np.append(np.zeros(min(1, len(rows)), bool), equal)


class _Lists(NamedTuple):
    """Holds a list column: the `sizes` int64 [n] of its lists, and their values one by one."""

    sizes: np.ndarray
    values: pa.Array

    def is_null(self) -> np.ndarray:
        return _numbers(self.values.is_null())

    def have(self, bad: np.ndarray) -> np.ndarray:
        """Tells which lists have a value that is `bad`, bool [values]; bool [n]."""
        if not bad.any():
            return np.zeros(len(self.sizes), bool)
        row = np.arange(len(self.sizes)).repeat(self.sizes)
        return np.bincount(row[bad], minlength=len(self.sizes)) > 0

    def rise(self, values: np.ndarray) -> np.ndarray:
        """Tells in which lists a value is larger than the one before it; bool [n]."""
        larger = np.diff(values, prepend=values[:1]) > 0
        starts = (np.cumsum(self.sizes) - self.sizes)[self.sizes > 0]
        larger[starts] = False
        return self.have(larger)

    def matrix(self, width: int) -> np.ndarray:
        """Returns the values of lists that are all `width` long; [n, width]."""
        return _numbers(self.values).reshape(len(self.sizes), width)


def _lists(column: pa.ChunkedArray) -> _Lists:
    lists = column.combine_chunks()
    return _Lists(_numbers(pc.list_value_length(lists)), lists.flatten())


def _numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = column.to_numpy(zero_copy_only=False)
    return found


def _not_unit(points: np.ndarray) -> np.ndarray:
    """Tells which of `points` [n, 256] are no finite unit vectors; bool [n]."""
    square = np.einsum("nd,nd->n", points, points)
    return ~(np.abs(square - 1) < _UNIT_ERROR)  # written so that NaN counts
