"""What model ranks and workers say to each other in frames: flags, limits, and how numbers are packed.

A rank opens shards (OPEN), names a list of them once (ROSTER), and then, layer by layer, sends queries (ATTEND) and
the new tokens' keys and values (APPEND) of the list; the worker answers with outputs (RESULT). Pieces of a frame are
those of the roster's shards, one after another.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seqpar.shards import Rooms
from seqpar.stores import Appended

LEAVING = 1
"""Flag of an answer: the worker is about to end, and wants its shards taken elsewhere."""
WANTS_LSE = 2
"""Flag of queries: the output is one of several partials, and its lse is wanted too."""
STREAMS = 4
"""Flag of keys and values that come without queries, and are not answered."""
ROSTERS = 64
"""So many of a connection's latest rosters are remembered."""
SHARDS = 65_536
"""The most shards that a connection may open."""
MOST = {"capacity": 1 << 28, "chunk": 1 << 28, "page": 1 << 28, "layers": 4096, "heads": 65_536, "head_dim": 65_536}
"""The most that a shard may be asked to have of each."""
PAGES = 1 << 22
"""The most pages to a text."""
LEAST = 256
"""Bytes that a layer of a shard takes at least, also where it has no rows."""


DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
"""Names of what a shard may hold."""


def size_of(rooms: Rooms, head_dim: tuple[int, int], dtype: torch.dtype, layers: int) -> int:
    """Bytes that a shard of one sequence takes."""
    return layers * max(LEAST, rooms.rows * sum(head_dim) * dtype.itemsize)


def bits_of(number: float) -> int:
    """A float in a header's integer field."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def float_of(bits: int) -> float:
    """What :func:`bits_of` packed."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def as_dtype(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """An lse, bit by bit, as elements of the dtype that its frame has: ``[..., T]`` as ``[..., T x ratio]``."""
    return lse.clone(memory_format=torch.contiguous_format).view(dtype)


def cut(appended: Sequence[Appended], tokens: int, most: int) -> Iterator[tuple[slice, tuple[Appended, ...]]]:
    """A step of new tokens, the last of ``tokens`` in each row, as steps of at most ``most``."""
    for first in range(0, tokens, most):
        end = min(first + most, tokens)
        yield slice(first, end), tuple(_within(row, tokens, first, end) for row in appended)


def _within(row: Appended, tokens: int, first: int, end: int) -> Appended:
    new = max(0, end - max(first, tokens - row.new))
    return Appended(row.length - min(row.new, tokens - end), new)
