"""Tests that rows follow items from number to number: against plain loops, and what is refused."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.codebooks import lineage as lineages
from feature_jobs.codebooks.codebook import Codebook, Resolution
from feature_jobs.codebooks.crosswalk import count_moves, crosswalk
from feature_jobs.codebooks.lineage import Step, born_rows, read_lineage, step_of
from feature_jobs.schemas import CourierError, DataContractError, InputNotReady, OperatorError
from feature_jobs.store.partitions import read_parquet, write_parquet
from tests.support.codebooks import by_hand, unit_rows
from tests.support.lineages import ENCODER, Generation, followed, mixed_rows, random_lineage


def main_of(generation: Generation) -> Resolution:
    return generation.codebook.info.resolution("main")


def steps_of(made: list[Generation]) -> list[Step]:
    return [step_of(b.moves, main_of(a), main_of(b)) for a, b in pairwise(made)]


def moved(rows: np.ndarray, steps: list[Step]) -> np.ndarray:
    for step in steps:
        rows = np.concatenate([rows, *born_rows(rows, step)])
    return rows


def book(*numbers: int) -> Codebook:
    return by_hand({"main": unit_rows(len(numbers))}, {"main": np.array(numbers)}, ENCODER)


def step_between(parent: Codebook, child: Codebook, old: list[int], new: list[int]) -> Step:
    counts = count_moves(np.array(old), np.array(new), np.zeros(len(old)), "main")
    resolutions = (codebook.info.resolution("main") for codebook in (parent, child))
    return step_of(crosswalk([counts], parent, child), *resolutions)


# ---- Rows ----------------------------------------------------------------------------------


def test_a_new_number_gets_the_mean_of_the_rows_that_its_items_had() -> None:
    old, new = [1, 1, 1, 2, 2, 3], [1, 5, 5, 5, 2, 3]
    step = step_between(book(1, 2, 3), book(1, 2, 3, 4, 5), old, new)
    rows = np.array([[9, 9], [3, 0], [0, 3], [6, 6]], "f4")
    seed = (3 * rows[1] + 2 * rows[2] + rows[3]) / 6  # nobody's number 4
    mixed = (2 * rows[1] + rows[2]) / 3
    found = np.concatenate(list(born_rows(rows, step)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [seed, mixed], rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([1, 3, 100]))
def test_rows_are_those_of_plain_loops_however_they_are_cut(
    seed: int, steps: int, values: int
) -> None:
    rng = np.random.default_rng(seed)
    made = random_lineage(rng, steps)
    rows = rng.normal(size=(made[0].max_id + 1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lineages, "_VALUES", values)
        found = moved(rows, steps_of(made))
    np.testing.assert_allclose(found, mixed_rows(rows, followed(made)[0]), rtol=1e-12, atol=1e-12)
    assert found[: len(rows)].tobytes() == rows.tobytes()


def test_random_lineages_have_every_kind_of_number() -> None:
    """Else the loops would prove little."""
    kinds = {"kept": 0, "mixed": 0, "seeded": 0, "retired": 0}
    later = 0  # seeded in one step, and an ancestor in the next
    for seed in range(40):
        made = random_lineage(np.random.default_rng(seed), 2)
        steps = steps_of(made)
        infos = [generation.codebook.info for generation in made]
        for kind, count in (
            lineages.Lineage(infos[0], infos[2], "main", tuple(steps)).fates().items()
        ):
            kinds[kind] += count
        born_seeded = set(range(steps[0].first, steps[0].last + 1)) - set(steps[0].born.tolist())
        later += len(born_seeded & set(steps[1].old.tolist()))
    assert min(kinds.values()) > 20, kinds
    assert later > 0


def test_a_number_whose_items_come_from_seeded_numbers_alone_is_seeded() -> None:
    first, second, third = book(1), book(1, 2, 3), book(1, 4, 5)
    steps = (
        step_between(first, second, [1, 1, 0, 0], [1, 2, 3, 3]),
        step_between(second, third, [1, 2, 3, 3], [1, 4, 4, 5]),
    )
    found = lineages.Lineage(first.info, third.info, "main", steps)
    assert found.fates() == {"kept": 1, "mixed": 1, "seeded": 1, "retired": 0}


def test_without_a_single_item_all_numbers_of_the_parent_count_alike() -> None:
    step = step_between(book(1, 3), book(4), [], [])
    (found,) = born_rows(np.array([[9.0], [1.0], [9.0], [2.0]]), step)
    assert found.tolist() == [[1.5]]


# ---- Packages ------------------------------------------------------------------------------


@pytest.fixture
def made() -> list[Generation]:
    return random_lineage(np.random.default_rng(1), 2)


def refused(kind: type[CourierError], old: str, new: str, label: str = "main") -> str:
    with pytest.raises(kind) as told:
        read_lineage(old, new, label)
    return str(told.value)


def test_packages_between_are_found_beside_either_of_the_two(
    made: list[Generation], tmp_path: Path
) -> None:
    old, between, new = (made[n].save(tmp_path / str(n)) for n in range(3))
    message = refused(InputNotReady, old, new)
    assert f"descends from {made[1].identity}, whose package is not in" in message
    assert f"{tmp_path}/2 or {tmp_path}/0" in message
    for place in ("0", "2"):
        beside = tmp_path / place / made[1].identity
        shutil.copytree(between, beside)
        found = read_lineage(f"{old}/", new, "main")
        assert [step.first for step in found.steps] == [made[0].max_id + 1, made[1].max_id + 1]
        shutil.rmtree(beside)


def test_what_does_not_descend_is_refused_with_the_lineage_that_there_is(
    made: list[Generation], tmp_path: Path
) -> None:
    old, _, new = (generation.save(tmp_path) for generation in made)
    other = random_lineage(np.random.default_rng(2), 0)[0].save(tmp_path)
    message = refused(OperatorError, other, new)
    names = ", child of ".join(generation.identity for generation in reversed(made))
    assert f"({names}; of encoder {ENCODER}) does not descend" in message
    assert "Give a codebook of this lineage" in message
    assert "are the two swapped?" in refused(OperatorError, new, old)
    assert "which has no parent" in refused(OperatorError, new, old)
    assert "are the two swapped?" in refused(OperatorError, new, new)
    assert "is no codebook package" in refused(OperatorError, str(tmp_path), new)


def test_a_label_that_a_codebook_of_the_way_lacks_is_refused(
    made: list[Generation], tmp_path: Path
) -> None:
    old, _, new = (generation.save(tmp_path) for generation in made)
    message = refused(OperatorError, old, new, "fine")
    assert f"{made[0].identity} has no resolution 'fine', only main" in message


def test_a_crosswalk_that_is_not_there_or_is_damaged_is_refused(
    made: list[Generation], tmp_path: Path
) -> None:
    old, between, new = (generation.save(tmp_path) for generation in made)
    path = Path(new) / "crosswalk.parquet"
    table = read_parquet(str(path))
    path.write_bytes(path.read_bytes()[:-9])
    assert "is damaged" in refused(DataContractError, old, new)
    write_parquet(str(path), table.drop_columns(["items"]))
    assert "is damaged: columns label, old_cluster_id" in refused(DataContractError, old, new)
    shutil.copy(Path(between) / "crosswalk.parquet", path)
    assert "not those of the codebook" in refused(DataContractError, old, new)
    beyond = pa.array(np.full(len(table), made[2].max_id + 1, np.int32))
    write_parquet(str(path), table.set_column(2, "new_cluster_id", beyond))
    assert "not those of the codebook" in refused(DataContractError, old, new)
    path.unlink()
    assert "has a parent but no crosswalk.parquet" in refused(OperatorError, old, new)
