"""Takes out of an image file what says nothing of its pixels, before a parser meets it.

Profiles, texts, thumbnails and the indices of animations are what decoders stumble over: Pillow
refuses a PNG whose profile or text is above 1 MB unpacked, or of which a text is called as one of
its own notes, and a JPEG with a profile's segment cut short. Nobody who looks at the picture sees a
difference. What is taken out is not read, so that no bomb in it goes off.
"""

import struct
from collections.abc import Iterator

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"

# The one text that Pillow looks for a turn in, not compressed: Adobe's way to store XMP.
_PNG_XMP = b"XML:com.adobe.xmp\0\0"

_APPLICATION, _APP1, _COMMENT = range(0xE0, 0xF0), 0xE1, 0xFE
_FILL = 0xFF
# Markers that a length follows; RST, SOI, EOI and SOS are left out, after which there is no header.
_WITH_BODY = {*range(0xC0, 0xD0), *range(0xDB, 0xFF)}
# So many bytes of APP0 and APP14 libjpeg wants, to learn from them what colours are stored.
_COLOURS = {0xE0: 14, 0xEE: 12}


def without_metadata(data: bytes) -> bytes:
    """Returns the image file without what changes no pixel; itself, where there is nothing of it.

    Of a PNG stay the critical chunks, transparency, EXIF, and XMP that is not compressed; of an
    animation the first picture. Of a JPEG stay EXIF, XMP, and what tells its colours. Other formats
    are as they were. Raises nothing: from where something is no chunk or segment, a file is left as
    it is; metadata cut short by its end are metadata.
    """
    if data.startswith(_PNG):
        parts = _png_parts(data)
    elif data.startswith(_JPEG):
        parts = _jpeg_parts(data)
    else:
        return data
    view, kept, whole = memoryview(data), [], True
    for start, end, is_kept in parts:
        whole &= is_kept
        if is_kept:
            kept.append(view[start:end])
    return data if whole else b"".join(kept)


def _png_parts(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yields of the signature and each chunk where it begins and ends, and whether it stays."""
    yield 0, len(_PNG), True
    at = len(_PNG)
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if len(kind) < 4 or not kind.isalpha():  # of bytes: ASCII letters, as all types are
            break
        body, end = at + 8, at + 12 + length  # 4 bytes of checksum
        is_xmp = kind == b"iTXt" and data.startswith(_PNG_XMP, body)
        yield at, end, kind[:1].isupper() or kind in (b"tRNS", b"eXIf") or is_xmp  # upper: critical
        at = end
    yield at, len(data), True


def _jpeg_parts(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yields of each segment before the pixels where it begins and ends, and whether it stays."""
    yield 0, 2, True
    at = 2
    while at + 4 <= len(data):
        first, marker, length = struct.unpack_from(">BBH", data, at)
        if first != 0xFF or (marker != _FILL and marker not in _WITH_BODY):
            break
        end = at + 1 if marker == _FILL else at + 2 + length
        yield at, end, marker == _FILL or _shows(marker, length - 2)
        at = end
    yield at, len(data), True


def _shows(marker: int, size: int) -> bool:
    """Tells whether a segment of a JPEG, its body of `size` bytes, may change what is shown."""
    if marker in _COLOURS:
        return size >= _COLOURS[marker]
    return marker == _APP1 or (marker not in _APPLICATION and marker != _COMMENT)
