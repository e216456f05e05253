"""Frames at the decoder: each field is checked, and no change of a byte goes unseen."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
import torch

from seqpar.offload.frames import (
    APART,
    HEADER_BYTES,
    TRAILER_BYTES,
    VERSION,
    FrameError,
    Header,
    Kind,
    check_trailer,
    decode,
    encode,
    encode_trailer,
)

LIMIT = 1 << 20
HEADER = Header(Kind.ATTEND, 7, 8192, torch.bfloat16, 0x03, layer=31, tokens=2, roster=5, argument=-(2**63))


def changed(offset: int, value: bytes, header: Header = HEADER) -> bytes:
    """The bytes of ``header`` with some others put in, and a checksum that holds."""
    data = bytearray(encode(header))
    data[offset : offset + len(value)] = value
    data[40:44] = struct.pack("<I", zlib.crc32(data[:40] + data[44:]))
    return bytes(data)


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        Header(Kind.BYE, 0),
        Header(Kind.HELLO, 2**64 - 1, 12, torch.uint8, APART, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**63 - 1),
        *(Header(Kind.STORE, 1, 8 * n, dtype) for n, dtype in enumerate((torch.float32, torch.float16, torch.float64))),
    ],
    ids=str,
)
def test_headers_come_back(header):
    data = encode(header)
    assert len(data) == HEADER_BYTES == 64
    for container in (bytes, bytearray, memoryview):
        assert decode(container(data), sequence=header.sequence, limit=LIMIT) == header


def test_the_layout_is_what_the_table_says():
    expected = struct.pack("<4sHHBBHIIIqQ", b"SQPA", VERSION, 5, 2, 3, 0, 31, 2, 5, -(2**63), 8192)
    tail = bytes(12) + struct.pack("<Q", 7)
    data = encode(HEADER)
    assert data == expected + struct.pack("<I", zlib.crc32(expected + tail)) + tail
    assert [int(kind) for kind in Kind] == list(range(1, 16))


@pytest.mark.parametrize("offset", range(HEADER_BYTES))
def test_a_flip_of_any_byte_is_seen(offset):
    for bit in range(8):
        data = bytearray(encode(HEADER))
        data[offset] ^= 1 << bit
        with pytest.raises(FrameError):
            decode(data, sequence=7, limit=LIMIT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(0, b"SQPB"), "magic: got b'SQPB', expected b'SQPA'"),
        (changed(4, b"\2"), "version: got 2, expected 1"),
        (changed(6, b"\0"), "kind: got 0, expected 1 to 15"),
        (changed(6, b"\x10"), "kind: got 16, expected 1 to 15"),
        (changed(8, b"\6"), "dtype: got 6, expected 0 to 5"),
        (changed(9, b"\x10"), "flags: got 0x10, expected bits of 0x8f"),
        (changed(10, b"\1"), "reserved bytes: got 0x0001"),
        (changed(44, b"\1"), "reserved bytes: got 0x0000, 01"),
        (changed(55, b"\1"), "reserved bytes"),
        (changed(32, struct.pack("<Q", LIMIT + 2)), f"payload: got {LIMIT + 2} bytes, expected at most {LIMIT}"),
        (changed(32, b"\xff" * 8), "payload: got 18446744073709551615 bytes, expected at most"),
        (changed(32, b"\1"), "payload: got 8193 bytes, expected a multiple of 2 for torch.bfloat16"),
        (changed(8, b"\0"), "payload: got 8192 bytes, expected none without a data type"),
        (changed(56, b"\6"), "sequence: got 6, expected 7"),
        (changed(56, b"\x08"), "sequence: got 8, expected 7"),
        (bytes(64), "magic"),
        (b"", "header: got 0 bytes, expected 64 bytes"),
        (encode(HEADER)[:-1], "header: got 63 bytes"),
        (encode(HEADER) + b"\0", "header: got 65 bytes"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_fields_are_named(data, message):
    with pytest.raises(FrameError, match="^" + message.replace("(", r"\(")):
        decode(data, sequence=7, limit=LIMIT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode_trailer(8), "trailer: got 0x8, expected sequence number 0x7"),
        (bytes(8), "trailer: got 0x0"),
        (encode_trailer(7)[:-1], "trailer: got 7 bytes, expected 8 bytes"),
    ],
)
def test_trailers_are_checked(data, message):
    check_trailer(encode_trailer(7), sequence=7)
    with pytest.raises(FrameError, match=message):
        check_trailer(data, sequence=7)


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.OPEN, 0, layer=2**32),
        Header(Kind.OPEN, 0, tokens=-1),
        Header(Kind.OPEN, 0, argument=2**63),
        Header(Kind.OPEN, 0, flags=256),
        Header(Kind.OPEN, 0, 8, torch.int64),
    ],
    ids=str,
)
def test_what_a_header_cannot_hold_is_not_encoded(header):
    with pytest.raises(ValueError, match=r"got .*expected"):
        encode(header)


def test_mutated_frames_are_refused(pytestconfig):
    """What is accepted is what was sent: or, with its checksum mended, at least a frame that encodes to itself."""
    generator = random.Random(8)
    accepted = refused = 0
    for _ in range(pytestconfig.getoption("--frames")):
        frame = random_frame(generator)
        data, sequence = mutate(frame, generator), int.from_bytes(frame[-TRAILER_BYTES:], "little")
        mended = generator.random() < 0.5 and len(data) >= HEADER_BYTES
        if mended:
            data[40:44] = struct.pack("<I", zlib.crc32(data[:40] + data[44:HEADER_BYTES]))
        try:
            header = open_frame(data, sequence)
        except FrameError:
            refused += 1
        else:
            accepted += 1
            assert encode(header) == data[:HEADER_BYTES]
            assert mended or data[:HEADER_BYTES] == frame[:HEADER_BYTES]
        assert encode(open_frame(frame, sequence)) == frame[:HEADER_BYTES]  # the next one is served
    assert refused > accepted > 0


def open_frame(data: bytes | bytearray, sequence: int) -> Header:
    """What a receiver does with a whole frame."""
    header = decode(data[:HEADER_BYTES], sequence=sequence, limit=LIMIT)
    stop = HEADER_BYTES + header.payload
    check_trailer(data[stop : stop + TRAILER_BYTES], sequence=sequence)
    return header


def random_frame(generator: random.Random) -> bytes:
    """A valid frame of up to 64 values."""
    dtype = generator.choice([None, torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    size = generator.randrange(64) * dtype.itemsize if dtype else 0
    numbers = [generator.getrandbits(32) for _ in range(3)]
    sequence = generator.getrandbits(generator.choice([1, 8, 32, 63]))
    kind, flags = generator.choice(list(Kind)), generator.getrandbits(4)
    header = encode(Header(kind, sequence, size, dtype, flags, *numbers, generator.getrandbits(60)))
    return header + generator.randbytes(size) + encode_trailer(sequence)


def mutate(frame: bytes, generator: random.Random) -> bytearray:
    """The frame with a byte changed, a part replaced, lost, repeated or moved, or its end cut off."""
    data = bytearray(frame)
    place, length = generator.randrange(len(data)), generator.randrange(1, 12)
    way = generator.randrange(6)
    if way == 0:
        data[place] ^= 1 << generator.randrange(8)
    elif way == 1:
        data[place : place + length] = generator.randbytes(length)
    elif way == 2:
        del data[place : place + length]
    elif way == 3:
        data[place:place] = data[place : place + length]
    elif way == 4:
        del data[place:]
    else:
        field, size = generator.choice([(4, 2), (6, 2), (8, 1), (9, 1), (12, 4), (24, 8), (32, 8), (56, 8)])
        data[field : field + size] = generator.choice([0, 1, 2**7, 2 ** (8 * size) - 1]).to_bytes(size, "little")
    return data
