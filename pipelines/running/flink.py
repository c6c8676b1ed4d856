"""Asks Flink's REST interface for a job, and cancels it there.

Beam's job service only forgets a job of Flink's that it is to cancel.
"""

import json
import urllib.request
from collections import Counter
from typing import Any

from apache_beam.runners.runner import PipelineState

_ANSWER_SECONDS = 10.0
_STATES = {
    "FINISHED": PipelineState.DONE,
    "CANCELED": PipelineState.CANCELLED,
    "FAILED": PipelineState.FAILED,
}


class FlinkJob:
    """Asks Flink's REST interface at `url` for the job of a name, and cancels it.

    All that asks raises OSError or ValueError where there is no answer of Flink's.
    """

    def __init__(self, url: str, name: str):
        self._url, self._name = url, name
        self.page = ""  # of the job in Flink's own pages, once it was seen

    @property
    def state(self) -> str | None:
        """One of Beam's `PipelineState`; None for a job that Flink does not list."""
        found = self._find()
        return str(_STATES.get(found["state"], found["state"])) if found else None

    def cancel(self) -> None:
        if found := self._find():
            self._ask(f"jobs/{found['jid']}?mode=cancel", "PATCH")

    def tell(self) -> str:
        """Returns its state, and how many of its tasks have ended."""
        found = self._find()
        if not found:
            return "not begun"
        tasks = found["tasks"]
        return f"{found['state']}, {tasks['finished']:,} of {tasks['total']:,} tasks finished"

    def tell_slots(self) -> str:
        """Returns in which states its tasks are, and how many of the cluster's slots are free."""
        found, cluster = self._find(), self._ask("overview")
        tasks = Counter(found["tasks"]) if found else Counter[str]()
        total = tasks.pop("total", 0)
        states = ", ".join(f"{n:,} {state}" for state, n in tasks.most_common() if n)
        return (
            f"Flink says: {found['state'] if found else 'no such job'}; {total:,} tasks"
            f"{f', {states}' if states else ''}; {cluster['slots-available']:,} of "
            f"{cluster['slots-total']:,} slots free."
        )

    def error(self) -> str:
        """Returns what ended it; nothing where that is not told."""
        found = self._find()
        told = self._ask(f"jobs/{found['jid']}/exceptions") if found else {}
        return str(told.get("root-exception") or "")

    def _find(self) -> dict[str, Any] | None:
        jobs = self._ask("jobs/overview")["jobs"]
        found = next((job for job in jobs if job["name"] == self._name), None)
        if found:
            self.page = f"{self._url}/#/job/running/{found['jid']}/overview"
        return found

    def _ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"{self._url}/v1/{path}", method=method)
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            return json.load(answer)
