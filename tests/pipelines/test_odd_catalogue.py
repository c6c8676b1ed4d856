"""Each file of a catalogue of odd images ends as its picture's embedding, or its reason."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from courier_model.encoder import choose_precision, embed, load_encoder
from courier_model.images import decode
from pipelines.cli import main
from tests.conftest import Artefacts, pinned
from tests.support.odd_images import LOSSY, odd_images
from tests.support.world import CPU, DAYS, World

ODD = odd_images()
NAMES = sorted(ODD)
BATCH = 32

# Pillow says of EXIF that it cannot read it; the picture is shown as it is stored.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    """Makes a world after a night with all odd files; it is only read."""
    world = pinned(World(tmp_path_factory.mktemp("odd") / "shop"), artefacts)
    for name in NAMES:
        (world.folder / "images" / name).write_bytes(ODD[name].data)
    rows = pa.table(
        {"item_id": range(len(NAMES)), "image_uri": NAMES, "category": ["dress"] * len(NAMES)}
    )
    world.write("catalogue", DAYS[0], [rows.slice(0, 30), rows.slice(30)], rows_to_group=16)
    world.settings()
    text = world.config.read_text().replace("rejects.fail = 0.5", "rejects.fail = 1.0")
    world.config.write_text(text)
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[0])]) == 0
    return world


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_odd_file_is_in_one_of_the_two_tables(embedded: World) -> None:
    tables = [embedded.table(name, DAYS[0]) for name in ("item_embeddings", "item_rejects")]
    good, bad = (table["image_uri"].to_pylist() for table in tables)
    assert sorted(good + bad) == NAMES
    assert len(NAMES) >= 45
    assert min(len(good), len(bad)) >= 20


def test_every_bad_file_is_rejected_for_its_reason(embedded: World) -> None:
    rows = embedded.table("item_rejects", DAYS[0]).to_pylist()
    found = {row["image_uri"]: row["reason"] for row in rows}
    expected = {n: odd.expected for n, odd in ODD.items() if isinstance(odd.expected, str)}
    assert found == expected
    for row in rows:  # what a file's size alone can tell, the plan tells
        by_size = row["reason"] in ("empty", "too_many_bytes")
        assert row["stage"] == ("read" if by_size else "decode")
        assert row["message"]


def test_every_good_file_has_the_embedding_of_the_picture_that_it_shows(
    embedded: World, artefacts: Artefacts
) -> None:
    encoder = load_encoder(artefacts.encoder)
    rows = embedded.table("item_embeddings", DAYS[0]).to_pylist()
    shown = [ODD[row["image_uri"]].expected for row in rows]
    assert all(isinstance(picture, Image.Image) for picture in shown)
    pixels = np.stack([decode(png(picture), encoder.preprocessing) for picture in shown])
    expected = embed(encoder, pixels, BATCH, CPU, choose_precision(CPU))
    found = np.array([row["embedding"] for row in rows])
    apart = np.linalg.norm(found - expected, axis=1)
    tolerance = np.array([ODD[row["image_uri"]].tolerance for row in rows])
    for of, limit in ((tolerance == 0, 1e-4), (tolerance < LOSSY, 0.01), (tolerance >= LOSSY, 0.1)):
        assert of.sum() > 10
        assert apart[of].max() < limit


def test_the_limits_of_distance_would_tell_a_picture_that_was_turned(artefacts: Artefacts) -> None:
    encoder, picture = load_encoder(artefacts.encoder), ODD["baseline.jpg"].expected
    assert isinstance(picture, Image.Image)
    turned = [picture, *(picture.transpose(way) for way in Image.Transpose)]
    pixels = np.stack([decode(png(each), encoder.preprocessing) for each in turned])
    upright, *others = embed(encoder, pixels, BATCH, CPU, "fp32")
    assert len(others) == 7
    assert np.linalg.norm(others - upright, axis=1).min() > 0.3
