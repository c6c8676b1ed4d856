"""Keeps the checkpoints of a training run: whole or not used, and nothing that is read is run.

A file is called `step-<step>-<12 hex of the SHA-256 of its bytes>.pt`, so a truncated file or a
flipped bit shows itself. It holds tensors, numbers, strings and containers of them, which torch
reads with `weights_only`; the digest finds damage, it proves no origin.
"""

import glob
import os
import pickle
import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch

from feature_jobs.schemas import DataContractError
from feature_jobs.store import files

KEEP = 2  # one to go on from, and one in case that it is damaged

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{12})\.pt")

# What torch's restricted unpickler raises for bytes that are no state, as far as it tells.
_UNREADABLE = (
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


class _Damaged(Exception):
    """Tells what was found instead of a whole checkpoint."""


def save(folder: str, step: int, state: dict[str, Any]) -> str:
    """Writes the checkpoint of `step`, 0 or more, atomically; returns its path.

    Of the others only the last `KEEP - 1` of earlier steps stay. Another one of the same step is
    superseded, and one of a later step was left behind by a run that has since gone back (the
    later one was damaged); kept, it could push out those that are whole. Only one process may save
    in a folder at a time.

    Raises pickle.UnpicklingError for a state that `load_latest` would refuse; the others then stay.
    """
    # Its name is known only once it is written. Readers see no `.tmp-`.
    unnamed = os.path.join(folder, f".tmp-{step:08d}.pt")
    with files.atomic_writer(unnamed) as file:
        torch.save(state, file)
    torch.load(unnamed, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor's bytes
    path = os.path.join(folder, f"step-{step:08d}-{files.sha256(unnamed)[:12]}.pt")
    files.move(unnamed, path)
    _prune(folder, step, path)
    return path


def _prune(folder: str, step: int, saved: str) -> None:
    earlier = [name for name in _newest_first(folder) if _step(name) < step]
    keep = {os.path.basename(saved), *earlier[: KEEP - 1]}
    for name in _newest_first(folder):
        if name not in keep:
            files.delete(os.path.join(folder, name))
    for leftover in files.find(os.path.join(glob.escape(folder), ".tmp-*.pt")):
        files.delete(leftover)  # of a killed save; each is as large as a checkpoint


def load_latest(folder: str, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint, its tensors on the CPU; None where there is none at all.

    A damaged one is told in one line through `say`, and the one before it is tried. Raises
    DataContractError where there are checkpoints, but none is whole.
    """
    names = _newest_first(folder)
    damages: list[str] = []
    for name, older in zip_longest(names, names[1:]):
        try:
            return _load(os.path.join(folder, name))
        except _Damaged as found:
            damages.append(f"{name} {found}")
        if older:
            say(f"In {folder}, {damages[-1]}. Going back to the checkpoint before it, {older}.")
    if not damages:
        return None
    raise DataContractError(
        f"No checkpoint in {folder} is whole: {'; '.join(damages)}. Training cannot go on from "
        "where it was. Restore one of these files from a copy, or delete the folder to begin anew."
    )


def are_in(folder: str) -> bool:
    """Returns whether there is a checkpoint in `folder`, which need not exist."""
    return bool(_newest_first(folder))


def _load(path: str) -> dict[str, Any]:
    """Loads what `save` wrote; of any other file raises _Damaged, saying what was found."""
    _, expected = _parts(path)
    try:
        found = files.sha256(path)[:12]
        if found != expected:
            size = files.stat(path).size
            raise _Damaged(f"is damaged (its {size} bytes have the digest {found})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise _Damaged(f"cannot be read as a plain state ({first_line.rstrip('. ')})") from error
    if not isinstance(state, dict):
        raise _Damaged(f"holds a {type(state).__name__}, not a state")
    return state


def _newest_first(folder: str) -> list[str]:
    names = [name for name in files.list_names(folder) if _NAME.fullmatch(name)]
    return sorted(names, key=_step, reverse=True)


def _step(name: str) -> int:
    return _parts(name)[0]


def _parts(path: str) -> tuple[int, str]:
    """Returns the step and the digest that a checkpoint's name tells."""
    match = _NAME.fullmatch(os.path.basename(path))
    assert match
    return int(match[1]), match[2]
