"""Addresses become the places of files by their prefixes, whatever else they carry."""

import pyarrow as pa
import pytest

from feature_jobs.store.addresses import as_image_uris, is_web, rewrite

CDN = "https://cdn.shop.example/"


def rewritten(uri: str | None, *pairs: tuple[str, str]) -> str | None:
    (found,) = rewrite(pa.chunked_array([[uri]], pa.string()), pairs).to_pylist()
    return found


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        (f"{CDN}a/1.jpg", "gs://shop/a/1.jpg"),
        (f"{CDN}a/1.jpg?v=3&sig=SECRET#top", "gs://shop/a/1.jpg"),
        (f"{CDN}a%20b/%E4%BD%A0%3F.jpg?x=%20", "gs://shop/a b/你?.jpg"),
        (CDN, "gs://shop/"),
        ("https://cdn.shop.example.evil/1.jpg", "https://cdn.shop.example.evil/1.jpg"),
        ("https://other.example/1.jpg?v=1", "https://other.example/1.jpg?v=1"),
        ("a/1%20.jpg", "a/1%20.jpg"),
        (None, None),
    ],
)
def test_an_address_becomes_a_place(uri: str | None, found: str | None) -> None:
    assert rewritten(uri, (CDN, "gs://shop/")) == found


def test_the_first_prefix_that_fits_is_taken_once() -> None:
    pairs = [(f"{CDN}a/", "x/"), (CDN, f"{CDN}a/"), (f"{CDN}b/", "never/")]
    assert rewritten(f"{CDN}a/1.jpg", *pairs) == "x/1.jpg"
    assert rewritten(f"{CDN}b/1.jpg", *pairs) == f"{CDN}a/b/1.jpg"


def test_a_name_in_another_store_is_no_address_in_the_web() -> None:
    assert rewritten("s3://shop/a%20?.jpg", ("s3://shop/", "gs://shop/")) == "gs://shop/a%20?.jpg"
    assert rewritten("//cdn/a%20.jpg?v=1", ("//cdn/", "")) == "a .jpg"
    assert [is_web(uri) for uri in ("http://a", "//a", "/a", "gs://a", "a//b")] == [
        True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("chunks", [[], [[]], [["a", None], [], [f"{CDN}1", f"{CDN}2?x"]]])
def test_rows_keep_their_order_in_any_chunks(chunks: list[list[str | None]]) -> None:
    uris = pa.chunked_array(chunks, pa.string())
    found = rewrite(uris, [(CDN, "")])
    assert found.type == pa.string()
    assert found.to_pylist() == [u and u.removeprefix(CDN).split("?")[0] for u in uris.to_pylist()]
    assert rewrite(uris, []).equals(uris)


def test_a_folder_in_the_first_image_root_is_relative_to_it() -> None:
    roots = ["/shop/images", "/more"]
    pairs = [("https://a/", "/shop/images"), ("https://b/", "/shop/images/b"), ("c/", "/more/c")]
    assert as_image_uris(pairs, roots) == (
        ("https://a/", ""),
        ("https://b/", "b/"),
        ("c/", "/more/c/"),
    )
    assert as_image_uris([("https://a/", "gs://b/c")], roots) == (("https://a/", "gs://b/c/"),)
    assert as_image_uris([("https://a/", "/shop/images2")], roots) == (
        ("https://a/", "/shop/images2/"),
    )
