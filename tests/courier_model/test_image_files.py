"""An address reaches no file outside the roots, and an image is read or rejected with a reason."""

import errno
import functools
import os
from pathlib import Path
from typing import Any

import pytest

from courier_model import image_files
from courier_model.image_files import Image, Rejected, find_image, locate, read_image
from courier_model.images import BadImage, Preprocessing
from feature_jobs.schemas import StorageUnavailable
from feature_jobs.store import faults, files
from tests.support.ill_disk import watch_disk
from tests.support.world import picture

SMALL = Preprocessing(32, 36, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def roots(tmp_path: Path) -> tuple[str, ...]:
    for name in ("images", "other", "images-private"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(1))
    (tmp_path / "secret.png").write_bytes(picture(2))
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    return (str(tmp_path / "images"), str(tmp_path / "other"))


def test_an_address_is_found_below_the_first_root_or_by_its_path_below_any(
    roots: tuple[str, ...],
) -> None:
    assert locate("a.png", roots) == os.path.join(roots[0], "a.png")
    assert locate("./x/../a.png", roots) == os.path.join(roots[0], "a.png")
    assert locate(os.path.join(roots[1], "a.png"), roots) == os.path.join(roots[1], "a.png")


@pytest.mark.parametrize(
    "uri",
    [
        None, "", "../secret.png", "link.png", "/etc/passwd", "../images-private/a.png", ".",
        "https://shop.example/a.png", "s3://bucket/a.png", "file:///etc/passwd", "a\0.png",
    ],
)  # fmt: skip
def test_no_address_leads_out_of_the_roots(roots: tuple[str, ...], uri: str | None) -> None:
    with pytest.raises(BadImage) as refused:
        locate(uri, roots)
    assert refused.value.reason == "unsupported_uri"
    assert isinstance(read_image(uri, roots, SMALL), Rejected)


def test_the_whole_disk_may_be_a_root(roots: tuple[str, ...]) -> None:
    path = os.path.join(roots[0], "a.png")
    assert locate(path, ("/",)) == path


def test_a_file_that_is_too_large_is_not_read(
    roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.path.join(roots[0], "large.png"), "wb") as file:
        file.truncate(10**9)
    monkeypatch.setattr(files, "read_bytes", lambda *_: pytest.fail("was read"))
    found = read_image("large.png", roots, SMALL)
    assert isinstance(found, Rejected)
    assert found.reason == "too_many_bytes"


def test_addresses_in_a_bucket_are_joined_as_text_and_cannot_leave_their_root() -> None:
    bucket = ("gs://shop/images", "gs://shop/more")
    assert locate("a/./b/../c.png", bucket) == "gs://shop/images/a/c.png"
    assert locate("gs://other/a.png", bucket) == "gs://other/a.png"
    for uri in ("../private/a.png", "../images-private/a.png", "/a.png", "s3://x/a.png"):
        with pytest.raises(BadImage):
            locate(uri, bucket)


def test_a_folder_that_leads_out_of_the_roots_is_refused_a_link_within_them_is_not(
    roots: tuple[str, ...],
) -> None:
    top = Path(roots[0])
    (top / "out").symlink_to(top.parent / "images-private")
    (top / "within").symlink_to(roots[1])
    assert locate("within/a.png", roots) == os.path.join(roots[1], "a.png")
    with pytest.raises(BadImage):
        locate("out/a.png", roots)


def test_an_image_is_found_with_its_version_without_being_read(
    roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "read_bytes", lambda *_: pytest.fail("was read"))
    found = find_image("a.png", roots)
    assert isinstance(found, files.FileInfo)
    assert found.size == len(picture(1))
    assert found == files.stat(os.path.join(roots[0], "a.png"))
    gone = find_image("gone.png", roots)
    assert isinstance(gone, Rejected)
    assert (gone.stage, gone.reason) == ("read", "missing")


def test_an_image_is_read_with_its_digest_and_known_bytes_are_not_decoded(
    roots: tuple[str, ...],
) -> None:
    image = read_image("a.png", roots, SMALL)
    assert isinstance(image, Image)
    assert image.pixels is not None
    assert image.pixels.shape == (3, 32, 32)
    assert image.bytes_read == len(picture(1))
    again = read_image("a.png", roots, SMALL, lambda sha256: sha256 == image.sha256)
    assert isinstance(again, Image)
    assert again.pixels is None
    assert again.sha256 == image.sha256


@pytest.mark.parametrize(
    ("name", "data", "stage", "reason"),
    [
        ("none.png", None, "read", "missing"),
        ("a.png/b.png", None, "read", "missing"),
        ("folder", None, "read", "missing"),
        ("empty.png", b"", "read", "empty"),
        ("page.jpg", b"<html></html>", "decode", "not_an_image"),
        ("cut.png", picture(1)[:120], "decode", "truncated"),
        ("data:image/png;base64," + "A" * 5000, None, "read", "unsupported_uri"),
        ("/".join(["long"] * 2000), None, "read", "unsupported_uri"),
        ("loop.png", None, "read", "unsupported_uri"),
        ("pipe.png", None, "read", "missing"),
    ],
)
def test_a_bad_image_is_rejected_with_its_stage_and_reason(
    roots: tuple[str, ...], name: str, data: bytes | None, stage: str, reason: str
) -> None:
    (Path(roots[0]) / "folder").mkdir()
    (Path(roots[0]) / "loop.png").symlink_to("loop.png")
    os.mkfifo(Path(roots[0]) / "pipe.png")
    if data is not None:
        (Path(roots[0]) / name).write_bytes(data)
    found = read_image(name, roots, SMALL)
    assert isinstance(found, Rejected)
    assert (found.stage, found.reason) == (stage, reason)
    assert found.message


@pytest.mark.parametrize(
    ("error", "reason"), [(PermissionError, "forbidden"), (FileNotFoundError, "missing")]
)
def test_what_the_disk_says_of_the_file_is_a_reject(
    roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, error: type, reason: str
) -> None:
    def fail(_path: str, _limit: int) -> bytes:
        raise error

    monkeypatch.setattr(files, "read_bytes", fail)
    found = read_image("a.png", roots, SMALL)
    assert isinstance(found, Rejected)
    assert found.reason == reason


@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError, OSError(5, "I/O error")])
def test_a_fault_of_the_disk_is_raised_and_never_a_reject(
    roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, error: type | OSError
) -> None:
    def fail(_path: str, _limit: int) -> bytes:
        raise error

    monkeypatch.setattr(files, "read_bytes", fail)
    with pytest.raises(OSError):  # noqa: PT011 - the very fault that was planted
        read_image("a.png", roots, SMALL)


# ---- What is no property of the image --------------------------------------------------------

FAULTS = {
    "an error of the disk": errno.EIO,
    "a stale handle": errno.ESTALE,
    "a mount that lost its server": errno.ENOTCONN,
    "a server that does not answer": errno.ETIMEDOUT,
    "an expired ticket": errno.EKEYEXPIRED,
    "too many open files": errno.EMFILE,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.02)


@pytest.mark.parametrize("number", FAULTS.values(), ids=FAULTS)
@pytest.mark.usefixtures("impatient")
def test_a_fault_of_the_disk_or_the_mount_is_waited_for_and_rejects_no_image(
    roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = []

    def fail(what: str, path: str) -> None:
        calls.append(what)
        raise OSError(number, os.strerror(number), path)

    watch_disk(monkeypatch, fail)
    for look in (find_image, lambda uri, roots: read_image(uri, roots, SMALL)):
        calls.clear()
        with pytest.raises(StorageUnavailable, match="nothing was rejected or deleted"):
            look("a.png", roots)
        assert len(calls) > 1


@pytest.fixture
def linked(roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Gives a root that is a link, as on many a machine, to a process that has seen none yet."""
    link = Path(roots[0]).parent / "linked"
    link.symlink_to(roots[0])
    for name in ("_resolved", "_real_folder"):
        known = getattr(image_files, name).__wrapped__
        monkeypatch.setattr(image_files, name, functools.cache(known))
    return (str(link),)


def fail_at(patch: pytest.MonkeyPatch, name: str, number: int, times: int) -> None:
    """Makes looks at links of that name fail so many times, as os.path.realpath makes them too."""
    real, left = os.lstat, [times]

    def lstat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).endswith(name) and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), path)
        return real(path, *args, **kwargs)

    patch.setattr(os, "lstat", lstat)


@pytest.mark.parametrize("name", ["linked", "images", "link.png"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_link_that_cannot_be_read_for_a_moment_is_followed_all_the_same(
    linked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Else images seem to lie outside the roots, or one that does seems to lie below them."""
    monkeypatch.setattr(faults, "FIRST_WAIT_SECONDS", 0.001)
    fail_at(monkeypatch, name, number, times=1)
    good, outside = find_image("a.png", linked), find_image("link.png", linked)
    assert isinstance(good, files.FileInfo)
    assert isinstance(outside, Rejected)
    assert outside.reason == "unsupported_uri"


@pytest.mark.usefixtures("impatient")
def test_a_root_that_stays_unreadable_is_raised_and_forgotten(
    linked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        fail_at(away, "linked", errno.ESTALE, times=10**9)
        with pytest.raises(StorageUnavailable, match="Stale file handle"):
            find_image("a.png", linked)
    assert isinstance(find_image("a.png", linked), files.FileInfo)


def test_below_a_root_that_is_not_there_images_are_missing(tmp_path: Path) -> None:
    """As in an empty mount point: many at once are for the gates to tell."""
    found = find_image("a.png", (str(tmp_path / "none"),))
    assert isinstance(found, Rejected)
    assert found.reason == "missing"
