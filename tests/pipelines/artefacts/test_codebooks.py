"""`courier fit-codebook` prints, writes, continues and refuses what it should, on a tiny shop."""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_jobs.codebooks.codebook import CodebookInfo, load_codebook, read_codebook_info
from feature_jobs.schemas import OperatorError
from feature_jobs.store import files
from pipelines.artefacts import codebooks
from pipelines.cli import main
from pipelines.running import cluster_jobs
from tests.conftest import Artefacts
from tests.support.commands import Capture, courier, manifest, paragraph, published, refresh
from tests.support.world import DAYS, World, catalogue_items, make_encoder, picture

ITEMS = 60  # of the catalogue on every day, beside the usual ones


def copied(world: World, tmp_path: Path) -> World:
    """Copies the shop into a folder of its own.

    It lies as deep, so that relative paths lead on.
    """
    mine = copy.deepcopy(world)
    mine.folder = Path(shutil.copytree(world.folder, tmp_path / "shop"))
    return mine


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts) -> World:
    """Makes a world with enough items to cluster.

    The first day is embedded, no codebook is pinned.
    """
    world = World(tmp_path_factory.mktemp("embedded") / "shop", rows_per_shard=40)
    world.pin(DAYS[0], artefacts.encoder)
    for number in range(100, 100 + ITEMS):
        world.put(number, picture(number, 30 + number % 7))
    for day in DAYS:
        world.write_catalogue(day, [*catalogue_items(day), *range(100, 100 + ITEMS)])
    assert courier(world, "embed", "--ds", str(DAYS[0])) == 0
    return world


@pytest.fixture(scope="module")
def published_night(embedded: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Copies the embedded world, pins a codebook in it and publishes the second day."""
    world = copied(embedded, tmp_path_factory.mktemp("night"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert courier(world, "fit-codebook", "--ds", str(DAYS[0]), "--clusters", "8") == 0
    world.pins.append(printed.getvalue())
    assert refresh(world, DAYS[1]) == 0
    return world


@pytest.fixture
def shop(embedded: World, tmp_path: Path) -> World:
    return copied(embedded, tmp_path)


@pytest.fixture
def night(published_night: World, tmp_path: Path) -> World:
    return copied(published_night, tmp_path)


def fit(world: World, capsys: Capture, *args: str, ds: int = 0) -> tuple[str, str]:
    """Fits a codebook; returns the stanza that was printed, and what was told."""
    capsys.readouterr()
    assert courier(world, "fit-codebook", "--ds", str(DAYS[ds]), *args) == 0
    told = capsys.readouterr()
    return told.out, told.err


def refused(world: World, capsys: Capture, status: int, *args: str, ds: int = 0) -> str:
    capsys.readouterr()
    assert courier(world, "fit-codebook", "--ds", str(DAYS[ds]), *args) == status
    return paragraph(capsys)


def folder_of(world: World, stanza: str) -> Path:
    (pin,) = tomllib.loads(stanza)["pins"]
    return world.folder / pin["codebook"]


def info_of(world: World, stanza: str) -> CodebookInfo:
    return read_codebook_info(str(folder_of(world, stanza)))


def crosswalk_of(world: World, stanza: str) -> pa.Table:
    return pq.read_table(folder_of(world, stanza) / "crosswalk.parquet")


# ---- The first codebook ------------------------------------------------------------------------


def test_several_resolutions_become_columns_of_the_night(shop: World, capsys: Capture) -> None:
    before = shop.config.read_text()
    stanza, told = fit(shop, capsys, "--clusters", "coarse=2,main=8")
    assert shop.config.read_text() == before  # the pin is the operator's to add
    info = info_of(shop, stanza)
    assert (info.mode, info.parent, info.labels) == ("fresh", None, ("main", "coarse"))
    assert "main: 8 of 8 clusters used" in told
    assert re.search(r"samples [\d,]+ of 68 items; about [\d.,]+ [MG]B and \d+ s", told)
    assert not (folder_of(shop, stanza) / "crosswalk.parquet").exists()
    assert not list((shop.root / "_staging").rglob("*.parquet"))
    shop.pins.append(stanza)
    assert refresh(shop, DAYS[1]) == 0
    rows = shop.table("item_features", DAYS[1])
    assert set(rows["cluster_id"].to_pylist()) == set(range(9))
    assert set(rows["cluster_coarse"].to_pylist()) == {0, 1, 2}
    clusters = manifest(shop, "item_features", DAYS[1])["clusters"]
    for label, column in (("main", "cluster_id"), ("coarse", "cluster_coarse")):
        sizes = np.bincount(rows[column].to_numpy())[1:]
        assert clusters[label]["items"] == sizes.sum()
        assert clusters[label]["items_max"] == sizes.max()


def test_the_same_fit_again_gives_the_same_codebook(shop: World, capsys: Capture) -> None:
    first, _ = fit(shop, capsys, "--clusters", "8")
    folder = folder_of(shop, first)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    again, _ = fit(shop, capsys, "--clusters", "8")
    assert again == first
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    other, _ = fit(shop, capsys, "--clusters", "8", "--seed", "1")
    assert folder_of(shop, other) != folder


def test_a_dry_run_tells_what_it_takes_and_writes_nothing(shop: World, capsys: Capture) -> None:
    before = {path for path in shop.folder.rglob("*") if path.is_file()}
    stanza, _ = fit(shop, capsys, "--clusters", "fine=20,main=8", "--dry-run")
    assert "lloyd, fresh; clusters: fine 20, main 8; samples " in stanza
    assert tomllib.loads(stanza) == {}  # appended to the settings it does no harm
    assert refused(shop, capsys, 2, "--clusters", "8", "--dry-run", "--", "--no_such_option=1")
    assert {path for path in shop.folder.rglob("*") if path.is_file()} == before


def test_a_single_pass_reads_every_item(shop: World, capsys: Capture) -> None:
    arguments = ("--clusters", "8", "--algorithm", "single-pass", "--soft-threshold", "0.01")
    stanza, told = fit(shop, capsys, *arguments)
    info = info_of(shop, stanza)
    assert (info.algorithm, info.soft_threshold) == ("single-pass", 0.01)
    assert "reads all" in told
    centres = load_codebook(str(folder_of(shop, stanza))).centres["main"]
    assert 0 < (centres == 0).mean() < 1  # the threshold made them sparse


# ---- Another one after it ----------------------------------------------------------------------


def test_a_later_fit_continues_the_pinned_codebook_and_tells_what_moved(
    night: World, capsys: Capture
) -> None:
    parent = info_of(night, night.pins[1])
    stanza, told = fit(night, capsys, "--clusters", "8", ds=1)
    info = info_of(night, stanza)
    assert (info.mode, info.ancestors) == ("warm", (parent.codebook_id,))
    (resolution,) = info.resolutions
    table = crosswalk_of(night, stanza)
    shares = table.group_by("old_cluster_id").aggregate(
        [("item_share", "sum"), ("impression_share", "sum")]
    )
    assert sorted(shares["old_cluster_id"].to_pylist()) == list(range(1, 9))
    for column in ("item_share_sum", "impression_share_sum"):
        np.testing.assert_allclose(shares[column].to_numpy(), 1.0)
    assert f"moved {resolution.moved_items:.1%} of items" in told
    expected = crosswalk_by_hand(night, stanza)
    found = {
        (row["old_cluster_id"], row["new_cluster_id"]): (row["items"], row["impressions"])
        for row in table.to_pylist()
        if row["items"]
    }
    assert found == expected
    assert any(impressions for _, impressions in found.values())


def crosswalk_by_hand(world: World, stanza: str) -> dict[tuple[int, int], tuple[int, int]]:
    """Counts items and impressions of the second day by old and new number, row by row."""
    log = world.folder / "impressions" / f"ds={DAYS[1]}"
    shown = pq.read_table(log, partitioning=None)["item_id"].to_pylist()
    rows = world.table("item_features", DAYS[1]).to_pylist()
    book = load_codebook(str(folder_of(world, stanza)))
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for row in rows:
        if row["cluster_id"] and row["in_catalogue"]:
            vector = np.array(row["embedding"], "f4")
            place = ((book.centres["main"] - vector) ** 2).sum(axis=1).argmin()
            pair = row["cluster_id"], int(book.numbers["main"][place])
            items, impressions = found.get(pair, (0, 0))
            found[pair] = items + 1, impressions + shown.count(row["item_id"])
    return found


def test_rows_of_a_model_follow_the_items_to_a_later_fit(night: World, capsys: Capture) -> None:
    stanza, _ = fit(night, capsys, "--clusters", "8", "--mode", "fresh", ds=1)
    rows = np.random.default_rng(0).normal(size=(9, 4))
    np.save(night.folder / "rows.npy", rows)
    ends = ["--from", str(folder_of(night, night.pins[1])), "--to", str(folder_of(night, stanza))]
    paths = ["--rows", str(night.folder / "rows.npy"), "--out", str(night.folder / "new.npy")]
    assert main(["crosswalk", *ends, *paths]) == 0
    assert "0 numbers kept, 8 mixed, 0 seeded, 8 retired" in capsys.readouterr().out
    expected, items = np.zeros((17, 4)), np.zeros((17, 1))
    for (old, new), (count, _) in crosswalk_by_hand(night, stanza).items():
        expected[new] += count * rows[old]
        items[new] += count
    found = np.load(night.folder / "new.npy")
    np.testing.assert_array_equal(found[:9], rows)
    np.testing.assert_allclose(found[9:], expected[9:] / items[9:])


def test_a_pin_that_moves_many_items_publishes_nothing_until_it_is_allowed(
    night: World, capsys: Capture
) -> None:
    stanza, _ = fit(night, capsys, "--clusters", "8", "--mode", "fresh", ds=1)
    night.pins.append(stanza)
    before = published(night)
    assert refresh(night, DAYS[2]) == 3
    message = paragraph(capsys)
    assert "another cluster ID (main) than the day before (100.0%, above" in message
    assert "clusters that most items left: " in message
    assert "--accept churn" in message
    assert published(night) == before
    assert refresh(night, DAYS[2], "--accept", "churn", "--reason", "a test") == 0
    told = manifest(night, "item_features", DAYS[2])
    assert [gate["level"] for gate in told["gates"] if gate["gate"] == "churn"] == ["accepted"]
    assert told["clusters"]["main"]["moved_items"] == told["clusters"]["main"]["compared_items"] > 0
    scored = manifest(night, "user_simscores", DAYS[2])
    assert scored["counts"]["moved_impressions"] == scored["counts"]["compared_impressions"] > 0
    assert ("churn", "impressions", "accepted") in [
        (gate["gate"], gate["subject"], gate["level"]) for gate in scored["gates"]
    ]
    capsys.readouterr()
    assert courier(night, "status") == 0
    text = capsys.readouterr().out
    assert f"clusters of {DAYS[2]}, main: 8 of 8 used" in text
    assert "; moved 100.0% of" in text
    assert refresh(night, DAYS[3]) == 0  # the day after, numbers stand again


def test_with_the_same_codebook_no_number_moves(night: World) -> None:
    assert refresh(night, DAYS[2]) == 0
    found = manifest(night, "item_features", DAYS[2])["clusters"]["main"]
    assert found["compared_items"] > ITEMS
    assert found["moved_items"] == 0
    assert manifest(night, "user_simscores", DAYS[2])["counts"]["moved_impressions"] == 0


def test_a_codebook_of_another_lineage_counts_as_all_moved_whatever_its_numbers(
    night: World, capsys: Capture
) -> None:
    """Number 3 of one lineage has nothing to do with number 3 of another."""
    pins = night.pins
    night.pins = pins[:1]
    stanza, _ = fit(night, capsys, "--clusters", "8", "--seed", "0", "--name", "other", ds=1)
    assert info_of(night, stanza).parent is None
    night.pins = [*pins, stanza]
    assert refresh(night, DAYS[2]) == 3
    assert "than the day before (100.0%, above" in paragraph(capsys)


def test_aligned_keeps_numbers_under_a_new_encoder(
    night: World, tmp_path: Path, capsys: Capture, artefacts: Artefacts
) -> None:
    """The new encoder has a feature set of its own, as a candidate is made beside production."""
    encoder = make_encoder(tmp_path / "new", seed=1)
    parent = folder_of(night, night.pins[1])
    text = night.config.read_text().split("[[pins]]")[0].replace('"test"', '"candidate"')
    candidate = night.config.with_name("candidate.toml")
    candidate.write_text(f"{text}\n[[pins]]\nfrom_ds = {DAYS[0]}\nencoder = '{encoder}'\n")
    arguments = ["--config", str(candidate), "--ds", str(DAYS[1])]
    assert main(["embed", *arguments]) == 0
    capsys.readouterr()
    named = ["--clusters", "8", "--parent", str(parent)]
    assert main(["fit-codebook", *arguments, *named, "--mode", "warm"]) == 2
    assert "Say --mode aligned" in paragraph(capsys)
    assert main(["fit-codebook", *arguments, *named]) == 0
    stanza = capsys.readouterr().out
    info = info_of(night, stanza)
    assert (info.mode, info.encoder_id) == ("aligned", os.path.basename(encoder))
    (resolution,) = info.resolutions
    old = night.table("item_features", DAYS[1]).to_pylist()
    table = crosswalk_of(night, stanza)
    counted = [row for row in old if row["cluster_id"] and row["in_catalogue"]]
    assert sum(table["items"].to_pylist()) == len(counted)
    kept = sum(r["items"] for r in table.to_pylist() if r["old_cluster_id"] == r["new_cluster_id"])
    assert resolution.moved_items == pytest.approx(1 - kept / sum(table["items"].to_pylist()))
    assert resolution.moved_items < 0.8  # two random networks see similar colours


def test_aligned_without_the_old_numbers_says_where_to_get_them(
    shop: World, capsys: Capture, artefacts: Artefacts
) -> None:
    arguments = ("--clusters", "8", "--parent", artefacts.codebook, "--mode", "aligned")
    message = refused(shop, capsys, 4, *arguments)
    assert "has item_features of codebook" in message
    assert os.path.basename(artefacts.codebook) in message


def test_a_fit_cannot_wait_for_a_job_in_a_jar(shop: World, capsys: Capture) -> None:
    into_jar = ("--runner=portable", "--job_endpoint=x:1", "--output_executable_path=/shop/x.jar")
    message = refused(shop, capsys, 2, "--clusters", "8", "--", *into_jar)
    assert "written into a jar instead of run" in message
    assert "[beam.embed]" in message


class Killed(BaseException):
    """Stands for a kill: the process is gone."""


def test_a_fit_killed_at_any_write_of_its_package_leaves_none_that_counts(
    night: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill the same command makes the package whole, as if nothing had happened."""
    real, parts = files.write_bytes, ("centres", "numbers", "crosswalk", "codebook.json")
    again = Path(shutil.copytree(night.folder, night.folder.with_name("again")))

    def write(path: str, data: bytes) -> None:
        if f"{again}/codebooks/" in path and dies_at[-1] in path:
            raise Killed
        real(path, data)

    dies_at: list[str] = []
    arguments = ["--config", str(again / "courier.toml"), "--ds", str(DAYS[1]), "--clusters", "8"]
    before = set(os.listdir(again / "codebooks"))
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", write)
        for name in parts:
            dies_at.append(name)
            with pytest.raises(Killed):
                main(["fit-codebook", *arguments])
            for folder in set(os.listdir(again / "codebooks")) - before:
                with pytest.raises(OperatorError, match="is no codebook package"):
                    read_codebook_info(str(again / "codebooks" / folder))
    assert main(["fit-codebook", *arguments]) == 0
    stanza, _ = fit(night, capsys, "--clusters", "8", ds=1)
    whole = folder_of(night, stanza)
    mine = again / "codebooks" / whole.name
    assert sorted(os.listdir(mine)) == sorted(os.listdir(whole))
    for path in whole.iterdir():
        assert (mine / path.name).read_bytes() == path.read_bytes()


def test_two_fits_of_a_feature_set_do_not_meet(night: World, capsys: Capture) -> None:
    settings = night.settings()
    folder = settings.layout.fit_folder("fit-codebook", DAYS[1], "any")
    with files.lock(os.path.dirname(folder)):
        message = refused(night, capsys, 1, "--clusters", "8", ds=1)
    assert "Another fit-codebook is at work" in message


def test_the_job_of_a_fit_that_was_killed_is_ended_before_its_samples_go(
    night: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(night.settings().layout.fit_folder("fit-codebook", DAYS[1], "0123456789ab"))
    folder.mkdir(parents=True)
    ended: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        cluster_jobs, "end_left", lambda left, _: ended.append((left, os.path.isdir(left)))
    )
    fit(night, capsys, "--clusters", "8", ds=1)
    assert ended == [(str(folder), True)]
    assert not folder.exists()


# ---- Bad input ---------------------------------------------------------------------------------


def test_more_clusters_than_items_or_than_distinct_ones_are_refused(
    shop: World, capsys: Capture
) -> None:
    message = refused(shop, capsys, 2, "--clusters", "5000")
    assert "5,000 clusters were asked for" in message
    assert "the encoder's categories dress, shirt" in message
    for number in range(100, 100 + ITEMS):
        shop.put(number, picture(100))
    assert courier(shop, "embed", "--ds", str(DAYS[1])) == 0
    message = refused(shop, capsys, 2, "--clusters", "40", ds=1)
    assert "distinct embeddings" in message


def test_a_scope_without_an_item_is_refused_by_name(
    shop: World, tmp_path: Path, capsys: Capture
) -> None:
    hats = make_encoder(tmp_path / "hats", categories=("hat",))
    shop.pins = []
    shop.pin(DAYS[0], hats)
    assert courier(shop, "embed", "--ds", str(DAYS[1])) == 0
    message = refused(shop, capsys, 2, "--clusters", "8", ds=1)
    assert "only 0 are of catalogue items in the encoder's categories hat" in message


def test_embeddings_of_another_encoder_are_refused(
    shop: World, tmp_path: Path, capsys: Capture
) -> None:
    shop.pins = []
    shop.pin(DAYS[0], make_encoder(tmp_path / "other", seed=1))
    message = refused(shop, capsys, 2, "--clusters", "8")
    assert "A codebook belongs to one encoder" in message


def test_an_empty_table_is_refused(shop: World, capsys: Capture) -> None:
    shop.write("catalogue", DAYS[1], [], rows_to_group=1)
    assert courier(shop, "embed", "--ds", str(DAYS[1])) == 0
    message = refused(shop, capsys, 2, "--clusters", "8", ds=1)
    assert "only 0 are of catalogue items" in message


def test_embeddings_that_are_no_unit_vectors_are_refused(shop: World, capsys: Capture) -> None:
    for path in (shop.root / "test/item_embeddings" / f"ds={DAYS[0]}").glob("*.parquet"):
        rows = pq.read_table(path, partitioning=None)
        doubled = [[2 * x for x in row] for row in rows["embedding"].to_pylist()]
        column = pa.array(doubled, rows.schema.field("embedding").type)
        place = rows.schema.get_field_index("embedding")
        pq.write_table(rows.set_column(place, rows.schema.field("embedding"), column), path)
    message = refused(shop, capsys, 1, "--clusters", "8")
    assert "no finite unit vector" in message


def test_modes_that_continue_need_a_parent(shop: World, capsys: Capture) -> None:
    for mode in ("warm", "aligned"):
        message = refused(shop, capsys, 2, "--clusters", "8", "--mode", mode)
        assert "the settings pin none" in message
    message = refused(shop, capsys, 2, "--clusters", "8", "--parent", str(shop.folder))
    assert "is no codebook package" in message


def test_a_damaged_parent_is_refused_and_nothing_is_written(night: World, capsys: Capture) -> None:
    folder = folder_of(night, night.pins[1])
    path = folder / "main-centres.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    message = refused(night, capsys, 1, "--clusters", "8", ds=1)
    assert "is damaged" in message
    assert os.listdir(folder.parent) == [folder.name]
    assert not list((night.root / "_staging").rglob("*.parquet"))


def test_what_does_not_fit_is_refused_with_the_numbers(
    shop: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codebooks, "available_bytes", lambda: 1000)
    message = refused(shop, capsys, 2, "--clusters", "8")
    assert "The fit needs about" in message
    assert "or say --algorithm single-pass" in message
    message = refused(shop, capsys, 2, "--clusters", "8", "--dry-run")
    assert "The fit needs about" in message


def test_a_soft_threshold_without_single_pass_is_refused(shop: World, capsys: Capture) -> None:
    message = refused(shop, capsys, 2, "--clusters", "8", "--soft-threshold", "0.1")
    assert "Say --algorithm single-pass" in message


def test_clusters_mistyped_are_refused_before_anything_is_read(
    shop: World, capsys: Capture
) -> None:
    assert "is not understood at 'many'" in refused(shop, capsys, 2, "--clusters", "many")
    assert "names no 'main'" in refused(shop, capsys, 2, "--clusters", "fine=3")


def test_the_day_that_no_impressions_came_in_counts_items_alone(
    night: World, capsys: Capture
) -> None:
    for path in (night.folder / "impressions" / f"ds={DAYS[1]}").iterdir():
        path.unlink()
    (night.folder / "impressions" / f"ds={DAYS[1]}").rmdir()
    stanza, told = fit(night, capsys, "--clusters", "8", ds=1)
    assert "the crosswalk counts items alone" in told
    (resolution,) = info_of(night, stanza).resolutions
    assert resolution.moved_impressions is None
    assert resolution.moved_items is not None
    saved = json.loads((folder_of(night, stanza) / "codebook.json").read_text())
    assert saved["resolutions"][0]["health"]["clusters"] == 8


# ---- What is asked for -------------------------------------------------------------------------


def test_clusters_are_one_number_or_several_with_labels() -> None:
    assert codebooks.parse_clusters("32") == {"main": 32}
    found = codebooks.parse_clusters("coarse=16, main=100,fine_2=1000")
    assert found == {"coarse": 16, "main": 100, "fine_2": 1000}


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "ten", "main=", "main=3,main=4", "main=3,4", "id=3,main=4", "Fine=3"]
)
def test_clusters_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(OperatorError, match="is not understood at"):
        codebooks.parse_clusters(text)


def test_without_a_main_resolution_there_is_no_cluster_id() -> None:
    with pytest.raises(OperatorError, match="names no 'main'"):
        codebooks.parse_clusters("coarse=16,fine=100")
