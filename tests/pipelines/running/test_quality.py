"""What joins tables adds up, by the counts of their manifests, or nothing is published.

A cluster that is too large for its copies of one picture is no fault of the encoder.
"""

from typing import Any

import pytest

from feature_jobs.items.item_features import SamePicture
from feature_jobs.schemas import DataContractError, GateRefused
from pipelines.config import Gates
from pipelines.running import quality
from pipelines.stages import EMBED, ITEM_FEATURES, KINDS

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
}  # fmt: skip
# Of a stage: which count is one too many, and what is said of it.
BROKEN = [
    ("embed", "item_embeddings_rows", r"item_embeddings .* \+ item_rejects: found 11, expected 10"),
    ("embed", "item_rejects_rows", r"item_embeddings .* \+ item_rejects: found 11, expected 10"),
    ("embed", "former_items", r"item_embeddings .* \+ item_rejects: found 9, expected 10"),
    ("embed", "catalogue_items", "rows that reached EMBED: found 11, expected 10"),
    ("item-features", "item_features_rows", "item_features rows: found 15, expected 14"),
    ("simscore", "user_simscores_rows", "user_simscores rows: found 11, expected 10"),
    ("training-rows", "impressions", "reached TRAINING-ROWS: found 11, expected 10"),
    ("training-rows", "out_of_scope_impressions", "reached TRAINING-ROWS: found 11, expected 10"),
]


def check(name: str, **more: int) -> None:
    """Checks a stage of the good counts, with some of its own or of those upstream one more."""
    counts = {kind: GOOD[kind.name] for kind in KINDS}
    (kind,) = (kind for kind in KINDS if kind.name == name)
    of = EMBED if kind is ITEM_FEATURES and set(more) & set(GOOD["embed"]) else kind
    counts[of] = {**counts[of], **{key: counts[of][key] + n for key, n in more.items()}}
    quality.check_laws(kind, ROWS, counts)


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


# ---- A cluster that is too large -----------------------------------------------------------------


def judge(items_max: int, picture: SamePicture | None, share: float = 0.5) -> str:
    """Returns why a cluster with so many of 100 items is refused, "" where it is not."""
    found: dict[str, Any] = {
        "items": 100, "clusters": 10, "items_max": items_max, "largest_cluster": 7, "dead": 0,
        "compared_items": 0, "moved_items": 0, "most_moved": [],
    }  # fmt: skip

    def find(label: str, cluster: int) -> SamePicture:
        assert (label, cluster) == ("main", 7)
        assert picture is not None, "the images were read for nothing"
        return picture

    try:
        quality._clusters("main", found, Gates(max_cluster_share=share), find)
    except GateRefused as error:
        return str(error)
    return ""


def test_images_are_not_read_for_a_cluster_that_is_small_enough() -> None:
    assert judge(50, None) == ""


@pytest.mark.parametrize("copies", [60, 31, 30])
def test_equal_pictures_are_told_where_they_make_a_cluster_too_large(copies: int) -> None:
    told = judge(60, SamePicture("abc", 5, copies, 60))
    assert "60 of 100 items with a cluster ID (main) are in cluster 7" in told
    assert f"{copies} of the 60 of them that were looked at have the very same picture" in told
    assert "(sha256 abc, for example item 5): a placeholder" in told
    assert "encoder that takes" not in told


@pytest.mark.parametrize("copies", [1, 19, 29])
def test_a_cluster_too_large_without_equal_pictures_is_put_down_to_the_encoder(copies: int) -> None:
    told = judge(60, SamePicture("abc", 5, copies, 60))
    assert "An encoder that takes most images for the same one looks like this" in told


def test_one_picture_of_a_cluster_just_above_the_limit_is_no_placeholder() -> None:
    assert "An encoder" in judge(51, SamePicture("abc", 5, 1, 51))  # all are different
    assert "An encoder" in judge(51, SamePicture("abc", 5, 1, 1))  # one was left to look at
    assert "An encoder" in judge(51, SamePicture("abc", 5, 2, 51))
    assert "a placeholder" in judge(51, SamePicture("abc", 5, 26, 51))


def test_a_cluster_that_is_too_large_without_its_copies_is_put_down_to_the_encoder() -> None:
    assert "An encoder" in judge(90, SamePicture("abc", 5, 50, 90))  # 40 of 50


def test_copies_among_a_sample_stand_for_all() -> None:
    assert "a placeholder" in judge(60, SamePicture("abc", "x", 4, 6))
    assert "An encoder" in judge(60, SamePicture("abc", "x", 1, 6))
