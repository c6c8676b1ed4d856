"""Opens the table of vectors that an encoder of the kind `vectors` gives out, by footers alone."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from feature_jobs import inputs
from feature_jobs.inputs import Source
from feature_jobs.schemas import DataContractError, InputNotReady, OperatorError
from feature_jobs.store import day_names
from feature_jobs.store.encoder_info import VectorSource

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class VectorTable:
    """Is a day's table of vectors; `versions` are those of its files before they were looked at."""

    source: Source
    versions: Mapping[str, object]

    @property
    def width(self) -> int | None:
        """Returns how many numbers all vectors have by their type; None where it does not tell."""
        kinds = [field.type for field in self.source.carried]
        if kinds and pa.types.is_fixed_size_list(kinds[0]):
            return int(kinds[0].list_size)
        if kinds and pa.types.is_fixed_size_binary(kinds[0]):
            return int(kinds[0].byte_width) // _FLOAT_BYTES
        return None

    def of_day(self, ds: dt.date) -> "VectorTable":
        """Returns the same snapshot as the table of another day."""
        form = replace(self.source.form, ds=ds)
        return replace(self, source=replace(self.source, form=form))


def open_vectors(
    of: VectorSource, template: str, ds: dt.date, dimension: int | None = None,
    closed: bool = False,
) -> VectorTable:  # fmt: skip
    """Finds and checks the vectors of ds; `template` is the full path of those `of` an encoder.

    Without a `dimension` vectors may be of any length. Of a day on which the shop was `closed`
    none are waited for.

    Raises InputNotReady, DataContractError and OperatorError as `open_source` does, and where the
    vectors are not of the type or the length that was registered.
    """
    found = inputs.list_files("vectors", template, ds, of.require_success, closed)
    versions = {file.path: file.version for file in found}
    columns = {"item_id": of.item, "vector": of.vector}
    source = inputs.open_source(
        "vectors", template, ds, columns, (of.vector,), require_success=of.require_success,
        closed=closed,
    )  # fmt: skip
    if not versions.keys() >= {*source.paths}:
        raise InputNotReady(
            f"The vectors of ds {ds} are being written just now: a file came between two looks at "
            f"{template}. Run the command again when the table is whole."
        )
    if not day_names.has_day(template):
        inputs.check_one_snapshot("the --path of `courier register-vectors`", template, source)
    table = VectorTable(source, versions)
    _check_kind(of, table)
    if dimension is not None and table.width not in (None, dimension):
        raise DataContractError(
            f"The vectors of ds {ds} ({source.paths[0]}) have {table.width:,} numbers each, but "
            f"{dimension:,} were registered. Vectors of two lengths have no distance, and clusters "
            "would mean nothing. Another model's vectors are another encoder: register them under "
            "a name of their own, with `courier register-vectors`."
        )
    return table


def _check_kind(of: VectorSource, table: VectorTable) -> None:
    """Raises OperatorError where vectors are bytes and not registered so, or the reverse."""
    for field in table.source.carried:
        are_bytes = inputs.is_bytes(field.type)
        if are_bytes != of.as_bytes:
            found, told = ("bytes", "with") if are_bytes else (str(field.type), "without")
            raise OperatorError(
                f"The column {of.vector!r} of the vectors table holds {found} in "
                f"{table.source.paths[0]}. Bytes are taken for float32, little-endian, only where "
                f"that is said: register the vectors {told} --as-bytes."
            )
