"""`courier measure` ranks the impressions that nights score, by the scores that nights have."""

import copy
import datetime as dt
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from courier_model.images import decode
from courier_model.measures import colour_histogram, rank_scores
from feature_jobs.inputs import RowGroup
from feature_jobs.schemas import DataContractError
from feature_jobs.store import partitions
from pipelines.reports import measure as measures
from pipelines.reports.measure import HISTOGRAM
from tests.courier_model.test_measures import slow_auc, slow_gauc
from tests.support.commands import Capture, courier, paragraph, published, rewrite
from tests.support.world import DAYS, LEAVES_ON_DAY_2, SCOPE, World, make_encoder, picture

DAY = DAYS[2]
NAMES = ("auc", "gauc", "max_auc", "max_gauc")


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_encoder(tmp_path_factory.mktemp("candidates") / "encoders", seed=1)


@pytest.fixture(scope="module")
def kept(refreshed: World, candidate: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Makes a world after all its nights, in which a candidate has embedded, with all images."""
    found = copied(refreshed, tmp_path_factory.mktemp("measured") / "shop")
    assert courier(found, "embed", "--encoder", candidate, "--ds", str(DAY)) == 0
    found.put(LEAVES_ON_DAY_2, picture(LEAVES_ON_DAY_2))
    return found


@pytest.fixture
def shop(kept: World, tmp_path: Path) -> World:
    """Gives a world of one's own like it."""
    return copied(kept, tmp_path / "shop")


def copied(world: World, folder: Path) -> World:
    found = copy.deepcopy(world)
    found.folder = folder
    shutil.copytree(world.folder, folder)
    return found


def measure(world: World, capsys: Capture, *args: str, days: tuple[dt.date, ...] = (DAY,)) -> Any:
    capsys.readouterr()
    of = (
        ("--ds", str(DAY)) if len(days) == 1 else ("--start-ds", f"{days[0]}", "--end-ds", f"{DAY}")
    )
    assert courier(world, "measure", *of, "--json", *args) == 0
    return json.loads(capsys.readouterr().out)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in report["measured"]}


def vectors_of(world: World, feature_set: str) -> dict[Any, np.ndarray]:
    """Returns the published vectors of items in scope."""
    (folder,) = world.root.glob(f"{feature_set}/item_embeddings/ds={DAY}")
    found = partitions.open_published(str(folder))
    rows = pa.concat_tables(map(partitions.read_parquet, found.paths)).to_pylist()
    return {r["item_id"]: np.array(r["embedding"]) for r in rows if r["category"] in SCOPE}


def colours_of(vectors: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """Returns the histograms of the same items."""
    number = {item: int(str(item).removeprefix("item-")) for item in vectors}
    drawn = {item: picture(1 if n == 9 else n) for item, n in number.items()}
    return {
        item: colour_histogram(decode(data, measures._SMALL)[None])[0].astype(float)
        for item, data in drawn.items()
    }


def slow_scores(
    world: World, days: tuple[dt.date, ...], vectors: dict[Any, np.ndarray]
) -> list[list[float]]:
    """Returns the cosines of each impression with the history that its night published."""
    found = []
    for day in days:
        for row in world.table("user_simscores", day).to_pylist():
            past = row["history_item_ids"][: row["history_len"]]
            both = [vectors[item] for item in past if item in vectors and row["item_id"] in vectors]
            shown = vectors.get(row["item_id"])
            found.append([float(np.round(shown @ x, 6)) for x in both])
    return found


def slow_measures(
    world: World, days: tuple[dt.date, ...], scores: list[list[float]], all_score: list[bool]
) -> dict[str, float | None]:
    rows = [row for day in days for row in world.table("user_simscores", day).to_pylist()]
    kept = [place for place, ok in enumerate(all_score) if ok]
    users = sorted({row["user_id"] for row in rows})
    who = [users.index(rows[place]["user_id"]) for place in kept]
    clicked = [rows[place]["clicked"] for place in kept]
    mean = [np.float32(np.mean(scores[place])) for place in kept]  # of another order: a tie
    largest = [max(scores[place]) for place in kept]
    wanted = {
        "auc": slow_auc(mean, clicked), "gauc": slow_gauc(mean, clicked, who),
        "max_auc": slow_auc(largest, clicked), "max_gauc": slow_gauc(largest, clicked, who),
    }  # fmt: skip
    return {**wanted, "impressions": len(kept), "clicks": sum(clicked), "users": len(set(who))}


# ---- What is measured ----------------------------------------------------------------------


def test_all_are_measured_by_the_published_histories_and_vectors(
    shop: World, candidate: str, capsys: Capture
) -> None:
    files = published(shop)
    report = measure(shop, capsys, "--feature-set", "test", "--encoder", candidate)
    assert published(shop) == files
    candidate_id = os.path.basename(candidate)
    assert list(by_name(report)) == [candidate_id, "test", HISTOGRAM]
    mine, other = vectors_of(shop, "test"), vectors_of(shop, "test-candidate-*")
    assert mine.keys() - other.keys() == {shop.item(LEAVES_ON_DAY_2)}  # none score the same
    vectors = {"test": mine, candidate_id: other, HISTOGRAM: colours_of(mine)}
    scores = {name: slow_scores(shop, (DAY,), of) for name, of in vectors.items()}
    all_score = [all(map(bool, of)) for of in zip(*scores.values(), strict=True)]
    for name, one in by_name(report).items():
        wanted = slow_measures(shop, (DAY,), scores[name], all_score)
        assert {k: one[k] for k in wanted} == pytest.approx(wanted, abs=1e-3)
        assert one["scored"] == sum(map(bool, scores[name]))
        assert 0.02 < one["auc_se"] < 0.3
    known = by_name(report)
    assert 30 < sum(all_score) == known[candidate_id]["scored"] < known["test"]["scored"]
    assert known["test"]["scored"] < report["impressions"] == 152
    assert len({round(one["auc"], 3) for one in report["measured"]}) == 3


def test_vectors_of_another_length_are_measured_beside_the_others(
    shop: World, candidate: str, capsys: Capture
) -> None:
    for path in shop.root.glob(f"test-candidate-*/item_embeddings/ds={DAY}/*.parquet"):
        rows = partitions.read_parquet(str(path))
        short = pa.array(
            [one[:16] for one in rows["embedding"].to_pylist()], pa.list_(pa.float32())
        )
        at = rows.column_names.index("embedding")
        partitions.write_parquet(str(path), rows.set_column(at, "embedding", short))
    _, own, _ = measure(shop, capsys, "--encoder", candidate, "--feature-set", "test")["measured"]
    mine, other = vectors_of(shop, "test"), vectors_of(shop, "test-candidate-*")
    assert {len(one) for one in other.values()} == {16}
    units = {item: one / np.linalg.norm(one) for item, one in other.items()}
    scores = slow_scores(shop, (DAY,), units)
    all_score = [bool(one) for one in scores]  # the histogram knows more items
    beside = measure(shop, capsys, "--encoder", candidate)["measured"][0]
    wanted = slow_measures(shop, (DAY,), scores, all_score)
    assert {k: beside[k] for k in wanted} == pytest.approx(wanted, abs=1e-3)
    wanted = slow_measures(shop, (DAY,), slow_scores(shop, (DAY,), mine), all_score)
    assert {k: own[k] for k in wanted} == pytest.approx(wanted, abs=1e-3)


def test_differences_are_paired_and_the_verdict_is_of_the_best_two(
    shop: World, candidate: str, capsys: Capture
) -> None:
    report = measure(shop, capsys, "--encoder", candidate, "--feature-set", "test")
    first, second, _ = report["measured"]
    assert first["above_first"]["auc"] == 0 == first["above_first"]["auc_se"]
    for name in NAMES:
        assert second["above_first"][name] == second[name] - first[name]
    alone = np.hypot(first["auc_se"], second["auc_se"])
    assert 0 < second["above_first"]["auc_se"] != pytest.approx(alone, rel=1e-3)
    best, runner_up, _ = sorted(report["measured"], key=lambda one: -one["auc"])
    told = f"{best['name']} is ahead of {runner_up['name']} by {best['auc'] - runner_up['auc']:.4f}"
    assert report["verdict"].startswith(told)


def test_several_days_count_together(shop: World, capsys: Capture) -> None:
    days = DAYS[1:3]
    report = measure(shop, capsys, days=days)
    assert report["days"] == [str(day) for day in days]
    (own, _) = report["measured"]
    scores = [score for day in days for score in slow_scores(shop, (day,), embedded_on(shop, day))]
    wanted = slow_measures(shop, days, scores, [bool(one) for one in scores])
    assert {k: own[k] for k in wanted} == pytest.approx(wanted, abs=1e-3)
    assert own["impressions"] > measure(shop, capsys)["measured"][0]["impressions"]


def embedded_on(world: World, day: dt.date) -> dict[Any, np.ndarray]:
    rows = world.table("item_embeddings", day).to_pylist()
    return {r["item_id"]: np.array(r["embedding"]) for r in rows if r["category"] in SCOPE}


def test_histories_from_the_log_measure_the_same(shop: World, capsys: Capture) -> None:
    report = measure(shop, capsys)
    assert measure(shop, capsys, "--from-log") == report
    shutil.rmtree(shop.root / "shared" / "user_histories")
    shutil.rmtree(shop.root / "shared" / "recent_clicks")
    assert measure(shop, capsys) == report
    assert courier(shop, "measure", "--ds", str(DAY)) == 0
    assert "begin from the log of 2 days" in capsys.readouterr().err


def test_days_without_impressions_add_nothing(shop: World, capsys: Capture) -> None:
    shop.write("impressions", DAYS[1], [], 1)
    own, _ = measure(shop, capsys, "--from-log")["measured"]
    assert own["scored"] > 0
    both = measure(shop, capsys, "--from-log", days=DAYS[1:3])
    assert (both["impressions"], both["measured"][0]) == (152, own)
    status, told = refused(shop, capsys, ds=DAYS[1])
    assert (status, "(none was shown)" in told) == (2, True)


def test_histories_that_were_logged_are_taken_as_they_are(shop: World, capsys: Capture) -> None:
    def log_histories(rows: pa.Table) -> pa.Table:
        return rows.append_column(
            "history", pa.array([[item] for item in rows["item_id"].to_pylist()])
        )

    rewrite(shop, DAY, log_histories)
    own, colours = measure(shop, capsys)["measured"]
    assert own["scored"] == colours["scored"] > 100
    assert own["auc"] == own["max_auc"] == colours["auc"] == 0.5  # each item beside itself


# ---- Which users ---------------------------------------------------------------------------


def test_it_is_the_same_users_whatever_the_order_and_number_of_files(
    shop: World, capsys: Capture
) -> None:
    args = ("--impressions", "80")
    report = measure(shop, capsys, *args)
    folder = shop.folder / "impressions" / f"ds={DAY}"
    rows = pa.concat_tables([partitions.read_parquet(str(p)) for p in folder.glob("*.parquet")])
    shuffled = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))))
    shop.write("impressions", DAY, [shuffled], rows_to_group=50)
    assert measure(shop, capsys, *args) == report
    shop.write("impressions", DAY, [rows.slice(at, 10) for at in range(0, len(rows), 10)], 3)
    assert measure(shop, capsys, *args) == report


def test_a_seed_draws_other_users_of_whom_all_impressions_are_taken(
    shop: World, capsys: Capture
) -> None:
    whole = measure(shop, capsys)
    assert whole["buckets"] == 1
    reports = [measure(shop, capsys, "--impressions", "80", "--seed", str(n)) for n in range(5)]
    by_bucket = {report["bucket"]: report for report in reports}
    assert [report["bucket"] for report in reports] == [0, 1, 0, 1, 0]
    halves = [report["measured"][0] for report in by_bucket.values()]
    assert sum(half["users"] for half in halves) == whole["measured"][0]["users"]
    assert sum(half["impressions"] for half in halves) == whole["measured"][0]["impressions"]
    for report in reports:
        assert report == by_bucket[report["bucket"]]


def test_of_the_log_only_a_few_row_groups_are_in_memory_at_once(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = measure(shop, capsys)
    groups, alive, most = [], weakref.WeakSet[pa.Table](), [0]
    real = measures.read_impressions

    class Rows:
        """Is a table that tells whether it is still there, as those of Arrow do not."""

        def __init__(self, rows: pa.Table):
            self._rows = rows

        def __getitem__(self, name: str) -> pa.ChunkedArray:
            return self._rows[name]

        def filter(self, mask: pa.Array) -> pa.Table:
            return self._rows.filter(mask)

    def read(group: RowGroup, *args: Any) -> Any:
        rows = Rows(real(group, *args))
        groups.append((group.path, group.index))
        alive.add(rows)
        most[0] = max(most[0], len(alive))
        return rows

    monkeypatch.setattr(measures, "read_impressions", read)
    monkeypatch.setattr(measures, "_READERS", 2)
    assert measure(shop, capsys) == report
    assert len(groups) == len(set(groups)) > 6
    assert most[0] <= 2


# ---- The colour histogram ------------------------------------------------------------------


def test_without_images_there_is_no_histogram_and_a_line_says_so(
    shop: World, capsys: Capture
) -> None:
    with_images = by_name(measure(shop, capsys))
    assert with_images.keys() > {HISTOGRAM}
    shutil.rmtree(shop.folder / "images")
    report = measure(shop, capsys)
    assert report["notes"] == [f"No {HISTOGRAM}: 9 of 9 images could not be read."]
    (own,) = report["measured"]
    assert own == with_images[own["name"]]
    assert courier(shop, "measure", "--ds", str(DAY)) == 0
    out = capsys.readouterr().out
    assert f"\nNo {HISTOGRAM}: 9 of 9" in out
    assert out.rstrip().endswith("name further encoders with --encoder.")


# ---- Telling -------------------------------------------------------------------------------


def test_the_report_is_a_table_for_people(shop: World, candidate: str, capsys: Capture) -> None:
    args = ("--feature-set", "test", "--encoder", candidate)
    found = by_name(measure(shop, capsys, *args))
    assert courier(shop, "measure", "--ds", str(DAY), *args) == 0
    title, _, head, *lines = capsys.readouterr().out.splitlines()
    assert f"measure of ds {DAY}: bucket 0 of 1, 152 impressions" in title
    assert " ".join(head.split()) == "scores AUC GAUC max AUC max GAUC AUC above the first"
    assert [line.split("  ")[0] for line in lines[:3]] == list(found)
    own = found["test"]
    assert f"{own['auc']:.4f} ± {own['auc_se']:.4f}" in lines[1]
    above = own["above_first"]
    assert lines[1].endswith(f"{above['auc']:.4f} ± {above['auc_se']:.4f}")
    assert lines[0].endswith(f"{found[os.path.basename(candidate)]['max_gauc_se']:.4f}")
    assert " is ahead of " in lines[-1]
    assert "user-" not in " ".join([title, *lines])


def verdict(users: list[int], *scores: list[float]) -> str:
    """Returns the verdict on vectors that give scores to impressions, every other one clicked."""
    clicked = np.arange(len(users)) % 2 == 0
    found = [rank_scores(np.array(one), np.array(one), clicked, np.array(users)) for one in scores]
    measured = tuple(
        measures.Measured(f"v{n}", None, len(users), one, one.above(found[0]))
        for n, one in enumerate(found)
    )
    return measures.Report((DAY,), 0, 1, len(users), measured, ()).verdict


def test_the_verdict_says_what_the_errors_let_it_say() -> None:
    users = [n // 4 for n in range(80)]
    rng = np.random.default_rng(0)
    noise, good = (
        list(rng.normal(size=80)),
        list(rng.normal(size=80) + 2 * (np.arange(80) % 2 == 0)),
    )
    told = verdict(users, noise, good)
    assert told.startswith("v1 is ahead of v0 by 0.")
    assert told.endswith("of AUC: more than two standard errors.")
    told = verdict(users, noise, list(rng.normal(size=80)))
    assert "no more than two standard errors: these impressions do not tell" in told
    assert "0.0000 ± 0.0000 of AUC, no more" in verdict(users, good, good)
    assert "of one user alone" in verdict([7] * 80, noise, good)
    assert "name further encoders" in verdict(users, good)


# ---- What is refused -----------------------------------------------------------------------


def refused(world: World, capsys: Capture, *args: str, ds: dt.date = DAY) -> tuple[int, str]:
    capsys.readouterr()
    status = courier(world, "measure", "--ds", str(ds), *args)
    return status, paragraph(capsys)


def test_an_encoder_that_has_not_embedded_the_day_is_told_with_the_command(
    kept: World, candidate: str, capsys: Capture
) -> None:
    status, told = refused(kept, capsys, "--encoder", candidate, ds=DAYS[1])
    assert status == 4
    assert f"`courier embed --encoder {candidate} --ds {DAYS[1]}`" in told
    status, told = refused(kept, capsys, ds=dt.date(2026, 5, 1))
    assert status == 4
    assert "`courier embed --ds 2026-05-01`" in told
    status, told = refused(kept, capsys, "--feature-set", "test", ds=dt.date(2026, 5, 1))
    assert status == 4
    assert "no published item_embeddings of ds 2026-05-01" in told


def test_what_is_no_encoder_or_no_feature_set_is_told(kept: World, capsys: Capture) -> None:
    status, told = refused(kept, capsys, "--encoder", "nowhere")
    assert (status, "is no encoder package" in told) == (2, True)
    status, told = refused(kept, capsys, "--feature-set", "tset")
    assert (status, "Did you mean 'test'?" in told) == (2, True)
    status, told = refused(kept, capsys, "--feature-set", "shared")
    assert (status, "There is no feature set 'shared'" in told) == (2, True)


def test_an_encoder_that_is_named_twice_is_refused(
    kept: World, candidate: str, capsys: Capture
) -> None:
    beside = next(path.name for path in kept.root.glob("test-candidate-*"))
    for args in (("--encoder", candidate), ("--feature-set", beside)):
        status, told = refused(kept, capsys, "--encoder", candidate, *args)
        assert (status, "compared with themselves" in told) == (2, True)


def test_a_feature_set_whose_encoder_no_pin_names_is_noted(kept: World, capsys: Capture) -> None:
    beside = next(path.name for path in kept.root.glob("test-candidate-*"))
    (note,) = measure(kept, capsys, "--feature-set", beside)["notes"]
    assert f"Of {beside} it is not known" in note


def test_a_feature_set_that_changed_its_encoder_is_not_measured_as_one(
    shop: World, candidate: str, capsys: Capture
) -> None:
    beside = next(shop.root.glob("test-candidate-*"))
    shutil.rmtree(shop.root / "test" / "item_embeddings" / f"ds={DAY}")
    shutil.copytree(
        beside / "item_embeddings" / f"ds={DAY}",
        shop.root / "test" / "item_embeddings" / f"ds={DAY}",
    )
    capsys.readouterr()
    args = ("--start-ds", str(DAYS[1]), "--end-ds", str(DAY), "--feature-set", "test")
    assert courier(shop, "measure", *args) == 2
    assert "changed its encoder between" in paragraph(capsys)


def test_an_encoder_that_may_have_learned_from_the_clicks_is_refused_or_noted(
    shop: World, candidate: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / os.path.basename(candidate)
    shutil.copytree(candidate, folder)
    for end, is_early in ((DAYS[1], True), (DAY, False)):
        info = json.loads((folder / "encoder.json").read_text())
        info |= {"data_start_ds": str(DAYS[0]), "data_end_ds": str(end)}
        (folder / "encoder.json").write_text(json.dumps(info))
        args = ("--encoder", str(folder))
        if is_early:
            assert measure(shop, capsys, *args)["notes"] == []
            continue
        status, told = refused(shop, capsys, *args)
        assert (status, f"made from data up to ds {DAY}" in told) == (2, True)
        (note,) = measure(shop, capsys, *args, "--allow-overlap")["notes"]
        assert "learned from the very clicks" in note


def test_a_sample_without_clicks_or_without_scores_is_refused(shop: World, capsys: Capture) -> None:
    status, told = refused(shop, capsys, "--impressions", "1")
    assert (status, "has 0 impressions that can be scored" in told) == (2, True)
    rewrite(shop, DAY, lambda rows: rows.set_column(3, "clicked", pa.array([False] * len(rows))))
    status, told = refused(shop, capsys)
    assert status == 2
    assert "and 0 of them are clicked" in told
    assert "--seed" in told


def test_a_day_without_a_log_is_awaited(shop: World, capsys: Capture) -> None:
    shutil.rmtree(shop.folder / "impressions" / f"ds={DAY}")
    assert refused(shop, capsys)[0] == 4


def test_histories_that_are_gone_are_told_with_the_way_round_them(
    shop: World, capsys: Capture
) -> None:
    report = measure(shop, capsys)
    for table in ("user_histories", "recent_clicks"):
        shutil.rmtree(shop.root / "shared" / table / f"ds={DAYS[1]}")
    status, told = refused(shop, capsys)
    assert status == 4
    assert "--from-log" in told
    assert measure(shop, capsys, "--from-log") == report


def test_item_ids_of_another_type_than_the_embeddings_are_refused(kept: World) -> None:
    folder = kept.root / "test" / "item_embeddings" / f"ds={DAY}"
    embeddings = partitions.open_published(str(folder))
    vectors = measures.Vectors("test", "e", None, {DAY: embeddings}, None)
    ids = pa.array([1]) if kept.ids == "string" else pa.array(["1"])
    with pytest.raises(DataContractError, match="no item would be found"):
        measures._look_up(vectors, DAY, ids)
