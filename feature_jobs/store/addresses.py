"""Turns the addresses under which a shop serves its images into the places of their files.

A pair of prefixes says that what begins with the first lies below the second. Nothing is fetched.
"""

import os
import re
from collections.abc import Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

Pairs = Sequence[tuple[str, str]]


def is_web(uri: str) -> bool:
    """Tells whether a URI, or the beginning of one, is an address in the web."""
    return bool(re.match(r"(https?:)?//", uri))


def as_image_uris(pairs: Pairs, roots: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Returns pairs of a prefix and a folder as pairs of prefixes of `image_uri`.

    The prefixes end in `/`, as those returned do.

    A folder in the first of the image roots becomes relative to it, as the shop might have written
    it: what is then published does not tell where the shop lies.
    """
    return tuple((source, _below(folder, roots)) for source, folder in pairs)


def _below(folder: str, roots: Sequence[str]) -> str:
    prefix = os.path.join(folder, "")
    return prefix.removeprefix(os.path.join(roots[0], "")) if roots else prefix


def rewrite(uris: pa.ChunkedArray, pairs: Pairs) -> pa.ChunkedArray:
    """Returns `uris`, string with nulls, each with the first prefix that fits replaced.

    Of an address in the web, what follows `?` or `#` is no part of a file's name, and `%20` in it
    stands for a blank.
    """
    return pa.chunked_array([_rewrite(chunk, pairs) for chunk in uris.chunks], pa.string())


def _rewrite(uris: pa.Array, pairs: Pairs) -> pa.Array:
    found = uris
    for source, target in reversed(pairs):  # so that the first one has the last word
        fits = pc.fill_null(pc.starts_with(uris, source), False)
        rest = pc.utf8_slice_codeunits(uris.filter(fits), len(source))
        rest = _file_names(rest) if is_web(source) else rest
        found = pc.replace_with_mask(found, fits, pc.binary_join_element_wise(target, rest, ""))
    return found


def _file_names(paths: pa.Array) -> pa.Array:
    paths = pc.replace_substring_regex(paths, r"(?s)[?#].*", "")
    quoted = pc.match_substring(paths, "%")  # few shops have them: each costs a microsecond
    plain = pa.array(map(unquote, paths.filter(quoted).to_pylist()), pa.string())
    return pc.replace_with_mask(paths, quoted, plain)
