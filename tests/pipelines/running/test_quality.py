"""What joins tables adds up, by the counts of their manifests, or nothing is published."""

import pytest

from feature_jobs.schemas import DataContractError
from pipelines.running import quality

ROWS = 10  # of a stage's input
# Of a stage: counts that keep its laws, and of each law what is said of it.
GOOD = {
    "embed": {
        "catalogue_items": ROWS, "item_embeddings_rows": 11, "former_items": 4,
        "item_rejects_rows": 3,
    },
    "item-features": {
        "item_embeddings_rows": 11, "item_rejects_rows": 3, "item_features_rows": 14,
    },
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
    ("item-features", "item_embeddings_rows", "item_features rows: found 14, expected 15"),
    ("item-features", "item_rejects_rows", "item_features rows: found 14, expected 15"),
    ("simscore", "user_simscores_rows", "user_simscores rows: found 11, expected 10"),
    ("training-rows", "impressions", "reached TRAINING-ROWS: found 11, expected 10"),
    ("training-rows", "out_of_scope_impressions", "reached TRAINING-ROWS: found 11, expected 10"),
]


@pytest.mark.parametrize("stage", GOOD)
def test_counts_that_add_up_pass(stage: str) -> None:
    quality.check_laws(stage, ROWS, GOOD[stage])


@pytest.mark.parametrize(("stage", "count", "told"), BROKEN)
def test_a_count_that_does_not_add_up_is_refused(stage: str, count: str, told: str) -> None:
    counts = {**GOOD[stage], count: GOOD[stage][count] + 1}
    with pytest.raises(DataContractError, match=told):
        quality.check_laws(stage, ROWS, counts)
