"""Copies folders and whole shops between the local disk and a bucket."""

from pathlib import Path

from feature_jobs.store import files, gcs_client
from tests.support.world import World


def upload(folder: Path | str, target: str) -> str:
    """Copies all files below `folder` to below `target`, which is returned."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            files.write_bytes(f"{target}/{path.relative_to(folder)}", path.read_bytes())
    return target


def download(source: str, folder: Path) -> Path:
    """Copies all objects below `source` to below `folder`, which is returned."""
    name, _, prefix = source.removeprefix("gs://").partition("/")
    for blob in gcs_client.client().list_blobs(name, prefix=f"{prefix}/"):
        path = folder / blob.name.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob.download_as_bytes())
    return folder


def move(world: World, bucket: str, *made: str) -> Path:
    """Copies a world as it is now, and the artefacts `made` for it, to below `bucket`.

    Returns the path of its settings there, which stay on the disk.
    """
    text = world.settings() and world.config.read_text()
    for name in ("catalogue", "impressions", "images"):
        upload(world.folder / name, f"{bucket}/{name}")
        text = text.replace(f'"{name}', f'"{bucket}/{name}')
    for folder in made:
        text = text.replace(folder, upload(folder, f"{bucket}/made/{Path(folder).name}"))
    path = world.folder / "bucket.toml"
    path.write_text(text.replace('"features"', f'"{bucket}/features"'))
    return path
