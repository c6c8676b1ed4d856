"""Gives the tiny shop of `world` vectors of its own, in every form that a table may have them."""

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_jobs.codebooks.codebook import save_codebook
from pipelines.cli import main
from tests.conftest import Artefacts
from tests.support.codebooks import by_hand
from tests.support.world import (
    CLUSTERS,
    DAYS,
    LEAVES_ON_DAY_2,
    MISSING,
    NUMBERS,
    SAME_BYTES_AS_1,
    SCOPE,
    UNDECODABLE,
    UNKNOWN,
    World,
    catalogue_items,
)

CHANGES_ON_DAY_3 = 5
LISTS = ("list", "fixed", "large", "half", "double")


def vector_of(item: int, day: dt.date, dimension: int) -> np.ndarray:
    """Returns the vector of an item as a shop has it, of any length; float32 [dimension].

    That of one item changes, and so does that of one which has left the catalogue by then.
    """
    number = 1 if item == SAME_BYTES_AS_1 else item
    is_late = day >= DAYS[2] if item == CHANGES_ON_DAY_3 else day >= DAYS[1]
    changed = is_late and item in (CHANGES_ON_DAY_3, LEAVES_ON_DAY_2)
    rng = np.random.default_rng([number, changed])
    return (rng.normal(size=dimension) * (1 + number) + 0.5).astype(np.float32)


def vectors_of_day(day: dt.date, dimension: int) -> dict[int, np.ndarray]:
    """Returns the vectors of a day by item: one is broken, of one there is none."""
    items = {*catalogue_items(day), LEAVES_ON_DAY_2, UNKNOWN} - {MISSING}
    found = {item: vector_of(item, day, dimension) for item in sorted(items)}
    found[UNDECODABLE][3] = np.nan
    return found


def as_column(vectors: list[Any], form: str) -> pa.Array:
    """Returns vectors, or nulls, as a column of a form that is one of LISTS, or "bytes"."""
    if form == "bytes":
        return pa.array([v if v is None else v.astype("<f4").tobytes() for v in vectors])
    widest = max(len(v) for v in vectors if v is not None)
    kinds = {
        "list": pa.list_(pa.float32()), "fixed": pa.list_(pa.float32(), widest),
        "large": pa.large_list(pa.float32()), "half": pa.list_(pa.float16()),
        "double": pa.list_(pa.float64()),
    }  # fmt: skip
    number = {"half": np.float16, "double": np.float64}.get(form, np.float32)
    return pa.array([v if v is None else list(v.astype(number)) for v in vectors], kinds[form])


def write_vectors(
    world: World, day: dt.date, rows: list[tuple[int, Any]], form: str = "list", files: int = 2
) -> None:
    """Writes the vectors of a day, (item, vector or null), in an order of their own."""
    folder = world.folder / "vectors" / f"ds={day}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    rows = sorted(rows, key=lambda row: (row[0] * 7) % 11)
    ids = [world.item(item) for item, _ in rows]
    table = pa.table({"item_id": ids, "clip": as_column([v for _, v in rows], form)})
    for n in range(files):
        start = n * len(table) // files
        part = table.slice(start, (n + 1) * len(table) // files - start)
        pq.write_table(part, folder / f"{n}.parquet", row_group_size=3)


def register(world: World, *more: str) -> str:
    """Registers the shop's vectors; returns the folder of the encoder."""
    world.settings()
    before = set((world.folder / "encoders").glob("*"))
    declared = () if {"--trained-on", "--trained-elsewhere"} & {*more} else ("--trained-elsewhere",)
    command = (
        "register-vectors", "--config", str(world.config), "--name", "clip",
        "--path", "vectors/ds={ds}/*.parquet", "--vector", "clip", *declared, *more,
    )  # fmt: skip
    assert main(command) == 0
    (made,) = set((world.folder / "encoders").glob("*")) - before
    return str(made)


def make_codebook(folder: Path, encoder: str, dimension: int) -> str:
    """Makes a codebook whose centres are vectors of four of the items; returns its folder."""
    rows = np.stack([vector_of(n, DAYS[0], dimension) for n in (1, 2, 3, 12)])
    centres = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    by_label = {"main": centres[:CLUSTERS], "coarse": centres[:2]}
    name = Path(encoder).name
    return save_codebook(str(folder), by_hand(by_label, NUMBERS, name))


def make_vector_shop(folder: Path, dimension: int, form: str, ids: str = "int") -> World:
    """Makes the world with its vectors of all days, registered and pinned; nothing is made yet.

    `form` "lists" takes another type of list on each day.
    """
    world = World(folder, ids=ids)
    for number, day in enumerate(DAYS):
        of_day = LISTS[number] if form == "lists" else form
        write_vectors(world, day, list(vectors_of_day(day, dimension).items()), of_day)
    scope = [word for category in SCOPE for word in ("--category", category)]
    encoder = register(world, *scope, *(["--as-bytes"] if form == "bytes" else []))
    artefacts = Artefacts(encoder, make_codebook(folder / "codebooks", encoder, dimension))
    world.pin(DAYS[0], artefacts.encoder, artefacts.codebook)
    return world
