"""What an encoder package says of itself survives the file and tells which items are in scope."""

import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from feature_jobs.schemas import OperatorError
from feature_jobs.store import documents, encoder_info

ENCODER = encoder_info.EncoderInfo(
    encoder_id="demo-0123456789ab",
    backbone="resnet18",
    preprocessing={"input_size": 96},
    categories=("dress", "shirt"),
    data_start_ds="2026-01-01",
    data_end_ds=None,
    weights="random",
)


@pytest.mark.parametrize("categories", [("dress", "shirt"), (), None])
def test_what_an_encoder_package_says_survives_the_file(
    tmp_path: Path, categories: tuple[str, ...] | None
) -> None:
    info = replace(ENCODER, categories=categories)
    encoder_info.write_encoder_info(str(tmp_path), info)
    assert encoder_info.read_encoder_info(str(tmp_path)) == info


def test_only_a_backbone_of_timms_is_told_with_what_is_timms(tmp_path: Path) -> None:
    encoder_info.write_encoder_info(str(tmp_path), ENCODER)
    assert "timm" not in documents.read_json(str(tmp_path / "encoder.json"))
    info = replace(ENCODER, backbone="timm:test_vit", timm={"version": "1.0.31"})
    encoder_info.write_encoder_info(str(tmp_path), info)
    assert encoder_info.read_encoder_info(str(tmp_path)) == info


def test_what_an_encoder_came_from_is_in_the_file_where_there_is_anything(tmp_path: Path) -> None:
    """So the file of any other encoder is as it was before there were lineages."""
    encoder_info.write_encoder_info(str(tmp_path), ENCODER)
    assert "lineage" not in documents.read_json(str(tmp_path / "encoder.json"))
    info = replace(ENCODER, lineage=("b-0123456789ab", "a-0123456789ab"))
    encoder_info.write_encoder_info(str(tmp_path), info)
    assert encoder_info.read_encoder_info(str(tmp_path)) == info


@pytest.mark.parametrize("dimension", [16, 64, 256, 2048])
def test_a_dimension_is_in_the_file_where_it_is_not_the_usual_one(
    tmp_path: Path, dimension: int
) -> None:
    """So the file of any other encoder is as it was before there were dimensions."""
    info = replace(ENCODER, dimension=dimension)
    encoder_info.write_encoder_info(str(tmp_path), info)
    facts = documents.read_json(str(tmp_path / "encoder.json"))
    assert ("dimension" in facts) == (dimension != 256)
    assert encoder_info.dimension_of(facts) == dimension
    assert encoder_info.read_encoder_info(str(tmp_path)) == info


@pytest.mark.parametrize("dimension", [0, 15, 2049, 64.5, "64", None])
def test_an_impossible_dimension_is_refused(tmp_path: Path, dimension: object) -> None:
    path = str(tmp_path / "encoder.json")
    encoder_info.write_encoder_info(str(tmp_path), ENCODER)
    documents.write_json(path, {**documents.read_json(path), "dimension": dimension})
    with pytest.raises(OperatorError, match="whole number from 16 to 2,048"):
        encoder_info.read_encoder_info(str(tmp_path))


def test_a_row_weighs_as_much_as_its_vector() -> None:
    weights = {d: encoder_info.weight(d) for d in (16, 64, 256, 511, 768, 2048)}
    assert weights == {16: 1, 64: 1, 256: 1, 511: 1, 768: 3, 2048: 8}


def test_timm_is_asked_for_where_a_backbone_is_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    encoder_info.check_timm_is_there("resnet18")
    with pytest.raises(OperatorError, match=r"'timm:resnet18' .* pip install '\.\[timm\]'"):
        encoder_info.check_timm_is_there("timm:resnet18")


@pytest.mark.parametrize("missing", [None, "encoder_id", "categories", "weights"])
def test_a_folder_that_is_no_encoder_package_is_refused(
    tmp_path: Path, missing: str | None
) -> None:
    if missing:
        encoder_info.write_encoder_info(str(tmp_path), ENCODER)
        fields = documents.read_json(str(tmp_path / "encoder.json"))
        del fields[missing]
        documents.write_json(str(tmp_path / "encoder.json"), fields)
    with pytest.raises(OperatorError) as refused:
        encoder_info.read_encoder_info(str(tmp_path))
    assert refused.value.exit_status == 2
    assert str(tmp_path) in str(refused.value)
    assert (missing or "No such file") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ['["a", "b"]', "3", '{"categories": null, "more": 1}'])
def test_json_that_describes_no_encoder_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "encoder.json").write_text(content)
    with pytest.raises(OperatorError, match="no encoder package"):
        encoder_info.read_encoder_info(str(tmp_path))


def test_a_file_in_place_of_an_encoder_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder").write_text("weights")
    with pytest.raises(OperatorError, match="no encoder package"):
        encoder_info.read_encoder_info(str(tmp_path / "encoder"))


def test_a_null_category_is_in_scope_only_where_all_are() -> None:
    category = pa.chunked_array([["dress", None], ["car", "dress"]])
    assert encoder_info.in_scope(category, None).tolist() == [True] * 4
    assert encoder_info.in_scope(category, ("dress", "shirt")).tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert encoder_info.in_scope(category, ()).tolist() == [False] * 4
