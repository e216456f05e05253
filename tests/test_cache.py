"""A cache gives what the whole sequence gives, and holds no page that can't be read again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqpar import (
    Causal,
    Chunked,
    Documents,
    Full,
    KVCache,
    Mask,
    PerHead,
    PrefixLM,
    SinkWindow,
    SlidingWindow,
    SparselySharded,
)
from support.oracle import dense_attention

HEADS, LENGTH = (8, 4), 300
Sees = Callable[[Tensor, Tensor, int], Tensor]  # (queries, keys, KV head) -> which keys each of them sees


def sparse(local: int, stride: int, dense: int = 0) -> Sees:
    """Blocks of 16."""
    return lambda i, j, h: (i // 16 - j // 16 < local) | (j // 16 % stride == h % stride) | (h >= 4 - dense)


def streaming(i: Tensor, j: Tensor, h: int) -> Tensor:
    return ((i - j < 10_000), (j < 20) | (i - j < 30), (i - j <= 9), (i - j <= 9))[h]


# Besides, all of them are causal.
MASKS: dict[str, tuple[Mask, Sees]] = {
    "causal": (Causal(), lambda i, j, h: j <= i),
    "window": (SlidingWindow(40), lambda i, j, h: i - j <= 40),
    "sinks": (SinkWindow(5, 40), lambda i, j, h: (j < 5) | (i - j < 40)),
    "sinks in a window": (
        SinkWindow(5, 40) & SlidingWindow(90),
        lambda i, j, h: ((j < 5) | (i - j < 40)) & (i - j <= 90),
    ),
    "sinks in chunks": (
        SinkWindow(5, 40) & Chunked(100),
        lambda i, j, h: ((j < 5) | (i - j < 40)) & (i // 100 == j // 100),
    ),
    "chunked": (Causal() & Chunked(70), lambda i, j, h: i // 70 == j // 70),
    "s2": (SparselySharded(16, 2, 4), sparse(2, 4)),
    "s2 dense head": (SparselySharded(16, 3, 3, dense_heads=1), sparse(3, 3, 1)),
    "s2 in a window": (
        SparselySharded(16, 1, 4) & SlidingWindow(150),
        lambda i, j, h: sparse(1, 4)(i, j, h) & (i - j <= 150),
    ),
    "s2 in chunks": (
        SparselySharded(16, 2, 4) & Chunked(123),
        lambda i, j, h: sparse(2, 4)(i, j, h) & (i // 123 == j // 123),
    ),
    "streaming heads": (PerHead([Causal(), SinkWindow(20, 30), SlidingWindow(9), SlidingWindow(9)]), streaming),
}


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS[0], HEADS[1], HEADS[1])
    return [
        torch.randn(2, LENGTH, h, d, generator=generator, dtype=dtype) for h, d in zip(heads, (8, 8, 6), strict=True)
    ]


def cache_of(mask: Mask, **options: object) -> KVCache:
    return KVCache(mask, heads=HEADS, head_dim=(8, 6), batch=2, dtype=torch.float64, **options)


@pytest.mark.parametrize("sizes", [(1,), (100, 1, 1, 1, 7), (17, 3), (LENGTH,)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_appending_gives_what_the_whole_gives(name: str, sizes: tuple[int, ...]) -> None:
    q, k, v = inputs()
    mask, sees = MASKS[name]
    expected, _ = dense_attention(q, k, v, seen(sees, torch.arange(LENGTH), LENGTH).repeat_interleave(2, 0)[None])
    cache, outs = cache_of(mask, **({} if "s2" in name else {"page": 16})), []
    while cache.length < LENGTH:
        count = min(sizes[len(outs) % len(sizes)], LENGTH - cache.length)
        new = slice(cache.length, cache.length + count)
        outs.append(cache.attend(q[:, new], k[:, new], v[:, new]))
    assert (torch.cat(outs, 1) - expected).norm() <= 1e-10 * expected.norm()


def seen(sees: Sees, queries: Tensor, keys: int) -> Tensor:
    """bool ``[KV heads, queries, keys]``, by definition."""
    i, j = queries[:, None], torch.arange(keys)[None, :]
    return torch.stack([sees(i, j, head) & (j <= i) for head in range(4)])


def readable(sees: Sees, head: int, length: int) -> set[int]:
    """Pages of 16 of which some query from ``length`` on sees a key: by brute force, over the next thousand."""
    keys = seen(sees, torch.arange(length, length + 1000), length)[head].any(0).nonzero().flatten()
    return set((keys // 16).tolist())


@pytest.mark.parametrize("name", MASKS)
def test_what_can_not_be_read_again_is_freed(name: str) -> None:
    mask, sees = MASKS[name]
    q, k, v = inputs()
    cache, at = cache_of(mask, **({} if "s2" in name else {"page": 16})), 0
    for count in (1, 40, 3, 100, 1, 1, 50):
        cache.attend(*(x[:, at : at + count] for x in (q, k, v)))
        at += count
        held = [readable(sees, head, at) for head in range(4)]
        current = {at // 16} if at % 16 else set()  # begun, and written next
        assert cache.resident_pages == [len(pages | current) for pages in held]
    assert cache.resident_bytes == sum(cache.resident_pages) * 2 * 16 * (8 + 6) * 8


def test_pages_of_a_sparse_head_follow_the_formula() -> None:
    """``L + (i + 1 - L) / v`` of ``i + 1`` blocks, on the mean over heads; and memory stays within an eighth of it."""
    mask, block, local, stride = SparselySharded(16, 4, 4), 16, 4, 4
    cache = KVCache(mask, heads=4, head_dim=2, dtype=torch.float32)
    for blocks in range(1, 65):
        x = torch.zeros(1, block, 4, 2)
        cache.attend(x, x, x)
        if blocks >= local and (blocks - local + 1) % stride == 0:  # the next query opens a block, and drops one
            pages = sum(cache.resident_pages) / 4
            assert pages == local - 1 + (blocks - local + 1) / stride
    assert cache._k.shape[1] <= 1.25 * 16 * (sum(cache.resident_pages) + 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cache_of(Causal() & Documents([0, 4])), "expected a mask without documents; give each its own cache"),
        (lambda: cache_of(SparselySharded(16, 1, 8)), "no head sees older blocks of residue 4, 5, 6, 7"),
        (lambda: cache_of(SparselySharded(16, 1, 4), page=64), "page: got 64, expected 16, the mask's block"),
        (lambda: cache_of(Causal(), page=0), "page: got 0, expected an integer >= 1; it is a number of tokens"),
        (
            lambda: cache_of(Full()),
            "under which queries see later keys, expected a causal mask; write mask & seqpar.Cau",
        ),
        (lambda: cache_of(PrefixLM(3)), "under which queries see later keys, expected a causal mask"),
        (lambda: cache_of(Chunked(70)), "under which queries see later keys, expected a causal mask"),
        (lambda: KVCache(Causal(), heads=None, head_dim=8), "heads: got None, expected what the cache is to hold"),
        (lambda: KVCache(Causal(), heads=4, head_dim=8, batch=0), "batch: got 0, expected an integer >= 1"),
        (lambda: cache_of(Causal()).attend(*inputs(), scale=float("nan")), "scale: got nan, expected a finite number"),
        (lambda: cache_of(Causal()).attend(*inputs(), kernel="fast"), "kernel: got 'fast', expected one of auto"),
        (lambda: cache_of(Causal()).attend(*(x.requires_grad_() for x in inputs())), "call it under torch.no_grad()"),
        (lambda: cache_of("causal"), "mask: got 'causal', expected a mask"),
        (
            lambda: cache_of(Causal()).attend(*(x[:1] for x in inputs())),
            r"q: got shape (1, 300, 8, 8), expected [2, tok",
        ),
        (lambda: cache_of(Causal()).attend(*(x[:, :0] for x in inputs())), r"q: got shape (2, 0, 8, 8), expected"),
        (
            lambda: cache_of(Causal()).attend(*inputs(torch.float32)),
            "q: got torch.float32 on cpu, expected the cache's",
        ),
    ],
)
def test_refusals(call: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is looked at
        call()
    assert words in str(caught.value)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    cache, (q, k, v) = cache_of(Causal()), inputs()
    first = cache.attend(q[:, :5], k[:, :5], v[:, :5])
    with pytest.raises(ValueError, match="v: got shape"):
        cache.attend(q[:, 5:6], k[:, 5:6], v[:, 5:7])
    with pytest.raises(ValueError, match="expected CUDA"):
        cache.attend(q[:, 5:90], k[:, 5:90], v[:, 5:90], kernel="library")
    assert (cache.length, cache.resident_pages) == (5, [1] * 4)
    again = cache_of(Causal())
    again.attend(q[:, :5], k[:, :5], v[:, :5])
    new = [x[:, 5:9] for x in (q, k, v)]
    assert torch.equal(cache.attend(*new), again.attend(*new))
    assert first.shape == (2, 5, 8, 6)
