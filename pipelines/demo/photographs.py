"""Reads the items of a demo shop of photographs, and measures their colours from the images.

Goes in: a folder of images and a CSV file with the columns item_id, category and image_path. A list
that can't be used is refused; an image that can't be read is the user's own, and only counted.
"""

from __future__ import annotations

import csv
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from feature_jobs.schemas import OperatorError
from pipelines.demo.garments import COLOURS, NO_COLOUR, NO_PATTERN, Items

# ---------------------------------------------------------------------------- the item list


def read_item_list(items_csv: Path) -> bytes:
    """Reads the bytes of items.csv; raises OperatorError where they can't be read."""
    try:
        return items_csv.read_bytes()
    except OSError as error:
        raise OperatorError(
            f"The item list {items_csv} can't be read: {error.strerror}. A CSV file with the "
            "columns item_id, category and image_path was expected. Give its path as --items."
        ) from error


def listed_items(photos: Path, items_csv: Path) -> list[dict[str, str]]:
    """Reads and checks the rows of items.csv: item_id, category, and image_path inside `photos`.

    Raises OperatorError where the folder or the file can't be used as they are.
    """
    if not photos.is_dir():
        raise OperatorError(
            f"{photos} is not a folder. The photographs of the shop were expected there. Give the "
            "folder that the image paths of the item list are relative to as --images."
        )
    try:
        reader = csv.DictReader(StringIO(read_item_list(items_csv).decode("utf-8-sig"), newline=""))
        columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise OperatorError(
            f"The item list {items_csv} is no CSV file in UTF-8: {error}. One with the columns "
            "item_id, category and image_path was expected. Save it as such."
        ) from error
    lacking = [name for name in ("item_id", "category", "image_path") if name not in columns]
    if lacking:
        raise OperatorError(
            f"The item list {items_csv} has the columns {', '.join(columns) or '(none)'}, and "
            f"lacks {', '.join(lacking)}. Expected are item_id, category and image_path. Rename or "
            "add them in its first line."
        )
    _check_rows(rows, photos.resolve(), items_csv)
    return rows


def _check_rows(rows: list[dict[str, str]], photos: Path, items_csv: Path) -> None:
    """Refuses an ID that is no int64 or comes twice, and an image path that leaves the folder."""
    seen: set[int] = set()
    for number, row in enumerate(rows, start=1):
        where = f"Item {number} of the list {items_csv}"
        if not _is_int64(row["item_id"]):
            raise OperatorError(
                f"{where} has the item_id {row['item_id']!r}. A whole number of 64 bits was "
                "expected, since it is a key of the shop's tables. Number the items."
            )
        item_id = int(row["item_id"])
        if item_id in seen:
            raise OperatorError(
                f"{where} has the item_id {item_id}, which an earlier item has. Each item was "
                "expected once; with two, no click could be told to belong to one of them. Remove "
                "or renumber one."
            )
        seen.add(item_id)
        path = row["image_path"] or ""
        if (
            not path
            or Path(path).is_absolute()
            or not (photos / path).resolve().is_relative_to(photos)
        ):
            raise OperatorError(
                f"{where} has the image_path {path!r}. A path relative to {photos} and inside it "
                "was expected; nothing outside that folder is read. Move the image there, or give "
                "another folder as --images."
            )


def _is_int64(text: str) -> bool:
    digits = re.fullmatch(r"-?\d{1,19}", text or "", flags=re.ASCII)
    return digits is not None and -(2**63) <= int(text) < 2**63


# ---------------------------------------------------------------------------- looks


def photographed_items(photos: Path, rows: list[dict[str, str]]) -> Items:
    """Returns the items of `listed_items`, their colours measured from the photographs."""
    looks = [_measured_colour(photos / row["image_path"]) for row in rows]
    return Items(
        item_id=np.array([int(row["item_id"]) for row in rows], dtype=np.int64),
        image_uri=np.array([row["image_path"] for row in rows]),
        category=np.array([row["category"] or "" for row in rows]),
        colour=np.array([colour for colour, _ in looks]),
        pattern=np.full(len(rows), NO_PATTERN),
        fault=np.array([fault for _, fault in looks]),
    )


def _measured_colour(path: Path) -> tuple[int, str]:
    """Measures the colour code and the fault of a photograph."""
    try:
        with Image.open(path) as image:
            return list(COLOURS).index(dominant_colour(image)), ""
    except FileNotFoundError:
        return NO_COLOUR, "missing"
    # All that Pillow raises on bytes that are no image, or too large a one.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return NO_COLOUR, "undecodable"


def dominant_colour(image: Image.Image) -> str:
    """Returns the name in COLOURS that most pixels vote for in the middle, where the garment lies.

    Raises what Pillow raises on a broken image.
    """
    image.draft("RGB", (96, 96))  # a JPEG decodes at an eighth of the cost
    small = image.convert("RGB").resize((60, 60), Image.Resampling.BOX)
    hsv = np.asarray(small.crop((18, 18, 42, 42)).convert("HSV")).reshape(-1, 3)
    names, votes = np.unique(_colour_names(hsv), return_counts=True)
    return str(names[votes.argmax()])


def _colour_names(hsv: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    """Names each pixel by a colour in COLOURS: uint8 HSV `[pixels, 3]` to names `[pixels]`."""
    hue = hsv[:, 0].astype(np.float64) * 360 / 256
    saturation, value = hsv[:, 1] / 255, hsv[:, 2] / 255
    reddish = (hue < 12) | (hue >= 335)
    rules = [
        ("black", (value < 0.24) | ((value < 0.34) & (saturation < 0.35))),
        ("white", (saturation < 0.14) & (value > 0.74)),
        ("grey", saturation < 0.17),
        # A pale red is called pink, a dark one red.
        ("pink", reddish & (saturation < 0.55) & (value > 0.55)),
        ("red", reddish),
        ("orange", hue < 42),
        ("yellow", hue < 68),
        ("green", hue < 168),
        ("blue", hue < 256),
        ("purple", hue < 300),
    ]
    names, hits = zip(*rules, strict=True)
    return np.select(hits, names, default="pink")
