"""What `courier init` writes for a shop makes a night as it is, whoever wrote the shop's tables."""

import datetime as dt
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.store import day_names
from pipelines import stages
from pipelines.cli import main
from pipelines.config import load_settings
from pipelines.nightly import plan_nights
from tests.conftest import Artefacts
from tests.support.world import DAYS, picture

Capture = pytest.CaptureFixture[str]
PICTURES = (1, 2, 3, 12)  # of which the centres are made
ITEMS = 20
ROWS = 60
UTC = pa.timestamp("us", "UTC")
CDN = "https://cdn.shop.example/p/"


def catalogue(beginning: str = "", end: str = ".png") -> pa.Table:
    numbers = [PICTURES[n % 4] for n in range(ITEMS)]
    return pa.table(
        {
            "item_id": pa.array(range(ITEMS)),
            "image_uri": [f"{beginning}{number}{end}" for number in numbers],
            "category": ["dress"] * ITEMS,
        }
    )


def impressions(day: dt.date) -> pa.Table:
    midnight = dt.datetime.combine(day, dt.time(), dt.UTC)
    times = [midnight + dt.timedelta(minutes=n) for n in range(ROWS)]
    return pa.table(
        {
            "user_id": pa.array([f"user-{n % 5}" for n in range(ROWS)]),
            "item_id": pa.array([n % ITEMS for n in range(ROWS)]),
            "event_time": pa.array(times, UTC),
            "clicked": pa.array([n % 3 == 0 for n in range(ROWS)]),
        }
    )


def write(path: Path, rows: pa.Table, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, **options)


# ---- How engines write -----------------------------------------------------------------------


def plain(path: Path, rows: pa.Table) -> None:
    write(path, rows)


def spark(path: Path, rows: pa.Table) -> None:
    """INT96 times, a `_SUCCESS`, and hidden checksums beside the files."""
    write(path, rows, use_deprecated_int96_timestamps=True, compression="snappy")
    for name in ("_SUCCESS", "._SUCCESS.crc", f".{path.name}.crc"):
        (path.parent / name).touch()


def polars(path: Path, rows: pa.Table) -> None:
    """Large strings, or views of strings, and times of nanoseconds."""
    large = pa.string_view() if "category" in rows.column_names else pa.large_string()
    kinds = {pa.string(): large, UTC: pa.timestamp("ns", "UTC")}
    fields = [field.with_type(kinds.get(field.type, field.type)) for field in rows.schema]
    write(path, rows.cast(pa.schema(fields)), compression="zstd")


def duckdb(path: Path, rows: pa.Table) -> None:
    """No schema of Arrow's, and the partition's column in the files too."""
    day = pa.array([DAYS[0]] * len(rows), pa.date32())
    write(path, rows.append_column("ds", day), store_schema=False)


def pandas(path: Path, rows: pa.Table) -> None:
    """The index as a column, pandas' own description of the table, categories as numbers."""
    frame = rows.to_pandas().sample(frac=1, random_state=1)
    for name in {"category", "user_id"} & set(frame.columns):
        frame[name] = frame[name].astype("category")
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path)
    assert "__index_level_0__" in pq.read_schema(path).names


SHOPS = {
    "Hive": ("ds={ds}/000000_0", plain),
    "compact": ("dt={ds:%Y%m%d}/part-0.parquet", plain),
    "parts": ("year={ds:%Y}/month={ds:%-m}/day={ds:%-d}/part-0.parquet", plain),
    "CDN": ("dt={ds}/part-0.parquet", plain),
    "Spark": ("dt={ds}/part-00000-3f2a-c000.snappy.parquet", spark),
    "polars": ("ds={ds}/00000000.parquet", polars),
    "DuckDB": ("ds={ds}/data_0.parquet", duckdb),
    "pandas": ("{ds}.pq", pandas),
}


def make_shop(folder: Path, kind: str) -> None:
    name, engine = SHOPS[kind]
    for day in DAYS[:2]:
        path = day_names.name_of(name, day)
        items = catalogue(CDN, ".png?v=3") if kind == "CDN" else catalogue()
        engine(folder / "catalogue" / path, items)
        engine(folder / "log" / path, impressions(day))
    (folder / "images").mkdir()
    for number in PICTURES:
        (folder / "images" / f"{number}.png").write_bytes(picture(number))


@pytest.mark.parametrize("kind", SHOPS)
def test_what_init_writes_makes_a_night(
    tmp_path: Path, artefacts: Artefacts, capsys: Capture, kind: str
) -> None:
    make_shop(tmp_path, kind)
    tables = ["--catalogue", f"{tmp_path}/catalogue", "--impressions", f"{tmp_path}/log"]
    config = tmp_path / "courier.toml"
    assert main(["init", *tables, "--out", str(config)]) == 0
    problems = re.findall("^problem .*", capsys.readouterr().out, re.MULTILINE)
    if kind == "Spark":  # INT96 has no zone
        (problem,) = problems
        assert (
            'Set input_timezone under [impressions], for example input_timezone = "UTC"' in problem
        )
        text = config.read_text().replace('# input_timezone = "UTC"', 'input_timezone = "UTC"')
        config.write_text(text)
    else:
        assert problems == []
    assert main(["init", "--check", str(config)]) == 0
    pin = f"[[pins]]\nfrom_ds = {DAYS[0]}\nencoder = '{artefacts.encoder}'\n"
    config.write_text(f"{config.read_text()}\n{pin}codebook = '{artefacts.codebook}'\n")
    assert main(["refresh", "--config", str(config), "--ds", str(DAYS[1])]) == 0
    top = tmp_path / "features/production"
    scores = pq.read_table(top / f"user_simscores/ds={DAYS[1]}", partitioning=None)
    assert scores.num_rows == ROWS
    assert max(scores["sim_known"].to_pylist()) > 1
    embedded = pq.read_table(top / f"item_embeddings/ds={DAYS[1]}", partitioning=None)
    assert embedded["item_id"].to_pylist() == list(range(ITEMS))
    assert set(embedded["image_uri"].to_pylist()) == {f"{number}.png" for number in PICTURES}


def test_a_run_knows_where_addresses_lead_as_the_settings_spell_it(
    tmp_path: Path, artefacts: Artefacts
) -> None:
    def run_id(folder: Path, rewrite: str) -> str:
        config = folder / "courier.toml"
        config.write_text(
            'root = "features"\n[catalogue]\npath = "catalogue"\nimage_roots = ["images", "more"]\n'
            f'{rewrite}\n[impressions]\npath = "log/{{ds}}.pq"\n'
            f"[[pins]]\nfrom_ds = {DAYS[0]}\nencoder = '{artefacts.encoder}'\n"
        )
        night = plan_nights(load_settings(str(config)), [DAYS[0]], [stages.EMBED], lambda _: None)[
            0
        ]
        (stage,) = night.stages
        return stage.run_id

    folders = [tmp_path / "here", tmp_path / "moved"]
    for folder in folders:
        write(folder / "catalogue/items.pq", catalogue(CDN))
    spelt = ["", *(f'rewrite = [["{CDN}", "{to}"]]' for to in ("images", "./images", "more/a"))]
    here, moved = ([run_id(folder, rewrite) for rewrite in spelt] for folder in folders)
    assert len(set(here)) == len(spelt)
    assert moved == here
