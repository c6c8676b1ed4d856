"""Commands in any order, killed anywhere, leave what a small model says that readers must find.

Tables are made by stub jobs; all else is the real code. How many commands were run, how many died
on the way, and how many versions were read, is printed at the end (`pytest -s`).
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.conftest import Artefacts
from tests.support import stub_nights
from tests.support.any_order import DONE, NOT_READY, REFUSED, USAGE
from tests.support.order_of_commands import RAN, AnyOrder


class AnyOrderByNights(AnyOrder):
    """Scores with the nights that a shop serves; a day changes with those before it."""

    features_from = "previous"


COMMANDS = 1000  # at least


@pytest.mark.parametrize("machine", [AnyOrder, AnyOrderByNights])
def test_any_order_of_commands_shows_what_the_model_says(
    machine: type[AnyOrder], in_memory: Path, artefacts: Artefacts
) -> None:
    machine.folder, machine.artefacts = in_memory / "stubs", artefacts
    RAN.clear()
    with stub_nights.stub_jobs():
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=80, stateful_step_count=12, derandomize=True, deadline=None,
                database=None, suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    print(f"\n{dict(RAN)}, violations: 0")  # noqa: T201
    assert RAN["commands"] >= COMMANDS
    seen = [f"ended with {status}" for status in (DONE, USAGE, REFUSED, NOT_READY)]
    for what in [*seen, "died", "rolled back", "pruned", "equal to a fresh root"]:
        assert RAN[what] > 5, what
