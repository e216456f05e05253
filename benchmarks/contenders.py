"""Who is measured by ``kernels.py``, and on what.

A case is one attention call. A contender prepares two calls for it, a forward and a backward, on the same memory as all
others: ``[B, T, H, D]``, of which PyTorch's functions get transposed views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import seqpar
from seqpar.kernels import Intervals, Kernel, OutputGradient, kernel_named
from seqpar.kernels.flash import Direction

# Packed documents: these lengths, 16,384 tokens together, over and over; causal within each.
DOCUMENTS = (4093, 127, 2039, 17, 6144, 257, 1013, 31, 509, 11, 2143)
WINDOW = 4096
CHECKED = 2048  # queries and keys of the case on which a contender has to be right before it is timed


def window(length: int) -> int:
    """How many keys a query sees: fewer only where a case is a small copy of a large one."""
    return min(WINDOW, length // 4)


def documents(length: int) -> list[int]:
    """Cumulative lengths: DOCUMENTS in turn, in proportion where fewer tokens than they have are wanted."""
    whole, bounds = min(length, sum(DOCUMENTS)), [0]
    for size in cycle(DOCUMENTS):
        bounds.append(min(length, bounds[-1] + max(1, size * whole // sum(DOCUMENTS))))
        if bounds[-1] == length:
            return bounds
    raise AssertionError("a cycle does not end")


MASKS: dict[str, Callable[[int], seqpar.Mask]] = {
    "full": lambda length: seqpar.Full(),
    "causal": lambda length: seqpar.Causal(),
    "window": lambda length: seqpar.SlidingWindow(window(length) - 1),
    "documents": lambda length: seqpar.Causal() & seqpar.Documents(documents(length)),
}


class Inputs(NamedTuple):
    """q, dout ``[B, Tq, H, D|Dv]``, k, v ``[B, Tk, Hkv, D|Dv]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call."""

    mask: str = "causal"
    queries: int = 16_384
    keys: int = 16_384
    batch: int = 1
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128
    value_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, device: torch.device, make: Callable[..., Tensor] = torch.randn) -> Inputs:
        """New tensors, the same ones every time."""
        torch.manual_seed(0)
        q, k = (self.queries, self.heads, self.dim), (self.keys, self.kv_heads, self.dim)
        sizes = q, k, (*k[:2], self.value_dim), (*q[:2], self.value_dim)
        return Inputs(*(make(self.batch, *size, device=device, dtype=self.dtype) for size in sizes))

    @property
    def intervals(self) -> Intervals:
        """The keys that each query sees."""
        return _intervals(self.mask, self.queries, self.keys)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.dim**-0.5

    @property
    def pairs(self) -> int:
        """The query-key pairs that the mask allows, of all heads and batch rows."""
        seen = (self.intervals.end - self.intervals.start).sum(dtype=torch.int64)
        return int(seen) * self.batch * self.heads

    def flop(self, direction: Direction) -> int:
        """What has to be computed: 2 products forward (QK, PV), 5 backward (QK again, dP, dV, dQ, dK)."""
        forward, backward = 2 * (self.dim + self.value_dim), 2 * (3 * self.dim + 2 * self.value_dim)
        return (forward if direction == "forward" else backward) * self.pairs

    @property
    def small(self) -> Case:
        """The case with fewer tokens."""
        return replace(self, queries=min(self.queries, CHECKED), keys=min(self.keys, CHECKED))


@cache
def _intervals(mask: str, queries: int, keys: int) -> Intervals:
    return seqpar.plan(MASKS[mask](queries), length=queries, kv_length=keys).work.blocks[0].intervals


class Calls(NamedTuple):
    """``forward()`` gives out ``[B, Tq, H, Dv]``; ``start_backward()`` a call that gives dq, dk and dv."""

    forward: Callable[[], Tensor]
    start_backward: Callable[[], Callable[[], tuple[Tensor, ...]]]


class Contender(Protocol):
    """Somebody's attention."""

    def prepare(self, case: Case, inputs: Inputs) -> Calls:
        """The calls; whatever exception says best why they cannot be made."""


class Ours:
    """One of this package's kernels, called as rings call it: gradients are added to fp32 buffers."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def prepare(self, case: Case, inputs: Inputs) -> Calls:
        """See :class:`Contender`."""
        q, k, v, dout = inputs
        kernel, intervals, scale = self._kernel, case.intervals, case.scale
        kernel.check(q, k, v, [intervals])

        def start_backward() -> Callable[[], tuple[Tensor, ...]]:
            partial = kernel.forward(q, k, v, intervals, scale, None, final=True)
            out = partial.out.to(q.dtype)
            grads = tuple(torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))

            def backward() -> tuple[Tensor, ...]:
                # A new one each time: it keeps delta, which is part of the work.
                kernel.backward(OutputGradient(out, partial.lse, dout, None), q, k, v, intervals, scale, *grads)
                return grads

            return backward

        return Calls(lambda: kernel.forward(q, k, v, intervals, scale, None, final=True).out, start_backward)


def _differentiable(attend: Callable[..., Tensor], inputs: Inputs) -> Calls:
    """Calls of a function of q, k, v ``[B, H, T, D]`` that autograd differentiates."""
    q, k, v, dout = (x.transpose(1, 2) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def start_backward() -> Callable[[], tuple[Tensor, ...]]:
        out = attend(*leaves)
        return lambda: tuple(x.transpose(1, 2) for x in torch.autograd.grad(out, leaves, dout, retain_graph=True))

    return Calls(lambda: attend(*leaves).detach().transpose(1, 2), start_backward)


class Sdpa:
    """PyTorch's ``scaled_dot_product_attention`` held to one backend: what a user without us would call."""

    def __init__(self, backend: SDPBackend) -> None:
        self._backend = backend

    def prepare(self, case: Case, inputs: Inputs) -> Calls:
        """See :class:`Contender`."""
        if case.mask not in ("full", "causal") or (case.mask == "causal" and case.queries != case.keys):
            raise ValueError(f"no {case.mask} mask")
        causal, gqa = case.mask == "causal", case.heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(self._backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        return _differentiable(attend, inputs)


class Flex:
    """PyTorch's FlexAttention, compiled for the very shape, with a block mask that skips what nobody sees."""

    def prepare(self, case: Case, inputs: Inputs) -> Calls:
        """See :class:`Contender`."""
        torch._dynamo.reset()  # its limit of recompilations counts all shapes together
        torch._functorch.config.donated_buffer = False  # else a graph can be differentiated only once
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        block_mask, gqa = self._block_mask(case, inputs.q.device), case.heads != case.kv_heads
        return _differentiable(lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa), inputs)

    @staticmethod
    def _block_mask(case: Case, device: torch.device) -> BlockMask | None:
        if case.mask == "full":
            return None
        assert case.queries == case.keys, "positions of queries are those of keys"
        width = window(case.queries)
        # Which document each token is in.
        bounds = torch.tensor(documents(case.queries), device=device)
        document = torch.bucketize(torch.arange(case.queries, device=device), bounds, right=True)
        rules = {
            "causal": lambda b, h, query, key: key <= query,
            "window": lambda b, h, query, key: (key <= query) & (key > query - width),
            "documents": lambda b, h, query, key: (key <= query) & (document[query] == document[key]),
        }
        return create_block_mask(rules[case.mask], None, None, case.queries, case.keys, device=device)


CONTENDERS: dict[str, Contender] = {
    **{
        name: Ours(kernel_named(name))
        for name in ("auto", "triton", "triton_atomic", "library:cudnn", "library:flash", "library:flash_attn")
    },
    "sdpa:cudnn": Sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa:flash": Sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa:efficient": Sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": Flex(),
}


@contextmanager
def repeatable() -> Iterator[None]:
    """PyTorch's operators give the same bits every time, or refuse; new memory stays as it is."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
