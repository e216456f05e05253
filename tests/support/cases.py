"""The table of masks, layouts and heads that the tests go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import seqpar
from seqpar import Causal, Chunked, Documents, Full, Mask, PrefixLM, SlidingWindow

from .oracle import HeadSees, Sees, dense_mask

LENGTH = 61
DOCUMENTS = [0, 7, 8, 31, 61]
BATCH_DOCUMENTS = [[0, 40, 61], [0, 3, 20, 21, 61]]


@dataclass(frozen=True)
class MaskCase:
    """A mask, and which pairs it allows by its definition.

    Where heads see different keys, ``sees`` is also given the KV head and their number, and ``mask`` may depend on it.
    """

    mask: Mask | Callable[[int], Mask]
    sees: Sees | HeadSees
    length: int = LENGTH
    kv_length: int = LENGTH
    cu_q: tuple[tuple[int, ...], ...] = ()
    cu_k: tuple[tuple[int, ...], ...] = ()

    def of(self, kv_heads: int) -> Mask:
        """The mask of so many KV heads."""
        return self.mask if isinstance(self.mask, Mask) else self.mask(kv_heads)

    @cache  # noqa: B019 - cases live as long as the test run
    def dense(self) -> Tensor:
        """bool ``[B|1, length, kv_length]``, the same for all heads."""
        return self._dense(self.sees)

    @cache  # noqa: B019
    def dense_of(self, heads: int, kv_heads: int) -> Tensor:
        """bool ``[B|1, heads, length, kv_length]``."""
        if not self.of(kv_heads).by_head:
            return self.dense().unsqueeze(1)
        each = [self._dense(lambda i, j, n, m, h=head: self.sees(i, j, n, m, h, kv_heads)) for head in range(kv_heads)]
        return torch.stack(each, 1).repeat_interleave(heads // kv_heads, 1)

    def _dense(self, sees: Sees) -> Tensor:
        cu_q = self.cu_q or ((0, self.length),)
        cu_k = self.cu_k or (self.cu_q or ((0, self.kv_length),))
        return torch.stack([dense_mask(sees, list(a), list(b)) for a, b in zip(cu_q, cu_k, strict=True)])


def _aligned(i: int, n: int, m: int) -> int:
    return i + m - n


def s2(
    block: int, local: int, stride: int, dense: int = 0, offsets: tuple[int, ...] | None = None
) -> tuple[Mask, HeadSees]:
    """Sparsely-sharded attention, and its definition, pair by pair."""

    def sees(i: int, j: int, n: int, m: int, head: int, kv_heads: int) -> bool:
        i += m - n
        sparse = head < kv_heads - dense
        residue = head % stride if offsets is None else offsets[head] if sparse else 0
        in_band = i // block - j // block < local
        return j <= i and (in_band or not sparse or j // block % stride == residue)

    return seqpar.SparselySharded(block, local, stride, dense, offsets, allow_incomplete=True), sees


def _sink_window(i: int, j: int, n: int, m: int, head: int = 0, kv_heads: int = 0) -> bool:
    return j <= _aligned(i, n, m) and (j < 3 or _aligned(i, n, m) - j < 9)


def _streaming_heads(i: int, j: int, n: int, m: int, head: int, kv_heads: int) -> bool:
    return j <= i if head % 3 == 0 else _sink_window(i, j, n, m)


def _documents(*rows: list[int]) -> dict[str, Any]:
    return {"cu_q": tuple(map(tuple, rows))}


MASKS = {
    "full": MaskCase(Full(), lambda i, j, n, m: True),
    "causal": MaskCase(Causal(), lambda i, j, n, m: j <= i),
    "window": MaskCase(SlidingWindow(9), lambda i, j, n, m: i - 9 <= j <= i),
    "window_both": MaskCase(SlidingWindow(5, 3), lambda i, j, n, m: i - 5 <= j <= i + 3),
    "prefix": MaskCase(PrefixLM(17), lambda i, j, n, m: j < 17 or j <= i),
    "chunked": MaskCase(Causal() & Chunked(13), lambda i, j, n, m: j <= i and i // 13 == j // 13),
    "documents": MaskCase(Causal() & Documents(DOCUMENTS), lambda i, j, n, m: j <= i, **_documents(DOCUMENTS)),
    "batch_documents_window": MaskCase(
        Documents(BATCH_DOCUMENTS) & SlidingWindow(11),
        lambda i, j, n, m: i - 11 <= j <= i,
        **_documents(*BATCH_DOCUMENTS),
    ),
    "sink_window": MaskCase(seqpar.SinkWindow(3, 9) & Documents(DOCUMENTS), _sink_window, **_documents(DOCUMENTS)),
    "streaming_heads": MaskCase(
        lambda kv_heads: seqpar.PerHead([seqpar.SinkWindow(3, 9) if h % 3 else Causal() for h in range(kv_heads)]),
        _streaming_heads,
    ),
    "s2": MaskCase(*s2(16, 1, 2)),
    "s2_documents": MaskCase(
        s2(16, 1, 2, dense=1)[0] & Documents(DOCUMENTS), s2(16, 1, 2, dense=1)[1], **_documents(DOCUMENTS)
    ),
    "cross_causal": MaskCase(Causal(), lambda i, j, n, m: j <= _aligned(i, n, m), kv_length=47),
    "cross_documents": MaskCase(
        Documents([0, 20, 20, 61], [0, 9, 30, 47]) & PrefixLM(4),
        lambda i, j, n, m: j < 4 or j <= _aligned(i, n, m),
        kv_length=47,
        cu_q=((0, 20, 20, 61),),
        cu_k=((0, 9, 30, 47),),
    ),
}

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced", "document_zigzag", "explicit")
SCHEDULES = {"forward": seqpar.Ring("forward"), "direct": seqpar.Ring("direct"), "allgather": seqpar.AllGather()}
SCHEDULES |= {"double_ring": seqpar.DoubleRing(degree=2)}
SCHEDULES |= {"ulysses": seqpar.Ulysses(), "hybrid": seqpar.Ulysses(seqpar.Ring("direct"), degree=2)}
SCHEDULES |= {
    "tree": seqpar.Tree(),
    "tree_nodes": seqpar.Tree(merge="scatter", degree=2),
    "tree_sharded": seqpar.Tree("sharded"),
}
IN_PAIRS = ("double_ring", "hybrid", "tree_nodes")  # of two ranks
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (3, 1)}


def fits(mask: str, layout: str) -> bool:
    """Whether a layout can hold a mask: dealing by document needs one list of documents."""
    documents = MASKS[mask].of(2).documents
    return layout != "document_zigzag" or (documents is not None and len(documents.queries) == 1)


def scheduled(*worlds: int) -> list[tuple[str, int]]:
    """Every schedule on each number of ranks that it can share a sequence between: blocks of two want an even one."""
    return [(s, world) for s in SCHEDULES for world in worlds if s not in IN_PAIRS or world % 2 == 0]


def layout_of(case: MaskCase, layout: str, world: int) -> Any:
    """The ``layout=`` argument: the name itself, or a random, uneven dealing of tokens."""
    if layout != "explicit":
        return layout
    generator = torch.Generator().manual_seed(world)

    def deal(total: int) -> list[Tensor]:
        owner = torch.randint(0, world, (total,), generator=generator)
        return [(owner == rank).nonzero().squeeze(1) for rank in range(world)]

    queries = deal(case.length)
    return seqpar.Layout.explicit(queries, queries if case.kv_length == case.length else deal(case.kv_length))


def tensors(
    case: MaskCase, heads: tuple[int, int], dtype: torch.dtype, head_dim: int = 16, value_dim: int = 16, batch: int = 2
) -> dict[str, Tensor]:
    """Whole q, k, v, and the gradients dout and dlse of the output."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": normal(batch, case.length, heads[0], head_dim),
        "k": normal(batch, case.kv_length, heads[1], head_dim),
        "v": normal(batch, case.kv_length, heads[1], value_dim),
        "dout": normal(batch, case.length, heads[0], value_dim),
        "dlse": normal(batch, heads[0], case.length).to(torch.float64 if dtype == torch.float64 else torch.float32),
        "sinks": normal(heads[0]),
    }
