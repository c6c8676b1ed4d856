"""Stands between a client and a store, as a server that fails as networks do."""

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESET, CUT, SILENT = "reset", "cut", "silent"  # before an answer, in the middle of it, none at all


class Flaky(ThreadingHTTPServer):
    """Passes requests on to `behind`, but for the next ones on objects, which meet `faults`.

    Each takes one of `faults`, a status or a word from above. `forever` is what they meet once
    those are used up.
    """

    daemon_threads = True

    def __init__(self, behind: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.faults, self.forever = behind, [], None
        self.met, self.ended = 0, threading.Event()

    def next_fault(self, path: str) -> int | str | None:
        if "/o" not in path:
            return None  # of the bucket: the client asks about it on its own account
        fault = self.faults.pop(0) if self.faults else self.forever
        self.met += fault is not None
        return fault


class _Handler(BaseHTTPRequestHandler):
    server: Flaky

    def pass_on(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault(self.path)
        if fault == RESET:
            self.close_connection = True
            return
        if fault == SILENT:
            self.server.ended.wait(30)
            return
        if isinstance(fault, int):
            self.send_error(fault)
            return
        url = self.server.behind + self.path
        request = urllib.request.Request(url, body or None, dict(self.headers), method=method)
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == CUT else data)

    do_GET = partialmethod(pass_on, "GET")
    do_POST = partialmethod(pass_on, "POST")
    do_PUT = partialmethod(pass_on, "PUT")
    do_DELETE = partialmethod(pass_on, "DELETE")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def flaky_store(behind: str) -> Iterator[Flaky]:
    with Flaky(behind) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()
