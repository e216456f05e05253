"""A gloo group that is as strict as NCCL, and stricter: for tests on machines where NCCL cannot run several ranks."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .process_group import ProcessGroupWorld
from .world import Messages, Transfer

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


@dataclass(eq=False)
class _Expected:
    """A message that a receive is waiting for."""

    header: Tensor
    payload: Tensor


class StrictWorld(ProcessGroupWorld):
    """Refuses what gloo lets pass and NCCL does not, or what both let pass and turn into wrong numbers.

    Tensors must be contiguous. Each message carries its size, its dtype and the ordinal of the call that sent it, and
    the receiver's call must expect just those. What is being received reads as NaN until ``wait``, and what is being
    sent must not change before it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._ordinal = 0
        self._expected: dict[int, deque[_Expected]] = defaultdict(deque)  # by peer, in the order in which they began

    def _start(self, sends: Messages, receives: Messages) -> Transfer:
        self._ordinal += 1
        ordinal = self._ordinal
        for peer, tensor in (*sends, *receives):
            if not tensor.is_contiguous():
                raise ValueError(f"strict: tensor for rank {peer} has strides {tensor.stride()}, expected contiguous")
        headers = [(peer, self._header(ordinal, tensor)) for peer, tensor in sends]
        sent = [(tensor, tensor.clone()) for _, tensor in sends]
        outgoing = super()._start([message for pair in zip(headers, sends, strict=True) for message in pair], [])
        expected = []
        for peer, tensor in receives:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
            expected.append((peer, tensor, _Expected(self._header(ordinal, tensor), torch.empty_like(tensor))))
            self._expected[peer].append(expected[-1][2])

        def wait() -> None:
            for peer, tensor, message in expected:
                while message in self._expected[peer]:
                    self._receive(peer, self._expected[peer].popleft())
                tensor.copy_(message.payload)
            outgoing.wait()
            for tensor, before in sent:
                if not torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)):
                    raise ConnectionError(f"strict: rank {self.rank} changed a tensor that was being sent")

        return Transfer(wait)

    def _receive(self, peer: int, message: _Expected) -> None:
        header = torch.empty_like(message.header)
        super()._start([], [(peer, header)]).wait()
        if not torch.equal(header, message.header):
            raise ConnectionError(
                f"strict: rank {self.rank} got (call, elements, dtype) {header.tolist()} from rank {peer}, "
                f"expected {message.header.tolist()}"
            )
        super()._start([], [(peer, message.payload)]).wait()

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        return super(ProcessGroupWorld, self)._all_gather(tensor)

    @staticmethod
    def _header(ordinal: int, tensor: Tensor) -> Tensor:
        return torch.tensor([ordinal, tensor.numel(), _DTYPES.index(tensor.dtype)])
