"""Settings mean what they say: every key is known and of its type, or nothing starts."""

import datetime as dt
import glob
import math
import os
import zoneinfo
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from feature_jobs.schemas import OperatorError
from feature_jobs.store import day_names
from pipelines import config
from pipelines.config import Gates, Pin, Settings, load_settings

LEAST = """
root = "features"
[catalogue]
path = "catalogue/ds={ds}"
image_roots = ["images"]
[impressions]
path = "impressions/ds={ds}"
"""
FULL = """
root = "/data/features"
feature_set = "candidate-2"
day_timezone = "Asia/Shanghai"
history_len = 20
window_days = 7
history_lag_seconds = 90
keep_repeats = true
late_days = 3
history_start_ds = 2025-12-01
closed_days = ["2025-12-25", "2026-01-01"]
settle_minutes = 2.5
availability_delay_hours = 3.5
rows_per_shard = 1000
on_published = ["notify", "--all"]
tables = "items"

[catalogue]
path = "../shop/items/{ds}.parquet"
image_roots = ["images", "/mnt/images"]
require_success = true
[catalogue.columns]
item_id = "sku"

[impressions]
path = "imps/dt={ds}/*.parquet"
require_success = true
input_timezone = "America/New_York"
click_delay_seconds = 2
carry = ["price", "device"]
[impressions.columns]
user_id = "uid"
history = "recent"

[embed]
device = "cpu"
precision = "fp32"
batch_size = 8
chunk_items = 16
[item_features]
vector = true
second_distance = true
[simscore]
features_from = "previous"
columns = ["history_item_ids", "same_cluster_fine"]
tiers = "muse"
top_k = 5
embedding_dtype = "float16"
embeddings_by = "shuffle"
broadcast_limit_gb = 1.5
[training]
categories = ["dress", "shirt"]
request_gap_seconds = 30
[gates]
image_coverage = {warn = 0.8, fail = 0.7}
rejects = {warn = 0.1, fail = 0.2}
churn.fail = 0.05
cluster_drift.fail = inf
impression_rows = {warn = 1.5, fail = 2}
[workers]
threads = 3
[backfill]
memory_gb = 12
disk_gb = 500.5

[output]
user_root = "gs://users/features"
partition = "dt={ds:%Y%m%d}"
row_group_mb = 64
[retention]
days = {user_simscores = 400, item_features = 7}
versions = 0
grace_hours = 2.5
staging_hours = 48
by_the_night = true
[costs]
currency = "CNY"
core_hour = 0.3
gb_month = 0

[beam]
runner = "FlinkRunner"
parallelism = 4
[beam.embed]
parallelism = 1
[beam.fit-codebook]
parallelism = 2

[[pins]]
from_ds = 2026-01-05
encoder = "encoders/a"
[[pins]]
from_ds = "2026-02-01"
encoder = "/encoders/b"
codebook = "codebooks/b"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    return tmp_path / "conf"


def load(folder: Path, text: str) -> Settings:
    path = folder / "courier.toml"
    path.write_text(text)
    return load_settings(str(path))


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(OperatorError) as refused:
        load(folder, text)
    assert refused.value.exit_status == 2
    message = str(refused.value)
    assert "\n" not in message
    return message


def with_line(line: str, section: str = "root = ") -> str:
    """Returns LEAST with `line` right before the key, or right below the section, that is named."""
    assert LEAST.count(section) == 1
    new = f"{section}\n{line}" if section.startswith("[") else f"{line}\n{section}"
    return LEAST.replace(section, new)


# ---- What is read ----------------------------------------------------------------------------


def test_every_key_of_a_full_file_is_taken(folder: Path) -> None:
    settings = load(folder, FULL)
    assert settings.model_dump(exclude={"catalogue", "impressions", "beam"}) == {
        "base": None,
        "root": "/data/features",
        "feature_set": "candidate-2",
        "day_timezone": "Asia/Shanghai",
        "history_len": 20,
        "window_days": 7,
        "history_lag_seconds": 90.0,
        "keep_repeats": True,
        "late_days": 3,
        "history_start_ds": dt.date(2025, 12, 1),
        "closed_days": (dt.date(2025, 12, 25), dt.date(2026, 1, 1)),
        "settle_minutes": 2.5,
        "availability_delay_hours": 3.5,
        "rows_per_shard": 1000,
        "on_published": ("notify", "--all"),
        "tables": "items",
        "embed": {"device": "cpu", "precision": "fp32", "batch_size": 8, "chunk_items": 16},
        "item_features": {"vector": True, "second_distance": True},
        "simscore": {
            "features_from": "previous",
            "columns": ("history_item_ids", "same_cluster_fine"),
            "tiers": "muse",
            "top_k": 5,
            "embedding_dtype": "float16",
            "embeddings_by": "shuffle",
            "broadcast_limit_gb": 1.5,
        },
        "training": {"categories": ("dress", "shirt"), "request_gap_seconds": 30.0},
        "gates": {
            **Gates().model_dump(),
            "image_coverage": {"warn": 0.8, "fail": 0.7},
            "rejects": {"warn": 0.1, "fail": 0.2},
            "churn": {"warn": 0.05, "fail": 0.05},
            "cluster_drift": {"warn": 0.1, "fail": math.inf},
            "impression_rows": {"warn": 1.5, "fail": 2.0},
        },
        "workers": {"threads": 3},
        "output": {
            "user_root": "gs://users/features",
            "partition": "dt={ds:%Y%m%d}",
            "row_group_mb": 64,
        },
        "retention": {
            "days": {"user_simscores": 400, "item_features": 7},
            "versions": 0,
            "grace_hours": 2.5,
            "staging_hours": 48,
            "by_the_night": True,
        },
        "backfill": {"memory_gb": 12.0, "disk_gb": 500.5},
        "costs": {"currency": "CNY", "core_hour": 0.3, "gb_month": 0.0},
        "pins": (
            {
                "from_ds": dt.date(2026, 1, 5),
                "encoder": str(folder / "encoders/a"),
                "codebook": None,
            },
            {
                "from_ds": dt.date(2026, 2, 1),
                "encoder": "/encoders/b",
                "codebook": str(folder / "codebooks/b"),
            },
        ),
    }
    assert settings.catalogue.require_success
    assert settings.catalogue.columns.model_dump() == {
        "item_id": "sku",
        "image_uri": "image_uri",
        "category": "category",
        "title": "title",
    }
    assert settings.impressions.input_timezone == "America/New_York"
    assert settings.impressions.click_delay_seconds == 2.0
    assert settings.impressions.carry == ("price", "device")
    assert settings.layout.row_group_bytes == 64_000_000
    assert (settings.impressions.columns.user_id, settings.impressions.columns.history) == (
        "uid",
        "recent",
    )
    assert settings.beam == {
        "runner": "FlinkRunner",
        "parallelism": 4,
        "embed": {"parallelism": 1},
        "fit-codebook": {"parallelism": 2},
    }


def test_what_is_left_out_has_a_default(folder: Path) -> None:
    settings = load(folder, LEAST)
    assert (settings.feature_set, settings.day_timezone) == ("production", "UTC")
    assert (settings.history_len, settings.window_days) == (50, 30)
    assert (settings.history_lag_seconds, settings.keep_repeats) == (0, False)
    assert settings.history_start_ds is None
    assert settings.settle_minutes == 10
    assert (settings.costs.core_hour, settings.costs.gb_month) == (None, None)
    assert settings.simscore.embeddings_by == "auto"
    assert (settings.beam, settings.pins) == ({}, ())
    assert settings.impressions.input_timezone is None
    assert settings.impressions.click_delay_seconds == 0
    assert not settings.catalogue.require_success
    assert not settings.item_features.vector
    assert (settings.training.categories, settings.training.request_gap_seconds) == ((), 60)
    for columns in (settings.catalogue.columns, settings.impressions.columns):
        assert all(name == column for name, column in columns.model_dump().items())


def test_relative_paths_start_at_the_files_own_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(folder, FULL)
    assert settings.catalogue.path == str(folder.parent / "shop/items/{ds}.parquet")
    assert settings.catalogue.image_roots == (str(folder / "images"), "/mnt/images")
    assert settings.impressions.path == str(folder / "imps/dt={ds}/*.parquet")
    for elsewhere, name in ((folder, "courier.toml"), (folder.parent, "conf/courier.toml")):
        monkeypatch.chdir(elsewhere)
        assert load_settings(name) == settings


@pytest.mark.parametrize(
    ("base", "where"),
    [("gs://shop/a", "gs://shop/a"), ("/mnt/b", "/mnt/b"), ("../data", "{folder.parent}/data")],
)
def test_relative_paths_of_the_shop_start_at_the_base(folder: Path, base: str, where: str) -> None:
    settings = load(folder, f'base = "{base}"\n{FULL}')
    where = where.format(folder=folder)
    assert settings.impressions.path == f"{where}/imps/dt={{ds}}/*.parquet"
    assert settings.catalogue.path == f"{os.path.dirname(where)}/shop/items/{{ds}}.parquet"
    assert settings.catalogue.image_roots == (f"{where}/images", "/mnt/images")
    assert [root.written for root in settings.catalogue.image_roots] == ["images", "/mnt/images"]
    assert settings.pins == load(folder, FULL).pins


@pytest.mark.parametrize("base", ["[x] {y}/{ds}/z", "gs://shop/[x] {y}/{ds}/z"])
def test_the_folder_that_paths_begin_at_is_no_template(tmp_path: Path, base: str) -> None:
    folder = tmp_path / "[x] {y}/{ds}/z"
    folder.mkdir(parents=True)
    text = LEAST.replace('"catalogue/ds', '"../c/dt').replace("{ds}", "{ds:%Y%m%d}")
    where = base if base.startswith("gs:") else str(folder)
    settings = load(folder, (f'base = "{base}"\n' if where == base else "") + text)
    day = dt.date(2026, 3, 1)
    for template, path in (
        (settings.catalogue.path, f"{os.path.dirname(where)}/c/dt=20260301"),
        (settings.impressions.path, f"{where}/impressions/ds=20260301"),
    ):
        assert day_names.name_of(template, day) == glob.escape(path)
        assert day_names.DayNames(template).day_of(path) == day


@pytest.mark.parametrize("key", ["catalogue", "impressions"])
@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{date}", "knows {ds} only, but has {date}"), ("{ds:%y%m%d}", "'%y'"),
        ("{ds:%Y}/{ds:%m}", "has no day"), ("{ds:%Y}/{ds:%-m}*/{ds:%d}", "a month of one digit"),
        ("{ds", "'}'"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_tell_each_day_is_refused(
    folder: Path, key: str, template: str, told: str
) -> None:
    message = refusal(folder, LEAST.replace(f"{key}/ds={{ds}}", f"{key}/{template}"))
    assert f"'{key}.path': " in message
    assert told in message


def test_settings_cannot_be_changed(folder: Path) -> None:
    settings = load(folder, FULL)
    for section, key in (
        (settings, "root"), (settings.catalogue, "path"), (settings.pins[0], "encoder"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, "other")
    assert settings == load(folder, FULL)


# ---- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "section", "key", "near"),
    [
        ("histroy_len = 5", "root = ", "histroy_len", "history_len"),
        ("image_root = ['a']", "[catalogue]", "catalogue.image_root", "image_roots"),
        ("colums = {}", "[impressions]", "impressions.colums", "columns"),
        ("columns = {items_id = 'a'}", "[catalogue]", "catalogue.columns.items_id", "item_id"),
        ("gate = {}", "root = ", "gate", "gates"),
        ("embed = {batchsize = 3}", "root = ", "embed.batchsize", "batch_size"),
        (
            "pins = [{from_ds = 2026-01-01, encoder = 'e', code_book = 'c'}]",
            "root = ", "pins.0.code_book", "codebook",
        ),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    folder: Path, line: str, section: str, key: str, near: str
) -> None:
    message = refusal(folder, with_line(line, section))
    assert f"unknown key {key!r}, did you mean {near!r}?" in message
    assert str(folder / "courier.toml") in message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("days = {user_simscore = 90}", "names no table, did you mean 'user_simscores'?"),
        ("days = {zzz = 90}", "names no table, tables are user_histories, "),
        ("days = {user_simscores = 29}", "retention.days keeps 29 days of user_simscores, fewer "
         "than window_days = 30: nights to come, and a recomputation of the window, would miss"),
        ("days = {user_simscores = 0}", "'retention.days.user_simscores': Input should be greater"),
        ("days = {user_simscores = 90.5}", "'retention.days.user_simscores': Input should be a"),
        ("days = 90", "'retention.days': Input should be a"),
        ("versions = -1", "'retention.versions': Input should be greater than or equal to 0"),
        ("grace_hours = -1", "'retention.grace_hours': Input should be greater than or equal to 0"),
        ("staging_hours = inf", "'retention.staging_hours': Input should be a finite number"),
        ("by_night = true", "unknown key 'retention.by_night', did you mean 'by_the_night'?"),
    ],
)  # fmt: skip
def test_what_is_to_be_kept_is_said_of_tables_and_keeps_the_window(
    folder: str, line: str, told: str
) -> None:
    assert told in refusal(folder, f"{LEAST}\n[retention]\n{line}\n")


@pytest.mark.parametrize(
    ("gate", "warn", "fail"),
    [
        ("rejects = {fail = 0.5}", 0.02, 0.5),
        ("rejects = {fail = 0.01}", 0.01, 0.01),
        ("rejects = {warn = 0.03}", 0.03, 0.05),
        ("image_coverage = {fail = 0.95}", 0.95, 0.95),
        ("image_coverage = {fail = 0.2}", 0.9, 0.2),
    ],
)
def test_the_limit_of_a_gate_that_is_not_given_follows(
    folder: Path, gate: str, warn: float, fail: float
) -> None:
    limits = getattr(load(folder, with_line(f"gates.{gate}")).gates, gate.split(" ")[0])
    assert (limits.warn, limits.fail) == (warn, fail)


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ("late = {warn = 0.4, fail = 0.3}", "warn = 0.4 lies beyond fail = 0.3"),
        ("rejects = {warn = 0.2}", "warn = 0.2 lies beyond fail = 0.05"),
        ("image_coverage = {warn = 0.5, fail = 0.8}", "warn = 0.5 lies beyond fail = 0.8"),
    ],
)
def test_limits_the_wrong_way_round_are_told_so(folder: Path, gate: str, told: str) -> None:
    message = refusal(folder, with_line(f"gates.{gate}"))
    assert f"'gates.{gate.split(' ')[0]}': {told}, the wrong way round" in message


def test_a_gate_without_limits_is_refused(folder: Path) -> None:
    assert "'gates.rejects.warn' is missing" in refusal(folder, with_line("gates.rejects = {}"))


def test_an_unknown_key_like_no_other_is_refused_with_all_known_ones(folder: Path) -> None:
    message = refusal(folder, with_line("gates = {zzz = 1}"))
    assert "'gates.zzz', known here are balance, churn, " in message


@pytest.mark.parametrize(
    ("line", "section", "key"),
    [
        ('history_len = "50"', "root = ", "history_len"),
        ("history_len = 50.0", "root = ", "history_len"),
        ("history_len = true", "root = ", "history_len"),
        ("history_len = 0", "root = ", "history_len"),
        ("window_days = -1", "root = ", "window_days"),
        ("gates.rejects.fail = 1.5", "root = ", "gates.rejects.fail"),
        ("gates.rejects.fail = -0.1", "root = ", "gates.rejects.fail"),
        ("gates.rejects.fail = nan", "root = ", "gates.rejects.fail"),
        ("gates.rejects = 0.1", "root = ", "gates.rejects"),
        ("gates.rejects.fail = 'all'", "root = ", "gates.rejects.fail"),
        ("gates.cluster_drift.fail = -1", "root = ", "gates.cluster_drift.fail"),
        ("gates.item_rows.fail = 0.5", "root = ", "gates.item_rows.fail"),
        ("gates = 3", "root = ", "gates"),
        ("embed = {precision = 'fp16'}", "root = ", "embed.precision"),
        ("workers = {threads = 0}", "root = ", "workers.threads"),
        ("settle_minutes = -1", "root = ", "settle_minutes"),
        ("settle_minutes = inf", "root = ", "settle_minutes"),
        ("availability_delay_hours = -1", "root = ", "availability_delay_hours"),
        ("availability_delay_hours = 24", "root = ", "availability_delay_hours"),
        ("availability_delay_hours = nan", "root = ", "availability_delay_hours"),
        ("backfill = {memory_gb = 0}", "root = ", "backfill.memory_gb"),
        ("backfill = {disk_gb = -1}", "root = ", "backfill.disk_gb"),
        ("costs = {core_hour = -0.1}", "root = ", "costs.core_hour"),
        ("costs = {gb_month = inf}", "root = ", "costs.gb_month"),
        ("costs = {currency = 3}", "root = ", "costs.currency"),
        ("item_features = {vector = 1}", "root = ", "item_features.vector"),
        ("require_success = 'yes'", "[catalogue]", "catalogue.require_success"),
        ("carry = 'price'", "[impressions]", "impressions.carry"),
        ("carry = [1]", "[impressions]", "impressions.carry.0"),
        ("click_delay_seconds = -1", "[impressions]", "impressions.click_delay_seconds"),
        ("training = {request_gap_seconds = 0}", "root = ", "training.request_gap_seconds"),
        ("training = {categories = 'dress'}", "root = ", "training.categories"),
        ("click_delay_seconds = inf", "[impressions]", "impressions.click_delay_seconds"),
        ("pins = [{from_ds = 20260101, encoder = 'e'}]", "root = ", "pins.0.from_ds"),
        ("pins = [{from_ds = '2026-02-30', encoder = 'e'}]", "root = ", "pins.0.from_ds"),
        ("pins = [{from_ds = 2026-01-01T06:00:00, encoder = 'e'}]", "root = ", "pins.0.from_ds"),
    ],
)
def test_a_value_of_a_wrong_type_or_range_is_named(
    folder: Path, line: str, section: str, key: str
) -> None:
    assert f"{key!r}: Input should be " in refusal(folder, with_line(line, section))


def test_every_problem_is_told_at_once(folder: Path) -> None:
    message = refusal(folder, 'window_days = "7"\n[catalogue]\npath = "c"\n')
    for key in ("'root' is missing", "'window_days'", "image_roots"):
        assert key in message


@pytest.mark.parametrize(
    ("partition", "why"),
    [
        ("day", "has no day"),
        ("{ds:%Y-%m}", "has no day"),
        ("{date}", "knows {ds} only"),
        ("year={ds:%Y}/month={ds:%m}/day={ds:%d}", "the name of one folder"),
        ("_{ds}", "the name of one folder"),
        ("{ds}*", "the name of one folder"),
        ("category={ds}", "item_embeddings has a column of that name"),
        ("user_id={ds:%Y%m%d}", "user_histories has a column of that name"),
    ],
)
def test_a_partition_that_names_no_folder_of_one_day_is_refused(
    folder: Path, partition: str, why: str
) -> None:
    message = refusal(folder, f'{LEAST}[output]\npartition = "{partition}"\n')
    assert "'output.partition'" in message
    assert why in message


def test_a_shop_without_a_log_is_to_say_so(folder: Path) -> None:
    of_items = LEAST[: LEAST.index("[impressions]")]
    assert 'tables = "items"' in refusal(folder, of_items)
    settings = load(folder, f'tables = "items"\n{of_items}')
    with pytest.raises(OperatorError, match=r"have no \[impressions\]"):
        _ = settings.log


@pytest.mark.parametrize("key", ["root", "path", "image_roots", "encoder"])
def test_a_missing_key_is_named(folder: Path, key: str) -> None:
    text = with_line("pins = [{from_ds = 2026-01-01}]") if key == "encoder" else LEAST
    kept = [line for line in text.splitlines() if not line.startswith(f"{key} =")]
    message = refusal(folder, "\n".join(kept))
    assert f"{key}' is missing" in message


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(OperatorError, match="There are no settings at") as refused:
        load_settings(str(folder / "none.toml"))
    assert refused.value.exit_status == 2
    assert str(folder / "none.toml") in str(refused.value)


@pytest.mark.parametrize("text", ["root = ", "root = 1\nroot = 2", "[catalogue", "a b = 1"])
def test_bad_toml_is_refused_with_its_place(folder: Path, text: str) -> None:
    message = refusal(folder, text + LEAST)
    assert "courier.toml are not valid TOML" in message
    assert "at line " in message


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "courier.toml").write_bytes(b"\xc3\x28")
    with pytest.raises(OperatorError, match="not valid TOML"):
        load_settings(str(folder / "courier.toml"))


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-8-sig", "byte-order mark, as UTF-8 text"),
        ("utf-16", "byte-order mark, as UTF-16 text"),
        ("utf-16-le", "NUL bytes, as UTF-16 text"),
        ("utf-16-be", "NUL bytes, as UTF-16 text"),
    ],
)
def test_an_encoding_that_editors_of_windows_save_is_called_by_its_name(
    folder: Path, encoding: str, told: str
) -> None:
    (folder / "courier.toml").write_bytes(LEAST.encode(encoding))
    with pytest.raises(OperatorError, match=told) as refused:
        load_settings(str(folder / "courier.toml"))
    assert "Save the file as UTF-8" in str(refused.value)


@pytest.mark.parametrize("name", ["shared", "Production", "a_b", "a/b", "..", "", "-a", "a\\n"])
def test_a_feature_set_that_is_no_plain_name_or_ours_is_refused(folder: Path, name: str) -> None:
    assert "feature_set" in refusal(folder, with_line(f'feature_set = "{name}"'))


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../UTC", "America", "UTC+8"])
def test_a_time_zone_that_is_none_is_refused(folder: Path, zone: str) -> None:
    for line, section, key in (
        (f'day_timezone = "{zone}"', "root = ", "'day_timezone'"),
        (f'input_timezone = "{zone}"', "[impressions]", "'impressions.input_timezone'"),
    ):
        message = refusal(folder, with_line(line, section))
        assert key in message
        assert "no IANA time zone" in message


def test_a_machine_without_a_time_zone_database_is_told_as_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(config, "ZoneInfo", missing)
    monkeypatch.setattr(config, "available_timezones", set)
    message = refusal(folder, with_line('day_timezone = "Asia/Shanghai"'))
    assert "has no time-zone database" in message
    assert "apt-get install tzdata" in message
    assert "no IANA time zone" not in message


@pytest.mark.parametrize("old", ['"features"', '"catalogue/ds={ds}"', '"images"'])
@pytest.mark.parametrize("path", ["s3://shop/x", "https://shop/x", "gs://", "gs:///x", "GS://b/x"])
def test_a_remote_path_other_than_of_a_bucket_is_refused(folder: Path, old: str, path: str) -> None:
    message = refusal(folder, LEAST.replace(old, f'"{path}"'))
    assert path in message
    assert "gs://bucket" in message


PATHS = {
    "root": 'root = "{}"', "base": 'base = "{}"\nroot = "f"', "catalogue.path": 'path = "{}"',
    "catalogue.image_roots.1": 'image_roots = ["images", "{}"]',
    "impressions.path": 'path = "{}"', "pins.0.encoder": 'encoder = "{}"',
    "pins.0.codebook": 'codebook = "{}"',
}  # fmt: skip


def with_path(key: str, path: str) -> str:
    """Returns settings with `path` at `key`."""
    text = LEAST + '[[pins]]\nfrom_ds = 2026-02-01\nencoder = "e"\ncodebook = "c"\n'
    old = {
        "root": 'root = "features"',
        "base": 'root = "features"',
        "pins.0.encoder": 'encoder = "e"',
        "pins.0.codebook": 'codebook = "c"',
        "catalogue.path": 'path = "catalogue/ds={ds}"',
        "impressions.path": 'path = "impressions/ds={ds}"',
        "catalogue.image_roots.1": 'image_roots = ["images"]',
    }[key]
    assert text.count(old) == 1
    return text.replace(old, PATHS[key].format(path))


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", ["", "$HOME/x/{ds}", "gs:/bucket/{ds}", "~nobody-here/{ds}"])
def test_a_path_that_nobody_meant_is_refused_with_its_key(
    folder: Path, key: str, path: str
) -> None:
    assert f"{key!r}: " in refusal(folder, with_path(key, path))


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_is_expanded_and_the_setting_stays_as_written(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/shop")
    found: Any = load(folder, with_path(key, "~/x/{ds}"))
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == "/home/shop/x/{ds}"
    if key in ("root", "catalogue.image_roots.1"):
        assert found.written == "~/x/{ds}"


def test_a_refused_value_is_told_in_a_sentence_that_goes_on(folder: Path) -> None:
    for path in ("", "s3://shop/features"):
        told = refusal(folder, LEAST.replace('root = "features"', f'root = "{path}"'))
        assert f", found {path!r}. Nothing was started." in told
        assert "., found" not in told


def with_rewrite(value: str, base: str = "") -> str:
    return base + with_line(f"rewrite = {value}", "[catalogue]")


@pytest.mark.parametrize(
    ("folder_of", "pair", "written"),
    [
        ("gs://pictures/a", ("https://cdn/", "gs://pictures/a/"), "gs://pictures/a"),
        ("images", ("https://cdn/", ""), "images"),
        ("./images/new/", ("https://cdn/", "new/"), "./images/new/"),
    ],
)
def test_a_rewrite_leads_from_a_prefix_to_a_folder(
    folder: Path, folder_of: str, pair: tuple[str, str], written: str
) -> None:
    for base in ("", 'base = "gs://shop"\n'):
        text = with_rewrite(f'[["https://cdn/", "{folder_of}"]]', base)
        catalogue = load(folder, text).catalogue
        assert catalogue.image_uri_pairs == (pair,)
        assert catalogue.rewrite_as_written == {"rewrite": [f"https://cdn/ -> {written}"]}
    assert load(folder, LEAST).catalogue.rewrite_as_written == {}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('[["https://cdn/"]]', "'catalogue.rewrite.0"),
        ('[["", "images"]]', "'catalogue.rewrite.0.0'"),
        ('[["https://cdn", "images"]]', "'catalogue.rewrite.0.0': does not end in '/'"),
        ('[["https://cdn/a", "images"]]', "Say 'https://cdn/a/', found 'https://cdn/a'. Nothing"),
        ('[["https://cdn/?f=", "images"]]', "'catalogue.rewrite.0.0': does not end in '/'"),
        ('[["https://cdn/", "s3://b/"]]', "'catalogue.rewrite.0.1'"),
        ('[["https://cdn/", ""]]', "'catalogue.rewrite.0.1'"),
        ('[["https://cdn/", 3]]', "'catalogue.rewrite.0.1'"),
        ('"https://cdn/"', "'catalogue.rewrite'"),
        ('[["https://cdn/", "images2"]]', "below none of the image_roots"),
        ('[["https://cdn/", "images/../.."]]', "below none of the image_roots"),
    ],
)  # fmt: skip
def test_a_rewrite_that_leads_nowhere_is_refused(folder: Path, value: str, told: str) -> None:
    assert told in refusal(folder, with_rewrite(value))


def test_a_path_in_a_bucket_is_kept_as_it_is(folder: Path) -> None:
    pin = '[[pins]]\nfrom_ds = 2026-02-01\nencoder = "encoders/e"\ncodebook = "codebooks/c"\n'
    text = LEAST + pin
    for old in ("features", "images", "catalogue/ds={ds}", "encoders/e", "codebooks/c"):
        assert f'"{old}"' in text
        text = text.replace(f'"{old}"', f'"gs://shop/[x]/{old}/"')
    settings = load(folder, text)
    assert settings.root == "gs://shop/[x]/features"
    assert settings.catalogue.path == "gs://shop/[x]/catalogue/ds={ds}"
    assert settings.catalogue.image_roots == ("gs://shop/[x]/images",)
    assert settings.pins[0].encoder == "gs://shop/[x]/encoders/e"
    assert settings.pins[0].codebook == "gs://shop/[x]/codebooks/c"
    assert settings.impressions.path.startswith("/")


@pytest.mark.parametrize("column", ["sim_scores", "user_id", "history", "encoder_id", "click_time"])
def test_a_carried_column_that_would_overwrite_ours_is_refused(folder: Path, column: str) -> None:
    message = refusal(folder, with_line(f'carry = ["price", "{column}"]', "[impressions]"))
    assert "carry" in message
    assert column in message
    assert "price" not in message


def test_a_carried_column_that_is_named_as_one_on_request_is_refused(folder: Path) -> None:
    """Whether it is asked for or not: `courier validate` could not tell whose it is."""
    for column in ("sim_bucket", "history_cluster_fine", "same_cluster_fine"):
        text = with_line(f'carry = ["price", "{column}"]', "[impressions]")
        assert column in refusal(folder, text)
    text = with_line('carry = ["same_cluster_", "history_cluster_main"]', "[impressions]")
    assert len(load(folder, text).log.carry) == 2


@pytest.mark.parametrize(
    ("column", "hint"),
    [
        ("sim_buckets", "did you mean 'sim_bucket'?"),
        ("history_cluster_main", "did you mean 'history_cluster_ids'?"),
        ("encoder", "those on request are history_item_ids, "),
        ("", "same_cluster_LABEL for each further resolution"),
    ],
)
def test_a_column_that_nobody_can_ask_for_is_refused(folder: Path, column: str, hint: str) -> None:
    message = refusal(folder, f'{LEAST}\n[simscore]\ncolumns = ["top_positions", "{column}"]\n')
    assert "simscore.columns.1" in message
    assert hint in message


@pytest.mark.parametrize("line", ["tiers = 'muses'", "top_k = 0", "embedding_dtype = 'bfloat16'"])
def test_a_form_of_scores_that_is_none_is_refused(folder: Path, line: str) -> None:
    assert f"simscore.{line.split()[0]}" in refusal(folder, f"{LEAST}\n[simscore]\n{line}\n")


def test_a_carried_column_that_is_named_as_the_key_of_days_is_refused(folder: Path) -> None:
    """Readers would take the day for it."""
    text = with_line('carry = ["price", "dt"]', "[impressions]")
    assert "carry" in refusal(folder, f'{text}\n[output]\npartition = "dt={{ds:%Y%m%d}}"\n')
    assert load(folder, f'{text}\n[output]\npartition = "day={{ds}}"\n').log.carry == (
        "price",
        "dt",
    )


def test_a_beam_section_of_no_stage_is_refused(folder: Path) -> None:
    message = refusal(folder, LEAST + "[beam]\nrunner = 'x'\n[beam.simscores]\nnum_workers = 3\n")
    assert "[beam.simscores] names no stage" in message
    assert "item-features, histories, simscore" in message


# ---- Pins ------------------------------------------------------------------------------------


PINS = """
[[pins]]
from_ds = 2026-02-01
encoder = "b"
[[pins]]
from_ds = 2026-01-05
encoder = "a"
[[pins]]
from_ds = 2026-03-01
encoder = "c"
"""


def test_two_pins_of_one_day_are_refused(folder: Path) -> None:
    message = refusal(folder, LEAST + PINS + "[[pins]]\nfrom_ds = 2026-02-01\nencoder = 'd'\n")
    assert "same from_ds" in message


@pytest.mark.parametrize(
    ("ds", "encoder"),
    [
        ("2026-01-05", "a"), ("2026-01-31", "a"), ("2026-02-01", "b"), ("2026-02-28", "b"),
        ("2026-03-01", "c"), ("2030-01-01", "c"),
    ],
)  # fmt: skip
def test_the_latest_pin_that_has_begun_wins_whatever_their_order(
    folder: Path, ds: str, encoder: str
) -> None:
    pin = load(folder, LEAST + PINS).pin_for(dt.date.fromisoformat(ds))
    assert isinstance(pin, Pin)
    assert pin.encoder == str(folder / encoder)


@pytest.mark.parametrize("pins", [PINS, ""])
def test_a_day_before_every_pin_is_refused(folder: Path, pins: str) -> None:
    with pytest.raises(OperatorError) as refused:
        load(folder, LEAST + pins).pin_for(dt.date(2026, 1, 4))
    assert refused.value.exit_status == 2
    message = str(refused.value)
    assert "2026-01-04" in message
    assert ("2026-01-05" if pins else "the settings have no pins") in message
    assert "courier init-encoder" in message
    assert "\n" not in message
