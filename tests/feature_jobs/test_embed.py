"""EMBED's pure functions: the catalogue's law, former items, and rows that stay together."""

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pytest

from courier_model.encoder import load_encoder
from courier_model.image_files import Image, read_image
from feature_jobs import embed
from feature_jobs.embed import former_items
from feature_jobs.inputs import check_unique
from feature_jobs.schemas import ITEM_EMBEDDINGS, DataContractError
from tests.conftest import Artefacts
from tests.support.world import picture

DAY = dt.date(2026, 3, 10)


def test_a_sorted_catalogue_with_an_item_twice_is_refused_with_examples() -> None:
    check_unique(pa.chunked_array([[1, 2], [3]]), DAY)
    check_unique(pa.chunked_array([[]], pa.int64()), DAY)
    with pytest.raises(DataContractError, match="2 items twice or more, for example item_id 2, 4"):
        check_unique(pa.chunked_array([[1, 2], [2, 3, 4, 4, 4]]), DAY)


def test_former_items_are_dated_when_they_left_and_kept_for_the_window() -> None:
    left = [None, None, DAY - dt.timedelta(days=2), DAY - dt.timedelta(days=3)]
    previous = ITEM_EMBEDDINGS.schema(pa.int64()).empty_table().select(
        ["item_id", "left_catalogue_ds"]
    )  # fmt: skip
    rows = pa.table({"item_id": [1, 2, 3, 4], "left_catalogue_ds": pa.array(left, pa.date32())})
    kept = former_items(rows, pa.chunked_array([[1]]), DAY, window_days=3).to_pylist()
    assert kept == [
        {"item_id": 2, "left_catalogue_ds": DAY},
        {"item_id": 3, "left_catalogue_ds": DAY - dt.timedelta(days=2)},
    ]
    assert len(former_items(previous, pa.chunked_array([[1]]), DAY, 3)) == 0


def test_images_may_be_read_ahead_in_any_order_without_mixing_items(
    tmp_path: Path, artefacts: Artefacts
) -> None:
    """Rows and embeddings stay together although good, known and bad images alternate."""
    encoder, roots = load_encoder(artefacts.encoder), [str(tmp_path)]
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    names = ["0.png", "gone.png", "1.png", "2.png", "gone.png", "3.png", "4.png", "5.png"]
    known = read_image("2.png", None, roots, encoder.preprocessing)
    assert isinstance(known, Image)
    rows = pa.table(
        {
            "item_id": list(range(8)),
            "image_uri": names,
            "known_sha256": [known.sha256 if n == "2.png" else None for n in names],
        }
    )
    mixed = embed.embed_images(rows, encoder, roots, 3).to_pylist()
    assert [r["reason"] for r in mixed] == [
        None,
        "missing",
        None,
        None,
        "missing",
        None,
        None,
        None,
    ]
    assert [r["embedding"] is None for r in mixed] == [n in ("gone.png", "2.png") for n in names]
    for n, row in enumerate(mixed):
        if row["embedding"]:
            alone = embed.embed_images(rows.slice(n, 1), encoder, roots, 3).to_pylist()[0]
            assert row["embedding"] == pytest.approx(alone["embedding"], abs=1e-6)
