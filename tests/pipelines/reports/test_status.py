"""`courier status` tells what lies on disk."""

import json

from pipelines.cli import main
from tests.conftest import Artefacts
from tests.support.commands import Capture
from tests.support.world import DAYS, World


def test_status_tells_rows_by_day_and_table(refreshed: World, capsys: Capture) -> None:
    config = ["--config", str(refreshed.config)]
    assert main(["status", *config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["days"]) == {str(day) for day in DAYS}
    for day, entry in found["days"].items():
        assert entry["whole_night"]
        assert entry["tables"]["user_simscores"]["rows"] == 152
        assert str(day) in entry["tables"]["item_features"]["path"]
    assert main(["status", *config]) == 0
    text = capsys.readouterr().out
    assert text.count("whole") == len(DAYS)
    assert "nothing is published yet" not in text


def test_status_of_nothing_says_so(world: World, capsys: Capture) -> None:
    world.settings()
    assert main(["status", "--config", str(world.config)]) == 0
    assert "nothing is published yet" in capsys.readouterr().out


def test_an_unfinished_run_is_listed(world: World, capsys: Capture, artefacts: Artefacts) -> None:
    world.extra_settings = ""
    world.settings()
    text = world.config.read_text().replace("max_reject_share = 0.5", "max_reject_share = 0.0")
    world.config.write_text(text)
    config = ["--config", str(world.config)]
    assert main(["embed", *config, "--ds", str(DAYS[0])]) == 3
    capsys.readouterr()
    assert main(["status", *config]) == 0
    assert f"unfinished: embed ds={DAYS[0]} run " in capsys.readouterr().out
