"""Makes shops whose items, addresses and images come and go, and runs EMBED's jobs on them.

Images and the encoder are stubs. The steps of a job are those of the pipeline, called one after the
other without Beam, since a run of Beam costs a second; `with_beam` runs the pipeline itself.
"""

import datetime as dt
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.pvalue import TaggedOutput

from courier_model import inference
from courier_model.image_files import Image, Rejected
from courier_model.images import Preprocessing
from courier_model.projection import EMBEDDING_DIM
from feature_jobs import inputs
from feature_jobs.inputs import CATALOGUE_COLUMNS
from feature_jobs.items import embed, embed_plan
from feature_jobs.items.embed import EmbedDay, EmbedJob
from feature_jobs.schemas import ITEM_EMBEDDINGS, ITEM_REJECTS
from feature_jobs.store import partitions, worker_notes
from feature_jobs.store.files import FileInfo

FIRST = dt.date(2026, 3, 1)
TABLES = (ITEM_EMBEDDINGS, ITEM_REJECTS)
SIDE = 32
PREPROCESSING = Preprocessing(SIDE, SIDE, "bilinear", (0.5,) * 3, (0.5,) * 3)
Parts = dict[str, bytes]

# ---- Images and an encoder -------------------------------------------------------------------


@dataclass(frozen=True)
class Stub:
    """Stands for a file: what it shows, None for bytes that are no image, and its time."""

    shows: int | None
    mtime_us: int = 0

    @property
    def size(self) -> int:
        return 100 + (self.shows or 0) % 3


@dataclass
class Stubs:
    """Holds the files that there are, and what was asked of them and of the encoder."""

    files: dict[str, Stub] = field(default_factory=dict)
    encoder: int = 0
    looked_at: list[str | None] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    given: list[tuple[int, str]] = field(default_factory=list)
    embedded: int = 0

    def forget(self) -> None:
        self.looked_at, self.read, self.given, self.embedded = [], [], [], 0

    def find(self, uri: str | None, roots: Any) -> FileInfo | Rejected:
        self.looked_at.append(uri)
        if uri is None:
            return Rejected("read", "unsupported_uri", "None is no path")
        if uri not in self.files:
            return Rejected("read", "missing", f"no {uri}")
        return FileInfo(uri, self.files[uri].size, mtime_us=self.files[uri].mtime_us)

    def read_image(
        self, uri: str, roots: Any, size: Any, skip_decoding: Callable[[str], bool]
    ) -> Image | Rejected:
        self.read.append(uri)
        file = self.files[uri]
        sha256 = hashlib.sha256(str(file.shows).encode()).hexdigest()
        if file.shows is None:
            return Rejected("decode", "not_an_image", "it shows nothing", sha256, file.size)
        pixels = np.full((3, SIDE, SIDE), file.shows, np.uint8)
        return Image(file.size, sha256, None if skip_decoding(sha256) else pixels, 0.0, 0.0)

    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        self.embedded += len(pixels)
        return np.eye(EMBEDDING_DIM, dtype=np.float32)[pixels[:, 0, 0, 0] + 100 * self.encoder]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        real = embed.embed_images

        def embed_images(rows: pa.Table, *args: Any) -> pa.Table:
            columns = (rows[name].to_pylist() for name in ("item_id", "image_uri"))
            self.given += zip(*columns, strict=True)
            return real(rows, *args)

        with (
            mock.patch.object(inference, "read_image", self.read_image),
            mock.patch.object(embed_plan, "find_image", self.find),
            mock.patch.object(inference.Embedder, "embed", self.vectors),
            mock.patch.object(embed, "embed_images", embed_images),
        ):
            yield


# ---- Jobs ------------------------------------------------------------------------------------


def _grouped(*pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    found = defaultdict(list)
    for some in pairs:
        for key, value in some:
            found[key].append(value)
    return found


def _outputs(found: Iterable[Any], tag: str | None) -> list[Any]:
    """Returns what was put out under a tag, None for the main output."""
    return [
        one.value if isinstance(one, TaggedOutput) else one
        for one in found
        if (one.tag if isinstance(one, TaggedOutput) else None) == tag
    ]


def without_beam(job: EmbedJob) -> None:
    """Runs the steps of `define_embed`, one after the other."""
    catalogues, groups = job.catalogues, []
    for number in sorted(set(catalogues)):
        groups += [(number, group) for group in job.days[number].catalogue.groups()]
    job = job.slim()

    def each(step: Any, elements: Iterable[Any]) -> list[Any]:
        return [found for element in elements for found in step.process(element) or ()]

    catalogue = each(embed.ReadCatalogue(job), groups)
    catalogue += [(shard, b"") for shard in range(job.shards)]
    planned = each(embed.PlanShard(job, catalogues), _grouped(catalogue).items())
    cut = each(embed.CutBucket(job), _grouped(_outputs(planned, None)).items())
    chunks, model = embed.EmbedChunk(job), embed.EmbedChunk(job).load_model()
    results = [x for one in _outputs(cut, None) for x in chunks.run_inference([one], model)]
    both = (catalogue, _outputs(planned, "seen"), [*results, *_outputs(cut, "kept")])
    named = [_grouped(some) for some in both]
    rows = each(
        embed.WalkShard(job, catalogues),
        [
            (
                shard,
                dict(zip(("catalogue", "seen", "results"), (n[shard] for n in named), strict=True)),
            )
            for shard in range(job.shards)
        ],
    )
    every = [((d, s), b"") for d, day in enumerate(job.days) for s in range(day.shards)]
    each(embed.WriteDay(job), _grouped(rows, every).items())


def with_beam(job: EmbedJob) -> None:
    with beam.Pipeline(runner="FnApiRunner") as root:
        embed.define_embed(root, job)


# ---- Shops -----------------------------------------------------------------------------------


@dataclass
class Shop:
    """Has catalogues of some days, in a folder, and stub images.

    The first `old` days are before the range that a test is about; after them files change. The
    range may begin with another encoder, other roots, or be one in which all is embedded again.
    """

    folder: Path
    catalogues: list[inputs.Source]
    shards: list[int]
    old: int
    stubs: Stubs
    later_files: dict[str, Stub]
    reuse: bool = True
    same_roots: bool = True
    full: bool = False
    window_days: int = 2
    run: Callable[[EmbedJob], None] = without_beam

    def staging(self, place: Path, day: int) -> Path:
        return place / f"day-{day}"

    def job(self, place: Path, days: range, before: Path | None = None) -> EmbedJob:
        """Returns the job of some days below `place`; the day before lies below `before`."""
        in_range, begins = days[0] >= self.old, days[0] == self.old
        previous = days[0] - 1
        found = None if previous < 0 else self.partitions_of(before or place, previous)
        kind = pa.int64()
        return EmbedJob(
            days=tuple(
                EmbedDay(FIRST + dt.timedelta(d), self.catalogues[d], self.shards[d],
                         str(self.staging(place, d)))
                for d in days
            ),
            embeddings_schema=ITEM_EMBEDDINGS.schema(kind),
            rejects_schema=ITEM_REJECTS.schema(kind),
            encoder_folder="", dimension=EMBEDDING_DIM, preprocessing=PREPROCESSING,
            image_roots=("/",), device="cpu", precision="auto", batch_size=4, chunk_items=3,
            window_days=self.window_days,
            previous_embeddings=found and found[0], previous_rejects=found and found[1],
            reuse=found is not None and (self.reuse or not begins),
            same_roots=found is not None and (self.same_roots or not begins),
            full=self.full and in_range,
            staging=str(place / f"job-{days[0]}"), chunks=str(place / f"chunks-{days[0]}"),
        )  # fmt: skip

    def partitions_of(self, place: Path, day: int) -> list[partitions.Partition]:
        folders = (str(self.staging(place, day) / table.name) for table in TABLES)
        return [partitions.Partition(f, {"files": partitions.receipts(f)}) for f in folders]

    def make_old_days(self) -> Path:
        """Makes the days before the range, a job a day; afterwards its images are there."""
        place = self.folder / "old"
        for day in range(self.old):
            self.make(place, range(day, day + 1))
        self.stubs.files = self.later_files
        self.stubs.encoder += not self.reuse
        self.stubs.forget()
        return place

    def make(self, place: Path, days: range, before: Path | None = None) -> None:
        job = self.job(place, days, before)
        with self.stubs.in_place():
            self.run(job)
        refused = worker_notes.refused(job.staging)
        if refused:
            raise refused[0]

    def parts(self, place: Path) -> Parts:
        """Returns the parts of both tables of all days below `place`."""
        paths = [p for p in place.glob("day-*/**/*") if p.is_file() and p.suffix != ".json"]
        return {str(path.relative_to(place)): path.read_bytes() for path in paths}

    def told(self, place: Path, day: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Returns the counts, the examples and the work of a day."""
        folder = str(self.staging(place, day) / ITEM_EMBEDDINGS.name)
        receipts = partitions.receipts(folder)
        counts, work = (partitions.sum_counts(receipts, what) for what in ("counts", "work"))
        return counts, partitions.first_examples(receipts), work


def catalogue(
    folder: Path, ds: dt.date, uris: dict[int, str | None], name: str = "{ds}"
) -> inputs.Source:
    """Writes a catalogue of these items with these addresses, in two files of two row groups."""
    rows = pa.table(
        {
            "item_id": pa.array(list(uris)[::-1], pa.int64()),
            "image_uri": pa.array(list(uris.values())[::-1], pa.string()),
            "category": pa.array(["coat" if n % 2 else None for n in uris], pa.string()),
        }
    )
    at = folder / "catalogue" / name.replace("{ds}", str(ds))
    if not at.exists():
        at.mkdir(parents=True)
        (at / "_SUCCESS").touch()
        half = len(rows) // 2
        for number, part in enumerate((rows.slice(0, half), rows.slice(half))):
            if len(part):
                size = max(1, len(part) // 2)
                pq.write_table(part, at / f"{number}.parquet", row_group_size=size)
    columns = {name: name for name in CATALOGUE_COLUMNS}
    return inputs.open_source("catalogue", str(folder / "catalogue" / name), ds, columns)


def random_shop(folder: Path, seed: int, days: int = 4) -> Shop:
    """Makes a shop in which much happens: items, addresses and images come and go."""
    rng = np.random.default_rng(seed)
    old = int(rng.integers(0, 4))
    addresses = [f"{n}.png" for n in range(10)]
    snapshot = rng.random() < 0.2
    empty = old + int(rng.integers(0, 2 * days))

    def some_files() -> dict[str, Stub]:
        kinds = rng.choice([0, 1, 2, 3], len(addresses), p=[0.6, 0.2, 0.2, 0.0])
        return {
            uri: Stub(None if kind == 1 else int(rng.integers(1, 6)), int(rng.integers(0, 3)))
            for uri, kind in zip(addresses, kinds, strict=True)
            if kind != 2
        }

    files = some_files()
    changed = some_files()
    later = {
        uri: other.get(uri)
        for uri in addresses
        for other in [changed if rng.random() < 0.4 else files]
    }
    uri_of = {n: addresses[int(rng.integers(len(addresses)))] for n in range(14)}
    catalogues = []
    for day in range(old + days):
        for item in uri_of:
            if rng.random() < 0.2:  # of two at most, so that it often is an earlier one again
                two = addresses[item % 5 : item % 5 + 2]
                uri_of[item] = two[int(rng.integers(2))]
        here = {n: None if n == 13 else uri for n, uri in uri_of.items() if rng.random() < 0.8}
        if day == empty:
            here = {}
        name = "all" if snapshot and day >= old else "{ds}"
        catalogues.append(catalogue(folder, FIRST + dt.timedelta(day), here, name))
    return Shop(
        folder, catalogues, [int(n) for n in rng.choice([1, 2, 4], old + days)], old,
        Stubs(files), {uri: file for uri, file in later.items() if file},
        reuse=rng.random() < 0.8, same_roots=rng.random() < 0.9, full=rng.random() < 0.2,
    )  # fmt: skip
