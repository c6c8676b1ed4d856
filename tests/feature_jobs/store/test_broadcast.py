"""All processes of a machine share one copy of a folder."""

from pathlib import Path

import pytest

from feature_jobs.schemas import CourierError, StorageUnavailable
from feature_jobs.store import broadcast


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "folder_of", lambda key: str(tmp_path / key))


def test_a_folder_is_built_once_until_it_is_discarded(tmp_path: Path) -> None:
    built: list[str] = []

    def build(folder: str) -> int:
        built.append(folder)
        Path(folder, "data").write_text("x")
        return len(built)

    assert broadcast.shared_folder("k", build) == (str(tmp_path / "k"), 1)
    assert broadcast.shared_folder("k", build) == (str(tmp_path / "k"), 1)
    broadcast.discard("k")
    assert not (tmp_path / "k").exists()
    assert broadcast.shared_folder("k", build)[1] == 2


def test_a_folder_that_was_not_finished_is_built_again() -> None:
    def dies(_folder: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broadcast.shared_folder("k", dies)
    assert broadcast.shared_folder("k", lambda _: "built")[1] == "built"


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """Whoever could plant embeddings in a shared folder would decide about scores."""
    (tmp_path / "k").mkdir()
    (tmp_path / "k").chmod(0o777)
    with pytest.raises(CourierError, match="could plant embeddings"):
        broadcast.shared_folder("k", lambda _: None)


def test_a_disk_that_fills_meanwhile_is_told_with_the_folder(tmp_path: Path) -> None:
    def build(folder: str) -> None:
        with open("/dev/full", "wb", buffering=0) as file:  # what any full disk says
            file.write(b"x")

    with pytest.raises(StorageUnavailable, match=f"^{tmp_path}/k could not be written .*No space"):
        broadcast.shared_folder("k", build)
    assert broadcast.shared_folder("k", lambda _: "built")[1] == "built"
