"""The settings files that are shipped can be used as they are."""

import re
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    StandardOptions,
    WorkerOptions,
)

import pipelines
from pipelines.config import Embed, load_settings
from pipelines.running.beam_options import pipeline_options
from pipelines.stages import NIGHT

CONFIGS = Path(pipelines.__file__).parent / "configs"


def test_the_files_that_are_shipped_are_these() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {"demo.toml", "kubernetes", "nightly.toml"}


def test_the_demo_shops_settings_load_and_lie_beside_its_tables() -> None:
    settings = load_settings(str(CONFIGS / "demo.toml"))
    assert settings.feature_set == "demo"
    assert settings.catalogue.path == str(CONFIGS / "catalogue/ds={ds}/*.parquet")
    assert settings.embed.batch_size == 8
    assert settings.pins == ()


def test_the_nightly_settings_load_and_depend_on_no_folder() -> None:
    settings = load_settings(str(CONFIGS / "nightly.toml"))
    assert settings.embed == Embed(
        device="cuda", precision="bf16", batch_size=256, chunk_items=16384
    )
    (pin,) = settings.pins
    paths = [settings.root, settings.catalogue.path, settings.impressions.path, pin.encoder]
    paths.append(pin.codebook)
    assert all(
        path.startswith("gs://my-bucket/shop/")
        for path in [*paths, *settings.catalogue.image_roots]
    )


def test_what_the_nightly_settings_have_as_comments_can_be_put_in(tmp_path: Path) -> None:
    text = (CONFIGS / "nightly.toml").read_text()
    path = tmp_path / "courier.toml"
    path.write_text(re.sub(r"^# (?=\[\w+\]$|\w+ = )", "", text, flags=re.MULTILINE))
    settings = load_settings(str(path))
    assert settings.catalogue.image_uri_pairs == (("https://cdn.shop.example/", ""),)
    assert settings.output.user_root == "gs://my-users-bucket/shop/features"
    assert settings.output.partition == "dt={ds:%Y%m%d}"
    assert settings.on_published == ("python", "add_partitions.py")
    assert settings.tables == "items"
    assert settings.workers.threads == 4


@pytest.mark.parametrize("stage", [kind.name for kind in NIGHT])
def test_beam_knows_every_option_of_the_nightly_settings(stage: str) -> None:
    settings = load_settings(str(CONFIGS / "nightly.toml"))
    options = pipeline_options(settings.beam, stage, [])
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert options.view_as(GoogleCloudOptions).region == "europe-west4"
    worker = options.view_as(WorkerOptions)
    assert worker.use_public_ips is False
    assert worker.max_num_workers == (8 if stage == "embed" else 50)
    assert worker.disk_size_gb == (200 if stage == "simscore" else None)
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    assert [s.split("=")[0] for s in services] == ["worker_accelerator"] * (stage == "embed")
    experiments = options.view_as(DebugOptions).experiments or []
    assert ("no_use_multiple_sdk_containers" in experiments) == (stage == "embed")
