"""Commands in any order make the same tables of the same inputs, by the real jobs.

What the jobs make is not computed here: a table follows from its inputs, the tables upstream and
those of the day before, so what came of the same ones once comes of them again, whatever happened
in between; nights of a fresh root say so last.
"""

from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from tests.conftest import Artefacts
from tests.support.any_order import DAYS, Model, Witness
from tests.support.order_of_commands import RAN, AnyOrder
from tests.support.ordered_shop import RealShop, Shop
from tests.support.stub_nights import Tables

SEQUENCES = 20
KNOWN: dict[str, Tables] = {}


class AnyOrderOfJobs(AnyOrder):
    """Runs commands of three days: one of them is closed, and the log of one comes late."""

    horizon = DAYS[2:5]
    # A table follows from images too, and no manifest says from which.
    draw_images = remake_of_other_images = None

    @initialize(count=st.integers(1, 2))
    def open_shop(self, count: int) -> None:
        super().open_shop(count)
        RAN["sequences"] += 1

    def open(self, root: str = "features") -> Shop:
        return RealShop(self.folder, self.artefacts, self.inputs, root)

    def judge(self) -> Model:
        return Witness(self.inputs, KNOWN)


def test_any_order_of_commands_makes_what_a_fresh_root_has(
    in_memory: Path, artefacts: Artefacts
) -> None:
    AnyOrderOfJobs.folder, AnyOrderOfJobs.artefacts = in_memory / "jobs", artefacts
    run_state_machine_as_test(
        AnyOrderOfJobs,
        settings=settings(
            max_examples=SEQUENCES, stateful_step_count=2, derandomize=True, deadline=None,
            database=None, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    print(f"\n{dict(RAN)}, violations: 0")  # noqa: T201
    assert RAN["sequences"] >= SEQUENCES
    assert min(RAN["died"], RAN["equal to a fresh root"]) > 0
