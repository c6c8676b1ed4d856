"""Flink's workers read and write a bucket as this machine does, at the address they are told."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.internal.gcp import auth

from feature_jobs.store import files
from pipelines.cli import main
from tests.conftest import Artefacts
from tests.support import clusters
from tests.support.buckets import download, move
from tests.support.clusters import Flink
from tests.support.commands import published_below
from tests.support.world import DAYS, World

pytestmark = pytest.mark.clusters

ON_THIS_MACHINE: list[str] = []


@pytest.fixture
def flink(bucket: str, warm_python: str, tmp_path: Path) -> Iterator[Flink]:
    """Gives a cluster that inherits the address of the bucket's store, as `bucket` has set it."""
    assert bucket.startswith("gs://")
    with clusters.flink(tmp_path / "flink", python=warm_python) as cluster:
        yield cluster


class InBucket:
    """Makes a day of a shop in a bucket."""

    def __init__(self, settings: Path, bucket: str, copies: Path):
        self._settings, self._copies = settings, copies
        self.features = f"{bucket}/features"

    def make(self, stage: str, options: list[str], *args: str) -> None:
        common = ["--config", str(self._settings), "--ds", str(DAYS[0])]
        assert main([stage, *common, *args, "--", *options]) == 0

    def make_all(self, options: list[str]) -> dict[str, bytes]:
        """Embeds and scores by Beam's `options`, and makes on this machine what lies between."""
        self.make("embed", options)
        self.make("item-features", ON_THIS_MACHINE)
        self.make("histories", ON_THIS_MACHINE)
        self.make("simscore", options, "--embeddings-by", "broadcast")
        return self.published()

    def published(self) -> dict[str, bytes]:
        copy = self._copies / str(len(list(self._copies.glob("copy-*"))))
        return published_below(download(self.features, copy.with_name(f"copy-{copy.name}")))


def test_items_are_embedded_and_scored_in_a_bucket_with_the_bytes_of_the_local_engine(
    world: World, artefacts: Artefacts, bucket: str, flink: Flink, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def look(*_: object) -> None:
        raise AssertionError("Beam looks for credentials, which takes it half a minute")

    monkeypatch.setattr(auth, "get_service_credentials", look)
    settings = move(world, bucket, artefacts.encoder, artefacts.codebook)
    shop = InBucket(settings, bucket, tmp_path)
    expected = shop.make_all(ON_THIS_MACHINE)
    assert len(expected) > 10
    files.delete_tree(shop.features)
    found = shop.make_all(flink.options)
    assert differing(found, expected) == []
    files.delete_tree(f"{shop.features}/test/user_simscores")
    shop.make("simscore", flink.options, "--embeddings-by", "shuffle")
    assert differing(tables(shop.published()), tables(expected)) == []
    assert len(flink.ask("jobs/overview")["jobs"]) == 3


def tables(found: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in found.items() if path.endswith(".parquet")}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return [path for path in found | expected if found.get(path) != expected.get(path)]
