"""Finds where the shop's images lie, and reads a sample of them as the night will."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import pyarrow as pa

from courier_model.image_files import Rejected, read_image
from courier_model.images import Preprocessing
from feature_jobs.store import addresses, files
from pipelines.config import Gates
from pipelines.first_look.settings import near
from pipelines.first_look.tables import Finding, Table

_IMAGES = 64
_ADDRESSES = 8  # of one server are looked for in each folder
_COPIES = 0.1  # such a share of one picture is told
_PARENTS = 4  # of the catalogue's folder, in which images are looked for
# The usual one; the encoder's own is not known yet, and hardly changes what can be decoded.
_PREPROCESSING = Preprocessing(224, 256, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Images:
    """Tells where images lie: below `roots`, and those that have addresses as `rewrite` says.

    That has pairs of the beginning of an address and a folder, "" where none was found.
    """

    roots: tuple[str, ...]
    rewrite: tuple[tuple[str, str], ...] = ()

    def uris(self, sample: Sequence[str | None]) -> list[str | None]:
        """Returns what the night makes of image URIs."""
        pairs = addresses.as_image_uris([(a, b) for a, b in self.rewrite if b], self.roots)
        found = addresses.rewrite(pa.chunked_array([sample], pa.string()), pairs)
        return list(found.to_pylist())

    def pair_of(self, uri: str) -> tuple[str, str] | None:
        """Returns the pair of `rewrite` by which an image URI is read; None where none fits."""
        return next(((a, b) for a, b in self.rewrite if b and uri.startswith(a)), None)


# ---- Finding -------------------------------------------------------------------------------


def find_images(items: Table, given: Sequence[str]) -> Images:
    """Finds the folders that images lie below: those `given`, else guessed around the catalogue.

    They are the folder that most relative URIs are below, the common one of the absolute ones, the
    buckets of the others, and the folders where files of addresses are.
    """
    if not items.has("image_uri"):
        return Images(tuple(given))
    sample = [uri for uri in _sample(items) if uri]
    folders = [*given] or _candidates(os.path.dirname(items.source.paths[0]))
    roots = [*given] or _guess_roots(items, sample, folders)
    rewrite = tuple(_find_addresses(sample, folders))
    return Images(tuple(dict.fromkeys([*roots, *(to for _, to in rewrite if to)])), rewrite)


def _guess_roots(items: Table, sample: Sequence[str], folders: Sequence[str]) -> list[str]:
    found = []
    relative = [uri for uri in sample if not _is_address(uri) and not _has_place(uri)]
    best, count = _best(folders, relative)
    if 2 * count > len(relative):
        found.append(best)
    uris = [uri for uri in items.rows["image_uri"].drop_null().to_pylist() if _has_place(uri)]
    absolute = {os.path.dirname(uri) for uri in uris if not files.is_remote(uri)}
    if absolute and (common := os.path.commonpath(absolute)) != os.sep:
        found.append(common)
    buckets = {uri.split("/")[2] for uri in uris if files.is_remote(uri)} - {""}
    return found + [f"gs://{bucket}" for bucket in sorted(buckets)]


def _find_addresses(sample: Sequence[str], folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields for each server the beginning of its addresses, and the folder of their files.

    The files may lie as deep as the addresses are, or without the first folders of those.
    """
    for server in dict.fromkeys(_server(uri) for uri in sample if _is_address(uri)):
        uris = [uri for uri in sample if uri.startswith(server)][:_ADDRESSES]
        names = addresses.rewrite(pa.chunked_array([uris], pa.string()), [(server, "")]).to_pylist()
        levels = zip(*(name.split("/")[:-1] for name in names), strict=False)
        shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
        found = []
        for depth in range(len(shared) + 1):
            head = "".join(f"{name}/" for name in shared[:depth])
            best, count = _best(folders, [name.removeprefix(head) for name in names])
            found.append((count, server + head, best))
        count, beginning, best = max(found, key=lambda one: one[0])  # of equal ones the shortest
        yield (beginning, best) if 2 * count > len(names) else (server, "")


def _server(address: str) -> str:
    return re.sub(r"(?<=//)([^/]*).*", r"\1/", address, count=1, flags=re.DOTALL)


def _best(folders: Sequence[str], names: Sequence[str]) -> tuple[str, int]:
    """Returns the folder that has most files of these names, the first of equals, and how many."""
    with ThreadPoolExecutor() as pool:
        counts = {
            folder: sum(pool.map(files.exists, [os.path.join(folder, name) for name in names]))
            for folder in folders
        }
    best = max(counts, key=lambda folder: counts[folder])
    return best, counts[best]


def _is_address(uri: str) -> bool:
    return addresses.is_web(uri) or ("://" in uri and not files.is_remote(uri))


def _has_place(uri: str) -> bool:
    """Tells whether a URI says by itself where a file is."""
    return not _is_address(uri) and (files.is_remote(uri) or os.path.isabs(uri))


def _sample(items: Table) -> list[str | None]:
    """Returns image URIs of items spread over the rows that were looked at."""
    column = items.rows["image_uri"]
    at = np.linspace(0, len(column) - 1, min(_IMAGES, len(column))).astype(int)
    return list(column.take(at).to_pylist())


def _candidates(folder: str) -> list[str]:
    """Lists `folder`, its parents, and `images` in each, nearest first.

    The whole file system is never one of them.
    """
    folders = [folder]
    while len(folders) <= _PARENTS and os.path.dirname(folders[-1]) != "gs:":  # above a bucket
        folders.append(os.path.dirname(folders[-1]))
    around = [path for parent in folders for path in (parent, os.path.join(parent, "images"))]
    return [path for path in dict.fromkeys(around) if os.path.basename(path)]


def any_readable(items: Table, images: Images) -> bool:
    """Tells whether one of the sampled images can be read and decoded."""
    results = (read_image(uri, images.roots, _PREPROCESSING) for uri in _in_files(items, images))
    return any(not isinstance(result, Rejected) for result in results)


def folders_of(items: Table, images: Images) -> set[str]:
    """Returns the folders in which the sampled images lie."""
    uris = _in_files(items, images)
    return {os.path.dirname(files.absolute(uri, images.roots[0])) for uri in uris}


def _in_files(items: Table, images: Images) -> list[str]:
    """Returns the sampled URIs that may be those of files."""
    wanted = images.roots and items.has("image_uri")
    uris = images.uris(_sample(items)) if wanted else []
    return [uri for uri in uris if uri and not _is_address(uri)]


# ---- Looking -------------------------------------------------------------------------------


def about_images(items: Table, images: Images, folder: str, gates: Gates) -> Iterator[Finding]:
    """Finds whether images can be read; `folder` is that of the settings."""
    sample = _sample(items) if items.has("image_uri") else []
    uris, used = images.uris(sample), {images.pair_of(uri) for uri in sample if uri}
    if left := [uri for uri in uris if uri and _is_address(uri)]:
        yield Finding(
            "problem",
            f"images: {len(left)} of {len(sample)} sampled image_uri are addresses (for example "
            f"{_example(left[0])}), and no files of them were found. Nothing is fetched: give the "
            "folder or bucket where their files lie as --images, or say it under [catalogue], as "
            f'in rewrite = [["{_server(left[0])}", "gs://shop-images/"]], with that folder in '
            "image_roots.",
        )
    for beginning, to in images.rewrite:
        if (beginning, to) in used:
            yield Finding(
                "note",
                f"images: files of {beginning}… are read below {near(to, folder)}, by [catalogue] "
                "rewrite; nothing is fetched.",
            )
    local = [uri for uri in uris if not uri or not _is_address(uri)]
    if local and images.roots:
        names = ", ".join(near(root, folder) for root in images.roots)
        yield Finding("note", f"images: read below {names}; give --images where that is wrong.")
        yield from _try_images(local, images.roots, gates)
    elif local:
        yield Finding(
            "problem",
            f"images: most image_uri (for example {_example(local[0])}) are below none of the "
            "folders around the catalogue. Give the folder that they are relative to as --images, "
            "or fill in image_roots.",
        )


def _try_images(
    uris: Sequence[str | None], roots: Sequence[str], gates: Gates
) -> Iterator[Finding]:
    """Reads and decodes images as the night will."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda uri: read_image(uri, roots, _PREPROCESSING), uris)
        found = list(zip(uris, results, strict=True))
    rejected: dict[str, list[str | None]] = {}
    good: list[tuple[str, str | None]] = []
    for uri, result in found:
        if isinstance(result, Rejected):
            rejected.setdefault(result.reason.replace("_", " "), []).append(uri)
        else:
            good.append((result.sha256, uri))
    yield _about_rejects(rejected, uris, gates.rejects.fail)
    yield from _about_copies(good, gates.balance.fail)


def _about_rejects(
    rejected: Mapping[str, Sequence[str | None]], uris: Sequence[str | None], allowed: float
) -> Finding:
    bad, sampled, without = sum(map(len, rejected.values())), len(uris), list(uris).count(None)
    if not bad:
        return Finding("ok", f"images: all {sampled} sampled can be read and decoded.")
    reasons = ", ".join(
        f"{len(those)} {reason} (for example {_example(those[0])})"
        for reason, those in rejected.items()
    )
    text = f"images: {sampled - bad} of {sampled} sampled can be read and decoded; {reasons}"
    if bad - without <= allowed * (sampled - without):
        return Finding("note", f"{text}. Such items get no embedding, and are listed as rejects.")
    return Finding(
        "problem",
        f"{text}. Above {allowed:.0%} rejects the night refuses to publish: mend the images, or "
        "raise the limits of rejects under [gates].",
    )


def _about_copies(good: Sequence[tuple[str, str | None]], allowed: float) -> Iterator[Finding]:
    """Finds whether many images, each with its digest, are one: a placeholder, most likely."""
    counts = Counter(sha256 for sha256, _ in good)
    sha256, copies = max(counts.items(), key=lambda pair: pair[1], default=("", 0))
    if copies < 2 or copies <= _COPIES * len(good):
        return
    text = (
        f"images: {copies} of {len(good)} that can be decoded are the very same picture, byte for "
        f"byte (sha256 {sha256}, for example {_example(dict(good)[sha256])}). If that is a "
        "placeholder, leave the image_uri of such items null: they all look alike to every score, "
        "and without one they get cluster ID 0."
    )
    if copies <= allowed * len(good):
        yield Finding("note", text)
    else:
        yield Finding(
            "problem",
            f"{text} Above {allowed:.0%} of items in one cluster the night refuses to publish, "
            "unless the limits of balance under [gates] are raised.",
        )


def _example(uri: str | None) -> str:
    """Returns a URI without what follows a `?`, since that may be a signature."""
    return repr(uri and uri.split("?")[0][:100])
