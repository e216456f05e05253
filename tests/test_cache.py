"""A cache gives what the whole sequence gives, and holds no page that can't be read again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import seqpar
from seqpar import Causal, Chunked, Documents, KVCache, Mask, PerHead, SinkWindow, SlidingWindow, SparselySharded

HEADS, LENGTH = (8, 4), 300
MASKS = {
    "causal": Causal(),
    "window": SlidingWindow(40),
    "sinks": SinkWindow(5, 40),
    "chunked": Causal() & Chunked(70),
    "s2": SparselySharded(16, 2, 4),
    "s2 dense head": SparselySharded(16, 3, 3, dense_heads=1),
    "s2 in a window": SparselySharded(16, 1, 4) & SlidingWindow(150),
    "streaming heads": PerHead([Causal(), SinkWindow(20, 30), SlidingWindow(9), SlidingWindow(9)]),
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
    expected = seqpar.attention(q, k, v, seqpar.plan(MASKS[name], length=LENGTH, heads=HEADS), kernel="reference")
    cache, outs = cache_of(MASKS[name], **({} if "s2" in name else {"page": 16})), []
    while cache.length < LENGTH:
        count = min(sizes[len(outs) % len(sizes)], LENGTH - cache.length)
        new = slice(cache.length, cache.length + count)
        outs.append(cache.attend(q[:, new], k[:, new], v[:, new]))
    assert (torch.cat(outs, 1) - expected).norm() <= 1e-10 * expected.norm()


def readable(mask: Mask, head: int, length: int) -> set[int]:
    """Pages of 16 of which some query from ``length`` on sees a key, by brute force over the next thousand."""
    plan = seqpar.plan(mask, length=length + 1000, heads=HEADS)
    (group,) = [g for g in plan.work.groups if g.heads is None or head in g.heads]
    keys = torch.arange(length)
    pages: set[int] = set()
    for part in group.parts:
        low, high = part.mask.intervals(torch.arange(length + 1000), length + 1000, length + 1000)
        seen = ((keys >= low[0, length:, None]) & (keys < high[0, length:, None])).any(0)
        if part.stripes is not None and group.heads is not None:
            seen &= keys // 16 % part.stripes.stride == part.stripes.residues[head - group.heads.start]
        pages |= set((keys[seen] // 16).tolist())
    return pages


@pytest.mark.parametrize("name", MASKS)
def test_what_can_not_be_read_again_is_freed(name: str) -> None:
    mask = MASKS[name]
    q, k, v = inputs()
    cache, at = cache_of(mask, **({} if "s2" in name else {"page": 16})), 0
    for count in (1, 40, 3, 100, 1, 1, 50):
        cache.attend(*(x[:, at : at + count] for x in (q, k, v)))
        at += count
        held = [readable(mask, head, at) for head in range(4)]
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
    assert cache.length == 5
    again = cache_of(Causal())
    again.attend(q[:, :5], k[:, :5], v[:, :5])
    new = [x[:, 5:9] for x in (q, k, v)]
    assert torch.equal(cache.attend(*new), again.attend(*new))
    assert first.shape == (2, 5, 8, 6)
