"""Sees what comes to our steps, and what they keep: here, or in a cluster's workers.

python -m tests.support.watched_steps FOLDER …    as `python …`, which starts a worker

Each worker notes a line for each bundle of each step in a file of FOLDER.
"""

import importlib
import json
import os
import pickle
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam

import feature_jobs
from feature_jobs.store.pieces import Piece
from pipelines.running import worker_boot

_WARM = 10  # elements, after which a step has all that it ever keeps


def steps() -> list[type[beam.DoFn]]:
    for found in pkgutil.walk_packages(feature_jobs.__path__, "feature_jobs."):
        importlib.import_module(found.name)
    every, todo = [], [beam.DoFn]
    while todo:
        below = todo.pop().__subclasses__()
        todo += below
        every += [step for step in below if step.__module__.startswith("feature_jobs.")]
    return [step for step in every if "process" in vars(step)]


def kept_by(step: Any) -> dict[str, int]:
    """Returns how much a step keeps in each attribute that holds several things."""
    held = {name: value for name, value in vars(step).items() if hasattr(value, "__len__")}
    return {name: len(value) for name, value in held.items() if not isinstance(value, str)}


class Once:
    """Is a group of values that come one after the other, once."""

    def __init__(self, values: Iterable[Any]):
        self._values: Iterator[Any] | None = iter(values)

    def __iter__(self) -> Iterator[Any]:
        assert self._values is not None, "a group is iterated a second time"
        values, self._values = self._values, None
        return values


def with_groups(element: Any, change: Callable[[Iterable[Any]], Iterable[Any]]) -> Any:
    """Returns an element with what `change` makes of each group of values that it has."""
    if not isinstance(element, tuple) or isinstance(element, Piece) or len(element) != 2:
        return element
    key, values = element
    if isinstance(values, Mapping):
        return key, {name: change(some) for name, some in values.items()}
    if isinstance(values, str | bytes | tuple | int) or not isinstance(values, Iterable):
        return element
    return key, change(values)


# ---- In workers --------------------------------------------------------------------------------


@dataclass
class Bundle:
    """Counts the elements of a bundle, and the values of its longest group.

    `grown` is by how many bytes what its step keeps grew from the tenth element to the last.
    """

    elements: int = 0
    values: int = 0
    grown: int = 0

    def groups(self, element: Any) -> Any:
        """Returns an element whose groups are counted as they are iterated, and only once."""
        return with_groups(element, lambda values: Once(self._counted(values)))

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for number, value in enumerate(values, 1):
            self.values = max(self.values, number)
            yield value


def watch(step: type[beam.DoFn], folder: str) -> None:
    """Makes a step note in `folder` what its bundles were."""
    start, process, finish = step.start_bundle, vars(step)["process"], step.finish_bundle
    bundles: dict[int, Bundle] = {}  # by step: beside what it keeps itself

    def start_bundle(self: Any) -> None:
        bundles[id(self)] = Bundle()
        start(self)

    def watched(self: Any, element: Any) -> Iterator[Any]:
        bundle = bundles[id(self)]
        yield from process(self, bundle.groups(element)) or ()
        bundle.elements += 1
        if bundle.elements == _WARM:
            bundle.grown = -_kept_bytes(self)

    def finish_bundle(self: Any) -> Any:
        bundle = bundles.pop(id(self))
        if bundle.elements >= _WARM:
            bundle.grown += _kept_bytes(self)
        with open(Path(folder, f"{step.__name__}-{os.getpid()}.jsonl"), "a") as file:
            file.write(json.dumps(asdict(bundle)) + "\n")
        return finish(self)

    step.start_bundle, step.process, step.finish_bundle = start_bundle, watched, finish_bundle


def _kept_bytes(step: Any) -> int:
    return len(pickle.dumps(vars(step)))


def noted(folder: Path) -> dict[str, list[Bundle]]:
    """Returns the bundles that workers noted, by step."""
    found = defaultdict[str, list[Bundle]](list)
    for path in folder.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        found[path.name.partition("-")[0]] += [Bundle(**json.loads(line)) for line in lines]
    return found


def main() -> None:
    folder, _, _, *rest = sys.argv[1:]  # -m and the module
    for step in steps():
        watch(step, folder)
    sys.argv[1:] = rest
    worker_boot.main()


if __name__ == "__main__":
    main()
