"""Scores name the nights that their moments may know, and stay with them while these stand.

Tables are made by stub jobs, which score with all nights that a day names.
"""

import datetime as dt
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_jobs.codebooks.codebook import read_codebook_info, save_codebook
from feature_jobs.impressions.snapshots import after_its_day
from feature_jobs.schemas import TABLES
from feature_jobs.store.documents import read_json
from pipelines.backfill_plan import Asked, plan_backfill
from pipelines.config import Settings
from pipelines.nightly import plan_nights
from pipelines.planning import snapshots
from pipelines.planning.impressions import PlannedScores
from pipelines.stages import SIMSCORE
from tests.conftest import Artefacts
from tests.support import stub_nights
from tests.support.any_order import CLOSED, DAYS, Catalogue, Inputs, Log
from tests.support.codebooks import by_hand
from tests.support.ill_disk import watch_disk
from tests.support.ordered_shop import Shop

AGAIN = f"ds {DAYS[1]}, whose items it is scored with, was made again"
HOUR_US = 3_600_000_000
NOTHING = "already published from the same inputs"
ITEMS = ("item_features", "item_embeddings")


class Previous(Shop):
    """Is a shop whose impressions are scored with the nights before them."""

    def __init__(self, folder: Path, artefacts: Artefacts, more: str = ""):
        inputs = Inputs(catalogues={ds: Catalogue(n) for n, ds in enumerate(DAYS)})
        inputs.logs = {ds: Log() for ds in DAYS if ds != CLOSED}
        super().__init__(folder, artefacts, inputs, features_from="previous")
        self.config.write_text(more + self.config.read_text())

    def refresh(self, *days: dt.date) -> int:
        return self.run("refresh", "--start-ds", days[0], "--end-ds", days[-1])

    def folder_of(self, table: str, ds: dt.date) -> str:
        return str(self.settings.layout.folder(TABLES[table], ds))

    def manifest(self, table: str, ds: dt.date) -> dict[str, Any]:
        return read_json(os.path.join(self.folder_of(table, ds), "_manifest.json"))

    def nights(self, ds: dt.date) -> list[str]:
        """Returns the nights that the scores of a day name."""
        return [one["ds"] for one in self.manifest("user_simscores", ds)["inputs"]["snapshots"]]

    def stale(self) -> dict[str, str]:
        """Returns why the stages of which days would be made again."""
        assert self.run("backfill", "--cascade", "--dry-run", "--json") == 0
        plan = json.loads(self.out)["plan"]
        return {
            f"{day['ds']} {name}": stage["why"]
            for day in plan["days"]
            for name, stage in day["stages"].items()
            if stage["action"] in ("compute", "reuse")
        }


def scores_ahead(settings: Settings, several: Sequence[dt.date]) -> list[PlannedScores]:
    """Returns the scores that one job is to make of some days."""
    nights = plan_nights(settings, several, settings.night)
    return [one for night in nights for one in night.planned if isinstance(one, PlannedScores)]


def days(*numbers: int) -> list[str]:
    return [str(DAYS[n]) for n in numbers]


@pytest.fixture
def shop(in_memory: Path, tmp_path: Path, artefacts: Artefacts) -> Iterator[Previous]:
    folder = in_memory / tmp_path.name
    folder.mkdir()
    with stub_nights.stub_jobs():
        yield Previous(folder, artefacts)
    shutil.rmtree(folder)


# ---- Which nights ------------------------------------------------------------------------------


def test_the_nights_of_a_day_reach_back_as_far_as_late_rows_may_know(shop: Previous) -> None:
    """The night of a day is available from 6:00 after it on, and rows may come a day late."""
    for ds in DAYS[:5]:
        assert shop.refresh(ds) == 0, shop.told
    assert [shop.nights(ds) for ds in DAYS[:5]] == [
        [], days(0), days(1, 0), days(2, 1, 0), days(3, 2, 1),
    ]  # fmt: skip
    made = shop.manifest("user_simscores", DAYS[4])
    for said in made["inputs"]["snapshots"]:
        ds = dt.date.fromisoformat(said["ds"])
        assert said["from_us"] == after_its_day(ds, "UTC", 6 * HOUR_US).from_us
        tables = {name: shop.manifest(name, ds) for name in ITEMS}
        assert {name: said[name] for name in ITEMS} == {n: m["run_id"] for n, m in tables.items()}
        assert made["made_from"]["snapshots"][said["ds"]] == {
            name: manifest["version"] for name, manifest in tables.items()
        }
    assert (made["settings"]["features_from"], made["identities"]) == ("previous", {})
    assert made["settings"]["availability_delay_hours"] == 6.0


def test_without_a_delay_one_night_less_is_known_to_matter(
    in_memory: Path, tmp_path: Path, artefacts: Artefacts
) -> None:
    with stub_nights.stub_jobs():
        shop = Previous(tmp_path, artefacts, more="availability_delay_hours = 0.0\n")
        assert shop.refresh(*DAYS[:4]) == 0, shop.told
    assert shop.nights(DAYS[3]) == days(2, 1)


def test_scores_of_the_same_day_name_none_and_say_nothing_new(
    tmp_path: Path, artefacts: Artefacts
) -> None:
    """So the run_ids of roots that were made before stay."""
    with stub_nights.stub_jobs():
        shop = Shop(tmp_path, artefacts, Inputs())
        assert shop.run("refresh", "--ds", DAYS[0]) == 0
    folder = shop.settings.layout.folder(TABLES["user_simscores"], DAYS[0])
    made = read_json(os.path.join(folder, "_manifest.json"))
    assert list(made["inputs"]) == ["impressions", "histories_before", "item_features"]
    assert made["identities"].keys() == {"encoder_id", "codebook_id"}
    assert made["made_from"].keys() == {"item_embeddings", "item_rejects", "item_features"}
    assert not {"features_from", "availability_delay_hours"} & made["settings"].keys()


def test_a_range_is_its_nights(shop: Previous, artefacts: Artefacts) -> None:
    for ds in DAYS:
        assert shop.refresh(ds) == 0, shop.told
    nights = shop.digest()
    shutil.rmtree(shop.root)
    assert shop.refresh(*DAYS) == 0, shop.told
    assert shop.digest().keys() == nights.keys()
    made = [shop.manifest("user_simscores", ds) for ds in DAYS]
    shutil.rmtree(shop.root)
    for ds in (DAYS[:3], DAYS[3:]):
        assert shop.refresh(*ds) == 0, shop.told
    assert [shop.manifest("user_simscores", ds) for ds in DAYS] == made


def test_a_full_step_of_a_backfill_has_its_copies_within_the_limit(shop: Previous) -> None:
    """Of two days, each of three nights, four nights are copied."""
    assert shop.refresh(*DAYS[:3]) == 0
    settings, both = shop.settings, tuple(DAYS[3:5])
    limit = 4.5 * max(one.copied_bytes for one in scores_ahead(settings, both)) / 1e9
    simscore = settings.simscore.model_copy(update={"broadcast_limit_gb": limit})
    settings = settings.model_copy(update={"simscore": simscore})
    assert plan_backfill(settings, Asked(both)).step_days == 2
    ways = {one.embeddings_by for one in scores_ahead(settings, both)}
    assert ways == {"broadcast"}


# ---- A hole ------------------------------------------------------------------------------------


def refresh_around(shop: Previous, hole: int) -> None:
    """Makes the first five days, without the items of one."""
    for n, ds in enumerate(DAYS[:5]):
        if n == hole:
            assert shop.run("histories", "--ds", ds) == 0, shop.told
        else:
            assert shop.refresh(ds) == 0, shop.told


def test_in_place_of_a_night_that_is_missing_comes_the_next_older_one(shop: Previous) -> None:
    refresh_around(shop, hole=2)
    assert [shop.nights(DAYS[n]) for n in (3, 4)] == [days(1, 0), days(3, 1)]


def test_filling_a_hole_makes_no_later_day_stale(shop: Previous) -> None:
    refresh_around(shop, hole=2)
    before = [shop.manifest("user_simscores", DAYS[n]) for n in (3, 4)]
    assert shop.refresh(DAYS[2]) == 0, shop.told
    assert not [name for name in shop.stale() if "simscore" in name]
    assert shop.refresh(*DAYS[3:5]) == 0
    assert [shop.manifest("user_simscores", DAYS[n]) for n in (3, 4)] == before
    assert shop.refresh(DAYS[5]) == 0
    assert shop.nights(DAYS[5]) == days(4, 3, 2)


def test_taking_a_night_away_makes_no_later_day_stale(shop: Previous) -> None:
    assert shop.refresh(*DAYS[:4]) == 0
    for name in (*ITEMS, "item_rejects"):
        shutil.rmtree(shop.folder_of(name, DAYS[1]))
    assert not [name for name in shop.stale() if "simscore" in name and "03-04" in name]
    assert shop.run("simscore", "--ds", DAYS[3]) == 0
    assert NOTHING in shop.told


def test_a_day_that_is_to_be_made_again_takes_what_is_there(shop: Previous) -> None:
    assert shop.refresh(*DAYS[:4]) == 0
    for name in (*ITEMS, "item_rejects"):
        shutil.rmtree(shop.folder_of(name, DAYS[1]))
    assert shop.run("simscore", "--ds", DAYS[3], "--remake") == 0
    assert shop.nights(DAYS[3]) == days(2, 0)


def test_taking_only_the_embeddings_of_a_night_away_makes_no_later_day_stale(
    shop: Previous,
) -> None:
    assert shop.refresh(*DAYS[:5]) == 0
    before = shop.manifest("user_simscores", DAYS[3])
    for name in ("item_embeddings", "item_rejects"):
        shutil.rmtree(shop.folder_of(name, DAYS[1]))
    assert not [name for name in shop.stale() if "simscore" in name and "03-04" in name]
    assert shop.run("simscore", "--ds", DAYS[3]) == 0
    assert shop.manifest("user_simscores", DAYS[3]) == before
    assert shop.run("simscore", "--ds", DAYS[3], "--remake") == 0
    assert shop.nights(DAYS[3]) == days(2, 0)


def test_nights_without_embeddings_end_the_search_once_all_moments_know_them(
    shop: Previous, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shop.refresh(*DAYS[:6]) == 0
    for day in DAYS[:3]:
        for name in ("item_embeddings", "item_rejects"):
            shutil.rmtree(shop.folder_of(name, day))
    looked_at, real = list[dt.date](), snapshots._Finder._night

    def night(finder: Any, ds: dt.date, features: Any) -> Any:
        looked_at.append(features.ds)
        return real(finder, ds, features)

    monkeypatch.setattr(snapshots._Finder, "_night", night)
    assert shop.run("simscore", "--ds", DAYS[5], "--remake") == 0, shop.told
    assert shop.nights(DAYS[5]) == days(4, 3)
    assert set(looked_at) == set(DAYS[2:5])


def test_the_folder_of_nights_is_listed_once_for_all_days_of_a_command(shop: Previous) -> None:
    assert shop.refresh(*DAYS[:6]) == 0
    for ds in DAYS[2:6]:
        shutil.rmtree(shop.folder_of("user_simscores", ds))
    listed: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        watch_disk(patch, lambda what, path: listed.update([path] if what == "listdir" else []))
        nights = plan_nights(shop.settings, DAYS[2:6], [SIMSCORE])
    assert [len(night.stages[0].snapshots) for night in nights] == [4, 6, 6, 6]
    folders = {name: os.path.dirname(shop.folder_of(name, DAYS[0])) for name in TABLES}
    assert {listed[folder] for folder in folders.values()} == {0, 1}
    assert listed[folders["item_features"]] == 1


# ---- What is stale -----------------------------------------------------------------------------


def test_a_night_that_was_made_again_with_other_content_makes_scores_by_it_stale(
    shop: Previous,
) -> None:
    assert shop.refresh(*DAYS[:6]) == 0
    shop.inputs.catalogues[DAYS[1]] = Catalogue(8)
    shop.write_inputs()
    assert shop.refresh(DAYS[1]) == 0
    stale = {name[:10]: why for name, why in shop.stale().items() if "simscore" in name}
    assert stale.keys() == set(days(2, 3, 4, 5))  # the last by the third, that is stale itself
    assert all(AGAIN in stale[str(ds)] for ds in DAYS[2:5])
    assert shop.run("backfill", "--cascade") == 0, shop.told
    assert shop.stale() == {}
    made = [shop.manifest("user_simscores", ds)["version"] for ds in DAYS[:6]]
    shutil.rmtree(shop.root)
    assert shop.refresh(*DAYS[:6]) == 0
    assert [shop.manifest("user_simscores", ds)["version"] for ds in DAYS[:6]] == made


def test_other_content_under_the_same_run_is_told_by_its_version(shop: Previous) -> None:
    """Images are in no run_id."""
    assert shop.refresh(*DAYS[:3]) == 0
    shop.draw_images()
    assert shop.run("refresh", "--ds", DAYS[1], "--remake") == 0, shop.told
    stale = {name: why for name, why in shop.stale().items() if "simscore" in name}
    assert stale == {f"{DAYS[2]} simscore": AGAIN}
    assert shop.run("refresh", "--ds", DAYS[2]) == 0
    made = shop.manifest("user_simscores", DAYS[2])["made_from"]["snapshots"][str(DAYS[1])]
    assert made == {name: shop.manifest(name, DAYS[1])["version"] for name in ITEMS}


def test_a_night_that_came_out_the_same_under_another_run_stands(shop: Previous) -> None:
    assert shop.refresh(*DAYS[:3]) == 0
    before = shop.manifest("user_simscores", DAYS[2])
    shop.inputs.catalogues[DAYS[1]] = shop.inputs.catalogues[DAYS[1]].after("rewritten")
    shop.write_inputs()
    assert shop.refresh(DAYS[1]) == 0
    assert (
        shop.manifest("item_embeddings", DAYS[1])["run_id"]
        != before["inputs"]["snapshots"][0]["item_embeddings"]
    )
    assert not [name for name in shop.stale() if "simscore" in name]
    assert shop.refresh(DAYS[2]) == 0
    assert shop.manifest("user_simscores", DAYS[2]) == before


def test_another_delay_makes_all_scores_stale(shop: Previous) -> None:
    assert shop.refresh(*DAYS[:2]) == 0
    text = shop.config.read_text()
    shop.config.write_text(f"availability_delay_hours = 3.0\n{text}")
    stale = {name: why for name, why in shop.stale().items() if "simscore" in name}
    assert stale.keys() == {f"{ds} simscore" for ds in DAYS[:2]}
    assert all("availability_delay_hours was 6.0, is 3.0" in why for why in stale.values())


def test_scores_that_are_to_be_of_other_nights_are_told_in_words(shop: Previous) -> None:
    previous = shop.config.read_text()
    same = previous.replace("features_from = 'previous'", "features_from = 'same'")
    assert same != previous
    shop.config.write_text(same)
    assert shop.refresh(*DAYS[:2]) == 0
    ids = shop.manifest("user_simscores", DAYS[1])["identities"]
    shop.config.write_text(previous)
    why = shop.stale()[f"{DAYS[1]} simscore"]
    for name, identity in ids.items():
        assert f"{name} was {identity}, is that of each night" in why
    assert "features_from was same, is previous" in why
    assert shop.refresh(*DAYS[:2]) == 0
    shop.config.write_text(same)
    why = shop.stale()[f"{DAYS[1]} simscore"]
    assert f"encoder_id was that of each night, is {ids['encoder_id']}" in why


# ---- What is refused ---------------------------------------------------------------------------


def test_a_night_of_which_a_stage_was_run_alone_is_none_to_score_with(shop: Previous) -> None:
    assert shop.refresh(*DAYS[:2]) == 0
    shop.inputs.catalogues[DAYS[1]] = Catalogue(8)
    shop.write_inputs()
    assert shop.run("embed", "--ds", DAYS[1]) == 0
    assert shop.refresh(DAYS[2]) == 4
    assert "its item_features were made of other item_embeddings" in shop.told
    assert f"courier refresh --ds {DAYS[1]}" in shop.told
    assert shop.refresh(DAYS[1]) == 0
    assert shop.refresh(DAYS[2]) == 0


def test_a_resolution_that_an_older_night_lacks_is_told_with_the_day_from_which_all_have_it(
    shop: Previous, artefacts: Artefacts, tmp_path: Path
) -> None:
    info, labels = read_codebook_info(artefacts.codebook), ("main", "fine")
    centres = dict.fromkeys(labels, np.eye(2, 256, dtype=np.float32))
    made = by_hand(centres, dict.fromkeys(labels, np.array([1, 2])), info.encoder_id)
    codebook = save_codebook(str(tmp_path), made)
    pin = f"[[pins]]\nfrom_ds = {DAYS[2]}\nencoder = '{artefacts.encoder}'\n"
    shop.config.write_text(f"{shop.config.read_text()}{pin}codebook = '{codebook}'\n")
    assert shop.refresh(*DAYS[:5]) == 0, shop.told
    asked = "[simscore]\ncolumns = ['same_cluster_fine']\n"
    shop.config.write_text(shop.config.read_text().replace("[simscore]\n", asked))
    assert shop.refresh(DAYS[4]) == 2
    assert (
        f"the night of ds {DAYS[1]}, of codebook {os.path.basename(artefacts.codebook)}, which "
        f"impressions of ds {DAYS[4]} may know, has no resolution 'fine'" in shop.told
    )
    assert f"Ask for the column from ds {DAYS[5]} on" in shop.told
    one_day = ("--start-ds", DAYS[5], "--end-ds", DAYS[5])
    assert shop.run("backfill", *one_day, "--dry-run") == 0, shop.told


def test_scores_by_a_night_that_is_refused_wait(shop: Previous) -> None:
    shop.inputs.catalogues[DAYS[1]] = shop.inputs.catalogues[DAYS[1]].after("bad")
    shop.write_inputs()
    assert shop.refresh(*DAYS[:3]) == 3
    assert f"ds {DAYS[2]} waits: it goes on from ds {DAYS[1]}" in shop.told
    assert shop.refresh(DAYS[0]) == 0
    assert NOTHING in shop.told
