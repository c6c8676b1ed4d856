"""Tests which files are a day's table, and that those damaged or of other types are refused.

All but damage shows itself in footers, before a row is read.
"""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.api_core.exceptions import Forbidden
from google.cloud.storage import Blob

from feature_jobs import inputs
from feature_jobs.inputs import CATALOGUE_COLUMNS, IMPRESSION_COLUMNS
from feature_jobs.schemas import (
    TIMESTAMP,
    CourierError,
    DataContractError,
    InputNotReady,
    OperatorError,
    StorageUnavailable,
)
from feature_jobs.store import day_names, faults, files
from feature_jobs.store.day_names import literal
from tests.support.buckets import upload
from tests.support.day_tables import (
    DS,
    NOON,
    WANTED,
    catalogue,
    impressions,
    open_catalogue,
    open_impressions,
    read,
    refusal,
    write,
)
from tests.support.ill_disk import watch_disk

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


SPELT = {
    "dt={ds:%Y%m%d}": f"dt={DS:%Y%m%d}", "{ds:%Y/%m/%d}": f"{DS:%Y/%m/%d}",
    "year={ds:%Y}/month={ds:%-m}/day={ds:%-d}": f"year={DS.year}/month={DS.month}/day={DS.day}",
}  # fmt: skip


@pytest.mark.parametrize("template", SPELT)
def test_a_template_spells_the_day_as_the_shop_does(tmp_path: Path, template: str) -> None:
    for day in (SPELT[template], "other"):
        (tmp_path / day).mkdir(parents=True)
        pq.write_table(impressions(), tmp_path / day / "0.parquet")
    for typed in (template, f"{template}/*.parquet"):
        assert open_impressions(str(tmp_path / typed)).rows == 3
        assert inputs.find_days(str(tmp_path / typed)) == [DS]


ENDINGS = ["0.pq", "0.parq", "0.PARQUET", "0.snappy.parquet", "000000_0", "20260302_00_xy"]


@pytest.mark.parametrize("name", ENDINGS)
def test_a_folder_has_files_with_the_endings_that_engines_give(tmp_path: Path, name: str) -> None:
    write(tmp_path, impressions())
    pq.write_table(impressions(), tmp_path / f"ds={DS}" / name)
    (tmp_path / f"ds={DS}" / "notes.txt").write_text("no data")
    for template in ("ds={ds}", "ds={ds}/"):
        assert open_impressions(str(tmp_path / template)).rows == 6
    assert inputs.find_days(str(tmp_path / "ds={ds}")) == [DS]


@pytest.mark.parametrize(
    "name", ["log-{ds}.dat", "log-{ds}.pq", "log-{ds}", "log-{ds}*", "*-{ds}.*"]
)
def test_a_file_that_is_typed_may_have_any_name(tmp_path: Path, name: str) -> None:
    pq.write_table(impressions(), tmp_path / name.replace("{ds}", str(DS)).replace("*", "log"))
    assert open_impressions(str(tmp_path / name)).rows == 3
    assert inputs.find_days(str(tmp_path / name)) == [DS]


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    """Spark writes the folder log.parquet where one says .parquet("log.parquet")."""
    template, folder = str(tmp_path / "{ds}.parquet"), tmp_path / f"{DS}.parquet"
    folder.mkdir()
    pq.write_table(impressions(), folder / "part-00000.snappy.parquet")
    (tmp_path / "_SUCCESS").touch()  # says nothing of that day
    assert open_impressions(template).rows == 3
    refusal(InputNotReady, lambda: open_impressions(template, require_success=True), "no _SUCCESS")
    (folder / "_SUCCESS").touch()
    assert open_impressions(template, require_success=True).rows == 3


@pytest.mark.parametrize("below", ["", "hour=03/"])
@pytest.mark.parametrize("success", [False, True])
def test_files_that_are_not_looked_for_are_told(tmp_path: Path, below: str, success: bool) -> None:
    folder = tmp_path / f"ds={DS}"
    (folder / below).mkdir(parents=True)
    (folder / below / "0.csv").write_text("user_id\n")
    if success:
        (folder / "_SUCCESS").touch()
    message = refusal(
        DataContractError if success else InputNotReady,
        lambda: open_impressions(str(tmp_path / "ds={ds}")),
        f"1 other file(s), such as {folder}/{below}0.csv", ".parquet, .parq, .pq or none",
    )  # fmt: skip
    assert ("would publish empty tables" in message) == success


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("[x]/year={ds:%Y}/month={ds:%-m}/day={ds:%d}", "000000_0"),
        ("{ds}.parquet", "part-0.snappy.parquet"),
        ("dt={ds:%Y%m%d}", "0.pq"),
    ],
)
def test_a_day_in_a_bucket_is_found_like_one_on_a_disk(
    tmp_path: Path, near_bucket: str, template: str, name: str
) -> None:
    folder = day_names.name_of(template, DS)
    pq.write_table(impressions(), tmp_path / name)
    upload(tmp_path, f"{near_bucket}/log/{folder}")
    full = f"{literal(near_bucket)}/log/{template.replace('[', '[[]', 1)}"
    assert open_impressions(full).rows == 3
    assert inputs.find_days(full) == [DS]
    refusal(InputNotReady, lambda: open_impressions(full, require_success=True), "no _SUCCESS")
    files.write_bytes(f"{near_bucket}/log/{folder}/_SUCCESS", b"")
    assert open_impressions(full, require_success=True).rows == 3
    files.delete(f"{near_bucket}/log/{folder}/{name}")
    files.write_bytes(f"{near_bucket}/log/{folder}/hour=3/0.csv", b"")
    refusal(DataContractError, lambda: open_impressions(full), "hour=3/0.csv", "or none")


def test_a_day_of_nested_folders_has_its_success_above_them(tmp_path: Path) -> None:
    template = str(tmp_path / "ds={ds}/**/*.parquet")
    (tmp_path / f"ds={DS}/hour=03").mkdir(parents=True)
    pq.write_table(impressions(), tmp_path / f"ds={DS}/hour=03/0.parquet")
    refusal(InputNotReady, lambda: open_impressions(template, require_success=True), "no _SUCCESS")
    (tmp_path / f"ds={DS}/_SUCCESS").touch()
    assert open_impressions(template, require_success=True).rows == 3


def test_every_row_group_is_referred_to_once(tmp_path: Path) -> None:
    template = write(tmp_path, impressions(), impressions(), row_group_size=2)
    source = open_impressions(template)
    assert [len(groups) for groups in source.row_groups] == [2, 2]
    assert [(Path(g.path).name[0], g.index) for g in source.groups()] == [
        ("0", 0), ("0", 1), ("1", 0), ("1", 1),
    ]  # fmt: skip
    assert read(source)["item_id"].to_pylist() == [1, 2, 3, 1, 2, 3]


def test_a_day_without_a_partition_is_not_ready(tmp_path: Path) -> None:
    template = str(tmp_path / "ds={ds}")
    message = refusal(InputNotReady, lambda: open_impressions(template), "impressions", str(DS))
    assert (
        f"no file and no _SUCCESS at {tmp_path}/ds={DS}; a name with the ending .parquet" in message
    )
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


def test_a_closed_day_is_an_empty_one_and_has_no_files(tmp_path: Path) -> None:
    template = write(tmp_path)
    message = refusal(InputNotReady, lambda: open_impressions(template), f'closed_days = ["{DS}"]')
    assert "a _SUCCESS in the empty folder" in message
    closed = open_impressions(template, require_success=True, closed=True)
    assert (closed.rows, closed.groups()) == (0, [])
    (tmp_path / f"ds={DS}").mkdir(exist_ok=True)
    (tmp_path / f"ds={DS}" / "_SUCCESS").touch()
    assert open_impressions(template).identity() == closed.identity()
    write(tmp_path, impressions())
    refusal(OperatorError, lambda: open_impressions(template, closed=True), "closed_days", str(DS))


def test_files_of_other_days_in_one_folder_are_not_those_of_a_closed_day(tmp_path: Path) -> None:
    pq.write_table(impressions(), tmp_path / "2000-01-01.parquet")
    template = str(tmp_path / "{ds}.parquet")
    assert open_impressions(template, closed=True).rows == 0


def test_a_catalogue_of_a_closed_day_is_read(tmp_path: Path) -> None:
    write(tmp_path, catalogue())
    columns = {name: name for name in CATALOGUE_COLUMNS}
    template = str(tmp_path / "ds={ds}")
    assert inputs.open_source("catalogue", template, DS, columns, closed=True).rows == 2


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
    told = [(identity["digest"], identity["read_as"]) for identity in seen]
    assert len(set(told)) == len(seen)
    assert len({digest for digest, _ in told}) == len({read_as for _, read_as in told}) == 3


@pytest.mark.parametrize(
    ("options", "known"),
    [({}, 3), ({"row_group_size": 1}, 3), ({"write_statistics": ["item_id"]}, None)],
)
def test_footers_tell_how_many_items_have_an_image_where_they_have_statistics(
    tmp_path: Path, options: dict[str, object], known: int | None
) -> None:
    every = catalogue(item_id=[3, 4], image_uri=["b.jpg", "c.jpg"])
    source = open_catalogue(write(tmp_path, catalogue(), every, **options))
    assert (source.rows, source.image_uris) == (4, known)
    assert open_impressions(write(tmp_path / "log", impressions())).image_uris is None


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
    told = refusal(DataContractError, lambda: read(source), source.paths[0], "is gone since")
    assert "damaged" not in told


def test_a_file_that_may_not_be_read_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = write(tmp_path, impressions())
    source = open_impressions(template)

    def forbid(what: str, path: str) -> None:
        if path.endswith(".parquet"):
            raise PermissionError(errno.EACCES, "Permission denied", path)

    watch_disk(monkeypatch, forbid)
    monkeypatch.setattr(faults, "FORBIDDEN_SECONDS", 0.01)
    for work in (lambda: inputs.read_footer(source.paths[0]), lambda: read(source)):
        told_as_forbidden(work, source.paths[0])


def test_an_object_that_may_not_be_read_is_told_as_that(
    tmp_path: Path, near_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, impressions())
    source = open_impressions(f"{upload(tmp_path, near_bucket)}/ds={{ds}}")

    def forbid(*_: object, **__: object) -> bytes:
        raise Forbidden("no storage.objects.get access")

    monkeypatch.setattr(Blob, "download_as_bytes", forbid)
    monkeypatch.setattr(faults, "FORBIDDEN_SECONDS", 0.01)
    for work in (lambda: inputs.read_footer(source.paths[0]), lambda: read(source)):
        told_as_forbidden(work, source.paths[0])


def told_as_forbidden(work: Callable[[], object], path: str) -> None:
    with pytest.raises(StorageUnavailable, match="may not be read or written") as refused:
        work()
    message = str(refused.value)
    assert path in message
    assert "Give this account access" in message
    assert "damaged" not in message


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


def test_a_row_group_in_batches_is_read_on_after_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, numbers = str(tmp_path / "many.parquet"), np.arange(40 * 16, dtype=np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(numbers, 16)
    rows = pa.table({"sku": pa.array(range(40), pa.int32()), "clip": vectors})
    pq.write_table(rows, path, row_group_size=40, data_page_size=64)
    form = inputs.Form("vectors", DS, {"item_id": "sku", "vector": "clip"})
    faults_at, real = [0, 1, 3], inputs._Batches.read

    def read(batches: Any) -> Any:
        if faults_at and batches._done == faults_at[0]:
            faults_at.pop(0)
            batches.close()
            raise OSError(errno.EIO, "Input/output error", path)
        return real(batches)

    monkeypatch.setattr(inputs._Batches, "read", read)
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    group = inputs.RowGroup(path, 0, form)
    batches = list(inputs.read_in_batches(group, inputs.VECTOR_COLUMNS, 7))
    assert faults_at == []
    assert [len(batch) for batch in batches] == [7] * 5 + [5]
    found = pa.concat_tables(batches)
    assert found["item_id"].to_pylist() == list(range(40))
    assert found["item_id"].type == pa.int64()
    assert found["vector"].combine_chunks().flatten().to_numpy().tolist() == numbers.tolist()


def test_damaged_pages_of_a_batch_are_told(tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    vectors = pa.FixedSizeListArray.from_arrays(np.zeros(4096 * 16, np.float32) + 1, 16)
    rows = pa.table({"sku": range(4096), "clip": vectors})
    pq.write_table(rows, path, use_dictionary=False, compression="zstd")
    data = bytearray(path.read_bytes())
    at = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    data[at + 40 : at + 240] = bytes(200)
    path.write_bytes(data)
    form = inputs.Form("vectors", DS, {"item_id": "sku", "vector": "clip"})
    with pytest.raises(DataContractError, match="cannot be read as Parquet"):
        list(inputs.read_in_batches(inputs.RowGroup(str(path), 0, form), ["item_id", "vector"], 9))
