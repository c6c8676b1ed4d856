"""`courier validate` finds every way to break a published root, and nothing in sound ones."""

import json
import re
import shutil
from typing import Any

import pytest

from feature_jobs.store.local import LocalStore
from pipelines.cli import main
from pipelines.reports import audit
from pipelines.reports import validate as validations
from pipelines.reports.validate_parts import BROKEN, NOT_READY, Part
from pipelines.running import publishing
from tests.conftest import Artefacts, pinned
from tests.pipelines.test_join import as_samples, impressions, join, write_samples
from tests.support import broken_roots, broken_training_sets
from tests.support.broken_roots import FAULTS, Fault, Root
from tests.support.commands import Capture, courier, make_night, paragraph, published
from tests.support.world import DAYS, NORMAL, Kept, World, draw_impressions, picture

OF_FILES = ("a file ", "there is a file too many")


@pytest.fixture(scope="module")
def two_nights(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Kept:
    """Makes a shop after two nights and the training rows of the second, once for all faults.

    It has few impressions, so that it has few files, of several shards still.
    """
    world = pinned(World(tmp_path_factory.mktemp("two-nights") / "shop"), artefacts)
    for number, day in enumerate(DAYS[:2]):
        world.write_images(day)
        world.write_impressions(day, draw_impressions(day, seed=number, count=30))
        make_night(world.settings(), day)
    assert courier(world, "training-rows", "--ds", str(DAYS[1])) == 0
    write_samples(world, DAYS[1], as_samples(impressions(world, DAYS[1])))
    assert join(world, "--ds", DAYS[1], "--label", "clicked") == 0
    for folder in ("features/_staging", "features/test/_runs"):
        shutil.rmtree(world.folder / folder, ignore_errors=True)  # copied for nothing
    return Kept(world)


@pytest.fixture
def shop(two_nights: Kept) -> World:
    return two_nights.again()


def validate(world: World, capsys: Capture, *args: str) -> tuple[int, dict[str, Any]]:
    """Validates the second night; returns the exit status and what was found of the day."""
    capsys.readouterr()
    status = courier(world, "validate", "--ds", str(DAYS[1]), "--json", *args)
    return status, json.loads(capsys.readouterr().out)


def beside_gates(day: dict[str, Any]) -> list[dict[str, str]]:
    """Returns what was found but for gates, of which some warn of shops as small as these."""
    return [found for found in day["findings"] if not found["law"].startswith("gate ")]


# ---- Sound roots -------------------------------------------------------------------------------


def test_sound_nights_are_sound_and_their_scores_are_computed_again(
    refreshed: World, capsys: Capture
) -> None:
    capsys.readouterr()
    every = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[3]))
    assert courier(refreshed, "validate", *every, "--json") == 0
    days = json.loads(capsys.readouterr().out)
    assert [day["ds"] for day in days] == [str(day) for day in DAYS]
    for day in days:
        assert beside_gates(day) == []
        assert (day["sound"], day["recomputed_impressions"]) == (True, 152)
        assert day["tables"]["user_simscores"]["rows"] == 152
        assert day["rows"] == sum(table["rows"] for table in day["tables"].values())
        assert 0 < day["file_seconds"] < day["seconds"]


# ---- Faults ------------------------------------------------------------------------------------


def test_there_are_more_than_forty_ways_to_break_a_root_of_every_table() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 80
    tables = {fault.table for fault in FAULTS} - {""}
    assert len(tables) == 8
    assert sum(fault.table == broken_training_sets.SET for fault in FAULTS) > 20


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_is_found_in_its_table_and_by_its_law(fault: Fault, shop: World) -> None:
    fault.breaks(Root(shop))
    (day,) = validations.validate(shop.settings(), [broken_roots.DS], fast=False)
    told = [(found.level, found.table, found.law) for found in day.findings]
    assert any(
        (level, table) == (fault.level, fault.table) and law.startswith(fault.law)
        for level, table, law in told
    ), told
    if not fault.law.startswith(OF_FILES):  # it was written back as if it had been made so
        assert not [law for _, _, law in told if law.startswith(OF_FILES)]


# ---- Statuses ----------------------------------------------------------------------------------


def told_of(day: dict[str, Any], level: str) -> list[tuple[str, str]]:
    return [(x["table"], x["law"]) for x in day["findings"] if x["level"] == level]


def test_all_faults_of_all_days_are_told_and_the_worst_status_wins(
    shop: World, capsys: Capture
) -> None:
    root = Root(shop)
    broken_roots.a_file_gone(root)
    broken_roots.a_mean_off(root)
    broken_roots.no_success(root)
    gone = next(root.folder("item_rejects", DAYS[0]).glob("*.parquet"))
    gone.unlink()
    capsys.readouterr()
    every = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[2]))
    assert courier(shop, "validate", *every) == 1
    printed = capsys.readouterr()
    out = " ".join(printed.out.split())
    for told in (
        f"broken item_rejects: a file of the manifest is not there: {gone} is gone",
        "broken item_embeddings: a file of the manifest is not there",
        "broken user_simscores: sim_mean is not the mean of the real scores: 1 of",
        "not ready item_features: _SUCCESS does not name the manifest",
        "not ready night: nothing is published of this day",
        "unverified user_simscores: no score was computed again: item_embeddings, item_features",
    ):
        assert told in out
    (error,) = [line for line in printed.err.splitlines() if line.startswith("Error: ")]
    assert "Of 2 of 3 days 3 laws are broken. The first: ds 2026-03-01, item_rejects: " in error
    assert error.endswith(
        " What is damaged is made again by `courier refresh --ds 2026-03-01 --remake`."
    )


@pytest.mark.parametrize("law", [law for laws in validations.REMEDIES for law in laws])
def test_each_remedy_is_of_a_law_that_a_fault_breaks(law: str) -> None:
    assert any(fault.law.startswith(law) for fault in FAULTS)


def test_a_broken_law_ends_with_what_mends_it(shop: World, capsys: Capture) -> None:
    root = Root(shop)
    broken_roots.a_mean_off(root)
    assert courier(shop, "validate", "--ds", str(DAYS[1])) == 1
    told = paragraph(capsys)
    assert "Of ds 2026-03-02 1 law is broken. The first: " in told
    assert told.endswith(
        "Make the day again, `courier refresh --ds 2026-03-02 --remake --full`, or bring back what "
        "was published of the same day before: `courier rollback --ds 2026-03-02`."
    )
    broken_roots.a_file_too_many(root)
    assert courier(shop, "validate", "--ds", str(DAYS[1])) == 1
    assert "Of ds 2026-03-02 2 laws are broken. The first: " in paragraph(capsys)


def test_what_is_published_just_now_ends_with_4_and_so_does_a_day_that_is_not_there(
    shop: World, capsys: Capture
) -> None:
    broken_roots.no_success(Root(shop))
    assert courier(shop, "validate", "--ds", str(DAYS[1])) == 4
    told = "is being published just now, or a run died at it: ask again, or run `courier refresh"
    assert told in paragraph(capsys)
    assert courier(shop, "validate", "--ds", str(DAYS[2])) == 4
    assert f"`courier refresh --ds {DAYS[2]}` makes it" in paragraph(capsys)
    assert courier(shop, "validate") == 2
    assert courier(shop, "validate", "--ds", "2026-13-01") == 2


def test_a_table_that_is_published_anew_meanwhile_is_no_broken_one(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that were there when the manifest was read are put away by the other run."""
    root, real = Root(shop), validations.check_part

    def check(*args: Any) -> Part:
        (root.folder("item_features") / "_SUCCESS").unlink(missing_ok=True)
        for path in root.folder("item_features").glob("*.parquet"):
            path.unlink(missing_ok=True)  # parts are checked side by side
        return real(*args)

    monkeypatch.setattr(validations, "check_part", check)
    status, day = validate(shop, capsys)
    assert (status, told_of(day, "broken")) == (4, [])
    assert told_of(day, "not ready") == [("item_features", "_SUCCESS does not name the manifest")]


def test_a_night_that_is_published_anew_is_not_ready_and_never_broken(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables follow one another: between two of them, those there are not of one night."""
    shop.put(NORMAL[2], picture(50))
    shop.write_impressions(DAYS[1], draw_impressions(DAYS[1], seed=7, count=30))
    real, found = publishing.Publication.run, []

    def look() -> None:
        found.extend(validations.validate(shop.settings(), [DAYS[1]], fast=True))

    def publish_one(publication: publishing.Publication) -> None:
        look()
        real(publication)

    monkeypatch.setattr(publishing.Publication, "run", publish_one)
    assert courier(shop, "refresh", "--ds", str(DAYS[1]), "--full") == 0
    look()
    first, *between, last = found
    assert not first.of_level(NOT_READY)
    assert not last.of_level(NOT_READY)
    assert len(between) == 5
    for day in found:
        assert not day.of_level(BROKEN), day.of_level(BROKEN)
    laws = {one.law for day in between for one in day.of_level(NOT_READY)}
    assert laws >= {
        "an upstream was made again since", "the night's record names what is not published",
    }  # fmt: skip
    assert all("is being published just now" in x.text for x in between[0].of_level(NOT_READY))


def test_a_record_that_comes_meanwhile_is_not_ready(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = Root(shop), validations.check_part
    right = root.record.read_text()
    broken_roots.a_record_of_another_version(root)

    def check(*args: Any) -> Part:
        root.record.write_text(right)
        return real(*args)

    monkeypatch.setattr(validations, "check_part", check)
    status, day = validate(shop, capsys)
    law = "the night's record names what is not published"
    assert (status, told_of(day, "broken"), told_of(day, "not ready")) == (
        4, [], [("item_features", law)],
    )  # fmt: skip


def test_what_a_refused_run_has_left_excuses_nothing(shop: World, capsys: Capture) -> None:
    broken_roots.a_record_of_another_version(Root(shop))
    staged = shop.root / "_staging/test/item-features" / f"ds={DAYS[1]}" / "run"
    (staged / "item_features").mkdir(parents=True)
    (staged / "item_features/_staged.json").write_text("{}")
    assert validate(shop, capsys)[0] == 4
    (staged / "refused.json").write_text('{"message": "gate churn"}')
    assert validate(shop, capsys)[0] == 1


def test_a_gate_ends_with_3_unless_a_law_is_broken(shop: World, capsys: Capture) -> None:
    shop.settings()
    shop.config.write_text(shop.config.read_text().replace("rejects.fail = 0.5", ""))
    args = ["validate", "--config", str(shop.config), "--ds", str(DAYS[1])]
    capsys.readouterr()
    assert main([*args, "--json"]) == 3
    day = json.loads(capsys.readouterr().out)
    assert not day["sound"]
    assert told_of(day, "refused") == [("", "gate rejects")]
    (gate,) = [gate for gate in day["gates"] if gate["level"] == "fail"]
    assert (gate["gate"], gate["fail"]) == ("rejects", 0.05)
    assert main(args) == 3
    printed = capsys.readouterr()
    assert "refused night: gate rejects: " in " ".join(printed.out.split())
    told = "1 gate would refuse what is published. The first: ds 2026-03-02, the night: gate"
    assert told in printed.err
    assert "`courier rollback --ds 2026-03-02`" in printed.err
    assert "usually: " in printed.err  # the table of gates
    broken_roots.a_file_gone(Root(shop))
    assert main(args) == 1


def test_fast_takes_bytes_for_right_and_all_else_not(shop: World, capsys: Capture) -> None:
    root = Root(shop)
    manifest = root.manifest("item_features")
    manifest["files"][0]["sha256"] = "0" * 64
    root.publish_manifest("item_features", manifest)
    status, day = validate(shop, capsys, "--fast")
    assert (status, day["sound"], day["recomputed_impressions"]) == (0, True, 32)
    status, day = validate(shop, capsys)
    assert status == 1
    law = "a file has another content than was published"
    assert told_of(day, "broken") == [("item_features", law)]
    broken_roots.a_mean_off(root)
    assert validate(shop, capsys, "--fast")[0] == 1


def test_a_day_of_an_earlier_version_is_checked_as_far_as_its_manifest_says(
    shop: World, capsys: Capture
) -> None:
    root = Root(shop)
    manifest = root.manifest("item_features")
    for name in ("made_from", "inputs", "counts", "histograms"):
        manifest.pop(name, None)
    root.write_manifest("item_features", manifest | {"versions": {"courier": "0.0.1"}})
    status, day = validate(shop, capsys)
    assert (status, day["sound"]) == (0, True)
    told = {x["law"]: x["text"] for x in day["findings"] if x["table"] == "item_features"}
    text = told["the manifest lacks what it would be checked by"]
    assert text.startswith("it says nothing of inputs, made_from, counts, histograms (it was made ")
    assert "by COURIER 0.0.1, this is " in text
    root.change("item_features", lambda rows: broken_roots.put(rows, "centre_distance", -1.0))
    assert validate(shop, capsys)[0] == 1


def test_a_manifest_of_this_version_that_lacks_something_is_not_called_another_versions(
    shop: World, capsys: Capture
) -> None:
    manifest = Root(shop).manifest("item_features")
    del manifest["inputs"]
    Root(shop).write_manifest("item_features", manifest)
    _, day = validate(shop, capsys)
    told = [x["text"] for x in day["findings"] if x["table"] == "item_features"]
    assert "it says nothing of inputs" in told


@pytest.mark.parametrize(
    "what", ["audit.recompute", "audit_joins.recompute_set", "judge_published"]
)
def test_an_error_in_the_code_is_told_as_none_of_the_data(
    shop: World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("recompute() takes 3 positional arguments but 4 were given")

    monkeypatch.setattr(f"pipelines.reports.validate.{what}", broken)
    with pytest.raises(TypeError, match="positional arguments"):
        validations.validate(shop.settings(), [broken_roots.DS], fast=True)


def test_the_gates_of_a_stage_are_asked_though_those_of_another_cannot_be(
    shop: World, capsys: Capture
) -> None:
    """Two of this shop's twelve items have no image, whatever its scores' manifest lacks."""
    root = Root(shop)
    manifest = root.manifest("user_simscores")
    del manifest["counts"]
    root.write_manifest("user_simscores", manifest)
    (root.folder("user_histories") / "_SUCCESS").unlink()
    _, day = validate(shop, capsys)
    told = {x["table"]: x["text"] for x in day["findings"] if x["law"].startswith("its gates")}
    assert told == {
        "user_histories": "user_histories of ds 2026-03-02 not published",
        "user_simscores": "they judge by what a manifest does not say: 'counts'",
    }
    assert [gate["gate"] for gate in day["gates"]] == ["image_coverage"]


def test_a_bucket_without_impressions_is_no_sound_one(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = audit._rows_of_bucket
    monkeypatch.setattr(audit, "_rows_of_bucket", lambda *args: read(*args).slice(0, 0))
    status, day = validate(shop, capsys)
    assert status == 1
    (told,) = [x["text"] for x in day["findings"] if x["level"] == "broken"]
    assert told == "32 published user_simscores are of no impression of the log"
    published = audit._published
    monkeypatch.setattr(audit, "_published", lambda *args: published(*args).slice(0, 0))
    status, day = validate(shop, capsys)
    assert (status, day["recomputed_impressions"]) == (0, 0)
    (told,) = [x["text"] for x in day["findings"] if x["law"] == "no score was computed again"]
    assert told == "ds 2026-03-02 has no impressions in this bucket: nothing to look at"


@pytest.mark.parametrize("lost", ["impressions", "encoder"])
def test_what_cannot_be_computed_again_is_said_to_be_unverified(
    lost: str, shop: World, capsys: Capture
) -> None:
    if lost == "impressions":
        shutil.rmtree(shop.folder / "impressions")
    else:
        shop.pins = [pin.replace("encoder = '", "encoder = '/no/such") for pin in shop.pins]
    status, day = validate(shop, capsys)
    assert (status, day["sound"], day["recomputed_impressions"]) == (0, True, 0)
    of_set = (broken_training_sets.SET, "no sample was joined again")  # with the nights as they are
    told = [("user_simscores", "no score was computed again")]
    assert told_of(day, "unverified") == told + [of_set] * (lost == "impressions")


def test_tables_without_a_night_are_checked_and_it_is_said(shop: World, capsys: Capture) -> None:
    Root(shop).record.unlink()
    Root(shop).latest.unlink()
    status, day = validate(shop, capsys)
    assert (status, told_of(day, "unverified")) == (0, [("", "there is no record of the night")])


def test_nothing_is_written(shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root may lie on a mount that is read-only."""

    def refuse(_: LocalStore, path: str, *__: Any, **___: Any) -> None:
        raise AssertionError(f"{path} is written")

    writes = [name for name in ("write_bytes", "atomic_writer", "link", "move", "step", "lock")]
    writes += ["delete", "delete_seen", "delete_tree", "write_if_unchanged", "_make_folder"]
    for name in writes:
        monkeypatch.setattr(LocalStore, name, refuse)
    before = published(shop)
    status, day = validate(shop, capsys)
    assert (status, day["recomputed_impressions"]) == (0, 32)
    assert published(shop) == before


@pytest.mark.first_night
def test_an_empty_day_and_a_night_of_items_alone_are_sound(world: World, capsys: Capture) -> None:
    world.write("impressions", DAYS[1], [], rows_to_group=1)
    assert courier(world, "refresh", "--ds", str(DAYS[1])) == 0
    status, day = validate(world, capsys)
    assert (status, beside_gates(day)) == (0, [])
    assert day["tables"]["user_simscores"]["rows"] == 0
    for name in ("user_histories", "recent_clicks", "user_simscores"):
        shutil.rmtree(Root(world).folder(name))
    Root(world).record.unlink()
    world.extra_settings = 'tables = "items"'
    assert courier(world, "refresh", "--ds", str(DAYS[1])) == 0
    status, day = validate(world, capsys)
    assert (status, beside_gates(day), len(day["tables"])) == (0, [], 3)


def test_tables_that_lie_elsewhere_than_the_settings_say_are_no_missing_days(
    shop: World, capsys: Capture
) -> None:
    shop.extra_settings = '[output]\npartition = "dt={ds}"'
    assert courier(shop, "validate", "--ds", str(DAYS[1])) == 2
    assert "[output] partition" in paragraph(capsys)


def test_the_rate_is_that_of_reading_files() -> None:
    """What is asked of tables together, and of a sample, says nothing of how fast files are."""
    day = validations.Day(DAYS[1], seconds=10.0, file_seconds=2.0)
    day.tables = {"item_features": {"rows": 1, "bytes": 8_000_000}}
    assert day.as_json()["mb_per_second"] == 4.0


def test_people_get_a_line_for_each_day(shop: World, capsys: Capture) -> None:
    capsys.readouterr()
    assert courier(shop, "validate", "--ds", str(DAYS[1])) == 0
    head, line, *warned = capsys.readouterr().out.splitlines()
    assert head.split() == ["ds", "tables", "rows", "MB", "MB/s"]
    assert re.fullmatch(
        r"2026-03-02 +8 +\d+ +0\.\d +\d+\.\d  sound, \d warning, 32 impressions scored again", line
    )
    assert warned == [
        "  warning     night: gate image_coverage: 10 of 12 catalogue items have an embedding "
        "(83.3%; it warns at 90.0%, and refuses at 50.0%)"
    ]
