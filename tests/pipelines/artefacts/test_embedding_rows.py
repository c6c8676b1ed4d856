"""`courier crosswalk` writes the rows of plain loops, and refuses tables that do not fit."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_jobs.store import files
from pipelines.artefacts import embedding_rows
from pipelines.cli import main
from tests.support.commands import Capture, paragraph
from tests.support.lineages import Generation, followed, mixed_rows, random_lineage


class Shop:
    """A lineage of three codebooks and a table of rows for the first."""

    def __init__(self, folder: Path):
        self.made = random_lineage(np.random.default_rng(37), 2)
        self.old, self.between, self.new = (g.save(folder / "codebooks") for g in self.made)
        self.rows, self.out = folder / "rows.npy", folder / "new_rows.npy"
        size = (self.made[0].max_id + 1, 4)
        self.table = np.random.default_rng(4).normal(size=size).astype("f4")
        np.save(self.rows, self.table)

    def move(self, *args: str, old: str = "", new: str = "") -> int:
        ends = ["--from", old or self.old, "--to", new or self.new]
        return main(["crosswalk", "--rows", str(self.rows), *ends, "--out", str(self.out), *args])


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def fates(made: list[Generation], seeded: set[int]) -> dict[str, int]:
    old, new = (set(g.codebook.numbers["main"].tolist()) for g in (made[0], made[-1]))
    return {
        "kept": len(old & new),
        "mixed": len(new - old - seeded),
        "seeded": len((new - old) & seeded),
        "retired": len(old - new),
    }


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.sampled_from(["<f2", "<f4", ">f4", "<f8"]),
    st.sampled_from("CF"),
    st.integers(1, 60),
)
def test_rows_are_those_of_plain_loops(
    seed: int, steps: int, dtype: str, order: str, block: int
) -> None:
    rng = np.random.default_rng(seed)
    made = random_lineage(rng, steps)
    rows = rng.normal(size=(made[0].max_id + 1, 3)).astype(dtype, order=order)
    weights, seeded = followed(made)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_rows, "_BLOCK_ROWS", block)
        folder = Path(name)
        packages = [generation.save(folder) for generation in made]
        np.save(folder / "rows.npy", rows)
        paths = str(folder / "rows.npy"), packages[0], packages[-1]
        found = embedding_rows.move_rows(*paths, "main", str(folder / "out.npy"))
        out = np.load(folder / "out.npy")
        np.save(folder / "plain.npy", out)
        assert (folder / "plain.npy").read_bytes() == (folder / "out.npy").read_bytes()
        assert sorted(p.name for p in folder.glob("*.npy")) == ["out.npy", "plain.npy", "rows.npy"]
    assert out.dtype == rows.dtype
    step = steps * np.finfo(rows.dtype).eps  # a generation's rows are rounded to the dtype
    np.testing.assert_allclose(out, mixed_rows(rows, weights), rtol=step, atol=4 * step)
    assert out[: len(rows)].tobytes() == np.ascontiguousarray(rows).tobytes()
    assert len(out) == len(weights) == made[-1].max_id + 1
    assert {kind: found[kind] for kind in fates(made, seeded)} == fates(made, seeded)


def test_the_command_tells_what_became_of_the_numbers(shop: Shop, capsys: Capture) -> None:
    assert shop.move("--json") == 0
    told = json.loads(capsys.readouterr().out)
    expected = fates(shop.made, followed(shop.made)[1])
    assert all(expected.values())
    rows = shop.made[2].max_id + 1
    assert told == {
        "from": shop.made[0].identity, "to": shop.made[2].identity, "label": "main",
        "generations": 2, **expected, "out": str(shop.out), "shape": [rows, 4], "dtype": "float32",
    }  # fmt: skip
    assert shop.move() == 0  # the same content again
    text = capsys.readouterr().out
    assert f"{expected['kept']} numbers kept, {expected['mixed']} mixed" in text
    assert f"wrote {shop.out}: {rows} rows of 4 float32" in text


def test_two_moves_in_turn_are_one_move(shop: Shop, tmp_path: Path) -> None:
    assert shop.move() == 0
    whole = shop.out.read_bytes()
    shop.out = tmp_path / "half.npy"
    assert shop.move(new=shop.between) == 0
    shop.rows, shop.out = shop.out, tmp_path / "both.npy"
    assert shop.move(old=shop.between) == 0
    assert shop.out.read_bytes() == whole


def test_a_folder_is_refused_before_the_work(
    shop: Shop, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(embedding_rows, "read_lineage")
    shop.out.mkdir()
    assert shop.move() == 2
    assert f"--out {shop.out} is a folder" in paragraph(capsys)


def test_another_table_is_not_overwritten_and_nothing_is_left(shop: Shop, capsys: Capture) -> None:
    shop.out.write_bytes(b"of a model")
    before = sorted(shop.out.parent.iterdir())
    assert shop.move() == 2
    assert "has other content than the rows moved now" in paragraph(capsys)
    assert shop.out.read_bytes() == b"of a model"
    shop.out = shop.rows
    assert shop.move() == 2
    np.testing.assert_array_equal(np.load(shop.rows), shop.table)
    assert sorted(shop.out.parent.iterdir()) == before


def refused(shop: Shop, capsys: Capture, status: int = 2) -> str:
    before = files.list_names(str(shop.out.parent))
    capsys.readouterr()
    assert shop.move() == status
    assert files.list_names(str(shop.out.parent)) == before
    return paragraph(capsys)


def test_rows_of_another_number_are_refused_with_what_is_likely(
    shop: Shop, capsys: Capture
) -> None:
    expected = shop.made[0].max_id + 1
    hints = {
        expected - 1: "is there none for 0",
        expected + 1: "is it of padding",
        shop.made[2].max_id + 1: "Were they moved already?",
        10 * expected: "Is it the table of another codebook?",
    }
    assert len(hints) == 4
    for count, hint in hints.items():
        np.save(shop.rows, np.zeros((count, 4), "f4"))
        message = refused(shop, capsys)
        assert f"has {count:,} rows, but {shop.made[0].identity} has numbers up to" in message
        assert hint in message


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (np.zeros(9, "f4"), "has shape [9]"),
        (np.zeros((9, 0), "f4"), "has shape [9, 0]"),
        (np.zeros((3, 3, 3), "f4"), "has shape [3, 3, 3]"),
        (np.zeros((9, 4), "i8"), "has dtype int64"),
        (np.zeros((9, 4), "c8"), "has dtype complex64"),
        (np.zeros((9, 4), "V2"), "has dtype |V2"),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(
    table: np.ndarray, told: str, shop: Shop, capsys: Capture
) -> None:
    np.save(shop.rows, table)
    assert told in refused(shop, capsys)


def test_a_row_that_is_not_finite_is_refused_by_its_number(shop: Shop, capsys: Capture) -> None:
    for value in (np.nan, -np.inf):
        table = shop.table.copy()
        table[2, 1] = value
        np.save(shop.rows, table)
        assert "has NaN or infinity in row 2, where" in refused(shop, capsys, 1)


def test_what_is_no_file_of_an_array_is_refused(shop: Shop, capsys: Capture) -> None:
    whole = shop.rows.read_bytes()
    for data in (b"", b"rows", whole[:-1], whole[:40]):
        shop.rows.write_bytes(data)
        assert "is no .npy file of one array" in refused(shop, capsys, 1)
    np.save(shop.rows, np.array([[None, "a"]]), allow_pickle=True)
    assert "is no .npy file of one array" in refused(shop, capsys, 1)
    with shop.rows.open("wb") as file:
        np.savez(file, a=shop.table)
    assert "has several arrays" in refused(shop, capsys)
    shop.rows.unlink()
    assert "is no file" in refused(shop, capsys)
    shop.rows.mkdir()
    assert "is no file" in refused(shop, capsys)


def test_codebooks_that_do_not_fit_are_refused_by_the_command(shop: Shop, capsys: Capture) -> None:
    assert shop.move(old=shop.new, new=shop.old) == 2
    assert "does not descend from" in paragraph(capsys)
    assert shop.move("--label", "fine") == 2
    assert "has no resolution 'fine'" in paragraph(capsys)
    assert not shop.out.exists()
