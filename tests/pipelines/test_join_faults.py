"""A join that dies goes on, and a runner that loses rows, or runs a step twice, harms no set."""

import copy
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from feature_jobs.impressions import ctr_join
from feature_jobs.impressions.histories import ReadClicks
from feature_jobs.items.item_answers import AnswerForItems, AskForItems
from pipelines.running import beam_options
from tests.pipelines.test_join import as_samples, impressions, join, write_samples
from tests.support.commands import Capture, Killed, die_at_write, paragraph, published
from tests.support.lossy_runner import LossyRunner, run_with
from tests.support.world import DAYS, World

pytestmark = pytest.mark.parametrize("refreshed", ["int"], indirect=True)
DONE, FAILED = 0, 1
ONE = ("--ds", DAYS[2], "--label", "clicked")
BOTH = ("--start-ds", DAYS[1], "--end-ds", DAYS[2], "--label", "clicked")
STEPS = [
    ctr_join.ReadSamples, ctr_join.TakeScores, ReadClicks, ctr_join.AddHistories, AskForItems,
    AnswerForItems, ctr_join.ScoreSamples,
]  # fmt: skip
# What is lost: the step, and which of its outputs.
LOSSES = [
    ("ReadSamples", "None"),
    ("TakeScores/ParDo(TakeScores)", "None"),
    ("TakeScores/ParDo(TakeScores)", "rest"),
    ("ReadClicks/ParDo(ReadClicks)", "None"),
    ("ReadClicks/ParDo(ReadClicks)", "facts"),
    ("ByUser/CoGroupByKeyImpl/Tag[samples]", "None"),
    ("ByUser/CoGroupByKeyImpl/Tag[clicks]", "None"),
    ("AddHistories/ParDo(AddHistories)", "None"),
    ("AddHistories/ParDo(AddHistories)", "impressions"),
    ("AskForItems", "None"),
    ("AnswerForItems", "None"),
    ("ByNight/CoGroupByKeyImpl/Tag[rows]", "None"),
    ("ByNight/CoGroupByKeyImpl/Tag[items]", "None"),
    ("ScoreSamples", "None"),
]


@pytest.fixture
def world(refreshed: World, in_memory: Path, tmp_path: Path) -> Iterator[World]:
    """Gives a world of one's own, with samples of two days.

    Items are shuffled, so that every step has something to do.
    """
    found = copy.copy(refreshed)
    found.folder = in_memory / tmp_path.name
    shutil.copytree(refreshed.folder, found.folder)
    for day in DAYS[1:3]:
        write_samples(found, day, as_samples(impressions(found, day)))
    found.simscore += '\nembeddings_by = "shuffle"'
    found.settings()
    yield found
    shutil.rmtree(found.folder)


def forget(world: World) -> None:
    """Takes away what joins have made."""
    for folder in ("test/joined", "test/_runs", "_staging"):
        shutil.rmtree(world.root / folder, ignore_errors=True)


# ---- Killed ------------------------------------------------------------------------------------


def test_a_join_that_dies_goes_on_and_writes_no_part_again(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written = die_at_write(patch, None)
        assert join(world, *BOTH) == DONE
    expected, left = published(world), 0
    receipts = [at for at, path in enumerate(written) if "/receipts/" in path]
    assert len(receipts) > 20
    for at in (0, receipts[0], receipts[7], receipts[-1], len(written) - 2):
        forget(world)
        with pytest.MonkeyPatch.context() as patch:
            die_at_write(patch, at)
            with pytest.raises(Killed):
                join(world, *BOTH)
        assert published(world) != expected
        parts = set(map(str, (world.root / "_staging").rglob("receipts/*.json")))
        with pytest.MonkeyPatch.context() as patch:
            again = die_at_write(patch, None)
            assert join(world, *BOTH) == DONE
        assert not parts & set(again)
        assert published(world) == expected
        left += len(parts)
    assert left > 20


# ---- Runners -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "tag"), LOSSES)
def test_what_a_runner_loses_is_missed_and_made_by_the_next_run(
    world: World, capsys: Capture, step: str, tag: str
) -> None:
    """Of scores that are taken, those of the day's own night are there."""
    is_taken = (step, tag) == LOSSES[1]
    asked = (*ONE, "--features-from", "same" if is_taken else "previous")
    before = published(world)
    assert join(world, *asked) == DONE
    expected, runner = published(world), LossyRunner(step, tag)
    forget(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_options, "run_pipeline", run_with(runner))
        assert join(world, *asked) == FAILED
    assert runner.lost
    message = paragraph(capsys)
    assert "The runner lost" in message or "Rows were lost" in message
    assert published(world) == before
    assert join(world, *asked) == DONE
    assert published(world) == expected


def again(process: Callable) -> Callable:
    """Returns a step that does its work twice, as where a bundle is tried once more."""

    @functools.wraps(process)
    def twice(step: Any, element: Any) -> Any:
        list(process(step, element) or ())
        return process(step, element)

    return twice


def doubling(process: Callable) -> Callable:
    """Returns a step whose outputs come twice."""

    @functools.wraps(process)
    def twice(step: Any, element: Any) -> Any:
        found = list(process(step, element) or ())
        return itertools.chain(found, found)

    return twice


def test_steps_that_are_run_twice_give_the_same_bytes(world: World) -> None:
    assert join(world, *BOTH) == DONE
    expected = published(world)
    forget(world)
    with pytest.MonkeyPatch.context() as patch:
        for step in [*STEPS, ctr_join.WriteJoined]:
            patch.setattr(step, "process", again(step.process))
        assert join(world, *BOTH) == DONE
    assert published(world) == expected


@pytest.mark.parametrize("step", STEPS)
def test_what_a_runner_doubles_gets_into_no_set(world: World, capsys: Capture, step: Any) -> None:
    before = published(world)
    assert join(world, *ONE) == DONE
    expected = published(world)
    forget(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "process", doubling(step.process))
        assert join(world, *ONE) == FAILED
    assert "handed some on twice" in paragraph(capsys)
    assert published(world) == before
    assert join(world, *ONE) == DONE
    assert published(world) == expected
