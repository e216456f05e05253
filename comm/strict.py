"""A gloo group that is as strict as NCCL, and stricter: for tests on machines where NCCL cannot run several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .process_group import ProcessGroupWorld
from .world import Messages, Transfer

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


class StrictWorld(ProcessGroupWorld):
    """Refuses what gloo lets pass and NCCL does not, or what both let pass and turn into wrong numbers.

    Tensors must be contiguous. Each message carries its size, its dtype and the ordinal of the call that sent it, and
    the receiver's call must expect just those. What is being received reads as NaN until ``wait``, and what is being
    sent must not change before it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._ordinal = 0

    def _start(self, sends: Messages, receives: Messages) -> Transfer:
        self._ordinal += 1
        ordinal = self._ordinal
        for peer, tensor in (*sends, *receives):
            if not tensor.is_contiguous():
                raise ValueError(f"strict: tensor for rank {peer} has strides {tensor.stride()}, expected contiguous")
        headers = [(peer, self._header(ordinal, tensor)) for peer, tensor in sends]
        sent = [(tensor, tensor.clone()) for _, tensor in sends]
        outgoing = super()._start([message for pair in zip(headers, sends, strict=True) for message in pair], [])
        for _, tensor in receives:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)

        def wait() -> None:
            for peer, tensor in receives:
                expected = self._header(ordinal, tensor)
                header, payload = torch.empty_like(expected), torch.empty_like(tensor)
                super(StrictWorld, self)._start([], [(peer, header)]).wait()
                if not torch.equal(header, expected):
                    raise ConnectionError(
                        f"strict: rank {self.rank} got (call, elements, dtype) {header.tolist()} from rank {peer}, "
                        f"expected {expected.tolist()}"
                    )
                super(StrictWorld, self)._start([], [(peer, payload)]).wait()
                tensor.copy_(payload)
            outgoing.wait()
            for tensor, before in sent:
                if not torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)):
                    raise ConnectionError(f"strict: rank {self.rank} changed a tensor that was being sent")

        return Transfer(wait)

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        return super(ProcessGroupWorld, self)._all_gather(tensor)

    @staticmethod
    def _header(ordinal: int, tensor: Tensor) -> Tensor:
        return torch.tensor([ordinal, tensor.numel(), _DTYPES.index(tensor.dtype)])
