"""`courier crosswalk` moves the rows of an embedding table to the numbers of a new codebook.

The table is memory-mapped and written block by block, so that one larger than the machine's memory
does no harm. What is written is mapped for the next generation, but nothing is written through a
map: on a full disk that would kill the process. The new table appears when all of it is there.
"""

import filecmp
from collections.abc import Iterator
from typing import Any

import numpy as np

from feature_jobs.codebooks.lineage import Lineage, born_rows, read_lineage
from feature_jobs.schemas import DataContractError, OperatorError
from feature_jobs.store import files

_BLOCK_ROWS = 65_536


def move_rows(rows: str, old: str, new: str, label: str, out: str) -> dict[str, Any]:
    """Writes `out` [max_id of `new` + 1, d] with the rows of `rows` [max_id of `old` + 1, d].

    Both are .npy files of one dtype, `old` and `new` folders of codebooks. The rows of generations
    on the way are rounded to the dtype, too. Returns what became of the numbers. Raises
    OperatorError, also where `out` is there with other content, InputNotReady or DataContractError.
    """
    _check_out(out)
    lineage = read_lineage(old, new, label)
    table = _open(rows)
    _check_shape(rows, table, lineage)
    shape = (lineage.new.resolution(label).max_id + 1, table.shape[1])
    with files.atomic_writer(out) as file:
        header = {"descr": table.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        for block in _finite_blocks(rows, table):
            file.write(np.ascontiguousarray(block))
        for step in lineage.steps:
            file.flush()
            before = (step.first, shape[1])
            written = np.memmap(file.name, table.dtype, "r", offset, before)
            for block in born_rows(written, step):
                file.write(block)
        file.flush()
        _check_same(file.name, out)
    return {
        "from": lineage.old.codebook_id,
        "to": lineage.new.codebook_id,
        "label": label,
        "generations": len(lineage.steps),
        **lineage.fates(),
        "out": out,
        "shape": list(shape),
        "dtype": str(table.dtype),
    }


def render(found: dict[str, Any]) -> str:
    """Says what became of the numbers, and where the rows are."""
    generations = f"{found['generations']} generation{'s' * (found['generations'] > 1)}"
    rows, dim = found["shape"]
    return (
        f"{found['from']} to {found['to']} ({found['label']}, {generations}): {found['kept']:,} "
        f"numbers kept, {found['mixed']:,} mixed, {found['seeded']:,} seeded, "
        f"{found['retired']:,} retired\nwrote {found['out']}: {rows:,} rows of {dim:,} "
        f"{found['dtype']}"
    )


# ---- What is given -------------------------------------------------------------------------


def _check_out(path: str) -> None:
    """Raises OperatorError where a folder has the name of the file that is to be written."""
    if files.is_folder(path):
        raise OperatorError(
            f"--out {path} is a folder. Name the file in it that the rows are to be written to, "
            "such as rows.npy."
        )


def _open(path: str) -> np.ndarray:
    """Opens a matrix of floats, memory-mapped."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise OperatorError(
            f"--rows {path} is no file. Save the weights of the model's embedding table there, "
            "with numpy.save: a row for each cluster number."
        ) from error
    except (ValueError, EOFError) as error:
        raise DataContractError(
            f"--rows {path} is no .npy file of one array that can be memory-mapped ({error}). Save "
            "it with numpy.save, as floats."
        ) from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or 0 in table.shape:
        found = f"shape {list(table.shape)}" if isinstance(table, np.ndarray) else "several arrays"
        raise OperatorError(
            f"--rows {path} has {found}, but a matrix [max_id + 1, d] is expected: a row for each "
            "cluster number. Save the embedding table's weights alone, with numpy.save."
        )
    if table.dtype.kind != "f":
        raise OperatorError(
            f"--rows {path} has dtype {table.dtype}, but float16, float32 or float64 is expected: "
            "a mean of rows would be cut to what that can hold (numpy has no bfloat16 and saves it "
            "as V2). Cast the table to float32 before saving it."
        )
    return table


def _check_shape(path: str, table: np.ndarray, lineage: Lineage) -> None:
    """Raises OperatorError unless there is a row for 0 and each number up to the old max_id."""
    old = lineage.old.resolution(lineage.label)
    expected = old.max_id + 1
    if len(table) == expected:
        return
    moved = {lineage.new.resolution(lineage.label).max_id + 1: "Were they moved already?"}
    others = {n + 1: f"Are they those of --label {k}?" for k, n in lineage.old.max_ids.items()}
    near = {
        expected - 1: "One is missing: is there none for 0, no cluster? Put one in front.",
        expected
        + 1: "One is too many: is it of padding, or of unknown IDs? Cut it off, and put it "
        "back after the move.",
    }
    hint = {**others, **moved, **near}.get(len(table), "Is it the table of another codebook?")
    raise OperatorError(
        f"--rows {path} has {len(table):,} rows, but {lineage.old.codebook_id} has numbers up to "
        f"{old.max_id:,} ({lineage.label}), and a table has max_id + 1 = {expected:,}: row n is "
        f"that of number n, row 0 that of no cluster. Each row would go to another number. {hint}"
    )


def _finite_blocks(path: str, table: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the rows, some at a time; raises DataContractError at one that is not finite."""
    for at in range(0, len(table), _BLOCK_ROWS):
        block = table[at : at + _BLOCK_ROWS]
        wrong = at + np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(wrong):
            raise DataContractError(
                f"--rows {path} has NaN or infinity in row {wrong[0]:,}, where finite floats are "
                "expected. It would spread to every number that is mixed with it. Take the weights "
                "of a checkpoint that is whole."
            )
        yield block


def _check_same(made: str, out: str) -> None:
    """Raises OperatorError where `out` is there and is not what was made."""
    if files.exists(out) and not filecmp.cmp(made, out, shallow=False):
        raise OperatorError(
            f"--out {out} is there and has other content than the rows moved now, which would be "
            "lost: the rows of a model, perhaps. Give another name, or delete it."
        )
