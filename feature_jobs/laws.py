"""Checks what must hold of each published table (DESIGN §3), on the rows of one part.

A table's law is one pure function of rows in memory. It yields the ways to break it, each with the
rows that do; `check` raises for the first that has any, `breaches` tells them all. Parts are
checked where they are written; how many rows a table has in all is for whoever publishes it. A
partition that is read may have come to harm since: who computes with its embeddings asks
`check_unit`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.schemas import (
    HISTORY_ITEM_IDS,
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    JOINED,
    MAIN,
    MUSE_TIERS,
    RECENT_CLICKS,
    ROW_CLICKS,
    ROW_PVS,
    SAME_CLUSTER,
    SIM_BUCKET,
    SIM_TIERS,
    TOP_POSITIONS,
    TRAINING_ROWS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
    Table,
    cluster_column,
    resolution_of,
    score_field,
)

_UNIT_ERROR = 2e-3  # of a squared length
# sim_mean is a mean of scores rounded to 2^-30, as a float32: of equal ones it may be above them.
_MEAN_ERROR = 1e-6
_OURS = "This is a fault of COURIER: please report it."
_EMBED_ANEW = "Run `courier embed --full` for this ds, and report it if it stays."

Limits = Mapping[str, int]


class Breach(NamedTuple):
    """Is a way to break a law: what is said of the `rows` bool [n] that do, and what helps.

    One that is `fatal` leaves nothing to look at further: lists are not what the rest of the law
    takes them for.
    """

    what: str
    rows: np.ndarray
    remedy: str = _OURS
    fatal: bool = False


Breaches = Iterator[Breach]


def check(table: Table, rows: pa.Table, limits: Limits | None = None) -> None:
    """Raises DataContractError where `rows` break the law of `table`.

    `limits` are those of the settings and the codebook, by column: the largest of its values, the
    most places that its lists have, or, of sim_scores and embedding, how many they all have.
    """
    for breach in breaches(table, rows, limits):
        bad = np.flatnonzero(breach.rows)
        raise DataContractError(
            f"{table.name} breaks its law in {name_row(table, rows, int(bad[0]))}: "
            f"{breach.what}. {len(bad):,} of {len(rows):,} rows of the part do. Whoever "
            f"joins the table counts on it. {breach.remedy}"
        )


def breaches(table: Table, rows: pa.Table, limits: Limits | None = None) -> Breaches:
    """Yields all ways in which `rows` break the law of `table`, as `check` takes them.

    After a fatal one nothing more is looked at.
    """
    rows = rows.combine_chunks()  # once for all; no copy where a column is one chunk
    law = LAWS[table.name.partition("/")[0]]
    ordered = in_order(table, rows) if table.key else ()
    for laid_down in (ordered, _no_null(table, rows), law(rows, limits or {})):
        for breach in laid_down:
            if breach.rows.any():
                yield breach
                if breach.fatal:
                    return


def name_row(table: Table, rows: pa.Table, at: int) -> str:
    """Names the row `at` by its key, but no user: by what the key has beside user_id, if any."""
    names = [name for name in (table.key, *table.then_by) if name not in ("", "user_id")]
    return f"the row of {names[0]} {rows[names[0]][at]}" if names else "a row"


def check_unit(points: np.ndarray, ids: pa.ChunkedArray) -> None:
    """Raises DataContractError where `points` float32 [n, d] are not finite unit vectors.

    The points are those of the items `ids` [n].
    """
    bad = np.flatnonzero(_not_unit(points))
    if len(bad):
        raise DataContractError(
            f"item_embeddings holds {len(bad):,} rows whose embedding is no finite unit vector of "
            f"{points.shape[1]} floats, for example that of item_id {ids[int(bad[0])]}. Distances "
            "to it mean nothing, and its cluster ID would be arbitrary. Run `courier embed --full` "
            "for this ds."
        )


# ---- The laws --------------------------------------------------------------------------------


def _clicks_of_users(rows: pa.Table, limits: Limits) -> Breaches:
    """States the law of user_histories and recent_clicks: aligned lists, newest first."""
    items, times = _lists(rows["item_ids"]), _lists(rows["click_times"])
    yield Breach("a user has no click", items.sizes == 0)
    wrong = items.sizes != times.sizes
    yield Breach("item_ids and click_times are not aligned", wrong, fatal=True)
    longest = limits.get("item_ids", np.inf)
    yield Breach("item_ids are more than history_len", items.sizes > longest)
    moments = _numbers(times.values.cast(pa.int64()))
    yield Breach("click_times are not newest first", times.rise(moments))


def _training_rows(rows: pa.Table, _: Limits) -> Breaches:
    pvs, labels = _lists(rows["pv_item_ids"]), _lists(rows["pv_clicked"])
    clicks = _lists(rows["click_item_ids"])
    yield Breach("pv_item_ids and pv_clicked are not aligned", pvs.sizes != labels.sizes)
    yield Breach(f"pv_item_ids are not 1 to {ROW_PVS}", _outside(pvs.sizes, 1, ROW_PVS))
    yield Breach(f"click_item_ids are more than {ROW_CLICKS}", clicks.sizes > ROW_CLICKS)
    yield Breach("clicked items do not come first", labels.rise(_numbers(labels.values)))
    yield Breach("a chunk is below 0", _numbers(rows["chunk"]) < 0)


def _item_embeddings(rows: pa.Table, limits: Limits) -> Breaches:
    # What is broken here may have been so the day before, and carried over.
    vectors = _lists(rows["embedding"])
    dimension = _length(vectors, limits, "embedding")
    wrong = vectors.sizes != dimension
    yield Breach(f"an embedding has not {dimension} floats", wrong, _EMBED_ANEW, fatal=True)
    wrong = _not_unit(vectors.matrix(dimension))
    yield Breach("an embedding is no finite unit vector", wrong, _EMBED_ANEW)
    left = _numbers(pc.is_valid(rows["left_catalogue_ds"]))
    inside = _numbers(rows["in_catalogue"])
    yield Breach("left_catalogue_ds and in_catalogue disagree", left == inside)
    yield Breach("an image_size is below 0", _numbers(rows["image_size"]) < 0)


def _item_rejects(rows: pa.Table, _: Limits) -> Breaches:
    stages = pa.array(["read", "decode"], rows["stage"].type)
    known = _numbers(pc.is_in(rows["stage"], stages))
    yield Breach("a stage is neither read nor decode", ~known)
    yield Breach("attempts are fewer than one", _numbers(rows["attempts"]) < 1)
    first, last, again = (
        _numbers(rows[name].cast(pa.int32())) for name in ("first_ds", "last_ds", "next_ds")
    )
    wrong = (first > last) | (last >= again)
    yield Breach("first_ds, last_ds and next_ds are not in order", wrong)


def _item_features(rows: pa.Table, limits: Limits) -> Breaches:
    has_feature = _numbers(rows["has_image"]) & _numbers(rows["in_scope"])
    for name in rows.column_names:
        if name == cluster_column(MAIN) or name.startswith(cluster_column("")):
            ids = _numbers(rows[name])
            yield Breach(f"{name} is out of range", _outside(ids, 0, limits.get(name, np.inf)))
            yield Breach(f"{name} is not where an item has a feature", (ids > 0) != has_feature)
    distance = _numbers(rows["centre_distance"])
    wrong = ~(np.isfinite(distance) & (distance >= 0))
    yield Breach("a centre_distance is below 0 or not finite", wrong)
    wrong = (distance != 0) & ~has_feature
    yield Breach("an item without a feature has a centre_distance", wrong)
    if "second_distance" in rows.column_names:
        second = _numbers(rows["second_distance"])
        wrong = (second != 0) & ~has_feature
        yield Breach("an item without a feature has a second_distance", wrong)
        # A codebook of one centre has no second one: then no item has a distance to it.
        wrong = has_feature & ~(np.isfinite(second) & (second >= distance)) & second.any()
        yield Breach("a second_distance is below centre_distance or not finite", wrong)
    if "embedding" in rows.column_names:
        vectors = _lists(rows["embedding"])
        dimension = _length(vectors, limits, "embedding")
        wrong = vectors.sizes != dimension
        yield Breach(f"an embedding has not {dimension} floats", wrong, fatal=True)
        points = vectors.matrix(dimension)
        yield Breach("an embedding is no finite unit vector", _not_unit(points) & has_feature)
        wrong = points.any(axis=1) & ~has_feature
        yield Breach("an item without a feature has an embedding", wrong)


def _user_simscores(rows: pa.Table, limits: Limits) -> Breaches:
    scores, masks, tiers = (_lists(rows[name]) for name in ("sim_scores", "sim_mask", "simtier"))
    is_muse = pa.types.is_floating(tiers.values.type)
    tier_count = MUSE_TIERS if is_muse else SIM_TIERS
    length = _length(scores, limits, "sim_scores")
    for what, lists, size in (
        ("sim_scores are not history_len long", scores, length),
        ("sim_mask is not aligned with sim_scores", masks, length),
        (f"simtier has not {tier_count} tiers", tiers, tier_count),
    ):
        yield Breach(what, lists.sizes != size, fatal=True)

    score, mask = scores.matrix(length), masks.matrix(length)
    yield Breach("a sim_mask is neither 0 nor 1", masks.have(_outside(mask, 0, 1)))
    wrong = scores.have(_outside(score, -1, 1))
    yield Breach("a score is out of -1 to 1 or not finite", wrong, fatal=True)
    real = mask.view(bool)
    yield Breach("a score is not 0 where it is masked", scores.have((score != 0) > real))
    past = _numbers(rows["history_len"])
    yield Breach("history_len is out of range", _outside(past, 0, length))
    later = np.arange(length, dtype=past.dtype) >= past[:, None]
    yield Breach("a place after the history is real", scores.have(real & later))

    known, largest, mean = (_numbers(rows[f"sim_{name}"]) for name in ("known", "max", "mean"))
    wrong = known != np.count_nonzero(mask, axis=1)
    yield Breach("sim_known is not the number of real scores", wrong)
    tier = tiers.matrix(tier_count)
    if is_muse:  # log(count + 1), of all places
        wrong = ~(np.abs(np.expm1(tier, dtype=np.float64).sum(axis=1) - length) < 0.5)
        yield Breach(
            "simtier does not add up to the places of sim_scores", wrong | tiers.have(tier < 0)
        )
    else:
        wrong = (tier.sum(axis=1, dtype=np.int64) != known) | tiers.have(tier < 0)
        yield Breach("simtier does not add up to sim_known", wrong)
    best = scores.largest(score)  # of the masked ones too, which are 0
    unsure = np.flatnonzero((best <= 0) & (known > 0))
    best[unsure] = np.where(real[unsure], score[unsure], -np.inf).max(axis=1, initial=-np.inf)
    yield Breach("sim_max is not the largest real score", largest != best)
    wrong = ~np.where(known > 0, mean <= largest + _MEAN_ERROR, mean == 0)
    yield Breach("sim_mean is larger than sim_max, or not 0 without a score", wrong)
    same = _numbers(rows["same_cluster"])
    yield Breach("same_cluster is out of range", _outside(same, 0, past))
    if "feature_ds" in rows.column_names:
        none = _numbers(pc.is_null(rows["feature_ds"]))
        yield Breach("a row without a night has a score", none & (known > 0))
        if "encoder_id" in rows.column_names:
            named = _numbers(pc.not_equal(rows["encoder_id"], ""))
            wrong = named == none
            yield Breach("encoder_id and feature_ds disagree whether there is a night", wrong)
    yield from _scores_on_request(rows, limits, real, past)


def _scores_on_request(
    rows: pa.Table, limits: Limits, real: np.ndarray, past: np.ndarray
) -> Breaches:
    """States what must hold of columns of user_simscores that are there on request.

    Of the places of histories, which are `past` [n] long, some have a `real` score, bool [n, L].
    """
    places = np.arange(real.shape[1], dtype=past.dtype)
    for name in rows.column_names:
        if name == HISTORY_ITEM_IDS:
            wrong = _lists(rows[name]).sizes != past
            yield Breach("history_item_ids are not history_len long", wrong)
        elif name == TOP_POSITIONS:
            yield from _top_positions(rows, limits, real, past)
        elif name.startswith(SAME_CLUSTER) and resolution_of(name):
            yield Breach(f"{name} is out of range", _outside(_numbers(rows[name]), 0, past))
        elif name == SIM_BUCKET or resolution_of(name):
            lists = _lists(rows[name])
            wrong = lists.sizes != real.shape[1]
            yield Breach(f"{name} is not aligned with sim_scores", wrong, fatal=True)
            values = lists.matrix(real.shape[1])
            told = real if name == SIM_BUCKET else places < past[:, None]
            wrong = lists.have((values != 0) > told)
            yield Breach(f"{name} is not 0 where there is nothing", wrong)
            yield Breach(f"{name} is below 0", lists.have(values < 0))


def _top_positions(rows: pa.Table, limits: Limits, real: np.ndarray, past: np.ndarray) -> Breaches:
    lists = _lists(rows[TOP_POSITIONS])
    most = _length(lists, limits, TOP_POSITIONS)
    yield Breach("top_positions are not top_k long", lists.sizes != most, fatal=True)
    places = lists.matrix(most)
    outside = lists.have(_outside(places, 0, past[:, None]))
    yield Breach("a top_position is out of the history", outside)
    wrong = np.count_nonzero(places, axis=1) != np.minimum(np.count_nonzero(real, axis=1), most)
    yield Breach("top_positions are not as many as real scores", wrong)


def _joined(rows: pa.Table, limits: Limits) -> Breaches:
    """States the law of training sets, of which `limits` name the columns of cluster IDs.

    Without limits none is stated: rows are laid out for a framework, and were checked before that.
    """
    if not limits:
        return
    there, known, image, scope = (
        _numbers(rows[name]) for name in ("has_night", "item_known", "has_image", "in_scope")
    )
    yield Breach(
        "feature_ds is not where there is a night",
        there != _numbers(pc.is_valid(rows["feature_ds"])),
    )
    yield Breach("an item is known without a night", known & ~there)
    yield Breach("an unknown item has an image or is in scope", (image | scope) & ~known)
    for name in limits.keys() - {"sim_scores", TOP_POSITIONS}:
        ids = _numbers(rows[name])
        yield Breach(f"{name} is out of range", _outside(ids, 0, limits[name]))
        yield Breach(f"{name} is not where an item has a feature", (ids > 0) != (image & scope))
    yield from _user_simscores(rows, limits)
    wrong = (_numbers(rows["sim_known"]) > 0) & ~(image & scope)
    yield Breach("an item without a feature has a score", wrong)


LAWS: dict[str, Callable[[pa.Table, Limits], Breaches]] = {
    USER_HISTORIES.name: _clicks_of_users,
    RECENT_CLICKS.name: _clicks_of_users,
    TRAINING_ROWS.name: _training_rows,
    ITEM_EMBEDDINGS.name: _item_embeddings,
    ITEM_REJECTS.name: _item_rejects,
    ITEM_FEATURES.name: _item_features,
    USER_SIMSCORES.name: _user_simscores,
    JOINED.name: _joined,
}


# ---- What laws are made of --------------------------------------------------------------------


def in_order(table: Table, rows: pa.Table) -> Breaches:
    """States that rows ascend by the table's key, which is unique; needs no other column."""
    names, pairs = (table.key, *table.then_by), max(0, len(rows) - 1)
    falls, same = np.zeros(pairs, bool), np.ones(pairs, bool)  # from each row to the next
    for name in names:
        one, next_one = rows[name][:-1], rows[name][1:]
        falls |= same & _numbers(pc.greater(one, next_one))
        same &= _numbers(pc.equal(one, next_one))
    for what, where in (("not in the order of", falls), ("not unique by", same)):
        yield Breach(f"rows are {what} {', '.join(names)}", np.append(False, where)[: len(rows)])


def _no_null(table: Table, rows: pa.Table) -> Breaches:
    """States that no list of the table's own columns has a null in it."""
    own = {column.name for column in table.columns}
    for name in rows.column_names:
        if (name in own or score_field(name)) and pa.types.is_list(rows[name].type):
            lists = _lists(rows[name])
            if lists.values.null_count:
                nulls = lists.have(_numbers(lists.values.is_null()))
                yield Breach(f"there is a null in a list of {name}", nulls, fatal=True)


class _Lists(NamedTuple):
    """Holds a list column: the `sizes` int64 [n] of its lists, and their values one by one."""

    sizes: np.ndarray
    values: pa.Array

    def have(self, bad: np.ndarray) -> np.ndarray:
        """Tells which lists have a value that is `bad`, bool [values] in any shape; bool [n]."""
        if not bad.any():  # row by row it would take ten times as long
            return np.zeros(len(self.sizes), bool)
        row = np.arange(len(self.sizes)).repeat(self.sizes)
        return np.bincount(row[bad.reshape(-1)], minlength=len(self.sizes)) > 0

    def rise(self, values: np.ndarray) -> np.ndarray:
        """Tells in which lists one of `values` [values] is larger than the one before; bool [n]."""
        larger = np.append(False, values[1:] > values[:-1])[: len(values)]
        larger[self._starts()] = False
        return self.have(larger)

    def largest(self, values: np.ndarray) -> np.ndarray:
        """Returns the largest of `values` of each list, which are equally long; [n]."""
        if not values.size:
            return np.zeros(len(self.sizes), values.dtype)
        return np.maximum.reduceat(values.reshape(-1), self._starts())

    def matrix(self, width: int) -> np.ndarray:
        """Returns the values of lists that are all `width` long; [n, width]."""
        return _numbers(self.values).reshape(len(self.sizes), width)

    def _starts(self) -> np.ndarray:
        """Returns where the lists begin that are not empty; int64 [at most n]."""
        return (np.cumsum(self.sizes) - self.sizes)[self.sizes > 0]


def _lists(column: pa.ChunkedArray) -> _Lists:
    # Combining copies even a single chunk.
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return _Lists(_numbers(pc.list_value_length(lists)).astype(np.int64), lists.flatten())


def _length(lists: _Lists, limits: Limits, column: str) -> int:
    """Returns how long lists ought to be: as `limits` say, or else as the longest is."""
    return limits.get(column, int(lists.sizes.max(initial=0)))


def _numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = column.to_numpy(zero_copy_only=False)
    return found


def _outside(values: np.ndarray, least: float, most: float | np.ndarray) -> np.ndarray:
    """Tells which of `values` are not from `least` to `most`, NaN among them; in their shape."""
    return ~((values >= least) & (values <= most))


def _not_unit(points: np.ndarray) -> np.ndarray:
    """Tells which of `points` [n, d] are no finite unit vectors; bool [n]."""
    square = np.einsum("nd,nd->n", points, points)
    return ~(np.abs(square - 1) < _UNIT_ERROR)  # written so that NaN counts
