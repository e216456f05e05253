"""A cache gives what the whole sequence gives, and holds no page that can't be read again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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
from seqpar import plan as plan_of
from seqpar.comm import Traffic, World, run_loopback
from support.oracle import dense_attention, error

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
    given = {"heads": HEADS, "head_dim": (8, 6), "batch": 2, "dtype": torch.float64, "capacity": LENGTH, "chunk": 40}
    return KVCache(mask, **given | options)


def filled(mask: Mask) -> KVCache:
    cache = cache_of(mask)
    append(cache, LENGTH)
    return cache


def paged(name: str) -> dict[str, int]:
    return {} if "s2" in name else {"page": 16}


@cache
def whole(name: str) -> Tensor:
    """The dense oracle's output."""
    _, sees = MASKS[name]
    return dense_attention(*inputs(), seen(sees, torch.arange(LENGTH), LENGTH).repeat_interleave(2, 0)[None])[0]


def append(cache: KVCache, count: int) -> Tensor:
    new = slice(cache.length, cache.length + count)
    return cache.attend(*(x[:, new] for x in inputs()))


@pytest.mark.parametrize(
    ("world", "sizes"),
    [(1, (1,)), (1, (100, 1, 1, 1, 7)), (1, (LENGTH,)), (2, (17, 3)), (3, (100, 1, 1, 1, 7)), (4, (90, 1, 40))],
    ids=str,
)
@pytest.mark.parametrize("name", MASKS)
def test_appending_gives_what_the_whole_gives(name: str, world: int, sizes: tuple[int, ...]) -> None:
    def job(w: World) -> tuple[Tensor, dict[str, Traffic]]:
        cache, outs = cache_of(MASKS[name][0], group=w, **paged(name)), []
        while cache.length < LENGTH:
            outs.append(append(cache, min(sizes[len(outs) % len(sizes)], LENGTH - cache.length)))
        return torch.cat(outs, 1), dict(w.meter.by_kind), len(outs)

    results = run_loopback(world, job)
    for out, sent, calls in results:
        assert error(out, whole(name)) <= 1e-10
        assert torch.equal(out, results[0][0]), "the same bits on every rank"
        if world > 1:  # one exchange for a call of fp64 (out, lse), and one agreement for the whole text
            bytes_sent = (world - 1) * 2 * LENGTH * HEADS[0] * (6 * 8 + 8)
            assert sent == {"agree": (1, (world - 1) * 104), "partial": (calls, bytes_sent)}


@pytest.mark.parametrize("schedule", ["tree", "ring", "allgather", "ulysses", "auto"])
@pytest.mark.parametrize("name", ["causal", "window", "s2 dense head", "streaming heads"])
def test_ranks_share_a_prompt_a_chunk_at_a_time(name: str, schedule: str) -> None:
    """Rows of unequal length, padded on the left: first 100 columns by any schedule, then 61 more, then one by one."""
    pads, total, cut = (0, 37), 170, (100, 61)
    mask, sees = MASKS[name]
    rows = [x[:, :total] for x in inputs()]
    padded = [torch.stack([torch.roll(y[i], p, 0) for i, p in enumerate(pads)]) for y in rows]
    expected = []
    for i, p in enumerate(pads):
        n = total - p
        dense = seen(sees, torch.arange(n), n).repeat_interleave(2, 0)[None]
        expected.append(dense_attention(*(y[i : i + 1, :n] for y in rows), dense)[0])

    def job(w: World) -> list[Tensor]:
        cache, at, outs = cache_of(mask, group=w, **paged(name)), 0, []
        for count in cut:
            counts = [max(0, min(count, at + count - p)) for p in pads]
            plan = cache.plan(count, counts=counts, schedule=schedule)
            local = [plan.shard(y[:, at : at + count]) for y in padded]
            outs.append(plan.unshard(cache.prefill(*local, plan)))
            at += count
        while at < total:
            outs.append(cache.attend(*(y[:, at : at + 1] for y in padded)))
            at += 1
        assert cache.lengths == tuple(total - p for p in pads)
        out = torch.cat(outs, 1)
        return [out[i : i + 1, p:] for i, p in enumerate(pads)]

    for result in run_loopback(3, job):
        for out, oracle in zip(result, expected, strict=True):
            assert error(out, oracle) <= 1e-10


def test_layers_share_steps_and_nothing_else() -> None:
    cache, alone = cache_of(Causal(), layers=2), cache_of(Causal())
    q, k, v = inputs()
    for new in (slice(0, 50), slice(50, 51)):
        expected = alone.attend(q[:, new], k[:, new], v[:, new])
        assert torch.equal(cache.attend(q[:, new], k[:, new], v[:, new]), expected)
        assert not torch.equal(
            cache.attend(q[:, new], v[:, new, :, :1].expand(-1, -1, -1, 8), v[:, new], layer=1), expected
        )
    assert cache.length == 51


@pytest.mark.parametrize("name", MASKS)
def test_drafts_are_verified_and_taken_back(name: str) -> None:
    """Wrong tokens that are truncated leave nothing behind; the right ones see each other as the mask says."""

    def job(w: World) -> Tensor:
        cache, outs = cache_of(MASKS[name][0], group=w, **paged(name)), []
        q, k, v = inputs()
        while cache.length < LENGTH:
            at = cache.length
            count = min(5, LENGTH - at)
            wrong = slice(at, at + count)
            cache.attend(q[:, wrong].flip(1), k[:, wrong].flip(1) * 3, v[:, wrong].flip(1))
            cache.truncate(at)
            outs.append(append(cache, min(count, 3)))
        return torch.cat(outs, 1)

    for out in run_loopback(2, job):
        assert error(out, whole(name)) <= 1e-10


@pytest.mark.parametrize("name", ["causal", "window", "s2"])
def test_fork_free_and_reorder(name: str) -> None:
    q, k, v = inputs()

    def job(w: World) -> None:
        cache = cache_of(MASKS[name][0], group=w, batch=3, **paged(name))
        rows = [torch.cat([x, x[:1]]) for x in (q, k, v)]
        cache.attend(*(x[:, :80] for x in rows))
        cache.fork(1, into=[0, 2])
        out = cache.attend(*(x[1:2, 80:90].expand(3, -1, -1, -1) for x in (q, k, v)))
        for row in out:
            assert error(row, whole(name)[1, 80:90]) <= 1e-10
        cache.free([0])
        assert cache.lengths == (0, 90, 90)
        counts = [7, 0, 3]
        step = [torch.cat([x[0:1, :7], x[1:2, 90:97], x[1:2, 86:93]]) for x in (q, k, v)]
        out = cache.attend(*step, counts=counts)
        assert error(out[0], whole(name)[0, :7]) <= 1e-10
        assert not out[1].any()
        assert error(out[2, 4:], whole(name)[1, 90:93]) <= 1e-10
        assert cache.lengths == (7, 90, 93)
        cache.reorder([1, 0, 0])
        assert cache.lengths == (90, 7, 7)
        out = cache.attend(*(torch.cat([x[1:2, 90:91], *[x[0:1, 7:8]] * 2]) for x in (q, k, v)))
        assert error(out[0], whole(name)[1, 90:91]) <= 1e-10
        assert error(out[2], whole(name)[0, 7:8]) <= 1e-10

    run_loopback(2, job)


def seen(sees: Sees, queries: Tensor, keys: int) -> Tensor:
    """bool ``[KV heads, queries, keys]``, by definition."""
    i, j = queries[:, None], torch.arange(keys)[None, :]
    return torch.stack([sees(i, j, head) & (j <= i) for head in range(4)])


def readable(sees: Sees, head: int, length: int) -> set[int]:
    """Pages of 16 of which some query from ``length`` on sees a key: by brute force, over the next thousand."""
    keys = seen(sees, torch.arange(length, length + 1000), length)[head].any(0).nonzero().flatten()
    return set((keys // 16).tolist())


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_what_can_not_be_read_again_is_freed(name: str, world: int) -> None:
    mask, sees = MASKS[name]

    def job(w: World) -> list[list[int]]:
        cache, pages = cache_of(mask, group=w, **paged(name)), []
        for count in (1, 40, 3, 100, 1, 1, 50):
            append(cache, count)
            pages.append(cache.resident_pages())
        return pages

    at = 0
    for count, *ranks in zip((1, 40, 3, 100, 1, 1, 50), *run_loopback(world, job), strict=True):
        at += count
        held = [
            readable(sees, head, at) | ({at // 16} if at % 16 else set()) for head in range(4)
        ]  # begun, written next
        assert [sum(each) for each in zip(*ranks, strict=True)] == [len(pages) for pages in held]


def test_pages_of_a_sparse_head_follow_the_formula_and_are_even_over_ranks() -> None:
    """``L + (i + 1 - L) / v`` of ``i + 1`` blocks on the mean over heads; a stride that ranks divide, all the same."""
    mask, block, local, stride, world = SparselySharded(16, 4, 4), 16, 4, 4, 4

    def job(w: World) -> list[list[int]]:
        cache, pages = KVCache(mask, heads=4, head_dim=2, capacity=2048, chunk=16, group=w), []
        for _ in range(128):
            x = torch.zeros(1, block, 4, 2)
            cache.attend(x, x, x)
            pages.append(cache.resident_pages())
        dense = KVCache(Causal(), heads=4, head_dim=2, capacity=2048, group=w).resident_bytes
        assert cache.resident_bytes <= 0.35 * dense
        return pages

    ranks = run_loopback(world, job)
    for blocks in range(local, 129):
        if (blocks - local + 1) % stride == 0:  # the next query opens a block, and drops one
            each = [rank[blocks - 1] for rank in ranks]
            assert sum(map(sum, each)) / 4 == local - 1 + (blocks - local + 1) / stride
            for head in range(4):
                held = [pages[head] for pages in each]
                assert max(held) - min(held) <= 2, "every head's pages are even over ranks"
        totals = [sum(rank[blocks - 1]) for rank in ranks]
        assert max(totals) - min(totals) <= 5, "and so are all heads' together: their stripes begin on different ranks"


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
        (lambda: cache_of(Causal(), capacity=0), "capacity: got 0, expected an integer >= 1; it is a number of tokens"),
        (lambda: cache_of(Causal(), schedule="ring"), "schedule: got 'ring', expected 'tree' or a seqpar.Tree("),
        (
            lambda: cache_of(Causal(), capacity=299).attend(*inputs()),
            "got 300 tokens for row 0, which has 0, expected at most 299, for capacity=299; make it with a larger",
        ),
        (lambda: cache_of(Causal()).attend(*inputs(), layer=1), "layer: got 1, expected 0 .. 0; make the cache with"),
        (lambda: cache_of(Causal()).attend(*inputs(), counts=[1]), "counts: got [1], expected 0 .. 300 for each of 2"),
        (lambda: cache_of(Causal()).truncate(3), "length: got 3 for row 0, expected at most 0, its length"),
        (lambda: cache_of(Causal()).fork(2, into=0), "row: got 2, expected 0 .. 1"),
        (
            lambda: filled(SlidingWindow(40)).truncate(100),
            "length: got 100 for row 0 of 300 tokens, expected 0, or at least 260",
        ),
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
    with pytest.raises(ValueError, match="row 0, which has 5, expected at most 295"):
        cache.attend(*inputs())
    assert (cache.length, cache.resident_pages()) == (5, [1] * 4)
    again = cache_of(Causal())
    again.attend(q[:, :5], k[:, :5], v[:, :5])
    new = [x[:, 5:9] for x in (q, k, v)]
    assert torch.equal(cache.attend(*new), again.attend(*new))
    assert first.shape == (2, 5, 8, 6)


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        (
            lambda rank: {"capacity": 200 + rank},
            "ranks disagree on capacity: got (200, 64, 40) on rank 0, (201, 64, 40)",
        ),
        (
            lambda rank: {"mask": SlidingWindow(30 + rank)},
            "ranks disagree on mask: got 'SlidingWindow(left=30, right=0)",
        ),
        (
            lambda rank: {"mask": SlidingWindow(30 + rank), "dtype": torch.float32 if rank else torch.float64},
            "rank 1: q",
        ),
    ],
)
def test_ranks_whose_caches_differ(differs: Callable[[int], dict], words: str) -> None:
    def job(w: World) -> str:
        options = {"mask": Causal(), **differs(w.rank)}
        cache = cache_of(options.pop("mask"), group=w, **options)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            append(cache, 3)
        assert cache.length == 0
        assert set(w.meter.by_kind) == {"agree"}
        return str(caught.value)

    messages = run_loopback(2, job)
    assert messages[0] == messages[1]
    assert words in messages[0]


def test_what_can_be_taken_back_is_the_same_on_every_rank() -> None:
    def job(w: World) -> list[int]:
        cache, allowed = cache_of(SlidingWindow(1), group=w, chunk=2, page=1), []
        append(cache, 20)
        for n in range(20, 0, -1):
            try:
                cache.truncate(n)
                allowed.append(n)
            except ValueError:
                pass
        assert error(append(cache, 5), whole_of_window_one(18)) <= 1e-10
        return allowed

    assert run_loopback(4, job) == [[20, 19, 18]] * 4


def whole_of_window_one(first: int) -> Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    return dense_attention(*inputs(), ((i >= j) & (i - j <= 1))[None, None])[0][:, first : first + 5]


def test_a_plan_that_the_cache_did_not_make_is_refused_on_every_rank() -> None:
    def job(w: World) -> None:
        cache = cache_of(Causal(), group=w)
        foreign = plan_of(SlidingWindow(1), length=8, group=w, heads=HEADS)
        mine = cache.plan(8, counts=[8, 3], schedule="ring")
        local = [mine.shard(x[:, :8]) for x in inputs()]
        with pytest.raises(ValueError, match="expected one that this cache's plan"):
            cache.prefill(*local, foreign)
        some = [x[:, :1] for x in local] if w.rank == 0 else local
        with pytest.raises(ValueError, match=r"rank 0: q: got shape .*, expected .* 4 of this rank's, in q, k and v"):
            cache.prefill(*some, mine)
        assert cache.lengths == (0, 0)
        cache.prefill(*local, mine)
        assert cache.lengths == (8, 3)

    run_loopback(2, job)


def test_ranks_whose_texts_differ_and_then_do_not() -> None:
    def job(w: World) -> None:
        cache = cache_of(Causal(), group=w)
        append(cache, 90)
        cache.truncate(50 + w.rank)
        with pytest.raises(ValueError, match=r"ranks disagree on lengths: got \[\[50, 50\]\] on rank 0"):
            cache.attend(*(x[:, 50:51] for x in inputs()))
        cache.truncate(50)
        assert error(append(cache, 5), whole("causal")[:, 50:55]) <= 1e-10

    run_loopback(2, job)
