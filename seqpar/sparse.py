"""Masks of several parts: sparsely-sharded attention, windows with sinks, and a mask for each head."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import Tensor

from .masks import Causal, Documents, Mask, PrefixLM, SlidingWindow, check_int
from .parts import HeadGroup, Part, Stripes

LEAST_BLOCK = 16


@dataclass(frozen=True)
class SparselySharded(Mask):
    """S2 attention: each head sees a local band, and its own shard of the older keys (Lin et al. 2024).

    With keys in blocks of ``block`` tokens, a query of block ``i`` sees, causally, the keys of block ``j`` iff
    ``i - j < local_blocks``, or ``j % stride`` is its KV head's residue, or its KV head is dense. Query heads of one KV
    head see the same. Of ``B`` blocks, about ``1/stride + (1 - 1/stride)(1 - (1 - local_blocks/B)^2)`` of all causal
    pairs remain; see docs/s2.md.

    Args:
        block: tokens of a block, a power of two, 16 or more.
        local_blocks: blocks of the band, the query's own included.
        stride: a head sees every ``stride``-th older block.
        dense_heads: so many KV heads, the last ones, see every earlier key.
        offsets: the residue of each KV head that is not dense; by default 0, 1, 2, ..., again and again.
        allow_incomplete: let there be older blocks that no head sees. Otherwise a plan refuses a mask whose heads do
            not cover everything together.

    In packed documents blocks are counted from each document's beginning. A plan needs ``heads=``.
    """

    block: int = 64
    local_blocks: int = 16
    stride: int = 8
    dense_heads: int = 0
    offsets: tuple[int, ...] | None = None
    allow_incomplete: bool = False

    def __post_init__(self) -> None:
        for name in ("local_blocks", "stride"):
            check_int(f"SparselySharded({name}=)", getattr(self, name), least=1, remedy="it is a number of blocks")
        check_int("SparselySharded(dense_heads=)", self.dense_heads, least=0, remedy="it is a number of KV heads")
        check_int("SparselySharded(block=)", self.block, least=LEAST_BLOCK, remedy="64 suits most kernels")
        if self.block & (self.block - 1):
            raise ValueError(
                f"SparselySharded(block=): got {self.block}, expected a power of two, so that blocks are whole tiles "
                "of a kernel; 64 suits most"
            )
        if self.offsets is not None:
            if not isinstance(self.offsets, (tuple, list)):
                raise ValueError(f"SparselySharded(offsets=): got {self.offsets!r}, expected a residue per KV head")
            object.__setattr__(self, "offsets", tuple(self.offsets))
            for offset in self.offsets or ():
                check_int("SparselySharded(offsets=)", offset, least=0, remedy=f"residues are 0 .. {self.stride - 1}")
                if offset >= self.stride:
                    raise ValueError(
                        f"SparselySharded(offsets=): got {offset}, expected 0 .. {self.stride - 1}, residues of blocks "
                        "divided by the stride"
                    )

    @property
    def by_head(self) -> bool:
        """True: each has its own stripes."""
        return True

    def residues(self, kv_heads: int) -> tuple[int, ...]:
        """Which older blocks each KV head that is not dense sees."""
        sparse = max(0, kv_heads - self.dense_heads)
        return tuple(head % self.stride for head in range(sparse)) if self.offsets is None else self.offsets

    def groups(self, kv_heads: int | None) -> tuple[HeadGroup, ...]:
        """The sparse heads' band and stripes; and the dense heads."""
        assert kv_heads is not None, "checked before"
        residues = self.residues(kv_heads)
        band, older = _Band(self.block, self.local_blocks), _OlderThanBand(self.block, self.local_blocks)
        groups = []
        if residues:
            stripes = Stripes(self.block, self.stride, residues)
            groups.append(HeadGroup(range(len(residues)), (Part(band), Part(older, stripes))))
        if len(residues) < kv_heads:
            groups.append(HeadGroup(range(len(residues), kv_heads), (Part(Causal()),)))
        return tuple(groups)

    def check_among(self, terms: tuple[Mask, ...], documents: Documents, kv_heads: int | None) -> None:
        """Causal self-attention only, one such mask, as many offsets as heads, and nothing that no head sees."""
        name = "SparselySharded"
        others = [x for term in terms if isinstance(term, PerHead) for mask in term.masks for x in mask.terms]
        for term in (*terms, *others):
            if isinstance(term, PrefixLM) or (isinstance(term, SlidingWindow) and term.right != 0):
                raise ValueError(
                    f"{name} & {term!r}: got a mask that lets queries see later keys, expected causal ones; S2 "
                    "attention is causal"
                )
            if isinstance(term, SparselySharded) and term is not self:
                raise ValueError(f"{name} & {name}: got two of them, expected one; a key has one stripe")
        for row, key_row in zip(documents.queries, documents.keys, strict=True):
            for (a, b), (c, d) in zip(pairwise(row), pairwise(key_row), strict=True):
                if d - c < b - a:
                    raise ValueError(
                        f"{name}: got {b - a} queries over {d - c} keys, expected at least as many keys; S2 attention "
                        "is causal, its last query stands at its last key"
                    )
        assert kv_heads is not None, "checked before"
        if self.dense_heads > kv_heads:
            raise ValueError(
                f"{name}(dense_heads=): got {self.dense_heads} for {kv_heads} KV heads, expected at most so many"
            )
        residues = self.residues(kv_heads)
        if len(residues) != kv_heads - self.dense_heads:
            raise ValueError(
                f"{name}(offsets=): got {len(residues)} offsets for {kv_heads} KV heads of which {self.dense_heads} "
                f"are dense, expected {kv_heads - self.dense_heads}, one for each of the others"
            )
        missing = sorted(set(range(self.stride)) - set(residues))
        if missing and not self.dense_heads and not self.allow_incomplete:
            few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise ValueError(
                f"{name}: {kv_heads} KV heads see the residues {sorted(set(residues))} of stride {self.stride}, and no "
                f"head sees older blocks of residue {few}, expected every block to be seen by some head; use stride="
                f"{max(1, len(set(residues)))} or less, offsets that differ, dense_heads=1, or allow_incomplete=True "
                "(as where other layers are dense)"
            )


@dataclass(frozen=True)
class SinkWindow(Mask):
    """A causal window that keeps the first keys in sight (StreamingLLM, Xiao et al. 2023).

    A query sees the first ``sink`` keys (of its document) and the last ``window``, itself included.
    """

    sink: int
    window: int

    def __post_init__(self) -> None:
        check_int("SinkWindow(sink=)", self.sink, least=1, remedy="without sinks it is SlidingWindow(window - 1)")
        check_int("SinkWindow(window=)", self.window, least=1, remedy="a query sees itself at least")

    def groups(self, kv_heads: int | None) -> tuple[HeadGroup, ...]:
        """The window, and what of the sink is before it."""
        return (
            HeadGroup(None, (Part(SlidingWindow(self.window - 1)), Part(_SinkBeforeWindow(self.sink, self.window)))),
        )


@dataclass(frozen=True)
class PerHead(Mask):
    """A mask for each KV head: streaming heads beside retrieval heads, say (DuoAttention, Xiao et al. 2024).

    ``PerHead([Causal(), *[SinkWindow(64, 1024)] * 7])`` gives the first of eight KV heads everything. Documents are
    common to all heads: ``PerHead([...]) & Documents(cu_seqlens)``. A plan needs ``heads=``.
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.masks, (tuple, list)) or not self.masks:
            raise ValueError(f"PerHead: got {self.masks!r}, expected a list with a mask for each KV head")
        object.__setattr__(self, "masks", tuple(self.masks))
        for head, mask in enumerate(self.masks):
            if not isinstance(mask, Mask):
                raise ValueError(f"PerHead: got {mask!r} for KV head {head}, expected a mask such as seqpar.Causal()")
            if mask.documents is not None:
                raise ValueError(
                    f"PerHead: got documents for KV head {head}, expected them to be the same for all heads; write "
                    "PerHead([...]) & Documents(cu_seqlens)"
                )
            if mask.by_head:
                raise ValueError(
                    f"PerHead: got {mask!r} for KV head {head}, which differs by head itself, expected a mask that "
                    "does not; SparselySharded has dense_heads"
                )

    @property
    def by_head(self) -> bool:
        """True."""
        return True

    def groups(self, kv_heads: int | None) -> tuple[HeadGroup, ...]:
        """Neighbours with the same mask share one."""
        found, first = [], 0
        for mask, alike in groupby(self.masks):
            count = len(list(alike))
            found.append(HeadGroup(range(first, first + count), mask.groups(None)[0].parts))
            first += count
        return tuple(found)

    def check_among(self, terms: tuple[Mask, ...], documents: Documents, kv_heads: int | None) -> None:
        """One mask for each KV head."""
        if len(self.masks) != kv_heads:
            raise ValueError(f"PerHead: got {len(self.masks)} masks for {kv_heads} KV heads, expected one for each")


@dataclass(frozen=True)
class _Band(Mask):
    """The keys of the last ``blocks`` blocks, up to the query's own."""

    block: int
    blocks: int

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        key = query + (num_keys - num_queries)
        return _first_of_band(key, self.block, self.blocks), key + 1

    def jumps_within(self, num_queries: int, num_keys: int) -> range:
        return range((num_queries - num_keys) % self.block, num_queries, self.block)


@dataclass(frozen=True)
class _OlderThanBand(_Band):
    """The keys of the blocks before the last ``blocks``."""

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        return 0, _first_of_band(query + (num_keys - num_queries), self.block, self.blocks)


def _first_of_band(key: Tensor, block: int, blocks: int) -> Tensor:
    return (key.div(block, rounding_mode="floor") - (blocks - 1)) * block


@dataclass(frozen=True)
class _SinkBeforeWindow(Mask):
    """Those of the first ``sink`` keys that a window of ``window`` no longer holds."""

    sink: int
    window: int

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        return 0, (query + (num_keys - num_queries) - (self.window - 1)).clamp(max=self.sink)
