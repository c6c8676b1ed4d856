"""A fit has its staging folder for itself, and the next one throws away what it left."""

from pathlib import Path

import pytest

from feature_jobs.store import files
from pipelines.artefacts.fit_staging import own_staging
from pipelines.running import cluster_jobs


def test_what_was_said_of_a_failed_job_stays_until_the_next_fit(tmp_path: Path) -> None:
    one, other = (str(tmp_path / (digit * 12)) for digit in "ab")
    said = Path(one, "failed.txt")

    def fail() -> None:
        with own_staging(one, print):
            files.write_bytes(str(said), b"Java's words")
            raise cluster_jobs.JobFailed(f"all that was said of it is in {said}")

    with pytest.raises(cluster_jobs.JobFailed):
        fail()
    assert said.exists()
    with own_staging(other, print):
        assert not said.parent.exists()
