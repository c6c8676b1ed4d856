"""Columns of every type that writers make are brought to plain types, or refused by the footer."""

import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_jobs import inputs
from feature_jobs.impressions.scoring import ScoreForm
from feature_jobs.impressions.simscore import score_impressions
from feature_jobs.inputs import plain_type
from feature_jobs.items.item_vectors import items_of_answers, no_answers
from feature_jobs.schemas import USER_SIMSCORES, DataContractError
from feature_jobs.store import partitions
from feature_jobs.store.pieces import read_pieces, write_pieces
from tests.support.day_tables import (
    catalogue,
    impressions,
    open_catalogue,
    open_impressions,
    read,
    refusal,
    write,
)

UUIDS = [bytes([n]) * 16 for n in range(2)]
LIST, BIG, VIEW, BYTES = pa.list_, pa.large_list, pa.string_view(), pa.binary_view()


def extension(kind: pa.DataType, values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


# Three values of a carried column, the plain type in which they arrive, and the values.
CARRIED: dict[str, tuple[pa.Array, pa.DataType]] = {
    "JSON": (extension(pa.json_(), ['{"a": 1}', None, "[]"]), pa.string()),
    "UUID": (extension(pa.uuid(), [*UUIDS, None]), pa.binary(16)),
    "bool8": (extension(pa.bool8(), [1, None, 0]), pa.int8()),
    "opaque": (extension(pa.opaque(pa.int32(), "x", "y"), [1, None, 3]), pa.int32()),
    "tensor": (
        extension(pa.fixed_shape_tensor(pa.float32(), [2]), [[1, 2]] * 3), LIST(pa.float32(), 2),
    ),
    "string_view": (pa.array(["a", None, "longer than inline"], VIEW), pa.string()),
    "binary_view": (pa.array([b"a", None, b"\xff"], BYTES), pa.binary()),
    "list of views": (pa.array([["a", None], None, []], LIST(VIEW)), LIST(pa.string())),
    "large list of views": (pa.array([[b"a"], None, []], BIG(BYTES)), BIG(pa.binary())),
    "list of UUIDs": (
        pa.ListArray.from_arrays([0, 1, 2, 2], extension(pa.uuid(), UUIDS)), LIST(pa.binary(16)),
    ),
    "struct of JSON": (
        pa.StructArray.from_arrays([extension(pa.json_(), ["1", None, "2"])], ["x"]),
        pa.struct([("x", pa.string())]),
    ),
    "fixed_size_list": (pa.array([["a"], ["b"], ["c"]], LIST(VIEW, 1)), LIST(pa.string(), 1)),
    "struct of views": (
        pa.array([{"x": "a"}, None, {"x": None}], pa.struct([("x", VIEW)])),
        pa.struct([("x", pa.string())]),
    ),
    "list of structs": (
        pa.array([[{"x": 1}], None, []], LIST(pa.struct([("x", pa.int8())]))),
        LIST(pa.struct([("x", pa.int8())])),
    ),
    "map": (
        pa.array([[("a", "b")], None, []], pa.map_(pa.string(), VIEW)),
        pa.map_(pa.string(), pa.string()),
    ),
    "dictionary": (pa.array(["a", None, "a"]).dictionary_encode(), pa.string()),
    "list of dictionary": (
        pa.array([["a"], None, ["b", "a"]], LIST(pa.dictionary(pa.int32(), pa.string()))),
        LIST(pa.string()),
    ),
    "null": (pa.nulls(3), pa.null()),
    "half float": (pa.array(np.array([1, 2, 3], np.float16)), pa.float16()),
    "decimal": (pa.array([decimal.Decimal("1.5"), None, None]), pa.decimal128(2, 1)),
    "small decimal": (
        pa.array([decimal.Decimal("1.5")] * 3, pa.decimal32(9, 2)), pa.decimal32(9, 2),
    ),
    "duration": (pa.array([1, None, 3], pa.duration("us")), pa.duration("us")),
    "time": (pa.array([1, None, 3], pa.time64("us")), pa.time64("us")),
    "date": (pa.array([1, None, 3], pa.date32()), pa.date32()),
}  # fmt: skip
NOTHING_KNOWN = items_of_answers(no_answers(pa.int64()))


@pytest.mark.parametrize("case", CARRIED)
def test_a_carried_column_reaches_the_table_from_any_type(tmp_path: Path, case: str) -> None:
    values, kind = CARRIED[case]
    rows = impressions(x=values, history=pa.array([[1], [], [2]]))
    source = open_impressions(write(tmp_path, rows), carry=("x",))
    (field,) = source.carried
    found = read(source, carry=["x"])
    assert plain_type(values.type) == kind
    assert (field.type, found["x"].type) == (kind, kind)
    stored = values.cast(kind)
    assert found["x"].to_pylist() == stored.to_pylist()
    # Through all that its rows meet in SIMSCORE.
    pieces = [piece for _, piece in write_pieces(str(tmp_path / "p"), found, np.array([1, 0, 1]))]
    scored, _ = score_impressions(
        read_pieces(pieces, found), NOTHING_KNOWN, ScoreForm(2, ("history_item_ids",))
    )
    for name in ("encoder_id", "codebook_id"):
        scored = scored.append_column(name, pa.array(["x"] * 3))
    schema = USER_SIMSCORES.schema(
        pa.int64(), pa.int64(), pa.string(), extra=source.carried, without=["feature_ds"]
    )
    limits = {"sim_scores": 2}
    partitions.write_part(str(tmp_path), USER_SIMSCORES, schema, scored, 0, 1, limits=limits)
    path = partitions.to_be_made(str(tmp_path), 1).path(0)
    made = partitions.read_parquet(path, ["item_id", "x"]).sort_by("item_id")
    assert made["x"].to_pylist() == stored.to_pylist()


VIEWS = {
    "list_view": pa.list_view(pa.int64()),
    "large_list_view": pa.large_list_view(VIEW),
    "struct of list_view": pa.struct([("x", pa.list_view(pa.int64()))]),
    "dictionary of views": pa.dictionary(pa.int32(), VIEW),
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_column_that_cannot_be_carried_is_refused_by_the_footer(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = write(tmp_path, impressions(x=[1, 2, 3]))
    (path,) = open_impressions(template).paths
    metadata, schema = inputs.read_footer(path)
    schema = schema.set(schema.get_field_index("x"), pa.field("x", VIEWS[case]))
    monkeypatch.setattr(inputs, "read_footer", lambda _: (metadata, schema))
    refusal(
        DataContractError,
        lambda: open_impressions(template, carry=("x",)),
        "'x'", "impressions", str(VIEWS[case]), path, "cannot be carried", "Cast it",
    )  # fmt: skip
    assert open_impressions(template).rows == 3  # nobody else minds it


def test_a_null_among_lists_of_a_fixed_size_is_told_as_that(tmp_path: Path) -> None:
    values = pa.array([[1, 2], None, [3, 4]], LIST(pa.int64(), 2))
    source = open_impressions(write(tmp_path, impressions(x=values)), carry=("x",))
    told = refusal(DataContractError, lambda: read(source, carry=["x"]), source.paths[0])
    assert "null in a column of lists of a fixed size" in told
    assert "damaged" not in told


@pytest.mark.parametrize("case", ["JSON", "string_view", "dictionary"])
def test_titles_of_any_text_are_read(tmp_path: Path, case: str) -> None:
    values, _ = CARRIED[case]
    source = open_catalogue(write(tmp_path, catalogue(title=values.slice(0, 2))))
    assert read(source, ["title"])["title"].type == pa.string()


def test_clicks_of_bool8_are_read(tmp_path: Path) -> None:
    source = open_impressions(
        write(tmp_path, impressions(clicked=extension(pa.bool8(), [1, 0, 1])))
    )
    assert read(source)["clicked"].to_pylist() == [True, False, True]


# ---- Histories ---------------------------------------------------------------------------------

INTS, TEXTS = [[1, 2], None, []], [["a", "b"], None, []]
HISTORIES = {
    "list of string_view": (TEXTS, LIST(VIEW)),
    "large list of string_view": (TEXTS, BIG(VIEW)),
    "list of large_string": (TEXTS, LIST(pa.large_string())),
    "list of dictionary": (TEXTS, LIST(pa.dictionary(pa.int8(), pa.string()))),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_logged_history_is_read_from_every_list_of_ids(tmp_path: Path, case: str) -> None:
    values, kind = HISTORIES[case]
    of_text = isinstance(values[0][0], str)
    items = {"item_id": pa.array(["a", "b", "c"])} if of_text else {}
    source = open_impressions(write(tmp_path, impressions(history=pa.array(values, kind), **items)))
    found = read(source)["history"]
    assert found.type == pa.list_(pa.string() if of_text else pa.int64())
    assert pc.fill_null(found, pa.scalar([], found.type)).to_pylist() == [v or [] for v in values]


UNUSABLE = {
    "fixed_size_list": pa.array([[1, 2]] * 3, LIST(pa.int64(), 2)),
    "list of structs": pa.array([[{"item": 1}], [], []]),
    "list of lists": pa.array([[[1]], [], []]),
    "list of floats": pa.array([[1.0], [], []]),
    "list_view": pa.array([[1], [2], []], pa.list_view(pa.int64())),
    "list of UUIDs": CARRIED["list of UUIDs"][0],
    "map": pa.array([[("a", 1)], [], []], pa.map_(pa.string(), pa.int64())),
    "text": pa.array(["1,2", "", ""]),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_history_that_is_no_list_of_ids_is_refused_by_the_footer(
    tmp_path: Path, case: str
) -> None:
    template = write(tmp_path, impressions(history=UNUSABLE[case]))
    refusal(
        DataContractError,
        lambda: open_impressions(template),
        "'history'", str(UNUSABLE[case].type).split("<")[0], "must be a list of int64 or string",
        "0.parquet",
    )  # fmt: skip


# ---- Two columns of one name -------------------------------------------------------------------


def twice(rows: pa.Table, name: str) -> pa.Table:
    """Returns `rows` with a second column of a name, as a join without suffixes leaves it."""
    return rows.append_column(name, rows[name])


@pytest.mark.parametrize("column", ["item_id", "click_time", "price"])
def test_two_columns_of_one_name_are_told_where_one_is_used(tmp_path: Path, column: str) -> None:
    rows = impressions(price=[1, 2, 3], click_time=impressions()["event_time"])
    template = write(tmp_path, rows, twice(rows, column))
    refusal(
        DataContractError,
        lambda: open_impressions(template, carry=("price",)),
        "impressions table has 2 columns", repr(column), "1.parquet", "Rename or drop one",
    )  # fmt: skip


def test_two_columns_that_nobody_reads_do_no_harm(tmp_path: Path) -> None:
    source = open_impressions(write(tmp_path, twice(impressions(price=[1, 2, 3]), "price")))
    assert read(source)["item_id"].to_pylist() == [1, 2, 3]
