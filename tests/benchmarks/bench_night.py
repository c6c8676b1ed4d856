"""How fast a night is, beside the bare loops that it wraps. Run by `make bench`.

    python tests/benchmarks/bench_night.py [--backbone swin_t] [--images 160] [--photos DIR]

EMBED is measured against a bare torch loop over the same files (torchvision's own transform, the
same batch, the same threads), as function and as whole job. SIMSCORE is measured as a whole job,
Parquet in and out, against a numpy loop user by user with everything in memory, which is the limit.
"""

import argparse
import datetime as dt
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from PIL import Image

from courier_model.encoder import ImageEncoder, build_encoder, save_encoder
from feature_jobs import embed, hashing, tables
from feature_jobs.codebook import Codebook, CodebookInfo, codebook_id, save_codebook
from pipelines.config import load_settings
from pipelines.demo import Shop, make_shop
from pipelines.nightly import run_night
from pipelines.plan import plan_night

BATCH = 8
DAY = dt.date(2026, 1, 5)
HISTORY, DIM, PER_USER = 50, 256, 5


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- EMBED -------------------------------------------------------------------------------------


def bare_loop(encoder: ImageEncoder, paths: list[str]) -> np.ndarray:
    """What a user would write: open, transform, stack, forward, normalise."""
    transform = torchvision.models.Swin_T_Weights.IMAGENET1K_V1.transforms()
    if encoder.backbone_name != "swin_t":
        size = encoder.preprocessing
        transform.crop_size, transform.resize_size = [size.input_size], [size.resize_size]
    found = []
    with torch.inference_mode():
        for at in range(0, len(paths), BATCH):
            images = [Image.open(p).convert("RGB") for p in paths[at : at + BATCH]]
            batch = torch.stack([transform(image) for image in images])
            found.append(torch.nn.functional.normalize(encoder.backbone(batch), dim=1))
    return torch.cat(found).numpy()


def bench_embed(folder: Path, backbone: str, count: int, photos: Path | None) -> None:
    root = photos or folder / "shop" / "images"
    files = sorted(p for p in root.rglob("*.jpg") if readable(p))[:count]
    count = len(files) // BATCH * BATCH  # whole batches, so that padding costs neither side
    uris = [str(p.relative_to(root)) for p in files[:count]]
    paths = [str(root / uri) for uri in uris]
    encoder = build_encoder(backbone, "random")
    rows = pa.table(
        {
            "item_id": np.arange(count),
            "image_uri": uris,
            "known_sha256": pa.nulls(count, pa.string()),
        }
    )
    bare_loop(encoder, paths[:BATCH])
    ratios = {"embed_images": [], "job": []}
    for _ in range(3):  # in turn, since shared machines drift
        bare = count / timed(lambda: bare_loop(encoder, paths))
        ours = count / timed(lambda: embed.embed_images(rows, encoder, (str(root),), BATCH))
        job = count / timed(embed_job(folder, root, uris, encoder))
        ratios["embed_images"].append(ours / bare)
        ratios["job"].append(job / bare)
        print(f"  bare loop {bare:8.1f}  embed_images {ours:8.1f}  whole job {job:8.1f}  images/s")
    for name, values in ratios.items():
        print(f"  {name} / bare loop: median {np.median(values):.2f}")


def readable(path: Path) -> bool:
    try:
        Image.open(path).load()
        return True
    except OSError:
        return False


def embed_job(folder: Path, root: Path, uris: list[str], encoder: ImageEncoder) -> Callable:
    """The night's first stage, in a new folder."""
    top = Path(tempfile.mkdtemp(dir=folder))
    info = save_encoder(encoder, str(top), "bench", None, None, None, "random")
    write_catalogue(top, uris)
    settings = write_settings(top, str(root), top / info.encoder_id, None)
    night = plan_night(load_settings(settings), DAY, ["embed"])
    return lambda: run_night(night, [], lambda _: None)


# ---- SIMSCORE ------------------------------------------------------------------------------------


def bench_simscore(folder: Path, impressions: int, items: int) -> None:
    """The scoring job with logged histories: reading, scoring, writing."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(items, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    users = impressions // PER_USER
    histories = rng.integers(0, items, (users, HISTORY))
    shown = rng.integers(0, items, (users, PER_USER))
    limit = impressions / timed(lambda: user_by_user(vectors, histories, shown))
    print(f"  numpy, user by user, in memory: {limit:12,.0f} impressions/s")
    top = Path(tempfile.mkdtemp(dir=folder))
    settings = make_tables(top, vectors, histories, shown)
    night = plan_night(load_settings(settings), DAY, ["simscore"])
    scoring = next(stage for stage in night.stages if stage.name == "simscore")
    report = run_night(night, [], lambda _: None)
    seconds = report["seconds"]["simscore"]
    ours = scoring.input_rows / seconds
    print(f"  whole job, Parquet to Parquet:  {ours:12,.0f} impressions/s ({seconds} s)")
    print(f"  job / numpy user by user: {ours / limit:.2f}")


def user_by_user(vectors: np.ndarray, histories: np.ndarray, shown: np.ndarray) -> list[np.ndarray]:
    return [vectors[s] @ vectors[h].T for h, s in zip(histories, shown, strict=True)]


def make_tables(top: Path, vectors: np.ndarray, histories: np.ndarray, shown: np.ndarray) -> str:
    """A shop whose embeddings and features are published already, by hand."""
    users = len(histories)
    write_catalogue(top, ["x"] * len(vectors))
    time_us = np.int64(dt.datetime.combine(DAY, dt.time(12), dt.UTC).timestamp() * 1e6)
    rows = users * PER_USER
    lists = tables.list_column(np.repeat(histories, PER_USER, axis=0), pa.list_(pa.int64()))
    write(
        top / "impressions" / str(DAY),
        pa.table(
            {
                "user_id": np.repeat(np.arange(users), PER_USER),
                "item_id": shown.reshape(-1),
                "event_time": pa.array(np.full(rows, time_us)).cast(pa.timestamp("us", "UTC")),
                "clicked": np.zeros(rows, bool),
                "history": lists,
            }
        ),
    )
    encoder = build_encoder("shufflenet_v2_x0_5", "random", input_size=32)
    info = save_encoder(encoder, str(top), "bench", None, None, None, "random")
    book = save_book(top, vectors[:64], info.encoder_id)
    settings = write_settings(top, str(top), top / info.encoder_id, book)
    publish_items(settings, vectors)
    return settings


def save_book(top: Path, centres: np.ndarray, encoder_id: str) -> str:
    numbers = np.arange(1, len(centres) + 1, dtype=np.int32)
    info = CodebookInfo(
        codebook_id("bench", centres, numbers, encoder_id), encoder_id, None, len(centres),
        len(centres), "by hand", 0, 0, 0, "", 0.0, (), "2026-01-01", "2026-01-01",
    )  # fmt: skip
    return save_codebook(str(top), Codebook(info, centres, numbers))


def publish_items(settings: str, vectors: np.ndarray) -> None:
    """Runs the item stages with an embedding stage that takes `vectors` instead of images."""
    from pipelines import runs

    night = plan_night(load_settings(settings), DAY, ["embed", "item-features"])
    stage = night.stages[0]
    hashes = hashing.shard_of(hashing.hash_ids(pa.array(np.arange(len(vectors)))), stage.shards)
    for shard in range(stage.shards):
        rows = np.flatnonzero(hashes == shard)
        write_shard(stage, vectors[rows], rows, shard)
    for table in stage.tables:
        runs.seal(stage, table)
    run_night(night, [], lambda _: None)


def write_shard(stage: object, vectors: np.ndarray, rows: np.ndarray, shard: int) -> None:
    embeddings, rejects = stage.tables
    schema = embeddings.schema(pa.int64())
    n = len(rows)
    columns = {name: pa.nulls(n, schema.field(name).type) for name in schema.names}
    columns |= {
        "item_id": pa.array(rows),
        "embedding": tables.list_column(vectors, pa.list_(pa.float32())),
        "category": pa.array(["a"] * n),
        "in_catalogue": pa.array(np.ones(n, bool)),
        "image_uri": pa.array(["x"] * n),
        "image_size": pa.array(np.zeros(n, np.int64)),
        "image_sha256": pa.array([""] * n),
    }
    counts = {"catalogue_items": n, "former_items": 0}
    top = os.path.join(stage.staging, embeddings.name)
    tables.write_part(top, embeddings, schema, pa.table(columns), shard, stage.shards, counts)
    schema = rejects.schema(pa.int64())
    top = os.path.join(stage.staging, rejects.name)
    nothing = schema.empty_table()
    tables.write_part(top, rejects, schema, nothing, shard, stage.shards)


# ---- What both need --------------------------------------------------------------------------


def write(folder: Path, rows: pa.Table) -> None:
    folder.mkdir(parents=True)
    pq.write_table(rows, folder / "0.parquet", row_group_size=65_536)


def write_catalogue(top: Path, uris: list[str]) -> None:
    n = len(uris)
    rows = {"item_id": np.arange(n), "image_uri": uris, "category": ["a"] * n}
    write(top / "catalogue", pa.table(rows))


def write_settings(top: Path, images: str, encoder: Path, codebook: str | None) -> str:
    path = top / "courier.toml"
    pin = f"[[pins]]\nfrom_ds = 2026-01-02\nencoder = '{encoder}'\n"
    path.write_text(
        f'root = "features"\n[catalogue]\npath = "catalogue"\nimage_roots = ["{images}"]\n'
        f'[impressions]\npath = "impressions/{{ds}}"\n[embed]\nbatch_size = {BATCH}\n{pin}'
        + (f"codebook = '{codebook}'\n" if codebook else "")
    )
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="swin_t")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--impressions", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=100_000)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{dt.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.photos is None:
            make_shop(folder / "shop", Shop(items=given.images + 20))
        print(f"EMBED, {given.backbone}, batch {BATCH}, {given.images} images")
        bench_embed(folder, given.backbone, given.images, given.photos)
        print(f"SIMSCORE, L = {HISTORY}, {given.impressions:,} impressions, {given.items:,} items")
        bench_simscore(folder, given.impressions, given.items)


if __name__ == "__main__":
    main()
