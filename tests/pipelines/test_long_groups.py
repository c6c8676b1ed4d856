"""What a runner groups is iterated once and lazily, and what a step keeps grows with no element.

Engines hand a group on as what can be iterated once, and a bundle may be as long as a partition.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest

from feature_jobs.items.embed import EmbedChunk
from tests.conftest import Artefacts, pinned
from tests.support.commands import courier
from tests.support.training_shop import SECTION
from tests.support.watched_steps import Once, kept_by, noted, steps, watch, with_groups
from tests.support.world import CLUSTERS, DAYS, World

MANY = 20_000
RANGE = ("--start-ds", str(DAYS[0]), "--end-ds", str(DAYS[2]))
JOIN = ("--samples", "impressions/ds={ds}/*.parquet", "--features-from", "same")
STAGES = (
    ("training-rows", *RANGE),
    ("embed", *RANGE),
    ("item-features", *RANGE),
    ("histories", *RANGE),
    ("simscore", *RANGE, "--embeddings-by", "broadcast"),
    ("simscore", *RANGE, "--embeddings-by", "shuffle", "--remake"),
    ("join", *RANGE, *JOIN),
)  # fmt: skip
# Steps to which keys of shards come besides, as b"": as many more change nothing.
_OF_SHARDS = {
    "PlanShard", "WriteDay", "AdvanceHistories", "WriteHistories", "WriteTrainingRows", "CountMoves"
}  # fmt: skip


def grouped(step: str, element: Any, met: Counter[str]) -> Any:
    """Returns an element with its groups as such, long ones where more values change nothing."""

    def long(values: Iterable[Any]) -> Once:
        met[step] += 1
        more = itertools.repeat(b"", MANY if step in _OF_SHARDS else 0)
        return Once(itertools.chain(values, more))

    return with_groups(element, long)


class Watched:
    """Sees what comes to steps, and what they keep."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.groups, self.most_kept = Counter[str](), Counter[str]()
        for step in steps():
            patch.setattr(step, "process", self._watched(step, vars(step)["process"]))
        chunk = self._watched(EmbedChunk, EmbedChunk.embed_chunk)
        patch.setattr(EmbedChunk, "embed_chunk", chunk)

    def _watched(self, step: type, process: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def watch(of: Any, element: Any) -> Iterator[Any]:
            yield from process(of, grouped(step.__name__, element, self.groups)) or ()
            for name, size in kept_by(of).items():
                name = f"{step.__name__}.{name}"
                self.most_kept[name] = max(self.most_kept[name], size)

        return watch


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_groups_are_iterated_once_and_steps_keep_no_more_than_of_each_day(
    tmp_path: Path, artefacts: Artefacts, watched: Watched
) -> None:
    world = pinned(World(tmp_path / "shop", rows_per_shard=2, extra_settings=SECTION), artefacts)
    for command in STAGES:
        assert courier(world, *command) == 0
    fit = ("--ds", str(DAYS[2]), "--clusters", str(CLUSTERS), "--out", str(tmp_path / "fitted"))
    assert courier(world, "fit-codebook", *fit) == 0
    met = watched.groups
    assert {*_OF_SHARDS, "CutBucket", "WalkShard", "CountClusters", "AddHistories"} <= set(met)
    assert {"ScoreShard", "ScoreSamples", "AskForItems", "AnswerForItems", "WriteJoined"} <= set(
        met
    )
    assert max(met.values()) > 8
    of_days = len(DAYS)
    assert {name: size for name, size in watched.most_kept.items() if size > of_days} == {}


def test_a_second_iteration_is_seen() -> None:
    met = Counter[str]()
    _, values = grouped("PlanShard", (3, [b""]), met)
    assert sum(1 for _ in values) == MANY + 1
    with pytest.raises(AssertionError, match="a second time"):
        list(values)
    assert met == {"PlanShard": 1}


def test_what_a_step_keeps_till_the_end_of_a_bundle_is_noted(tmp_path: Path) -> None:
    class Keeps(beam.DoFn):
        def __init__(self) -> None:
            self.kept: list[bytes] = []

        def process(self, element: tuple[int, Iterable[bytes]]) -> None:
            self.kept += element[1]

    watch(Keeps, str(tmp_path))
    step: Any = Keeps()
    step.start_bundle()
    for size in range(30):
        assert list(step.process((0, [b"value"] * size))) == []
    step.finish_bundle()
    (bundle,) = noted(tmp_path)["Keeps"]
    assert (bundle.elements, bundle.values) == (30, 29)
    assert bundle.grown > 29 * 20 / 2
