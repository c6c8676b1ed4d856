"""In two hundred random shops `courier join` gives what the slow join does, row for row.

The whole command runs, plans and publishes; but the steps of its job are called one after the other
without Beam: a run of Beam costs a second.
"""

import contextlib
import dataclasses
import datetime as dt
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.pvalue import TaggedOutput

from feature_jobs.impressions import ctr_join
from feature_jobs.impressions.ctr_join import JoinJob
from feature_jobs.impressions.histories import ReadClicks
from feature_jobs.impressions.simscore import SHUFFLE
from feature_jobs.inputs import Source
from feature_jobs.items.item_answers import AnswerForItems, AskForItems
from feature_jobs.schemas import TIMESTAMP
from feature_jobs.store import partitions, worker_notes
from pipelines.cli import main
from pipelines.planning import joins
from pipelines.running import beam_options
from tests.support.join_worlds import World, make_world
from tests.support.slow_join import check_join, midnight

# By their number, so that a failure names a few worlds.
BATCHES = [range(at, at + 20) for at in range(0, 200, 20)]


def outputs(step: beam.DoFn, elements: Iterable[Any]) -> list[Any]:
    return [found for element in elements for found in step.process(element) or ()]


def by_key(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def grouped(**named: Iterable[tuple[Any, Any]]) -> list[tuple[Any, dict[str, list[Any]]]]:
    """Groups pairs by key as CoGroupByKey does."""
    found = {name: by_key(pairs) for name, pairs in named.items()}
    keys = {key: None for pairs in found.values() for key in pairs}
    return [(key, {name: found[name].get(key, []) for name in found}) for key in keys]


def run_join(_: None, log: Sequence[Source], job: JoinJob) -> None:
    """Runs the pipeline of `define_join` by hand."""
    groups = [(place, n) for place, day in enumerate(job.days) for n in range(len(day.groups))]
    read = by_key(outputs(ctr_join.ReadSamples(job), groups))
    found = outputs(ctr_join.TakeScores(job), read.items())
    rest = [one.value for one in found if isinstance(one, TaggedOutput)]
    parts = [one for one in found if not isinstance(one, TaggedOutput)]
    users = {"samples": rest}
    if job.histories:
        users["clicks"] = clicks_of(log, job) if rest else []
    added = outputs(ctr_join.AddHistories(job), grouped(**users))
    rows = [one for one in added if not isinstance(one, TaggedOutput)]
    came = [one.value for one in added if isinstance(one, TaggedOutput)]
    there = [(day.form.ds.toordinal(), (0, day.rows)) for day in log] if rest else []
    outputs(ctr_join.CheckLog(job), by_key([*came, *there]).items())
    to_score = {"rows": rows}
    if job.embeddings_by == SHUFFLE:
        nights = {night.key: night.items for day in job.days for night in day.nights}
        ask = AskForItems(nights, partial(ctr_join._wanted_items, job), job.staging)
        asked = by_key(outputs(ask, by_key(rows).items()))
        to_score["items"] = outputs(AnswerForItems(nights, job.staging), asked.items())
    parts += outputs(ctr_join.ScoreSamples(job), grouped(**to_score))
    every = [((at, n), None) for at, day in enumerate(job.days) for n in range(len(day.batches))]
    outputs(ctr_join.WriteJoined(job), by_key([*parts, *every]).items())
    assert worker_notes.refused(job.staging) == []


def clicks_of(log: Sequence[Source], job: JoinJob) -> list[tuple[int, Any]]:
    histories = job.histories
    assert histories
    step = ReadClicks(histories.law, histories.day_timezone, histories.shards, job.staging)
    found = outputs(step, [group for day in log for group in day.groups()])
    return [one for one in found if not isinstance(one, TaggedOutput)]


@contextlib.contextmanager
def without_beam() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joins, "define_join", run_join)
        patch.setattr(beam_options, "run_pipeline", lambda define, options: define(None))
        yield


def join(world: World) -> int:
    """Runs the command for the days of a world, as its options say."""
    asked = dataclasses.asdict(world.options)
    flags = ["--created-timestamp"] if asked.pop("created_timestamp") else []
    flags += ["--mixed-encoders"] if world.mixes_encoders else []
    for name, value in asked.items():
        flags += [f"--{name.replace('_', '-')}", value]
    for name, value in zip(("user-id", "item-id", "time"), world.names, strict=True):
        flags += [f"--{name}", value]
    days = ["--start-ds", str(world.joined[0]), "--end-ds", str(world.joined[-1])]
    command = ["join", "--config", str(world.config), "--samples", world.samples]
    return main([*command, "--label", "label", *days, *flags])


@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"from-{seeds[0]}")
def test_joined_rows_are_those_of_the_slow_join(
    seeds: range, in_memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter()
    for seed in seeds:
        world = make_world(seed, in_memory / f"join-{seed}")
        with without_beam():
            assert join(world) == 0, (seed, capsys.readouterr().err)
        for ds in world.joined:
            folder = world.root / "test" / "joined" / "ctr" / f"ds={ds}"
            found = partitions.open_published(str(folder))
            rows = pa.concat_tables(map(partitions.read_parquet, found.paths))
            expected = world.expected(ds, **dataclasses.asdict(world.options))
            check_join(rows, expected)
            check_counts(found.manifest["counts"], expected)
            assert found.manifest["counts"]["too_late_for_a_history"] == too_late(world, ds)
            counts.update(found.manifest["counts"])
        runs = (world.root / "test" / "_runs").glob("*/*/run.json")
        counts.update(
            taken=sum(
                json.loads(p.read_text())["stages"]["join"]["work"]["scores_taken"] for p in runs
            )
        )
    seen = ("taken", "matched", "no_snapshot", "unknown_item", "too_late_for_a_history")
    assert all(counts[name] for name in seen)
    assert counts["taken"] < counts["matched"]


def too_late(world: World, ds: dt.date) -> int:
    """Returns how many samples of a day are of a moment before all that histories still know."""
    if world.options.history_as_of == "night":
        return 0
    moments = world.samples_of(ds)[world.names.event_time].cast(TIMESTAMP, safe=False)
    known_from_us = midnight(ds, world.law.day_timezone) - world.law.late_us
    return sum(moment < known_from_us for moment in moments.cast(pa.int64()).to_pylist())


def check_counts(counts: dict[str, int], rows: pa.Table) -> None:
    """Asserts that what a manifest counts is so; each row is of the first reason that it has."""
    told: Counter[str] = Counter()
    for row in rows.to_pylist():
        reasons = {
            "no_snapshot": row["has_night"], "unknown_item": row["item_known"],
            "no_image": row["has_image"], "out_of_scope": row["in_scope"],
            "no_history": row["history_len"] > 0,
        }  # fmt: skip
        told[next((name for name, there in reasons.items() if not there), "matched")] += 1
    assert counts["samples"] == len(rows)
    assert {name: counts[name] for name in told} == told
    assert sum(counts[name] for name in (*reasons, "matched")) == len(rows)
    assert counts["positives"] == counts["positives_read"] == sum(rows["label"].to_pylist())
