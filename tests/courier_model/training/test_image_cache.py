"""The cache decodes once, never shows pixels of another list, and is shared by processes."""

import errno
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from courier_model import image_files
from courier_model.images import Preprocessing, decode
from courier_model.training import image_cache
from courier_model.training.image_cache import ImageCache
from feature_jobs.schemas import OperatorError
from feature_jobs.store import files
from tests.support.world import picture

SMALL = Preprocessing(32, 36, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
URIS = ["0.png", "1.png", "2.png", "again.png", "gone.png", None, "broken.png"]
GOOD = [True, True, True, True, False, False, False]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Writes three pictures, the bytes of one of them again, one undecodable; one is missing."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(picture(number))
    (images / "again.png").write_bytes(picture(1))
    (images / "broken.png").write_bytes(picture(3)[:100])
    return str(images)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each address was read."""
    counts: Counter[str] = Counter()
    read = image_files.read_image

    def count(uri: str | None, *rest: object) -> object:
        counts[str(uri)] += 1
        return read(uri, *rest)

    monkeypatch.setattr(image_cache, "read_image", count)
    return counts


def make(
    folder: Path | None, root: str, uris: list[str | None] = URIS, **changes: int
) -> ImageCache:
    preprocessing = Preprocessing(**{**SMALL.__dict__, **changes})
    return ImageCache(folder and str(folder), pa.array(uris, pa.string()), [root], preprocessing)


ALL = np.arange(len(URIS))


@pytest.mark.parametrize("cached", [True, False])
def test_images_are_read_as_squares_with_keys_and_bad_ones_as_zeros(
    cached: bool, root: str, tmp_path: Path
) -> None:
    cache = make(tmp_path / "cache" if cached else None, root)
    for _ in range(2):
        pixels, keys, good = cache.read(ALL[::-1])
        pixels, keys, good = pixels[::-1], keys[::-1], good[::-1]
        assert (pixels.shape, pixels.dtype) == ((7, 3, 36, 36), np.uint8)
        assert good.tolist() == GOOD
        for number in range(3):
            expected = decode(picture(number), SMALL.square())
            np.testing.assert_array_equal(pixels[number], expected)
        assert keys[3] == keys[1]
        assert len(set(keys[:3].tolist()) - {0}) == 3
        assert not keys[4:].any()
        assert not pixels[4:].any()


def test_an_image_is_decoded_once_and_only_when_it_is_asked_for(
    root: str, tmp_path: Path, decoded: Counter[str]
) -> None:
    cache = make(tmp_path / "cache", root)
    cache.read(np.array([2, 0, 2]))
    assert decoded == {"0.png": 1, "2.png": 1}
    cache.read(ALL)
    cache.read(ALL)
    assert set(decoded.values()) == {1}
    assert len(decoded) == len(URIS)


def test_another_run_decodes_only_what_was_bad(
    root: str, tmp_path: Path, decoded: Counter[str]
) -> None:
    before = make(tmp_path / "cache", root).read(ALL)
    decoded.clear()
    (Path(root) / "gone.png").write_bytes(picture(5))
    pixels, keys, good = make(tmp_path / "cache", root).read(ALL)
    assert decoded == {"gone.png": 1, "None": 1, "broken.png": 1}
    assert good.tolist() == [True, True, True, True, True, False, False]
    np.testing.assert_array_equal(pixels[:4], before[0][:4])
    np.testing.assert_array_equal(keys[:4], before[1][:4])


def test_without_a_folder_every_read_decodes(root: str, decoded: Counter[str]) -> None:
    cache = make(None, root)
    cache.read(ALL)
    cache.read(ALL)
    assert set(decoded.values()) == {2}


def test_a_folder_of_other_images_is_begun_anew(
    root: str, tmp_path: Path, decoded: Counter[str]
) -> None:
    folder = tmp_path / "cache"
    (tmp_path / "elsewhere").mkdir()
    make(folder, root).read(ALL)
    (folder / "notes.txt").write_text("not ours")
    for cache in (
        lambda: make(folder, root, resize_size=40),
        lambda: make(folder, root, [*reversed(URIS)], resize_size=40),
        lambda: make(folder, str(tmp_path / "elsewhere")),
    ):
        decoded.clear()
        pixels, _, good = cache().read(ALL)
        assert len(decoded) == len(URIS)
        np.testing.assert_array_equal(pixels.any(axis=(1, 2, 3)), good)
    assert (folder / "notes.txt").read_text() == "not ours"  # nothing else is deleted


def test_a_folder_that_was_left_half_made_is_begun_anew(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    make(folder, root).read(ALL)
    (folder / "identity.json").unlink()  # as a kill would leave it: the identity comes last
    (folder / "pixels").write_bytes(b"")
    assert make(folder, root).read(ALL)[2].tolist() == GOOD


def test_a_cache_that_another_run_took_over_is_refused(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first, opened = make(folder, root), make(folder, root)
    expected = opened.read(ALL)
    make(folder, root, URIS[:2]).read(ALL[:2])
    with pytest.raises(OperatorError, match="begun anew by another run"):
        first.read(ALL)
    for found, right in zip(opened.read(ALL), expected, strict=True):
        np.testing.assert_array_equal(found, right)  # it holds the old files open


def test_a_cache_travels_to_other_processes_without_its_pixels(
    root: str, tmp_path: Path, decoded: Counter[str]
) -> None:
    cache = make(tmp_path / "cache", root)
    expected = cache.read(ALL)
    decoded.clear()
    pickled = pickle.dumps(cache)
    assert len(pickled) < expected[0].nbytes / 4
    for found, right in zip(pickle.loads(pickled).read(ALL), expected, strict=True):  # noqa: S301
        np.testing.assert_array_equal(found, right)
    assert not decoded


def read_often(folder: str, root: str, seed: int, failed: "multiprocessing.Queue[bool]") -> None:
    cache = make(Path(folder), root, [f"{n % 3}.png" for n in range(60)])
    expected = [decode(picture(n), SMALL.square()) for n in range(3)]
    wrong = False
    for code in np.random.default_rng(seed).permutation(60):
        pixels, _, good = cache.read(np.array([code]))
        wrong |= not good[0] or not np.array_equal(pixels[0], expected[code % 3])
    failed.put(wrong)


def test_processes_that_race_see_whole_images_only(root: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failed = context.Queue()
    arguments = [(str(tmp_path / "cache"), root, seed, failed) for seed in range(4)]
    processes = [context.Process(target=read_often, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    assert [failed.get(timeout=60) for _ in processes] == [False] * 4
    for process in processes:
        process.join()


def test_faults_of_the_disk_are_raised_and_leave_no_bad_image(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make(tmp_path / "cache", root)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "the disk is ill")

    with monkeypatch.context() as ill:
        ill.setattr(files, "read_bytes", fail)
        with pytest.raises(OSError, match="the disk is ill"):
            cache.read(ALL)
    with monkeypatch.context() as ill:
        ill.setattr("os.pwrite", fail)  # as a full disk does
        with pytest.raises(OSError, match="the disk is ill"):
            cache.read(ALL)
    assert cache.read(ALL)[2].tolist() == GOOD


def test_the_room_that_a_cache_needs_is_known_before_images_are_read(
    root: str, tmp_path: Path
) -> None:
    cache = make(tmp_path / "cache", root)
    sizes = [(tmp_path / "cache" / name).stat() for name in ("pixels", "keys", "state")]
    assert cache.bytes_needed == sum(s.st_size for s in sizes) == 7 * (3 * 36 * 36 + 9)
    assert sum(s.st_blocks for s in sizes) == 0  # sparse until images are read
