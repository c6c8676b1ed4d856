"""Asks the server at a socket to run a module, and ends as the module does.

client.py SOCKET -m MODULE ARGS…
"""

import json
import os
import signal
import socket
import sys
import time


def connected(address: str) -> socket.socket:
    """Returns a connection to the server, which may still be importing."""
    deadline = time.monotonic() + 120
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main(address: str, dash_m: str, *args: str) -> None:
    if dash_m != "-m":
        raise SystemExit(f"only -m is understood, not {dash_m}")
    asked = json.dumps({"args": args, "folder": os.getcwd(), "environment": dict(os.environ)})
    with connected(address) as connection:
        socket.send_fds(connection, [len(asked.encode()).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(asked.encode())
        answers = connection.makefile()
        number = int(answers.readline())
        for passed_on in (signal.SIGTERM, signal.SIGINT):
            signal.signal(passed_on, lambda got, _: os.kill(number, got))
        status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
