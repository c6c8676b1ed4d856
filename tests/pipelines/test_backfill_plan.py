"""`courier backfill`: what it plans to make and what it leaves, why, and which days are stale.

Tables are made by stub jobs; all else is the real code.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_jobs.store import files
from tests.conftest import Artefacts
from tests.support.any_order import TABLES, Catalogue, Log
from tests.support.ordered_shop import Shop
from tests.support.six_days import (
    ALL,
    DAYS,
    DONE,
    NOT_READY,
    REFUSED,
    USAGE,
    computed,
    contents,
    plan_of,
    run_ids,
    six_days,
    whole_nights,
)
from tests.support.stub_nights import UNKNOWN_FROM

OWN = [name for name, kind in TABLES.items() if not kind.is_shared]


@pytest.fixture
def shop(tmp_path: Path, artefacts: Artefacts) -> Iterator[Shop]:
    with six_days(tmp_path, artefacts) as shop:
        yield shop


@pytest.fixture
def made(shop: Shop) -> Shop:
    assert shop.run("backfill", *ALL) == DONE, shop.told
    return shop


def stale(shop: Shop) -> dict[str, dict[str, list[str]]]:
    assert shop.run("status", "--json") == DONE
    return json.loads(shop.out)["stale"]


# ---- The plan ----------------------------------------------------------------------------------


def test_a_plan_says_what_is_to_be_done_and_writes_nothing(shop: Shop) -> None:
    assert shop.run("backfill", *ALL, "--dry-run") == DONE
    assert f"{DAYS[0]} to {DAYS[-1]}  compute (never made)" in shop.out
    assert "6 days to make, in steps of at most 6 days" in shop.out
    assert "no rates yet" in shop.out
    assert not Path(shop.root).exists()


def test_what_is_there_is_left_and_what_changed_has_its_reason(made: Shop) -> None:
    assert computed(made, *ALL) == []
    made.inputs.catalogues[DAYS[5]] = Catalogue(3)
    made.write_inputs()
    stages = plan_of(made, *ALL)[str(DAYS[5])]
    assert stages["embed"] == {"action": "compute", "why": "catalogue rewritten"}
    assert stages["item-features"] == {"action": "compute", "why": "upstream embed made again"}
    assert stages["histories"] == {"action": "leave", "why": ""}
    assert made.run("backfill", *ALL, "--dry-run") == DONE
    assert f"{DAYS[0]} to {DAYS[4]}  leave" in made.out
    assert "about" in made.out  # by the rates of the nights that are there
    assert made.run("backfill", *ALL) == DONE
    assert made.run("backfill", *ALL) == DONE
    assert "nothing to do" in made.out


def test_what_an_earlier_run_made_is_reused(shop: Shop) -> None:
    shop.inputs.logs[DAYS[1]] = Log((UNKNOWN_FROM,))  # which a gate refuses
    shop.write_inputs()
    assert shop.run("backfill", *ALL[:2], "--end-ds", DAYS[1]) == REFUSED
    assert shop.run("backfill", *ALL[:2], "--end-ds", DAYS[1]) == REFUSED  # as it was told to
    assert shop.run("backfill", "--failed") == REFUSED
    stages = plan_of(shop, *ALL)[str(DAYS[1])]
    assert stages["embed"]["action"] == "reuse"
    assert stages["embed"]["why"] == "made by an earlier run"


def test_what_is_missing_blocks_what_goes_on_from_it_and_no_more(shop: Shop) -> None:
    for path in (shop.folder / "impressions" / f"ds={DAYS[1]}").iterdir():
        path.unlink()
    days = plan_of(shop, *ALL)
    assert {ds: stages["embed"]["action"] for ds, stages in days.items()} == dict.fromkeys(
        map(str, DAYS), "compute"
    )
    blocked = days[str(DAYS[1])]
    assert blocked["histories"]["action"] == "blocked"
    assert "has no partition for ds 2026-03-02 yet" in blocked["histories"]["why"]
    assert blocked["simscore"] == {"action": "blocked", "why": "by histories"}
    later = days[str(DAYS[2])]
    assert later["histories"] == {"action": "blocked", "why": f"by histories of ds {DAYS[1]}"}
    assert later["simscore"] == {"action": "blocked", "why": "by histories"}
    assert shop.run("backfill", *ALL) == NOT_READY
    assert whole_nights(shop) == [DAYS[0]]
    assert {ds for name, ds in shop.seen() if name == "item_features"} == set(DAYS)
    assert f"{DAYS[1]}  histories      4" in shop.out
    assert "5 days of 6 are not made" in shop.told


def test_what_is_published_stays_when_its_log_is_not_kept_any_more(made: Shop) -> None:
    before = made.seen()
    for ds in DAYS[:2]:
        for path in (made.folder / "impressions" / f"ds={ds}").iterdir():
            path.unlink()
    days = plan_of(made, *ALL)
    assert days[str(DAYS[0])]["histories"]["action"] == "leave"
    assert "has no partition for ds 2026-03-01 yet" in days[str(DAYS[0])]["histories"]["why"]
    for args in ((), ("--only-missing",), ("--cascade",)):
        assert made.run("backfill", *ALL, *args) == DONE
        assert "nothing to do" in made.out
    assert made.seen() == before


def test_what_was_pruned_stays_so_unless_it_is_asked_for(made: Shop) -> None:
    text = re.sub(r"user_simscores = \d+", "user_simscores = 2", made.config.read_text())
    made.config.write_text(text)
    assert made.run("prune") == DONE, made.told
    assert ("user_simscores", DAYS[0]) not in made.seen()
    assert made.run("status") == DONE
    assert f"{DAYS[0]} to {DAYS[3]} " in made.out
    assert "whole, but for user_simscores, pruned" in made.out
    stages = plan_of(made, *ALL)[str(DAYS[0])]
    assert stages["embed"]["action"] == "leave"
    assert stages["embed"]["why"] == "pruned: user_simscores; --remake makes it anew"
    assert made.run("backfill", *ALL) == DONE
    assert ("user_simscores", DAYS[0]) not in made.seen()
    assert stale(made) == {}
    assert made.run("backfill", *ALL[:2], "--end-ds", DAYS[0], "--remake") == DONE
    assert ("user_simscores", DAYS[0]) in made.seen()


def test_a_hole_in_the_histories_before_the_range_is_told_and_filled(shop: Shop) -> None:
    assert shop.run("refresh", "--ds", DAYS[0]) == DONE
    later = ("--start-ds", DAYS[3], "--end-ds", DAYS[4])
    plan = plan_of(shop, *later)
    assert plan[str(DAYS[3])]["histories"]["action"] == "blocked"
    assert plan[str(DAYS[3])]["embed"]["action"] == "compute"
    assert plan[str(DAYS[4])]["histories"] == {
        "action": "blocked", "why": f"by histories of ds {DAYS[3]}"
    }  # fmt: skip
    assert shop.run("backfill", *later) == NOT_READY
    assert f"the clicks from {DAYS[1]} to {DAYS[2]} would be missing" in shop.out
    command = re.search(r"`courier (histories --start-ds [^`]+)`", shop.out)
    assert command
    assert shop.run(*command[1].split()) == DONE
    assert shop.run("backfill", *later) == DONE
    assert whole_nights(shop) == [DAYS[n] for n in (0, 3, 4)]


def test_days_before_the_beginning_of_the_log_are_refused(shop: Shop) -> None:
    text = shop.config.read_text()
    shop.config.write_text(f"history_start_ds = {DAYS[2]}\n{text}")
    assert shop.run("backfill", *ALL) == USAGE
    assert f"--start-ds {DAYS[0]} lies before history_start_ds = {DAYS[2]}" in shop.told
    assert not Path(shop.root).exists()


def test_steps_fit_into_what_the_settings_grant(shop: Shop) -> None:
    text = shop.config.read_text()
    for granted, days in (
        ("[backfill]\nmemory_gb = 2.1e-6\n", "4 days"),  # of 64 bytes a row, 8 rows a day
        ("[backfill]\ndisk_gb = 1e-9\n", "1 day"),
        ("[simscore]\nbroadcast_limit_gb = 1e-6\n", "1 day"),
    ):
        shop.config.write_text(text.replace("[gates]", f"{granted}[gates]"))
        assert shop.run("backfill", *ALL, "--dry-run") == DONE
        assert f"in steps of at most {days}\n" in shop.out, (granted, shop.out)


# ---- What stays as it is -----------------------------------------------------------------------


def test_a_day_on_hold_is_left_out_and_the_others_are_made(made: Shop) -> None:
    made.inputs.catalogues[DAYS[2]] = Catalogue(2)
    made.write_inputs()
    assert made.run("refresh", "--ds", DAYS[2]) == DONE
    assert made.run("rollback", "--ds", DAYS[2], "--reason", "a test") == DONE
    before = {key: seen for key, seen in made.seen().items() if key[1] == DAYS[2]}
    assert made.run("backfill", *ALL) == REFUSED
    assert re.search(rf"{DAYS[2]} .*held \(rolled back at .*: a test\)", made.out)
    assert {key: seen for key, seen in made.seen().items() if key[1] == DAYS[2]} == before
    assert stale(made) == {}


def test_histories_of_a_day_on_hold_are_made_as_others_read_them(made: Shop) -> None:
    made.inputs.catalogues[DAYS[4]] = Catalogue(2)
    made.write_inputs()
    assert made.run("refresh", "--ds", DAYS[4]) == DONE
    assert made.run("rollback", "--ds", DAYS[4]) == DONE
    assert made.run("backfill", "--cascade") == DONE
    made.inputs.logs[DAYS[4]] = Log((0, 1, 2))
    made.write_inputs()
    found = stale(made)
    assert found[str(DAYS[4])] == {"impressions rewritten": ["histories"]}
    why = f"ds {DAYS[4]}, from which it goes on, is made again"
    assert found[str(DAYS[5])] == {why: ["histories", "simscore"]}
    before = {k: v for k, v in made.seen().items() if k[1] == DAYS[4] and k[0] in OWN}
    assert made.run("backfill", "--cascade") == DONE
    assert {k: v for k, v in made.seen().items() if k[1] == DAYS[4] and k[0] in OWN} == before
    assert stale(made) == {}


def test_a_whole_night_that_could_not_be_made_whole_again_stays(made: Shop) -> None:
    """Its log is gone, so that scores could not follow a new catalogue."""
    made.inputs.catalogues[DAYS[5]] = Catalogue(1)
    made.write_inputs()
    for path in (made.folder / "impressions" / f"ds={DAYS[5]}").iterdir():
        path.unlink()
    before = made.seen()
    assert stale(made) == {}
    assert made.run("backfill", "--cascade") == DONE
    assert made.run("backfill", *ALL) == NOT_READY
    assert made.seen() == before
    assert made.run("status", "--ds", DAYS[5]) == DONE


def test_days_after_one_that_is_refused_wait_and_are_not_stale(made: Shop) -> None:
    made.inputs.catalogues[DAYS[1]] = Catalogue(is_bad=True)
    made.write_inputs()
    assert made.run("backfill", "--cascade") == REFUSED
    found = stale(made)
    assert list(found) == [str(DAYS[1])]
    stages = plan_of(made, *ALL)[str(DAYS[2])]
    assert stages["embed"]["why"] == f"waits for ds {DAYS[1]}, which is refused"
    assert {stage["action"] for stage in stages.values()} == {"leave"}


def test_a_night_that_lacks_its_record_alone_gets_it(made: Shop) -> None:
    files.delete(made.settings.layout.night_path(DAYS[2]))
    assert plan_of(made, *ALL)[str(DAYS[2])]["embed"] == {
        "action": "record", "why": "all tables are published"
    }  # fmt: skip
    assert made.run("backfill", *ALL) == DONE
    assert whole_nights(made) == list(DAYS)


def test_a_beginning_of_the_log_after_the_first_night_hinders_nobody_from_looking(
    made: Shop,
) -> None:
    made.config.write_text(f"history_start_ds = {DAYS[2]}\n{made.config.read_text()}")
    assert made.run("status") == DONE
    assert made.run("backfill", "--cascade") in (DONE, REFUSED)


# ---- Less than all -----------------------------------------------------------------------------


def test_only_what_is_missing_leaves_what_is_stale(made: Shop) -> None:
    made.inputs.catalogues[DAYS[1]] = Catalogue(1)
    made.write_inputs()
    files.delete_tree(str(Path(made.root) / "test" / "item_features" / f"ds={DAYS[4]}"))
    days = plan_of(made, *ALL, "--only-missing")
    assert days[str(DAYS[1])]["embed"] == {
        "action": "leave", "why": "not asked for; catalogue rewritten"
    }  # fmt: skip
    before = made.seen()
    assert made.run("backfill", *ALL, "--only-missing") == DONE
    after = made.seen()
    assert {key: seen for key, seen in after.items() if key in before and key[1] < DAYS[4]} == {
        key: seen for key, seen in before.items() if key[1] < DAYS[4]
    }
    assert ("item_features", DAYS[4]) in after


def test_late_rows_are_taken_in_within_late_days_and_nothing_else(made: Shop) -> None:
    """The log of an older day grew too, and one was rewritten; a catalogue was replaced."""
    made.inputs.logs[DAYS[0]] = Log((0, 1, 2))
    made.inputs.logs[DAYS[4]] = Log((0, 1, 2))
    made.inputs.logs[DAYS[5]] = Log((0, 1), encoding=1)
    made.inputs.catalogues[DAYS[5]] = Catalogue(2)
    made.write_inputs()
    assert computed(made, "--late") == [DAYS[4]]
    assert made.run("backfill", "--late") == DONE
    assert len(contents(made)["user_simscores", DAYS[4]]) == 3
    assert computed(made, "--late") == []
    assert str(DAYS[5]) in stale(made)


def test_only_one_choice_is_made_and_days_are_given(shop: Shop) -> None:
    assert shop.run("backfill", "--late", "--cascade") == USAGE
    assert shop.run("backfill", *ALL, "--cascade", "--remake") == USAGE
    assert shop.run("backfill") == USAGE
    assert shop.run("backfill", "--only-missing") == USAGE
    assert shop.run("backfill", "--start-ds", DAYS[1], "--end-ds", DAYS[0]) == USAGE
    assert not Path(shop.root).exists()


# ---- What is stale -----------------------------------------------------------------------------


def test_a_rewritten_log_makes_days_stale_as_far_as_it_reaches(made: Shop) -> None:
    made.inputs.logs[DAYS[0]] = Log((0, 1, 2))
    made.write_inputs()
    found = stale(made)
    assert list(found) == [str(ds) for ds in DAYS]
    assert found[str(DAYS[0])] == {"impressions rewritten": ["histories", "simscore"]}
    why = f"ds {DAYS[0]}, from which it goes on, is made again"
    assert found[str(DAYS[1])] == {why: ["histories", "simscore"]}
    assert made.run("status") == DONE
    told = re.search("`courier (backfill --cascade [^`]+)`", made.out)
    assert told
    assert made.run(*told[1].split()) == DONE, made.told
    assert stale(made) == {}


def test_what_comes_out_the_same_ends_a_cascade(made: Shop) -> None:
    """The histories of later days do not show the click of the first any more: they stay."""
    made.inputs.logs[DAYS[0]] = Log((0, 1, 2))
    made.write_inputs()
    assert made.run("refresh", "--start-ds", DAYS[0], "--end-ds", DAYS[3]) == DONE
    found = stale(made)
    assert str(DAYS[0]) not in found
    before = made.seen()
    assert made.run("backfill", "--cascade") == DONE
    assert stale(made) == {}
    assert made.seen()["user_histories", DAYS[5]] == before["user_histories", DAYS[5]]


def test_a_rolled_back_day_makes_later_ones_stale_and_says_so(made: Shop) -> None:
    made.inputs.catalogues[DAYS[1]] = Catalogue(2)
    made.write_inputs()
    assert made.run("backfill", *ALL) == DONE
    assert made.run("rollback", "--ds", DAYS[1], "--reason", "a test") == DONE
    found = stale(made)
    assert str(DAYS[1]) not in found  # it is on hold
    assert f"ds {DAYS[1]}, from which it goes on, was rolled back" in found[str(DAYS[2])]
    assert made.run("backfill", "--cascade") == DONE
    assert stale(made) == {}
    assert made.run("status") == DONE
    assert "on hold" in made.out


def test_an_accepted_day_makes_later_ones_stale_and_says_so(made: Shop) -> None:
    made.inputs.catalogues[DAYS[1]] = Catalogue(is_bad=True)
    made.write_inputs()
    accept = ("--accept", "image_coverage", "--reason", "a test")
    assert made.run("refresh", "--ds", DAYS[1], *accept) == DONE
    why = f"ds {DAYS[1]}, from which it goes on, was accepted (image_coverage)"
    assert why in stale(made)[str(DAYS[2])]


def test_other_images_under_the_same_run_make_later_days_stale(made: Shop) -> None:
    made.draw_images()
    before, remake = run_ids(made), ("refresh", "--ds", DAYS[0], "--remake")
    assert made.run(*remake) == DONE
    assert run_ids(made) == before
    assert stale(made)[str(DAYS[1])] == {
        f"ds {DAYS[0]}, from which it goes on, was made again": ["embed"],
        "upstream embed made again": ["item-features"],
        "upstream embed made again; upstream item-features made again": ["simscore"],
    }
    assert set(computed(made, "--cascade")) == set(DAYS[1:5])  # as far as the window reaches
    assert made.run("backfill", "--cascade") == DONE, made.told
    assert stale(made) == {}
    there = made.seen()
    assert made.run(*remake) == DONE  # with the same images
    assert stale(made) == {}
    assert made.seen() == there


def test_a_filled_hole_or_a_day_that_is_gone_makes_no_day_stale(shop: Shop) -> None:
    for ds in (DAYS[0], DAYS[2]):
        assert shop.run("embed", "--ds", ds) == DONE
    assert shop.run("embed", "--ds", DAYS[1]) == DONE
    assert stale(shop) == {}
    files.delete_tree(str(Path(shop.root) / "test" / "item_embeddings" / f"ds={DAYS[0]}"))
    assert stale(shop) == {}


def test_days_that_lost_what_they_went_on_from_stay(made: Shop) -> None:
    """As `courier prune` leaves them: all of the first two days is gone, their log too."""
    for ds in DAYS[:2]:
        for path in (made.folder / "impressions" / f"ds={ds}").iterdir():
            path.unlink()
        for name in (
            *(f"test/{one}" for one in OWN),
            "shared/user_histories",
            "shared/recent_clicks",
        ):
            files.delete_tree(str(Path(made.root) / name / f"ds={ds}"))
        files.delete(made.settings.layout.night_path(ds))
    assert stale(made) == {}
    assert made.run("refresh", "--start-ds", DAYS[2], "--end-ds", DAYS[5]) == DONE
    assert "nothing to do" in made.told
    made.inputs.catalogues[DAYS[2]] = Catalogue(1)
    made.write_inputs()
    assert made.run("refresh", "--ds", DAYS[2]) == NOT_READY
    assert "of the histories of the day before, which were pruned" in made.told
    assert made.run("item-features", "--ds", DAYS[2]) == NOT_READY
    assert made.run("embed", "--ds", DAYS[2]) == DONE, made.told
    assert made.run("item-features", "--ds", DAYS[2]) == DONE


def test_a_cascade_leaves_what_is_missing(made: Shop) -> None:
    files.delete_tree(str(Path(made.root) / "test" / "item_features" / f"ds={DAYS[5]}"))
    made.inputs.catalogues[DAYS[1]] = Catalogue(1)
    made.write_inputs()
    assert made.run("backfill", "--cascade", *ALL) == DONE
    assert stale(made) == {}


def test_a_day_without_a_pin_is_refused_by_name_and_hinders_nobody_from_looking(
    made: Shop,
) -> None:
    """As the first days of a shop are, which have an encoder, or not even that."""
    made.inputs.catalogues[DAYS[4]] = Catalogue(1)
    made.write_inputs()
    text = made.config.read_text()
    made.config.write_text(text.replace(f"from_ds = {DAYS[0]}", f"from_ds = {DAYS[1]}"))
    files.delete_tree(str(Path(made.root) / "test" / "item_features" / f"ds={DAYS[0]}"))
    assert made.run("backfill", *ALL) == USAGE
    assert f"No pin holds for ds {DAYS[0]}" in made.told
    assert list(stale(made)) == [str(DAYS[4]), str(DAYS[5])]
    assert made.run("backfill", "--cascade") == DONE
    assert stale(made) == {}
