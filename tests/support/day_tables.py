"""Writes a shop's two tables of one day as small files; opens, reads and refuses them for tests."""

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs import inputs
from feature_jobs.inputs import CATALOGUE_COLUMNS, IMPRESSION_COLUMNS
from feature_jobs.schemas import (
    TIMESTAMP,
    CourierError,
    DataContractError,
    InputNotReady,
    OperatorError,
)

DS = dt.date(2026, 3, 2)
NOON = dt.datetime(2026, 3, 2, 12, tzinfo=dt.UTC)
WANTED = [*IMPRESSION_COLUMNS, "click_time", "impression_id", "request_id", "history"]
NAMES = {name: name for name in WANTED}
USERS = [900_001, 900_002, 900_003]


def impressions(**columns: Any) -> pa.Table:
    """Returns three impressions; `columns` replace theirs, None leaves one out."""
    rows = {
        "user_id": pa.array(USERS),
        "item_id": pa.array([1, 2, 3]),
        "event_time": pa.array([NOON] * 3, TIMESTAMP),
        "clicked": pa.array([True, False, True]),
    }
    return pa.table({name: c for name, c in (rows | columns).items() if c is not None})


def catalogue(**columns: Any) -> pa.Table:
    rows = {"item_id": [1, 2], "image_uri": ["a.jpg", None], "category": ["dress", None]}
    return pa.table({name: c for name, c in (rows | columns).items() if c is not None})


def write(folder: Path, *files: pa.Table, **options: Any) -> str:
    """Writes files 0.parquet, 1.parquet, …; returns the template of the folder."""
    (folder / f"ds={DS}").mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        pq.write_table(rows, folder / f"ds={DS}" / f"{number}.parquet", **options)
    return str(folder / "ds={ds}")


def open_impressions(template: str, **settings: Any) -> inputs.Source:
    return inputs.open_source("impressions", template, DS, NAMES, **settings)


def open_catalogue(template: str) -> inputs.Source:
    columns = {name: name for name in (*CATALOGUE_COLUMNS, "title")}
    return inputs.open_source("catalogue", template, DS, columns)


def read(
    source: inputs.Source, wanted: Sequence[str] = WANTED, carry: Sequence[str] = ()
) -> pa.Table:
    return pa.concat_tables(inputs.read_rows(group, wanted, carry) for group in source.groups())


def refusal(kind: type[CourierError], work: Callable[[], object], *named: str) -> str:
    """Checks how `work` is refused; returns the message.

    The error is of this kind; the message is one paragraph, names what it must, and no user.
    """
    with pytest.raises(CourierError) as refused:
        work()
    assert type(refused.value) is kind
    status = {OperatorError: 2, DataContractError: 1, InputNotReady: 4}[kind]
    assert refused.value.exit_status == status
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for name in named:
        assert name in message
    assert not any(str(user) in message for user in USERS)
    return message
