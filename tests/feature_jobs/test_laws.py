"""Each table has a law; rows that keep it pass, and each way to break it is told."""

import datetime as dt
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs import laws, schemas
from feature_jobs.schemas import DataContractError, Table
from tests.support.codebooks import unit_rows

UNIT, ZERO = unit_rows(1)[0].tolist(), [0.0] * 256
DAY, NEXT = dt.date(2026, 1, 5), dt.date(2026, 1, 6)
NOON, ONE = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC), dt.timedelta(seconds=1)
TIERS = [0] * 20
CLICKS = {"user_id": 1, "item_ids": [7, 8], "click_times": [NOON, NOON - ONE]}
GOOD: dict[str, dict[str, Any]] = {
    "user_histories": CLICKS,
    "recent_clicks": CLICKS,
    "training_rows": {
        "user_id": 1, "request_id": 5, "chunk": 0, "event_time": NOON, "pv_item_ids": [1, 2, 3],
        "pv_clicked": [True, True, False], "click_item_ids": [9],
    },
    "item_embeddings": {
        "item_id": 1, "embedding": UNIT, "image_uri": "a", "image_generation": None,
        "image_size": 5, "image_mtime": None, "image_sha256": "", "category": None,
        "in_catalogue": True, "left_catalogue_ds": None,
    },
    "item_rejects": {
        "item_id": 1, "image_uri": None, "category": None, "stage": "read", "reason": "missing",
        "message": "", "attempts": 1, "first_ds": DAY, "last_ds": DAY, "next_ds": NEXT,
    },
    "item_features": {
        "item_id": 1, "category": None, "has_image": True, "in_scope": True, "in_catalogue": True,
        "cluster_id": 3, "centre_distance": 0.5, "second_distance": 0.75, "encoder_id": "e",
        "codebook_id": "c", "embedding": UNIT, "cluster_fine": 9,
    },
    "user_simscores": {
        "impression_id": 1, "user_id": 1, "item_id": 1, "event_time": NOON, "clicked": False,
        "sim_scores": [0.5, 0.0, 0.0], "sim_mask": [1, 0, 0], "history_item_ids": [4, 5],
        "history_len": 2, "sim_known": 1, "sim_max": 0.5, "sim_mean": 0.5,
        "simtier": [*TIERS[1:], 1], "same_cluster": 1, "encoder_id": "e", "codebook_id": "c",
        "feature_ds": dt.date(2026, 1, 5),
    },
}  # fmt: skip
ROWS = {
    "user_histories": "a row", "recent_clicks": "a row",
    "training_rows": "the row of request_id 5",
}  # fmt: skip
BARE = {"history_len": 0, "history_item_ids": [], "same_cluster": 0}
LIMITS = {"item_ids": 2, "cluster_id": 3, "cluster_fine": 9, "sim_scores": 3}
OUTSIDE = {"in_scope": False, "cluster_id": 0, "cluster_fine": 0}  # the scope, with distances still
NO_FEATURE = {**OUTSIDE, "centre_distance": 0.0, "second_distance": 0.0}
NAN, INF = float("nan"), float("inf")

# Of a table: what of a good row is changed, and what is said of it.
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("user_histories", {"item_ids": [], "click_times": []}, "has no click"),
    ("user_histories", {"item_ids": [7]}, "not aligned"),
    ("user_histories", {"item_ids": [7] * 3, "click_times": [NOON] * 3}, "more than history_len"),
    ("user_histories", {"item_ids": [7, None]}, "null in a list of item_ids"),
    ("user_histories", {"click_times": [NOON, None]}, "null in a list of click_times"),
    ("user_histories", {"click_times": [NOON - ONE, NOON]}, "not newest first"),
    ("recent_clicks", {"click_times": [NOON - ONE, NOON]}, "not newest first"),
    ("training_rows", {"pv_clicked": [True, True]}, "not aligned"),
    ("training_rows", {"pv_item_ids": [], "pv_clicked": []}, "not 1 to 5"),
    ("training_rows", {"pv_item_ids": [1] * 6, "pv_clicked": [True] * 6}, "not 1 to 5"),
    ("training_rows", {"click_item_ids": [1] * 6}, "more than 5"),
    ("training_rows", {"click_item_ids": [None]}, "null in a list"),
    ("training_rows", {"pv_clicked": [True, False, True]}, "do not come first"),
    ("training_rows", {"chunk": -1}, "below 0"),
    ("item_embeddings", {"embedding": UNIT[1:]}, "has not 256 floats"),
    ("item_embeddings", {"embedding": ZERO}, "no finite unit vector"),
    ("item_embeddings", {"embedding": [NAN, *UNIT[1:]]}, "no finite unit vector"),
    ("item_embeddings", {"in_catalogue": False}, "disagree"),
    ("item_embeddings", {"left_catalogue_ds": DAY}, "disagree"),
    ("item_embeddings", {"image_size": -1}, "below 0"),
    ("item_rejects", {"stage": "forward"}, "neither read nor decode"),
    ("item_rejects", {"attempts": 0}, "fewer than one"),
    ("item_rejects", {"first_ds": NEXT}, "not in order"),
    ("item_rejects", {"next_ds": DAY}, "not in order"),
    ("item_features", {"cluster_id": 4}, "cluster_id is out of range"),
    ("item_features", {"cluster_fine": 10}, "cluster_fine is out of range"),
    ("item_features", {"cluster_id": -1}, "out of range"),
    ("item_features", {"cluster_id": 0}, "not where an item has a feature"),
    ("item_features", {"has_image": False}, "not where an item has a feature"),
    ("item_features", {"centre_distance": NAN}, "below 0 or not finite"),
    ("item_features", {"second_distance": 0.25}, "below centre_distance"),
    ("item_features", {"second_distance": 0.0}, "below centre_distance"),
    ("item_features", {"second_distance": NAN}, "below centre_distance or not finite"),
    ("item_features", {"second_distance": INF}, "below centre_distance or not finite"),
    ("item_features", {"embedding": UNIT[1:]}, "has not 256 floats"),
    ("item_features", {"embedding": ZERO}, "no finite unit vector"),
    ("item_features", OUTSIDE, "without a feature has a centre_distance"),
    ("item_features", {**OUTSIDE, "centre_distance": 0.0}, "without a feature has a second_d"),
    ("item_features", NO_FEATURE, "without a feature has an embedding"),
    ("user_simscores", {"sim_scores": [0.5, 0.0]}, "sim_scores are not history_len long"),
    ("user_simscores", {"sim_mask": [1, 0]}, "not aligned with sim_scores"),
    ("user_simscores", {"simtier": [1]}, "has not 20 tiers"),
    ("user_simscores", {"sim_mask": [2, 0, 0]}, "neither 0 nor 1"),
    ("user_simscores", {"sim_scores": [1.5, 0.0, 0.0]}, "out of -1 to 1"),
    ("user_simscores", {"sim_scores": [NAN, 0.0, 0.0]}, "out of -1 to 1"),
    ("user_simscores", {"sim_scores": [None, 0.0, 0.0]}, "null in a list of sim_scores"),
    ("user_simscores", {"history_item_ids": [4, None]}, "null in a list of history_item_ids"),
    ("user_simscores", {"sim_scores": [0.5, 0.1, 0.0]}, "not 0 where it is masked"),
    ("user_simscores", {"history_len": 4}, "history_len is out of range"),
    ("user_simscores", BARE, "after the history is real"),
    ("user_simscores", {"sim_known": 2}, "not the number of real scores"),
    ("user_simscores", {"simtier": TIERS}, "does not add up"),
    ("user_simscores", {"sim_max": 0.25}, "not the largest"),
    ("user_simscores", {"sim_scores": [-0.5, 0.0, 0.0], "sim_max": 0.0}, "not the largest"),
    ("user_simscores", {"sim_mean": 0.75}, "larger than sim_max"),
    ("user_simscores", {"same_cluster": 3}, "same_cluster is out of range"),
    ("user_simscores", {"feature_ds": None, "encoder_id": ""}, "without a night has a score"),
    ("user_simscores", {"encoder_id": ""}, "disagree whether there is a night"),
    ("user_simscores", {"history_item_ids": [4]}, "history_item_ids are not history_len long"),
]


ASKED = {
    **GOOD["user_simscores"], "history_cluster_ids": [3, 0, 0], "history_cluster_fine": [9, 9, 0],
    "same_cluster_fine": 2, "sim_bucket": [16, 0, 0], "top_positions": [1, 0],
}  # fmt: skip
MUSE = {"simtier": [0.0] * 10 + [math.log(3)] + [0.0] * 4 + [math.log(2)] + [0.0] * 6}

# Of the columns that user_simscores has on request: what is changed, and what is said of it.
BROKEN_REQUEST: list[tuple[dict[str, Any], str]] = [
    ({"history_cluster_ids": [3, 0]}, "history_cluster_ids is not aligned with sim_scores"),
    ({"history_cluster_fine": [9, -9, 0]}, "history_cluster_fine is below 0"),
    ({"history_cluster_fine": [9, 0, 9]}, "history_cluster_fine is not 0 where there is nothing"),
    ({"history_cluster_ids": [3, None, 0]}, "null in a list of history_cluster_ids"),
    ({"same_cluster_fine": 3}, "same_cluster_fine is out of range"),
    ({"same_cluster_fine": -1}, "same_cluster_fine is out of range"),
    ({"sim_bucket": [16, 11, 0]}, "sim_bucket is not 0 where there is nothing"),
    ({"sim_bucket": [16]}, "sim_bucket is not aligned"),
    ({"top_positions": [1]}, "top_positions are not top_k long"),
    ({"top_positions": [3, 0]}, "a top_position is out of the history"),
    ({"top_positions": [-1, 0]}, "a top_position is out of the history"),
    ({"top_positions": [0, 0]}, "top_positions are not as many as real scores"),
    ({"top_positions": [1, 2]}, "top_positions are not as many as real scores"),
    ({"simtier": [0.0] * 22}, "does not add up to the places of sim_scores"),
    ({"simtier": [NAN] * 22}, "does not add up to the places of sim_scores"),
    ({"simtier": [-0.5, *MUSE["simtier"][1:]]}, "does not add up to the places of sim_scores"),
    ({"simtier": [0.0] * 20}, "simtier has not 22 tiers"),
]


def rows_on_request(*rows: Mapping[str, Any]) -> pa.Table:
    """Returns rows of user_simscores with all its columns, and tiers of MUSE where those are."""
    names = ASKED.keys() & set(rows[0])
    tiers = "muse" if isinstance(rows[0]["simtier"][0], float) else "courier"
    ids = [pa.int64()] * 3
    schema = schemas.scores_schema(*ids, names, tiers, by_night=True)
    plain = pa.schema([(field.name, field.type) for field in schema])
    return pa.Table.from_pylist([dict(row) for row in rows], plain)


def rows_of(table: str, *rows: Mapping[str, Any]) -> pa.Table:
    schema = schemas.TABLES[table].schema(pa.int64(), pa.int64(), pa.int64(), pa.int64())
    if table == "item_features":
        schema = schema.append(schemas.cluster_field("fine"))
    plain = pa.schema([(field.name, field.type) for field in schema])
    return pa.Table.from_pylist([dict(row) for row in rows], plain)


def another(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, table.key: row[table.key] + 1}


@pytest.mark.parametrize("tiers", [{}, MUSE])
def test_columns_on_request_that_keep_the_law_pass(tiers: dict[str, Any]) -> None:
    table, good = schemas.USER_SIMSCORES, {**ASKED, **tiers}
    laws.check(table, rows_on_request(good, another(table, good)), {"top_positions": 2, **LIMITS})
    laws.check(table, rows_on_request(good))
    laws.check(table, rows_on_request(good).slice(1))


@pytest.mark.parametrize(("change", "told"), BROKEN_REQUEST)
def test_a_column_on_request_that_breaks_the_law_is_told(change: dict[str, Any], told: str) -> None:
    table = schemas.USER_SIMSCORES
    good = {**ASKED, **(MUSE if "simtier" in change else {})}
    rows = rows_on_request(good, {**another(table, good), **change})
    with pytest.raises(DataContractError, match=f"in the row of impression_id 2: .*{told}"):
        laws.check(table, rows, {"top_positions": 2, **LIMITS})


def test_every_table_has_a_law() -> None:
    assert set(schemas.TABLES) == set(GOOD) == {name for name, _, _ in BROKEN}
    assert set(laws.LAWS) == {*schemas.TABLES, schemas.JOINED.name}


# Of a training set, whose first column is the shop's own.
SAMPLE = {
    **{k: v for k, v in GOOD["user_simscores"].items() if k.startswith(("sim", "history_len"))},
    "cluster_of_ours": 77, "feature_ds": DAY, "has_night": True, "item_known": True,
    "has_image": True, "in_scope": True, "cluster_id": 3, "cluster_fine": 9, "same_cluster": 2,
    "night_created": None,
}  # fmt: skip
NOTHING = {
    "sim_scores": [0.0] * 3, "sim_mask": [0] * 3, "sim_known": 0, "sim_max": 0.0, "sim_mean": 0.0,
    "simtier": [0] * 20, "same_cluster": 0, "cluster_id": 0, "cluster_fine": 0,
}  # fmt: skip
CLUSTERS = {**LIMITS, "cluster_id": 3, "cluster_fine": 9}
CLUSTERS.pop("item_ids", None)


def samples_of(*rows: dict[str, Any]) -> pa.Table:
    extra = [schemas.cluster_field("fine"), pa.field("cluster_of_ours", pa.int64())]
    schema = schemas.JOINED.schema(pa.int64(), extra=extra)
    return pa.Table.from_pylist(list(rows), schema)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"feature_ds": None}, "feature_ds is not where there is a night"),
        ({"has_night": False, "feature_ds": None}, "an item is known without a night"),
        ({"item_known": False}, "an unknown item has an image or is in scope"),
        ({"cluster_id": 4}, "cluster_id is out of range"),
        ({"cluster_fine": 0}, "cluster_fine is not where an item has a feature"),
        ({"has_image": False, "cluster_id": 0, "cluster_fine": 0}, "without a feature has a score"),
        ({"sim_known": 2}, "not the number of real scores"),
    ],
)
def test_rows_of_a_training_set_keep_its_law(changed: dict[str, Any], said: str) -> None:
    unknown = {**SAMPLE, **NOTHING, "item_known": False, "has_image": False, "in_scope": False}
    before = {**unknown, "has_night": False, "feature_ds": None}
    laws.check(schemas.JOINED, samples_of(SAMPLE, unknown, before, SAMPLE), CLUSTERS)
    broken = samples_of(SAMPLE, {**SAMPLE, **changed})
    with pytest.raises(DataContractError, match=said):
        laws.check(schemas.JOINED, broken, CLUSTERS)
    laws.check(schemas.JOINED, broken)  # as it is laid out for a framework


@pytest.mark.parametrize("name", sorted(schemas.TABLES))
def test_rows_that_keep_the_law_pass(name: str) -> None:
    table, good = schemas.TABLES[name], GOOD[name]
    rows = rows_of(name, good, another(table, good))
    laws.check(table, rows, LIMITS)
    laws.check(table, rows_of(name, good))
    laws.check(table, rows_of(name), LIMITS)
    laws.check(table, pa.concat_tables([rows.slice(0, 1), rows.slice(1)]), LIMITS)
    laws.check(table, pa.table([pa.chunked_array([], f.type) for f in rows.schema], rows.schema))


@pytest.mark.parametrize(("name", "change", "told"), BROKEN)
def test_a_row_that_breaks_the_law_is_told(name: str, change: dict[str, Any], told: str) -> None:
    table, good = schemas.TABLES[name], GOOD[name]
    broken = {**another(table, good), **change}
    where = ROWS.get(name, f"the row of {table.key} 2")  # no user's ID
    with pytest.raises(DataContractError, match=f"{name} breaks its law in {where}: .*{told}") as e:
        laws.check(table, rows_of(name, good, broken), LIMITS)
    assert "1 of 2 rows of the part do" in str(e.value)
    assert "user_id" not in str(e.value)
    carried_over = name == "item_embeddings" and "embedding" in change
    assert ("Run `courier embed --full`" in str(e.value)) == carried_over


def test_all_breaches_are_told_until_one_is_fatal() -> None:
    table, good = schemas.ITEM_EMBEDDINGS, GOOD["item_embeddings"]
    several = {**good, "embedding": ZERO, "in_catalogue": False, "image_size": -1}
    found = [b.what for b in laws.breaches(table, rows_of(table.name, several, good), LIMITS)]
    assert found == [
        "rows are not unique by item_id", "an embedding is no finite unit vector",
        "left_catalogue_ds and in_catalogue disagree", "an image_size is below 0",
    ]  # fmt: skip
    short = {**several, "embedding": UNIT[1:]}
    *_, last = laws.breaches(table, rows_of(table.name, short), {"embedding": 256})
    assert (last.what, last.fatal) == ("an embedding has not 256 floats", True)


@pytest.mark.parametrize("name", ["item_embeddings", "item_features"])
def test_embeddings_are_as_long_as_the_limits_say_or_else_all_alike(name: str) -> None:
    table, good = schemas.TABLES[name], GOOD[name]
    narrow = {**good, "embedding": unit_rows(1, dimension=64)[0].tolist()}
    laws.check(table, rows_of(name, narrow), {**LIMITS, "embedding": 64})
    laws.check(table, rows_of(name, narrow))
    with pytest.raises(DataContractError, match="an embedding has not 256 floats"):
        laws.check(table, rows_of(name, narrow), {**LIMITS, "embedding": 256})
    with pytest.raises(DataContractError, match="an embedding has not 256 floats"):
        laws.check(table, rows_of(name, good, {**another(table, narrow)}))


@pytest.mark.parametrize(("name", "change", "told"), BROKEN)
def test_a_breach_that_is_not_fatal_leaves_the_rest_to_be_looked_at(
    name: str, change: dict[str, Any], told: str
) -> None:
    table, good = schemas.TABLES[name], GOOD[name]
    broken = {**another(table, good), **change}
    found = [breach.what for breach in laws.breaches(table, rows_of(name, good, broken), LIMITS)]
    assert any(told in what for what in found)


@pytest.mark.parametrize("name", sorted(schemas.TABLES))
def test_keys_are_unique_and_ascend(name: str) -> None:
    table, good = schemas.TABLES[name], GOOD[name]
    with pytest.raises(DataContractError, match=r"rows are not unique by.* 1 of 2 rows"):
        laws.check(table, rows_of(name, good, good), LIMITS)
    with pytest.raises(DataContractError, match="rows are not in the order of"):
        laws.check(table, rows_of(name, another(table, good), good), LIMITS)


def test_rows_of_one_key_ascend_by_what_follows_it() -> None:
    first = GOOD["training_rows"]
    rows = [first, {**first, "chunk": 1}, {**first, "request_id": 6}, {**first, "user_id": 2}]
    laws.check(schemas.TRAINING_ROWS, rows_of("training_rows", *rows))
    rows[1], rows[2] = rows[2], rows[1]
    with pytest.raises(DataContractError, match="order of user_id, request_id, chunk"):
        laws.check(schemas.TRAINING_ROWS, rows_of("training_rows", *rows))


def test_lists_are_told_apart_from_their_neighbours() -> None:
    """A list that begins later than the one before ends is no fault."""
    late = {**CLICKS, "user_id": 2, "click_times": [NOON + ONE, NOON]}
    laws.check(schemas.USER_HISTORIES, rows_of("user_histories", CLICKS, late), LIMITS)
    sliced = rows_of("user_histories", CLICKS, late, {**late, "user_id": 3}).slice(1)
    laws.check(schemas.USER_HISTORIES, sliced, LIMITS)
    np.testing.assert_array_equal(sliced["user_id"].to_numpy(), [2, 3])


def test_items_without_a_feature_keep_the_law_and_so_do_those_of_a_codebook_of_one_centre() -> None:
    table, good = schemas.ITEM_FEATURES, GOOD["item_features"]
    bare = {**another(table, good), **NO_FEATURE, "embedding": ZERO}
    laws.check(table, rows_of("item_features", good, bare), LIMITS)
    laws.check(table, rows_of("item_features", {**good, "second_distance": 0.0}, bare), LIMITS)


def test_the_largest_score_may_be_below_0() -> None:
    below = {
        "sim_scores": [-0.5, -0.25, 0.0], "sim_mask": [1, 1, 0], "sim_known": 2, "sim_max": -0.25,
        "sim_mean": -0.375, "simtier": [0] * 5 + [1, 0, 1] + [0] * 12,
    }  # fmt: skip
    rows = rows_of("user_simscores", {**GOOD["user_simscores"], **below})
    laws.check(schemas.USER_SIMSCORES, rows, LIMITS)
