"""What goes wrong with a shop's inputs is refused before anything of it is published.

Nights of a drawn shop are published; then tonight is broken in one way after another, and made with
the default gates.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.config import Gates
from tests.support.commands import Capture, published_below
from tests.support.drawn_shops import DrawnShop, Traits, encoder_of_colours
from tests.support.shop_faults import FAULTS, NIGHT, Fault
from tests.support.world import Kept

# Of these the refusal names items, for an operator to look at.
WITH_ITEMS = {"outage", "rejects", "unknown_items", "churn (items, main)", "balance (main)"}


@pytest.fixture(scope="module", autouse=True)
def _encoder() -> Iterator[None]:
    with encoder_of_colours():
        yield


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Keeps a shop of some thousand users, whose nights before tonight are published."""
    shop = DrawnShop(
        tmp_path_factory.mktemp("faults") / "shop", Traits(users=2000), nights=NIGHT + 1
    )
    shop.fit_codebook()
    ends = ("--start-ds", str(shop.day(0)), "--end-ds", str(shop.day(NIGHT - 1)))
    assert shop.courier("refresh", *ends) == 0
    return Kept(shop)


@pytest.fixture(scope="module")
def items_made(yesterday: Kept) -> Kept:
    """Keeps the shop once tonight's items are published: what is left of the night is the log's."""
    shop = yesterday.again()
    for command in ("embed", "item-features"):
        assert shop.courier(command, "--ds", str(shop.day(NIGHT))) == 0
    return Kept(shop, "items-made")


def make_tonight(shop: DrawnShop, *accepted: str) -> int:
    accept = [word for gate in accepted for word in ("--accept", gate)]
    why = ["--reason", "known"] if accepted else []
    return shop.courier("refresh", "--ds", str(shop.day(NIGHT)), *accept, *why)


def refused(errors: str) -> dict[str, list[str]]:
    """Returns the rows of the table of a refusal: by gate, what was observed, limit, examples."""
    _, _, rows = errors.partition("for example\n")
    split = [re.split(r"  +", line) for line in rows.splitlines() if not line.startswith("  ")]
    return {gate: cells for gate, *cells in split if len(cells) == 3}


def without_subject(names: Any) -> set[str]:
    return {name.split(" ")[0] for name in names}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_and_what_was_published_stays(
    name: str, yesterday: Kept, items_made: Kept, capsys: Capture
) -> None:
    fault: Fault = FAULTS[name]
    shop = (items_made if fault.is_of_the_log else yesterday).again()
    fault.do(shop)
    before = published_below(shop.root)
    capsys.readouterr()
    assert make_tonight(shop, *fault.accepted) == fault.status
    errors = capsys.readouterr().err
    assert published_below(shop.root) == before
    assert "Traceback" not in errors
    assert fault.told in " ".join(errors.split())
    rows = refused(errors)
    assert without_subject(rows) == set(fault.gates)
    for gate, (observed, limit, examples) in rows.items():
        assert observed != limit
        assert (examples != "-") == (gate in WITH_ITEMS)


def test_every_gate_refuses_one_of_the_faults() -> None:
    assert {gate for fault in FAULTS.values() for gate in fault.gates} == set(Gates.model_fields)


def test_the_shop_without_a_fault_is_published_without_a_warning(items_made: Kept) -> None:
    shop = items_made.again()
    assert make_tonight(shop) == 0
    assert record(shop)["gates"] == []


def test_a_gate_that_is_not_accepted_refuses_beside_one_that_is(
    yesterday: Kept, capsys: Capture
) -> None:
    shop = yesterday.again()
    FAULTS["the export lacks the images of new items"].do(shop)
    before = published_below(shop.root)
    assert make_tonight(shop, "outage") == 3
    assert without_subject(refused(capsys.readouterr().err)) == {"rejects"}
    assert published_below(shop.root) == before
    assert make_tonight(shop, "outage", "rejects") == 0
    found = [gate for gate in record(shop)["gates"] if gate["level"] == "accepted"]
    assert {(gate["gate"], gate["reason"]) for gate in found} == {
        ("outage", "known"), ("rejects", "known"),
    }  # fmt: skip


def record(shop: DrawnShop) -> dict[str, Any]:
    path = shop.root / "test" / "_nights" / f"ds={shop.day(NIGHT)}.json"
    return json.loads(path.read_text())
