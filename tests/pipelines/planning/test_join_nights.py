"""Days that are joined together read what records and manifests say of nights once."""

import os
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest

from feature_jobs.schemas import ITEM_FEATURES
from pipelines.planning.join_nights import JoinAsked, NightThere
from pipelines.planning.joins import PlannedJoin, plan_joins
from pipelines.running.states import Night
from tests.support.ill_disk import watch_disk
from tests.support.join_worlds import World, make_world


def plan(world: World, asked: JoinAsked) -> tuple[list[Night], Counter[tuple[str, str]]]:
    """Plans all joined days; returns with them how often each path was opened, or listed."""
    calls: Counter[tuple[str, str]] = Counter()

    def count(what: str, path: str) -> None:
        calls[what, os.path.relpath(path, world.root)] += what in ("open file", "listdir")

    with pytest.MonkeyPatch.context() as patch:
        watch_disk(patch, count)
        return plan_joins(world.settings, world.joined, asked), calls


@pytest.mark.parametrize("as_of", ["day", "created"])
def test_each_record_is_read_once_and_only_nights_that_are_taken_are_opened(
    in_memory: Path, as_of: Literal["day", "created"]
) -> None:
    shared = 0
    for seed in range(300, 306):
        world = make_world(seed, in_memory / f"join-nights-{as_of}-{seed}")
        columns = world.names._asdict()
        asked = JoinAsked("ctr", world.samples, columns, as_of=as_of, mixed_encoders=True)
        nights, calls = plan(world, asked)
        read = {path: n for (what, path), n in calls.items() if what == "open file" and n}
        recorded = {f"test/_nights/ds={ds}.json": ds for ds in world.layout.recorded_days()}
        assert {read[path] for path in recorded.keys() & read.keys()} == {1}
        assert calls["listdir", "test/_nights"] == 1
        if as_of == "created":  # an old one may have come after newer ones
            before = {path for path, ds in recorded.items() if ds < world.joined[-1]}
            assert before <= read.keys()
        taken = [one.snapshot.ds for night in nights for one in nights_of(night)]
        folders = {os.path.relpath(world.layout.folder(ITEM_FEATURES, ds), world.root)
                   for ds in taken}  # fmt: skip
        opened = {os.path.dirname(path) for path in read if "/item_features/" in path}
        assert opened == folders
        shared += len(taken) > len(folders)
    assert shared > 3


def nights_of(night: Night) -> tuple[NightThere, ...]:
    (planned,) = night.planned
    assert isinstance(planned, PlannedJoin)
    return planned.nights
