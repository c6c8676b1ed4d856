"""In a chunk of images no file is read, no bytes decoded or embedded twice; nothing is mixed up."""

import functools
import hashlib
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from courier_model import encoder as encoders
from courier_model import image_files, inference
from courier_model.images import Preprocessing, decode
from courier_model.inference import Embedder, embed_images, results_schema
from courier_model.projection import EMBEDDING_DIM
from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import files, threads
from tests.conftest import Artefacts
from tests.support.world import CPU, picture

SMALL = Preprocessing(16, 16, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH, READERS = 4, 3
PAGE = b"<html>not found</html>"


class Shop:
    """Holds small images in a folder, what is done with them, and an encoder that takes no time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.read: list[str] = []
        self.decoded: list[bytes] = []
        self.batches: list[int] = []

    def put(self, uri: str, data: bytes) -> str:
        (self.folder / uri).write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        self.batches.append(len(pixels))
        return vectors_of(pixels)

    def results(
        self, uris: list[str], known: list[str | None] | None = None, **options: object
    ) -> list[dict]:
        arguments = {"embed": self.embed, "batch_size": BATCH, **options}
        rows = rows_of(uris, known)
        found = embed_images(rows, preprocessing=SMALL, roots=[str(self.folder)], **arguments)
        assert found.schema == results_schema(pa.int64())
        assert found["item_id"].to_pylist() == rows["item_id"].to_pylist()
        assert found["image_uri"].to_pylist() == uris
        return found.to_pylist()


def rows_of(uris: list[str], known: list[str | None] | None = None) -> pa.Table:
    return pa.table(
        {
            "item_id": np.arange(len(uris))[::-1] * 10,
            "image_uri": pa.array(uris, pa.string()),
            "known_sha256": pa.array(known or [None] * len(uris), pa.string()),
        }
    )


def vectors_of(pixels: np.ndarray) -> np.ndarray:
    """Gives different pixels different vectors, whatever batch they are in."""
    return pixels.reshape(len(pixels), -1)[:, :EMBEDDING_DIM].astype(np.float32) / 255


def vector_of(data: bytes) -> list[float]:
    return vectors_of(decode(data, SMALL)[None])[0].tolist()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop(tmp_path)
    read, decoded = files.read_bytes, image_files.decode

    def count_read(path: str, limit: int = -1) -> bytes:
        shop.read.append(Path(path).name)
        return read(path, limit)

    def count_decoded(data: bytes, preprocessing: Preprocessing) -> np.ndarray:
        shop.decoded.append(data)
        return decoded(data, preprocessing)

    monkeypatch.setattr(files, "read_bytes", count_read)
    monkeypatch.setattr(image_files, "decode", count_decoded)
    monkeypatch.setattr(inference, "_LOCAL_READERS", READERS)
    monkeypatch.setattr(threads, "budget", lambda: 1)
    return shop


# ---- Nothing twice ---------------------------------------------------------------------------


def test_the_same_bytes_under_several_addresses_are_decoded_and_embedded_once(shop: Shop) -> None:
    data = picture(1)
    uris = [f"{n}.png" for n in range(6)]
    for uri in uris:
        shop.put(uri, data)
    shop.put("other.png", picture(2))
    rows = shop.results([*uris[:3], "other.png", *uris[3:]])
    assert sorted(shop.read) == sorted([*uris, "other.png"])
    assert sorted(shop.decoded) == sorted([data, picture(2)])
    assert shop.batches == [2]
    same = [row for row in rows if row["image_uri"] != "other.png"]
    assert all(row["embedding"] == vector_of(data) for row in same)
    assert [row["is_embedded"] for row in same] == [True, *[False] * 5]
    assert all(row["is_read"] for row in rows)


def test_one_address_under_several_items_is_read_once(shop: Shop) -> None:
    shop.put("a.png", picture(1))
    shop.put("b.png", picture(2))
    rows = shop.results(["a.png", "b.png", "a.png", "a.png"])
    assert sorted(shop.read) == ["a.png", "b.png"]
    assert [row["is_read"] for row in rows] == [True, True, False, False]
    assert [row["bytes_read"] for row in rows] == [len(picture(1)), len(picture(2)), 0, 0]
    assert [row["is_embedded"] for row in rows] == [True, True, False, False]
    assert rows[0]["embedding"] == rows[2]["embedding"] == rows[3]["embedding"]


def test_known_bytes_are_read_but_neither_decoded_nor_embedded(shop: Shop) -> None:
    known, old = shop.put("same.png", picture(1)), hashlib.sha256(picture(5)).hexdigest()
    new = shop.put("changed.png", picture(2))
    rows = shop.results(["same.png", "changed.png"], [known, old])
    assert shop.decoded == [picture(2)]
    assert [row["image_sha256"] for row in rows] == [known, new]
    assert [row["embedding"] for row in rows] == [None, vector_of(picture(2))]
    assert [row["is_embedded"] for row in rows] == [False, True]
    assert [row["reason"] for row in rows] == [None, None]


def test_of_two_items_with_one_address_only_the_one_that_knows_the_bytes_goes_without(
    shop: Shop,
) -> None:
    known = shop.put("a.png", picture(1))
    rows = shop.results(["a.png", "a.png", "a.png"], [known, None, known])
    assert [row["embedding"] for row in rows] == [None, vector_of(picture(1)), None]
    assert [row["is_embedded"] for row in rows] == [False, True, False]
    assert shop.batches == [1]


def test_bytes_known_to_one_address_are_embedded_for_another_that_does_not_know_them(
    shop: Shop,
) -> None:
    known = shop.put("a.png", picture(1))
    shop.put("b.png", picture(1))
    rows = shop.results(["a.png", "b.png"], [known, None])
    assert [row["embedding"] for row in rows] == [None, vector_of(picture(1))]
    assert shop.decoded == [picture(1)]


def test_broken_bytes_under_two_addresses_reject_both_for_the_same_reason(shop: Shop) -> None:
    for uri in ("a.jpg", "b.jpg"):
        shop.put(uri, PAGE)
    shop.put("c.png", picture(1))
    rows = shop.results(["a.jpg", "c.png", "b.jpg", "a.jpg"])
    assert shop.decoded.count(PAGE) == 1
    bad = [row for row in rows if row["image_uri"] != "c.png"]
    assert {(r["stage"], r["reason"], r["embedding"]) for r in bad} == {
        ("decode", "not_an_image", None)
    }
    assert len({row["message"] for row in bad}) == 1
    assert all(bad[0]["message"] for row in bad)
    assert rows[1]["reason"] is None
    assert not any(row["is_embedded"] for row in bad)
    assert [row["is_read"] for row in rows] == [True, True, True, False]


# ---- Nothing mixed up ------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_every_item_gets_what_its_own_file_holds(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Compares good, known, repeated, broken and missing files in any order with one at a time."""
    shop = Shop(tmp_path_factory.mktemp("any"))
    contents = [*map(picture, range(1, 6)), PAGE, picture(1)[:60], None]
    held = data.draw(st.lists(st.sampled_from(contents), min_size=1, max_size=9))
    for number, content in enumerate(held):
        if content is not None:
            shop.put(f"{number}.png", content)
    numbers = data.draw(st.lists(st.integers(0, len(held) - 1), max_size=25))
    digests = [hashlib.sha256(content).hexdigest() for content in contents[:2]]
    known = [data.draw(st.sampled_from([None, *digests])) for _ in numbers]
    rows = shop.results([f"{n}.png" for n in numbers], known)
    for row, number, sha256 in zip(rows, numbers, known, strict=True):
        content = held[number]
        if content is None:
            assert (row["stage"], row["reason"]) == ("read", "missing")
            assert row["embedding"] is row["image_sha256"] is None
            continue
        assert row["image_sha256"] == hashlib.sha256(content).hexdigest()
        if content in contents[:5]:
            is_known = row["image_sha256"] == sha256
            assert row["embedding"] == (None if is_known else vector_of(content))
            assert row["reason"] is None
        else:
            wanted = "not_an_image" if content == PAGE else "truncated"
            assert (row["stage"], row["reason"], row["embedding"]) == ("decode", wanted, None)
    embedded = [row["image_sha256"] for row in rows if row["is_embedded"]]
    assert len(set(embedded)) == len(embedded) == sum(shop.batches)
    assert {r["image_sha256"] for r in rows if r["embedding"]} == set(embedded)
    assert all(size == BATCH for size in shop.batches[:-1])


def test_batches_are_whole_but_for_the_last(shop: Shop) -> None:
    uris = [f"{n}.png" for n in range(11)]
    for n, uri in enumerate(uris):
        shop.put(uri, PAGE if n == 3 else picture(n))
    rows = shop.results([*uris, "missing.png"])
    assert shop.batches == [4, 4, 2]
    for n, row in enumerate(rows[:-1]):
        assert row["embedding"] == (None if n == 3 else vector_of(picture(n)))


def test_every_image_gets_its_own_vector_whichever_pass_ends_first(shop: Shop) -> None:
    second_is_done = threading.Event()

    def embed(pixels: np.ndarray) -> np.ndarray:
        if (pixels[0] == decode(picture(0), SMALL)).all():
            assert second_is_done.wait(30)
        found = shop.embed(pixels)
        if (pixels[0] == decode(picture(BATCH), SMALL)).all():
            second_is_done.set()
        return found

    rows = shop.results(many(shop, 11), embed=embed, passes=2)
    assert [row["embedding"] for row in rows] == [vector_of(picture(n)) for n in range(11)]


def test_nothing_to_embed_calls_no_encoder(shop: Shop) -> None:
    assert shop.results([]) == []
    assert shop.results(["missing.png"])[0]["reason"] == "missing"
    assert shop.batches == []


# ---- What it cost ----------------------------------------------------------------------------


def test_the_work_is_told_once_for_each_file_and_for_each_embedding(shop: Shop) -> None:
    told: Counter[str] = Counter()
    known = shop.put("known.png", picture(1))
    for uri in ("a.png", "same-as-a.png"):
        shop.put(uri, picture(2))
    shop.put("page.jpg", PAGE)
    uris = ["a.png", "known.png", "same-as-a.png", "page.jpg", "a.png", "missing.png"]

    def slow(pixels: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        return shop.embed(pixels)

    rows = shop.results(
        uris, [None, known, None, None, None, None], embed=slow,
        tell=lambda **counts: told.update(counts),
    )  # fmt: skip
    assert sum(row["is_read"] for row in rows) == 4  # the missing one could not be read
    assert [row["bytes_read"] > 0 for row in rows[:3]] == [True] * 3
    assert sum(row["bytes_read"] for row in rows[:3]) == 2 * len(picture(2)) + len(picture(1))
    assert rows[4]["bytes_read"] == rows[4]["io_seconds"] == rows[4]["decode_seconds"] == 0
    assert all(0 < row["io_seconds"] < 10 for row in rows[:3])
    assert rows[0]["decode_seconds"] + rows[2]["decode_seconds"] > 0
    assert [row["is_embedded"] for row in rows] == [True, *[False] * 5]
    assert 0.05 <= rows[0]["forward_seconds"] < 5
    assert not any(row["forward_seconds"] for row in rows[1:])
    assert told["done"] == 6  # items, of five addresses
    assert (told["embedded"], told["rejected_missing"], told["rejected_not_an_image"]) == (1, 1, 1)
    assert told["reused"] == 2
    assert told["bytes"] == sum(row["bytes_read"] for row in rows)


# ---- Faults ----------------------------------------------------------------------------------


def many(shop: Shop, count: int) -> list[str]:
    uris = [f"{n}.png" for n in range(count)]
    for n, uri in enumerate(uris):
        shop.put(uri, picture(n))
    return uris


@pytest.mark.parametrize("passes", [1, 3])
def test_a_fault_of_the_encoder_is_raised_and_no_thread_is_left(shop: Shop, passes: int) -> None:
    def fail(pixels: np.ndarray) -> np.ndarray:
        raise RuntimeError("CUDA out of memory")

    uris, before = many(shop, 200), threading.active_count()
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        shop.results(uris, embed=fail, passes=passes)
    assert threading.active_count() == before
    assert len(shop.read) < 100


@pytest.mark.parametrize("fault", [StorageUnavailable("away"), OSError(5, "I/O"), MemoryError()])
def test_a_fault_of_the_disk_is_raised_and_no_thread_is_left(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    read = files.read_bytes

    def fail(path: str, limit: int = -1) -> bytes:
        if path.endswith("/9.png"):
            raise fault
        return read(path, limit)

    monkeypatch.setattr(files, "read_bytes", fail)
    uris, before = many(shop, 200), threading.active_count()
    with pytest.raises(type(fault)) as raised:
        shop.results(uris)
    assert raised.value is fault
    assert threading.active_count() == before
    assert len(shop.read) < 100


def settled(count: Callable[[], int]) -> int:
    """Returns what `count` gives once it has stopped to grow."""
    deadline, before = time.monotonic() + 30, -1
    while before != (before := count()):
        assert time.monotonic() < deadline
        time.sleep(0.25)
    return before


@pytest.mark.parametrize("passes", [1, 3])
def test_no_more_images_are_decoded_ahead_than_a_slow_encoder_needs(
    shop: Shop, passes: int
) -> None:
    """Each pass has a batch, four more are on their way, and each reader has a block."""
    stuck = threading.Event()

    def wait(pixels: np.ndarray) -> np.ndarray:
        stuck.wait(60)
        return shop.embed(pixels)

    uris = many(shop, 200)
    most = (passes + 4) * BATCH + (READERS + 1) * inference._LARGEST_BLOCK
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(shop.results, uris, embed=wait, passes=passes)
        try:
            assert (passes + 2) * BATCH < settled(lambda: len(shop.decoded)) <= most < 100
        finally:
            stuck.set()
        found = [row["embedding"] for row in rows.result()]
    assert found == [vector_of(picture(n)) for n in range(200)]


# ---- The encoder at work ---------------------------------------------------------------------


def test_an_encoder_is_loaded_once_however_many_threads_ask_for_it(
    artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = encoders.load_encoder, []

    def slow(folder: str) -> encoders.ImageEncoder:
        loaded.append(folder)
        time.sleep(0.1)
        return load(folder)

    monkeypatch.setattr(encoders, "load_encoder", slow)
    embedder = Embedder(artefacts.encoder, BATCH, "cpu")
    assert loaded == []  # workers that never embed never load it
    encoder = load(artefacts.encoder)
    pixels = np.stack([decode(picture(n), encoder.preprocessing) for n in range(8)])
    together = threading.Barrier(8)

    def ask(number: int) -> np.ndarray:
        together.wait(30)
        return embedder.embed(pixels[number : number + 1])

    with ThreadPoolExecutor(8) as pool:
        found = np.concatenate(list(pool.map(ask, range(8))))
    assert loaded == [artefacts.encoder]
    precision = encoders.choose_precision(CPU)
    assert embedder.kind_and_precision() == f"{encoders.kind_of(CPU)}_{precision}"
    expected = encoders.embed(encoder, pixels, BATCH, CPU, precision)
    np.testing.assert_allclose(found, expected, atol=1e-6 if precision == "fp32" else 2e-2)


def test_a_process_embeds_as_many_batches_at_once_as_its_budget_has_threads_each_on_one(
    artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "budget", lambda: 3)
    meet, others, seen = threading.Barrier(3, timeout=30), torch.get_num_threads(), []

    def embed(encoder: encoders.ImageEncoder, pixels: np.ndarray, *_: object) -> np.ndarray:
        meet.wait()
        seen.append((threading.get_ident(), torch.get_num_threads(), encoder))
        return np.zeros((len(pixels), EMBEDDING_DIM), np.float32)

    monkeypatch.setattr(encoders, "embed", embed)
    embedder = Embedder(artefacts.encoder, BATCH, "cpu")
    assert embedder.passes() == 3
    with ThreadPoolExecutor(9) as pool:  # as bundles of one process ask for more
        list(pool.map(embedder.embed, [np.zeros((1, 3, 32, 32), np.uint8)] * 9))
    idents, used, shared = map(set, zip(*seen, strict=True))
    assert (len(idents), used, len(shared)) == (3, {1}, 1)
    assert torch.get_num_threads() == others


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@functools.cache
def built(backbone: str) -> encoders.ImageEncoder:
    """Builds a network whose embeddings differ, so that comparing them means something."""
    encoder = encoders.build_encoder(backbone, "random", input_size=32)
    nn.init.normal_(encoder.backbone.get_submodule(encoder.head_name).weight)
    return encoder


@pytest.mark.parametrize("precision", encoders.PRECISIONS)
@pytest.mark.parametrize("backbone", ["swin_t", "resnet18", "resnet50"])
def test_an_embedding_depends_on_its_image_and_not_on_place_company_passes_or_threads(
    backbone: str, precision: str, monkeypatch: pytest.MonkeyPatch,
    torch_threads: Callable[[int], None],
) -> None:  # fmt: skip
    monkeypatch.setattr(encoders, "load_encoder", built)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)

    def embed(passes: int, of_torch: int, *batches: list[int]) -> np.ndarray:
        """Embeds batches of images, given by their places, at once."""
        torch_threads(of_torch)
        monkeypatch.setattr(threads, "budget", lambda: passes)
        embedder = Embedder(backbone, 3, "cpu", precision)
        with ThreadPoolExecutor(len(batches)) as pool:
            return np.concatenate(list(pool.map(lambda b: embedder.embed(images[b]), batches)))

    whole = embed(1, 1, [0, 1, 2], [3, 4, 5])
    assert np.abs(whole[0] - whole[1]).max() > 1e-3  # else anything would pass
    for passes, of_torch in ((2, 2), (3, 4)):
        found = embed(passes, of_torch, [3, 4, 5], [0, 1, 2])
        np.testing.assert_array_equal(found, whole[[3, 4, 5, 0, 1, 2]])
    # Some CPUs' products treat the last rows otherwise than those before: 2e-7 was seen in float32.
    # In bf16 none does that multiplies in float32; others were not looked at, and round to 2e-3.
    known = torch.cpu.get_capabilities()
    emulated = platform.machine() == "x86_64" and not (
        known.get("amx_bf16") or known.get("avx512_bf16")
    )
    close = 1e-6 if precision == "fp32" else 0 if emulated else 2e-3
    turned = [2, 4, 0, 5, 1, 3]
    np.testing.assert_allclose(embed(2, 2, turned[:3], turned[3:]), whole[turned], 0, close)
    np.testing.assert_allclose(embed(3, 4, [4], [2, 0], [1]), whole[[4, 2, 0, 1]], 0, close)


def test_the_images_of_a_shop_get_the_encoders_own_embeddings(
    shop: Shop, artefacts: Artefacts
) -> None:
    encoder = encoders.load_encoder(artefacts.encoder)
    uris = many(shop, 6)
    rows = embed_images(
        rows_of(uris), Embedder(artefacts.encoder, BATCH, "cpu").embed, encoder.preprocessing,
        [str(shop.folder)], BATCH,
    )  # fmt: skip
    pixels = np.stack([decode(picture(n), encoder.preprocessing) for n in range(6)])
    expected = encoders.embed(encoder, pixels, BATCH, CPU, encoders.choose_precision(CPU))
    np.testing.assert_allclose(rows["embedding"].to_pylist(), expected, atol=1e-6)
    assert pc.sum(rows["is_embedded"]).as_py() == 6
