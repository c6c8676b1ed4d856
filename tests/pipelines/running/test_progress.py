"""What workers tell is added up, and shown as a bar on a terminal and as lines elsewhere."""

import contextlib
import io
import math
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from courier_model.training.progress import Progress
from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import files, worker_notes
from pipelines.cli import main
from pipelines.running import progress
from pipelines.running.layout import Layout
from pipelines.running.progress import StepBar
from pipelines.running.stage import Stage
from pipelines.stages import EMBED
from tests.support.commands import Capture
from tests.support.world import DAYS, World

IMAGES = {
    "done": 8, "total": 8, "bytes": 6_000_000, "embedded": 4, "reused": 1, "rejected_missing": 1,
    "rejected_not_an_image": 2, "io_seconds": 1.2, "forward_seconds": 33.3,
}  # fmt: skip


class Terminal(io.StringIO):
    """Stands for a stderr that is a terminal of unknown width."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Returns what stands there in the end."""
        return [line.rpartition("\r")[2].rstrip() for line in self.getvalue().split("\n")[:-1]]

    def drawn(self) -> list[str]:
        """Returns every state of every line, blanks aside."""
        return [text.rstrip() for text in self.getvalue().replace("\n", "\r").split("\r") if text]


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Puts a terminal in place of stderr. No fixture: pytest sets a stderr after them."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in ("_TERMINAL_SECONDS", "_LOG_SECONDS"):
        monkeypatch.setattr(progress, pause, 0.01)


def stage(folder: Path) -> Stage:
    """Returns a stage of four shards of two tables, of which nothing is made."""
    return Stage(EMBED, DAYS[0], Layout(str(folder), "test", str(folder)), 4, {}, {}, {})


def job_of(one: Stage) -> str:
    """Returns the folder of its job."""
    return f"{one.layout.root}/job"


def tell(at: Stage, **counts: float) -> None:
    heartbeat = worker_notes.Heartbeat(job_of(at))
    heartbeat.begin(uuid.uuid4().hex)
    heartbeat.add(**counts)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- Measured and described --------------------------------------------------------------------


def test_what_workers_tell_is_added_up(tmp_path: Path) -> None:
    one = stage(tmp_path)
    tell(one, done=3, total=8, rejected_missing=1)
    tell(one, done=1, total=4, bytes=1000)
    expected = {"done": 4, "total": 12, "rejected_missing": 1, "bytes": 1000}
    assert progress.measure([one], job_of(one)) == Counter(expected)


def test_shards_that_all_tables_have_are_counted_where_workers_tell_nothing(tmp_path: Path) -> None:
    days = [stage(tmp_path / name) for name in ("first", "second")]
    assert progress.measure(days, str(tmp_path)) == Counter(done=0, total=8)
    for table, shards in zip(days[1].tables, (3, 2), strict=True):
        for shard in range(shards):
            path = f"{days[1].staging}/{table.name}/receipts/{shard}.json"
            files.write_bytes(path, b"{}")
    assert progress.measure(days, str(tmp_path)) == Counter(done=2, total=8)


@pytest.mark.parametrize(
    ("counts", "seconds", "facts"),
    [
        ({"done": 0, "total": 8}, 4.0, "0.0/s"),
        ({"done": 4, "total": 8}, 4.0, "1.0/s, 4 s left"),
        (
            IMAGES, 4.0,
            "2.0/s, 1.50 MB/s, 0 s left, 4 embedded, 1 reused, 3 rejected (not an image 2, "
            "missing 1); io 1 s, forward 33 s",
        ),
        ({"done": 0, "total": 8, "rejected_missing": 1234}, 4.0,
         "0.0/s, 1,234 rejected (missing 1,234)"),
        ({"done": 0, "total": 0}, 0.0, "0.0/s"),
    ],
)  # fmt: skip
def test_rates_time_left_and_what_became_of_images_are_described(
    counts: dict[str, float], seconds: float, facts: str
) -> None:
    assert progress.describe(Counter(counts), seconds) == facts


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [
        (0, 8, "x [........................] 0/8, facts"),
        (3000, 8000, "x [#########...............] 3,000/8,000, facts"),
        (8, 8, "x [########################] 8/8, facts"),
        (9, 8, "x [########################] 8/8, facts"),  # a bundle that was done twice
        (0, 0, "x [                        ] 0/0, facts"),
    ],
)
def test_a_line_tells_done_of_total_and_the_facts(done: int, total: int, line: str) -> None:
    assert progress.line("x", done, total, "facts") == line


# ---- A stage is watched ------------------------------------------------------------------------


def test_on_a_terminal_a_stage_is_a_bar_that_ends_at_100_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, terminal = stage(tmp_path), at_a_terminal(monkeypatch)
    with progress.watch([one], job_of(one)):
        tell(one, done=4, total=8)
        wait_for(lambda: "4/8" in terminal.getvalue())
        tell(one, **(IMAGES | {"done": 4, "total": 0}))
    told = terminal.drawn()
    assert any(text.startswith("embed:  50%|#####     | 4/8, ") for text in told)
    (last,) = terminal.lines()
    assert last.startswith("embed: 100%|##########| 8/8, ")
    assert "3 rejected (not an image 2, missing 1); io 1 s, forward 33 s" in last
    assert "\033" not in terminal.getvalue()  # no colours, NO_COLOR or not


def test_without_a_terminal_a_stage_is_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    one = stage(tmp_path)
    with progress.watch([one], job_of(one)):
        tell(one, done=4, total=8)
        wait_for(lambda: sys.stderr.getvalue().count("4/8") > 2)
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) > 2
    assert all(line.startswith("embed [") for line in lines)
    assert lines[-1].startswith("embed [############............] 4/8, ")


@pytest.mark.parametrize("live", [True, False])
def test_a_warning_is_told_once_on_a_line_of_its_own(
    live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if live else io.StringIO())
    one = stage(tmp_path)
    with progress.watch([one], job_of(one)):
        for message in ("no CUDA", "another", "no CUDA"):
            worker_notes.warn(job_of(one), message)
            wait_for(lambda said=message: f"WARNING: {said}\n" in sys.stderr.getvalue())
        time.sleep(0.05)
    lines = sys.stderr.lines() if live else sys.stderr.getvalue().splitlines()
    assert [line for line in lines if "WARNING" in line] == ["WARNING: no CUDA", "WARNING: another"]
    bars = [line for line in lines if "WARNING" not in line]
    assert len(bars) == 1 if live else len(bars) > 1
    assert all(bar.startswith("embed") for bar in bars)


class Remote:
    """Stands for a job on a cluster, which is there for a while before it is known."""

    def __init__(self) -> None:
        self.known = False

    def describe(self) -> str:
        return "; job RUNNING" if self.known else ""

    def news(self) -> Iterator[str]:
        if self.known:
            yield "the job x: http://flink"
            yield "WARNING: no worker has begun"


@pytest.mark.parametrize("live", [True, False])
def test_what_a_cluster_says_is_told_beside_what_workers_do(
    live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if live else io.StringIO())
    one, remote = stage(tmp_path), Remote()
    with progress.watch([one], job_of(one), remote):
        tell(one, done=4, total=8)
        wait_for(lambda: "4/8" in sys.stderr.getvalue())
        remote.known = True
        wait_for(lambda: sys.stderr.getvalue().count(" s left; job RUNNING") > 2)
        progress.above_bar(lambda said: sys.stderr.write(said + "\n"))("cancelling")
    lines = sys.stderr.lines() if live else sys.stderr.getvalue().splitlines()
    told = [line for line in lines if not line.startswith("embed")]
    assert told == ["the job x: http://flink", "WARNING: no worker has begun", "cancelling"]


def test_the_images_of_a_command_are_told_while_it_runs(world: World, capsys: Capture) -> None:
    world.settings()
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[0])]) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("embed [")]
    assert len(lines) > 2
    assert any("/11" in line for line in lines)  # one of the twelve is not there
    assert "1 rejected (missing 1)" in lines[-1]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [FileNotFoundError(2, "x"), StorageUnavailable("x")])
def test_a_listing_that_failed_is_tried_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    measure, failed = progress.measure, []

    def fail_at_first(stages: Sequence[Stage], job: str) -> Counter[str]:
        if len(failed) < 3:
            failed.append(stages)
            raise error
        return measure(stages, job)

    monkeypatch.setattr(progress, "measure", fail_at_first)
    with progress.watch([stage(tmp_path)], str(tmp_path)):
        wait_for(lambda: sys.stderr.getvalue().startswith("embed ["))
    assert len(failed) == 3


# ---- Bytes -------------------------------------------------------------------------------------


def test_on_a_terminal_bytes_are_a_bar_that_ends_at_100_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with progress.counting_bytes("validate", 3_000_000) as add:
        for _ in range(3):
            add(1_000_000)
    (line,) = terminal.lines()
    assert line.startswith("validate: 100%|")
    assert "3,000,000/3,000,000" in line
    assert "0 s left" in line


def test_without_a_terminal_bytes_are_lines_now_and_then(capsys: Capture) -> None:
    with progress.counting_bytes("validate", 4_000_000) as add:
        add(1_000_000)
        time.sleep(0.02)
        add(2_000_000)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("validate [##################......] byte 3,000,000/4,000,000, ")
    assert line.endswith(" s left")


# ---- The steps of a training run ---------------------------------------------------------------


def show(bar: StepBar) -> None:
    """Shows four steps, and says something after the second."""
    for step in (1, 2, 3, 4):
        time.sleep(0.02)
        bar.show(Progress(step, 4, 1.25, 1234.5, (4 - step) * 2.0))
        if step == 2:
            bar.say("held out")


LINES = [
    "train [######..................] step 1/4, loss 1.2500, 1,234 images/s, 6 s left",
    "train [############............] step 2/4, loss 1.2500, 1,234 images/s, 4 s left",
    "train [##################......] step 3/4, loss 1.2500, 1,234 images/s, 2 s left",
    "train [########################] step 4/4, loss 1.2500, 1,234 images/s, 0 s left",
]


def test_without_a_terminal_steps_are_lines(capsys: Capture) -> None:
    lines: list[str] = []
    with contextlib.closing(StepBar(lines.append)) as bar:
        show(bar)
    assert lines == [*LINES[:2], "held out", *LINES[2:]]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_steps_are_a_bar_that_ends_at_100_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with contextlib.closing(StepBar(lambda text: terminal.write(text + "\n"))) as bar:
        show(bar)
        bar.say("saved")
    last = "train: 100%|##########| 4/4, loss 1.2500, 1,234 images/s, 0 s left"
    assert terminal.lines() == ["held out", "saved", last]
    percents = [text[7:10] for text in terminal.drawn() if text.startswith("train")]
    assert sorted(set(percents)) == ["  0", " 25", " 50", " 75", "100"]


def test_a_run_that_stops_leaves_its_bar_on_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with contextlib.closing(StepBar(print)) as bar:
        bar.show(Progress(1, 4, 1.25, 1.0, 6.0))
    assert terminal.getvalue().endswith("\n")


def test_steps_are_told_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 60.0)
    lines: list[str] = []
    bar = StepBar(lines.append)
    for step in range(1, 101):
        bar.show(Progress(step, 100, math.pi, 9.0, 1.0))
    assert len(lines) == 1
    assert "step 100/100" in lines[0]


def test_all_but_the_first_process_are_silent(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with contextlib.closing(StepBar(None)) as bar:
        show(bar)
    assert terminal.getvalue() == ""
    assert capsys.readouterr().out == ""
