"""Free memory is what Linux tells, or what is built in where nothing tells."""

from pathlib import Path

import pytest

from pipelines.artefacts.free_memory import available_bytes


def fake_machine(root: Path, groups: str, files: dict[str, str]) -> str:
    """Makes a root folder with 8 GB of available memory and the files of control groups."""
    files = {
        "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": groups,
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def group(folder: str, limit: object, used: int, cached: int) -> dict[str, str]:
    old = folder.startswith("sys/fs/cgroup/memory")
    names = ["memory.limit_in_bytes", "memory.usage_in_bytes"] if old else ["memory.max"]
    values = [*names, "memory.current"][:2]
    stat = f"anon 5\n{'total_' if old else ''}inactive_file {cached}\n"
    return {
        f"{folder}/{values[0]}": f"{limit}\n",
        f"{folder}/{values[1]}": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def test_memory_that_is_free_is_the_machines_where_no_group_limits_it(tmp_path: Path) -> None:
    assert available_bytes(fake_machine(tmp_path, "", {})) == 8_000_000 * 1024
    none = group("sys/fs/cgroup/a", "max", 700, 0)
    assert available_bytes(fake_machine(tmp_path, "0::/a\n", none)) == 8_000_000 * 1024


@pytest.mark.parametrize(
    ("groups", "top"),
    [("0::/job/step\n", "sys/fs/cgroup"), ("4:memory:/job/step\n0::/\n", "sys/fs/cgroup/memory")],
    ids=["version 2", "version 1"],
)
def test_the_tightest_group_on_the_way_up_limits_memory(
    tmp_path: Path, groups: str, top: str
) -> None:
    files = group(f"{top}/job/step", 5000, 3000, 500) | group(f"{top}/job", 4000, 3500, 600)
    assert available_bytes(fake_machine(tmp_path, groups, files)) == 4000 - 3500 + 600
    files = group(f"{top}/job", 4000, 4500, 0)  # over its limit
    assert available_bytes(fake_machine(tmp_path, groups, files)) == 0


def test_in_a_container_the_limit_lies_at_the_top(tmp_path: Path) -> None:
    groups = "9:cpu:/docker/f00\n4:memory:/docker/f00\n"
    files = group("sys/fs/cgroup/memory", 4000, 1000, 0)
    assert available_bytes(fake_machine(tmp_path, groups, files)) == 3000


def test_where_no_linux_tells_all_memory_that_is_built_in_is_free(tmp_path: Path) -> None:
    assert available_bytes(str(tmp_path)) > 1 << 28


def test_on_this_machine_no_more_memory_is_free_than_is_built_in(tmp_path: Path) -> None:
    assert 0 < available_bytes() <= available_bytes(str(tmp_path))
