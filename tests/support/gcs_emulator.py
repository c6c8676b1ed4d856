"""Runs gcp-storage-emulator in a process of its own, with what it lacks and we rely on.

`python -m tests.support.gcs_emulator BUCKET` prints the address it listens on, and ends when its
standard input does, as it does when the process that started it is gone.

Added: `ifGenerationMatch` (else 412) and reads of one generation (else 404). Left out: writing down
all that there is after each call, and keeping what was deleted.
"""

import logging
import os
import sys
import threading
from functools import partial, partialmethod
from http.server import HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

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


class Handler(RequestHandler):
    def serve(self, method: str) -> None:
        self.storage.query = parse_qs(urlparse(self.path).query)
        try:
            Router(self).handle(method)
        except PreconditionFailed:
            self.send_error(412)

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


if __name__ == "__main__":
    logging.disable()  # it tells every object that is not there
    objects = Objects()
    buckets.create_bucket(sys.argv[1], objects)
    threading.Thread(target=end_with_parent, daemon=True).start()
    server = Server(("127.0.0.1", 0), partial(Handler, objects))
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
