"""What was refused is not lost, what was rolled back stays so, plans follow what others do."""

import contextlib
import datetime as dt
import io
import json
from pathlib import Path
from typing import Any

import pytest

from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import files
from pipelines.cli import main
from pipelines.nightly import plan_nights
from pipelines.running import gates, making, records
from pipelines.running.states import Look
from pipelines.stages import NIGHT
from tests.conftest import Artefacts, pinned
from tests.support.commands import (
    Capture,
    courier,
    finish,
    given_to_the_encoder,
    make_night,
    manifest,
    paragraph,
    published,
    refresh,
)
from tests.support.world import (
    DAYS,
    MISSING,
    NORMAL,
    UNDECODABLE,
    Kept,
    World,
    catalogue_items,
    draw_impressions,
    picture,
)

LIMIT = "rejects.fail = 0.5"


def refused(world: World, capsys: Capture) -> None:
    """Makes a night that the gates refuse: two of twelve images are rejects."""
    world.settings()
    set_limit(world, "0.1")
    assert made_by(world, capsys, 3) == ["embed"]


def set_limit(world: World, limit: str) -> None:
    world.settings()
    text = world.config.read_text()
    assert LIMIT in text
    world.config.write_text(text.replace(LIMIT, f"rejects.fail = {limit}"))


def made_by(world: World, capsys: Capture, status: int) -> list[str]:
    """Runs the night with the settings as they lie there; returns the stages that were made."""
    capsys.readouterr()
    assert main(["refresh", "--config", str(world.config), "--ds", str(DAYS[0])]) == status
    said = capsys.readouterr().err
    return [line.split(":")[0] for line in said.splitlines() if ": making " in line]


# ---- A refused night loses nothing -------------------------------------------------------------


def test_once_the_limit_is_raised_what_was_refused_is_published_as_it_was_made(
    world: World, capsys: Capture
) -> None:
    refused(world, capsys)
    assert published(world) == {}
    set_limit(world, "0.5")
    assert made_by(world, capsys, 0) == ["item-features", "histories", "simscore"]
    assert len(world.table("item_rejects", DAYS[0])) == 2


def test_what_is_refused_still_is_made_again_from_its_chunk_files(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(world, capsys)
    embedded = given_to_the_encoder(monkeypatch)
    assert made_by(world, capsys, 3) == ["embed"]
    assert set(embedded) <= {UNDECODABLE}  # rejects are tried anew
    world.put(MISSING, picture(50))  # one of two: the inputs were mended
    assert made_by(world, capsys, 0)[0] == "embed"
    assert len(world.table("item_rejects", DAYS[0])) == 1


def test_a_store_that_goes_away_while_gates_are_asked_discards_nothing(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.settings()

    def away(*_: object) -> None:
        raise StorageUnavailable("gs://b could not be reached")

    with monkeypatch.context() as patch:
        patch.setattr(gates, "judge", away)
        assert made_by(world, capsys, 1) == ["embed"]
    assert made_by(world, capsys, 0) == ["item-features", "histories", "simscore"]


@pytest.mark.first_night
def test_what_is_accepted_later_says_so_in_its_manifest(world: World, capsys: Capture) -> None:
    """A gate of churn refuses; the next run is allowed to pass it, and nothing is made again."""
    for number in NORMAL:
        world.put(number, picture(number + 40))
    world.gates = "churn.fail = 0.01"
    world.settings()
    assert refresh(world, DAYS[1]) == 3
    assert "--accept churn" in paragraph(capsys)
    capsys.readouterr()
    assert (
        courier(world, "refresh", "--ds", str(DAYS[1]), "--accept", "churn", "--reason", "a test")
        == 0
    )
    made = [line for line in capsys.readouterr().err.splitlines() if ": making " in line]
    assert [line.split(":")[0] for line in made] == ["histories", "simscore"]
    noted = manifest(world, "item_features", DAYS[1])["gates"]
    (told,) = (gate for gate in noted if gate["subject"] == "items, main")
    assert (told["gate"], told["level"], told["reason"]) == ("churn", "accepted", "a test")
    record = records.read_night(world.settings().layout, DAYS[1])
    assert record
    assert told in record["gates"]
    assert courier(world, "status") == 0
    assert "the gate churn was accepted" in capsys.readouterr().out


@pytest.mark.first_night
def test_gates_of_two_stages_are_accepted_together_and_recorded(
    world: World, capsys: Capture
) -> None:
    """What is upstream is judged again by each run until the night is published."""
    usual = world.gates
    world.gates += "\nimage_coverage.fail = 0.99\nscore_coverage.fail = 0.999"
    world.settings()

    def stages(name: str) -> dict[str, Any]:
        (path,) = (world.root / f"test/_runs/ds={DAYS[1]}").rglob("*.json")
        assert path.name == name
        return json.loads(path.read_text())["stages"]

    assert refresh(world, DAYS[1]) == 3
    assert "`--accept image_coverage --reason '…'`" in paragraph(capsys)
    embed = stages("refused.json")["embed"]
    assert embed["wall_seconds"] > 0
    assert "fail" in [gate["level"] for gate in embed["gates"]]

    one = ("--accept", "image_coverage", "--reason", "a test")
    assert refresh(world, DAYS[1], *one) == 3
    assert "`--accept image_coverage --accept score_coverage --reason '…'`" in paragraph(capsys)
    assert refresh(world, DAYS[1], "--accept", "score_coverage", *one, "--accept", "late") == 0
    assert "--accept late was not needed" in capsys.readouterr().err
    # This run made nothing: what making it took is that of the runs that did.
    published = stages("run.json")
    assert published["embed"]["wall_seconds"] == embed["wall_seconds"]
    assert set(published) == {kind.name for kind in NIGHT}

    def accepted() -> list[str]:
        record = records.read_night(world.settings().layout, DAYS[1])
        assert record
        return [gate["gate"] for gate in record["gates"] if gate["level"] == "accepted"]

    assert accepted() == ["image_coverage", "score_coverage"]
    # Made again with equal rows, by limits that let it pass, it is recorded anew.
    world.gates = usual
    world.settings()
    assert refresh(world, DAYS[1], "--remake") == 0
    assert accepted() == []


@pytest.mark.first_night
def test_a_full_run_that_was_refused_leaves_the_published_day_to_build_on(
    world: World, capsys: Capture
) -> None:
    before = published(world)
    set_limit(world, "0.1")
    args = ["--config", str(world.config), "--ds", str(DAYS[0])]
    assert main(["embed", *args, "--full"]) == 3
    assert main(["simscore", *args]) == 0
    assert main(["item-features", *args]) == 0
    assert published(world) == before


# ---- A rollback sticks -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Kept:
    """Makes two nights of one day, of which the second was rolled back."""
    world = pinned(World(tmp_path_factory.mktemp("rolled-back") / "shop"), artefacts)
    assert refresh(world, DAYS[0]) == 0
    world.write_catalogue(DAYS[0], [i for i in catalogue_items(DAYS[0]) if i != NORMAL[0]])
    assert refresh(world, DAYS[0]) == 0
    args = ("rollback", "--ds", str(DAYS[0]), "--reason", "half of the images are grey")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert courier(world, *args, "--dry-run") == 0
    assert "would be published again" in out.getvalue()
    assert courier(world, *args) == 0
    return Kept(world)


@pytest.fixture
def rolled_back(kept: Kept) -> World:
    return kept.again()


@pytest.mark.parametrize("command", ["refresh", "embed", "item-features", "simscore"])
def test_a_command_that_would_publish_a_held_day_ends_with_3_and_says_why(
    rolled_back: World, capsys: Capture, command: str
) -> None:
    before = published(rolled_back)
    assert courier(rolled_back, command, "--ds", str(DAYS[0])) == 3
    told = paragraph(capsys)
    assert "half of the images are grey" in told
    assert f"courier rollback --ds {DAYS[0]} --release" in told
    assert published(rolled_back) == before


def test_of_a_range_a_held_day_is_refused_whatever_becomes_of_the_others(
    rolled_back: World, capsys: Capture
) -> None:
    before = published(rolled_back)
    days = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[1]))
    assert courier(rolled_back, "simscore", *days) == 4
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert f"ds {DAYS[0]} of the feature set 'test' is on hold" in told[0]
    assert f"ds {DAYS[1]} have not been made" in told[1]
    assert published(rolled_back) == before


def test_other_days_and_shared_tables_are_not_held(rolled_back: World) -> None:
    assert courier(rolled_back, "histories", "--ds", str(DAYS[0])) == 0
    assert refresh(rolled_back, DAYS[1]) == 0


def test_status_and_plans_show_a_hold_until_it_is_released(
    rolled_back: World, capsys: Capture
) -> None:
    ds = ("--ds", str(DAYS[0]))
    capsys.readouterr()
    assert courier(rolled_back, "status") == 0
    told = capsys.readouterr().out
    assert f"on hold: {DAYS[0]}" in told
    assert "half of the images are grey" in told
    assert courier(rolled_back, "status", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["held"]) == [str(DAYS[0])]
    assert courier(rolled_back, "refresh", *ds, "--dry-run") == 0
    assert "on hold" in capsys.readouterr().out
    assert courier(rolled_back, "rollback", *ds, "--release", "--json") == 0
    assert json.loads(capsys.readouterr().out)["action"] == "is released"
    assert courier(rolled_back, "rollback", *ds, "--release") == 2
    assert "is not on hold" in paragraph(capsys)
    assert courier(rolled_back, "status") == 0
    assert "on hold" not in capsys.readouterr().out
    assert refresh(rolled_back, DAYS[0]) == 0
    assert len(rolled_back.table("item_features", DAYS[0])) == len(catalogue_items(DAYS[0])) - 1


@pytest.mark.first_night
def test_histories_made_alone_leave_the_way_back_as_it_was(world: World) -> None:
    first = world.table("item_features", DAYS[0])
    world.write_catalogue(DAYS[0], [i for i in catalogue_items(DAYS[0]) if i != NORMAL[0]])
    assert refresh(world, DAYS[0]) == 0
    world.write_impressions(DAYS[0], draw_impressions(DAYS[0], seed=9))
    assert courier(world, "histories", "--ds", str(DAYS[0])) == 0
    assert courier(world, "rollback", "--ds", str(DAYS[0])) == 0
    assert world.table("item_features", DAYS[0]).equals(first)
    assert courier(world, "histories", "--ds", str(DAYS[0])) == 0
    assert courier(world, "rollback", "--ds", str(DAYS[0])) == 0  # finds it done
    assert world.table("item_features", DAYS[0]).equals(first)
    assert courier(world, "rollback", "--ds", str(DAYS[0]), "--release") == 0
    assert courier(world, "rollback", "--ds", str(DAYS[0])) == 0
    assert len(world.table("item_features", DAYS[0])) == len(first) - 1


def test_a_day_that_is_being_published_anew_is_not_passed_over_for_an_older_one(
    world: World, capsys: Capture
) -> None:
    for day in DAYS[:2]:
        assert refresh(world, day) == 0
    success = world.root / "test" / "item_embeddings" / f"ds={DAYS[1]}" / "_SUCCESS"
    data = success.read_bytes()
    success.unlink()
    assert refresh(world, DAYS[2]) == 4
    assert f"goes on from ds {DAYS[1]}" in paragraph(capsys)
    success.write_bytes(data)
    assert refresh(world, DAYS[2]) == 0


def test_of_a_stale_day_on_hold_histories_alone_are_made(
    rolled_back: World, capsys: Capture
) -> None:
    for day in DAYS[1:3]:
        assert refresh(rolled_back, day) == 0
    rolled_back.write_catalogue(DAYS[1], catalogue_items(DAYS[1])[1:])
    assert refresh(rolled_back, DAYS[1]) == 0
    assert courier(rolled_back, "rollback", "--ds", str(DAYS[1])) == 0
    assert courier(rolled_back, "rollback", "--ds", str(DAYS[0]), "--release") == 0
    world = rolled_back
    world.write_impressions(DAYS[0], draw_impressions(DAYS[0], seed=9))
    assert courier(world, "histories", "--ds", str(DAYS[0])) == 0
    capsys.readouterr()
    assert courier(world, "status", "--json") == 0
    (stages,) = json.loads(capsys.readouterr().out)["stale"][str(DAYS[1])].values()
    assert stages == ["histories"]
    before = {name: data for name, data in tables_of(world, DAYS[1]).items() if "test" in name}
    assert courier(world, "backfill", "--cascade") == 0
    after = {name: data for name, data in tables_of(world, DAYS[1]).items() if "test" in name}
    assert after == before


def tables_of(world: World, day: dt.date) -> dict[str, bytes]:
    """Returns the files of what a day published, whatever was there before."""
    return {name: data for name, data in published(world).items() if f"/ds={day}/" in name}


# ---- Plans follow what others publish ----------------------------------------------------------


def test_a_night_that_was_planned_before_another_was_published_is_planned_again(
    world: World, tmp_path: Path
) -> None:
    settings = world.settings()
    said: list[str] = []
    make_night(settings, DAYS[0], said.append)
    (late,) = plan_nights(settings, [DAYS[1]], settings.night)
    assert not late.is_outdated(Look())
    world.write_impressions(DAYS[0], draw_impressions(DAYS[0], seed=9))
    world.write_catalogue(DAYS[0], catalogue_items(DAYS[0])[1:])
    make_night(settings, DAYS[0], said.append)
    assert late.is_outdated(Look())
    said.clear()
    finish([late], said.append)
    assert any("planning again" in line for line in said)
    after = tables_of(world, DAYS[1])
    files.delete_tree(str(world.root))
    for day in DAYS[:2]:
        make_night(settings, day)
    assert tables_of(world, DAYS[1]) == after


@pytest.mark.first_night
def test_what_is_sealed_names_the_tables_that_its_job_began_with(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Where upstream was published anew meanwhile, the stage is not taken for made."""
    world.write_impressions(DAYS[0], draw_impressions(DAYS[0], seed=9))
    real = making.run_job

    def meanwhile(*args: object) -> None:
        real(*args)
        monkeypatch.undo()
        world.put(MISSING, picture(50))
        assert courier(world, "embed", "--ds", str(DAYS[0]), "--full") == 0
        assert courier(world, "item-features", "--ds", str(DAYS[0])) == 0

    assert courier(world, "histories", "--ds", str(DAYS[0])) == 0
    monkeypatch.setattr(making, "run_job", meanwhile)
    assert courier(world, "simscore", "--ds", str(DAYS[0])) == 4
    assert "not been made from the present inputs" in paragraph(capsys)
    assert courier(world, "simscore", "--ds", str(DAYS[0])) == 0
    rows = world.table("user_simscores", DAYS[0]).to_pylist()
    assert any(MISSING in row["history_item_ids"] and row["sim_known"] for row in rows)
