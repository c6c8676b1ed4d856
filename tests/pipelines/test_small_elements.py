"""What Beam carries are references: no element grows with rows, and no job holds a manifest."""

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from apache_beam.pvalue import TaggedOutput

from feature_jobs.impressions.simscore import BROADCAST, SHUFFLE
from feature_jobs.items.embed import EmbedChunk
from feature_jobs.store.partitions import Partition
from pipelines.cli import main
from tests.support.watched_steps import steps

MOST = 4_000  # bytes of an element; a cluster's limit is a thousand times that
MOST_OF_AN_IMPRESSION = (
    64  # bytes, of all elements of its scoring together: with its history it has hundreds
)
ROWS = 2_000  # more of them than that is of each table
DAYS = [f"2026-01-{day:02d}" for day in range(1, 8)]
SHARED = "[simscore]\nembeddings_by = 'shuffle'\n"


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Returns the bytes of each element that any step has handed on, by step."""
    carried = defaultdict[str, list[int]](list)

    def measured(step: type, process: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def measure(self: Any, element: Any) -> Iterator[Any]:
            for one in process(self, element) or ():
                value = one.value if isinstance(one, TaggedOutput) else one
                carried[step.__name__].append(len(pickle.dumps(value)))
                yield one

        return measure

    for step in steps():
        monkeypatch.setattr(step, "process", measured(step, vars(step)["process"]))
    chunk = measured(EmbedChunk, EmbedChunk.embed_chunk)
    monkeypatch.setattr(EmbedChunk, "embed_chunk", chunk)
    return carried


@pytest.fixture
def slim_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses to send a table to workers with more than the names and rows of its files."""

    def reduce(self: Partition) -> tuple[Any, ...]:
        told = {name for file in self.manifest["files"] for name in file}
        assert set(self.manifest) == {"files"}, self.folder
        assert told <= {"name", "rows", "receipt"}
        return Partition, (self.folder, self.manifest)

    monkeypatch.setattr(Partition, "__reduce__", reduce)


@pytest.mark.usefixtures("slim_only")
def test_no_element_holds_rows_and_no_job_a_manifest(
    tmp_path: Path, carried: dict[str, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    shop = tmp_path / "shop"
    settings = shop / "courier.toml"

    def courier(command: str) -> None:
        assert main([*command.split(), "--config", str(settings)]) == 0

    def pin(command: str) -> None:
        capsys.readouterr()
        courier(command)
        settings.write_text(f"{settings.read_text()}\n{capsys.readouterr().out}")

    assert main(["demo", "--out", str(shop), "--items", "80", "--users", "150"]) == 0
    log = pq.read_table(shop / f"impressions/ds={DAYS[-1]}", partitioning=None)
    assert len(log) > ROWS
    settings.write_text(settings.read_text() + SHARED)
    pin("init-encoder --backbone shufflenet_v2_x0_5 --weights random --input-size 32")
    courier(f"training-rows --start-ds {DAYS[0]} --end-ds {DAYS[4]}")
    courier(f"embed --ds {DAYS[5]}")
    pin(f"fit-codebook --ds {DAYS[5]} --clusters 8")
    courier(f"refresh --ds {DAYS[6]}")
    pin(f"fit-codebook --ds {DAYS[6]} --clusters 9")
    samples = "impressions/ds={ds}/*.parquet"
    courier(f"join --ds {DAYS[6]} --samples {samples} --features-from same --time event_time")
    asked = set(carried)
    assert {"AskForItems", "AnswerForItems", "ReadClicks", "EmbedChunk", "TakeScores"} <= asked
    largest = {step: max(sizes) for step, sizes in carried.items()}
    assert {step: size for step, size in largest.items() if size > MOST} == {}
    for join in (BROADCAST, SHUFFLE):
        carried.clear()
        courier(f"simscore --ds {DAYS[6]} --embeddings-by {join} --remake")
        assert ("AskForItems" in carried) == (join == SHUFFLE)
        assert 0 < sum(map(sum, carried.values())) <= MOST_OF_AN_IMPRESSION * len(log)
