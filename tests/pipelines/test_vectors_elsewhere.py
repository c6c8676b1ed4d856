"""The lines of the page on vectors give each engine the published embeddings, and neighbours.

They run as they stand there, but for the folder, the item and the dimension, which are the shop's.
One shop is as usual, another has string IDs, days of another name and an encoder of 64 dimensions.
LanceDB and pgvector run where `make readers` has installed them, in an environment without COURIER.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.store import partitions
from feature_jobs.store.encoder_info import dimension_of
from feature_jobs.tables import open_night
from tests.conftest import Artefacts, pinned
from tests.support import postgres
from tests.support.commands import make_night
from tests.support.world import DAYS, LEAVES_ON_DAY_2, World, make_codebook, make_encoder
from tests.test_imports import ROOT

PAGE = (ROOT / "pipelines/docs/vectors.md").read_text()
OPENING, EXPORTS = "Vectors, there and back", "Vectors from there"
DAY = DAYS[1]
ITEM = 2
READERS = ROOT / ".venv-readers"
PYTHON = READERS / "bin/python"

without_readers = pytest.mark.skipif(
    not list(READERS.glob("lib/python*/site-packages/lancedb")),
    reason="`make readers` installs LanceDB and pgvector",
)


@dataclass(frozen=True)
class Shop:
    """Is a shop after two nights of items alone, on the second of which an item has left."""

    world: World
    dimension: int
    day: str

    @property
    def item(self) -> Any:
        return self.world.item(ITEM)

    def folder(self, table: str) -> str:
        return f"{self.world.root}/test/{table}/{self.day}"

    def lines(self, heading: str, language: str = "python", place: int = 0) -> str:
        """Returns a block of the page below a heading, with what is the shop's own."""
        section = PAGE.partition(f"# {heading}\n")[2].partition("\n## ")[0]
        found = re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[place]
        found = re.sub(r"\b42\b", repr(self.item), found).replace("256", str(self.dimension))
        if isinstance(self.item, str):
            found = found.replace("bigint", "text")
        # Last, since a path may have such numbers too.
        return re.sub(r"features/demo/(\w+)/ds=2026-01-07", lambda m: self.folder(m[1]), found)

    def published(self, table: str = "item_embeddings") -> list[dict[str, Any]]:
        """Returns the rows of the files that the manifest names."""
        found = partitions.open_published(self.folder(table))
        return pa.concat_tables(map(partitions.read_parquet, found.paths)).to_pylist()

    def vectors(self) -> dict[Any, list[float]]:
        """Returns the published vectors of the items in the catalogue."""
        return {r["item_id"]: r["embedding"] for r in self.published() if r["in_catalogue"]}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> Shop:
    return made(tmp_path_factory.mktemp("usual") / "shop", artefacts, 256, "int")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("other")
    encoder = make_encoder(folder / "encoders", dimension=64)
    artefacts = Artefacts(encoder, make_codebook(folder / "codebooks", encoder))
    output = '[output]\npartition = "dt={ds:%Y%m%d}"'
    return made(folder / "shop", artefacts, 64, "string", output)


def made(folder: Path, artefacts: Artefacts, dimension: int, ids: str, output: str = "") -> Shop:
    settings = f'tables = "items"\n{output}'
    world = pinned(World(folder, ids, rows_per_shard=4, extra_settings=settings), artefacts)
    for day in DAYS[:2]:
        make_night(world.settings(), day)
        world.write_images(DAYS[1])
    return Shop(world, dimension, f"dt={DAY:%Y%m%d}" if output else f"ds={DAY}")


@pytest.fixture(params=["usual", "other"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Gives each shop, to lines that write into a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return request.getfixturevalue(request.param)


def run(*lines: str) -> dict[str, Any]:
    """Runs lines one after another; returns the names that they leave."""
    names: dict[str, Any] = {}
    for some in lines:
        exec(some, names)
    return names


def check_nearest(shop: Shop, found: list[tuple[Any, float]]) -> None:
    """Asserts that these are the five nearest of the item, nearest first, with their cosines."""
    vectors = {item: np.array(vector, np.float64) for item, vector in shop.vectors().items()}
    this = vectors.pop(shop.item)
    cosines = {item: float(this @ vector) for item, vector in vectors.items()}
    wanted = sorted(cosines.values(), reverse=True)
    assert wanted[0] - wanted[5] > 0.01
    assert len({item for item, _ in found}) == 5
    assert [cosine for _, cosine in found] == pytest.approx(wanted[:5], abs=1e-5)
    assert [cosines[item] for item, _ in found] == pytest.approx(wanted[:5], abs=1e-5)


def check_export(shop: Shop, path: Path, of: pa.DataType) -> None:
    """Asserts that a table has the published vectors of items in the catalogue, as this type."""
    rows = pq.read_table(path)
    assert rows.column_names == ["item_id", "embedding"]
    assert rows["embedding"].type.equals(of)
    found = dict(zip(rows["item_id"].to_pylist(), rows["embedding"].to_pylist(), strict=True))
    wanted = shop.vectors()
    assert len(rows) == len(found)
    assert found.keys() == wanted.keys()
    exact = of.value_type == pa.float32()
    for item, vector in wanted.items():
        rounded = vector if exact else np.array(vector, np.float16).astype(float).tolist()
        assert found[item] == rounded


# ---- What is read ----------------------------------------------------------------------------


def test_the_opening_reads_the_items_in_the_catalogue_by_folder_or_paths(shop: Shop) -> None:
    former = {r["item_id"] for r in shop.published() if not r["in_catalogue"]}
    assert former == {shop.world.item(LEAVES_ON_DAY_2)}
    folder, opening = shop.folder("item_embeddings"), shop.lines(OPENING)
    night = open_night(str(shop.world.root), "test", "latest")["item_embeddings"]
    listed = Path(folder, "_files.txt").read_text().splitlines()
    assert len(listed) > 1
    for source in (folder, listed, night.paths):
        names = run(opening.replace(f'"{folder}"', repr(source)))
        found = dict(zip(names["ids"].to_pylist(), names["vectors"].to_pylist(), strict=True))
        assert found == shop.vectors()
        assert names["d"] == shop.dimension


def test_the_dimension_and_the_encoder_are_told_where_the_page_says(shop: Shop) -> None:
    manifest = json.loads(Path(shop.folder("item_embeddings"), "_manifest.json").read_text())
    (pin,) = shop.world.settings().pins
    encoder = json.loads(Path(pin.encoder, "encoder.json").read_text())
    for record in (manifest["settings"], encoder):
        assert record.get("dimension", 256) == dimension_of(record) == shop.dimension
    assert manifest["identities"]["encoder_id"] == encoder["encoder_id"]


def test_item_features_has_the_same_vectors_with_cluster_ids_but_zeros(shop: Shop) -> None:
    names = run(shop.lines(OPENING), shop.lines("With cluster IDs"), shop.lines("faiss"))
    assert names["index"].ntotal == len(names["rows"]) == len(names["ids"])
    assert shop.item in names["nearest"]
    found = {row["item_id"]: row for row in names["rows"].to_pylist()}
    published = {row["item_id"]: row for row in shop.published("item_features")}
    zeros = {item for item, row in published.items() if not any(row["embedding"])}
    assert zeros & shop.vectors().keys()  # out of scope, or of no category
    assert found.keys() == shop.vectors().keys() - zeros
    for item, row in found.items():
        assert row["embedding"] == shop.vectors()[item]
        assert row["cluster_id"] == published[item]["cluster_id"] > 0
    with duckdb.connect() as database:
        rows = database.sql(
            f"SELECT item_id FROM '{shop.folder('item_features')}/*.parquet'"
            " WHERE in_catalogue AND cluster_id > 0"
        ).fetchall()
    assert {item for (item,) in rows} == found.keys()


# ---- Engines ---------------------------------------------------------------------------------


def test_faiss_finds_the_neighbours_and_writes_half_floats(shop: Shop, tmp_path: Path) -> None:
    names = run(shop.lines(OPENING), shop.lines("faiss"), shop.lines(EXPORTS, place=2))
    assert names["nearest"][0] == shop.item
    cosines = names["cosines"][0].tolist()
    assert cosines[0] == pytest.approx(1)
    check_nearest(shop, list(zip(names["nearest"][1:], cosines[1:], strict=True)))
    check_export(shop, tmp_path / "vectors.parquet", pa.list_(pa.float16(), shop.dimension))


def test_duckdb_finds_the_neighbours_each_time_and_writes_lists(shop: Shop, tmp_path: Path) -> None:
    with duckdb.connect() as database:
        for _ in range(2):
            check_nearest(shop, database.sql(shop.lines("DuckDB", "sql")).fetchall())
        database.sql(shop.lines(EXPORTS, "sql"))
    check_export(shop, tmp_path / "vectors.parquet", pa.list_(pa.float32()))


def test_duckdb_refuses_another_dimension_than_the_encoders(shop: Shop) -> None:
    wrong = shop.lines("DuckDB", "sql").replace(f"FLOAT[{shop.dimension}]", "FLOAT[65]")
    with duckdb.connect() as database, pytest.raises(duckdb.ConversionException, match="65"):
        database.sql(wrong)


def by_readers(lines: list[str], found: str, variables: dict[str, str]) -> Any:
    """Runs lines where COURIER is not installed; returns what `found` is after them."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = "\n".join([*lines, f"import json\nprint(json.dumps({found}))"])
    done = subprocess.run(
        [PYTHON, "-c", script], env=outside | variables, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.readers
@without_readers
def test_lancedb_finds_the_neighbours_each_time_and_writes_lists_of_one_length(
    shop: Shop, tmp_path: Path
) -> None:
    lines = [shop.lines(OPENING), *[shop.lines("LanceDB")] * 2, shop.lines(EXPORTS)]
    rows = by_readers(lines, "nearest.select(['item_id', '_distance']).to_pylist()", {})
    check_nearest(shop, [(row["item_id"], 1 - row["_distance"]) for row in rows])
    check_export(shop, tmp_path / "vectors.parquet", pa.list_(pa.float32(), shop.dimension))


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with postgres.running(READERS) as variables:
        yield variables


@pytest.mark.readers
@without_readers
def test_pgvector_finds_the_neighbours_each_time_and_writes_lists(
    shop: Shop, tmp_path: Path, server: dict[str, str]
) -> None:
    query = f'psycopg.connect("dbname=shop").execute("""{shop.lines("pgvector", "sql")}""")'
    load = [shop.lines(OPENING), *[shop.lines("pgvector")] * 2]
    rows = by_readers([*load, shop.lines(EXPORTS, place=1)], f"{query}.fetchall()", server)
    check_nearest(shop, [(item, cosine) for item, cosine in rows])
    check_export(shop, tmp_path / "vectors.parquet", pa.list_(pa.float32()))
    wrong = load[1].replace(f"vector({shop.dimension})", "vector(65)")
    with pytest.raises(AssertionError, match=f"expected 65 dimensions, not {shop.dimension}"):
        by_readers([load[0], wrong], "1", server)
    assert by_readers(["import psycopg"], f"{query}.fetchall()", server) == rows  # still there
