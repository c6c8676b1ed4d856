"""`courier init` finds where images lie, and tells what the night would refuse of them."""

from pathlib import Path

import pyarrow as pa
import pytest

from feature_jobs.schemas import OperatorError
from pipelines.first_look import images
from pipelines.first_look.look import FirstLook, look_again
from tests.support.buckets import upload
from tests.support.first_look import (
    ITEMS,
    Shop,
    catalogue,
    draw,
    noted,
    only_problem,
    problems,
)


def test_images_are_found_around_the_catalogue_and_read(shop: Shop) -> None:
    first = shop.write().look()
    assert noted(first, "images: read below images; give --images where that is wrong")
    assert any("all 64 sampled can be read and decoded" in f.text for f in first.findings)


def test_relative_images_that_lie_nowhere_near_are_a_problem(tmp_path: Path) -> None:
    far = tmp_path / "far"
    draw(far)
    shop = Shop(tmp_path / "a/shop").write()
    first = shop.look()
    assert "are below none of the folders around the catalogue" in only_problem(first)
    assert 'image_roots = [""]  # REQUIRED' in first.toml
    with pytest.raises(OperatorError, match="image_roots"):
        shop.settings(first)
    assert problems(shop.look(str(far))) == []


def test_images_may_lie_in_a_parent_of_the_catalogue(tmp_path: Path) -> None:
    draw(tmp_path)
    first = Shop(tmp_path).write().look()
    assert problems(first) == []
    assert 'image_roots = ["."]' in first.toml


def test_the_whole_file_system_is_never_guessed() -> None:
    assert images._candidates("/shop") == ["/shop", "/shop/images", "/images"]


def test_image_folders_that_are_given_are_written_in_their_order(shop: Shop) -> None:
    (shop.folder / "more").mkdir()
    first = shop.write().look(str(shop.folder / "images"), str(shop.folder / "more"))
    assert problems(first) == []
    assert 'image_roots = ["images", "more"]' in first.toml


def test_absolute_images_lie_below_their_common_folder(tmp_path: Path) -> None:
    draw(tmp_path / "pictures/of/items")
    uris = [f"{tmp_path}/pictures/of/items/{i}.png" for i in range(ITEMS)]
    first = Shop(tmp_path, catalogue(image_uri=pa.array(uris))).write().look()
    assert problems(first) == []
    assert 'image_roots = ["pictures/of/items"]' in first.toml


def test_absolute_images_without_a_common_folder_need_to_be_told(shop: Shop) -> None:
    shop.catalogue["image_uri"] = pa.array([f"/{i}/a.png" for i in range(ITEMS)])
    assert "Give the folder that they are relative to" in only_problem(shop.write().look())


# ---- Addresses -----------------------------------------------------------------------------


def with_addresses(shop: Shop, beginning: str, end: str = ".png") -> Shop:
    shop.catalogue["image_uri"] = pa.array([f"{beginning}{i}{end}" for i in range(ITEMS)])
    return shop.write()


def test_addresses_without_files_are_a_problem_told_without_their_signature(shop: Shop) -> None:
    first = with_addresses(shop, "https://cdn.example.com/x/", ".jpg?sig=SECRET").look()
    found = only_problem(first)
    assert "64 of 64 sampled image_uri are addresses" in found
    assert 'rewrite = [["https://cdn.example.com/", "gs://shop-images/"]]' in found
    assert "SECRET" not in found + first.toml
    assert '# rewrite = [["https://cdn.example.com/", "gs://…"]]  # REQUIRED' in first.toml
    with pytest.raises(OperatorError, match="image_roots"):
        shop.settings(first)


@pytest.mark.parametrize(
    ("beginning", "rewrite"),
    [
        ("https://cdn.example.com/", '["https://cdn.example.com/", "images"]'),
        ("http://cdn.example.com/", '["http://cdn.example.com/", "images"]'),
        ("//cdn.example.com/", '["//cdn.example.com/", "images"]'),
        ("s3://old-bucket/", '["s3://old-bucket/", "images"]'),
        ("https://cdn.example.com/p/v2/", '["https://cdn.example.com/p/v2/", "images"]'),
        ("https://cdn.example.com/images/", '["https://cdn.example.com/", "."]'),
    ],
)
def test_files_of_addresses_are_found_around_the_catalogue(
    shop: Shop, beginning: str, rewrite: str
) -> None:
    end = ".png" if beginning.startswith("s3:") else ".png?v=3&sig=SECRET"
    first = with_addresses(shop, beginning, end).look()
    assert problems(first) == []
    assert f"\nrewrite = [{rewrite}]\n" in first.toml
    assert noted(first, "by [catalogue] rewrite; nothing is fetched")
    assert any("all 64 sampled can be read" in f.text for f in first.findings)
    settings = shop.settings(first)
    roots, uris = settings.catalogue.image_roots, shop.catalogue["image_uri"].to_pylist()
    assert images.Images(roots, settings.catalogue.rewrite).uris(uris[:1])[0].endswith("0.png")


def test_files_of_addresses_are_looked_for_in_the_folder_that_is_given(
    shop: Shop, bucket: str
) -> None:
    upload(shop.folder / "images", f"{bucket}/pictures/a")
    first = with_addresses(shop, "https://cdn.example.com/a/").look(f"{bucket}/pictures")
    assert problems(first) == []
    assert f'rewrite = [["https://cdn.example.com/", "{bucket}/pictures"]]' in first.toml
    assert f'image_roots = ["{bucket}/pictures"]' in first.toml
    assert shop.settings(first).catalogue.image_uri_pairs == (("https://cdn.example.com/", ""),)


def test_a_pair_that_fits_no_image_uri_is_not_noted(shop: Shop) -> None:
    first = with_addresses(shop, "https://cdn.example.com/").look()
    other = '["https://old.example.com/", "images"], ["https://cdn.example.com/", "images"]'
    text = first.toml.replace('["https://cdn.example.com/", "images"]', other)
    settings = shop.settings(FirstLook((), text))
    again = FirstLook(look_again(settings, str(shop.folder)), "")
    assert noted(again, "files of https://cdn.example.com/… are read below images")
    assert not noted(again, "https://old.example.com/")


def test_the_beginning_of_a_server_ends_where_a_folder_does(shop: Shop) -> None:
    shop.catalogue["image_uri"] = pa.array(["https://cdn.example.com"] * ITEMS)
    found = only_problem(shop.write().look())
    assert 'rewrite = [["https://cdn.example.com/", "gs://shop-images/"]]' in found


def test_one_of_several_servers_may_have_no_files(shop: Shop) -> None:
    uris = [f"https://{'ab'[i % 2]}.example/{i}.png" for i in range(50)]
    shop.catalogue["image_uri"] = pa.array(uris + [f"{i}.png" for i in range(50, 99)] + [None])
    for i in range(1, 50, 2):
        (shop.folder / f"images/{i}.png").unlink()
    first = shop.write().look()
    (found,) = problems(first)
    assert "sampled image_uri are addresses (for example 'https://b.example/" in found
    assert '\nrewrite = [["https://a.example/", "images"]]\n' in first.toml
    line = '# rewrite = [["https://a.example/", "images"], ["https://b.example/", "gs://…"]]  # REQ'
    assert line in first.toml
    assert shop.settings(first).catalogue.image_uri_pairs == (("https://a.example/", ""),)


# ---- What is wrong with images -------------------------------------------------------------


def test_images_that_cannot_be_used_are_told_with_reason_and_example(shop: Shop) -> None:
    uris = [None, *shop.catalogue["image_uri"][1:60].to_pylist()]
    shop.catalogue = {name: column[:60] for name, column in shop.catalogue.items()}
    shop.catalogue["image_uri"] = pa.array(uris)
    for i in range(1, 60, 2):
        (shop.folder / f"images/{i}.png").write_bytes(b"<html>not found</html>")
    (shop.folder / "images/2.png").unlink()
    found = problems(shop.write().look(str(shop.folder / "images")))[-1]
    assert "28 of 60 sampled can be read and decoded; 1 unsupported uri (for example None)" in found
    assert "30 not an image (for example '1.png')" in found
    assert "1 missing (for example '2.png')" in found
    assert "raise the limits of rejects" in found


def test_a_few_bad_images_are_noted_only(shop: Shop) -> None:
    for i in range(0, ITEMS, 50):
        (shop.folder / f"images/{i}.png").write_bytes(b"")
    first = shop.write().look()
    assert problems(first) == []
    assert noted(first, "empty (for example '", "listed as rejects")


@pytest.mark.parametrize(("every", "told"), [(20, ""), (4, "note"), (1, "problem")])
def test_many_items_with_the_same_bytes_are_told_as_a_placeholder(
    shop: Shop, every: int, told: str
) -> None:
    shop.write()
    for i in range(0, ITEMS, every):
        (shop.folder / f"images/{i}.png").write_bytes((shop.folder / "images/7.png").read_bytes())
    first = shop.look()
    found = [f for f in first.findings if "the very same picture, byte for byte" in f.text]
    assert [f.level for f in found] == ([told] if told else [])
    assert len(problems(first)) == (told == "problem")
    if found:
        assert "of 64 that can be decoded" in found[0].text
        assert "leave the image_uri of such items null" in found[0].text
    if told == "problem":
        assert found[0].text.startswith("images: 64 of 64 ")
        assert "the limits of balance" in found[0].text


def test_the_same_images_are_sampled_again(shop: Shop) -> None:
    shop.write()
    assert shop.look() == shop.look()
