"""Copies folders of the local disk into a bucket."""

from pathlib import Path

from feature_jobs.store import files


def upload(folder: Path | str, target: str) -> str:
    """Copies all files below `folder` to below `target`, which is returned."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            files.write_bytes(f"{target}/{path.relative_to(folder)}", path.read_bytes())
    return target
