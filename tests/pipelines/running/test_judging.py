"""What gates are asked about is gathered from what is staged and published.

A cluster that is too large for its copies of one picture is no fault of the encoder.
"""

import datetime as dt
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from feature_jobs.items.item_features import SamePicture
from feature_jobs.schemas import ITEM_FEATURES, Table
from feature_jobs.store.partitions import Partition
from pipelines.running import gates
from pipelines.running.judging import Nights, why_large
from pipelines.running.layout import Layout
from pipelines.running.states import Look


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


# ---- What earlier days have -------------------------------------------------------------------


class _AtDays(Look):
    """Sees some days of a table published, by the names of their folders."""

    def __init__(self, days: Sequence[dt.date]):
        super().__init__()
        self._days = {f"/root/test/item_features/ds={day}": day for day in days}

    def published(self, folder: str) -> Partition | None:
        day = self._days.get(folder)
        return Partition(folder, {"ds": str(day)}) if day else None


def test_gates_compare_with_the_newest_days_before_and_list_them_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    days = [dt.date(2026, 3, n) for n in range(1, 16)]
    begun, there = days[:12], [day for day in days[:12] if day.day != 9]
    listed: list[Table] = []

    def list_days(_: Layout, table: Table) -> list[dt.date]:
        listed.append(table)
        return begun

    monkeypatch.setattr(Layout, "begun_days", list_days)
    made_now = [SimpleNamespace(ds=day, stages=()) for day in days[11:]]
    nights = Nights(Layout("/root", "test", "/root"), _AtDays(there), made_now)  # type: ignore[arg-type]

    def seen(day: dt.date) -> list[str]:
        return [manifest["ds"][-2:] for manifest in nights.manifests(ITEM_FEATURES, day)]

    assert seen(days[11]) == ["11", "10", "08", "07", "06", "05", "04"]
    nights.leave_out(days[11])
    assert seen(days[14]) == ["12", "11", "10", "08", "07", "06", "05"]
    assert seen(days[0]) == []
    assert seen(days[2]) == ["02", "01"]
    assert listed == [ITEM_FEATURES]
