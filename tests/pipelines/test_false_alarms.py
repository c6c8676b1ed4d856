"""Three hundred ordinary nights of random shops pass every default gate.

The shops are of all sizes at which gates judge, and of some at which they say that they cannot.
"""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from pipelines.config import Gates
from pipelines.running import gates
from pipelines.running.gates import WARN, Finding
from tests.support.commands import Capture
from tests.support.drawn_shops import DrawnShop, Traits, encoder_of_colours

SHOPS, NIGHTS = 10, 30


def draw_traits(seed: int) -> Traits:
    """Draws what a shop is like; of ten seeds, each is larger than the one before."""
    rng = np.random.default_rng(seed)
    place = seed % SHOPS / (SHOPS - 1)
    items, users = round(50 * 16**place), round(60 * 17**place)
    window = int(rng.choice([7, 14, 30]))
    return Traits(
        items=items,
        users=users,
        ids=str(rng.choice(["int", "string"])),
        log_days=int(rng.choice([0, window])),
        window_days=window,
        has_click_time=bool(rng.random() < 0.5),
        has_request_id=bool(rng.random() < 0.5),
        requests=float(rng.uniform(0.3, 0.9)),
        leave=float(rng.uniform(0, 0.03)),
        growth=float(rng.uniform(1.0, 1.01)),
        user_growth=float(rng.uniform(0, 0.01)),
        weekend=float(rng.choice([0.5, 1.0, 1.6])),
        sales=tuple(map(int, rng.choice(np.arange(3, NIGHTS), 2, replace=False))),
        closed=tuple(map(int, rng.choice(np.arange(2, NIGHTS), rng.integers(0, 3), replace=False))),
        clusters=max(2, items // 20),
    )


@pytest.fixture
def found() -> Iterator[list[Finding]]:
    """Gives a list that gets all that gates find from now on."""
    every: list[Finding] = []
    judge = gates.judge

    def judge_and_keep(*given: object) -> list[Finding]:
        every.extend(now := judge(*given))
        return now

    with mock.patch.object(gates, "judge", judge_and_keep):
        yield every


@pytest.mark.parametrize("seed", range(SHOPS))
def test_ordinary_nights_pass_every_default_gate_and_few_are_warned_of(
    seed: int, tmp_path: Path, capsys: Capture, found: list[Finding]
) -> None:
    with encoder_of_colours():
        shop = DrawnShop(tmp_path / "shop", draw_traits(seed), NIGHTS, seed)
        shop.fit_codebook()
        found.clear()
        ends = ("--start-ds", str(shop.day(0)), "--end-ds", str(shop.day(NIGHTS - 1)))
        assert shop.courier("refresh", *ends) == 0, capsys.readouterr().err
    records = shop.root / "test" / "_nights"
    assert all((records / f"ds={shop.day(n)}.json").exists() for n in range(NIGHTS))
    # Days of a sale, and a weekend after it.
    warned = [one.gate for one in found if one.level == WARN]
    assert set(warned) <= {"impression_rows"}
    assert len(warned) <= NIGHTS / 5
    if seed == SHOPS - 1:
        judged = {one.gate for one in found if one.observed is not None}
        assert set(Gates.model_fields) - judged <= {"click_times"}  # its log has none
