"""Frames of attention offload: a fixed header of checked sizes and types, a payload, and the sequence number again.

Pure functions from bytes to bytes. All numbers are little endian; nothing in a frame is ever executed or unpickled.

| bytes | field |
|---|---|
| 4 | magic ``SQPA`` |
| 2, 2 | version, kind |
| 1, 1, 2 | data type of the payload, flags, zero |
| 4, 4, 4 | layer, tokens, roster |
| 8 | argument (signed) |
| 8 | bytes of payload |
| 4 | CRC-32 of the header's other bytes |
| 12 | zero |
| 8 | sequence number, from 0 up in each direction |

Behind the payload the sequence number stands once more (8 bytes), so that a frame that was cut short is seen.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

VERSION = 1
HEADER_BYTES = 64
TRAILER_BYTES = 8
APART = 0x80
"""Flag: the payload travels over the link's bulk group, not between header and trailer."""
MEANINGS = 0x0F
"""Flags whose meaning depends on the kind; the remaining bits must be zero."""

_MAGIC = b"SQPA"
_LAYOUT = struct.Struct("<4sHHBBHIIIqQI12sQ")
_TRAILER = struct.Struct("<Q")
_ZEROS = bytes(12)
_CRC = slice(40, 44)
_CODES: dict[torch.dtype | None, int] = {
    None: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float64: 4,
    torch.uint8: 5,
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 1
    OPEN = 2
    FREE = 3
    ROSTER = 4
    ATTEND = 5
    APPEND = 6
    RESULT = 7
    TRUNCATE = 8
    FETCH = 9
    STORE = 10
    STATUS = 11
    SYNC = 12
    DONE = 13
    REFUSED = 14
    BYE = 15


_KINDS = {int(kind): kind for kind in Kind}


class FrameError(ValueError):
    """A frame, or a text from the store, is malformed: names the field, what was got and what was expected."""

    def __init__(self, field: str, got: Any, expected: Any) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")


@dataclass(frozen=True)
class Header:
    """A frame's header: ``payload`` in bytes, whose elements are of ``dtype`` (None: no payload)."""

    kind: Kind
    sequence: int
    payload: int = 0
    dtype: torch.dtype | None = None
    flags: int = 0
    layer: int = 0
    tokens: int = 0
    roster: int = 0
    argument: int = 0


def encode(header: Header) -> bytes:
    """The 64 bytes of ``header``. Raises ValueError for a value that its field cannot hold."""
    if header.dtype not in _CODES:
        raise ValueError(f"dtype: got {header.dtype}, expected one of {_names()}; convert before sending")
    fields = (header.kind, _CODES[header.dtype], header.flags, 0, header.layer, header.tokens, header.roster)
    try:
        data = bytearray(
            _LAYOUT.pack(_MAGIC, VERSION, *fields, header.argument, header.payload, 0, _ZEROS, header.sequence)
        )
    except struct.error as error:
        expected = "layer, tokens and roster from 0 to 2^32 - 1, flags to 255 and an argument of 64 bits"
        raise ValueError(f"header: got {header}, expected {expected}; {error}") from None
    data[_CRC] = _checksum(data).to_bytes(4, "little")
    return bytes(data)


def decode(data: bytes | bytearray | memoryview, *, sequence: int, limit: int) -> Header:
    """The header in the 64 bytes of ``data``; every field is checked.

    Args:
        data: the header's bytes.
        sequence: the number that the next frame of this direction carries.
        limit: most bytes of payload.

    Raises:
        FrameError: names the first wrong field, what it holds and what was expected.
    """
    if len(data) != HEADER_BYTES:
        raise FrameError("header", f"{len(data)} bytes", f"{HEADER_BYTES} bytes")
    magic, version, kind, code, flags, reserved, layer, tokens, roster, argument, payload, crc, zeros, number = (
        _LAYOUT.unpack(data)
    )
    if magic != _MAGIC:
        raise FrameError("magic", magic, _MAGIC)
    if version != VERSION:
        raise FrameError("version", version, VERSION)
    if crc != _checksum(data):
        raise FrameError("crc", f"{crc:#010x}", f"{_checksum(data):#010x} over the header's other bytes")
    if kind not in _KINDS:
        raise FrameError("kind", kind, f"{min(Kind).value} to {max(Kind).value}")
    if code not in _DTYPES:
        raise FrameError("dtype", code, f"0 to {max(_DTYPES)}")
    if flags & ~(APART | MEANINGS):
        raise FrameError("flags", f"{flags:#04x}", f"bits of {APART | MEANINGS:#04x}")
    if reserved or zeros != _ZEROS:
        raise FrameError("reserved bytes", f"{reserved:#06x}, {zeros.hex()}", "zeros")
    if number != sequence:
        raise FrameError("sequence", number, f"{sequence}: frames neither repeat, nor go missing, nor overtake")
    dtype = _DTYPES[code]
    if payload > limit:
        raise FrameError("payload", f"{payload} bytes", f"at most {limit}")
    if dtype is None and payload:
        raise FrameError("payload", f"{payload} bytes", "none without a data type")
    if dtype is not None and payload % dtype.itemsize:
        raise FrameError("payload", f"{payload} bytes", f"a multiple of {dtype.itemsize} for {dtype}")
    return Header(_KINDS[kind], number, payload, dtype, flags, layer, tokens, roster, argument)


def encode_trailer(sequence: int) -> bytes:
    """The 8 bytes at the end of frame ``sequence``."""
    return _TRAILER.pack(sequence)


def check_trailer(data: bytes | bytearray | memoryview, *, sequence: int) -> None:
    """Raise FrameError unless ``data`` is the trailer of frame ``sequence``."""
    if len(data) != TRAILER_BYTES:
        raise FrameError("trailer", f"{len(data)} bytes", f"{TRAILER_BYTES} bytes")
    (number,) = _TRAILER.unpack(data)
    if number != sequence:
        raise FrameError("trailer", f"{number:#x}", f"sequence number {sequence:#x}: the frame was cut short")


def _checksum(data: bytes | bytearray | memoryview) -> int:
    return zlib.crc32(data[_CRC.stop :], zlib.crc32(data[: _CRC.start]))


def _names() -> str:
    return ", ".join(str(dtype) for dtype in _CODES if dtype is not None)
