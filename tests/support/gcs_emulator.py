"""Runs gcp-storage-emulator, with what it lacks and we rely on: as a process, or within one.

`python -m tests.support.gcs_emulator BUCKET` prints the address it listens on, and ends when its
standard input does, as it does when the process that started it is gone. `Nearby` lets a client
call it without sockets, several times faster, where no second process needs to.

Added: `ifGenerationMatch` (else 412) and reads of one generation (else 404). Left out: writing down
all that there is after each call, and keeping what was deleted.
"""

import io
import logging
import os
import sys
import threading
from functools import partial, partialmethod
from http.server import HTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import requests
import urllib3
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage


class PreconditionFailed(Exception):
    pass


class Objects(Storage):
    """Keeps objects in memory; requests are served one by one, so each is an atomic step."""

    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        self.query: dict[str, list[str]] = {}  # of the request that is being served

    def create_file(self, bucket: str, name: str, *rest: Any) -> None:
        self.check_generation(bucket, name)
        super().create_file(bucket, name, *rest)

    def delete_file(self, bucket: str, name: str) -> None:
        self.check_generation(bucket, name)
        super().delete_file(bucket, name)

    def get_file(self, bucket: str, name: str, show_error: bool = True) -> bytes:
        found = self.generation(bucket, name)
        if self.query.get("generation", [found]) != [found]:
            raise NotFound
        return super().get_file(bucket, name, show_error)

    def check_generation(self, bucket: str, name: str) -> None:
        found = self.generation(bucket, name)
        if self.query.get("ifGenerationMatch", [found]) != [found]:
            raise PreconditionFailed

    def generation(self, bucket: str, name: str) -> str:
        return self.objects.get(bucket, {}).get(name, {}).get("generation", "0")

    def _bucket_soft_delete_retention_seconds(self, _bucket: str) -> int:
        return 0

    def _write_config_to_file(self) -> None:
        pass


# Names come quoted where more of an address follows, so that a `/` ends them: without a wildcard
# for both, a route that does not match is known at once.
emulator.HANDLERS = tuple(
    (route.replace(".*[^/]+)/", "[^/]+)/"), by_method) for route, by_method in emulator.HANDLERS
)


def serve(handler: Any, method: str) -> None:
    """Answers the request that `handler` has read, through its `send_…` and `wfile`."""
    handler.storage.query = parse_qs(urlparse(handler.path).query)
    try:
        Router(handler).handle(method)
    except PreconditionFailed:
        handler.send_error(412)


# ---- As a process --------------------------------------------------------------------------------


class Handler(RequestHandler):
    def serve(self, method: str) -> None:
        serve(self, method)

    do_GET = partialmethod(serve, "GET")
    do_POST = partialmethod(serve, "POST")
    do_PUT = partialmethod(serve, "PUT")
    do_PATCH = partialmethod(serve, "PATCH")
    do_DELETE = partialmethod(serve, "DELETE")

    def log_message(self, *_: Any) -> None:
        pass


class Server(HTTPServer):
    request_queue_size = 256


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


# ---- Within the client's process -----------------------------------------------------------------

NEAR = "http://near.example"


class Exchange:
    """Is one request and its answer, as the emulator's routes see them."""

    server = SimpleNamespace(server_address=("127.0.0.1", 0))

    def __init__(self, storage: Objects, path: str, headers: Any, body: bytes):
        self.storage, self.path, self.headers = storage, path, urllib3.HTTPHeaderDict()
        for name, value in headers.items():
            self.headers[name] = value.decode() if isinstance(value, bytes) else value
        self.headers |= {"Host": NEAR.removeprefix("http://"), "Content-Length": str(len(body))}
        self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
        self.status, self.answered = 0, urllib3.HTTPHeaderDict()

    def send_response(self, status: int, *_: Any) -> None:
        self.status = status

    def send_header(self, name: str, value: str) -> None:
        self.answered[name] = value

    def end_headers(self) -> None:
        pass

    send_error = send_response


class Nearby:
    """Stands for a client's session: carries its requests to objects in this process, one by one.

    Half of what a request costs otherwise is spent in `requests`, on addresses, cookies, proxies
    and pools that nothing needs here.
    """

    def __init__(self, objects: Objects):
        self._objects, self._one_at_a_time = objects, threading.Lock()

    def request(
        self, method: str, url: str, data: bytes | str | None = None, headers: Any = None, **_: Any
    ) -> requests.Response:
        """Returns the emulator's answer, as `requests.Session.request` does."""
        body = data.encode() if isinstance(data, str) else data or b""
        exchange = Exchange(self._objects, url.removeprefix(NEAR), headers, body)
        with self._one_at_a_time:
            serve(exchange, method)
        answer = requests.Response()
        answer.request = SimpleNamespace(method=method, url=url)  # errors name it
        answer.status_code, answer.headers = exchange.status, exchange.answered
        answer.raw = urllib3.HTTPResponse(
            io.BytesIO(exchange.wfile.getvalue()), exchange.answered, exchange.status,
            preload_content=False, decode_content=False, request_method=method,
        )  # fmt: skip
        return answer


def make_objects(bucket: str) -> Objects:
    """Returns a store that holds one empty bucket."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # it tells each 404
    objects = Objects()
    buckets.create_bucket(bucket, objects)
    return objects


if __name__ == "__main__":
    objects = make_objects(sys.argv[1])
    threading.Thread(target=end_with_parent, daemon=True).start()
    server = Server(("127.0.0.1", 0), partial(Handler, objects))
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
