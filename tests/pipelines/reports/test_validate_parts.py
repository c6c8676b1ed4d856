"""A file is checked with all its row groups, and what is found is of the table and not of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.schemas import (
    ITEM_REJECTS,
    TRAINING_ROWS,
    USER_SIMSCORES,
    Table,
    scores_schema,
)
from feature_jobs.store import files, hashing
from feature_jobs.store.faults import unavailable
from feature_jobs.store.partitions import Partition
from pipelines.reports.validate_parts import Part, Published, add_bins, check_part
from tests.feature_jobs.test_laws import ASKED, GOOD, MUSE, rows_of, rows_on_request

SCHEMA = ITEM_REJECTS.schema(pa.int64())


def publish(
    folder: Path, rows: pa.Table, group_rows: int, shards: int = 1, table: Table = ITEM_REJECTS,
    **settings: Any,
) -> Published:  # fmt: skip
    """Writes one file in row groups of so many rows; its shard is the first."""
    path = folder / "part-0.parquet"
    pq.write_table(rows, path, row_group_size=group_rows)
    data = path.read_bytes()
    file = {"name": path.name, "rows": len(rows), "bytes": len(data)}
    file |= {"sha256": hashlib.sha256(data).hexdigest()}
    settings = {"features_from": "previous", **settings}
    manifest = {"ds": "2026-01-06", "files": [file] * shards, "settings": settings}
    return Published(table, Partition(str(folder), manifest))


def rejects(ids: list[int], **fields: Any) -> pa.Table:
    rows = [{**GOOD["item_rejects"], "item_id": one, **fields} for one in ids]
    return rows_of("item_rejects", *rows).cast(SCHEMA)


def laws_of(part: Part) -> list[str]:
    return [finding.law for finding in part.findings]


def test_a_sound_file_has_its_rows_and_counts_added_up_over_row_groups(tmp_path: Path) -> None:
    part = check_part(publish(tmp_path, rejects([1, 2, 3, 4, 5]), group_rows=2), 0, fast=False)
    assert part.findings == []
    assert (part.rows, part.is_read, part.is_whole) == (5, True, True)
    assert part.bytes == (tmp_path / "part-0.parquet").stat().st_size
    assert part.counts == {"rejected_missing": 5}
    assert part.ids == {"item_id": "int64"}


@pytest.mark.parametrize(
    ("ids", "law"),
    [
        ([1, 2, 2, 4], "rows are not unique by item_id"),
        ([1, 3, 2, 4], "rows are not in the order of item_id"),
    ],
)
def test_order_is_looked_at_across_row_groups(tmp_path: Path, ids: list[int], law: str) -> None:
    """Each group alone is in order: [1, 2] and [2, 4]."""
    found = publish(tmp_path, rejects(ids), group_rows=2)
    (finding,) = check_part(found, 0, fast=False).findings
    assert finding.law == law
    assert f"the row of item_id {ids[2]}" in finding.text


def test_a_law_is_told_once_however_many_row_groups_break_it(tmp_path: Path) -> None:
    found = publish(tmp_path, rejects([1, 2, 3, 4, 5], attempts=0), group_rows=2)
    (finding,) = check_part(found, 0, fast=False).findings
    assert finding.law == "attempts are fewer than one"
    assert finding.text == ("5 of 5 rows of part-0.parquet break it, such as the row of item_id 1")


def test_several_laws_are_told_of_one_file(tmp_path: Path) -> None:
    found = publish(tmp_path, rejects([1, 2], attempts=0, stage="forward"), group_rows=9)
    assert laws_of(check_part(found, 0, fast=False)) == [
        "a stage is neither read nor decode", "attempts are fewer than one",
    ]  # fmt: skip


def test_rows_of_another_hash_range_are_counted(tmp_path: Path) -> None:
    ids = np.arange(1, 30)
    mine = hashing.shard_of(hashing.hash_ids(pa.array(ids)), 2) == 0
    assert 0 < mine.sum() < len(ids)
    found = publish(tmp_path, rejects(ids.tolist()), group_rows=9, shards=2)
    (finding,) = check_part(found, 0, fast=False).findings
    assert finding.text.startswith(f"{(~mine).sum()} of 29 rows")


def test_a_file_that_the_store_does_not_give_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = publish(tmp_path, rejects([1]), group_rows=9)

    def ill(path: str) -> bytes:
        raise unavailable(path, "Input/output error")

    monkeypatch.setattr(files, "read_bytes", ill)
    part = check_part(found, 0, fast=False)
    assert laws_of(part) == ["a file cannot be read"]
    assert "Input/output error" in part.findings[0].text
    assert not part.is_read


def test_columns_that_are_carried_are_as_the_shop_has_them(tmp_path: Path) -> None:
    """Only a mistake in what is ours is told: 0.5 lies in another tier."""
    page = pa.field("page", pa.struct([("slots", pa.list_(pa.int32()))]))
    schema = USER_SIMSCORES.schema(pa.int64(), pa.int64(), pa.int64(), extra=[page])
    rows = rows_of("user_simscores", GOOD["user_simscores"])
    rows = rows.append_column("page", pa.array([{"slots": [1, 2]}], page.type)).cast(schema)
    part = check_part(publish(tmp_path, rows, 9, table=USER_SIMSCORES), 0, fast=False)
    assert laws_of(part) == ["simtier is not the histogram of the real scores"]


TIERS = [*[0] * 15, 1, *[0] * 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history_len", -1), ("history_len", 2**31 - 1), ("sim_known", -1),
        ("sim_known", 2**31 - 1), ("sim_max", float("nan")), ("sim_max", 1e30),
        ("sim_mean", float("nan")), ("same_cluster", -(2**31)), ("sim_mask", [-1, 0, 0]),
        ("sim_mask", [2, 0, 0]), ("simtier", [2**31 - 1] * 20), ("simtier", [-1] * 20),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_told_and_needs_no_bin(
    tmp_path: Path, name: str, value: Any
) -> None:
    """A history of 2**31 - 1 items would take 16 GB of bins."""
    good = {**GOOD["user_simscores"], "simtier": TIERS}
    rows = rows_of("user_simscores", good, {**good, "impression_id": 2, name: value})
    schema = USER_SIMSCORES.schema(pa.int64(), pa.int64(), pa.int64())
    part = check_part(publish(tmp_path, rows.cast(schema), 9, table=USER_SIMSCORES), 0, fast=False)
    assert part.findings
    assert all(text.text.startswith("1 of 2 rows") for text in part.findings)
    bins = {name: len(bins) for name, bins in part.histograms.items()}
    assert bins == {"history_len": 4, "sim_max_clicked": 200, "sim_max_unclicked": 200}


ASKED_FOR = ["history_cluster_ids", "history_cluster_fine", "same_cluster_fine", "sim_bucket",
             "top_positions"]  # fmt: skip


def asked(folder: Path, tiers: str, columns: list[str], **change: Any) -> Part:
    """Checks a row with all columns on request, which the manifest says are `columns`."""
    good = {**ASKED, **(MUSE if tiers == "muse" else {"simtier": TIERS}), **change}
    schema = scores_schema(
        *[pa.int64()] * 3, [*ASKED_FOR, "history_item_ids"], tiers, by_night=True
    )
    rows = rows_on_request(good).cast(schema)
    told = {"columns": columns, "tiers": tiers, "top_k": 2, "history_len": 3}
    return check_part(publish(folder, rows, 9, table=USER_SIMSCORES, **told), 0, fast=False)


@pytest.mark.parametrize(
    ("tiers", "change", "law"),
    [
        ("muse", {"sim_bucket": [16, 0, 0]}, None),
        ("courier", {"sim_bucket": [16, 0, 0]}, None),
        ("muse", {"sim_bucket": [17, 0, 0]}, "sim_bucket is not the tier of each real score"),
        ("courier", {"sim_bucket": [21, 0, 0]}, "sim_bucket is not the tier of each real score"),
        ("muse", {"simtier": MUSE["simtier"][::-1]}, "simtier is not the histogram of the real"),
        (
            "courier",
            {"top_positions": [2, 0]},
            "top_positions are not where the largest real scores stand",
        ),
        ("courier", {"top_positions": [1]}, "top_positions are not top_k long"),
    ],
)
def test_what_is_made_of_scores_on_request_is_made_again(
    tmp_path: Path, tiers: str, change: dict[str, Any], law: str | None
) -> None:
    found = laws_of(asked(tmp_path, tiers, ASKED_FOR, **change))
    assert len(found) == (law is not None)
    assert all(one.startswith(str(law)) for one in found)


def test_columns_are_those_that_the_manifest_says_were_asked_for(tmp_path: Path) -> None:
    (finding,) = asked(tmp_path, "courier", ASKED_FOR[:-1]).findings
    assert "it has besides top_positions" in finding.text
    (finding,) = asked(tmp_path, "courier", [*ASKED_FOR, "same_cluster_wide"]).findings
    assert "it lacks same_cluster_wide" in finding.text


def test_a_night_that_the_moment_may_not_know_is_told(tmp_path: Path) -> None:
    """It was available a microsecond later; of none there is no score."""
    good = {**GOOD["user_simscores"], "simtier": TIERS}
    schema = USER_SIMSCORES.schema(pa.int64(), pa.int64(), pa.int64())
    found = publish(tmp_path, rows_of("user_simscores", good).cast(schema), 9, table=USER_SIMSCORES)
    moment = int(good["event_time"].timestamp() * 1_000_000)
    for late, laws in ((0, []), (1, ["feature_ds is not the night that its moment may know"])):
        night = {"ds": str(good["feature_ds"]), "from_us": moment + late}
        found.manifest["inputs"] = {"snapshots": [night]}
        assert laws_of(check_part(found, 0, fast=False)) == laws


def test_no_user_is_named(tmp_path: Path) -> None:
    rows = rows_of("training_rows", {**GOOD["training_rows"], "user_id": 900_001, "chunk": -1})
    schema = TRAINING_ROWS.schema(pa.int64(), pa.int64(), request_id=pa.int64())
    found = publish(tmp_path, rows.cast(schema), group_rows=9, table=TRAINING_ROWS)
    told = json.dumps([finding.as_json() for finding in check_part(found, 0, False).findings])
    assert "a chunk is below 0" in told
    assert "900001" not in told


def test_histograms_add_up_and_the_longest_wins() -> None:
    assert add_bins(None, np.array([1])).tolist() == [1]
    for one, other in (([1, 2, 3], [1]), ([1], [1, 2, 3])):
        assert add_bins(np.array(one), np.array(other)).tolist() == [2, 2, 3]
