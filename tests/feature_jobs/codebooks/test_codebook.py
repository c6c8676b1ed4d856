"""Codebooks cannot be confused, and their numbers go on meaning what they meant."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.codebooks import codebook
from feature_jobs.codebooks.codebook import (
    Codebook,
    continued_numbers,
    health_of,
    load_codebook,
    read_codebook_info,
    retired_numbers,
    save_codebook,
)
from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import broadcast, files
from tests.support.codebooks import by_hand, unit_rows

ENCODER = "tiny-000000000000"


def made(seed: int = 0, encoder: str = ENCODER) -> Codebook:
    centres = {"main": unit_rows(4, seed), "coarse": unit_rows(2, seed + 1)}
    return by_hand(centres, {"main": np.arange(1, 5), "coarse": np.arange(1, 3)}, encoder)


# ---- Packages ----------------------------------------------------------------------------------


def test_a_saved_codebook_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    book = made()
    loaded = load_codebook(save_codebook(str(tmp_path), book))
    assert loaded.info == book.info
    assert loaded.info.labels == ("main", "coarse")
    for label in loaded.info.labels:
        np.testing.assert_array_equal(loaded.centres[label], book.centres[label])
        np.testing.assert_array_equal(loaded.numbers[label], book.numbers[label])
        assert isinstance(loaded.centres[label], np.memmap)  # one copy for all processes


def test_the_id_changes_with_centres_numbers_labels_encoder_parent_and_day() -> None:
    book = made()
    centres, numbers = dict(book.centres), dict(book.numbers)
    other, made_of = {"main": centres["main"], "fine": centres["coarse"]}, book.info.made_of
    ids = {
        codebook.codebook_id("test", centres, numbers, made_of),
        codebook.codebook_id("test", {k: c + 1 for k, c in centres.items()}, numbers, made_of),
        codebook.codebook_id("test", centres, {k: n + 1 for k, n in numbers.items()}, made_of),
        codebook.codebook_id("test", centres, numbers, ("other", *made_of[1:])),
        codebook.codebook_id("test", centres, numbers, (ENCODER, "parent", made_of[2])),
        codebook.codebook_id("test", centres, numbers, (ENCODER, None, "2026-03-01")),
        codebook.codebook_id(
            "test", other, {"main": numbers["main"], "fine": numbers["coarse"]}, made_of
        ),
    }
    assert len(ids) == 7
    assert book.info.codebook_id in ids


@pytest.mark.parametrize("name", ["main-centres.npy", "coarse-numbers.npy"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "pickled"])
def test_a_damaged_codebook_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    path = Path(save_codebook(str(tmp_path), made())) / name
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        path.write_bytes(data[:-4] + bytes(reversed(range(1, 5))))
    elif damage == "missing":
        path.unlink()
    else:
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataContractError, match="is damaged"):
        load_codebook(str(path.parent))


def test_arrays_of_another_codebook_are_told_from_the_original(tmp_path: Path) -> None:
    folder = Path(save_codebook(str(tmp_path / "a"), made()))
    other = Path(save_codebook(str(tmp_path / "b"), made(seed=5)))
    shutil.copy(other / "main-centres.npy", folder / "main-centres.npy")
    with pytest.raises(DataContractError, match="is damaged"):
        load_codebook(str(folder))


def test_a_folder_without_a_codebook_is_the_operators_mistake(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="is no codebook package"):
        read_codebook_info(str(tmp_path))


def test_a_codebook_in_a_bucket_is_copied_once_to_each_machine(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(broadcast.tempfile, "tempdir", None)
    book = made()
    folder = save_codebook(bucket, book)
    asked: list[str] = []
    real = files.read_bytes
    monkeypatch.setattr(files, "read_bytes", lambda path: asked.append(path) or real(path))
    for _ in range(2):
        np.testing.assert_array_equal(load_codebook(folder).centres["main"], book.centres["main"])
    assert sum(path.endswith(".npy") and path.startswith("gs://") for path in asked) == 4


# ---- The life of numbers -----------------------------------------------------------------------


def test_a_number_goes_to_the_centre_that_keeps_most_of_its_items() -> None:
    old = np.array([7, 7, 7, 2, 2, 2, 2, 5], np.int32)
    place = np.array([1, 1, 0, 0, 0, 0, 1, 2])
    # Centre 0 has three of number 2, centre 1 two of 7; centre 2 only one of 5.
    assert continued_numbers(old, place, 3, max_id=9).tolist() == [2, 7, 5]


def test_a_centre_without_old_items_gets_a_new_number_and_none_is_given_twice() -> None:
    old = np.array([3, 3, 3, 0, 0], np.int32)
    place = np.array([0, 0, 1, 1, 2])
    assert continued_numbers(old, place, 4, max_id=9).tolist() == [3, 10, 11, 12]
    assert retired_numbers(np.array([3, 10, 11, 12]), 12) == (1, 2, 4, 5, 6, 7, 8, 9)


def test_a_number_does_not_go_to_a_sliver_of_its_items() -> None:
    """Nine tenths of number 2 went to the centre that 1 has more of; the rest lie among others."""
    old = np.array([1] * 200 + [2] * 90 + [2] * 10 + [0] * 40 + [3] * 60, np.int32)
    place = np.array([0] * 290 + [1] * 110)
    assert continued_numbers(old, place, 2, max_id=3).tolist() == [1, 3]
    assert continued_numbers(old[:340], place[:340], 3, max_id=3).tolist() == [1, 2, 4]
    crowd = np.concatenate([old[:300], np.full(200, 3, np.int32)])
    moved = np.array([0] * 290 + [1] * 10 + [1] * 100 + [2] * 100)
    assert continued_numbers(crowd, moved, 3, max_id=3).tolist() == [1, 3, 4]


@given(st.integers(0, 2**32 - 1))
def test_numbers_are_distinct_and_old_or_above_all_that_were_issued(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters, max_id, n = int(rng.integers(1, 30)), int(rng.integers(0, 40)), 200
    old = rng.integers(0, max_id + 1, n).astype(np.int32)
    place = rng.integers(0, clusters, n)
    numbers = continued_numbers(old, place, clusters, max_id)
    assert len(set(numbers.tolist())) == clusters
    for centre, number in enumerate(numbers):
        if number <= max_id:
            assert ((old == number) & (place == centre)).any()
    new = numbers[numbers > max_id]
    assert sorted(new) == list(range(max_id + 1, max_id + 1 + len(new)))
    order = rng.permutation(n)
    again = continued_numbers(old[order], place[order], clusters, max_id)
    np.testing.assert_array_equal(again, numbers)


# ---- Health ------------------------------------------------------------------------------------


def test_equal_clusters_have_a_perplexity_of_their_number() -> None:
    found = health_of(np.array([5, 5, 5, 5]))
    assert found["perplexity"] == pytest.approx(4)
    assert (found["used"], found["dead"], found["largest_share"]) == (4, 0, 0.25)
    assert (found["items_p5"], found["items_p50"], found["items_max"]) == (5, 5, 5)


def test_dead_clusters_and_a_large_one_are_seen() -> None:
    found = health_of(np.array([97, 1, 1, 1, 0, 0]))
    assert (found["items"], found["clusters"], found["used"], found["dead"]) == (100, 6, 4, 2)
    assert found["largest_share"] == 0.97
    assert 1 < found["perplexity"] < 1.3
    nothing = health_of(np.zeros(3, np.int64))
    assert (nothing["used"], nothing["perplexity"], nothing["largest_share"]) == (0, 0, 0)
