"""The shop's tables are taken in every usual form, and what cannot be used is refused by name."""

import datetime as dt
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs import inputs
from feature_jobs.inputs import CATALOGUE_COLUMNS, IMPRESSION_COLUMNS, OPTIONAL_COLUMNS
from feature_jobs.schemas import (
    TIMESTAMP,
    CourierError,
    DataContractError,
    InputNotReady,
    OperatorError,
)

DS = dt.date(2026, 3, 2)
NOON = dt.datetime(2026, 3, 2, 12, tzinfo=dt.UTC)
NAMES = {name: name for name in (*IMPRESSION_COLUMNS, *OPTIONAL_COLUMNS)}
WANTED = [*IMPRESSION_COLUMNS, *OPTIONAL_COLUMNS]
USERS = [900_001, 900_002, 900_003]


def impressions(**columns: Any) -> pa.Table:
    """Three rows; `columns` replace theirs, None leaves one out."""
    rows = {
        "user_id": pa.array(USERS),
        "item_id": pa.array([1, 2, 3]),
        "event_time": pa.array([NOON] * 3, TIMESTAMP),
        "clicked": pa.array([True, False, True]),
    }
    return pa.table({name: c for name, c in (rows | columns).items() if c is not None})


def catalogue(**columns: Any) -> pa.Table:
    rows = {"item_id": [1, 2], "image_uri": ["a.jpg", None], "category": ["dress", None]}
    return pa.table({name: c for name, c in (rows | columns).items() if c is not None})


def write(folder: Path, *files: pa.Table, **options: Any) -> str:
    """Files 0.parquet, 1.parquet, …; returns the template of the folder."""
    (folder / f"ds={DS}").mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        pq.write_table(rows, folder / f"ds={DS}" / f"{number}.parquet", **options)
    return str(folder / "ds={ds}")


def open_impressions(template: str, **settings: Any) -> inputs.Source:
    return inputs.open_source("impressions", template, DS, NAMES, **settings)


def open_catalogue(template: str) -> inputs.Source:
    columns = {name: name for name in (*CATALOGUE_COLUMNS, "title")}
    return inputs.open_source("catalogue", template, DS, columns)


def read(
    source: inputs.Source, wanted: Sequence[str] = WANTED, carry: Sequence[str] = ()
) -> pa.Table:
    return pa.concat_tables(inputs.read_rows(group, wanted, carry) for group in source.groups())


def refusal(kind: type[CourierError], work: Callable[[], object], *named: str) -> str:
    """The message that `work` is refused with: of this kind, one paragraph, naming what it must."""
    with pytest.raises(CourierError) as refused:
        work()
    assert type(refused.value) is kind
    status = {OperatorError: 2, DataContractError: 1, InputNotReady: 4}[kind]
    assert refused.value.exit_status == status
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for name in named:
        assert name in message
    assert not any(str(user) in message for user in USERS)
    return message


# ---- Finding -------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["ds={ds}", "ds={ds}/", "ds={ds}/*.parquet", "ds=*/?.parquet"])
def test_a_template_names_a_folder_or_a_glob(tmp_path: Path, template: str) -> None:
    write(tmp_path, impressions(), impressions())
    for name in ("_temporary.parquet", ".0.parquet.crc", "notes.txt"):
        (tmp_path / f"ds={DS}" / name).write_text("no data")
    source = open_impressions(str(tmp_path / template))
    assert source.rows == 6
    assert [Path(path).name for path in source.paths] == ["0.parquet", "1.parquet"]
    assert len(read(source)) == 6


def test_a_template_names_a_single_file(tmp_path: Path) -> None:
    pq.write_table(catalogue(), tmp_path / f"items-{DS}.parquet")
    for template in ("items-{ds}.parquet", f"items-{DS}.parquet"):
        source = open_catalogue(str(tmp_path / template))
        assert source.paths == (str(tmp_path / f"items-{DS}.parquet"),)
        assert read(source, CATALOGUE_COLUMNS).to_pylist() == catalogue().to_pylist()


def test_every_row_group_is_referred_to_once(tmp_path: Path) -> None:
    template = write(tmp_path, impressions(), impressions(), row_group_size=2)
    source = open_impressions(template)
    assert source.row_groups == (2, 2)
    assert [(Path(g.path).name[0], g.index) for g in source.groups()] == [
        ("0", 0), ("0", 1), ("1", 0), ("1", 1),
    ]  # fmt: skip
    assert read(source)["item_id"].to_pylist() == [1, 2, 3, 1, 2, 3]


def test_a_day_without_a_partition_is_not_ready(tmp_path: Path) -> None:
    template = str(tmp_path / "ds={ds}")
    message = refusal(InputNotReady, lambda: open_impressions(template), "impressions", str(DS))
    assert str(tmp_path / f"ds={DS}/*.parquet") in message
    (tmp_path / f"ds={DS}").mkdir()
    refusal(InputNotReady, lambda: open_impressions(template), "no file and no _SUCCESS")


def test_rows_without_success_are_not_ready_where_it_is_required(tmp_path: Path) -> None:
    template = write(tmp_path, impressions())
    refusal(
        InputNotReady,
        lambda: open_impressions(template, require_success=True),
        "impressions", str(DS), "no _SUCCESS",
    )  # fmt: skip
    assert open_impressions(template).rows == 3
    (tmp_path / f"ds={DS}" / "_SUCCESS").touch()
    assert open_impressions(template, require_success=True).rows == 3


@pytest.mark.parametrize("files", [0, 1, 2])
def test_no_row_is_an_empty_day_only_with_success(tmp_path: Path, files: int) -> None:
    template = write(tmp_path, *[impressions().slice(0, 0)] * files)
    refusal(InputNotReady, lambda: open_impressions(template), "impressions", str(DS), "_SUCCESS")
    (tmp_path / f"ds={DS}" / "_SUCCESS").touch()
    source = open_impressions(template, require_success=True)
    assert (source.rows, len(source.paths)) == (0, files)
    assert source.item_id == (pa.int64() if files else None)
    assert [len(inputs.read_rows(group, WANTED)) for group in source.groups()] == [0] * files


def test_an_identity_changes_with_files_and_settings_and_with_nothing_else(tmp_path: Path) -> None:
    template = write(tmp_path, impressions(score=[1, 2, 3]))
    seen = [open_impressions(template).identity()]
    assert open_impressions(template).identity() == seen[0]
    assert (seen[0]["ds"], seen[0]["files"], seen[0]["rows"]) == (str(DS), 1, 3)
    seen.append(open_impressions(template, carry=("score",)).identity())
    seen.append(open_impressions(template, input_timezone="Asia/Tokyo").identity())
    write(tmp_path, impressions(score=[1, 2, 30_000_000_000]))
    seen.append(open_impressions(template).identity())
    write(tmp_path, impressions(), impressions())
    seen.append(open_impressions(template).identity())
    assert len({identity["digest"] for identity in seen}) == len(seen)


# ---- Refused by footers ----------------------------------------------------------------------


@pytest.mark.parametrize("column", IMPRESSION_COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    template = write(tmp_path, impressions(), impressions(**{column: None}))
    message = refusal(
        DataContractError, lambda: open_impressions(template), "impressions", repr(column)
    )
    assert "1.parquet" in message
    assert "[impressions.columns]" in message


@pytest.mark.parametrize("column", CATALOGUE_COLUMNS)
def test_a_column_that_the_catalogue_lacks_is_named(tmp_path: Path, column: str) -> None:
    template = write(tmp_path, catalogue(**{column: None}))
    refusal(
        DataContractError, lambda: open_catalogue(template), "catalogue", repr(column), "0.parquet"
    )


def test_a_missing_column_comes_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    template = write(tmp_path, impressions(item_id=None, itemid=[1, 2, 3], zzz=[0, 0, 0]))
    refusal(
        DataContractError,
        lambda: open_impressions(template),
        "lacks the column 'item_id'", "Did you mean 'itemid'?", "zzz",
    )  # fmt: skip
    template = write(tmp_path, impressions(clicked=None))
    message = refusal(DataContractError, lambda: open_impressions(template), "'clicked'")
    assert "Did you mean" not in message


def test_a_missing_carried_column_is_named(tmp_path: Path) -> None:
    template = write(tmp_path, impressions(devise=["a", "b", "c"]))
    refusal(
        DataContractError,
        lambda: open_impressions(template, carry=("device",)),
        "'device'", "Did you mean 'devise'?", "0.parquet",
    )  # fmt: skip


NAIVE = pa.array([NOON.replace(tzinfo=None)] * 3)
WRONG = {
    "float ids": ("item_id", pa.array([1.0, 2.0, 3.0]), "double"),
    "uint64 ids": ("item_id", pa.array([1, 2, 3], pa.uint64()), "uint64"),
    "bool ids": ("user_id", pa.array([True, False, True]), "bool"),
    "binary ids": ("user_id", pa.array([b"a", b"b", b"c"]), "binary"),
    "decimal ids": ("user_id", pa.array([1, 2, 3]).cast(pa.decimal128(20)), "decimal"),
    "text times": ("event_time", pa.array(["2026-03-02"] * 3), "string"),
    "int times": ("event_time", pa.array([1, 2, 3]), "int64"),
    "dates": ("event_time", pa.array([DS] * 3), "date32"),
    "text clicks": ("clicked", pa.array(["yes", "no", "no"]), "string"),
    "float clicks": ("clicked", pa.array([0.0, 1.0, 0.0]), "double"),
    "text click times": ("click_time", pa.array(["x"] * 3), "string"),
    "float impression ids": ("impression_id", pa.array([1.0, 2.0, 3.0]), "double"),
    "a history of one item": ("history", pa.array([1, 2, 3]), "int64"),
    "a history of floats": ("history", pa.array([[1.0], [2.0], []]), "list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_column_of_a_wrong_type_is_named_with_both_types(tmp_path: Path, case: str) -> None:
    column, values, kind = WRONG[case]
    template = write(tmp_path, impressions(), impressions(**{column: values}))
    refusal(
        DataContractError,
        lambda: open_impressions(template),
        f"column {column!r} of the impressions table", kind, "1.parquet", "must be",
    )  # fmt: skip


@pytest.mark.parametrize("column", ["image_uri", "category"])
def test_a_catalogue_column_of_a_wrong_type_is_named(tmp_path: Path, column: str) -> None:
    template = write(tmp_path, catalogue(**{column: [1, 2]}))
    refusal(
        DataContractError, lambda: open_catalogue(template), repr(column), "int64", "must be string"
    )


TEXT_IDS = pa.array(["1", "2", "3"])
UNEVEN = {
    "item ids": ("item_id", TEXT_IDS, None),
    "user ids": ("user_id", TEXT_IDS, None),
    "impression ids": ("impression_id", TEXT_IDS, pa.array([1, 2, 3])),
    "click times in some": ("click_time", pa.array([NOON] * 3), None),
    "histories in some": ("history", pa.array([[1], [2], []]), None),
    "carried types": ("score", pa.array([1, 2, 3], pa.int32()), pa.array([1, 2, 3])),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", UNEVEN)
def test_files_that_differ_are_refused_naming_column_and_both_files(
    tmp_path: Path, case: str, turned: bool
) -> None:
    column, one, two = UNEVEN[case]
    files = [impressions(**{column: one}), impressions(**({column: two} if two else {}))]
    template = write(tmp_path, *(files[::-1] if turned else files))
    carry = ("score",) if column == "score" else ()
    message = refusal(
        DataContractError,
        lambda: open_impressions(template, carry=carry),
        column, "0.parquet", "1.parquet",
    )  # fmt: skip
    assert f"CAST({column} AS BIGINT)" in message


def test_files_that_differ_only_in_width_are_one_table(tmp_path: Path) -> None:
    narrow = impressions(
        item_id=pa.array([4, 5, 6], pa.int16()),
        event_time=pa.array([NOON] * 3, pa.timestamp("ms", "Asia/Tokyo")),
        clicked=pa.array([0, 1, 1], pa.int8()),
        further=[1, 2, 3],
    )
    source = open_impressions(write(tmp_path, impressions(), narrow))
    assert read(source)["item_id"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert read(source)["event_time"].to_pylist() == [NOON] * 6


def test_a_history_of_other_ids_than_the_items_is_refused(tmp_path: Path) -> None:
    template = write(tmp_path, impressions(history=pa.array([["1"], [], ["2"]])))
    refusal(
        DataContractError,
        lambda: open_impressions(template),
        "item_id", "'history'", "int64", "string", "0.parquet", "CAST(item_id AS BIGINT)",
    )  # fmt: skip


def test_ids_of_two_types_in_two_tables_are_refused_naming_the_cast(tmp_path: Path) -> None:
    shown = open_impressions(write(tmp_path / "i", impressions()))
    shop = open_catalogue(write(tmp_path / "c", catalogue(item_id=["1", "2"])))
    message = refusal(
        DataContractError,
        lambda: inputs.common_id_type("item_id", [shown, shop], pa.int64()),
        "catalogue", "impressions", "int64", "string", "CAST(item_id AS BIGINT)",
    )  # fmt: skip
    assert message.count(str(DS)) == 2


def test_a_table_without_files_takes_the_id_type_of_the_others(tmp_path: Path) -> None:
    shop = open_catalogue(write(tmp_path / "c", catalogue(item_id=["1", "2"])))
    template = write(tmp_path / "i")
    (tmp_path / "i" / f"ds={DS}" / "_SUCCESS").touch()
    shown = open_impressions(template)
    assert inputs.common_id_type("item_id", [shown, shop], pa.int64()) == pa.string()
    assert inputs.common_id_type("user_id", [shown, shop], pa.int64()) == pa.int64()


@pytest.mark.parametrize("column", ["event_time", "click_time"])
def test_times_without_a_zone_are_the_operators_to_explain(tmp_path: Path, column: str) -> None:
    template = write(tmp_path, impressions(**{column: NAIVE}))
    refusal(
        OperatorError,
        lambda: open_impressions(template),
        repr(column), "impressions", "0.parquet", 'input_timezone = "UTC"',
    )  # fmt: skip
    assert open_impressions(template, input_timezone="UTC").rows == 3


# ---- Damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, damage: str) -> None:
    template = write(tmp_path, impressions(), impressions())
    path = tmp_path / f"ds={DS}" / "1.parquet"
    data = path.read_bytes()
    path.write_bytes(
        {"garbage": b"no parquet\n" * 9, "empty": b"", "truncated": data[:-20]}[damage]
    )
    refusal(DataContractError, lambda: open_impressions(template), str(path), "cannot be read")


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    source = open_impressions(write(tmp_path, impressions()))
    Path(source.paths[0]).unlink()
    refusal(DataContractError, lambda: read(source), source.paths[0])


def many() -> pa.Table:
    numbers = random.Random(0).sample(range(10**6), 20_000)
    return impressions(
        user_id=pa.array(numbers),
        item_id=pa.array([f"item-{number % 5000}" for number in numbers]),
        event_time=pa.array([NOON] * len(numbers), TIMESTAMP),
        clicked=pa.array([number % 7 == 0 for number in numbers]),
    )


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip"])
def test_a_damaged_page_is_found_by_who_reads_it(tmp_path: Path, compression: str) -> None:
    source = open_impressions(write(tmp_path, many(), compression=compression))
    path = Path(source.paths[0])
    data = bytearray(path.read_bytes())
    assert len(data) > 20_000
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
    path.write_bytes(data)
    opened = open_impressions(str(path))  # footers cannot tell
    assert opened.rows == 20_000
    refusal(DataContractError, lambda: read(opened), str(path), "cannot be read as Parquet")


def test_a_flipped_bit_in_a_footer_is_refused_in_our_words_or_does_no_harm(tmp_path: Path) -> None:
    template = write(tmp_path, impressions())
    path = tmp_path / f"ds={DS}" / "0.parquet"
    whole = path.read_bytes()
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = []
    for at in range(start, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            read(open_impressions(template))
        except CourierError as error:  # anything else fails the test
            refused.append(str(error))
    assert len(refused) > 20
    assert len(set(refused)) > 5
    assert not any("\n" in message for message in refused)


# ---- Refused by rows -------------------------------------------------------------------------


@pytest.mark.parametrize("column", [*IMPRESSION_COLUMNS, "impression_id"])
def test_a_null_where_a_value_is_needed_is_counted_and_named(tmp_path: Path, column: str) -> None:
    rows = impressions(impression_id=["a", "b", "c"])
    values = pa.array([None, *rows[column].to_pylist()[1:]], rows[column].type)
    rows = rows.set_column(rows.column_names.index(column), column, values)
    source = open_impressions(write(tmp_path, rows))
    refusal(
        DataContractError,
        lambda: read(source),
        f"column {column!r} of the impressions table", "1 rows", "0.parquet",
    )  # fmt: skip
    others = [name for name in rows.column_names if name != column]
    assert len(read(source, others)) == 3  # who does not need the column reads the rows


def test_an_item_without_an_id_is_refused(tmp_path: Path) -> None:
    source = open_catalogue(write(tmp_path, catalogue(item_id=[1, None])))
    refusal(DataContractError, lambda: read(source, CATALOGUE_COLUMNS), "'item_id'", "catalogue")


def test_nulls_that_mean_something_are_kept(tmp_path: Path) -> None:
    source = open_catalogue(write(tmp_path, catalogue()))
    assert read(source, CATALOGUE_COLUMNS).to_pylist() == catalogue().to_pylist()
    optional = {
        "click_time": pa.array([NOON, None, None], TIMESTAMP),
        "request_id": pa.array(["r", None, None]),
        "history": pa.array([[1, 2], None, []]),
    }
    rows = read(open_impressions(write(tmp_path, impressions(**optional))))
    assert rows["request_id"].to_pylist() == ["r", None, None]
    assert rows["click_time"].to_pylist() == [NOON, None, None]
    assert rows["history"].to_pylist() == [[1, 2], None, []]


def test_titles_are_read_where_the_catalogue_has_them(tmp_path: Path) -> None:
    wanted = [*CATALOGUE_COLUMNS, "title"]
    without = open_catalogue(write(tmp_path / "without", catalogue()))
    assert read(without, wanted).column_names == [*CATALOGUE_COLUMNS]
    titles = pa.array(["Silk dress", None], pa.large_string())
    source = open_catalogue(write(tmp_path / "with", catalogue(title=titles)))
    rows = read(source, wanted)
    assert rows.column_names == wanted
    assert rows["title"].type == pa.string()
    assert rows["title"].to_pylist() == ["Silk dress", None]
    assert read(source, CATALOGUE_COLUMNS).equals(read(without, CATALOGUE_COLUMNS))


def test_a_title_that_is_no_text_is_refused(tmp_path: Path) -> None:
    template = write(tmp_path, catalogue(title=[1, 2]))
    refusal(DataContractError, lambda: open_catalogue(template), "'title'", "must be string")


@pytest.mark.parametrize("clicks", [[0, 1, 2], [0, -1, 1]])
def test_a_click_that_is_neither_0_nor_1_is_refused(tmp_path: Path, clicks: list[int]) -> None:
    source = open_impressions(write(tmp_path, impressions(clicked=pa.array(clicks, pa.int8()))))
    bounds = f"{min(clicks)} to {max(clicks)}"
    refusal(
        DataContractError, lambda: read(source), "'clicked'", "impressions", bounds, "0.parquet"
    )


# ---- Taken in every usual form -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.int64()],
)
def test_narrower_ints_widen_to_int64(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array([1, 2, 127], kind)
    rows = impressions(item_id=ids, user_id=ids, history=pa.array([[1], [], [127]], pa.list_(kind)))
    source = open_impressions(write(tmp_path, rows))
    assert (source.item_id, source.user_id) == (pa.int64(), pa.int64())
    found = read(source)
    assert found["item_id"].type == found["user_id"].type == pa.int64()
    assert found["history"].type == pa.list_(pa.int64())
    assert found["item_id"].to_pylist() == [1, 2, 127]
    assert found["history"].to_pylist() == [[1], [], [127]]


def test_the_largest_ids_are_kept_exactly(tmp_path: Path) -> None:
    largest = [2**63 - 1, -(2**63), 2**53 + 1]
    source = open_impressions(write(tmp_path, impressions(item_id=pa.array(largest))))
    assert read(source)["item_id"].to_pylist() == largest
    wide = impressions(item_id=pa.array([2**32 - 1, 0, 1], pa.uint32()))
    assert read(open_impressions(write(tmp_path, wide)))["item_id"][0].as_py() == 2**32 - 1


STRINGS = {
    "string": lambda ids: ids,
    "large": lambda ids: ids.cast(pa.large_string()),
    "view": lambda ids: ids.cast(pa.string_view()),
    "dictionary": lambda ids: ids.dictionary_encode(),
    "large dictionary": lambda ids: ids.cast(pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("form", STRINGS)
def test_strings_of_every_form_become_strings(tmp_path: Path, form: str) -> None:
    ids = pa.array(["é", "a longer one than a view holds inline", "é"])
    widen = STRINGS[form](ids)
    shown = open_impressions(write(tmp_path / "i", impressions(item_id=widen, user_id=widen)))
    assert (shown.item_id, shown.user_id) == (pa.string(), pa.string())
    shop = open_catalogue(
        write(tmp_path / "c", pa.table({name: widen for name in CATALOGUE_COLUMNS}))
    )
    for source, names in ((shown, ("item_id", "user_id")), (shop, CATALOGUE_COLUMNS)):
        rows = read(source, names)
        for name in names:
            assert rows[name].type == pa.string()
            assert rows[name].to_pylist() == ids.to_pylist()


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list])
def test_histories_in_lists_of_either_size_become_lists(tmp_path: Path, lists: Callable) -> None:
    rows = impressions(history=pa.array([[3, 1], None, []], lists(pa.int32())))
    found = read(open_impressions(write(tmp_path, rows)))["history"]
    assert found.type == pa.list_(pa.int64())
    assert found.to_pylist() == [[3, 1], None, []]


@pytest.mark.parametrize("zone", ["UTC", "+00:00", "Asia/Shanghai", "America/New_York", "+05:30"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_every_unit_and_zone_become_microseconds_of_utc(
    tmp_path: Path, unit: str, zone: str
) -> None:
    times = pa.array([NOON] * 3, pa.timestamp(unit, zone))
    found = read(open_impressions(write(tmp_path, impressions(event_time=times, click_time=times))))
    assert found["event_time"].type == found["click_time"].type == TIMESTAMP
    assert found["event_time"].to_pylist() == found["click_time"].to_pylist() == [NOON] * 3


def test_nanoseconds_are_cut(tmp_path: Path) -> None:
    times = pa.array([1_999, 1_000, 999], pa.int64()).cast(pa.timestamp("ns", "UTC"))
    found = read(open_impressions(write(tmp_path, impressions(event_time=times))))
    assert found["event_time"].cast(pa.int64()).to_pylist() == [1, 1, 0]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_naive_times_are_local_through_every_clock_change(tmp_path: Path, unit: str) -> None:
    local = {
        "2026-01-15 12:00": "2026-01-15 17:00",  # winter
        "2026-07-15 12:00": "2026-07-15 16:00",  # summer
        "2026-03-08 01:59": "2026-03-08 06:59",
        "2026-03-08 02:00": "2026-03-08 07:00",  # the gap: the moment of the change
        "2026-03-08 02:30": "2026-03-08 07:00",
        "2026-03-08 03:00": "2026-03-08 07:00",
        "2026-03-08 03:01": "2026-03-08 07:01",
        "2026-11-01 00:59": "2026-11-01 04:59",
        "2026-11-01 01:30": "2026-11-01 05:30",  # the fold: the earlier of two
        "2026-11-01 02:00": "2026-11-01 07:00",
    }
    times = pa.array([dt.datetime.fromisoformat(t) for t in local], pa.timestamp(unit))
    ids = pa.array(range(len(local)))
    rows = pa.table(
        {"user_id": ids, "item_id": ids, "event_time": times, "clicked": [True] * len(local)}
    )
    source = open_impressions(write(tmp_path, rows), input_timezone="America/New_York")
    found = read(source)["event_time"]
    assert found.type == TIMESTAMP
    assert [t.strftime("%Y-%m-%d %H:%M") for t in found.to_pylist()] == list(local.values())


def test_a_zone_in_the_file_wins_over_the_setting(tmp_path: Path) -> None:
    source = open_impressions(write(tmp_path, impressions()), input_timezone="Asia/Tokyo")
    assert read(source)["event_time"].to_pylist() == [NOON] * 3


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.uint8(), pa.int64(), pa.uint64()])
def test_clicks_of_every_form_become_bools(tmp_path: Path, kind: pa.DataType) -> None:
    clicked = pa.array([1, 0, 1], pa.int8()).cast(kind)
    found = read(open_impressions(write(tmp_path, impressions(clicked=clicked))))["clicked"]
    assert found.type == pa.bool_()
    assert found.to_pylist() == [True, False, True]


def test_columns_go_by_the_shops_names_and_carried_ones_keep_their_type(tmp_path: Path) -> None:
    rows = impressions().rename_columns(["uid", "sku", "ts", "is_click"])
    rows = rows.append_column("price", pa.array([1.5, None, 2.5], pa.float32()))
    rows = rows.append_column("unused", pa.array(["x"] * 3))
    names = dict(zip(IMPRESSION_COLUMNS, rows.column_names[:4], strict=True))
    template = write(tmp_path, rows)
    source = inputs.open_source("impressions", template, DS, NAMES | names, carry=("price",))
    assert source.carried == (pa.field("price", pa.float32()),)
    assert source.form.columns == names  # the optional ones are not there
    found = read(source, WANTED, carry=["price"])
    assert found.column_names == [*IMPRESSION_COLUMNS, "price"]
    assert found["price"].type == pa.float32()
    assert found["price"].to_pylist() == [1.5, None, 2.5]
    assert read(source, ["item_id"]).column_names == ["item_id"]


# ---- Days ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "ds", "end", "hours"),
    [
        ("UTC", "2026-03-02", "2026-03-03T00:00", 24),
        ("Asia/Shanghai", "2026-03-02", "2026-03-02T16:00", 24),
        ("America/New_York", "2026-03-07", "2026-03-08T05:00", 24),
        ("America/New_York", "2026-03-08", "2026-03-09T04:00", 23),
        ("America/New_York", "2026-11-01", "2026-11-02T05:00", 25),
        ("America/Sao_Paulo", "2018-11-03", "2018-11-04T03:00", 24),
        ("America/Sao_Paulo", "2018-11-04", "2018-11-05T02:00", 23),  # it had no midnight
        ("America/Havana", "2026-10-31", "2026-11-01T04:00", 24),  # the first of two midnights
        ("America/Havana", "2026-11-01", "2026-11-02T05:00", 25),
        ("Asia/Kathmandu", "2026-03-02", "2026-03-02T18:15", 24),
    ],
)
def test_a_day_ends_where_the_next_begins_on_the_clock_of_its_zone(
    zone: str, ds: str, end: str, hours: int
) -> None:
    day = dt.date.fromisoformat(ds)
    found = inputs.day_end(day, zone)
    assert dt.datetime.fromtimestamp(found / 1e6, dt.UTC).isoformat()[:16] == end
    length = found - inputs.day_end(day - dt.timedelta(days=1), zone)
    assert length == hours * 3_600_000_000


def test_an_event_after_its_day_is_refused_with_an_item_and_no_user(tmp_path: Path) -> None:
    end = inputs.day_end(DS, "UTC")
    times = pa.array([end - 1, end, end + 5], pa.int64()).cast(TIMESTAMP)
    rows = impressions(item_id=pa.array([71, 72, 73]), event_time=times)
    (group,) = open_impressions(write(tmp_path, rows)).groups()
    found = inputs.read_rows(group, WANTED)
    refusal(
        DataContractError,
        lambda: inputs.check_day(group, found, end),
        "2 rows", "0.parquet", "item 72", "2026-03-03T00:00:00", str(DS), "day_timezone",
    )  # fmt: skip


def test_late_events_of_earlier_days_are_welcome(tmp_path: Path) -> None:
    end = inputs.day_end(DS, "UTC")
    times = pa.array([end - 1, 0, -5], pa.int64()).cast(TIMESTAMP)
    (group,) = open_impressions(write(tmp_path, impressions(event_time=times))).groups()
    found = inputs.read_rows(group, WANTED)
    assert found["event_time"].cast(pa.int64()).to_pylist() == [end - 1, 0, -5]
    assert inputs.check_day(group, found, end) is None
    assert inputs.check_day(group, found.slice(0, 0), end) is None
