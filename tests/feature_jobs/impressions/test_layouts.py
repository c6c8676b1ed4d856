"""Tests the layouts for CTR frameworks: types and shapes that they take, no number renumbered.

`make test-frameworks` has FuxiCTR itself read a set, in tests/pipelines/test_frameworks.py.
"""

import datetime as dt
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import yaml

from feature_jobs.impressions.layouts import (
    GROUP_ID,
    HISTORY,
    LAYOUTS,
    features,
    layout_config,
    layout_schema,
    to_layout,
    torcheasyrec_type,
)
from feature_jobs.schemas import JOINED, DataContractError, OperatorError
from feature_jobs.store.arrays import list_column
from tests.support.joined_rows import FLOATS, FORM, MAX_IDS, PLACES, TIERS, TOP, joined

FRAMEWORKS = ("fuxictr", "torcheasyrec")
ROWS = joined(500)
# AVAILABLE_PA_TYPES of TorchEasyRec's tzrec/datasets/dataset.py.
_FLAT = [pa.int64(), pa.float64(), pa.float32(), pa.string(), pa.int32()]
AVAILABLE = {
    *_FLAT,
    *(pa.list_(one) for one in _FLAT),
    *(pa.list_(pa.list_(one)) for one in _FLAT),
    *(pa.map_(key, one) for key in (pa.string(), pa.int64(), pa.int32()) for one in _FLAT),
}


def with_column(name: str, column: object, rows: pa.Table = ROWS) -> pa.Table:
    """Returns rows with a column, in place of theirs where they have one of that name."""
    at = rows.schema.get_field_index(name)
    return rows.append_column(name, column) if at < 0 else rows.set_column(at, name, column)


# ---- All layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_as_the_schema_says_and_as_many(name: str) -> None:
    found = to_layout(name, ROWS, FORM)
    assert found.schema.equals(layout_schema(name, ROWS.schema, FORM))
    assert len(found) == len(ROWS)
    assert len(to_layout(name, ROWS[:0], FORM)) == 0


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_configuration_lies_where_no_reader_of_all_days_looks(name: str) -> None:
    """They pass over folders that begin with `_`; FuxiCTR writes more files beside its own."""
    (path,) = layout_config(name, ROWS.schema, FORM)
    assert path.startswith(f"_{name}/")


def test_plain_is_what_the_join_writes() -> None:
    assert to_layout("plain", ROWS, FORM) is ROWS
    assert layout_config("plain", ROWS.schema, FORM) == {}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_no_number_of_ours_changes(name: str) -> None:
    found = to_layout(name, ROWS, FORM)
    ours = ROWS.column_names[ROWS.column_names.index("has_night") :]
    assert len(ours) > 20
    for column in ours:
        out = column
        if column not in found.column_names:
            out = f"{HISTORY}__{column.removeprefix('history_')}"
        wanted = ROWS[column].to_pylist()
        if out != column:  # an empty history keeps one place
            lengths = ROWS["history_len"].to_pylist()
            wanted = [one[: max(k, 1)] for one, k in zip(wanted, lengths, strict=True)]
        if column == "night_created" and name == "torcheasyrec":
            wanted = ROWS[column].cast(pa.int64()).to_pylist()
        assert found[out].to_pylist() == wanted, column


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_number_that_is_null_is_0_and_other_nulls_stay(name: str) -> None:
    found = to_layout(name, ROWS, FORM)
    for column in ("price", "member", "position"):
        nulls = ROWS[column].is_null()
        assert nulls.to_pylist().count(True) > 10
        assert not any(found[column].filter(nulls).to_pylist())
        assert found[column].null_count == 0
    assert found["feature_ds"].null_count == ROWS["feature_ds"].null_count > 0


def test_features_are_ours_and_the_users_floats_and_booleans() -> None:
    found = {feature.name: feature for feature in features(ROWS.schema, FORM)}
    left = set(ROWS.column_names) - set(found)
    assert left == {
        "user", "item", "at", "label", "position", "page", "tags",
        "feature_ds", "history_item_ids", "night_created",
    }  # fmt: skip
    assert found["cluster_fine"].size == found["history_cluster_fine"].size == 1001
    assert found["top_positions"].size == PLACES + 1
    assert found["sim_bucket"].size == TIERS + 1
    names = list(found)
    for feature in found.values():
        assert not feature.shares or names.index(feature.shares) < names.index(feature.name)


def test_every_column_of_the_join_is_known() -> None:
    ours = JOINED.schema(pa.int64())
    found = {feature.name for feature in features(ours, FORM)}
    assert set(ours.names) - found == {"feature_ds", "night_created"}  # no numbers
    for field in ours:
        assert ROWS.schema.field(field.name).type == field.type


def test_a_set_that_knows_no_night_has_tables_of_two_rows() -> None:
    form = replace(FORM, max_ids={"main": 0})
    (cluster,) = (one for one in features(ROWS.schema, form) if one.name == "cluster_id")
    assert cluster.size == 2


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("column", ["sim_scores", "simtier", "top_positions", "history_item_ids"])
def test_lists_of_another_length_are_refused(name: str, column: str) -> None:
    lists = ROWS[column].to_pylist()
    for broken in (lists[0][:-1], [*lists[0], 0], None):
        rows = with_column(column, pa.array([broken, *lists[1:]], ROWS[column].type))
        with pytest.raises(DataContractError, match=column):
            to_layout(name, rows, FORM)
    with pytest.raises(DataContractError, match="should have 9 places"):
        to_layout(name, ROWS, replace(FORM, history_len=9))


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_set_without_labels_is_refused(name: str) -> None:
    for label in (None, "gone", "page", "at"):
        form = replace(FORM, label=label)
        with pytest.raises(OperatorError, match=r"labels.* Name one \(--label\)"):
            layout_schema(name, ROWS.schema, form)
        with pytest.raises(OperatorError, match="labels"):
            layout_config(name, ROWS.schema, form)
    rows = with_column("label", pa.array([None, *[True] * (len(ROWS) - 1)]))
    with pytest.raises(DataContractError, match="1 of 500 rows have no label"):
        to_layout(name, rows, FORM)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(OperatorError, match="plain, fuxictr, torcheasyrec"):
        layout_schema("csv", ROWS.schema, FORM)


# ---- FuxiCTR -----------------------------------------------------------------------------------


def fuxictr() -> dict[str, dict[str, object]]:
    """Returns FuxiCTR's description of each column, by name."""
    (text,) = layout_config("fuxictr", ROWS.schema, FORM).values()
    return {column["name"]: column for column in yaml.safe_load(text)["courier"]["feature_cols"]}


def test_a_group_is_the_hash_of_its_user() -> None:
    found = to_layout("fuxictr", ROWS, FORM)[GROUP_ID].to_pylist()
    wanted = [
        0 if user is None else xxhash.xxh64_intdigest(user.encode()) % 2**53
        for user in ROWS["user"].to_pylist()
    ]
    assert found == wanted
    assert 0 in found
    whole = with_column("user", pa.array(np.arange(len(ROWS), dtype=np.int32)))
    found = to_layout("fuxictr", whole, FORM)[GROUP_ID].to_pylist()
    assert found[3] == xxhash.xxh64_intdigest((3).to_bytes(8, "little")) % 2**53
    text = with_column("user", ROWS["user"].cast(pa.large_string()).dictionary_encode())
    assert to_layout("fuxictr", text, FORM)[GROUP_ID].to_pylist() == wanted


def test_the_label_becomes_a_float_and_all_else_stays_as_it_is() -> None:
    schema = layout_schema("fuxictr", ROWS.schema, FORM)
    assert schema.field("label").type == pa.float32()
    assert schema.names == [*ROWS.column_names, GROUP_ID]
    assert [f.type for f in schema if f.name not in ("label", GROUP_ID)] == [
        f.type for f in ROWS.schema if f.name != "label"
    ]


def test_fuxictr_never_numbers_anew_and_knows_the_size_of_each_table() -> None:
    (text,) = layout_config("fuxictr", ROWS.schema, FORM).values()
    told = yaml.safe_load(text)["courier"]
    assert told["rebuild_dataset"] is False
    assert told["group_id"] == GROUP_ID
    assert told["label_col"] == {"name": "label", "dtype": "float"}
    columns = fuxictr()
    assert {name: c["vocab_size"] for name, c in columns.items() if "vocab_size" in c} == {
        "cluster_id": 33, "history_cluster_ids": 33,
        "cluster_fine": 1001, "history_cluster_fine": 1001,
        "sim_bucket": TIERS + 1, "top_positions": PLACES + 1,
    }  # fmt: skip
    assert columns["history_cluster_fine"]["share_embedding"] == "cluster_fine"
    assert columns["simtier"]["pretrain_dim"] == TIERS
    assert columns["top_positions"]["max_len"] == TOP
    assert columns[GROUP_ID]["remap"] is False  # else FuxiCTR asks for a vocabulary


def test_fuxictr_lists_no_strings_and_the_comments_name_what_is_left_out() -> None:
    (text,) = layout_config("fuxictr", ROWS.schema, FORM).values()
    columns = fuxictr()
    assert set(columns) == {GROUP_ID, *(f.name for f in features(ROWS.schema, FORM))}
    comments = "\n".join(line for line in text.splitlines() if line.strip().startswith("#"))
    for name in set(ROWS.column_names) - set(columns) - {"label"}:
        assert f'"{name}"' in comments
    assert '# - {name: "position", active: True' in comments


def test_what_fuxictr_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(OperatorError, match=GROUP_ID):
        layout_schema("fuxictr", with_column(GROUP_ID, ROWS["price"]).schema, FORM)
    floats = with_column("user", ROWS["price"])
    with pytest.raises(OperatorError, match="Column user is of type double"):
        layout_schema("fuxictr", floats.schema, FORM)


def test_names_that_yaml_would_read_otherwise_are_quoted() -> None:
    rows = ROWS.rename_columns(
        ["yes: no" if name == "price" else name for name in ROWS.column_names]
    )
    (text,) = layout_config("fuxictr", rows.schema, FORM).values()
    found = yaml.safe_load(text)["courier"]["feature_cols"]
    assert "yes: no" in {column["name"] for column in found}


# ---- TorchEasyRec ------------------------------------------------------------------------------


def test_every_column_is_of_a_type_that_torcheasyrec_takes() -> None:
    found = to_layout("torcheasyrec", ROWS, FORM)
    for field in found.schema:
        assert field.type in AVAILABLE, field


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        (pa.bool_(), pa.int32()),
        (pa.uint16(), pa.int32()),
        (pa.uint32(), pa.int64()),
        (pa.float16(), pa.float32()),
        (pa.large_string(), pa.string()),
        (pa.date64(), pa.int32()),
        (pa.timestamp("ns"), pa.int64()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (pa.large_list(pa.int8()), pa.list_(pa.int32())),
        (pa.list_(pa.list_(pa.float16(), 3)), pa.list_(pa.list_(pa.float32()))),
        (pa.map_(pa.string(), pa.float32()), pa.map_(pa.string(), pa.float32())),
        (pa.uint64(), None),
        (pa.decimal128(9, 2), None),
        (pa.binary(), None),
        (pa.time64("us"), None),
        (pa.null(), None),
        (pa.struct([("a", pa.int32())]), None),
        (pa.list_(pa.timestamp("us")), None),
        (pa.list_(pa.list_(pa.list_(pa.int32()))), None),
        (pa.list_(pa.map_(pa.string(), pa.int32())), None),
        (pa.map_(pa.float32(), pa.int32()), None),
        (pa.map_(pa.string(), pa.bool_()), None),
    ],
    ids=str,
)
def test_types_are_cast_or_refused_by_name(type: pa.DataType, expected: pa.DataType | None) -> None:
    assert torcheasyrec_type(type) == expected
    assert expected is None or expected in AVAILABLE
    rows = with_column("extra", pa.nulls(len(ROWS), type))
    if expected is None:
        with pytest.raises(OperatorError, match="Column extra is of type"):
            to_layout("torcheasyrec", rows, FORM)
    else:
        assert to_layout("torcheasyrec", rows, FORM)["extra"].type == expected


def test_times_are_microseconds_and_days_are_days() -> None:
    nanoseconds = pa.array([-1, 1_999] + [0] * 498).cast(pa.timestamp("ns", "Asia/Tokyo"))
    days = pa.array([dt.date(1970, 1, 3)] * 500, pa.date64())
    rows = with_column("day", days, with_column("moment", nanoseconds))
    found = to_layout("torcheasyrec", rows, FORM)
    assert found["moment"].to_pylist()[1] == 1
    assert found["day"].to_pylist()[0] == 2
    assert found["at"].equals(ROWS["at"].cast(pa.int64()))


def test_lists_of_a_sequence_group_have_the_length_of_the_history() -> None:
    found = to_layout("torcheasyrec", ROWS, FORM)
    group = [name for name in found.column_names if name.startswith(f"{HISTORY}__")]
    assert {name.removeprefix(f"{HISTORY}__") for name in group} == {
        "sim_scores", "sim_mask", "sim_bucket", "cluster_ids", "cluster_fine", "item_ids",
    }  # fmt: skip
    lengths = [max(n, 1) for n in ROWS["history_len"].to_pylist()]
    assert set(lengths) == set(range(1, PLACES + 1))
    for name in group:
        assert [len(one) for one in found[name].to_pylist()] == lengths


def blocks(text: str, name: str) -> list[str]:
    """Returns the messages called `name` that are in a configuration, at any depth."""
    return [
        found[2]
        for found in re.finditer(rf"^( *){name} \{{\n(.*?)^\1\}}$", text, re.DOTALL | re.MULTILINE)
    ]


def test_torcheasyrec_knows_the_size_of_each_table_and_its_columns() -> None:
    (text,) = layout_config("torcheasyrec", ROWS.schema, FORM).values()
    columns = to_layout("torcheasyrec", ROWS, FORM).column_names
    (group,) = blocks(text, "sequence_feature")
    assert f'sequence_name: "{HISTORY}"' in group
    assert f"sequence_length: {PLACES}\n" in group
    inside = blocks(group, "id_feature") + blocks(group, "raw_feature")
    sizes = {}
    for block in blocks(text, "id_feature") + blocks(text, "raw_feature"):
        told = dict(re.findall(r"^ *(\w+): (.*)$", block, re.MULTILINE))
        name = told["feature_name"].strip('"')
        assert told["expression"].strip('"').partition(":")[2] == name
        column = f"{HISTORY}__{name}" if block in inside else name
        assert column in columns
        if "num_buckets" in told:
            sizes[column] = int(told["num_buckets"]), told["embedding_name"].strip('"')
    assert sizes == {
        "cluster_id": (MAX_IDS["main"] + 1, "cluster_id"),
        "cluster_fine": (MAX_IDS["fine"] + 1, "cluster_fine"),
        f"{HISTORY}__cluster_ids": (MAX_IDS["main"] + 1, "cluster_id"),
        f"{HISTORY}__cluster_fine": (MAX_IDS["fine"] + 1, "cluster_fine"),
        f"{HISTORY}__sim_bucket": (TIERS + 1, "sim_bucket"),
        "top_positions": (PLACES + 1, "top_positions"),
    }
    assert text.count("{") == text.count("}")
    assert f"value_dim: {TIERS}" in text
    assert 'label_fields: "label"' in text


def test_a_name_that_the_sequence_group_takes_is_refused() -> None:
    rows = with_column(f"{HISTORY}__sim_scores", ROWS["price"])
    with pytest.raises(OperatorError, match=f"{HISTORY}__sim_scores"):
        layout_schema("torcheasyrec", rows.schema, FORM)


def test_a_set_without_columns_of_the_history_has_no_sequence_group() -> None:
    left = [f.name for f in features(ROWS.schema, FORM) if f.history]
    (text,) = layout_config("torcheasyrec", ROWS.drop_columns(left).schema, FORM).values()
    assert "sequence_feature" not in text


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_tiers_of_muse_are_taken_too(name: str) -> None:
    tiers = list_column(np.ones((500, 22), np.float32), FLOATS)
    rows, form = with_column("simtier", tiers), replace(FORM, tiers=22)
    assert to_layout(name, rows, form)["simtier"].type == FLOATS
    (text,) = layout_config(name, rows.schema, form).values()
    assert re.search(r"simtier.*\n?.*(pretrain_dim|value_dim): 22", text)
