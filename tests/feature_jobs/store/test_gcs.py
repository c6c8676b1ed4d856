"""Tests that faults of buckets are waited for and told, locks taken over, and one client made."""

import contextlib
import errno
import gzip
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
from google.auth import credentials
from google.auth import exceptions as auth_errors
from google.cloud.storage import Blob

from courier_model import image_files
from courier_model.image_files import Rejected, find_image, read_image
from courier_model.images import Preprocessing
from feature_jobs.schemas import OperatorError, StorageUnavailable
from feature_jobs.store import faults, files, gcs, gcs_client, usage
from tests.support.flaky import CUT, RESET, SILENT, Flaky, flaky_store
from tests.support.processes import ROOT
from tests.support.schedules import watch_store
from tests.support.store_calls import CALLS
from tests.test_imports import loaded_by


@pytest.fixture
def flaky(bucket: str, gcs_emulator: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    """Gives the server between the client and the store that holds `bucket`; waits are short."""
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.01)
    with flaky_store(gcs_emulator) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        gcs_client.forget_client()
        yield server


# ---- transient faults --------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", [429, 503, RESET])
def test_a_passing_fault_is_waited_for(
    bucket: str, flaky: Flaky, call: str, fault: int | str
) -> None:
    path = f"{bucket}/file"
    files.write_bytes(path, b"data")
    flaky.faults = [fault, fault, fault]
    CALLS[call](path)
    assert flaky.met == 3


def test_requests_are_counted_each_try_of_them(bucket: str, flaky: Flaky) -> None:
    path = f"{bucket}/file"

    def requests(call: Callable[[], object]) -> int:
        usage.take()
        call()
        return usage.take().bucket_requests

    assert requests(lambda: files.write_bytes(path, b"data")) == 1
    assert requests(lambda: files.stat(path)) == 1
    assert requests(lambda: files.read_bytes(path)) == 1
    assert requests(lambda: files.list_names(bucket)) == 1
    assert requests(lambda: files.exists(f"{bucket}/none")) == 1
    flaky.faults = [503, 429]
    assert requests(lambda: files.read_bytes(path)) == 3
    assert requests(lambda: files.exists("/")) == 0


@pytest.mark.parametrize("fault", [408, 500, 502, 504])
@pytest.mark.parametrize("call", ["stat", "read", "write", "delete"])
def test_time_outs_and_server_errors_are_waited_for(
    bucket: str, flaky: Flaky, call: str, fault: int
) -> None:
    files.write_bytes(f"{bucket}/file", b"data")
    flaky.faults = [fault]
    CALLS[call](f"{bucket}/file")
    assert flaky.met == 1


@pytest.mark.parametrize("call", ["read", "open", "digest"])
def test_bytes_that_were_cut_off_are_read_again(bucket: str, flaky: Flaky, call: str) -> None:
    data = os.urandom(300_000)
    files.write_bytes(f"{bucket}/file", data)
    expected = CALLS[call](f"{bucket}/file")
    flaky.faults = [CUT, CUT] if call == "read" else [None, CUT, CUT]
    assert CALLS[call](f"{bucket}/file") == expected
    assert flaky.met == 2


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_stays_away_fails_in_one_paragraph(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    files.write_bytes(f"{bucket}/file", b"data")
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.1)
    flaky.forever = 503
    with pytest.raises(StorageUnavailable) as failed:
        CALLS[call](f"{bucket}/file")
    message = str(failed.value)
    assert message.startswith(bucket)
    assert "HTTP 503" in message
    assert "\n" not in message
    assert failed.value.exit_status == 1
    flaky.forever = None
    assert files.read_bytes(f"{bucket}/file") == b"data"


def test_a_store_that_does_not_answer_is_given_up(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(gcs_client, "TIMEOUT", (0.2, 0.2))
    flaky.forever = SILENT
    with pytest.raises(StorageUnavailable, match="timed out"):
        files.read_bytes(f"{bucket}/file")


def test_a_store_that_nobody_listens_at_is_given_up(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.1)
    gcs_client.forget_client()
    with pytest.raises(StorageUnavailable, match="refused"):
        files.stat(f"{bucket}/file")


def test_a_fault_amid_a_file_reaches_who_reads_it_through_arrow(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_bytes(f"{bucket}/file", b"PAR1" + bytes(4_000_000) + b"PAR1")
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.1)
    with files.open_input(f"{bucket}/file") as data:
        flaky.forever = 503
        with pytest.raises(StorageUnavailable):
            pq.ParquetFile(data)


def test_a_write_whose_answer_was_lost_counts_once(bucket: str, flaky: Flaky) -> None:
    """The first try is carried out, its answer cut off; the second finds an object already."""
    path = f"{bucket}/manifest"
    flaky.faults = [None, CUT]
    files.write_if_unchanged(path, b"one", None)
    assert flaky.met == 1
    assert files.read_bytes(path) == b"one"
    with pytest.raises(files.Changed):
        files.write_if_unchanged(path, b"one", None)


def test_a_machine_without_room_for_what_is_to_be_sent_is_told(near_bucket: str) -> None:
    path = f"{near_bucket}/file"

    def write() -> None:
        with files.atomic_writer(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageUnavailable, match=f"^{tempfile.gettempdir()} could not be"):
        write()
    assert not files.exists(path)


# ---- what is no transient fault ----------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_what_is_forbidden_is_waited_for_and_nothing_is_concluded_from_it(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(faults, "FORBIDDEN_SECONDS", 0.1)
    path = f"{bucket}/file"
    files.write_bytes(path, b"data")
    flaky.forever = 403
    with pytest.raises(
        StorageUnavailable, match=r"may not be read or written.*HTTP 403"
    ) as refused:
        CALLS[call](path)
    assert str(refused.value).startswith(bucket)
    assert flaky.met > 1
    flaky.forever = None
    assert files.read_bytes(path) == b"data"


def test_what_is_forbidden_is_told_at_once_where_that_is_said_of_the_object(
    bucket: str, flaky: Flaky
) -> None:
    files.write_bytes(f"{bucket}/file", b"data")
    flaky.forever = 403
    with pytest.raises(PermissionError) as refused, faults.telling_forbidden():
        files.read_bytes(f"{bucket}/file")
    assert refused.value.filename == f"{bucket}/file"
    assert flaky.met == 1


@pytest.mark.parametrize("call", ["read", "stat", "open", "digest"])
@pytest.mark.parametrize(
    "path",
    [
        "gs://shop/none", "gs://shop", "gs://no-such-bucket/file", "gs://_no_name/file",
        "gs://My Bucket/file", "gs://a/file", f"gs://{223 * 'b'}/file",
        f"gs://shop/{513 * 'é'}", "gs://shop/a\nb",
    ],
)  # fmt: skip
def test_what_is_missing_is_missing(bucket: str, call: str, path: str) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        CALLS[call](path)
    assert missing.value.filename == path


@pytest.mark.parametrize("call", ["names", "glob", "write", "writer", "delete tree", "lock"])
def test_a_missing_bucket_is_named(bucket: str, call: str) -> None:
    with pytest.raises(OperatorError, match="no bucket gs://no-such-bucket,"):
        CALLS[call]("gs://no-such-bucket/folder/file")


@pytest.mark.parametrize("call", ["write", "writer"])
def test_a_bucket_that_cannot_be_is_the_operators_to_correct(bucket: str, call: str) -> None:
    with pytest.raises(OperatorError, match=r"no bucket gs://My Bucket,"):
        CALLS[call]("gs://My Bucket/file")


def test_what_the_store_refuses_is_told_in_its_words(bucket: str, flaky: Flaky) -> None:
    flaky.forever = 400
    with pytest.raises(OperatorError, match=r"The store refuses what was asked of gs://.*: 400"):
        files.read_bytes(f"{bucket}/file")


class Expired(credentials.Credentials):
    """Expired credentials are refreshed without complaint, and to no avail."""

    def refresh(self, request: object) -> None:
        self.token = "expired"


@pytest.mark.parametrize("given", [credentials.AnonymousCredentials, Expired])
@pytest.mark.parametrize("call", CALLS)
def test_credentials_that_are_not_accepted_are_told(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, call: str,
    given: Callable[[], credentials.Credentials],
) -> None:  # fmt: skip
    files.write_bytes(f"{bucket}/file", b"data")
    monkeypatch.setattr(gcs_client.client()._http, "credentials", given())
    flaky.forever = 401
    with pytest.raises(OperatorError, match="Google's application default credentials"):
        CALLS[call](f"{bucket}/file")


LOOKS: dict[str, Callable[[str, list[str]], object]] = {
    "find": find_image,
    "read": lambda uri, roots: read_image(
        uri, roots, Preprocessing(32, 32, "bilinear", (0.0,) * 3, (1.0,) * 3)
    ),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("uri", ["gs://My Bucket/a.png", "gs://no-such-bucket/a.png", "gs://x"])
def test_an_image_in_no_bucket_is_a_reject(bucket: str, uri: str, look: Callable) -> None:
    found = look(uri, [bucket])
    assert isinstance(found, Rejected)
    assert found.reason == "missing"


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("root", ["gs://no-such-bucket", "gs://no-such-bucket/images"])
def test_a_bucket_of_the_image_roots_that_is_not_there_rejects_no_image(
    bucket: str, root: str, look: Callable
) -> None:
    for uri in ("a.png", "gs://no-such-bucket/a.png"):
        with pytest.raises(OperatorError, match="no bucket gs://no-such-bucket,"):
            look(uri, [bucket, root] if uri.startswith("gs:") else [root])


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whether_a_bucket_is_there_is_asked_once_and_need_not_be_allowed(
    bucket: str, flaky: Flaky, look: Callable
) -> None:
    image_files._check_bucket.cache_clear()
    flaky.faults = [404, 403]  # no such image, and none may list the bucket
    for _ in range(2):
        found = look("a.png", [bucket])
        assert isinstance(found, Rejected)
        assert found.reason == "missing"
    assert flaky.met == 2


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_credentials_that_are_not_accepted_reject_no_image(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, look: Callable
) -> None:
    files.write_bytes(f"{bucket}/file", b"data")
    monkeypatch.setattr(gcs_client.client()._http, "credentials", Expired())
    flaky.forever = 401
    with pytest.raises(OperatorError, match=r"but HTTP 401\. Run `gcloud auth"):
        look(f"{bucket}/file", [bucket])


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("fault", [429, 500, 503, RESET])
def test_a_store_that_stays_away_rejects_no_image(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, look: Callable, fault: int | str
) -> None:
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.1)
    flaky.forever = fault
    with pytest.raises(StorageUnavailable, match="nothing was rejected"):
        look("a.png", [bucket])
    assert flaky.met > 1


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_name_that_cannot_be_looked_up_rejects_no_image(
    bucket: str, monkeypatch: pytest.MonkeyPatch, look: Callable
) -> None:
    asked = []

    def unknown(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://store.example")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.1)
    gcs_client.forget_client()
    with pytest.raises(StorageUnavailable, match="nothing was rejected"):
        look("a.png", [bucket])
    assert asked.count("store.example") > 1


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_store_that_refuses_connections_rejects_no_image(
    bucket: str, monkeypatch: pytest.MonkeyPatch, look: Callable
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.1)
    gcs_client.forget_client()
    with pytest.raises(StorageUnavailable, match="refused"):
        look("a.png", [bucket])


def test_missing_credentials_are_told_in_one_paragraph(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_none(*_: object, **__: object) -> None:
        raise auth_errors.DefaultCredentialsError("Your default credentials were not found.\nx")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setattr("google.auth.default", find_none)
    gcs_client.forget_client()
    with pytest.raises(OperatorError, match="gcloud auth application-default login") as refused:
        files.stat(f"{bucket}/file")
    assert "\n" not in str(refused.value)


# ---- the client ------------------------------------------------------------------------------


def test_nothing_is_asked_of_a_bucket_besides_what_was_called_for(
    near_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, before = [], set(threading.enumerate())
    watch_store(monkeypatch).before = lambda what, _: made.append(what)
    files.write_bytes(f"{near_bucket}/file", b"data")
    assert not files.exists(f"{near_bucket}/none")
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert made == ["POST", "GET"]


def test_threads_share_one_client_and_keep_their_connections(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = []
    make = gcs_client._make_client
    monkeypatch.setattr(gcs_client, "_make_client", lambda: made.append(time.sleep(0.1)) or make())
    files.write_bytes(f"{bucket}/file", b"data")
    gcs_client.forget_client()
    made.clear()
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(32) as pool:
        found = list(pool.map(files.read_bytes, [f"{bucket}/file"] * 200))
    assert found == [b"data"] * 200
    assert len(made) == 1
    assert "pool is full" not in caplog.text


def test_calls_wait_for_a_connection(
    bucket: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors give their connection back too, those that are tried again included."""
    monkeypatch.setattr(gcs_client, "IN_FLIGHT", 2)
    gcs_client.forget_client()
    files.write_bytes(f"{bucket}/file", b"data")
    flaky.faults = [503] * 10
    paths = [f"{bucket}/{name}" for name in ("file", "none") * 20]
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as pool:
        assert list(pool.map(files.exists, paths)) == [True, False] * 20
        for number in (401, 403, 404, 416, 503):
            flaky.faults = [number] * 3
            for _ in range(3):
                with contextlib.suppress(OSError, OperatorError):
                    files.read_bytes(f"{bucket}/file")
    assert files.read_bytes(f"{bucket}/file") == b"data"
    assert "pool is full" not in caplog.text


# Of a process that has no threads of other tests: a child that is forked beside these may wait for
# ever, and with it whoever ends the pool.
FORKING = """
import multiprocessing, sys
from feature_jobs.store import files, gcs_client

def read(path, before):
    assert id(gcs_client.client()) != before
    return files.read_bytes(path)

mine = gcs_client.client()
with gcs_client._making, multiprocessing.get_context("fork").Pool(2) as pool:
    # Held by this process: a child that had inherited it would wait for ever.
    found = pool.starmap_async(read, [(sys.argv[1], id(mine))] * 4).get(60)
assert gcs_client.client() is mine
print(*found)
"""


def test_a_forked_process_makes_its_own_client(bucket: str) -> None:
    files.write_bytes(f"{bucket}/file", b"data")
    command = [sys.executable, "-c", FORKING, f"{bucket}/file"]
    found = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert (found.returncode, found.stdout.split()) == (0, ["b'data'"] * 4), found.stderr


def test_googles_client_is_loaded_when_a_bucket_is_first_used() -> None:
    source = (
        "import sys\n"
        "from feature_jobs import inputs\n"
        "from feature_jobs.store import files, partitions\n"
        "files.stat(sys.executable)\n"
        "assert not {'google.cloud.storage', 'google.api_core', 'google.auth'} & set(sys.modules)"
    )
    assert "pyarrow" in loaded_by(source)


# ---- locks -----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns a folder whose lock a process on another machine holds."""
    with monkeypatch.context() as there:
        there.setattr(gcs, "_machine", lambda: "another machine")
        assert gcs._Lease(f"{bucket}/night").take()
    return f"{bucket}/night"


def test_a_lock_of_another_machine_is_taken_over_when_it_was_not_renewed(
    elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BlockingIOError), files.lock(elsewhere):
        pytest.fail("it was renewed just now")
    monkeypatch.setattr(gcs, "LOCK_FREE_SECONDS", 0.2)
    time.sleep(0.3)
    with files.lock(elsewhere):
        assert files.list_names(elsewhere) == []
        with pytest.raises(BlockingIOError), files.lock(elsewhere):
            pytest.fail("it was taken over by now")


def test_only_one_of_many_takes_a_lock_over(
    elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "LOCK_FREE_SECONDS", 0.2)
    time.sleep(0.3)
    found = gcs._current(f"{elsewhere}/.tmp-lock")
    monkeypatch.setattr(gcs, "_current", lambda _: found)  # all have seen it before any took it
    monkeypatch.setattr(gcs, "_stamp", lambda blob: "x 0 y" if blob is found else "")
    with ThreadPoolExecutor(8) as pool:
        leases = [gcs._Lease(elsewhere) for _ in range(8)]
        assert sum(pool.map(lambda lease: lease.take(), leases)) == 1


def test_a_lock_is_renewed_as_long_as_it_is_held(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "LOCK_RENEW_SECONDS", 0.05)
    with files.lock(bucket):
        before = gcs._current(f"{bucket}/.tmp-lock")
        time.sleep(0.5)
        after = gcs._current(f"{bucket}/.tmp-lock")
        assert after.generation != before.generation
        assert after.updated > before.updated
    assert gcs._current(f"{bucket}/.tmp-lock") is None


def test_who_lost_a_lock_says_so_and_leaves_it_to_the_other(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gcs, "LOCK_RENEW_SECONDS", 0.2)
    with files.lock(bucket):
        files.write_bytes(f"{bucket}/.tmp-lock", b"mine now")
        time.sleep(0.5)
    assert "took over" in caplog.text
    assert files.read_bytes(f"{bucket}/.tmp-lock") == b"mine now"
    with pytest.raises(BlockingIOError), files.lock(bucket):
        pytest.fail("it was written just now, by nobody knows whom")


@pytest.mark.parametrize("error", [StorageUnavailable("x"), PermissionError("x"), ValueError("x")])
def test_a_lock_that_could_not_be_renewed_once_is_renewed_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(gcs, "LOCK_RENEW_SECONDS", 0.05)
    put, tried = gcs._put, []

    def fail_at_first(*args: object) -> object:
        tried.append(args)
        if len(tried) < 4:
            raise error
        return put(*args)

    with files.lock(bucket):
        before = gcs._current(f"{bucket}/.tmp-lock").generation
        monkeypatch.setattr(gcs, "_put", fail_at_first)
        deadline = time.monotonic() + 20
        while gcs._current(f"{bucket}/.tmp-lock").generation == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert caplog.text.count("could not be renewed: x") == 3
    assert gcs._current(f"{bucket}/.tmp-lock") is None


# ---- compressed objects ------------------------------------------------------------------------


@pytest.fixture
def says_gzip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes objects say that they are compressed, as the emulator's cannot."""
    monkeypatch.setattr(Blob, "content_encoding", "gzip")


@pytest.mark.parametrize(
    ("stored", "data"),
    [
        (gzip.compress(b"one" * 10_000, mtime=0), b"one" * 10_000),
        (gzip.compress(b"one", mtime=0) + gzip.compress(b"two", mtime=0) + bytes(8), b"onetwo"),
        (b"no gzip", b"no gzip"),
        (b"", b""),
    ],
)
@pytest.mark.usefixtures("says_gzip")
def test_what_says_that_it_is_gzip_is_decompressed(bucket: str, stored: bytes, data: bytes) -> None:
    files.write_bytes(f"{bucket}/file", stored)
    assert files.read_bytes(f"{bucket}/file") == data
    assert files.read_bytes(f"{bucket}/file", 1000) == data[:1000]


def test_a_gzip_bomb_is_decompressed_no_further_than_asked(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is told to answer as it does of an object that says it is gzip."""
    path, bomb = f"{bucket}/file", gzip.compress(bytes(100_000_000))
    files.write_bytes(path, bomb)
    session = gcs_client.client()._http
    session.hooks["response"].append(
        lambda response, **_: (
            response.headers.update({"Content-Encoding": "gzip"})
            or response.raw.headers.update({"Content-Encoding": "gzip"})
        )
    )
    tracemalloc.start()
    data = files.read_bytes(path, 1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data == bytes(1_000_000)
    assert peak < 8_000_000


# ---- deletion --------------------------------------------------------------------------------


def test_marks_go_before_what_they_stand_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["part-0.parquet", "receipts/part-0.json", "_staged.json", "_SUCCESS", "x/chunk.arrow"]
    for name in names:
        files.write_bytes(f"{bucket}/{name}", json.dumps(name).encode())
    gone, lock, delete = [], threading.Lock(), gcs._delete

    def note(path: str) -> None:
        with lock:
            gone.append(path.removeprefix(bucket + "/"))
        delete(path)

    monkeypatch.setattr(gcs, "_delete", note)
    files.delete_tree(bucket)
    assert set(gone[:3]) == {"receipts/part-0.json", "_staged.json", "_SUCCESS"}
    assert set(gone) == set(names)
