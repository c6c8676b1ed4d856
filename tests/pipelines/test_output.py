"""What settings say of the output: where tables with user IDs go, and which tables there are."""

import json
import re
import shutil

import pytest

from feature_jobs.schemas import TABLES
from feature_jobs.store.local import LocalStore
from pipelines.cli import main
from tests.support.commands import Capture, courier, paragraph, published_below, refresh, status
from tests.support.world import DAYS, World, catalogue_items

ELSEWHERE = '[output]\nuser_root = "users"\n'


def make(world: World) -> None:
    assert courier(world, "refresh", "--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[1])) == 0
    assert courier(world, "training-rows", "--ds", str(DAYS[1])) == 0


def test_tables_with_user_ids_lie_below_their_own_root_and_are_what_they_would_be(
    world: World, capsys: Capture
) -> None:
    make(world)
    together = published_below(world.root)
    world.root.rename(world.folder / "together")
    world.extra_settings = ELSEWHERE
    make(world)
    users = published_below(world.folder / "users")
    items = published_below(world.root)
    assert {path.split("/")[1] for path in users} - {"_locks"} == {
        name for name, table in TABLES.items() if table.has_users
    }
    assert not any("user_" in path or "recent_clicks" in path for path in items)
    parts = {**items, **users}
    assert {p: b for p, b in parts.items() if p.endswith(".parquet")} == {
        p: b for p, b in together.items() if p.endswith(".parquet")
    }
    assert refresh(world, DAYS[1]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert status(world, capsys, "--ds", str(DAYS[1]))[0] == 0


def test_nothing_of_users_is_written_below_the_root_on_the_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.extra_settings = ELSEWHERE
    monkeypatch.setattr(LocalStore, "_remove_tree", lambda self, folder: None)
    make(world)
    assert {path.name for path in world.root.glob("_staging/*/*")} == {"embed", "item-features"}


def test_the_folder_of_a_day_may_be_named_otherwise_in_all_tables(
    world: World, capsys: Capture
) -> None:
    make(world)
    before = published_below(world.root)
    shutil.rmtree(world.root)
    world.extra_settings = '[output]\npartition = "dt={ds:%Y%m%d}"\n'
    make(world)
    found = {
        re.sub(r"dt=(\d{4})(\d\d)(\d\d)", r"ds=\1-\2-\3", path): data
        for path, data in published_below(world.root).items()
        if "ds=" not in path  # our own records
    }
    parts = {path: data for path, data in before.items() if path.endswith(".parquet")}
    assert parts
    assert {path: data for path, data in found.items() if path.endswith(".parquet")} == parts
    assert refresh(world, DAYS[1]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert status(world, capsys, "--ds", str(DAYS[1]))[0] == 0


@pytest.mark.first_night
@pytest.mark.parametrize(
    ("output", "setting"),
    [(ELSEWHERE, "user_root"), ('[output]\npartition = "dt={ds:%Y%m%d}"\n', "partition")],
)
def test_a_shop_whose_tables_lie_elsewhere_than_its_settings_say_does_not_begin_anew(
    world: World, output: str, setting: str, capsys: Capture
) -> None:
    world.extra_settings = output
    assert refresh(world, DAYS[1]) == 2
    assert f"[output] {setting}" in paragraph(capsys)


# ---- Items alone -----------------------------------------------------------------------------


def of_items_alone(world: World) -> str:
    """Takes the log away from a shop, and from its settings; returns their path."""
    shutil.rmtree(world.folder / "impressions")
    world.extra_settings = 'tables = "items"'
    world.settings()
    head, tail = world.config.read_text().split("[impressions]")
    path = world.folder / "items.toml"
    path.write_text(head + tail[tail.index("[embed]") :])
    return str(path)


def test_whole_nights_of_items_alone_need_no_log(world: World, capsys: Capture) -> None:
    config = of_items_alone(world)
    for day in DAYS[:2]:
        assert main(["refresh", "--config", config, "--ds", str(day)]) == 0
    assert {path.name for path in (world.root / "test").iterdir() if path.name[0] != "_"} == {
        "item_embeddings",
        "item_rejects",
        "item_features",
    }
    assert not (world.root / "shared").exists()
    assert main(["status", "--config", config, "--ds", str(DAYS[1])]) == 0
    assert main(["status", "--config", config]) == 0
    told = capsys.readouterr().out
    assert "2026-03-01 to 2026-03-02  whole" in told
    assert "next: 2026-03-03, whose inputs are there" in told
    assert main(["refresh", "--config", config, "--ds", str(DAYS[1])]) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["histories", "simscore", "training-rows", "audit"])
def test_what_is_made_of_a_log_is_refused_without_one(
    world: World, command: str, capsys: Capture
) -> None:
    config = of_items_alone(world)
    assert main([command, "--config", config, "--ds", str(DAYS[0])]) == 2
    assert 'tables = "items"' in paragraph(capsys)


@pytest.mark.first_night
def test_a_night_of_items_over_one_of_all_tables_does_not_take_its_scores_for_its_own(
    world: World, capsys: Capture
) -> None:
    path = world.root / "test/_nights" / f"ds={DAYS[0]}.json"
    before = set(json.loads(path.read_text())["tables"])
    world.write_catalogue(DAYS[0], catalogue_items(DAYS[0])[1:])
    world.extra_settings = 'tables = "items"'
    assert refresh(world, DAYS[0]) == 0
    of_items = {"item_embeddings", "item_rejects", "item_features"}
    assert set(json.loads(path.read_text())["tables"]) == of_items
    world.extra_settings = ""
    assert refresh(world, DAYS[0]) == 0
    assert set(json.loads(path.read_text())["tables"]) == before
    assert status(world, capsys, "--ds", str(DAYS[0]))[0] == 0


def test_scores_do_not_become_part_of_a_recorded_night_of_items(
    world: World, capsys: Capture
) -> None:
    world.extra_settings = 'tables = "items"'
    assert refresh(world, DAYS[0]) == 0
    record = (world.root / "test/_nights" / f"ds={DAYS[0]}.json").read_bytes()
    assert courier(world, "simscore", "--ds", str(DAYS[0])) == 0
    assert (world.root / "test/_nights" / f"ds={DAYS[0]}.json").read_bytes() == record
