"""What of a stage is done is found once, whatever an earlier run, a rollback or a gate has left."""

import dataclasses
import datetime as dt
import hashlib
import json
import os
from pathlib import Path

import pytest

from feature_jobs.schemas import GateRefused, InputNotReady
from feature_jobs.store import documents, files, partitions
from pipelines.running import states
from pipelines.running.locks import Locks
from pipelines.running.publishing import publish_night
from pipelines.running.stage import Stage
from pipelines.running.states import Look, Reason
from pipelines.stages import EMBED
from tests.support.small_nights import Shop

OLD, NEW = [1, 2, 3, 4], [5, 6, 7]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(str(tmp_path))


def stage_of(shop: Shop, values: list[int]) -> Stage:
    (stage,) = shop.night(values).stages
    return stage


def test_a_stage_goes_from_absent_to_published(shop: Shop) -> None:
    new = stage_of(shop, NEW)
    assert Look().state(new) == states.State("absent", reasons=(Reason("never made"),))
    files.write_bytes(
        os.path.join(states.staged_folder(new, new.tables[0]), "receipts", "0"), b"{}"
    )
    begun = Look().state(new)
    assert (begun.name, begun.shards_done, begun.is_made) == ("begun", 1, False)
    night = shop.make(NEW)
    staged = Look().state(new)
    assert (staged.name, staged.is_made) == ("staged", True)
    publish_night(night, Locks())
    published = Look().state(new)
    assert (published.name, published.why) == ("published", ())
    assert published.tables[0].rows == len(NEW)


def test_what_another_run_published_is_something_else(shop: Shop) -> None:
    shop.publish(OLD)
    state = Look().state(stage_of(shop, NEW))
    assert (state.name, state.tables) == ("published from something else", ())
    assert state.why == ("values is new",)


def test_a_reason_names_the_table_that_was_made_again(shop: Shop) -> None:
    shop.publish(OLD)
    one = dataclasses.replace(stage_of(shop, OLD), inputs={})  # as its manifest says
    assert Look().state(one).reasons == ()
    embedded, _ = dataclasses.replace(one, kind=EMBED).references()
    earlier = dataclasses.replace(embedded, ds=one.ds - dt.timedelta(days=1), stage=None)
    for changes, expected in (
        ({"upstream": (embedded.stage,)}, Reason("upstream embed made again", embedded)),
        (
            {"upstream": (embedded.stage,), "inputs": {"embeddings": embedded.run_id}},
            Reason("upstream embed made again", embedded),
        ),
        ({"before": (earlier,), "follows": True}, Reason("previous made again", earlier)),
        ({"inputs": {"values": NEW}}, Reason("values is new")),
    ):
        assert Look().state(dataclasses.replace(one, **changes)).reasons == (expected,)


def test_what_a_gate_refused_is_refused_until_it_is_not(shop: Shop) -> None:
    (stage,) = shop.make(NEW).stages
    states.note_refusal(stage, GateRefused("too many"))
    assert Look().state(stage).name == "refused"
    assert Look().state(stage).is_made  # and is judged again
    assert str(states.refusal(stage.staging)) == "too many"
    states.note_refusal(stage, None)
    assert Look().state(stage).name == "staged"


def test_what_an_earlier_version_staged_is_made_again_and_what_it_published_stays(
    shop: Shop,
) -> None:
    """Its manifest lacks what gates judge by, and what is beside it when it is sealed again."""
    (stage,) = shop.make(NEW).stages
    states.note_refusal(stage, GateRefused("too many"))
    path = os.path.join(states.staged_folder(stage, stage.tables[0]), partitions.STAGED)
    manifest = documents.read_json(path)
    older = {name: value for name, value in manifest.items() if name != "histograms"}
    documents.write_json(path, older)
    state = Look().state(stage)
    assert (state.name, state.is_made) == ("absent", False)
    documents.write_json(path, manifest)
    publish_night(shop.night(NEW), Locks())
    assert Look().state(stage).name == "published"
    path = os.path.join(shop.place.folder, partitions.MANIFEST)
    published = documents.read_json(path)
    del published["histograms"]
    files.write_bytes(path, documents.to_json(published))
    digest = hashlib.sha256(files.read_bytes(path)).hexdigest()
    files.write_bytes(os.path.join(shop.place.folder, partitions.SUCCESS), digest.encode())
    assert Look().state(stage).name == "published"


def test_a_day_on_hold_is_held_unless_it_is_there(shop: Shop) -> None:
    shop.publish(OLD)
    shop.publish(NEW)
    shop.roll_back()
    assert Look().state(stage_of(shop, NEW)).name == "held"
    assert Look().state(stage_of(shop, OLD)).name == "published"


def test_a_look_reads_each_manifest_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.publish(OLD)
    look, stage = Look(), stage_of(shop, OLD)
    look.state(stage)
    monkeypatch.setattr(files, "read_bytes", lambda path: pytest.fail(f"{path} is read again"))
    assert look.state(stage).name == "published"
    assert look.made(stage)
    assert look.find(stage.references()[0]) == look.published(shop.place.folder)


def test_a_table_that_is_not_made_is_not_ready(shop: Shop) -> None:
    stage = stage_of(shop, NEW)
    with pytest.raises(InputNotReady, match="Run `courier item-features --ds 2026-03-01`"):
        Look().made(stage)
    (reference,) = stage.references()
    with pytest.raises(InputNotReady, match="Run `courier item-features --ds 2026-03-01`"):
        Look().open(reference)
    with pytest.raises(InputNotReady, match="from which later days go on"):
        Look().open(dataclasses.replace(reference, stage=None))


def test_what_was_begun_by_other_versions_or_from_another_content_is_begun_anew(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(shop, NEW)
    left = os.path.join(stage.staging, "left")

    def begin() -> None:
        states.begin(stage, ["never made"], Look())

    for change in (lambda: None, lambda: newer(monkeypatch)):
        begin()
        files.write_bytes(left, b"x")
        begin()
        assert files.exists(left)  # it is the same
        change()
    begin()
    assert not files.exists(left)
    assert states.reasons(stage.staging) == ["never made"]


def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "PACKAGE_VERSIONS", states.PACKAGE_VERSIONS | {"numpy": "99"})


def test_a_stage_is_data(shop: Shop) -> None:
    one, same, other = (stage_of(shop, values) for values in (OLD, OLD, NEW))
    assert one == same != other
    assert json.loads(json.dumps(one.as_json()))["inputs"] == {"values": OLD}
    forced = dataclasses.replace(one, forced_by="asked for")
    assert forced.run_id == one.run_id
    assert forced.staging != one.staging
