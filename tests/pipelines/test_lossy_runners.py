"""A runner that loses rows and ends well publishes nothing, and the next run makes all.

Lost are tagged outputs, inputs of CoGroupByKey, what `finish_bundle` yields, and what else has but
one way to its table: one that lacks rows would look like any other.
"""

import itertools

import pytest

from pipelines.running import beam_options
from tests.support.commands import Capture, courier, paragraph, published, rewrite
from tests.support.lossy_runner import LossyRunner, run_with
from tests.support.world import DAYS, World

SCOPE = '[training]\ncategories = ["dress", "shirt"]\n'
# The command that meets each loss: the step, and which of its outputs.
LOSSES = [
    ("embed", "PlanShard/ParDo(PlanShard)", "None"),
    ("embed", "CutBucket/ParDo(CutBucket)", "None"),
    ("embed", "EmbedChunk/BatchElements/ParDo(_GlobalWindowsBatchingDoFn)", "None"),
    ("embed", "ResultsByShard/CoGroupByKeyImpl/Tag[catalogue]", "None"),
    ("embed", "ResultsByShard/CoGroupByKeyImpl/Tag[results]", "None"),
    ("embed", "WalkShard", "None"),
    ("histories", "ReadClicks/ParDo(ReadClicks)", "None"),
    ("histories", "ReadClicks/ParDo(ReadClicks)", "facts"),
    ("histories", "AdvanceHistories", "None"),
    ("training-rows", "ReadLog/ParDo(ReadLog)", "facts"),
    ("training-rows", "KeepInScope/ParDo(KeepInScope)", "counts"),
    ("training-rows", "ByItemShard/CoGroupByKeyImpl/Tag[0]", "None"),
    ("training-rows", "ByItemShard/CoGroupByKeyImpl/Tag[1]", "None"),
    ("refresh", "AssignShard", "None"),
    ("refresh", "ReadImpressions/ParDo(ReadImpressions)", "by_user"),
    ("refresh", "ReadImpressions/ParDo(ReadImpressions)", "facts"),
    ("refresh", "ReadImpressions/ParDo(ReadImpressions)", "ids"),
    ("refresh", "ByUser/CoGroupByKeyImpl/Tag[1]", "None"),
    ("refresh", "ByDayAndShard/CoGroupByKeyImpl/Tag[items]", "None"),
]


def add_ids(world: World) -> None:
    """Gives the impressions of the day IDs of the shop's."""
    ids = itertools.count()
    rewrite(
        world,
        DAYS[1],
        lambda rows: rows.append_column("impression_id", [list(itertools.islice(ids, len(rows)))]),
    )


@pytest.mark.first_night
@pytest.mark.parametrize(("command", "step", "tag"), LOSSES)
def test_what_a_runner_loses_is_missed_and_made_by_the_next_run(
    world: World, capsys: Capture, command: str, step: str, tag: str
) -> None:
    world.pins.insert(0, SCOPE)
    add_ids(world)
    given = (command, "--ds", str(DAYS[1]))
    if command == "refresh":
        given = (*given, "--embeddings-by", "shuffle")
    before, runner = published(world), LossyRunner(step, tag)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_options, "run_pipeline", run_with(runner))
        assert courier(world, *given) == 1
    assert runner.lost
    message = paragraph(capsys)
    assert "The runner lost" in message or "Rows were lost" in message
    assert published(world) == before
    if command != "refresh":
        assert courier(world, *given) == 0


@pytest.mark.first_night
def test_what_only_spares_a_second_look_may_be_lost(world: World) -> None:
    runner = LossyRunner("PlanShard/ParDo(PlanShard)", "seen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_options, "run_pipeline", run_with(runner))
        assert courier(world, "embed", "--ds", str(DAYS[1])) == 0
    assert runner.lost
    lossy = world.table("item_embeddings", DAYS[1])
    assert courier(world, "embed", "--ds", str(DAYS[1]), "--remake") == 0
    assert world.table("item_embeddings", DAYS[1]).equals(lossy)
