"""What gates are asked about is gathered from what is staged and published.

A cluster that is too large for its copies of one picture is no fault of the encoder.
"""

import pytest

from feature_jobs.items.item_features import SamePicture
from pipelines.running import gates
from pipelines.running.judging import why_large


def why(items_max: int, picture: SamePicture) -> str:
    """Returns why a cluster has so many of 100 items, of which it may have half."""
    return why_large(items_max, 100, 0.5, picture)


@pytest.mark.parametrize("copies", [60, 31, 30])
def test_equal_pictures_are_told_where_they_make_a_cluster_too_large(copies: int) -> None:
    told = why(60, SamePicture("abc", 5, copies, 60))
    assert f"{copies} of the 60 of them that were looked at have the very same picture" in told
    assert "(sha256 abc, for example item 5): a placeholder" in told


@pytest.mark.parametrize("copies", [1, 19, 29])
def test_a_cluster_too_large_without_equal_pictures_is_put_down_to_the_encoder(copies: int) -> None:
    assert why(60, SamePicture("abc", 5, copies, 60)) == gates.CAUSES["balance"]


def test_one_picture_of_a_cluster_just_above_the_limit_is_no_placeholder() -> None:
    of_encoder = gates.CAUSES["balance"]
    assert why(51, SamePicture("abc", 5, 1, 51)) == of_encoder  # all are different
    assert why(51, SamePicture("abc", 5, 1, 1)) == of_encoder  # one was left to look at
    assert why(51, SamePicture("abc", 5, 2, 51)) == of_encoder
    assert "a placeholder" in why(51, SamePicture("abc", 5, 26, 51))


def test_a_cluster_that_is_too_large_without_its_copies_is_put_down_to_the_encoder() -> None:
    assert why(90, SamePicture("abc", 5, 50, 90)) == gates.CAUSES["balance"]  # 40 of 50


def test_copies_among_a_sample_stand_for_all() -> None:
    assert "a placeholder" in why(60, SamePicture("abc", "x", 4, 6))
    assert why(60, SamePicture("abc", "x", 1, 6)) == gates.CAUSES["balance"]
