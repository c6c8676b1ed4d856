"""Pooled features of a sample are those of each good image by itself, in an order of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from courier_model.encoder import load_encoder
from courier_model.images import decode
from feature_jobs.items import image_features
from feature_jobs.items.image_features import (
    ComputeFeatures,
    FeaturesJob,
    ListFeatures,
    SampleImages,
    define_features,
    is_whole,
    read_features,
)
from feature_jobs.schemas import DataContractError
from feature_jobs.store import hashing
from feature_jobs.store.pieces import Piece
from pipelines.planning.shop_tables import ShopTables
from pipelines.running.beam_options import pipeline_options, run_pipeline
from tests.support.world import (
    DAYS,
    MISSING,
    UNDECODABLE,
    World,
    catalogue_items,
    make_encoder,
)

BAD = {MISSING, UNDECODABLE}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "shop")


@pytest.fixture
def job(world: World) -> FeaturesJob:
    folder = make_encoder(world.folder / "encoders")
    return FeaturesJob(
        folder, load_encoder(folder).preprocessing, (str(world.folder / "images"),), None, 1.0,
        "cpu", "fp32", batch_size=4, chunk_items=3, staging=str(world.folder / "staging"),
    )  # fmt: skip


def compute(world: World, job: FeaturesJob, lost: int = 0) -> np.ndarray:
    """Returns what the steps make of the first day's catalogue, two chunks of images at a time."""
    source = ShopTables(world.settings(), DAYS[0], print).catalogue(DAYS[0])
    sampled = [found for group in source.groups() for found in SampleImages(job).process(group)]
    pieces = [found for found in sampled if isinstance(found, Piece)]
    step, times = ComputeFeatures(job), 2  # as a runner may do
    pairs = [pieces[at : at + 2] for at in range(0, len(pieces), 2)]
    made = [named for pair in pairs * times for _, named in step.process(pair)]
    drawn = [found.value[1] for found in sampled if not isinstance(found, Piece)]
    list(ListFeatures(job.staging).process((0, {"drawn": drawn, "looked_at": made[lost:]})))
    if is_whole(job):
        return read_features(job)
    raise AssertionError("it has not ended")


def pooled(world: World, job: FeaturesJob, item: int) -> np.ndarray:
    encoder = load_encoder(job.encoder_folder)
    encoder.leave_out_head()
    pixels = decode(world.image(item).read_bytes(), job.preprocessing)
    with torch.inference_mode():
        return encoder.features(torch.from_numpy(pixels)[None]).numpy()[0]


def test_features_are_those_of_each_good_image(world: World, job: FeaturesJob) -> None:
    items = np.array([item for item in catalogue_items(DAYS[0]) if item not in BAD])
    items = items[np.argsort(hashing.hash_ids(pa.array(items), 7))]
    expected = np.stack([pooled(world, job, item) for item in items.tolist()])
    found = compute(world, job)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_encoder_that_shows_late_is_waited_for(
    world: World, job: FeaturesJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, hidden = Path(job.encoder_folder), world.folder / "hidden"
    there.rename(hidden)
    waited = list[float]()

    def show(seconds: float) -> None:
        waited.append(seconds)
        hidden.rename(there)

    monkeypatch.setattr("feature_jobs.store.faults.time.sleep", show)
    assert len(compute(world, job)) > 0
    assert len(waited) == 1


def test_a_catalogue_without_rows_is_told(job: FeaturesJob) -> None:
    with pytest.raises(DataContractError, match="Not one of the sampled catalogue items"):
        read_features(job)


def test_a_chunk_that_is_lost_is_told(world: World, job: FeaturesJob) -> None:
    with pytest.raises(DataContractError, match=r"sampled images: \d+ of 12 came"):
        compute(world, job, lost=4)  # of the second time, which has three, the last


def test_only_what_is_drawn_and_in_scope_is_looked_at(world: World, job: FeaturesJob) -> None:
    items = np.array(catalogue_items(DAYS[0]))
    drawn = items[hashing.drawn(pa.array(items), 0.5, 7)]
    assert 0 < len(drawn) < len(items)
    found = compute(world, replace(job, share=0.5, categories=("shirt",)))
    assert len(found) == sum(
        item % 2 == 1 and item < 12 for item in drawn.tolist() if item not in BAD
    )


@pytest.mark.parametrize("changes", [{"categories": ("hat",)}, {"image_roots": ("/nowhere",)}])
def test_where_nothing_can_be_looked_at_it_is_told(
    world: World, job: FeaturesJob, changes: dict[str, Any]
) -> None:
    with pytest.raises(DataContractError, match="Not one of the sampled catalogue items"):
        compute(world, replace(job, **changes))


def test_images_of_small_row_groups_are_looked_at_together(
    world: World, job: FeaturesJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue has row groups of a few items, and all of them fit into one chunk."""
    seen: list[int] = []
    plain = image_features.embed_images

    def counted(rows: pa.Table, *args: Any) -> pa.Table:
        seen.append(len(rows))
        return plain(rows, *args)

    monkeypatch.setattr(image_features, "embed_images", counted)
    source = ShopTables(world.settings(), DAYS[0], print).catalogue(DAYS[0])
    assert len(source.groups()) > 2
    whole = replace(job, chunk_items=100)
    run_pipeline(
        lambda root: define_features(root, source, whole), pipeline_options({}, "embed", [])
    )
    assert sum(seen) == 12
    assert len(seen) == 1
    assert is_whole(whole)
