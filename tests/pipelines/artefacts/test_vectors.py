"""`courier register-vectors`: what it writes, prints and refuses."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from courier_model.encoder import load_encoder
from feature_jobs.schemas import OperatorError
from feature_jobs.store.encoder_info import read_centre, read_encoder_info
from pipelines.artefacts import vectors
from pipelines.cli import main
from tests.support.commands import Capture, paragraph
from tests.support.vector_shop import as_column, register, vector_of, vectors_of_day, write_vectors
from tests.support.world import DAYS, World

D = 32


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Makes a shop with vectors of two days, and nothing registered."""
    world = World(tmp_path / "shop")
    for day in DAYS[:2]:
        write_vectors(world, day, list(vectors_of_day(day, D).items()))
    return world


def given_again(world: World) -> list[str]:
    """Returns the command of `register`."""
    named = ["--name", "clip", "--vector", "clip", "--path", "vectors/ds={ds}/*.parquet"]
    return ["register-vectors", "--config", str(world.config), *named, "--trained-elsewhere"]


def refused(world: World, capsys: Capture, status: int, *args: str) -> str:
    """Registers wrongly; returns what was told, once nothing was written."""
    world.settings()
    capsys.readouterr()
    given = {"--name": "clip", "--path": "vectors/ds={ds}/*.parquet", "--vector": "clip"}
    while args and args[0] in given:
        given[args[0]], args = args[1], args[2:]
    words = [word for pair in given.items() for word in pair]
    told = args or ("--trained-elsewhere",)
    command = ("register-vectors", "--config", str(world.config), *words, *told)
    assert main(command) == status
    assert not list(world.folder.glob("encoders/*/encoder.json"))
    return paragraph(capsys)


def test_it_prints_a_pin_and_tells_what_it_saw(world: World, capsys: Capture) -> None:
    folder = register(world)
    told = capsys.readouterr()
    (pin,) = tomllib.loads(told.out)["pins"]
    assert pin == {"from_ds": "2000-01-01", "encoder": str(Path(folder).relative_to(world.folder))}
    assert f"13 vectors of 32 numbers (ds {DAYS[1]})" in told.err
    assert "of 13 looked at, 92.3% can be used (not finite 1)" in told.err
    info = read_encoder_info(folder)
    assert (info.dimension, info.backbone, info.data_end_ds) == (32, "vectors", None)
    assert info.vectors is not None
    assert info.vectors.trained_on is None


def test_the_same_registration_is_the_same_encoder_and_another_is_another(world: World) -> None:
    first = Path(register(world))
    facts = (first / "encoder.json").read_text()
    assert main((*given_again(world), "--ds", str(DAYS[0]))) == 0
    assert (first / "encoder.json").read_text() == facts
    others = {register(world, *more) for more in (["--centre"], ["--path", "vectors/ds={ds}"])}
    assert len({str(first), *others}) == 3


def test_to_wait_for_a_success_from_now_on_is_the_same_encoder(world: World) -> None:
    folder = Path(register(world))
    for day in DAYS[:2]:
        (world.folder / "vectors" / f"ds={day}" / "_SUCCESS").touch()
    assert main((*given_again(world), "--require-success")) == 0
    assert [one.name for one in (world.folder / "encoders").iterdir()] == [folder.name]
    info = read_encoder_info(str(folder))
    assert info.vectors is not None
    assert info.vectors.require_success


def test_one_id_cannot_mean_two_declarations(world: World, capsys: Capture) -> None:
    register(world)
    capsys.readouterr()
    command = (
        "register-vectors", "--config", str(world.config), "--name", "clip", "--vector", "clip",
        "--path", "vectors/ds={ds}/*.parquet", "--trained-on", "2026-01-01", "2026-02-01",
    )  # fmt: skip
    assert main(command) == 2
    assert "One encoder_id cannot mean both; save under another name" in paragraph(capsys)


def test_the_days_it_was_trained_on_decide_from_when_it_may_serve(
    world: World, capsys: Capture
) -> None:
    folder = register(world, "--trained-on", "2026-01-01", "2026-02-20")
    (pin,) = tomllib.loads(capsys.readouterr().out)["pins"]
    assert pin["from_ds"] == "2026-02-21"
    info = read_encoder_info(folder)
    assert (info.data_start_ds, info.data_end_ds) == ("2026-01-01", "2026-02-20")


def test_a_centre_is_the_mean_of_the_vectors_and_knows_their_day(
    world: World, capsys: Capture
) -> None:
    folder = register(world, "--centre", "--ds", str(DAYS[0]))
    good = [v for v in vectors_of_day(DAYS[0], D).values() if np.isfinite(v).all()]
    centre = read_centre(folder, read_encoder_info(folder))
    assert centre is not None
    np.testing.assert_allclose(centre, np.mean(good, axis=0), rtol=1e-5)
    (pin,) = tomllib.loads(capsys.readouterr().out)["pins"]
    assert pin["from_ds"] == str(DAYS[1])
    assert read_encoder_info(folder).data_end_ds == str(DAYS[0])


def test_a_large_table_is_looked_at_here_and_there(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(vectors, "_SAMPLE", 6)
    monkeypatch.setattr(vectors, "_GROUPS", 3)
    monkeypatch.setattr(vectors, "_BATCH", 2)
    register(world)
    assert re.search(r"13 vectors of .* of [3-6] looked at", capsys.readouterr().err)


def test_the_most_frequent_length_is_that_of_the_encoder(world: World, capsys: Capture) -> None:
    rows = [(n, vector_of(n, DAYS[1], 48 if n == 1 else D)) for n in range(1, 7)]
    write_vectors(world, DAYS[1], rows, files=1)
    folder = register(world)
    assert read_encoder_info(folder).dimension == D
    assert "(wrong length 1)" in capsys.readouterr().err


# ---- Refused -------------------------------------------------------------------------------------


def test_what_their_maker_knew_must_be_said(world: World, capsys: Capture) -> None:
    both = ("--trained-elsewhere", "--trained-on", "2026-01-01", "2026-02-01")
    for said in (("--require-success",), both):
        assert "say one of the two" in refused(world, capsys, 2, *said)
    turned = ("--trained-on", "2026-02-01", "2026-01-01")
    assert "ends before it starts" in refused(world, capsys, 2, *turned)


def test_names_columns_and_paths_that_are_none(world: World, capsys: Capture) -> None:
    assert "small letters" in refused(world, capsys, 2, "--name", "CLIP_B32")
    assert "Did you mean 'clip'?" in refused(world, capsys, 1, "--vector", "clips")
    assert "no file matches 'vectors/{ds}.parquet'" in refused(
        world, capsys, 4, "--path", "vectors/{ds}.parquet"
    )
    assert "no partition" in refused(world, capsys, 4, "--path", "vectors/clip/*.parquet")
    several = refused(world, capsys, 2, "--path", "vectors/*/*.parquet")
    assert "matches files of 2 days" in several
    assert "Write {ds} where the day stands in the path" in several
    assert "{dsx}" in refused(world, capsys, 2, "--path", "vectors/{dsx}/*.parquet")


def test_a_snapshots_centre_needs_its_day_and_an_empty_day_tells_nothing(
    world: World, capsys: Capture
) -> None:
    once = ("--path", f"vectors/ds={DAYS[0]}")
    asked = refused(world, capsys, 2, *once, "--centre", "--trained-elsewhere")
    assert "Say with --ds of which day this snapshot is" in asked
    folder = world.folder / "vectors" / f"ds={DAYS[1]}"
    for path in folder.iterdir():
        path.unlink()
    (folder / "_SUCCESS").touch()
    asked = refused(world, capsys, 4, "--trained-elsewhere", "--ds", str(DAYS[1]))
    assert "are an empty table, marked as whole" in asked


def test_vectors_that_are_too_short_or_all_unusable(world: World, capsys: Capture) -> None:
    write_vectors(world, DAYS[1], [(n, vector_of(n, DAYS[1], 8)) for n in range(1, 6)])
    assert "have 8 numbers; COURIER takes 16 to 2,048" in refused(world, capsys, 1)
    write_vectors(world, DAYS[1], [(n, np.zeros(D, np.float32)) for n in range(1, 6)])
    told = refused(world, capsys, 1)
    assert "not one of 5 that were looked at can be used (zero 5)" in told
    rows = pq.read_table(world.folder / "vectors" / f"ds={DAYS[1]}", partitioning=None)
    for path in (world.folder / "vectors" / f"ds={DAYS[1]}").iterdir():
        path.unlink()
    column = as_column([*[None] * (len(rows) - 1), np.ones(D, np.float32)], "list")
    rows = rows.set_column(1, "clip", column).slice(0, len(rows) - 1)
    pq.write_table(rows, world.folder / "vectors" / f"ds={DAYS[1]}" / "0.parquet")
    assert "none has a vector: the column 'clip' is null there" in refused(world, capsys, 1)


def test_nothing_else_takes_it_for_an_encoder_of_images(world: World) -> None:
    folder = register(world)
    with pytest.raises(OperatorError, match="cannot run what made them"):
        load_encoder(folder)


def test_a_damaged_centre_is_told(world: World, capsys: Capture) -> None:
    folder = Path(register(world, "--centre", "--ds", str(DAYS[0])))
    (folder / "centre.npy").write_bytes(b"\x93NUMPY")
    world.pin(DAYS[1], str(folder))
    world.settings()
    capsys.readouterr()
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[1])]) == 1
    assert "centre.npy is missing or damaged" in paragraph(capsys)
    np.save(folder / "centre.npy", np.zeros(D, np.float32))
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[1])]) == 1
    assert "path, columns, dimension or centre were changed or damaged" in paragraph(capsys)
    facts = json.loads((folder / "encoder.json").read_text())
    facts["dimension"] = 9
    (folder / "encoder.json").write_text(json.dumps(facts))
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[1])]) == 2
    assert "a dimension of 9" in paragraph(capsys)
