"""Registers a shop's own vectors as an encoder, for `courier register-vectors`.

Such an encoder runs nothing: its package says where the vectors lie, how they are read and what
their maker knew. What changes the numbers decides its ID: where they lie, their columns, their
length, and the centre. Vectors of another model are another encoder, under another name.
"""

import datetime as dt
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs import inputs
from feature_jobs.inputs import RowGroup
from feature_jobs.items import vector_rows
from feature_jobs.items.vector_table import VectorTable, open_vectors
from feature_jobs.schemas import DataContractError, InputNotReady, OperatorError
from feature_jobs.store import day_names, files
from feature_jobs.store.encoder_info import (
    CENTRE,
    DIMENSIONS,
    VECTORS,
    EncoderInfo,
    VectorSource,
    check_name,
    check_same_scope,
    read_encoder_info,
    write_encoder_info,
)
from pipelines.artefacts.stanzas import ANY_DAY, encoder_stanza
from pipelines.config import Settings

Say = Callable[[str], None]

_SAMPLE = 20_000  # vectors that a registration looks at, and that a centre is the mean of,
_GROUPS = 64  # of so many row groups at most, spread over the table
_BATCH = 4_096


@dataclass(frozen=True)
class Registration:
    """Says what is registered: a `source`, and what is known of who made its vectors.

    `trained_on` are the first and last day of this shop's clicks that they know, None for none.
    `ds` is the day whose vectors are looked at, None for the newest; with `centre` the mean of a
    sample of them is taken off every vector.
    """

    name: str
    source: VectorSource
    categories: tuple[str, ...]
    trained_on: tuple[dt.date, dt.date] | None
    ds: dt.date | None
    centre: bool


def choose_training(
    trained_on: tuple[dt.date, dt.date] | None, trained_elsewhere: bool
) -> tuple[dt.date, dt.date] | None:
    """Returns the days that were declared; raises OperatorError where neither or both were."""
    if bool(trained_on) == trained_elsewhere:
        raise OperatorError(
            "Say what the maker of the vectors knew, and say one of the two: --trained-on START "
            "END, the days of this shop's clicks that it was trained on, or --trained-elsewhere, "
            "where it knows none of them. A night refuses an encoder that knows its own day, and "
            "`courier audit` tells what was declared."
        )
    if trained_on and trained_on[0] > trained_on[1]:
        raise OperatorError(
            f"--trained-on {trained_on[0]} {trained_on[1]} ends before it starts. Give the first "
            "day of the clicks, then the last."
        )
    return trained_on


def register_vectors(
    wanted: Registration, settings: Settings, folder: str, out: str, say: Say
) -> str:
    """Writes a package of the kind `vectors` below `out`/encoders; returns its stanza.

    `folder` is that of the `settings`. Raises InputNotReady where no vectors are there to be looked
    at, and DataContractError where none of those can be used.
    """
    check_name(wanted.name)
    template = settings.full_template(wanted.source.path)
    ds = wanted.ds or _newest_day(template, wanted)
    table = open_vectors(wanted.source, template, ds)
    if not table.source.rows:
        raise InputNotReady(
            f"The vectors of ds {ds} are an empty table, marked as whole. The registration reads "
            "some, to know how many numbers they have. Name a day that has vectors with --ds."
        )
    rows = list(_some_rows(table))
    dimension = _dimension(table, rows)
    sample = _look(table, rows, dimension, ds, say)
    centre = _centre_of(sample, dimension) if wanted.centre else None
    info = _info(wanted, dimension, centre, ds)
    package = os.path.join(out, "encoders", info.encoder_id)
    if files.exists(os.path.join(package, "encoder.json")):
        check_same_scope(read_encoder_info(package), info, package)
    if centre is not None:
        files.write_bytes(os.path.join(package, CENTRE), _npy(centre))
    write_encoder_info(package, info)  # again too: to wait for a _SUCCESS changes no number
    return encoder_stanza(settings, folder, _comment(info), _serves_from(info), package)


def _newest_day(template: str, wanted: Registration) -> dt.date:
    """Returns the newest day of which vectors are there; any day, for one snapshot."""
    typed = wanted.source.path
    if not day_names.has_day(template) and wanted.centre:
        raise OperatorError(
            f"--centre is the mean of a day's vectors, and {typed!r} names no day. Say with --ds "
            "of which day this snapshot is, so that nights know what the centre knows."
        )
    if not day_names.has_day(template):
        return ANY_DAY
    days = inputs.find_days(template)
    if not days:
        raise InputNotReady(
            f"There are no vectors yet: no file matches {typed!r} for any day ({template}). The "
            "registration reads a few of them, to know how many numbers they have. Run it again "
            "once the first day is there, or correct --path."
        )
    return days[-1]


def _info(
    wanted: Registration, dimension: int, centre: np.ndarray | None, ds: dt.date
) -> EncoderInfo:
    days = [str(day) for day in wanted.trained_on or ()]
    trained_on = (days[0], days[1]) if days else None
    source = replace(wanted.source, trained_on=trained_on, centred=centre is not None)
    if centre is not None:
        days.append(str(ds))
    return EncoderInfo(
        encoder_id=source.encoder_id(wanted.name, dimension, centre),
        backbone=VECTORS,
        preprocessing={},
        categories=wanted.categories or None,
        data_start_ds=min(days, default=None),
        data_end_ds=max(days, default=None),
        weights="of the shop's own making",
        dimension=dimension,
        vectors=source,
    )


def _comment(info: EncoderInfo) -> str:
    source = info.vectors
    assert source is not None
    knows = "trained on this shop's clicks" if source.trained_on else "trained elsewhere"
    if info.data_end_ds:
        knows += f", knows ds {info.data_start_ds} to {info.data_end_ds}"
    centred = ", less their mean" if source.centred else ""
    return f"vectors of {info.dimension:,} numbers in {source.path}{centred}; {knows}"


def _serves_from(info: EncoderInfo) -> dt.date:
    if info.data_end_ds is None:
        return ANY_DAY
    return dt.date.fromisoformat(info.data_end_ds) + dt.timedelta(days=1)


def _npy(centre: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, centre)
    return data.getvalue()


# ---- Looking at vectors ------------------------------------------------------------------------


def _dimension(table: VectorTable, rows: Sequence[pa.Table]) -> int:
    """Returns how many numbers the vectors have: by their type, else as most of some `rows`."""
    dimension = table.width or _most_frequent(table, rows)
    if dimension not in DIMENSIONS:
        raise DataContractError(
            f"The vectors in {table.source.paths[0]} have {dimension:,} numbers; COURIER takes "
            f"{DIMENSIONS[0]} to {DIMENSIONS[-1]:,}. Longer ones are searched well after a "
            "projection to fewer numbers (as PCA does, or the first ones of a model that was "
            "trained for that); make the table of these."
        )
    return dimension


def _most_frequent(table: VectorTable, rows: Sequence[pa.Table]) -> int:
    sizes = np.concatenate([vector_rows.sizes_of(some) for some in rows])
    sizes = sizes[sizes >= 0]
    if not sizes.size:
        raise DataContractError(
            f"Of the rows that were looked at, in {table.source.paths[0]} and beside it, none has "
            f"a vector: the column {table.source.form.columns['vector']!r} is null there. Name "
            "another column by --vector, or fill it where the table is written."
        )
    return int(np.bincount(sizes).argmax())


def _look(
    table: VectorTable, rows: Sequence[pa.Table], dimension: int, ds: dt.date, say: Say
) -> list[pa.Table]:
    """Returns some `rows` as they were looked at, and tells what was seen.

    Raises DataContractError where none of them can be used.
    """
    found = [vector_rows.checked(some, dimension) for some in rows]
    reasons = pa.chunked_array([chunk for rows in found for chunk in rows["reason"].chunks])
    bad = pc.value_counts(reasons.drop_null()).to_pylist()
    told = ", ".join(f"{one['values'].replace('_', ' ')} {one['counts']:,}" for one in bad)
    day = "one snapshot" if ds == ANY_DAY else f"ds {ds}"
    seen = f"{table.source.rows:,} vectors of {dimension:,} numbers ({day})"
    if reasons.null_count == 0:
        raise DataContractError(
            f"Of {seen} not one of {len(reasons):,} that were looked at can be used ({told}). "
            "Every item would be rejected. Look at how the table is written."
        )
    usable = f"of {len(reasons):,} looked at, {reasons.null_count / len(reasons):.1%} can be used"
    say(f"register-vectors: {seen}; {usable}" + (f" ({told})" if told else ""))
    return found


def _some_rows(table: VectorTable) -> Iterator[pa.Table]:
    """Yields the first rows of some row groups that are spread over the table."""
    there = table.source.groups()
    places = np.unique(np.linspace(0, len(there) - 1, _GROUPS).astype(int))
    for at in places:
        yield from _first_rows(there[at], _SAMPLE // len(places))


def _first_rows(group: RowGroup, most: int) -> Iterator[pa.Table]:
    for rows in inputs.read_in_batches(group, inputs.VECTOR_COLUMNS, _BATCH):
        yield rows[:most]
        most -= len(rows)
        if most <= 0:
            return


def _centre_of(sample: Sequence[pa.Table], dimension: int) -> np.ndarray:
    """Returns the mean of the vectors that can be used; float32 [dimension]."""
    total, n = np.zeros(dimension), 0
    for rows in sample:
        vectors = rows["vector"].filter(rows["reason"].is_null())
        total += vector_rows.matrix_of(vectors, dimension).sum(axis=0, dtype=np.float64)
        n += len(vectors)
    return (total / n).astype(np.float32)
