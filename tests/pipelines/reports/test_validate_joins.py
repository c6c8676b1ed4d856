"""What joins tables is asked shard by shard, also of tables in fewer files than others."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_FEATURES, ITEM_REJECTS, TABLES
from feature_jobs.store import hashing, partitions
from feature_jobs.store.partitions import Partition
from pipelines.reports.validate_joins import Checked, check_joins
from pipelines.reports.validate_parts import Part, Published
from tests.feature_jobs.test_laws import GOOD, rows_of

EMBEDDED, REJECTED = range(1, 40), range(40, 60)
Rows = list[dict[str, Any]]


def rows(name: str, ids: Sequence[int], **fields: Any) -> Rows:
    return [{**GOOD[name], "item_id": one, **fields} for one in ids]


def checked(top: Path, name: str, given: Rows, shards: int, **manifest: Any) -> Checked:
    """Writes a table in so many files and takes all its files for checked."""
    table, files = TABLES[name], []
    for shard in range(shards):
        every = rows_of(name, *given)
        mine = hashing.shard_of(hashing.hash_ids(every[table.key]), shards) == shard
        file = f"{partitions.part_name(shard, shards)}.parquet"
        partitions.write_parquet(str(top / name / file), every.filter(pa.array(mine)))
        files.append({"name": file, "rows": int(mine.sum())})
    found = Published(table, Partition(str(top / name), {"files": files, **manifest}))
    return Checked(found, Part(rows=len(given), is_read=True, is_whole=True))


def items(top: Path, **changed: Rows) -> dict[str, Checked]:
    """Makes item tables in four files, but for rejects, which are folded into one."""
    sound = {
        "item_embeddings": rows("item_embeddings", EMBEDDED),
        "item_rejects": rows("item_rejects", REJECTED),
        "item_features": rows("item_features", EMBEDDED)
        + rows("item_features", REJECTED, has_image=False),
    }
    files = {"item_embeddings": 4, "item_rejects": 1, "item_features": 4}
    given = sound | changed
    return {name: checked(top, name, given[name], files[name]) for name in given}


def told(tables: dict[str, Checked]) -> list[tuple[str, str, str]]:
    with ThreadPoolExecutor(2) as pool:
        return [(x.table, x.law, x.text) for x in check_joins(tables, pool)]


def test_tables_that_fit_have_nothing_to_tell(tmp_path: Path) -> None:
    assert told(items(tmp_path)) == []


@pytest.mark.parametrize("lost", [5, 45])
def test_an_item_without_features_is_found_in_whichever_shard_it_is(
    tmp_path: Path, lost: int
) -> None:
    features = rows("item_features", [n for n in EMBEDDED if n != lost])
    features += rows("item_features", [n for n in REJECTED if n != lost], has_image=False)
    found = told(items(tmp_path, item_features=features))
    of = ("item_embeddings", "an image") if lost in EMBEDDED else ("item_rejects", "no image")
    law = f"an item of {of[0]} has no row with {of[1]}"
    assert (ITEM_FEATURES.name, law, f"1 rows break it, such as item_id {lost}") in found


def test_shards_are_added_up(tmp_path: Path) -> None:
    both = rows("item_rejects", [*REJECTED, 1, 2, 3, 4])
    found = [text for _, law, text in told(items(tmp_path, item_rejects=both)) if "too" in law]
    assert len(found) == 1
    assert found[0].startswith("4 rows break it, such as item_id ")


def test_categories_are_compared_null_as_a_value(tmp_path: Path) -> None:
    some = [{**row, "category": "dress"} for row in rows("item_embeddings", EMBEDDED)]
    ((table, law, text),) = told(items(tmp_path, item_embeddings=some))
    assert (table, law) == (ITEM_FEATURES.name, "category is not that of item_embeddings")
    assert text.startswith(f"{len(EMBEDDED)} rows break it, such as item_id ")
    features = rows("item_features", EMBEDDED, category="dress")
    features += rows("item_features", REJECTED, has_image=False)
    sound = items(tmp_path, item_embeddings=some, item_features=features)
    assert told(sound) == []


def test_a_table_whose_rows_cannot_be_relied_on_is_left_out(tmp_path: Path) -> None:
    tables = items(tmp_path, item_rejects=rows("item_rejects", [1]))
    assert told(tables)
    tables[ITEM_REJECTS.name].part.is_whole = False
    tables[ITEM_REJECTS.name].part.is_read = False
    assert told(tables) == []


def test_rows_are_those_that_went_into_the_stage(tmp_path: Path) -> None:
    tables = items(tmp_path)
    counts = {"catalogue_items": 59, "former_items": 0}
    found = tables[ITEM_EMBEDDINGS.name].found
    found.manifest.update(counts=counts, inputs={"catalogue": {"rows": 59}})
    assert told(tables) == []
    found.manifest["inputs"] = {"catalogue": {"rows": 60}}
    (one,) = told(tables)
    assert one[:2] == (ITEM_EMBEDDINGS.name, "rows were lost or doubled")
    assert one[2] == "catalogue rows that reached EMBED: found 59, expected 60"


def test_ids_are_of_one_type_in_all_tables(tmp_path: Path) -> None:
    tables = items(tmp_path)
    for name, kind in zip(tables, ("int64", "int64", "string"), strict=True):
        tables[name].part.ids = {"item_id": kind}
    assert told(tables) == [
        (
            ITEM_FEATURES.name, "IDs are of two types",
            "item_id is int64 in item_embeddings, item_rejects; string in item_features",
        )
    ]  # fmt: skip
