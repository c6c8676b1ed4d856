"""Lists what writers of one day do to each other's small nights."""

from collections.abc import Callable

from feature_jobs.schemas import CourierError
from tests.support.small_nights import Shop, Values

OLDEST, OLD, MINE, OTHER = [1, 2, 3, 4], [5, 6, 7, 8], [11, 12, 13], [21, 22, 23, 24, 25]
NIGHTS = [OLDEST, OLD, MINE, OTHER]

# What there is before, what the first writer does, and what is there when it has ended well.
FIRST: dict[str, tuple[list[Values], Callable[[Shop], None], Values]] = {
    "publishes": ([], lambda shop: shop.publish(MINE), MINE),
    "publishes again": ([OLDEST, OLD], lambda shop: shop.publish(MINE), MINE),
    "publishes the same rows": ([OLDEST, MINE], lambda shop: shop.publish(MINE, "again"), MINE),
    "rolls back": ([OLDEST, OLD], lambda shop: shop.roll_back(), OLDEST),
}
SECOND: dict[str, Callable[[Shop], None]] = {
    "publishes": lambda shop: shop.publish(OTHER),
    "rolls back": lambda shop: shop.roll_back(),
}


def begin(root: str, before: list[Values]) -> Shop:
    """Returns a shop that has published these nights, one over the other."""
    shop = Shop(root)
    for values in before:
        shop.publish(values)
    return shop


def stage(shop: Shop, first: str) -> None:
    """Makes what the first writer publishes."""
    if first != "rolls back":
        shop.make(MINE, "again" if first == "publishes the same rows" else "")


def nothing_is_lost(shop: Shop, stands: Values | None, published: list[Values]) -> None:
    """Asserts that each night that was ever published is kept whole, but for what `stands`."""
    there = [stands, *shop.kept()]
    for values in published:
        assert values in there


def refused(run: Callable[[Shop], None], shop: Shop) -> str:
    """Returns what a run says when it stops, "" when it ends well."""
    try:
        run(shop)
    except CourierError as error:
        return str(error)
    return ""
