"""`courier init` finds the vectors that a shop has of its items, and proposes to register them."""

import datetime as dt
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.store import day_names, files, usage
from feature_jobs.store.encoder_info import read_encoder_info
from pipelines import config
from pipelines.cli import main
from pipelines.first_look import vectors
from pipelines.first_look.look import FirstLook, look
from tests.support.buckets import upload
from tests.support.first_look import (
    DAYS,
    ITEMS,
    Shop,
    catalogue,
    noted,
    only_problem,
    problems,
    write,
)

DIMENSION = 32
ELSEWHERE = "--trained-elsewhere"
CENTRED = f"--ds {DAYS[0]} --centre"


def numbers(rows: int = ITEMS, dimension: int = DIMENSION) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, dimension)).astype("float32")


def lists(rows: int = ITEMS, dimension: int = DIMENSION) -> pa.Array:
    return pa.array(list(numbers(rows, dimension)), pa.list_(pa.float32()))


def in_bytes(rows: int = ITEMS, dimension: int = DIMENSION) -> pa.Array:
    return pa.array([row.tobytes() for row in numbers(rows, dimension)], pa.binary())


def beside(shop: Shop, days: tuple[str, ...] = DAYS, **columns: Any) -> Shop:
    """Writes the shop, and a table of vectors of these columns beside its catalogue."""
    shop.write()
    found = {"item_id": pa.array(range(ITEMS))} | columns
    table = {name: column for name, column in found.items() if column is not None}
    for ds in days:
        write(shop.folder / f"vectors/dt={ds}/part-0.parquet", table)
    return shop


def told(first: FirstLook) -> list[str]:
    assert problems(first) is not None  # checks every text
    return [f.text for f in first.findings if f.text.startswith("vectors: ")]


def proposed(first: FirstLook) -> list[str]:
    """Returns the commands that findings propose; the settings propose the first."""
    found = re.findall(r"`(courier register-vectors [^`]*)`", " ".join(told(first)))
    written = re.findall(r"^# {3}(courier register-vectors .*) >> courier.toml$", first.toml, re.M)
    assert written == found[:1]
    return found


# ---- In the catalogue ------------------------------------------------------------------------


def test_a_column_of_the_catalogue_is_proposed(shop: Shop) -> None:
    shop.catalogue["Clip_B32"] = lists()
    first = shop.write().look()
    assert problems(first) == []
    assert proposed(first) == [
        "courier register-vectors --name clip-b32 --path 'catalogue/dt={ds}/*.parquet' "
        f"--vector Clip_B32 {CENTRED} {ELSEWHERE}"
    ]
    (text,) = told(first)
    assert "100 rows of catalogue/dt={ds}/*.parquet have vectors of 32 numbers in" in text
    assert "100.0% of the sampled items have one" in text
    assert "--trained-on START END is right" in text


def test_items_without_a_vector_are_counted(shop: Shop) -> None:
    shop.catalogue["embedding"] = pa.array([None] * 16 + lists().to_pylist()[16:], lists().type)
    (text,) = told(shop.write().look())
    assert "75.0% of the sampled items have one" in text  # 48 of the 64 rows that are looked at


def test_a_shop_without_vectors_is_told_nothing_of_them(shop: Shop) -> None:
    shop.catalogue["thumbnail"] = pa.array([b"x" * (i + 64) for i in range(ITEMS)])
    shop.catalogue["sha256"] = pa.array([bytes(32)] * ITEMS)
    shop.catalogue["a\nline"] = lists()  # can be told in no command
    shop.catalogue["tags"] = pa.array([["a", "b"]] * ITEMS)
    first = shop.write().look()
    assert problems(first) == told(first) == proposed(first) == []
    assert "vectors of its items" not in first.toml


# ---- Beside it -------------------------------------------------------------------------------


def test_a_table_beside_the_catalogue_is_proposed(shop: Shop) -> None:
    first = beside(shop, embedding=lists()).look()
    assert problems(first) == []
    assert proposed(first) == [
        "courier register-vectors --name embedding --path 'vectors/dt={ds}/*.parquet' "
        f"--vector embedding {CENTRED} {ELSEWHERE}"
    ]
    assert "courier init-encoder --weights imagenet" in first.toml
    assert shop.settings(first).catalogue.image_roots == (f"{shop.folder}/images",)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("vectors.parquet", "vectors.parquet"),
        ("vectors-{ds}.parquet", "'vectors-{ds}.parquet'"),
        ("clip v1.5/part-0.parquet", "'clip v1.5/*.parquet'"),
        ("clip.parquet/part-0.parquet", "'clip.parquet/*.parquet'"),
        ("v/dt={ds:%Y%m%d}/a.pq", "'v/dt={ds:%Y%m%d}/*.pq'"),
        (
            "v/year={ds:%Y}/month={ds:%m}/day={ds:%d}/a.parquet",
            "'v/year={ds:%Y}/month={ds:%m}/day={ds:%d}/*.parquet'",
        ),
        ("catalogue/dt={ds}/clip/a.parquet", "'catalogue/dt={ds}/clip/*.parquet'"),
    ],
)
def test_a_table_is_found_whatever_its_files_are_called(
    shop: Shop, name: str, template: str
) -> None:
    shop.write()
    for ds in map(dt.date.fromisoformat, DAYS):
        path = shop.folder / day_names.name_of(name, ds)
        write(path, {"item_id": pa.array(range(ITEMS)), "embedding": lists()})
    (command,) = proposed(shop.look())
    assert f" --path {template} --vector embedding " in command


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), DIMENSION),
    ],
)
def test_lists_of_any_kind_of_floats_are_vectors(shop: Shop, kind: pa.DataType) -> None:
    rows = [row.astype(kind.value_type.to_pandas_dtype()) for row in numbers()]
    first = beside(shop, embedding=pa.array(rows, kind)).look()
    assert len(proposed(first)) == 1
    assert "have vectors of 32 numbers in 'embedding'" in told(first)[0]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(4 * DIMENSION)])
def test_bytes_of_one_length_are_taken_for_vectors_and_said_to_be_bytes(
    shop: Shop, kind: pa.DataType
) -> None:
    first = beside(shop, blob=in_bytes().cast(kind)).look()
    (command,) = proposed(first)
    assert f"--vector blob --as-bytes {CENTRED}" in command
    assert "have bytes, taken for vectors of 32 numbers in 'blob'" in told(first)[0]


def test_item_ids_of_another_name_are_named(shop: Shop) -> None:
    first = beside(shop, item_id=pa.array([0.5] * ITEMS), sku=pa.array(range(ITEMS)), v=lists())
    write(shop.folder / "more.parquet", {"product_id": pa.array(range(ITEMS)), "a b": lists()})
    found = proposed(first.look())
    assert [re.search(r"--vector (\S+|'.*?') --item (\S+)", c).groups() for c in found] == [
        ("'a b'", "product_id")
    ]


def test_of_several_columns_the_first_is_proposed_and_the_others_named(shop: Shop) -> None:
    first = beside(shop, box=lists(dimension=4), clip=lists(), dino=lists(), b=in_bytes()).look()
    (command,) = proposed(first)
    assert "--vector clip" in command
    assert "there are also 'dino', 'b'" in told(first)[-1]


def test_the_share_is_of_the_catalogues_items(shop: Shop) -> None:
    ids = pa.array([*range(75), *range(1000, 1025)])
    (text,) = told(beside(shop, item_id=ids, embedding=lists()).look())
    assert "100 rows of" in text
    assert "75.0% of the sampled items have one" in text


def test_vectors_of_other_things_are_not_proposed(shop: Shop) -> None:
    first = beside(shop, item_id=pa.array(range(1000, 1000 + ITEMS)), embedding=lists()).look()
    assert told(first) == proposed(first) == []


def test_of_a_large_table_no_column_is_read_as_a_whole(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_IDS", ITEMS - 1)
    monkeypatch.setattr(vectors, "read_column", None)
    beside(shop, embedding=lists())
    (text,) = told(shop.look())
    assert "which items they are of was not looked at" in text


def test_of_a_large_row_group_only_the_first_pages_are_read(shop: Shop) -> None:
    rows, path = 16_000, shop.write().folder / "vectors.parquet"
    flat = pa.array(numbers(rows, 512).ravel())
    table = {"item_id": pa.array(range(rows)), "v": pa.FixedSizeListArray.from_arrays(flat, 512)}
    write(path, table, row_group_size=rows)
    usage.take()
    assert len(proposed(shop.look())) == 1
    assert usage.take().bytes_read < path.stat().st_size / 2


def test_the_newest_day_that_the_catalogue_knows_is_looked_at(shop: Shop) -> None:
    beside(shop, embedding=lists())
    later = {"item_id": pa.array(range(50)), "embedding": lists(50)}
    write(shop.folder / "vectors/dt=2026-01-08/part-0.parquet", later)
    (text,) = told(shop.look())
    assert text.startswith("vectors: 100 rows")


def test_days_without_vectors_are_none_to_centre_on(shop: Shop) -> None:
    (command,) = proposed(beside(shop, DAYS[1:], embedding=lists()).look())
    assert "--centre" not in command


def test_a_table_beside_the_catalogue_in_a_bucket_is_found(shop: Shop, bucket: str) -> None:
    upload(beside(shop, embedding=lists()).folder, bucket)
    first = look(f"{bucket}/catalogue", f"{bucket}/impressions", [], str(shop.folder))
    assert problems(first) == []
    assert f" --path '{bucket}/vectors/dt={{ds}}/*.parquet' " in proposed(first)[0]


def test_folders_of_images_are_not_listed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    list_names = files.list_names
    monkeypatch.setattr(
        files, "list_names", lambda folder: listed.append(folder) or list_names(folder)
    )
    beside(shop, embedding=lists()).look()
    assert str(shop.folder / "vectors") in listed
    assert str(shop.folder / "images") not in listed


# ---- What is wrong with vectors --------------------------------------------------------------


def test_vectors_of_differing_lengths_are_told(shop: Shop) -> None:
    rows = [row[: 16 if i in (3, 5) else DIMENSION] for i, row in enumerate(numbers())]
    first = beside(shop, embedding=pa.array(rows, pa.list_(pa.float32()))).look()
    fault, _ = told(first)
    assert "'embedding' of vectors/dt={ds}/*.parquet has another length than 32 in 2 of 64" in fault
    assert "would be rejected" in fault
    assert len(proposed(first)) == 1


def test_lists_of_many_lengths_are_no_vectors(shop: Shop) -> None:
    shop.catalogue["prices"] = pa.array([[1.0] * (i + 1) for i in range(ITEMS)])
    first = shop.write().look()
    assert "lists of many lengths: they are no vectors" in told(first)[0]
    assert proposed(first) == []


@pytest.mark.parametrize("dimension", [15, 2049])
def test_vectors_of_a_dimension_out_of_range_are_told(shop: Shop, dimension: int) -> None:
    first = beside(shop, embedding=lists(dimension=dimension)).look()
    assert f"has lists of {dimension:,} floats. Vectors of 16 to 2,048 are taken" in told(first)[0]
    assert proposed(first) == []


@pytest.mark.parametrize("dimension", [16, 2048])
def test_the_ends_of_the_range_are_taken(shop: Shop, dimension: int) -> None:
    assert len(proposed(beside(shop, embedding=lists(dimension=dimension)).look())) == 1


def test_vectors_of_ids_of_another_type_are_told_with_the_cast(shop: Shop) -> None:
    ids = pa.array(range(ITEMS)).cast(pa.string())
    first = beside(shop, item_id=ids, embedding=lists()).look()
    (text,) = told(first)
    assert "those of vectors/dt={ds}/*.parquet cannot be used: item_id is int64 in" in text
    assert "CAST(item_id AS BIGINT)" in text
    assert problems(first) == proposed(first) == []


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        (pa.array([0.5] * ITEMS), "item_id must be int64 or string"),
        (pa.array([None, *range(1, ITEMS)]), "'item_id' of the vectors table is null in 1 rows"),
    ],
)
def test_ids_that_cannot_be_used_are_told(shop: Shop, ids: pa.Array, fault: str) -> None:
    first = beside(shop, item_id=ids, embedding=lists()).look()
    assert fault in told(first)[0]
    assert proposed(first) == []


def test_a_column_without_a_vector_is_told(shop: Shop) -> None:
    first = beside(shop, embedding=pa.nulls(ITEMS, lists().type)).look()
    assert "is null in all 64 rows looked at" in told(first)[0]
    assert proposed(first) == []


def test_a_column_that_cannot_be_read_is_told_and_hides_no_other(shop: Shop) -> None:
    fixed = pa.list_(pa.float32(), DIMENSION)
    nulls = pa.array([None, *numbers()[1:].tolist()], fixed)
    first = beside(shop, a=nulls, b=lists()).look()
    assert "has a null in a column of lists of a fixed size" in told(first)[0]
    assert "--vector b" in proposed(first)[0]


def test_a_damaged_file_among_vectors_is_told(shop: Shop) -> None:
    beside(shop, embedding=lists())
    (shop.folder / f"vectors/dt={DAYS[-1]}/part-1.parquet").write_bytes(b"PAR1 and no more")
    first = shop.look()
    assert "cannot be read as Parquet" in told(first)[0]
    assert proposed(first) == []


def test_what_is_no_parquet_or_is_empty_is_passed_over(shop: Shop) -> None:
    (shop.folder / "notes.parquet").write_bytes(b"none")
    (shop.folder / "README").write_text("Vectors")
    (shop.folder / "empty").mkdir()
    write(
        shop.folder / "new/a.parquet",
        {"item_id": pa.array([], pa.int64()), "embedding": lists(0)},
    )
    first = shop.write().look()
    assert problems(first) == told(first) == []


# ---- A shop without images -------------------------------------------------------------------


def without_images(folder: Path, **changed: Any) -> Shop:
    return beside(Shop(folder, catalogue(**changed)), embedding=lists())


@pytest.mark.parametrize(
    "uris",
    [
        None,
        pa.array([f"{i}.png" for i in range(ITEMS)]),
        pa.array([f"https://cdn.example.com/{i}.png" for i in range(ITEMS)]),
        pa.array([f"/nowhere/images/{i}.png" for i in range(ITEMS)]),
        pa.nulls(ITEMS, pa.string()),
    ],
)
def test_a_shop_without_images_has_settings_of_its_vectors(
    tmp_path: Path, uris: pa.Array | None
) -> None:
    shop = without_images(tmp_path, image_uri=uris)
    first = shop.look()
    assert problems(first) == []
    assert noted(first, "images: none were found", "as --images")
    assert "\nimage_roots = []\n" in first.toml
    assert "REQUIRED" not in first.toml
    commands = re.findall(r"^# {3}(courier .*)$", first.toml, re.MULTILINE)
    assert [command.split()[1] for command in commands] == [
        "register-vectors", "embed", "fit-codebook", "refresh",
    ]  # fmt: skip


def test_vectors_in_the_catalogue_do_for_a_shop_without_images(tmp_path: Path) -> None:
    first = Shop(tmp_path, catalogue(image_uri=None, embedding=lists())).write().look()
    assert problems(first) == []
    assert len(proposed(first)) == 1


def test_a_shop_without_images_and_vectors_lacks_images(tmp_path: Path) -> None:
    first = Shop(tmp_path, catalogue(image_uri=None)).write().look()
    assert "lacks the column 'image_uri'" in only_problem(first)
    assert 'image_roots = [""]  # REQUIRED' in first.toml


def test_vectors_that_cannot_be_used_do_not_do_instead_of_images(tmp_path: Path) -> None:
    shop = beside(Shop(tmp_path, catalogue(image_uri=None)), embedding=lists(dimension=8))
    assert "lacks the column 'image_uri'" in only_problem(shop.look())


def test_images_that_were_told_of_are_expected_beside_vectors(tmp_path: Path) -> None:
    shop = without_images(tmp_path, image_uri=None)
    (tmp_path / "pictures").mkdir()
    assert "lacks the column 'image_uri'" in only_problem(shop.look(str(tmp_path / "pictures")))


def test_settings_of_a_shop_without_images_are_looked_at_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = without_images(tmp_path, image_uri=None)
    settings = shop.settings(shop.look())
    assert settings.catalogue.image_roots == ()
    assert main(["init", "--check", str(tmp_path / "courier.toml")]) == 0
    assert "problem" not in capsys.readouterr().out


# ---- The command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_catalogue", "of_table"),
    [
        ({"image_uri": None}, {"embedding": lists()}),
        ({}, {"item_id": None, "sku": pa.array(range(ITEMS)), "Clip (B/32)": in_bytes()}),
        ({"image_uri": None, "a-vector": lists()}, {}),
    ],
)
def test_what_is_proposed_makes_a_pin(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    of_catalogue: dict[str, Any],
    of_table: dict[str, Any],
) -> None:
    shop = beside(Shop(tmp_path, catalogue(**of_catalogue)), **of_table)
    first = shop.look()
    shop.settings(first)
    monkeypatch.chdir(tmp_path)
    (command,) = proposed(first)
    assert main(shlex.split(command)[1:]) == 0
    with open("courier.toml", "a") as file:
        file.write(capsys.readouterr().out)
    assert main(["init", "--check"]) == 0
    (pin,) = config.load_settings("courier.toml").pins
    assert str(pin.from_ds) == DAYS[1]  # the day to fit a codebook on
    assert read_encoder_info(pin.encoder).dimension == DIMENSION
