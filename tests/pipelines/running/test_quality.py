"""What joins tables adds up, by the counts of their manifests, or nothing is published."""

import pytest

from feature_jobs.schemas import DataContractError
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
