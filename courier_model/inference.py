"""Embeds a chunk of images, with reading, decoding and forward passes side by side.

Images are read and decoded ahead in threads, by four batches more than there are passes at most and
what the readers have in hand, so that memory does not grow with the chunk. Within a chunk no file
is read twice and no bytes are decoded or embedded twice.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from courier_model import encoder as encoders
from courier_model.image_files import Image, Rejected, read_image
from courier_model.images import Preprocessing
from feature_jobs.store import arrays, files, threads

_LOCAL_READERS = 2  # for each thread of the budget: reading waits on the disk, decoding on a core
_REMOTE_READERS = 64  # a small object takes a store tens of milliseconds, however many at once
_LARGEST_BLOCK = 8  # images that a reader takes at once: asking for one alone costs it more time

T = TypeVar("T")
Embed = Callable[[np.ndarray], np.ndarray]


class Embedder:
    """Loads an encoder at first use and embeds batches, several at once on a CPU.

    There a pass computes on one thread, and as many share the weights as the process may compute
    on: they are up to twice as fast as one pass on all cores, and an embedding does not depend on
    how many cores there are. A GPU gets one batch at a time.
    """

    def __init__(
        self, folder: str, batch_size: int, device: str = "auto", precision: str = "auto",
        pooled: bool = False,
    ) -> None:  # fmt: skip
        self._folder, self._batch_size, self._pooled = folder, batch_size, pooled
        self._device = encoders.choose_device(device)
        self._precision = encoders.choose_precision(self._device, precision)
        self._lock = threading.Lock()
        self._encoder: encoders.ImageEncoder | None = None
        self._threads: Executor | None = None

    def kind_and_precision(self) -> str:
        """Names hardware and precision as the counters do: cpu_amd_avx2_fp32, cuda_…_bf16, …"""
        return f"{encoders.kind_of(self._device)}_{self._precision}"

    def passes(self) -> int:
        """Returns how many batches it embeds at once, whoever gives them; others wait."""
        return 1 if self._device.type == "cuda" else threads.budget()

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Embeds uint8 `[n, 3, S, S]` as float32 unit vectors `[n, D]`, see `encoder.embed`.

        Where it is `pooled`, it returns what the encoder's head gets instead, `[n, features]`.
        """
        return self._own_threads().submit(self._embed, pixels).result()

    def _own_threads(self) -> Executor:
        with self._lock:
            if self._threads is None:
                alone = None if self._device.type == "cuda" else partial(threads.keep_to_one, torch)
                self._threads = ThreadPoolExecutor(self.passes(), "pass", alone)
            return self._threads

    def _embed(self, pixels: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._encoder is None:
                self._encoder = encoders.load_encoder(self._folder)
                if self._pooled:
                    self._encoder.leave_out_head()
        compute = encoders.pool if self._pooled else encoders.embed
        return compute(self._encoder, pixels, self._batch_size, self._device, self._precision)


@dataclass
class _Forward:
    """Collects pixels to whole batches and embeds these while the next ones are collected.

    `passes` are at work at once, in the threads of `pool`, and one more batch is ready meanwhile.
    """

    embed: Embed
    batch_size: int
    pool: Executor
    passes: int
    rows: dict[str, int] = field(default_factory=dict)  # digest -> row of the vectors
    seconds: float = 0.0
    _told: float = 0.0
    _adding: threading.Lock = field(default_factory=threading.Lock)  # to the seconds
    _waiting: list[np.ndarray] = field(default_factory=list)
    _running: deque[Future[np.ndarray]] = field(default_factory=deque)
    _done: list[np.ndarray] = field(default_factory=list)

    def add(self, sha256: str, pixels: np.ndarray) -> None:
        self.rows[sha256] = len(self.rows)
        self._waiting.append(pixels)
        if len(self._waiting) == self.batch_size:
            self._start()

    def vectors(self) -> np.ndarray:
        """Returns float32 [images, D or features], in the order in which they were added."""
        if self._waiting:
            self._start()
        while self._running:
            self._done.append(self._running.popleft().result())
        if not self._done:
            return np.empty((0, 0), np.float32)
        return np.concatenate(self._done)

    def untold(self) -> float:
        """Returns the seconds of forward passes since this was last asked."""
        before, self._told = self._told, self.seconds
        return self._told - before

    def _start(self) -> None:
        batch, self._waiting = np.stack(self._waiting), []
        while len(self._running) > self.passes:
            self._done.append(self._running.popleft().result())
        self._running.append(self.pool.submit(self._timed, batch))

    def _timed(self, batch: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        found = self.embed(batch)
        with self._adding:
            self.seconds += time.perf_counter() - started
        return found


def embed_images(
    rows: pa.Table,
    embed: Embed,
    preprocessing: Preprocessing,
    roots: Sequence[str],
    batch_size: int,
    tell: Callable[..., None] = lambda **counts: None,
    passes: int = 1,
) -> pa.Table:
    """Reads and embeds the images of `rows` (item_id, image_uri, known_sha256).

    `known_sha256` is the digest of the bytes whose embedding is there already, or null. Returns one
    row for each of `rows`, in their order, with these columns besides item_id and image_uri:

    - `image_sha256` of the bytes; `stage`, `reason` and `message` of a reject, else null;
    - `embedding` float32 [D], null for a reject and for the known bytes;
    - `is_read` bool, `bytes_read` int: of the first row of each address that was read, else 0;
    - `io_seconds`, `decode_seconds`: of the same rows, 0 for rejects (not measured);
    - `is_embedded` bool, `forward_seconds`: of the first row of each digest embedded, else 0.

    `tell` is told now and then what was done: done, embedded, reused, rejected_<reason>, bytes, and
    the seconds of each kind. `embed` is asked for so many `passes` at once, each in its thread.
    Raises what `read_image` and `embed` raise.
    """
    uris = rows["image_uri"].to_pylist()
    known = _known_by_uri(uris, rows["known_sha256"].to_pylist())
    owner: dict[str, str] = {}  # digest -> the address that its bytes are decoded for

    def look(uri: str) -> Image | Rejected:
        def skip_decoding(sha256: str) -> bool:
            return sha256 == known[uri] or owner.setdefault(sha256, uri) != uri

        return read_image(uri, roots, preprocessing, skip_decoding)

    remote = any(files.is_remote(uri) for uri in (*roots, *uris[:1]))
    readers = _REMOTE_READERS if remote else _LOCAL_READERS * threads.budget()
    items_of, images = Counter(uris), dict[str, Image | Rejected]()
    with _pool(readers) as pool, _pool(passes) as forwards:
        forward = _Forward(embed, batch_size, forwards, passes)
        for block in _ahead(pool, look, list(known), readers, 2 * batch_size):
            done = sum(items_of[uri] for uri in block)
            tell(done=done, forward_seconds=forward.untold(), **_counts(block.values()))
            for uri, image in block.items():
                if isinstance(image, Image) and image.pixels is not None:
                    forward.add(image.sha256, image.pixels)
                    image.pixels = None
                images[uri] = image
        vectors = forward.vectors()
    tell(forward_seconds=forward.untold())
    return _results(rows, images, forward, vectors)


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[Executor]:
    """Opens threads that, after an error, begin nothing more of what was asked of them."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _known_by_uri(uris: Sequence[str], known: Sequence[str | None]) -> dict[str, str | None]:
    """Maps each address to the digest that all its items know, None where it is none or several."""
    found: dict[str, str | None] = {}
    for uri, sha256 in zip(uris, known, strict=True):
        found[uri] = sha256 if found.get(uri, sha256) == sha256 else None
    return found


def _ahead(
    pool: Executor, look: Callable[[str], T], uris: Sequence[str], readers: int, ahead: int
) -> Iterator[dict[str, T]]:
    """Yields what `look` finds at each address, in order, a block at a time.

    At most a block for each reader and `ahead` images besides are in work or waiting.
    """
    size = max(1, min(_LARGEST_BLOCK, len(uris) // (4 * readers)))
    running: deque[Future[dict[str, T]]] = deque()
    for at in range(0, len(uris), size):
        block = uris[at : at + size]
        running.append(pool.submit(lambda block: {uri: look(uri) for uri in block}, block))
        if len(running) > readers + ahead // size:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _counts(images: Iterable[Image | Rejected]) -> dict[str, float]:
    found: Counter[str] = Counter()
    seconds = {"io_seconds": 0.0, "decode_seconds": 0.0}
    for image in images:
        found["bytes"] += image.bytes_read
        if isinstance(image, Rejected):
            found[f"rejected_{image.reason}"] += 1
        else:
            seconds["io_seconds"] += image.io_seconds
            seconds["decode_seconds"] += image.decode_seconds
            found["reused" if image.pixels is None else "embedded"] += 1
    return {**found, **seconds}


# ---- The results as a table ----------------------------------------------------------------


def results_schema(item_id: pa.DataType) -> pa.Schema:
    """Returns the schema of the table that `embed_images` returns."""
    return pa.schema(
        {
            "item_id": item_id,
            "image_uri": pa.string(),
            "image_sha256": pa.string(),
            "stage": pa.string(),
            "reason": pa.string(),
            "message": pa.string(),
            "embedding": pa.list_(pa.float32()),
            "is_read": pa.bool_(),
            "bytes_read": pa.int64(),
            "io_seconds": pa.float64(),
            "decode_seconds": pa.float64(),
            "is_embedded": pa.bool_(),
            "forward_seconds": pa.float64(),
        }
    )


def _results(
    rows: pa.Table, images: Mapping[str, Image | Rejected], forward: _Forward, vectors: np.ndarray
) -> pa.Table:
    """Builds the table of `embed_images` of distinct images and the vectors of distinct bytes."""
    uris, known = rows["image_uri"].to_pylist(), rows["known_sha256"].to_pylist()
    broken: dict[str, Image | Rejected] = {
        i.sha256: i for i in images.values() if isinstance(i, Rejected) and i.sha256
    }
    found = [images[uri] for uri in uris]
    is_new = [image.sha256 != sha for image, sha in zip(found, known, strict=True)]
    place = [
        forward.rows.get(image.sha256) if new and image.sha256 else None
        for image, new in zip(found, is_new, strict=True)
    ]
    # The same bytes elsewhere were decoded in place of these, and in vain.
    found = [
        broken.get(image.sha256 or "", image) if new else image
        for image, new in zip(found, is_new, strict=True)
    ]
    is_read = _is_first(pa.array(uris, pa.string())) & np.array(
        [image.sha256 is not None for image in found], bool
    )
    places = pa.array(place, pa.int64())
    embedded = _is_first(places)

    def of_image(name: str) -> np.ndarray:
        return is_read * np.array([getattr(image, name, 0) for image in found])

    def of_reject(name: str) -> list[str | None]:
        return [getattr(image, name, None) for image in found]

    schema = results_schema(rows["item_id"].type)
    embeddings = arrays.list_column(vectors, schema.field("embedding").type)
    columns = {
        "item_id": rows["item_id"],
        "image_uri": rows["image_uri"],
        "image_sha256": [image.sha256 for image in found],
        **{name: of_reject(name) for name in ("stage", "reason", "message")},
        "embedding": embeddings.take(places),
        "is_read": is_read,
        **{name: of_image(name) for name in ("bytes_read", "io_seconds", "decode_seconds")},
        "is_embedded": embedded,
        "forward_seconds": embedded * (forward.seconds / max(1, len(vectors))),
    }
    return pa.table(columns, schema=schema)


def _is_first(values: pa.Array) -> np.ndarray:
    """Tells which values stand there for the first time, bool [n]; a null never does."""
    codes = values.dictionary_encode().indices.fill_null(-1).to_numpy()
    _, first = np.unique(codes, return_index=True)
    found = np.zeros(len(values), bool)
    found[first] = True
    return found & (codes >= 0)
