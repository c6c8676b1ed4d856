"""Says how patient a process's one client of Google Cloud Storage is, and what its errors mean."""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import google.auth
from google.api_core import exceptions as api_errors
from google.auth import exceptions as auth_errors
from google.cloud.storage import Client
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

from feature_jobs.schemas import OperatorError
from feature_jobs.store import faults, usage

# Else the library asks after the bucket, in a thread of its own, whenever an object is not there.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

IN_FLIGHT = 64  # connections, so many calls can go on at once; more of them wait
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two bytes


def forget_client() -> None:
    """Forgets the client: the next call makes a new one, from what the environment says then."""
    global _made, _making
    _made, _making = None, threading.Lock()


_made: Client | None
_making: threading.Lock
forget_client()
# Two processes must not share connections, nor a child a lock that another thread held.
os.register_at_fork(after_in_child=forget_client)


def client() -> Client:
    """Returns the client, made when first needed; all threads share it, forks make their own."""
    global _made
    with _making:
        _made = _made or _make_client()
        return _made


def _make_client() -> Client:
    try:
        made = Client(project=None)  # objects belong to a bucket, whatever the project
    except auth_errors.GoogleAuthError as error:
        raise _without_credentials(error) from error
    for adapter in made._http.adapters.values():
        adapter.init_poolmanager(IN_FLIGHT, IN_FLIGHT, block=True)  # who finds none free waits
    made._http.hooks["response"] += [_count, _free_connection]
    return made


def _count(response: Any, **_: Any) -> None:
    usage.count(bucket_requests=1)


def _free_connection(response: Any, **_: Any) -> None:
    """Reads an error to its end: a retry does not, and would never give its connection back."""
    if not response.ok:
        _ = response.content


def check_credentials(who_needs: str) -> None:
    """Raises OperatorError where this machine has no credentials for Google's services.

    Nothing is asked of those; only a machine's metadata server is, for some seconds at most.
    """
    try:
        google.auth.default()
    except auth_errors.GoogleAuthError as error:
        raise _without_credentials(error, who_needs) from error


def _without_credentials(error: Exception, who_needs: str = "gs:// paths need") -> OperatorError:
    found = _brief(error).rstrip(".")
    return OperatorError(
        f"{who_needs} Google's application default credentials, but {found}. Run "
        "`gcloud auth application-default login`, let GOOGLE_APPLICATION_CREDENTIALS name a key "
        "file, or run on a machine with a service account."
    )


def retry_options(seconds: float | None = None) -> dict[str, Any]:
    """Returns the options that say how long a call may take, and how long it is retried.

    Every call may be retried: a repeated write has the same content, or a precondition. `seconds`
    is for how long, where that is not RETRY_SECONDS.
    """
    retry = DEFAULT_RETRY.with_delay(initial=faults.FIRST_WAIT_SECONDS, maximum=30, multiplier=2)
    retry = retry.with_predicate(_waited_for(time.monotonic()))
    patience = faults.RETRY_SECONDS if seconds is None else seconds
    return {"retry": retry.with_timeout(patience), "timeout": TIMEOUT}


def _waited_for(begun: float) -> Callable[[Exception], bool]:
    """Returns a function that tells of each error of a call whether the call is made again.

    `begun` is when the call began, in seconds of the monotonic clock.
    """

    def is_waited_for(error: Exception) -> bool:
        if _status(error) == 403 and not faults.forbidden_is_told():
            return time.monotonic() - begun < faults.FORBIDDEN_SECONDS
        again: bool = DEFAULT_RETRY._predicate(error)
        return again

    return is_waited_for


@contextlib.contextmanager
def translating_errors(path: str) -> Iterator[None]:
    """Raises what callers of `files` know in place of the library's errors."""
    try:
        yield
    except api_errors.NotFound as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", path) from error
    except api_errors.Forbidden as error:
        if faults.forbidden_is_told():
            raise PermissionError(errno.EACCES, _brief(error), path) from error
        raise faults.forbidden(path, _brief(error)) from error
    except (api_errors.Unauthorized, auth_errors.GoogleAuthError) as error:
        raise _without_credentials(error) from error  # nothing can be read, whatever the object
    except api_errors.BadRequest as error:  # a bucket whose readers pay, for example
        raise OperatorError(
            f"The store refuses what was asked of {path}: {str(error).splitlines()[0][:500]}. "
            "Correct the path in the settings, or how the bucket is set up."
        ) from error
    except api_errors.RetryError as error:
        raise faults.unavailable(path, _brief(error.cause or error)) from error
    except DataCorruption as error:
        raise faults.unavailable(path, "what arrived is not what was sent") from error


@contextlib.contextmanager
def translating_errors_of_bucket(path: str) -> Iterator[None]:
    """Translates the errors of calls that find nothing only where the bucket is missing.

    Raises OperatorError for that, and else what `translating_errors` raises.
    """
    try:
        with translating_errors(path):
            yield
    except FileNotFoundError as error:
        raise OperatorError(
            f"There is no bucket gs://{bucket_of(path)}, or {path} is no name that an object can "
            "have. Make the bucket, or correct the path in the settings."
        ) from error


def bucket_of(path: str) -> str:
    return path.removeprefix("gs://").partition("/")[0]


def _brief(error: BaseException) -> str:
    """Returns what an error says, on one line.

    Of a response that is its status, since its words may be a page of HTML; of a connection that
    failed it is the reason, without the address that was asked for.
    """
    while isinstance(inner := getattr(error, "reason", error.args and error.args[0]), Exception):
        error = inner
    status = _status(error)
    text = f"HTTP {status}" if status else str(error) or type(error).__name__
    return text.splitlines()[0][:300]


def _status(error: BaseException) -> int | None:
    """Returns the status of the response that an error tells of, None where there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)
