"""What gates find follows from counts, and each has its side, its limits and too little to judge.

What joins tables adds up, by the counts of their manifests, or nothing is published.
"""

import datetime as dt
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from feature_jobs.schemas import DataContractError
from pipelines.config import AtLeast, Gates
from pipelines.running import gates
from pipelines.running.gates import FAIL, OK, UNJUDGED, WARN, Evidence, Finding
from pipelines.stages import EMBED, HISTORIES, ITEM_FEATURES, KINDS, SIMSCORE, Kind

DS = dt.date(2026, 3, 1)
Manifest = dict[str, Any]

# ---- Laws: rows ----------------------------------------------------------------------------------

ROWS = 10  # of a stage's input
# Of a stage: counts that keep its laws, and of each law what is said of it.
GOOD = {
    "embed": {
        "catalogue_items": ROWS, "item_embeddings_rows": 11, "former_items": 4,
        "item_rejects_rows": 3,
    },
    "item-features": {"item_features_rows": 14},
    "simscore": {"user_simscores_rows": ROWS},
    "training-rows": {"impressions": 6, "out_of_scope_impressions": 4},
    "histories": {"user_histories_rows": 2, "recent_clicks_rows": 1},
    "join": {"joined_rows": ROWS},
}  # fmt: skip
# Of a stage: which count is one too many, and what is said of it.
BROKEN = [
    ("embed", "item_embeddings_rows", r"item_embeddings .* \+ item_rejects: found 11, expected 10"),
    ("embed", "item_rejects_rows", r"item_embeddings .* \+ item_rejects: found 11, expected 10"),
    ("embed", "former_items", r"item_embeddings .* \+ item_rejects: found 9, expected 10"),
    ("embed", "catalogue_items", "rows that reached EMBED: found 11, expected 10"),
    ("item-features", "item_features_rows", "item_features rows: found 15, expected 14"),
    ("simscore", "user_simscores_rows", "user_simscores rows: found 11, expected 10"),
    ("join", "joined_rows", "rows of the training set: found 11, expected 10"),
    ("training-rows", "impressions", "reached TRAINING-ROWS: found 11, expected 10"),
    ("training-rows", "out_of_scope_impressions", "reached TRAINING-ROWS: found 11, expected 10"),
]


def check(name: str, **more: int) -> None:
    """Checks a stage of the good counts, with some of its own or of those upstream one more."""
    counts = {kind: GOOD[kind.name] for kind in KINDS}
    (kind,) = (kind for kind in KINDS if kind.name == name)
    of = EMBED if kind is ITEM_FEATURES and set(more) & set(GOOD["embed"]) else kind
    counts[of] = {**counts[of], **{key: counts[of][key] + n for key, n in more.items()}}
    gates.check_laws(kind, ROWS, counts)


@pytest.mark.parametrize("stage", GOOD)
def test_counts_that_add_up_pass(stage: str) -> None:
    check(stage)


@pytest.mark.parametrize(("stage", "count", "told"), BROKEN)
def test_a_count_that_does_not_add_up_is_refused(stage: str, count: str, told: str) -> None:
    with pytest.raises(DataContractError, match=told):
        check(stage, **{count: 1})


@pytest.mark.parametrize("count", ["item_embeddings_rows", "item_rejects_rows"])
def test_features_are_of_all_items_upstream(count: str) -> None:
    with pytest.raises(DataContractError, match="item_features rows: found 14, expected 15"):
        check("item-features", **{count: 1})


# ---- Gates: manifests of an ordinary night -------------------------------------------------------


def embeddings(items: int = 1000, **counts: int) -> Manifest:
    made = {
        "catalogue_items": items, "items_without_uri": 0, "items_tried": items,
        "items_not_fetched": 0, "rejected_missing": 0, "former_items": 30,
    }  # fmt: skip
    return _manifest("item_embeddings", items, made | counts)


def rejects(rows: int = 0) -> Manifest:
    return _manifest("item_rejects", rows, {})


def features(**clusters: Any) -> Manifest:
    found = {
        "items": 1000, "clusters": 10, "items_max": 150, "largest_cluster": 7, "dead": 0,
        "compared_items": 1000, "moved_items": 0, "most_moved": [], "moved_examples": [],
        "items_before": 1000, "population_stability_index": 0.01,
    }  # fmt: skip
    return {**_manifest("item_features", 1000, {}), "clusters": {"main": found | clusters}}


def histories(users: int = 900, days: int = 30, window: int = 30) -> Manifest:
    inputs = {"log_rows": {str(day): 1 for day in range(days)}}
    made = {**_manifest("user_histories", users, {"users": users}), "inputs": inputs}
    return {**made, "settings": {"window_days": window}}


def scores(
    rows: int = 20_000, shape: Mapping[str, Sequence[int]] | None = None, **counts: int
) -> Manifest:
    made = {
        "impressions": rows, "clicks": rows // 10, "users": rows // 10, "unknown_items": 0,
        "compared_impressions": rows, "moved_impressions": 0, "late_impressions": 0,
        "too_late_for_a_history": 0, "without_history": 0, "scored_impressions": rows,
        "clicks_with_time": rows // 10,
        "impressions_by_user_squared": 10 * rows, "clicks_by_user_squared": rows // 10,
    }  # fmt: skip
    even = [rows // 20] * 20
    shapes = {"sim_max_clicked": even, "sim_max_unclicked": even, "history_len": even}
    manifest = _manifest("user_simscores", rows, made | counts)
    return {**manifest, "histograms": shapes | dict(shape or {})}


def _manifest(table: str, rows: int, counts: Mapping[str, int]) -> Manifest:
    made = {"table": table, "rows": rows, "counts": dict(counts), "notes": {}, "examples": {}}
    return {**made, "ds": str(DS), "identities": {"codebook_id": "a"}}


OF_KIND = {
    EMBED: (embeddings(), rejects()), ITEM_FEATURES: (features(),), HISTORIES: (histories(),),
    SIMSCORE: (scores(), histories()),
}  # fmt: skip


def judge(
    kind: Kind, made: Sequence[Manifest], earlier: Sequence[Manifest] = (), closed: bool = False
) -> dict[str, Finding]:
    """Returns what the default gates find of a stage, by gate and subject."""
    before = defaultdict[str, list[Manifest]](list)
    for manifest in earlier:
        before[manifest["table"]].append(manifest)
    evidence = Evidence({m["table"]: m for m in made}, before, closed)
    return {found.name: found for found in gates.judge(kind, evidence, Gates())}


def levels(found: Mapping[str, Finding]) -> dict[str, str]:
    return {name: one.level for name, one in found.items()}


WEEK = [*[scores()] * 7, *[histories()] * 7, *[embeddings()] * 7, *[features()] * 7]


@pytest.mark.parametrize("kind", OF_KIND)
def test_an_ordinary_night_passes(kind: Kind) -> None:
    assert set(levels(judge(kind, OF_KIND[kind], WEEK)).values()) == {OK}


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_first_night_passes_and_says_what_cannot_be_judged(kind: Kind) -> None:
    found = levels(judge(kind, OF_KIND[kind]))
    assert set(found.values()) <= {OK, UNJUDGED}


THIRTY = 20_000**2 // 30  # the squares of as many users with as many of 20,000 impressions


def lopsided(share: float) -> list[int]:
    """Returns a distribution of which so much lies in one of twenty bins, the rest evenly."""
    rest = round(20_000 * (1 - share) / 19)
    return [20_000 - 19 * rest, *[rest] * 19]


# Of a gate: the stage, what that made where the gate warns, and where it refuses.
FAULTS: dict[str, tuple[Kind, Sequence[Manifest], Sequence[Manifest]]] = {
    "image_coverage": (
        EMBED,
        [embeddings(items_without_uri=150), rejects(150)],
        [embeddings(items_without_uri=501), rejects(501)],
    ),
    "lost_addresses": (
        EMBED, [embeddings(items_without_uri=21), rejects(21)],
        [embeddings(items_without_uri=51), rejects(51)],
    ),
    "rejects": (EMBED, [embeddings(), rejects(21)], [embeddings(), rejects(51)]),
    "outage": (
        EMBED, [embeddings(items_not_fetched=11), rejects()],
        [embeddings(items_not_fetched=31), rejects()],
    ),
    "item_rows": (EMBED, [embeddings(800), rejects()], [embeddings(1501), rejects()]),
    "item_rows (that stay)": (
        EMBED, [embeddings(former_items=230), rejects()], [embeddings(former_items=365), rejects()],
    ),
    "item_rows (main)": (ITEM_FEATURES, [features(items=800)], [features(items=666)]),
    "churn (items, main)": (
        ITEM_FEATURES, [features(moved_items=101)], [features(moved_items=201)],
    ),
    "balance (main)": (ITEM_FEATURES, [features(items_max=301)], [features(items_max=501)]),
    "dead_clusters (main)": (ITEM_FEATURES, [features(dead=4)], [features(dead=6)]),
    "cluster_drift (main)": (
        ITEM_FEATURES, [features(population_stability_index=0.11)],
        [features(population_stability_index=0.26)],
    ),
    "user_rows": (HISTORIES, [histories(700)], [histories(449)]),
    "unknown_items": (SIMSCORE, [scores(unknown_items=401)], [scores(unknown_items=1001)]),
    "churn (impressions)": (
        SIMSCORE, [scores(moved_impressions=2001)], [scores(moved_impressions=4001)],
    ),
    "late": (SIMSCORE, [scores(late_impressions=1001)], [scores(late_impressions=4001)]),
    "too_late": (
        SIMSCORE, [scores(too_late_for_a_history=201)], [scores(too_late_for_a_history=1001)],
    ),
    "click_times": (SIMSCORE, [scores(clicks_with_time=1799)], [scores(clicks_with_time=999)]),
    "score_coverage": (
        SIMSCORE, [scores(scored_impressions=9999)], [scores(scored_impressions=1999)],
    ),
    "score_drift (clicked)": (
        SIMSCORE, [scores(shape={"sim_max_clicked": lopsided(0.2)})],
        [scores(shape={"sim_max_clicked": lopsided(0.3)})],
    ),
    "score_drift (unclicked)": (
        SIMSCORE, [scores(shape={"sim_max_unclicked": lopsided(0.2)})],
        [scores(shape={"sim_max_unclicked": lopsided(0.3)})],
    ),
    "history_drift": (
        SIMSCORE, [scores(shape={"history_len": lopsided(0.2)})],
        [scores(shape={"history_len": lopsided(0.3)})],
    ),
    "zero_rows": (
        SIMSCORE, [scores(scored_impressions=17_900)], [scores(scored_impressions=13_900)],
    ),
    "impression_rows": (SIMSCORE, [scores(7_900)], [scores(4_900)]),
    "impression_rows (clicks)": (SIMSCORE, [scores(clicks=790)], [scores(clicks=0)]),
    "impression_rows (users)": (SIMSCORE, [scores(users=790)], [scores(users=1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_gate_warns_beyond_one_limit_and_refuses_beyond_the_other(name: str) -> None:
    kind, *made = FAULTS[name]
    for level, manifests in zip((WARN, FAIL), made, strict=True):
        found = judge(kind, manifests, WEEK)[name]
        assert found.level == level
        assert found.cause


def test_every_gate_is_tried_and_has_a_cause() -> None:
    assert {name.split(" ")[0] for name in FAULTS} == set(Gates.model_fields) == set(gates.CAUSES)


@pytest.mark.parametrize(
    ("name", "kind", "made", "earlier"),
    [
        # Three nights are needed for a median, of a hundred rows.
        ("item_rows", EMBED, [embeddings(10), rejects()], [embeddings()] * 2),
        ("item_rows", EMBED, [embeddings(10), rejects()], [embeddings(99)] * 7),
        ("item_rows", EMBED, [embeddings(10), rejects()], [embeddings(0)] * 5 + [embeddings()] * 2),
        ("user_rows", HISTORIES, [histories(1)], [histories()] * 2),
        ("impression_rows", SIMSCORE, [scores(10)], [scores()] * 2),
        ("item_rows (that stay)", EMBED, [embeddings(90, former_items=120), rejects()],
         [embeddings(90)]),
        ("item_rows (main)", ITEM_FEATURES, [features(items=10, items_before=99)], []),
        ("impression_rows (clicks)", SIMSCORE, [scores(900, clicks=0)], [scores(900)] * 7),
        # One or two images that cannot be fetched are no outage in a small shop.
        ("outage", EMBED, [embeddings(50, items_not_fetched=2), rejects()], WEEK),
        ("outage", EMBED, [embeddings(items_not_fetched=900), rejects()], []),
        ("balance (main)", ITEM_FEATURES, [features(clusters=3, items_max=900)], []),
        ("cluster_drift (main)", ITEM_FEATURES, [features(population_stability_index=None)], []),
        (
            "cluster_drift (main)", ITEM_FEATURES,
            [features(clusters=500, compared_items=10, population_stability_index=3.0)], [],
        ),
        (
            "cluster_drift (main)", ITEM_FEATURES, [features(population_stability_index=3.0)],
            [{**features(), "identities": {"codebook_id": "b"}}],
        ),
        (
            "cluster_drift (main)", ITEM_FEATURES,
            [features(clusters=500, moved_items=990, population_stability_index=3.0)], [],
        ),
        ("late", SIMSCORE, [scores(99, late_impressions=90)], []),
        ("score_coverage", SIMSCORE, [scores(scored_impressions=0, without_history=19_901)], []),
        ("click_times", SIMSCORE, [scores(clicks=99, clicks_with_time=0)], []),
        ("score_drift (clicked)", SIMSCORE, [scores(shape={"sim_max_clicked": [9, 1]})], WEEK),
        ("score_drift (clicked)", SIMSCORE, [scores(shape={"sim_max_clicked": []})], WEEK),
        (
            "history_drift", SIMSCORE,
            [scores(impressions_by_user_squared=THIRTY, shape={"history_len": lopsided(0.9)})],
            WEEK,
        ),
        (
            "zero_rows", SIMSCORE,
            [scores(scored_impressions=0, impressions_by_user_squared=THIRTY)], WEEK,
        ),
        # Histories grow in the first days of a log.
        (
            "history_drift", SIMSCORE, [scores(shape={"history_len": lopsided(0.9)})],
            [scores(), histories(days=6)],
        ),
    ],
)  # fmt: skip
def test_too_little_to_judge_is_said(
    name: str, kind: Kind, made: Sequence[Manifest], earlier: Sequence[Manifest]
) -> None:
    found = judge(kind, made, earlier)[name]
    assert (found.level, found.observed) == (UNJUDGED, None)
    assert found.text


def test_one_share_is_judged_however_few_there_are() -> None:
    assert judge(EMBED, [embeddings(10), rejects(1)])["rejects"].level == FAIL


def test_a_small_shop_is_not_warned_of_what_is_usual_there() -> None:
    few = features(clusters=4, items_max=499)
    assert judge(ITEM_FEATURES, [few])["balance (main)"].level == OK
    assert (
        judge(ITEM_FEATURES, [features(clusters=4, items_max=501)])["balance (main)"].level == FAIL
    )
    assert judge(EMBED, [embeddings(60), rejects(2)])["rejects"].level == OK
    assert judge(EMBED, [embeddings(75), rejects(3)])["rejects"].level == WARN
    assert judge(EMBED, [embeddings(50), rejects(3)])["rejects"].level == FAIL


def test_clicks_are_expected_as_there_are_impressions() -> None:
    busy = judge(SIMSCORE, [scores(60_000)], WEEK)
    assert busy["impression_rows"].level == WARN
    assert busy["impression_rows (clicks)"].level == OK


def test_a_closed_day_may_be_empty_and_another_one_not() -> None:
    empty = scores(0, users=0, shape={"history_len": []})
    assert judge(SIMSCORE, [empty], WEEK, closed=True)["impression_rows"].level == UNJUDGED
    assert judge(SIMSCORE, [empty], WEEK)["impression_rows"].level == FAIL
    no_catalogue = [embeddings(0, former_items=1030), rejects()]
    assert judge(EMBED, no_catalogue, WEEK, closed=True)["item_rows (that stay)"].level == UNJUDGED
    assert judge(EMBED, no_catalogue, WEEK)["item_rows (that stay)"].level == FAIL


def test_a_log_without_click_times_is_not_judged_by_them() -> None:
    made = scores()
    del made["counts"]["clicks_with_time"]
    assert "click_times" not in judge(SIMSCORE, [made])


def test_logged_histories_do_not_grow_from_day_to_day() -> None:
    logged = {**scores(), "notes": {"logged_histories": True}}
    made = [scores(shape={"history_len": lopsided(0.3)})]
    assert judge(SIMSCORE, made, [logged, histories(days=1)])["history_drift"].level == FAIL


def test_a_day_made_by_an_earlier_version_is_judged_as_far_as_it_counted() -> None:
    old, old_clusters = scores(), features()
    for name in ("users", "late_impressions", "scored_impressions", "clicks_with_time"):
        del old["counts"][name]
    del old["histograms"]
    for name in ("items_before", "population_stability_index", "moved_examples"):
        del old_clusters["clusters"]["main"][name]
    old_embeddings = embeddings(rejected_missing=0)
    for name in ("items_without_uri", "items_tried", "items_not_fetched"):
        del old_embeddings["counts"][name]
    found = judge(SIMSCORE, [old], WEEK) | judge(ITEM_FEATURES, [old_clusters], WEEK)
    found |= judge(EMBED, [old_embeddings, rejects()], WEEK)
    for name in ("late", "score_drift (clicked)", "cluster_drift (main)", "rejects", "outage"):
        assert found[name].level == UNJUDGED
        assert "earlier version" in found[name].text
    assert found["unknown_items"].level == found["churn (items, main)"].level == OK
    # And the first night of this version, whose day before is of the earlier one.
    assert judge(SIMSCORE, [scores()], [old])["zero_rows"].level == UNJUDGED


# ---- What a shop is like -------------------------------------------------------------------------


def test_the_impressions_of_a_few_users_are_no_drift_of_all() -> None:
    """One user in ten has nine tenths of the clicks: as if there were a quarter of the users."""
    few = scores(shape={"sim_max_clicked": lopsided(0.15)}, clicks_by_user_squared=2_000**2 // 40)
    assert judge(SIMSCORE, [few], WEEK)["score_drift (clicked)"].level == UNJUDGED
    assert judge(SIMSCORE, [few], WEEK)["score_drift (unclicked)"].level == OK


def test_a_stricter_warning_does_not_keep_a_gate_from_refusing() -> None:
    limits = Gates.model_validate_json('{"score_drift": {"warn": 0.001, "fail": 0.25}}')
    made = {"user_simscores": scores(shape={"sim_max_clicked": lopsided(0.9)})}
    before = {"user_simscores": [scores()], "user_histories": [histories()]}
    found = {one.name: one for one in gates.judge(SIMSCORE, Evidence(made, before), limits)}
    assert found["score_drift (clicked)"].level == FAIL
    assert found["score_drift (unclicked)"].level == OK  # chance alone is no reason to warn
    assert "the median is -0." in found["score_drift (clicked)"].detail


def test_a_window_shorter_than_a_week_is_full_when_its_days_are() -> None:
    made = [scores(shape={"history_len": lopsided(0.9)})]
    earlier = [scores(), histories(days=4, window=3)]
    assert judge(SIMSCORE, made, earlier)["history_drift"].level == FAIL


def test_the_day_after_an_empty_one_is_compared_with_the_one_before() -> None:
    made = [scores(shape={"history_len": lopsided(0.9)})]
    earlier = [scores(0, users=0), scores(), histories()]
    assert judge(SIMSCORE, made, earlier)["history_drift"].level == FAIL


def test_of_few_clusters_one_may_be_large_however_strict_the_limit() -> None:
    limits = Gates.model_validate_json('{"balance": {"fail": 0.05}}')

    def level(items_max: int) -> str:
        made = {"item_features": features(clusters=10, items_max=items_max)}
        found = gates.judge(ITEM_FEATURES, Evidence(made, defaultdict(list)), limits)
        return next(one.level for one in found if one.gate == "balance")

    assert (level(199), level(990)) == (OK, FAIL)


def test_items_that_left_long_ago_are_no_catalogue_of_another_shop() -> None:
    made = [embeddings(former_items=400), rejects()]
    long_ago = {**embeddings(), "ds": "2026-01-01"}
    found = judge(EMBED, made, [long_ago] * 3)["item_rows (that stay)"]
    assert (found.level, "59 days before" in found.text) == (UNJUDGED, True)
    assert judge(EMBED, made, WEEK)["item_rows (that stay)"].level == FAIL


def test_a_catalogue_that_is_cut_on_a_closed_day_is_refused() -> None:
    found = judge(EMBED, [embeddings(400), rejects()], WEEK, closed=True)
    assert found["item_rows"].level == FAIL


def test_items_without_an_address_are_no_reason_of_bad_images() -> None:
    made = embeddings(items_without_uri=30, rejected_unsupported_uri=31, rejected_missing=20)
    text = judge(EMBED, [made, rejects(51)])["rejects"].text
    assert "(missing 20, unsupported_uri 1)" in text


# ---- What is told --------------------------------------------------------------------------------


def test_a_refusal_names_all_gates_that_refuse_and_what_to_do() -> None:
    made = [embeddings(items_not_fetched=40), rejects(60)]
    made[0]["examples"] = {"rejected": [7, 12], "not_fetched": [12]}
    found = list(judge(EMBED, made, WEEK).values())
    error = gates.refusal(DS, EMBED, found)
    assert error.exit_status == 3
    assert str(error).startswith(
        "ds 2026-03-01: 60 of 1,000 catalogue items with an address have no readable image"
    )
    assert "(6.0%, above the limit of 5.0% of the gate rejects); 40 of 1,000 images" in str(error)
    assert "--accept rejects --accept outage --reason" in str(error)
    assert error.table.splitlines()[:3] == [
        "gate     observed  limit  for example",
        "rejects      6.0%   5.0%  7, 12",
        f"  usually: {gates.CAUSES['rejects']}",
    ]
    assert error.table.splitlines()[-1].startswith(
        "next: the same command again, once that is mended; if it is right as it is, the same "
        "command with --accept rejects --accept outage --reason "
    )
    assert error.table.splitlines()[3].split() == ["outage", "4.0%", "3.0%", "12"]


def test_a_gate_from_below_says_below() -> None:
    found = judge(EMBED, [embeddings(items_without_uri=600), rejects(600)])["image_coverage"]
    assert "(40.0%, below the limit of 50.0%" in str(gates.refusal(DS, EMBED, [found]))


def test_what_is_told_of_a_finding_is_json_whatever_its_limits() -> None:
    limits = Gates.model_validate_json('{"cluster_drift": {"fail": Infinity}}')
    made = {"item_features": features(population_stability_index=9.0)}
    (found,) = (
        one
        for one in gates.judge(ITEM_FEATURES, Evidence(made, defaultdict(list)), limits)
        if one.gate == "cluster_drift"
    )
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (told["level"], told["warn"], told["fail"]) == (WARN, 0.1, None)
    assert "warns: the population stability index of sizes of clusters (main)" in gates.short(found)


@pytest.mark.parametrize(
    ("name", "kind", "made", "observed"),
    [
        ("impression_rows", SIMSCORE, [scores(0)], "20,000 x"),
        ("item_rows", EMBED, [embeddings(400), rejects()], "2.5 x"),
        ("rejects", EMBED, [embeddings(10_000), rejects(503)], "5.030%"),
        ("rejects", EMBED, [embeddings(), rejects(60)], "6.0%"),
    ],
)
def test_numbers_can_be_told_from_their_limits(
    name: str, kind: Kind, made: Sequence[Manifest], observed: str
) -> None:
    found = judge(kind, made, WEEK)[name]
    assert found.number(found.observed) == observed


def test_the_limits_of_a_gate_know_their_side() -> None:
    assert AtLeast(warn=0.9, fail=0.5).is_beyond(0.4, 0.5)
    assert not AtLeast(warn=0.9, fail=0.5).is_beyond(0.5, 0.5)
    assert not Gates().rejects.is_beyond(0.05, 0.05)


# ---- Precisions ----------------------------------------------------------------------------------


def test_new_embeddings_of_several_precisions_are_told_of() -> None:
    assert gates.mixed({"embedded_on_cpu_fp32": 3.0, "images_embedded": 3}) == []
    (told,) = gates.mixed({"embedded_on_cpu_fp32": 3.0, "embedded_on_cuda_bf16": 4.0})
    assert "3 embedded on cpu fp32, 4 embedded on cuda bf16" in told
