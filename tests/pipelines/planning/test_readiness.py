"""A night waits for its inputs as long as it is told, and for nothing else.

The clock is the tests' own: to sleep is to move it, and what happens meanwhile happens then.
"""

import datetime as dt
import os
import signal
from collections.abc import Callable
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.schemas import CourierError, DataContractError, InputNotReady, OperatorError
from feature_jobs.store import files
from feature_jobs.store.encoder_info import EncoderInfo, write_encoder_info
from pipelines import cli
from pipelines.config import Settings, load_settings
from pipelines.planning import readiness
from pipelines.planning.readiness import next_moment, wait_for_inputs
from pipelines.stages import EMBED, HISTORIES, NIGHT, SIMSCORE
from tests.support.commands import Capture, paragraph, refresh
from tests.support.day_tables import DS, catalogue, impressions
from tests.support.world import DAYS, World

NOW = dt.datetime(2026, 3, 3, 4, tzinfo=dt.UTC).timestamp()
MINUTE, HOUR = 60.0, 3600.0
KINDS = (EMBED, HISTORIES)  # the catalogue, the impressions and a pin
NEXT = DS + dt.timedelta(days=1)


class Clock:
    """Stands for the module `time`: it is `now`, and what is to happen `at` a moment then does."""

    def __init__(self) -> None:
        self.now = NOW
        self._to_come: list[tuple[float, Callable[[], object]]] = []
        self.slept: list[float] = []

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        due = [work for at, work in self._to_come if at <= self.now]
        self._to_come = [(at, work) for at, work in self._to_come if at > self.now]
        for work in due:
            work()

    def after(self, seconds: float, work: Callable[[], object]) -> None:
        self._to_come.append((NOW + seconds, work))

    @property
    def waited(self) -> float:
        return self.now - NOW


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(readiness, "time", clock)
    return clock


class Shop:
    """Is a shop without images, whose tables come and go while a night waits for them."""

    def __init__(self, folder: Path, clock: Clock):
        self.folder, self.clock, self.told = folder, clock, list[str]()
        self.top, self.catalogue, self.log = "", "", ""
        self.catalogue_path, self.pins = "catalogue/{ds}", "from_ds = 2026-01-01\nencoder = 'e'"
        self.encoder("e")

    def encoder(self, name: str, data_end_ds: str | None = None) -> None:
        info = EncoderInfo(f"{name}-0123456789ab", "none", {}, None, None, data_end_ds, "none")
        write_encoder_info(str(self.folder / name), info)

    def settings(self) -> Settings:
        path = self.folder / "courier.toml"
        path.write_text(
            f'root = "features"\n{self.top}\n[catalogue]\npath = "{self.catalogue_path}"\n'
            f'image_roots = ["images"]\n{self.catalogue}\n[impressions]\npath = "log/{{ds}}"\n'
            f"{self.log}\n[[pins]]\n{self.pins}\n"
        )
        return load_settings(str(path))

    def write(
        self, name: str, rows: pa.Table | bytes, ds: dt.date = DS, age: float = 0.0, file: str = "0"
    ) -> None:
        """Writes a file of a table, which was so many seconds old then."""
        path = self.folder / name / str(ds) / f"{file}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rows) if isinstance(rows, bytes) else pq.write_table(rows, path)
        os.utime(path, (self.clock.now - age,) * 2)

    def write_both(self, age: float = HOUR) -> "Shop":
        self.write("catalogue", catalogue(), age=age)
        self.write("log", impressions(), age=age)
        return self

    def mark(self, name: str, ds: dt.date = DS) -> None:
        (self.folder / name / str(ds)).mkdir(parents=True, exist_ok=True)
        (self.folder / name / str(ds) / "_SUCCESS").touch()

    def wait(
        self, seconds: float | None = 2 * HOUR, deadline: str = "", kinds=KINDS, days=(DS,),
        allow_overlap: bool = False,
    ) -> None:  # fmt: skip
        wait = None if seconds is None else dt.timedelta(seconds=seconds)
        until = dt.time.fromisoformat(deadline) if deadline else None
        say, settings = self.told.append, self.settings()
        wait_for_inputs(settings, list(days), kinds, wait, until, say, allow_overlap)

    def refused(self, kind: type[CourierError], **given: object) -> str:
        with pytest.raises(kind) as told:
            self.wait(**given)
        assert "\n" not in str(told.value)
        return str(told.value)


@pytest.fixture
def shop(tmp_path: Path, clock: Clock) -> Shop:
    return Shop(tmp_path, clock)


# ---- What is there -------------------------------------------------------------------------------


def test_what_was_there_long_before_counts_at_once_and_nothing_is_told(shop: Shop) -> None:
    shop.write_both(age=10 * MINUTE).wait()
    assert (shop.clock.slept, shop.told) == ([], [])


def test_what_comes_is_waited_for_until_it_has_stood_still(shop: Shop) -> None:
    shop.write("catalogue", catalogue(), age=HOUR)
    for minute in (20, 21, 27):  # the second one in place of the first
        shop.clock.after(minute * MINUTE, lambda: shop.write("log", impressions()))
    shop.wait()
    assert shop.clock.waited == 37 * MINUTE
    assert shop.told[0] == (
        f"waiting until 2026-03-03 06:00 UTC for impressions of ds {DS} ({shop.folder}/log/{DS})"
    )
    assert shop.told[-1] == "all inputs are there, after 37 min"


def test_another_file_or_one_less_begins_the_time_anew(shop: Shop) -> None:
    shop.write_both()
    shop.write("log", impressions(), age=4 * MINUTE, file="1")
    shop.clock.after(3 * MINUTE, lambda: shop.write("log", impressions(), file="2"))
    shop.clock.after(8 * MINUTE, (shop.folder / "log" / str(DS) / "2.parquet").unlink)
    shop.wait()
    assert shop.clock.waited == 8 * MINUTE  # as what is left was written long before by then


def test_a_file_from_the_future_is_watched(shop: Shop) -> None:
    """The clock of its writer may go wrong."""
    shop.write_both()
    shop.write("log", impressions(), age=-5 * HOUR)
    shop.wait()
    assert shop.clock.waited == 10 * MINUTE


@pytest.mark.parametrize(("minutes", "waited"), [(0, 0), (0.5, 30), (2, 120)])
def test_how_long_files_stand_still_is_a_setting(shop: Shop, minutes: float, waited: float) -> None:
    shop.top = f"settle_minutes = {minutes}"
    shop.write_both(age=0).wait()
    assert shop.clock.waited == waited


def test_a_required_mark_is_waited_for_and_nothing_but_it(shop: Shop) -> None:
    shop.catalogue = shop.log = "require_success = true"
    shop.write_both(age=HOUR).mark("catalogue")
    shop.clock.after(5 * MINUTE, lambda: shop.write("log", impressions()))
    shop.clock.after(5 * MINUTE, lambda: shop.mark("log"))
    shop.wait()
    assert shop.clock.waited == 5 * MINUTE


def test_a_day_without_rows_is_waited_for_unless_it_is_marked(shop: Shop) -> None:
    shop.write("catalogue", catalogue(), age=HOUR)
    shop.write("log", impressions().slice(0, 0), age=HOUR)
    assert "has files but no row, and no _SUCCESS" in shop.refused(InputNotReady, seconds=60)
    shop.mark("log")
    shop.wait(0)
    (shop.folder / "log" / str(DS) / "0.parquet").unlink()
    shop.wait(0)


def test_closed_days_are_not_waited_for(shop: Shop) -> None:
    shop.top = f'closed_days = ["{DS}"]'
    shop.wait(0)
    shop.catalogue_path = "catalogue/all"  # one snapshot, which is to be there all the same
    assert "The catalogue table has no partition" in shop.refused(InputNotReady, seconds=0)


def test_one_snapshot_is_waited_for_once(shop: Shop) -> None:
    shop.catalogue_path = "catalogue/all"
    shop.write("log", impressions(), age=HOUR)
    shop.write("log", impressions(), ds=NEXT, age=HOUR)
    told = shop.refused(InputNotReady, seconds=0, days=(DS, NEXT))
    assert f"for catalogue of ds {DS} ({shop.folder}/catalogue/all), and gave up" in told


def test_only_what_the_stages_read_is_waited_for(shop: Shop) -> None:
    shop.write("log", impressions(), age=HOUR)
    shop.wait(0, kinds=[HISTORIES])
    assert "for catalogue of ds" in shop.refused(InputNotReady, seconds=0, kinds=[EMBED])


def test_objects_in_a_bucket_count_by_when_they_were_written(shop: Shop, near_bucket: str) -> None:
    written = dt.datetime.now(dt.UTC).timestamp()
    for name, rows in (("catalogue", catalogue()), ("log", impressions())):
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink)
        files.write_bytes(f"{near_bucket}/{name}/{DS}/0.parquet", sink.getvalue().to_pybytes())
    shop.top = f'base = "{near_bucket}"'
    for age, least, most in ((9 * MINUTE, 30.0, 90.0), (11 * MINUTE, 0.0, 0.0)):
        begun = shop.clock.now = written + age
        shop.wait()
        assert least <= shop.clock.now - begun <= most


# ---- Giving up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "deadline", "until"),
    [
        (90.0, "", 90.0), (0.0, "", 0.0), (2 * HOUR, "", 2 * HOUR), (None, "04:45", 45 * MINUTE),
        (2 * HOUR, "04:45", 45 * MINUTE), (HOUR, "06:00", HOUR), (None, "04:00", 24 * HOUR),
    ],
)  # fmt: skip
def test_it_gives_up_at_the_first_of_both_ends(
    shop: Shop, seconds: float | None, deadline: str, until: float
) -> None:
    told = shop.refused(InputNotReady, seconds=seconds, deadline=deadline)
    assert shop.clock.waited == until
    assert "since 2026-03-03 04:00 UTC, for catalogue of ds 2026-03-02 (" in told
    assert "impressions of ds 2026-03-02 (" in told
    assert "The first: The catalogue table has no partition for ds 2026-03-02 yet" in told


def test_the_deadline_is_that_of_the_shops_time_zone(shop: Shop) -> None:
    shop.top = 'day_timezone = "Asia/Shanghai"'
    told = shop.refused(InputNotReady, seconds=None, deadline="13:00")
    assert shop.clock.waited == HOUR
    assert "since 2026-03-03 12:00 Asia/Shanghai" in told


def test_what_comes_at_the_very_end_is_still_seen(shop: Shop) -> None:
    shop.write_both()
    hidden = shop.folder / "log"
    hidden.rename(shop.folder / "away")
    shop.clock.after(100.0, lambda: (shop.folder / "away").rename(hidden))
    shop.wait(100.0)
    assert shop.clock.waited == 100.0


def test_what_still_changes_is_named(shop: Shop) -> None:
    shop.write_both(age=0)
    told = shop.refused(InputNotReady, seconds=90)
    assert (
        f"{shop.folder}/catalogue/{DS}/0.parquet and the files beside it have stood still" in told
    )
    assert "for 1 min 30 s, and count as whole after settle_minutes = 10" in told
    assert "set require_success under [catalogue]" in told


def test_with_neither_end_nothing_is_looked_at(shop: Shop) -> None:
    shop.wait(None)
    assert (shop.clock.slept, shop.told) == ([], [])


def test_what_is_missing_is_told_when_it_changes_and_now_and_then(shop: Shop) -> None:
    shop.clock.after(25 * MINUTE, lambda: shop.write("catalogue", catalogue(), age=HOUR))
    shop.refused(InputNotReady, seconds=40 * MINUTE)
    assert [line.rpartition(", ")[2] for line in shop.told[1:]] == [
        f"{minutes} min so far" for minutes in (10, 20, 25, 35)
    ]
    assert ["catalogue of ds" in line for line in shop.told] == [True, True, True, False, False]
    assert max(shop.clock.slept) == readiness.POLL_SECONDS


def test_of_many_tables_a_few_are_named(shop: Shop) -> None:
    days = [DS + dt.timedelta(days=number) for number in range(9)]
    told = shop.refused(InputNotReady, seconds=0, days=days)
    assert told.count(" of ds ") == 3
    assert "and 15 more, and gave up" in told


# ---- What is told at once ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (b"PAR1", "cannot be read as Parquet"),
        (catalogue(category=None), "lacks the column 'category'"),
        (catalogue(item_id=[1.5, 2.5]), "has type double"),
    ],
)
def test_a_table_that_is_there_and_broken_ends_the_wait_at_once(
    shop: Shop, rows: pa.Table | bytes, told: str
) -> None:
    shop.write("catalogue", rows, age=HOUR)
    assert told in shop.refused(DataContractError)
    assert shop.clock.slept == []


def test_a_broken_table_that_is_still_written_is_not_looked_into_before(shop: Shop) -> None:
    shop.write_both()
    shop.write("log", b"PAR1", age=0)
    shop.clock.after(5 * MINUTE, lambda: shop.write("log", impressions()))
    shop.wait()
    assert shop.clock.waited == 15 * MINUTE


def test_files_of_a_closed_day_end_it_at_once(shop: Shop) -> None:
    shop.top = f'closed_days = ["{DS}"]'
    shop.write_both(age=0)
    assert "closed_days in the settings names" in shop.refused(OperatorError)


@pytest.mark.parametrize(
    ("pins", "kinds", "told"),
    [
        ("from_ds = 2026-04-01\nencoder = 'e'", KINDS, "No pin holds for ds"),
        ("from_ds = 2026-01-01\nencoder = 'none'", KINDS, "is no encoder package"),
        ("from_ds = 2026-01-01\nencoder = 'e'", NIGHT, "names no codebook"),
        ("from_ds = 2026-01-01\nencoder = 'e'", [SIMSCORE], "names no codebook"),
        ("from_ds = 2026-01-01\nencoder = 'of-today'", KINDS, "would know their own future"),
    ],
)
def test_a_pin_that_does_not_hold_ends_it_at_once(shop: Shop, pins: str, kinds, told: str) -> None:
    shop.encoder("of-today", str(DS))
    # The first day with a codebook is let go as a bootstrap: there was one long ago.
    shop.pins = f"from_ds = 2025-01-01\nencoder = 'e'\ncodebook = 'c'\n[[pins]]\n{pins}"
    if "No pin" in told or kinds is not KINDS:
        shop.pins = pins
    assert told in shop.refused(OperatorError, kinds=kinds)
    assert shop.clock.slept == []


def test_an_overlap_that_is_allowed_is_none(shop: Shop) -> None:
    shop.encoder("e", str(DS))
    shop.pins = f"from_ds = 2025-01-01\nencoder = 'e'\ncodebook = 'c'\n[[pins]]\n{shop.pins}"
    shop.write_both()
    assert "would know their own future" in shop.refused(OperatorError)
    shop.wait(allow_overlap=True)


def test_a_night_that_needs_a_log_that_is_not_set_ends_it_at_once(shop: Shop) -> None:
    settings = shop.settings().model_copy(update={"impressions": None})
    with pytest.raises(OperatorError, match="have no \\[impressions\\]"):
        wait_for_inputs(settings, [DS], [HISTORIES], dt.timedelta(hours=1), None, print)


# ---- The next moment of a clock ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "clock", "moment"),
    [
        ("2026-01-10T05:59:59+01:00", "06:00", "2026-01-10T06:00:00+01:00"),
        ("2026-01-10T06:00:00+01:00", "06:00", "2026-01-11T06:00:00+01:00"),
        ("2026-01-10T23:30:00+01:00", "00:15", "2026-01-11T00:15:00+01:00"),
        # Clocks go from 02:00 to 03:00: the night has an hour less, and 02:30 is left out.
        ("2026-03-28T22:00:00+01:00", "06:00", "2026-03-29T06:00:00+02:00"),
        ("2026-03-29T00:30:00+01:00", "02:30", "2026-03-29T03:30:00+02:00"),
        # They go from 03:00 back to 02:00: it has one more, and 02:30 comes twice.
        ("2026-10-24T22:00:00+02:00", "06:00", "2026-10-25T06:00:00+01:00"),
        ("2026-10-25T02:00:00+02:00", "02:30", "2026-10-25T02:30:00+02:00"),
        ("2026-10-25T02:45:00+02:00", "02:30", "2026-10-25T02:30:00+01:00"),
        ("2026-10-25T02:45:00+01:00", "02:30", "2026-10-26T02:30:00+01:00"),
    ],
)
def test_the_next_moment_is_that_of_the_clocks_on_the_wall(
    after: str, clock: str, moment: str
) -> None:
    begun = dt.datetime.fromisoformat(after).timestamp()
    found = next_moment(dt.time.fromisoformat(clock), ZoneInfo("Europe/Berlin"), begun)
    assert found == dt.datetime.fromisoformat(moment).timestamp()


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def waiting(world: World, clock: Clock) -> World:
    """Is a world whose first log comes late; the files of the other tables are old."""
    clock.now = dt.datetime.now(dt.UTC).timestamp() + HOUR
    log = world.folder / "impressions" / f"ds={DAYS[0]}"
    log.rename(world.folder / "late")
    return world


def test_the_night_begins_once_its_inputs_are_there(
    waiting: World, clock: Clock, capsys: Capture
) -> None:
    begun = clock.now
    log = waiting.folder / "impressions" / f"ds={DAYS[0]}"
    clock._to_come.append((begun + 60.0, lambda: (waiting.folder / "late").rename(log)))
    assert refresh(waiting, DAYS[0], "--wait", "1h30m", "--deadline", "23:59") == 0
    assert clock.now - begun == 60.0
    told = capsys.readouterr().err
    assert f"for impressions of ds {DAYS[0]} (" in told
    assert "all inputs are there, after 1 min" in told
    assert len(waiting.table("user_simscores", DAYS[0])) > 100


def test_without_an_end_a_missing_input_is_4_at_once(
    waiting: World, clock: Clock, capsys: Capture
) -> None:
    assert refresh(waiting, DAYS[0]) == 4
    assert "The impressions table has no partition" in paragraph(capsys)
    assert clock.slept == []


def test_at_the_end_the_command_ends_with_4(
    waiting: World, clock: Clock, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURIER_REFRESH_WAIT", "45")
    assert refresh(waiting, DAYS[0]) == 4
    assert "Error: Waited for 45 s, since " in paragraph(capsys)
    assert clock.slept == [30.0, 15.0]
    monkeypatch.setenv("COURIER_REFRESH_DEADLINE", "6")
    assert refresh(waiting, DAYS[0]) == 2
    assert "'6' is no time of day HH:MM" in capsys.readouterr().err


def test_a_plan_waits_for_nothing(waiting: World, clock: Clock) -> None:
    assert refresh(waiting, DAYS[0], "--wait", "2h", "--dry-run") == 4
    assert clock.slept == []


def test_a_wait_can_be_interrupted(
    waiting: World, clock: Clock, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_received", [])
    clock._to_come.append((clock.now + 60.0, lambda: signal.raise_signal(signal.SIGINT)))
    assert refresh(waiting, DAYS[0], "--wait", "2h") == 130
    assert "Interrupted; the same command resumes." in capsys.readouterr().err
    assert sum(clock.slept) == 60.0


def test_a_runner_that_is_not_there_is_told_before_the_wait(
    waiting: World, clock: Clock, capsys: Capture
) -> None:
    options = ("--wait", "2h", "--", "--runner=PrismRunner", "--prism_location=/no/such/prism")
    assert refresh(waiting, DAYS[0], *options) == 2
    assert "/no/such/prism" in paragraph(capsys)
    assert clock.slept == []


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("90", 90),
        ("0", 0),
        ("30s", 30),
        ("45m", 2700),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h1m1s", 3661),
    ],
)
def test_a_time_span_has_units_or_is_of_seconds(given: str, seconds: int) -> None:
    (option,) = (one for one in cli.cli.commands["refresh"].params if one.name == "wait")
    assert option.type.convert(given, None, None) == dt.timedelta(seconds=seconds)


@pytest.mark.parametrize("given", ["", "h", "1h30", "-5", "1.5h", "2 h", "30m1h", "2d", "soon"])
def test_another_time_span_is_refused(given: str, capsys: Capture) -> None:
    assert cli.main(["refresh", "--ds", str(DS), f"--wait={given}"]) == 2
    assert "is no time span such as 2h, 1h30m, 45m or 90 (seconds)" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["169h", "99999999999999999999"])
def test_a_wait_of_more_than_a_week_is_a_mistake(given: str, capsys: Capture) -> None:
    assert cli.main(["refresh", "--ds", str(DS), "--wait", given]) == 2
    assert f"'{given}' is more than a week" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["6", "24:00", "06:60", "06:00:00", "6 am", "6:0", ""])
def test_another_time_of_day_is_refused(given: str, capsys: Capture) -> None:
    assert cli.main(["refresh", "--ds", str(DS), f"--deadline={given}"]) == 2
    assert "is no time of day HH:MM, from 00:00 to 23:59" in capsys.readouterr().err
