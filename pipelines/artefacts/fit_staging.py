"""Holds the staging folder of a fit, of a codebook or an encoder's projection, while it is at work.

A fit is made in one go: what one leaves, the next one throws away.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator

from feature_jobs.schemas import CourierError
from feature_jobs.store import files
from pipelines.running import cluster_jobs

_RUN_ID = r"[0-9a-f]{12}"


@contextlib.contextmanager
def own_staging(staging: str, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other fits of the day away; leaves nothing, not even of those that were killed.

    Raises CourierError where another one is at work.
    """
    folder = os.path.dirname(staging)
    try:
        with files.lock(folder):
            for left in _stagings(folder):
                cluster_jobs.end_left(left, say)
            _sweep(folder)
            try:
                yield
            except cluster_jobs.JobFailed:
                raise  # whose message names a file in there; the next fit sweeps it
            except BaseException:
                _sweep(folder)
                raise
            _sweep(folder)
    except BlockingIOError as error:
        command = os.path.basename(os.path.dirname(folder))
        raise CourierError(
            f"Another {command} is at work in {folder}. Two at once would delete each other's "
            "samples. Wait for it, or stop it."
        ) from error


def _sweep(folder: str) -> None:
    for staging in _stagings(folder):
        files.delete_tree(staging)


def _stagings(folder: str) -> list[str]:
    """Returns the folders of fits; in a bucket the lock lies beside them."""
    names = files.list_names(folder)
    return [os.path.join(folder, name) for name in names if re.fullmatch(_RUN_ID, name)]
