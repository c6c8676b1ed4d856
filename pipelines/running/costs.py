"""Tells what making stages took: time, cores, memory, bytes, requests, and the rates of it."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from feature_jobs.store import usage
from feature_jobs.store.usage import Usage
from pipelines.running.stage import Stage
from pipelines.stages import ITEM_FEATURES, ITEMS


@dataclass(frozen=True)
class _Cost:
    """Holds what the jobs took that made one kind of stage of so many `days`."""

    seconds: float
    used: Usage
    days: int


class Costs:
    """Keeps what the stages took that a run made, by run_id."""

    def __init__(self) -> None:
        self._of: dict[str, _Cost] = {}

    @contextlib.contextmanager
    def shared_by(self, made: Mapping[str, object]) -> Iterator[None]:
        """Measures the block for the stages that it makes: it adds their run_ids to `made`."""
        before, started = set(made), time.monotonic()
        usage.take()  # what was used until now is no part of it
        yield
        run_ids = made.keys() - before
        cost = _Cost(time.monotonic() - started, usage.take(), len(run_ids))
        self._of |= dict.fromkeys(run_ids, cost)

    def describe(self, stage: Stage, counts: Mapping[str, int]) -> dict[str, Any]:
        """Returns the stage's part of it, nothing where this run did not make it.

        Of the jobs of several days each has an equal share, but for the peak of memory.
        """
        cost = self._of.get(stage.run_id)
        if cost is None:
            return {}
        rows = counts["items"] if stage.kind is ITEM_FEATURES else stage.input_rows
        seconds, cpu_seconds = cost.seconds / cost.days, cost.used.cpu_seconds / cost.days
        unit = "items" if stage.kind in ITEMS else "impressions"
        return {
            "wall_seconds": round(seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "peak_memory_bytes": cost.used.peak_memory_bytes,
            "bytes_read": round(cost.used.bytes_read / cost.days),
            "bytes_written": round(cost.used.bytes_written / cost.days),
            "bucket_requests": round(cost.used.bucket_requests / cost.days),
            "days_in_job": cost.days,
            unit: rows,
            "rates": {
                f"{unit}_per_second": round(rows / seconds, 3),
                f"{unit}_per_core_second": round(rows / cpu_seconds, 3),
            },
        }
