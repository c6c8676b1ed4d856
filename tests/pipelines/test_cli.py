"""The command line gives help, reads the environment and prints pins."""

import tomllib
from pathlib import Path

import click
import pytest

from pipelines.cli import cli, main
from tests.support.world import DAYS, World

Capture = pytest.CaptureFixture[str]


def test_help_names_every_command_and_each_has_a_help_of_its_own(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(cli.commands) >= 10
    for name, command in cli.commands.items():
        assert name in text
        assert command.help
        assert main([name, "--help"]) == 0
        assert "Usage: courier" in capsys.readouterr().out


def test_a_mistyped_command_exits_2_and_names_the_nearest(capsys: Capture) -> None:
    assert main(["refesh"]) == 2
    assert "'refresh'" in capsys.readouterr().err


def test_every_option_is_read_from_the_environment(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.settings()
    monkeypatch.setenv("COURIER_REFRESH_CONFIG", str(world.config))
    monkeypatch.setenv("COURIER_REFRESH_DS", str(DAYS[0]))
    monkeypatch.setenv("COURIER_REFRESH_DRY_RUN", "1")
    assert main(["refresh"]) == 0
    assert f"ds {DAYS[0]}" in capsys.readouterr().out


def test_the_environments_names_are_those_of_the_options() -> None:
    options = [
        (name, option)
        for name, command in cli.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and option.opts != ["--help"]
    ]
    assert len(options) > 20
    for name, option in options:
        assert option.opts == ["--" + str(option.name).replace("_", "-")], name


def test_every_option_that_takes_a_path_refuses_what_nobody_meant(capsys: Capture) -> None:
    metavars = ("FILE", "FOLDER", "PATH", "CSV")
    found = 0
    for name, command in cli.commands.items():
        for option in command.params:
            if not (option.metavar or "").endswith(metavars):
                continue
            found += 1
            for path in ("", "$HOME/x", "gs:/bucket/x"):
                assert main([name, f"{option.opts[0]}={path}"]) == 2
                told = capsys.readouterr().err
                assert f"Invalid value for '{option.opts[0]}'" in told, (name, option.name)
    assert found > 20


def test_paths_in_the_environment_are_told_apart_as_in_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/shop")
    monkeypatch.setenv("COURIER_INIT_IMAGES", "my images:gs://shop/a b:~/more")
    (images,) = (option for option in cli.commands["init"].params if option.name == "images")
    with cli.make_context("courier", ["status"], resilient_parsing=True) as parent:
        context = click.Context(
            cli.commands["init"], parent, "init", auto_envvar_prefix="COURIER_INIT"
        )
        given, _ = images.consume_value(context, {})
        assert images.type_cast_value(context, given) == (
            "my images", "gs://shop/a b", "/home/shop/more",
        )  # fmt: skip


def test_no_settings_exit_2_and_say_how_to_get_them(tmp_path: Path, capsys: Capture) -> None:
    for command in (["status"], ["refresh", "--ds", "2026-01-01"]):
        assert main([*command, "--config", str(tmp_path / "none.toml")]) == 2
        assert "courier init" in capsys.readouterr().err


# ---- Pins --------------------------------------------------------------------------------------


def pins(printed: str) -> list[dict[str, str]]:
    return tomllib.loads(printed)["pins"]


def test_what_init_encoder_and_fit_codebook_print_makes_a_night(
    world: World, capsys: Capture
) -> None:
    """Both commands edit nothing: appending what they print is the operator's act."""
    world.pins.clear()
    world.settings()
    config = ["--config", str(world.config)]
    backbone = ["--backbone", "shufflenet_v2_x0_5", "--input-size", "32"]
    before = world.config.read_text()
    assert main(["init-encoder", *config, *backbone, "--weights", "random"]) == 0
    printed = capsys.readouterr().out
    assert world.config.read_text() == before
    (pin,) = pins(printed)
    assert (world.folder / pin["encoder"] / "encoder.json").exists()
    world.config.write_text(before + printed)

    assert main(["fit-codebook", *config, "--ds", str(DAYS[0]), "--clusters", "3"]) == 4
    assert "No published partition" in capsys.readouterr().err
    assert main(["embed", *config, "--ds", str(DAYS[0])]) == 0
    assert main(["refresh", *config, "--ds", str(DAYS[1])]) == 2
    assert "names no codebook" in capsys.readouterr().err
    assert main(["fit-codebook", *config, "--ds", str(DAYS[0]), "--clusters", "99"]) == 2
    assert "99 clusters were asked for" in capsys.readouterr().err
    assert main(["fit-codebook", *config, "--ds", str(DAYS[0]), "--clusters", "3"]) == 0
    printed = capsys.readouterr().out
    (pin,) = pins(printed)
    assert pin["from_ds"] == str(DAYS[1])
    world.config.write_text(world.config.read_text() + printed)

    assert main(["refresh", *config, "--ds", str(DAYS[1])]) == 0
    features = world.table("item_features", DAYS[1]).to_pylist()
    assert {row["cluster_id"] for row in features} == {0, 1, 2, 3}
    assert not list((world.root / "_staging").rglob("*.parquet"))


def test_a_pin_to_no_encoder_exits_2(world: World, capsys: Capture, tmp_path: Path) -> None:
    world.pin(DAYS[1], str(tmp_path))
    world.settings()
    assert main(["embed", "--config", str(world.config), "--ds", str(DAYS[1])]) == 2
    assert "is no encoder package" in capsys.readouterr().err


# ---- Gates that are accepted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--accept", "chrun", "--reason", "x"], "'chrun' is no gate, did you mean 'churn'?"),
        (["--accept", "zzz", "--reason", "x"], "'zzz' is no gate, gates are image_coverage, "),
        (["--accept", "churn"], "--accept GATE and --reason WHY go together."),
        (["--accept", "churn", "--reason", ""], "--accept GATE and --reason WHY go together."),
        (["--reason", "x"], "--accept GATE and --reason WHY go together."),
        (["--allow-churn"], "No such option"),
    ],
)
@pytest.mark.parametrize("command", ["refresh", "embed", "item-features", "histories", "simscore"])
def test_what_is_accepted_is_a_gate_and_has_a_reason(
    command: str, options: list[str], told: str, capsys: Capture
) -> None:
    assert main([command, "--ds", "2026-03-01", *options]) == 2
    assert told in capsys.readouterr().err
