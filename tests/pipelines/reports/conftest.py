"""Makes the world whose training sets are validated and audited."""

import copy
import shutil
from pathlib import Path

import pytest

from tests.pipelines.test_join import as_samples, impressions, write_samples
from tests.support.world import DAYS, World


@pytest.fixture
def joinable(refreshed: World, tmp_path: Path) -> World:
    """Gives a world of one's own after all its nights, with samples of the third day."""
    found = copy.copy(refreshed)
    found.folder = tmp_path / "shop"
    shutil.copytree(refreshed.folder, found.folder)
    write_samples(found, DAYS[2], as_samples(impressions(found, DAYS[2])))
    found.settings()
    return found
