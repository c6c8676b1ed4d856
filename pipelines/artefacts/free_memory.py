"""Tells how much memory this process may still take."""

import os
from collections.abc import Iterator
from pathlib import Path

# Where control groups of version 2 and 1 are, and their files of limit, usage and file cache.
_GROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
               "total_inactive_file"),
}  # fmt: skip


def available_bytes(root: str = "/") -> int:
    """Returns the bytes that this process may still take: of the machine and of its control groups.

    What a group holds in its file cache counts as free, since it is dropped on demand. `root` is
    the folder that holds `proc` and `sys`.
    """
    info = Path(root, "proc/meminfo")
    if not info.exists():  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([_fields(info)["MemAvailable:"] * 1024, *_free_in_groups(Path(root))])


def _fields(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yields the bytes left below each memory limit, from this process's group to the topmost."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in _GROUP_FILES:
            continue
        top, limit, usage, cache = _GROUP_FILES[controllers]
        own = Path(group.lstrip("/"))
        for folder in (root / top / name for name in (own, *own.parents)):
            # In a container the group may be called what it is called outside, and lie at the top.
            text = (folder / limit).read_text() if (folder / limit).exists() else "max"
            if text.strip() != "max":
                used = int((folder / usage).read_text()) - _fields(folder / "memory.stat")[cache]
                yield max(0, int(text) - used)
