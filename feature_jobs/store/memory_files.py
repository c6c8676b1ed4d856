"""Writes whole files in memory, before they go to a store in one piece."""

from collections.abc import Callable

import pyarrow as pa

_HEADS = 1 << 20  # bytes of heads, footers and dictionaries that a small file may have beside rows


def written(size: int, write: Callable[[pa.NativeFile], object]) -> pa.Buffer:
    """Returns the bytes that `write` writes, from rows of `size` bytes, to the file it is given.

    A buffer that grows is copied again and again, which of vectors takes longer than to encode
    them. So there is room for twice the rows at once: what is not used of it takes no memory. What
    does not fit is written anew to a buffer that grows: `write` may be called twice, and does
    nothing but write.
    """
    room = pa.allocate_buffer(2 * size + _HEADS)
    sink = pa.FixedSizeBufferWriter(room)
    try:
        write(sink)
        return room.slice(0, sink.tell())
    except OSError:  # as when it is full
        del sink, room
        growing = pa.BufferOutputStream()
        write(growing)
        return growing.getvalue()
