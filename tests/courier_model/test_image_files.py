"""An address reaches no file outside the roots, and an image is read or rejected with a reason."""

import os
from pathlib import Path

import pytest

from courier_model.image_files import Image, Rejected, find_image, locate, read_image
from courier_model.images import BadImage, Preprocessing
from feature_jobs.store import files
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
