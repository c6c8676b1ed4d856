"""A run goes on from its newest whole checkpoint, whatever happened to the files, and runs none."""

import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from courier_model.training import checkpoints
from courier_model.training.checkpoints import load_latest, save
from feature_jobs.schemas import DataContractError

# Begins to save step 2 and is killed when half of it is on disk.
KILLED = """
import os, signal, sys, torch
from courier_model.training import checkpoints
def die(state, file):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = die
checkpoints.save(sys.argv[1], 2, {"step": 2})
"""


class Code:
    """Makes a folder when it is unpickled without restriction."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((1000,), float(step))}


def silent(line: str) -> None:
    raise AssertionError(f"nothing to tell, but told: {line}")


def saved(folder: Path, *steps: int) -> list[Path]:
    return [Path(save(str(folder), step, state_of(step))) for step in steps]


def steps_in(folder: Path) -> list[int]:
    return sorted(int(name.split("-")[1]) for name in os.listdir(folder))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def placed(folder: Path, step: int, data: bytes) -> Path:
    """Writes a file with the name that its bytes deserve, as an attacker would make it."""
    path = folder / f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:12]}.pt"
    path.write_bytes(data)
    return path


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert found.device.type == "cpu"
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


# ---- What is saved is what is loaded -------------------------------------------------------


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-6)
    for _ in range(3):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_training_state_comes_back_as_it_was(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_interval": 2000, "_growth_tracker": 3},
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": [torch.arange(16, dtype=torch.uint8)],  # as torch.cuda.get_rng_state_all()
        "python_rng": random.getstate(),
        "numpy_rng": np.random.default_rng(0).bit_generator.state,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "plain": [True, None, "ünï", 2**70, -0.5, (1, [2], {}), float("inf")],
        "ordered": OrderedDict(b=1, a=2),
        5: "a key that is no string",
    }
    save(str(tmp_path), 120, state)
    found = load_latest(str(tmp_path), silent)
    assert found is not None
    assert_same(found, state)


def test_a_resumed_optimizer_steps_as_the_one_that_went_on(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state["rng"] = torch.get_rng_state()
    save(str(tmp_path), 3, state)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    wanted = step(model, optimizer)
    found = load_latest(str(tmp_path), silent)
    assert found is not None
    again, its_optimizer = trained()
    again.load_state_dict(found["model"])
    its_optimizer.load_state_dict(found["optimizer"])
    torch.set_rng_state(found["rng"])
    assert all(torch.equal(a, b) for a, b in zip(wanted, step(again, its_optimizer), strict=True))


def test_the_name_tells_step_and_digest(tmp_path: Path) -> None:
    [path] = saved(tmp_path / "new" / "folder", 120)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"step-00000120-{digest[:12]}.pt"
    assert os.listdir(path.parent) == [path.name]


def test_there_is_nothing_to_load_before_the_first_save(tmp_path: Path) -> None:
    assert load_latest(str(tmp_path / "missing"), silent) is None
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "step-1.pt").write_text("nor this")
    assert load_latest(str(tmp_path), silent) is None


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(pickle.UnpicklingError):
        save(str(tmp_path), 2, {"code": Code(tmp_path / "run")})
    assert not (tmp_path / "run").exists()
    assert load_latest(str(tmp_path), silent)["step"] == 1
    saved(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2]  # and nothing hidden


# ---- Which ones stay -----------------------------------------------------------------------


def test_the_newest_two_are_kept_by_step_and_not_by_name(tmp_path: Path) -> None:
    big = 100_000_000  # one more digit: as text it comes before 99,999,999
    saved(tmp_path, 1, 2, big - 1)
    assert steps_in(tmp_path) == [2, big - 1]
    saved(tmp_path, big)
    assert steps_in(tmp_path) == [big - 1, big]
    assert load_latest(str(tmp_path), silent)["step"] == big


def test_the_same_step_saved_again_supersedes(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 2)
    assert steps_in(tmp_path) == [1, 2]
    save(str(tmp_path), 2, {"step": "another"})
    assert steps_in(tmp_path) == [1, 2]
    assert load_latest(str(tmp_path), silent) == {"step": "another"}


def test_later_checkpoints_of_a_run_that_went_back_do_not_push_out_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "KEEP", 3)
        for path in saved(tmp_path, 100, 200, 300)[1:]:
            truncate(path)
    assert load_latest(str(tmp_path), lambda line: None)["step"] == 100
    saved(tmp_path, 150)
    assert steps_in(tmp_path) == [100, 150]
    assert load_latest(str(tmp_path), silent)["step"] == 150


def test_other_files_and_folders_with_odd_names_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run [a]*"
    folder.mkdir()
    (folder / "notes.pt").write_text("mine")
    (tmp_path / "run a").mkdir()
    (tmp_path / "run a" / ".tmp-x.pt").write_text("another's")
    saved(folder, 1, 2, 3)
    assert len(os.listdir(folder)) == 3
    assert (folder / "notes.pt").exists()
    assert (tmp_path / "run a" / ".tmp-x.pt").exists()


# ---- Damage --------------------------------------------------------------------------------


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    root = Path(checkpoints.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=root, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2  # half of one is left over
    assert load_latest(str(tmp_path), silent)["step"] == 1
    saved(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2]  # and swept away


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    tmp_path: Path, damage: Any
) -> None:
    older, newest = saved(tmp_path, 1, 2)
    damage(newest)
    said: list[str] = []
    assert load_latest(str(tmp_path), said.append)["step"] == 1
    [line] = said
    assert "\n" not in line
    assert str(tmp_path) in line
    assert f"{newest.name} is damaged (its {newest.stat().st_size} bytes" in line
    assert line.endswith(f"Going back to the checkpoint before it, {older.name}.")


def test_where_no_checkpoint_is_whole_training_does_not_begin_anew_by_itself(
    tmp_path: Path,
) -> None:
    older, newest = saved(tmp_path, 1, 2)
    flip_a_bit(older)
    empty(newest)
    said: list[str] = []
    with pytest.raises(DataContractError, match="delete the folder to begin anew") as error:
        load_latest(str(tmp_path), said.append)
    assert len(said) == 1
    for part in (str(tmp_path), older.name, newest.name):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_fault_of_the_disk_is_raised_and_not_taken_for_damage(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / f"step-00000002-{'0' * 12}.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        load_latest(str(tmp_path), pytest.fail)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    evil = tmp_path / "evil.pt"
    torch.save({"step": 2, "code": Code(tmp_path / "run")}, evil)
    placed(tmp_path, 2, evil.read_bytes())
    placed(tmp_path, 3, pickle.dumps(Code(tmp_path / "run"), protocol=2))
    said: list[str] = []
    assert load_latest(str(tmp_path), said.append)["step"] == 1
    assert [line.count("cannot be read as a plain state") for line in said] == [1, 1]
    assert not (tmp_path / "run").exists()
    torch.load(evil, weights_only=False)
    assert (tmp_path / "run").is_dir()  # it would have


@pytest.mark.parametrize(
    "data", [b"", b"abc", b"PK\3\4", bytes(range(256)) * 4, pickle.dumps({"a": 1}, protocol=2)]
)
def test_bytes_that_are_no_checkpoint_are_refused_whatever_their_name(
    tmp_path: Path, data: bytes
) -> None:
    placed(tmp_path, 1, data)
    with pytest.raises(DataContractError, match="cannot be read as a plain state"):
        load_latest(str(tmp_path), silent)


def test_a_file_of_torch_that_holds_no_state_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    placed(tmp_path, 1, (tmp_path / "list.pt").read_bytes())
    with pytest.raises(DataContractError, match="holds a list"):
        load_latest(str(tmp_path), silent)
