"""The encoder is changed without a gap: a candidate embeds beside the nights until it has a pin."""

import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from pipelines.config import load_settings
from tests.support.commands import (
    Capture,
    courier,
    embed_work,
    manifest,
    paragraph,
    published,
    refresh,
    status,
    vectors,
)
from tests.support.world import DAYS, LEAVES_ON_DAY_2, NORMAL, World, make_encoder, picture

pytestmark = pytest.mark.first_night


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("candidates") / "encoders", seed=1)


def embed_candidate(world: World, encoder: str, day: int) -> int:
    return courier(world, "embed", "--encoder", encoder, "--ds", str(DAYS[day]))


def fit(world: World, encoder: str, day: int, capsys: Capture) -> str:
    capsys.readouterr()
    args = ("--encoder", encoder, "--ds", str(DAYS[day]), "--clusters", "coarse=2,main=4")
    assert courier(world, "fit-codebook", *args) == 0
    return capsys.readouterr().out


def test_the_night_that_changes_the_encoder_finds_all_embeddings_made_beside_the_nights(
    world: World, candidate: str, capsys: Capture
) -> None:
    assert refresh(world, DAYS[1]) == 0
    before = published(world)
    assert embed_candidate(world, candidate, 1) == 0
    stanza = fit(world, candidate, 1, capsys)
    assert "candidate: test-candidate-" in status(world, capsys)[1]
    after = published(world)
    assert {path: data for path, data in after.items() if "-candidate-" not in path} == before
    assert f'from_ds = "{DAYS[2]}"' in stanza
    world.pins.append(stanza)
    world.put(NORMAL[0], picture(50))  # the one image that is another than the candidate saw
    assert refresh(world, DAYS[2], "--accept", "churn", "--reason", "a test") == 0
    assert embed_work(world, DAYS[2])["images_embedded"] == 1
    assert manifest(world, "item_features", DAYS[2])["identities"]["encoder_id"] in candidate
    assert refresh(world, DAYS[2]) == 0
    assert "nothing to do" in capsys.readouterr().err
    switched = vectors(world, DAYS[2])
    assert courier(world, "embed", "--ds", str(DAYS[2]), "--full") == 0
    assert vectors(world, DAYS[2]) == switched


def test_a_candidate_embeds_former_items_of_the_nights_and_goes_on_from_its_own_days(
    world: World, candidate: str, capsys: Capture
) -> None:
    assert embed_candidate(world, candidate, 1) == 0
    told = capsys.readouterr().out
    assert "and 1 former ones" in told
    assert embed_candidate(world, candidate, 2) == 0
    assert "embedded on" not in capsys.readouterr().out
    assert embed_candidate(world, candidate, 2) == 0
    assert "nothing to do" in capsys.readouterr().err
    (folder,) = world.root.glob(f"test-candidate-*/item_embeddings/ds={DAYS[2]}")
    rows = pq.read_table(folder, partitioning=None)
    assert LEAVES_ON_DAY_2 in rows["item_id"].to_pylist()


def test_a_pin_without_a_codebook_after_whole_ones_is_told_with_the_way_to_one(
    world: World, candidate: str, capsys: Capture
) -> None:
    world.pin(DAYS[1], candidate)
    assert status(world, capsys)[0] == 0
    assert refresh(world, DAYS[0]) == 0  # the nights before it are as they were
    told = capsys.readouterr().err
    assert f"WARNING: The pin from {DAYS[1]}" in told
    assert f"courier embed --encoder {candidate}" in told
    assert refresh(world, DAYS[1]) == 2
    assert f"courier fit-codebook --encoder {candidate}" in paragraph(capsys)


def test_a_new_encoder_of_a_shop_with_whole_pins_prints_no_pin_but_the_way_to_one(
    world: World, capsys: Capture
) -> None:
    args = ("--backbone", "shufflenet_v2_x0_5", "--weights", "random", "--input-size", "32")
    assert courier(world, "init-encoder", *args) == 0
    printed = capsys.readouterr().out
    assert all(line.startswith("#") for line in printed.splitlines())
    assert "courier embed --encoder " in printed
    with world.config.open("a") as settings:  # as `>> courier.toml` does
        settings.write(printed)
    assert load_settings(str(world.config)) == world.settings()


def test_the_first_encoder_may_be_appended_to_settings_that_are_not_written_yet(
    world: World, capsys: Capture
) -> None:
    empty = world.folder / "new.toml"
    empty.touch()  # as `>> new.toml` does
    args = ("--backbone", "shufflenet_v2_x0_5", "--weights", "random", "--input-size", "32")
    assert main(["init-encoder", "--config", str(empty), *args]) == 0
    assert "[[pins]]" in capsys.readouterr().out


def test_a_candidate_that_is_no_package_or_not_embedded_yet_is_told(
    world: World, candidate: str, capsys: Capture
) -> None:
    assert embed_candidate(world, "nowhere", 1) == 2
    assert "is no encoder package" in paragraph(capsys)
    args = ("--ds", str(DAYS[1]), "--clusters", "4", "--encoder", candidate)
    assert courier(world, "fit-codebook", *args) == 4
    assert "test-candidate-" in paragraph(capsys)
