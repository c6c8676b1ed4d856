"""Reads and writes JSON documents, and makes digests of what they say."""

import hashlib
import json
from typing import Any

from feature_jobs.schemas import DataContractError
from feature_jobs.store import files


def canonical_json(value: Any) -> bytes:
    """Spells each value in one way: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """Returns the sha256 of the canonical JSON of `value`, hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def to_json(value: Any) -> bytes:
    """Returns `value` as people like to read it."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def write_json(path: str, value: Any) -> None:
    """Writes `value` as a JSON document."""
    files.write_bytes(path, to_json(value))


def read_json(path: str) -> Any:
    """Reads a JSON document; raises FileNotFoundError, or DataContractError where it is none."""
    return parse_json(path, files.read_bytes(path))


def parse_json(path: str, data: bytes) -> Any:
    """Returns the value of the document `data` at `path`; raises DataContractError for no JSON."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataContractError(
            f"{path} should be JSON but cannot be parsed ({error}). It was written by COURIER and "
            "has since been damaged: restore it, or delete that file, and run the command again."
        ) from error
