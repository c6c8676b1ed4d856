"""A command beside another: it runs meanwhile, and never longer."""

import time
from pathlib import Path
from unittest import mock

import pytest

from pipelines.running import beside


def ended(path: Path, within: float = 60.0) -> bool:
    """Returns whether a file is there in time."""
    until = time.monotonic() + within
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    return path.exists()


def script(tmp_path: Path, text: str) -> list[str]:
    """Returns the arguments of a stand-in for `courier` that runs a script."""
    path = tmp_path / "script.py"
    path.write_text(text)
    return [str(path)]


def run(arguments: list[str]) -> mock._patch:
    """Takes the process of `courier` for that of a script."""
    real = beside.subprocess.Popen
    return mock.patch.object(
        beside.subprocess, "Popen", lambda call, **how: real([call[0], *arguments], **how)
    )


def test_it_runs_while_the_block_does(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with run(script(tmp_path, f"open({str(told)!r}, 'w')")), beside.running(["histories"]):
        assert ended(told)


def test_it_is_waited_for(tmp_path: Path) -> None:
    told = tmp_path / "told"
    text = f"import time\ntime.sleep(1)\nopen({str(told)!r}, 'w')"
    with run(script(tmp_path, text)), beside.running([]):
        assert not told.exists()
    assert told.exists()


@pytest.mark.parametrize("is_deaf", [False, True])
def test_it_is_ended_where_the_block_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_deaf: bool
) -> None:
    monkeypatch.setattr(beside, "_SECONDS_TO_END", 0.5)
    began = tmp_path / "began"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if is_deaf else ""
    text = f"{deaf}import time\nopen({str(began)!r}, 'w')\ntime.sleep(600)"

    def fail() -> None:
        with run(script(tmp_path, text)), beside.running([]):
            assert ended(began)
            raise KeyError

    started = time.monotonic()
    with pytest.raises(KeyError):
        fail()
    assert time.monotonic() - started < 300


def test_that_it_fails_is_none_of_the_blocks(tmp_path: Path) -> None:
    with run(script(tmp_path, "raise SystemExit(4)")), beside.running([]):
        pass
