"""A channel: frames between this process and one other, over a gloo group of the two, with a deadline for each call.

gloo says of a message neither how long it was nor, before one waits for it, whether it has come. So a receiver posts a
buffer for the longest frame there can be (a longer message would abort its process), with zeros wherever the frame's
end may lie: a frame that was cut short then has no trailer. A wait that times out breaks the connection: what misses
its deadline is lost, and the channel with it.
"""

from __future__ import annotations

import json
import mmap
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .frames import (
    APART,
    HEADER_BYTES,
    TRAILER_BYTES,
    FrameError,
    Header,
    Kind,
    check_trailer,
    decode,
    encode,
    encode_trailer,
)

LARGEST = 16 << 20
"""Most bytes of payload that any channel sends, and so what every receiver has room for."""

_OVERHEAD = HEADER_BYTES + TRAILER_BYTES


class Lost(ConnectionError):
    """The other side is gone, a deadline has passed, or the channel is broken or closed."""


@dataclass(eq=False)
class Link:
    """What connects a pair: its own gloo group and, where both sides have CUDA, an NCCL group for payloads.

    The connection ends when the groups are dropped: leave them to the link.

    Args:
        control: a gloo group of two, which carries frames.
        peer: the other side's rank in the groups.
        bulk: a second group of the same two, which carries the tensors of a frame; its header and trailer still go
            over ``control``.
        device: where tensors received over ``bulk`` are put.
    """

    control: Any
    peer: int
    bulk: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def close(self) -> None:
        """Drop the groups; a second call does nothing."""
        if self.bulk is not None and self.device.type == "cuda":
            self.bulk.abort()  # NCCL's kernels would wait for their peers
        self.control = self.bulk = None


@dataclass
class Tally:
    """What went one way: frames, bytes of payload, bytes with headers and trailers; by kind (frames, bytes)."""

    frames: int = 0
    bytes: int = 0
    total: int = 0
    by_kind: dict[Kind, tuple[int, int]] = field(default_factory=dict)

    def count(self, kind: Kind, payload: int) -> None:
        """Add one frame."""
        self.frames += 1
        self.bytes += payload
        self.total += payload + _OVERHEAD
        frames, total = self.by_kind.get(kind, (0, 0))
        self.by_kind[kind] = frames + 1, total + payload


class Frame(NamedTuple):
    """A frame received. ``payload`` is uint8 ``[n]`` in a receive buffer: valid until the second-next ``receive``."""

    header: Header
    payload: Tensor

    def text(self) -> dict[str, Any]:
        """The payload's JSON object. Raises FrameError if it is anything else."""
        if self.header.dtype != torch.uint8:
            raise FrameError("payload", self.header.dtype, "JSON text as uint8")
        return parse(self.payload.numpy().tobytes(), "payload")

    def tensors(self, *shapes: Sequence[int]) -> list[Tensor]:
        """Views of the payload, one behind the other. Raises FrameError unless their sizes add up to all of it."""
        counts = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        size = self.header.dtype.itemsize if self.header.dtype else 1
        if sum(counts) * size != self.header.payload:
            expected = f"{sum(counts) * size} for {[tuple(shape) for shape in shapes]} of {self.header.dtype}"
            raise FrameError("payload", f"{self.header.payload} bytes", expected)
        values = self.payload if self.header.dtype is None else self.payload.view(self.header.dtype)
        return [piece.view(tuple(shape)) for piece, shape in zip(values.split(counts), shapes, strict=True)]


def parse(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in ``data``; FrameError about ``name`` if it is anything else."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise FrameError(name, f"{len(data)} bytes that do not parse ({error})", "a JSON object") from None
    if not isinstance(value, dict):
        raise FrameError(name, f"JSON of type {type(value).__name__}", "a JSON object")
    return value


class Channel:
    """Frames to and from one peer, numbered from 0 in each direction.

    One thread may send while another receives; neither call may run twice at once.

    Args:
        link: what connects the two; the channel closes it.
        limit: most bytes of payload of a frame, sent or received: at most :data:`LARGEST`.
        deadline: seconds that a wait may take.
        window: most frames sent and not yet waited for, and most bytes of their payloads.
        ahead: so many receives are posted at a time: gloo sends a frame once its receive is posted, and so those that
            follow each other at once come without a round trip for each.
    """

    def __init__(
        self, link: Link, *, limit: int = LARGEST, deadline: float, window: tuple[int, int] = (32, 64 << 20),
        ahead: int = 1,
    ) -> None:  # fmt: skip
        if not 0 < limit <= LARGEST:
            raise ValueError(f"limit: got {limit} bytes, expected 1 to {LARGEST}; split what is larger into frames")
        if deadline <= 0:
            raise ValueError(f"deadline: got {deadline} s, expected a positive number of seconds")
        self.limit, self.deadline, self.closed = limit, deadline, False
        self.sent, self.received = Tally(), Tally()
        self._link, self._window = link, window
        self._unsent: deque[tuple[int, list[tuple[Any, Tensor]]]] = deque()
        self._unsent_bytes = 0
        # Zeros would pass for the trailer of frame 0.
        self._buffers = deque([_Buffer(ones=limit + _OVERHEAD), *(_Buffer() for _ in range(ahead + 1))])
        self._posted: deque[tuple[Any, _Buffer]] = deque()
        self._ahead = ahead

    def send(
        self,
        kind: Kind,
        *tensors: Tensor,
        text: dict[str, Any] | None = None,
        flags: int = 0,
        layer: int = 0,
        tokens: int = 0,
        roster: int = 0,
        argument: int = 0,
        dtype: torch.dtype | None = None,
        deadline: float | None = None,
    ) -> None:
        """Start sending a frame of ``tensors`` (any device and strides, one dtype) or of a ``text``.

        Returns at once, unless as many frames as the window has are still on their way: then it waits for the oldest.

        Args:
            kind: the frame's kind.
            tensors: the payload, packed one behind the other.
            text: a JSON object as payload.
            flags: bits of :data:`~seqpar.offload.frames.MEANINGS`.
            layer, tokens, roster, argument: the header's numbers.
            dtype: what the header says where there are no tensors; with some, theirs.
            deadline: seconds to wait for others to leave; None: the channel's.

        Raises:
            ValueError: a payload over the limit or of several types; nothing was sent.
            Lost: the window did not move within the deadline, or the peer is gone.
        """
        self._check_open()
        data = b"" if text is None else json.dumps(text).encode()
        if tensors:
            dtype = dtype or tensors[0].dtype
            self._check_tensors(tensors, dtype, text)
        elif text is not None:
            dtype = torch.uint8
        size = sum(tensor.numel() for tensor in tensors) * dtype.itemsize if tensors and dtype else len(data)
        if size > self.limit:
            raise ValueError(f"payload: got {size} bytes, expected at most {self.limit}; split it into frames")
        if flags & APART:
            raise ValueError(f"flags: got {flags:#x}, expected {APART:#x} to be left to the channel")
        apart = self._link.bulk is not None and bool(tensors) and size > 0
        sequence = self.sent.frames
        header = encode(
            Header(kind, sequence, size, dtype, flags | (APART if apart else 0), layer, tokens, roster, argument)
        )
        self._make_room(size, self.deadline if deadline is None else deadline)
        inside = 0 if apart else size
        message = torch.empty(_OVERHEAD + inside, dtype=torch.uint8)
        raw = message.numpy().data
        raw[:HEADER_BYTES] = header
        if data:
            raw[HEADER_BYTES : HEADER_BYTES + size] = data
        raw[HEADER_BYTES + inside :] = encode_trailer(sequence)
        if tensors and not apart:
            _pack(tensors, message[HEADER_BYTES : HEADER_BYTES + size])
        works: list[tuple[Any, Tensor]] = []
        try:
            works.append((self._link.control.send([message], self._link.peer, 0), message))
            if apart:
                payload = torch.empty(size, dtype=torch.uint8, device=self._link.device)
                _pack(tensors, payload)
                works.append((self._link.bulk.send([payload], self._link.peer, 0), payload))
        except (RuntimeError, AttributeError) as error:  # the latter: closed by another thread
            works.clear()
            self._lose(f"a frame of {size} bytes could not be sent: {_first_line(error)}")
        self._unsent.append((size, works))
        self._unsent_bytes += size
        self.sent.count(kind, size)

    def flush(self, deadline: float | None = None) -> None:
        """Wait until all frames have left, which takes a peer that receives: before ``close``, say. Raises Lost."""
        self._check_open()
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        while self._unsent:
            self._wait_for_oldest(end)

    def expect(self) -> None:
        """Post the next receives, so that transfers run while the caller computes."""
        self._check_open()
        while len(self._posted) < self._ahead:
            buffer = self._buffers.popleft()
            buffer.clear()
            try:
                self._posted.append((self._link.control.recv([buffer.tensor], self._link.peer, 0), buffer))
            except (RuntimeError, AttributeError) as error:
                self._lose(f"nothing can be received: {_first_line(error)}")

    def receive(self, deadline: float | None = None) -> Frame:
        """The next frame.

        Args:
            deadline: seconds from now; None: the channel's.

        Raises:
            Lost: the peer is gone or the deadline has passed; the channel is closed.
            FrameError: the frame is malformed; the channel is closed.
        """
        deadline = self.deadline if deadline is None else deadline
        end = time.monotonic() + deadline
        self.expect()
        try:
            work, buffer = self._posted.popleft()
        except IndexError:  # another thread has closed it
            self._check_open()
            raise
        failure = _wait(work, deadline)
        del work  # it keeps the connection open, and an exception keeps this frame's variables
        if failure:
            self._lose(f"waiting {deadline:g} s at most for a frame: {failure}")
        try:
            header = decode(buffer.raw[:HEADER_BYTES], sequence=self.received.frames, limit=self.limit)
            apart = bool(header.flags & APART)
            if apart and (self._link.bulk is None or not header.payload):
                raise FrameError("flags", f"{header.flags:#x}", "a payload apart only over a bulk group")
            stop = HEADER_BYTES + (0 if apart else header.payload)
            check_trailer(buffer.raw[stop : stop + TRAILER_BYTES], sequence=header.sequence)
        except FrameError:
            self.close()
            raise
        buffer.used = stop + TRAILER_BYTES
        # The buffer of frame 0 is full of ones: zeros are as good from now on, and cost no memory until written.
        self._buffers.append(buffer if header.sequence else _Buffer())
        payload = self._receive_apart(header.payload, end) if apart else buffer.tensor[HEADER_BYTES:stop]
        self.received.count(header.kind, header.payload)
        return Frame(header, payload)

    def close(self) -> None:
        """End the connection, with what is still unsent. Never waits or raises; a second call does nothing.

        A ``receive`` that another thread is in ends at its deadline.
        """
        self.closed = True
        self._posted.clear()
        self._unsent.clear()
        self._link.close()

    def _receive_apart(self, size: int, end: float) -> Tensor:
        payload = torch.empty(size, dtype=torch.uint8, device=self._link.device)
        try:
            work = self._link.bulk.recv([payload], self._link.peer, 0)
            failure = _wait(work, end - time.monotonic(), polled=self._link.device.type == "cuda")
            del work
        except RuntimeError as error:
            failure = _first_line(error)
        if failure:
            self._lose(f"waiting for {size} bytes of payload over the bulk group: {failure}")
        return payload

    def _check_tensors(self, tensors: tuple[Tensor, ...], dtype: torch.dtype, text: object) -> None:
        if text is not None:
            raise ValueError("payload: got tensors and a text, expected one of them; send two frames")
        types = {tensor.dtype for tensor in tensors} | {dtype}
        if len(types) > 1:
            raise ValueError(f"tensors: got {sorted(map(str, types))}, expected one dtype in a frame; convert them")

    def _make_room(self, size: int, deadline: float) -> None:
        frames, total = self._window
        end = time.monotonic() + deadline
        while self._unsent and (len(self._unsent) >= frames or self._unsent_bytes + size > total):
            self._wait_for_oldest(end)

    def _wait_for_oldest(self, end: float) -> None:
        size, works = self._unsent.popleft()
        self._unsent_bytes -= size
        for index in range(len(works)):
            polled = index > 0 and self._link.device.type == "cuda"
            failure = _wait(works[index][0], end - time.monotonic(), polled=polled)
            if failure:
                works.clear()
                self._lose(f"sending a frame of {size} bytes: {failure}")

    def _check_open(self) -> None:
        if self.closed:
            raise Lost("the channel is closed")

    def _lose(self, reason: str) -> NoReturn:
        self.close()
        raise Lost(reason) from None


class _Buffer:
    """Memory for the longest frame: pages of zeros, which take up none until they are written."""

    def __init__(self, ones: int = 0) -> None:
        memory = mmap.mmap(-1, LARGEST + _OVERHEAD)
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.raw = memoryview(memory)
        self.used = 0
        self._bytes = np.frombuffer(memory, dtype=np.uint8)
        self._bytes[:ones].fill(0xFF)

    def clear(self) -> None:
        """Zeros where the last frame was."""
        self._bytes[: self.used].fill(0)
        self.used = 0


def _pack(tensors: tuple[Tensor, ...], out: Tensor) -> None:
    values = out.view(tensors[0].dtype)
    start = 0
    for tensor in tensors:
        values[start : start + tensor.numel()].view(tensor.shape).copy_(tensor.detach())
        start += tensor.numel()


def _wait(work: Any, seconds: float, *, polled: bool = False) -> str | None:
    """Wait until ``work`` is done; what went wrong, if something did. NCCL's wait does not block: it is polled."""
    began = time.monotonic()
    seconds = max(seconds, 0.001)  # gloo takes 0 for no limit
    try:
        while polled and not work.is_completed():
            if time.monotonic() > began + seconds:
                return f"not done after {seconds:.3g} s"
            time.sleep(20e-6)
        work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:
        return f"{_first_line(error)} (after {time.monotonic() - began:.3g} s)"
    return None


def _first_line(error: Exception) -> str:
    message = str(error).split("\n")[0].split(". This is")[0]
    # gloo begins with the place in its source
    return message.split("] ", 1)[1] if message.startswith("[/") and "] " in message else message
