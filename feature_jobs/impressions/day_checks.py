"""Checks of the log of a day what no row group of it can tell alone.

Most of its rows lie in the day. Rows may be late, but a partition that is mostly of other days has
times in a wrong unit or zone, or is split by another date: published as it is, its clicks would be
lost without a word. The same holds of its click times. A request_id tells requests apart. And an
impression_id, where the shop gives one, is that of one impression.

Readers of the log tell `DayFacts` of each row group beside its rows, at no further reading. IDs
meet by their hashes, in shards of their own, by way of files (`pieces`); the few that may be equal
are read again and compared. A day is judged by what was told of all its rows, whose number its
footers tell: a runner may lose facts or hashes and end well.
"""

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.inputs import Form, RowGroup, Source, read_rows
from feature_jobs.schemas import TIMESTAMP, DataContractError
from feature_jobs.store import hashing, worker_notes
from feature_jobs.store.every_shard import check_all_came
from feature_jobs.store.pieces import Piece, read_pieces, write_pieces

# ---- Pure functions: facts of a day ------------------------------------------------------------


@dataclass(frozen=True)
class DayFacts:
    """Holds what some rows of a day's log tell of it; without arguments, that of none.

    `early` of the `rows` lie before the day, `first_us` is the earliest event. `odd` of the `timed`
    clicks, those with a click_time, are dated further from the day than a window is long. `users`
    and `requests` are up to two of the distinct ones. `given_ids` rows were read with the shop's
    impression_id, and the hashes of `compared_ids` met in `CheckIds`.
    """

    rows: int = 0
    early: int = 0
    first_us: int = np.iinfo(np.int64).max
    timed: int = 0
    odd: int = 0
    users: frozenset = frozenset()
    requests: frozenset = frozenset()
    given_ids: int = 0
    compared_ids: int = 0

    def __add__(self, other: "DayFacts") -> "DayFacts":
        return DayFacts(
            self.rows + other.rows,
            self.early + other.early,
            min(self.first_us, other.first_us),
            self.timed + other.timed,
            self.odd + other.odd,
            _two_of(self.users | other.users),
            _two_of(self.requests | other.requests),
            self.given_ids + other.given_ids,
            self.compared_ids + other.compared_ids,
        )


def _two_of(values: Iterable) -> frozenset:
    """Returns up to two of distinct `values`: all of them would add up to a day's requests."""
    return frozenset(islice(values, 2))


def facts_of(rows: pa.Table, start_us: int, end_us: int, window_us: int | None = None) -> DayFacts:
    """Returns what one or more `rows` of a day tell, which lasts from `start_us` till `end_us`.

    Click times are looked at where a window is given, requests and impression IDs where `rows` have
    them.
    """
    times = rows["event_time"].cast(pa.int64()).to_numpy()
    timed = odd = 0
    if window_us is not None and "click_time" in rows.column_names:
        clicks = rows["click_time"].filter(rows["clicked"]).drop_null().cast(pa.int64()).to_numpy()
        timed = len(clicks)
        odd = int(((clicks < start_us - window_us) | (clicks >= end_us + window_us)).sum())
    has_requests = "request_id" in rows.column_names
    users, requests = (
        frozenset(pc.unique(rows[name])[:2].to_pylist()) if has_requests else frozenset()
        for name in ("user_id", "request_id")
    )
    early = int((times < start_us).sum())
    given_ids = len(rows) if "impression_id" in rows.column_names else 0
    return DayFacts(len(rows), early, int(times.min()), timed, odd, users, requests, given_ids)


def check_none_lost(ds: dt.date, facts: DayFacts, rows: int) -> None:
    """Raises DataContractError where `facts` are not of all `rows` of a day, or of all their IDs.

    Rows of which nothing is told may be of any time, and IDs that never met may be repeated.
    """
    check_all_came(f"checks of impressions of ds {ds}, by rows of its log", facts.rows, rows)
    check_all_came(f"checks of impression_id of ds {ds}", facts.compared_ids, facts.given_ids)


def check_facts(ds: dt.date, facts: DayFacts) -> None:
    """Raises DataContractError where most rows or click times are of other days.

    So it does where the impressions of several users have one request_id.
    """
    if 2 * facts.early > facts.rows:
        first = pa.scalar(facts.first_us).cast(TIMESTAMP).as_py().isoformat()
        raise DataContractError(
            f"{facts.early:,} of the {facts.rows:,} impressions of ds {ds} lie before that day, "
            f"the earliest at {first}. Late rows are welcome while they are few; a partition that "
            "is mostly of other days would make features of the wrong moments, and its clicks "
            "would be missing from histories. Usual causes are a wrong unit (seconds stored as "
            "milliseconds lie in January 1970), a wrong input_timezone or day_timezone in the "
            "settings, or a log that is split by another date than event_time's."
        )
    if 2 * facts.odd > facts.timed:
        raise DataContractError(
            f"{facts.odd:,} of the {facts.timed:,} click times of ds {ds} lie more than "
            "window_days before or after that day. Those clicks would be dated by their "
            "impression, or missing from histories. Usual causes are a wrong unit (seconds stored "
            "as milliseconds lie in January 1970), or a date such as 9999-12-31 that stands for a "
            "time that is not known. Where the log is written, convert the times, and write null "
            "where none is known; or leave the column out. Then click_delay_seconds dates clicks."
        )
    if len(facts.requests) == 1 and None not in facts.requests and len(facts.users) > 1:
        raise DataContractError(
            f"All {facts.rows:,} impressions of ds {ds}, of several users, have the request_id "
            f"{min(facts.requests)!r}. A request is what one user saw at one moment; taken for "
            "one, a user's whole day would become a training row with the history of its first "
            "moment. Mend request_id where the log is written, or leave the column out: then "
            "request_gap_seconds tells requests apart."
        )


# ---- Pure functions: IDs of a day --------------------------------------------------------------


def repeated_id(example: object) -> DataContractError:
    """Returns the error for an impression_id of the shop's that several impressions have."""
    return DataContractError(
        f"The impression_id {example!r}, for example, is that of several impressions of one day. "
        "Each impression of a ds is to have its own: whoever joins user_simscores by it would get "
        "rows twice. Mend them where the log is written, or leave the column out: then IDs are "
        "made of user, item and time."
    )


def hashes_met_twice(hashes: np.ndarray) -> np.ndarray:
    """Returns the values that stand more than once in uint64 [n]."""
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def find_repeated(columns: Iterable[pa.ChunkedArray], twice: np.ndarray) -> object | None:
    """Returns an ID that stands more than once in all `columns`, None for none.

    The hashes `twice` uint64 [n] are the only ones that it can have; IDs of one hash may differ.
    """
    some: list[pa.Array] = []
    for ids in columns:
        may_be = pa.array(np.isin(hashing.hash_ids(ids), twice))
        some += ids.filter(may_be).chunks
        counts = pc.value_counts(pa.chunked_array(some, ids.type))
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            example: object = repeated[0].as_py()
            return example
    return None


# ---- Transforms --------------------------------------------------------------------------------


class JudgeDay(beam.DoFn):
    """Refuses a day by its facts: (ordinal of the day, all its `DayFacts`) comes in.

    `rows` are those of each day's log, by its ordinal.
    """

    def __init__(self, rows: Mapping[int, int], staging: str):
        self._rows, self.staging = rows, staging

    @worker_notes.refusing
    def process(self, element: tuple[int, Iterable[DayFacts]]) -> None:
        number, told = element
        ds, facts = dt.date.fromordinal(number), sum(told, start=DayFacts())
        check_none_lost(ds, facts, self._rows[number])
        check_facts(ds, facts)


class JudgeDays(beam.PTransform):
    """Judges each day of `log` by the facts that are told, as (ordinal of the day, `DayFacts`)."""

    def __init__(self, log: Sequence[Source], staging: str):
        super().__init__()
        self._rows = {source.form.ds.toordinal(): source.rows for source in log}
        self._staging = staging

    def expand(self, facts: beam.PCollection) -> None:
        # A day of which all facts are lost is judged too.
        days = [(number, DayFacts()) for number in self._rows]
        every = facts.pipeline | "EveryDay" >> beam.Create(days, reshuffle=False)
        judge = JudgeDay(self._rows, self._staging)
        _ = (facts, every) | beam.Flatten() | beam.GroupByKey() | beam.ParDo(judge)


IdsOfGroup = tuple[str, int, Piece]  # of which row group, and the piece of their hashes


def write_hashes(
    path: str, group: RowGroup, rows: pa.Table, shards: int
) -> Iterator[tuple[int, IdsOfGroup]]:
    """Writes the hashes of the shop's impression IDs of a row group, if the log has them.

    Yields each of `shards` with its hashes, for `CheckIds`.
    """
    if "impression_id" in rows.column_names:
        hashes = hashing.hash_ids(rows["impression_id"])
        pieces = write_pieces(path, pa.table({"hash": hashes}), hashing.shard_of(hashes, shards))
        for shard, piece in pieces:
            yield shard, (group.path, group.index, piece)


class CheckIds(beam.DoFn):
    """Refuses an impression_id that several impressions of a day have.

    What `write_hashes` yields comes in by ((place of the day, shard)); `forms` are those of the
    days' logs. How many IDs met goes out, as (ordinal of the day, `DayFacts`). No two IDs of int64
    have one hash, and few strings: what is read again for those is little, or the job ends with it.
    """

    def __init__(self, forms: Sequence[Form], staging: str):
        self._forms, self.staging = forms, staging

    @worker_notes.refusing
    def process(
        self, element: tuple[tuple[int, int], Iterable[IdsOfGroup]]
    ) -> Iterator[tuple[int, DayFacts]]:
        (place, _), told = element
        form, found = self._forms[place], sorted(told, key=_piece_of)  # as they are read
        hashes = read_pieces(map(_piece_of, found), pa.table({}))["hash"].to_numpy()
        twice = hashes_met_twice(hashes)
        of_group = np.arange(len(found)).repeat([piece.rows for *_, piece in found])
        again = [found[at] for at in np.unique(of_group[np.isin(hashes, twice)])]
        groups = (RowGroup(path, index, form) for path, index, _ in again)
        columns = (read_rows(group, ["impression_id"])["impression_id"] for group in groups)
        example = find_repeated(columns, twice)
        if example is not None:
            raise repeated_id(example)
        yield form.ds.toordinal(), DayFacts(compared_ids=len(hashes))


def _piece_of(ids: IdsOfGroup) -> Piece:
    return ids[-1]
