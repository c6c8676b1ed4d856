"""Estimates follow from what runs of the same root took, and from the tables that are there."""

import datetime as dt
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from feature_jobs import schemas
from feature_jobs.schemas import Table
from feature_jobs.store import files
from pipelines import nightly, stages
from pipelines.config import Settings, load_settings
from pipelines.running import estimates
from pipelines.running.estimates import Estimate, duration, estimate, size
from pipelines.running.stage import Stage
from pipelines.running.states import Look
from pipelines.stages import EMBED, HISTORIES, ITEM_FEATURES, SIMSCORE, TRAINING_ROWS, Kind
from tests.support.broken_roots import seal
from tests.support.small_nights import JustAStage
from tests.support.world import DAYS, World

FIRST = dt.date(2026, 3, 1)


@dataclass(frozen=True)
class Planned(JustAStage):
    """Is a stage that looks at images, of items of which some are known."""

    images: int = 0
    items_known: int | None = None


def day(number: int) -> dt.date:
    return FIRST + dt.timedelta(days=number)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return with_costs(tmp_path, "")


def with_costs(folder: Path, costs: str) -> Settings:
    path = folder / "courier.toml"
    path.write_text(
        'root = "features"\nfeature_set = "test"\nhistory_len = 10\n[catalogue]\n'
        'path = "catalogue/{ds}"\nimage_roots = ["images"]\n[impressions]\npath = "log/{ds}"\n'
        f"[costs]\n{costs}\n"
    )
    return load_settings(str(path))


def stage(
    settings: Settings, kind: Kind, number: int, rows: int, upstream: tuple[Stage, ...] = (),
    **inputs: Any,
) -> Stage:  # fmt: skip
    of_kind: dict[str, Any] = {
        EMBED.name: {"catalogue": {"rows": rows}},
        HISTORIES.name: {"log_rows": {str(day(number)): rows}},
        TRAINING_ROWS.name: {"log": [{"rows": rows}, {"rows": 10**9}]},
    }
    return Stage(
        kind, day(number), settings.layout, shards=1, identities={}, settings={},
        inputs=of_kind.get(kind.name, {}) | inputs, upstream=upstream,
        input_rows=0 if kind is ITEM_FEATURES else rows,
    )  # fmt: skip


def embed(
    settings: Settings, number: int, items: int, images: int, known: int | None = None
) -> Planned:
    return Planned(stage(settings, EMBED, number, items), images, known)


def scores(settings: Settings, number: int, rows: int, **inputs: Any) -> Planned:
    return Planned(stage(settings, SIMSCORE, number, rows, **inputs))


def measured(rows: str, count: int, wall: float, cpu: float, **work: float) -> dict[str, Any]:
    """Returns what run.json says of a stage that took so many seconds."""
    rates = {f"{rows}_per_second": count / wall} if count else {}
    return {"wall_seconds": wall, "cpu_seconds": cpu, rows: count, "rates": rates, "work": work}


def note_run(
    settings: Settings, number: int, started: str = "", run_id: str = "r", **stages: dict[str, Any]
) -> None:
    folder = Path(settings.layout.runs_folder(day(number)), run_id)
    folder.mkdir(parents=True)
    of_names = {name.replace("_", "-"): stage for name, stage in stages.items()}
    run = {"started": started or str(day(number)), "stages": of_names}
    (folder / "run.json").write_text(json.dumps(run))


def of(settings: Settings, *planned: Planned) -> Estimate:
    return estimate(settings, planned, Look())


# ---- Sums ----------------------------------------------------------------------------------------


def test_rows_of_a_day_count_once_whatever_is_made_of_them(settings: Settings) -> None:
    planned = []
    for number in (0, 1):
        one = embed(settings, number, items=100, images=90)
        features = Planned(stage(settings, ITEM_FEATURES, number, 0, upstream=(one.stage,)))
        histories = Planned(stage(settings, HISTORIES, number, 500))
        planned += [one, features, histories, scores(settings, number, 500)]
    found = of(settings, *planned)
    assert (found.items, found.images, found.impressions) == (200, 180, 1000)
    assert [(kind.name, kind.days) for kind in found.kinds] == [(k.name, 2) for k in stages.NIGHT]
    alone = of(settings, planned[1], planned[-1])  # whose upstream is there already
    assert (alone.items, alone.images, alone.impressions) == (100, 0, 500)


UNCHANGED = {"images_unchanged": 1.0}


@pytest.mark.parametrize(
    ("known", "items", "images", "to_embed"),
    [
        (None, 100, 90, 90),  # nothing to go on from: all of them
        (100, 100, 90, 18),  # the share of earlier runs
        (40, 100, 90, 60),  # more new items than that share
        (200, 100, 90, 18),
        (0, 100, 90, 90),  # not more than there are
    ],
)
def test_images_to_embed_are_new_items_or_the_share_of_earlier_runs(
    settings: Settings, known: int | None, items: int, images: int, to_embed: int
) -> None:
    for number, share in enumerate((0.1, 0.2, 0.9)):
        work = {"images_embedded": 1000 * share, "forward_seconds": 1.0, **UNCHANGED}
        note_run(settings, number, embed=measured("items", 1000, 10, 10, **work))
    note_run(  # the first night had nothing to go on from, and tells no share
        settings, 5, embed=measured("items", 1000, 10, 10, images_embedded=1000)
    )
    found = of(settings, embed(settings, 9, items, images, known))
    assert found.images_to_embed == to_embed


# ---- Time ----------------------------------------------------------------------------------------


def test_seconds_are_rows_times_the_median_of_what_runs_took(settings: Settings) -> None:
    for number, wall in enumerate((10.0, 20.0, 900.0)):
        note_run(settings, number, simscore=measured("impressions", 1000, wall, 2 * wall))
    found = of(settings, scores(settings, 5, 3000), scores(settings, 6, 1000))
    assert found.cost == estimates.Cost(80.0, 160.0)


def test_embedding_and_looking_have_rates_of_their_own(settings: Settings) -> None:
    """A night that embeds all takes longer than the next one, by what the images take."""
    work = {"images_embedded": 100.0, "decode_seconds": 20.0, "forward_seconds": 60.0}
    note_run(settings, 0, embed=measured("items", 1000, 50.0, 100.0, **work))
    all_again = of(settings, embed(settings, 1, 1000, 100)).cost
    assert all_again == estimates.Cost(50.0, 100.0)
    none = of(settings, embed(settings, 1, 1000, 1000, known=1000)).cost
    assert none == estimates.Cost(pytest.approx(10.0), pytest.approx(20.0))
    ten = of(settings, embed(settings, 1, 1010, 1000, known=1000)).cost
    assert ten == estimates.Cost(pytest.approx(10.1 + 4.0), pytest.approx(20.2 + 8.0))


def test_where_threads_wait_for_a_gpu_embedding_is_the_whole_time(settings: Settings) -> None:
    work = {"images_embedded": 100.0, "forward_seconds": 60.0}
    note_run(settings, 0, embed=measured("items", 1000, 70.0, 10.0, **work))
    assert of(settings, embed(settings, 1, 5, 100)).cost == estimates.Cost(70.0, 10.0)


def test_days_of_one_job_are_taken_together(settings: Settings) -> None:
    """They share its cost equally, though the first embeds all and a closed one has few rows."""
    for number, embedded in enumerate((300, 0, 0)):
        work = {"images_embedded": embedded, "forward_seconds": embedded * 0.5, **UNCHANGED}
        note_run(settings, number, "one job", embed=measured("items", 1000, 60.0, 60.0, **work))
    note_run(settings, 3, "another", simscore=measured("impressions", 1, 5.0, 5.0))
    note_run(settings, 4, "another", simscore=measured("impressions", 999, 5.0, 5.0))
    found = of(settings, embed(settings, 5, 3000, 300))
    assert found.cost == estimates.Cost(pytest.approx(180.0), pytest.approx(180.0))
    assert of(settings, scores(settings, 5, 2000)).cost == estimates.Cost(20.0, 20.0)


def test_a_log_that_histories_begin_from_is_read_too(settings: Settings) -> None:
    note_run(settings, 0, simscore=measured("impressions", 100, 1.0, 1.0))
    earlier = {"earlier_log": [{"rows": 300}, {"rows": 600}]}
    found = of(settings, scores(settings, 1, 100, **earlier))
    assert found.cost == estimates.Cost(10.0, 10.0)
    assert found.impressions == 100


def test_where_a_kind_has_no_rate_neither_it_nor_the_sum_has_a_time(settings: Settings) -> None:
    note_run(settings, 0, simscore=measured("impressions", 100, 1.0, 1.0))
    planned = [scores(settings, 1, 100), embed(settings, 1, 50, 50)]
    found = of(settings, *planned)
    assert found.cost is None
    known = {kind.name: kind.cost is not None for kind in found.kinds}
    assert known == {"embed": False, "simscore": True}
    assert [line for line in found.lines() if line.endswith("no rates yet")] == [
        f"{'embed':15}1 day, {size(50 * 1129)}, no rates yet", f"{'time':15}no rates yet",
    ]  # fmt: skip
    told = found.as_json()
    assert told["seconds"] is told["core_seconds"] is told["stages"]["embed"]["seconds"] is None
    assert told["stages"]["simscore"]["seconds"] == 1.0


def test_images_without_a_rate_have_no_time_and_none_need_none(settings: Settings) -> None:
    note_run(settings, 0, embed=measured("items", 100, 1.0, 1.0, **UNCHANGED))
    assert of(settings, embed(settings, 1, 100, 100, known=100)).cost == estimates.Cost(1.0, 1.0)
    assert of(settings, embed(settings, 1, 101, 100, known=100)).cost is None


def test_runs_without_rates_are_passed_over(settings: Settings) -> None:
    """Earlier versions noted none, and times as seconds; and a stage may have been there."""
    old = {"stages": {"simscore": {"counts": {}}}, "started": 1.7e9, "ended": 1.7e9}
    there = {"simscore": {"why": [], "counts": {}}, "embed": {}}
    for number in range(3):
        folder = Path(settings.layout.runs_folder(day(10 + number)), "r")
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(old))
        note_run(settings, 20 + number, **there)
    Path(settings.layout.runs_folder(day(30)), "r").mkdir(parents=True)  # refused.json alone
    Path(settings.layout.runs_folder(day(30))).with_name("notes").mkdir()
    assert of(settings, scores(settings, 40, 100)).cost is None
    note_run(settings, 1, simscore=measured("impressions", 100, 1.0, 1.0))
    assert of(settings, scores(settings, 40, 100)).cost == estimates.Cost(1.0, 1.0)


@pytest.mark.parametrize("has_rates", [True, False])
def test_runs_of_the_newest_days_count_and_few_are_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, has_rates: bool
) -> None:
    for number in range(40):
        wall = 8.0 if number >= 26 else 1.0
        made = measured("impressions", 128, wall, wall) if has_rates else {"counts": {}}
        note_run(settings, number, simscore=made)
    read, real = [], files.read_if_there
    monkeypatch.setattr(files, "read_if_there", lambda path: read.append(path) or real(path))
    cost = of(settings, scores(settings, 50, 128)).cost
    runs = [path for path in read if path.endswith("run.json")]
    assert (cost, len(runs)) == ((estimates.Cost(8.0, 8.0), 14) if has_rates else (None, 28))


def test_a_damaged_run_is_passed_over(settings: Settings) -> None:
    """An estimate is to stop nobody."""
    note_run(settings, 0, simscore=measured("impressions", 1, 3.0, 3.0))
    note_run(settings, 1, simscore={})
    Path(settings.layout.runs_folder(day(1)), "r", "run.json").write_text("{")
    assert of(settings, scores(settings, 50, 1)).cost == estimates.Cost(3.0, 3.0)


# ---- Bytes ---------------------------------------------------------------------------------------


def publish(
    settings: Settings, table: Table, number: int, rows: int, size: int, **inputs: Any
) -> None:
    folder = Path(settings.layout.folder(table, day(number)))
    folder.mkdir(parents=True)
    sizes = ((rows, size - 1), (0, 1))
    listed = [{"name": "a", "rows": n, "bytes": of_file} for n, of_file in sizes]
    manifest = {"files": listed, "inputs": inputs, "version": "v"}
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    seal(folder)


def test_bytes_are_those_of_the_newest_table_for_as_many_rows(settings: Settings) -> None:
    publish(settings, schemas.USER_SIMSCORES, 0, 100, 10)
    publish(settings, schemas.USER_SIMSCORES, 1, 100, 7_000)
    publish(settings, schemas.USER_SIMSCORES, 2, 0, 900)  # of an empty day
    assert of(settings, scores(settings, 5, 200)).bytes_written == 14_000
    rows = {"catalogue": {"rows": 50}}  # what follows from them is less than they are
    publish(settings, schemas.ITEM_EMBEDDINGS, 0, 40, 50_000, **rows)
    publish(settings, schemas.ITEM_REJECTS, 0, 10, 1_000, **rows)
    assert of(settings, embed(settings, 5, 100, 100)).bytes_written == 102_000


def test_histories_follow_the_log_of_the_window(settings: Settings) -> None:
    window = {"log_rows": {"2026-02-27": 900, "2026-02-28": 100}}
    publish(settings, schemas.USER_HISTORIES, 0, 20, 3_000, **window)
    publish(settings, schemas.RECENT_CLICKS, 0, 20, 1_000, **window)
    two = {"log_rows": {"2026-03-01": 500, "2026-03-02": 1_500}}
    planned = Planned(stage(settings, HISTORIES, 1, 100, **two))
    assert of(settings, planned).bytes_written == 8_000


@pytest.mark.parametrize("kind", [*stages.NIGHT, stages.TRAINING_ROWS], ids=lambda k: k.name)
def test_before_a_table_is_there_its_bytes_are_guessed_by_its_columns(
    settings: Settings, kind: Kind
) -> None:
    upstream = (stage(settings, EMBED, 0, 1000),) if kind is ITEM_FEATURES else ()
    found = of(settings, Planned(stage(settings, kind, 0, 1000, upstream=upstream)))
    expected = {
        "embed": 1129, "item-features": 15, "histories": 1.5, "simscore": 70, "training-rows": 10,
    }  # fmt: skip
    assert found.bytes_written == 1000 * expected[kind.name]


# ---- Money, and what is told ---------------------------------------------------------------------


def test_prices_that_are_set_give_money(tmp_path: Path) -> None:
    settings = with_costs(tmp_path, 'currency = "EUR"\ncore_hour = 0.5\ngb_month = 0.02')
    planned = scores(settings, 1, 10**9)
    assert of(settings, planned).price_of_cores is None  # no time is known
    assert of(settings, planned).price_of_month == pytest.approx(70 * 0.02)
    note_run(settings, 0, simscore=measured("impressions", 10**9, 3600.0, 7200.0))
    found = of(settings, planned)
    assert found.price_of_cores == pytest.approx(1.0)
    money = "about 1.00 EUR for cores, about 1.40 EUR a month to keep it"
    assert found.lines()[-1] == f"{'money':15}{money}"
    told = {"currency": "EUR", "price_of_cores": 1.0, "price_of_month": 1.4}
    assert told.items() <= found.as_json().items()


def test_without_prices_no_money_is_told(settings: Settings) -> None:
    note_run(settings, 0, simscore=measured("impressions", 100, 1.0, 1.0))
    found = of(settings, scores(settings, 1, 100))
    assert found.price_of_cores is found.price_of_month is None
    assert not any("USD" in line for line in found.lines())


def test_lines_tell_sums_then_each_kind_then_the_time(settings: Settings) -> None:
    work = {"images_embedded": 100.0, "forward_seconds": 40.0, **UNCHANGED}
    note_run(
        settings, 0,
        embed=measured("items", 1000, 25.0, 50.0, **work),
        simscore=measured("impressions", 1000, 3600.0, 7200.0),
    )  # fmt: skip
    planned = [embed(settings, n, 1200, 1000, known=1200) for n in (1, 2)]
    assert of(settings, *planned, scores(settings, 1, 3000)).lines() == [
        "in all         2,400 items, 2,000 images to look at, about 200 to embed, 3,000 "
        "impressions, about 2.9 MB to write",
        "embed          2 days, 2.7 MB, about 52 s",
        "simscore       1 day, 210.0 kB, about 3 h",
        "time           about 3 h 1 min",
        "time of cores  about 6 h 2 min",
    ]
    assert (
        "1,000 images to look at, 1,000 to embed"
        in of(settings, embed(settings, 3, 1, 1000)).lines()[0]
    )


def test_nothing_to_make_takes_nothing(settings: Settings) -> None:
    found = of(settings)
    assert (found.bytes_written, found.cost) == (0, estimates.Cost())
    assert found.as_json()["stages"] == {}


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (599, "10 min"),
        (3_569, "59 min"), (3_599, "1 h"), (12_000, "3 h 20 min"), (170_000, "47 h 13 min"),
        (187_200, "2 d 4 h"), (86_400 * 1_234, "1,234 d"),
    ],
)  # fmt: skip
def test_a_time_is_said_in_two_units_at_most(seconds: float, told: str) -> None:
    assert duration(seconds) == told


@pytest.mark.parametrize(
    ("number", "told"),
    [(0, "0.0 kB"), (1234, "1.2 kB"), (71_200_000, "71.2 MB"), (12.4e9, "12.4 GB"),
     (3e15, "3,000.0 TB")],
)  # fmt: skip
def test_bytes_are_said_in_the_largest_unit_that_fits(number: float, told: str) -> None:
    assert size(number) == told


# ---- A real shop ---------------------------------------------------------------------------------


@pytest.mark.first_night
def test_a_shop_after_its_first_night_knows_what_the_next_ones_take(world: World) -> None:
    settings = world.settings()
    nights = nightly.plan_nights(settings, DAYS[:3], settings.night)
    planned = [one for night in nights[1:] for one in night.planned]
    found = estimate(settings, planned, nights[0].look)
    impressions = sum(one.stage.input_rows for one in planned if one.stage.kind is SIMSCORE)
    assert (found.items, found.images, found.impressions) == (24, 24, impressions)
    assert found.images_to_embed == 0  # as many items as before, and no share is known yet
    run = json.loads(next(world.root.rglob("run.json")).read_text())
    wall = sum(stage["wall_seconds"] for stage in run["stages"].values())
    assert 0.5 * wall < found.cost.seconds < 2 * wall  # two days, of which none embeds
    first = world.root.rglob(f"ds={DAYS[0]}/*.parquet")
    written = sum(os.path.getsize(p) for p in first if "_staging" not in p.parts)
    assert 1.5 * written < found.bytes_written < 3 * written  # histories of two days are longer
    again = nightly.plan_nights(
        settings, DAYS[:1], [EMBED], options=nightly.NightOptions(full=True)
    )
    assert estimate(settings, again[0].planned, Look()).images_to_embed == 12
