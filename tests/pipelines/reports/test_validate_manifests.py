"""Manifests of another shape than ours are told as such; of earlier ones much may be missing."""

import json
from typing import Any

import pytest

from feature_jobs.schemas import DataContractError
from pipelines.reports.validate_manifests import parse_manifest

FILE = {"name": "part-00000-of-00001-0123456789ab.parquet", "rows": 1, "bytes": 2, "sha256": "ab"}
EARLIEST = {
    "table": "user_simscores", "ds": "2026-03-02", "files": [FILE], "rows": 1, "run_id": "r",
    "version": "0123456789ab",
}  # fmt: skip
LOG = {"ds": "2026-03-02", "rows": 1, "digest": "d"}
WHOLE = EARLIEST | {
    "feature_set": "test", "identities": {"encoder_id": "e"}, "counts": {"clicks": 1},
    "inputs": {"impressions": LOG, "log": [LOG], "previous": {"ds": "2026-03-01"}, "embed": "r"},
    "made_from": {"item_embeddings": "v", "before": {"user_histories": "w"}},
    "settings": {"day_timezone": "Europe/Berlin", "max_id": {"main": 3}, "history_len": 5},
    "histograms": {"history_len": [0, 1]}, "clusters": {"main": {"items": 1, "gini": 0.5}},
    "versions": {"courier": "0.2.0"}, "gates": [{"gate": "rejects", "level": "warn"}],
}  # fmt: skip


@pytest.mark.parametrize("manifest", [EARLIEST, WHOLE])
def test_a_manifest_is_what_it_says_whatever_an_earlier_version_left_out(manifest: Any) -> None:
    assert parse_manifest("m", json.dumps(manifest).encode()) == manifest


@pytest.mark.parametrize("missing", EARLIEST)
def test_what_every_manifest_has_is_missed(missing: str) -> None:
    refuse({k: v for k, v in WHOLE.items() if k != missing}, f"m: {missing}: Field required")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("files", None), ("files", []), ("files", {}), ("files.0", "part"), ("files.0.rows", 1.5),
        ("files.0.bytes", "x"), ("files.0.sha256", None), ("files.0.rows", -1),
        ("ds", "yesterday"), ("ds", 20260302.5), ("rows", None), ("rows", "5"), ("rows", -1),
        ("counts", None), ("counts.items", "x"), ("histograms.history_len", 1), ("settings", None),
        ("settings.day_timezone", "Mars/Utopia"), ("settings.max_id", 9),
        ("settings.history_len", "5"), ("made_from.item_embeddings", 1), ("made_from.before", None),
        ("inputs", []), ("inputs.impressions", "x"), ("inputs.previous.ds", "x"),
        ("inputs.previous", "x"), ("identities", None), ("clusters.main", 3), ("versions", "0.1"),
        ("gates.0", "rejects"), ("version", 1), ("run_id", None),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_told_with_its_place(where: str, value: Any) -> None:
    manifest = json.loads(json.dumps(WHOLE))
    *way, last = (int(step) if step.isdigit() else step for step in where.split("."))
    holder: Any = manifest
    for step in way:
        holder = holder[step]
    holder[last] = value
    refuse(manifest, f"m: {where}: ")


@pytest.mark.parametrize("document", [None, [], "x", 3])
def test_a_document_that_is_no_object_is_refused(document: Any) -> None:
    refuse(document, "m: all of it: ")


def refuse(manifest: Any, told: str) -> None:
    with pytest.raises(DataContractError) as refused:
        parse_manifest("m", json.dumps(manifest).encode())
    assert str(refused.value).startswith(told)
