"""Says how many threads this process may use at once; every pool of ours and torch ask here.

More threads than cores are many times slower than as many, and libraries take what the machine has
unless told. So a job tells its workers what is theirs, once in each process.
"""

import threading
from dataclasses import dataclass
from typing import Any

import loky
import pyarrow as pa
import threadpoolctl

_limited: int | None = None
_limiting = threading.Lock()


def cores() -> int:
    """Counts the cores that this process may use: by its affinity and its cgroup's quota."""
    found: int = loky.cpu_count()
    return found


def budget() -> int:
    """Returns how many threads may compute at once in this process: the limit, else its cores."""
    return cores() if _limited is None else _limited


def limit(threads: int) -> None:
    """Makes `threads`, 1 or more, the budget of this process, of its BLAS and of pyarrow.

    torch and faiss are told by who uses them. It lasts until the next call, in all threads.
    """
    global _limited
    with _limiting:
        threadpoolctl.threadpool_limits(threads, user_api="blas")  # of all that are loaded by now
        pa.set_cpu_count(threads)
        _limited = threads


def keep_to_one(torch: Any) -> None:
    """Makes `torch` compute in the calling thread alone, whatever it does in others.

    The module is handed in, so that who needs none does not load it.
    """
    with _limiting:
        others = torch.get_num_threads()  # asked first: torch would set it anew when first used
        torch.set_num_threads(1)
        # That was also the default of threads to come: put it back, in a thread that ends.
        restore = threading.Thread(target=torch.set_num_threads, args=(others,))
        restore.start()
        restore.join()


@dataclass(frozen=True)
class Share:
    """Tells what a process of a job may use: so many `threads`, else its part of the host's cores.

    `processes` share a host; None stands for as many as it has cores.
    """

    threads: int | None = None
    processes: int | None = 1

    def count(self) -> int:
        """Returns the threads of a process of this host, 1 or more."""
        if self.threads is not None:
            return self.threads
        return 1 if self.processes is None else max(1, cores() // self.processes)
