"""Attention on workers is exact, and moves the bytes that it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from seqpar import Causal, Chunked, KVCache, Mask, PerHead, SinkWindow, SlidingWindow, SparselySharded
from seqpar.offload import OffloadedCache, Placement, Turns, WorkerLost, WorkerRefused, Workers
from seqpar.offload.channel import Frame
from seqpar.offload.dialect import bits_of
from seqpar.offload.frames import Kind
from support.offload import FRAME, Crew, crew, free_of, moved
from support.oracle import dense_attention, error

HEADS, DIMS, LENGTH = (8, 4), (8, 6), 201
Sees = Callable[[Tensor, Tensor, int], Tensor]  # (queries, keys, KV head) -> which keys each of them sees

# Besides, all of them are causal.
MASKS: dict[str, tuple[Mask, Sees]] = {
    "causal": (Causal(), lambda i, j, h: j <= i),
    "window": (SlidingWindow(40), lambda i, j, h: i - j <= 40),
    "sinks": (SinkWindow(5, 40), lambda i, j, h: (j < 5) | (i - j < 40)),
    "chunked": (Causal() & Chunked(70), lambda i, j, h: i // 70 == j // 70),
    "s2": (
        SparselySharded(16, 2, 3, dense_heads=1),
        lambda i, j, h: (i // 16 - j // 16 < 2) | (j // 16 % 3 == h % 3) | torch.tensor(h == 3),
    ),
    "by head": (
        PerHead([Causal(), SinkWindow(20, 30), SlidingWindow(9), SlidingWindow(9)]),
        lambda i, j, h: ((i - j < 10_000), (j < 20) | (i - j < 30), (i - j <= 9), (i - j <= 9))[h],
    ),
}
# Workers, and how a sequence is cut: into ranges of heads x segments, of which so many stay here.
PLACES: dict[str, tuple[int, Placement]] = {
    "1 worker": (1, Placement()),
    "1 worker, 3 segments": (1, Placement(segments=3)),
    "2 by heads": (2, Placement()),
    "2 by segments": (2, Placement(heads=1, segments=2)),
    "4 by heads": (4, Placement()),
    "4 by segments": (4, Placement(heads=1, segments=4)),
    "4 by both": (4, Placement(heads=2, segments=2)),
    "2 by heads and here": (2, Placement(heads=3, local=1)),
    "2 by both and here": (2, Placement(heads=2, segments=3, local=2)),
}


@pytest.fixture(scope="module")
def crews() -> Iterator[dict[int, Crew]]:
    with crew({}) as one, crew({}, {}) as two, crew({}, {}, {}, {}) as four:
        yield {1: one, 2: two, 4: four}


@pytest.fixture(scope="module")
def joined(crews: dict[int, Crew]) -> Iterator[dict[int, Workers]]:
    """Connections to 1, 2 and 4 workers."""
    found = {number: each.join() for number, each in crews.items()}
    yield found
    for workers in found.values():
        assert len(workers.alive) == len(workers.members), "no test lost one of these"
        assert set(free_of(workers).values()) == {64 << 20}, "every test has its memory freed"
        workers.close()


@pytest.fixture
def made(joined: dict[int, Workers]) -> Iterator[Callable[..., OffloadedCache]]:
    """Makes caches, by a place and a mask, that are released after the test."""
    caches = []

    def make(place: str, mask: Mask, **options: Any) -> OffloadedCache:
        number, placement = PLACES[place]
        if mask.groups(HEADS[1])[0].parts[-1].stripes is None:
            options = {"page": 16} | options
        given = {"heads": HEADS, "head_dim": DIMS, "batch": 2, "dtype": torch.float64, "capacity": LENGTH, "chunk": 40}
        caches.append(OffloadedCache(mask, workers=joined[number], placement=placement, **given | options))
        return caches[-1]

    yield make
    for each in caches:
        each.release()


@cache
def inputs(dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS[0], DIMS[0]), (HEADS[1], DIMS[0]), (HEADS[1], DIMS[1]))
    return [torch.randn(batch, LENGTH, *shape, generator=generator, dtype=dtype) for shape in shapes]


@cache
def seen(name: str, length: int = LENGTH) -> Tensor:
    """bool ``[1, H, length, length]``, by definition."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    heads = [MASKS[name][1](i, j, head) & (j <= i) for head in range(HEADS[1])]
    return torch.stack(heads).repeat_interleave(HEADS[0] // HEADS[1], 0)[None]


@cache
def whole(name: str) -> Tensor:
    """The dense oracle's output."""
    return dense_attention(*inputs(), seen(name))[0]


def append(cache: OffloadedCache, count: int, **options: Any) -> Tensor:
    new = slice(cache.length, cache.length + count)
    return cache.attend(*(x[:, new] for x in inputs(cache._dtype, cache.batch)), **options)


@pytest.mark.parametrize(("band", "segments"), [(1, 2), (2, 3)])
def test_a_head_s_stripes_and_band_on_different_holders(band: int, segments: int, crews: dict[int, Crew]) -> None:
    """Token by token: a key that is kept for later in one place is seen now in another, and counts once."""
    mask, shape = (
        SparselySharded(block=16, local_blocks=band, stride=4),
        {"heads": (8, 4), "head_dim": 8, "capacity": 200},
    )
    generator = torch.Generator().manual_seed(0)
    with crews[4].join() as workers:
        cut = Placement(heads=4, segments=segments)
        cache = OffloadedCache(mask, workers=workers, placement=cut, dtype=torch.float64, **shape)
        local = KVCache(mask, dtype=torch.float64, **shape)
        for _ in range(80):
            q, k, v = (torch.randn(1, 1, n, 8, generator=generator, dtype=torch.float64) for n in (8, 4, 4))
            assert error(cache.attend(q, k, v), local.attend(q, k, v)) <= 1e-12


def test_a_kernel_of_one_s_own_choice_is_refused(crews: dict[int, Crew]) -> None:
    with crews[1].join() as workers:
        cache = OffloadedCache(Causal(), workers=workers, heads=(8, 4), head_dim=8, capacity=64)
        rows = [torch.randn(1, 3, n, 8) for n in (8, 4, 4)]
        with pytest.raises(ValueError, match="kernel: got 'reference', expected 'auto': workers choose theirs"):
            cache.attend(*rows, kernel="reference")
        assert cache.lengths == (0,)
        cache.attend(*rows)


def test_queries_go_first(crews: dict[int, Crew]) -> None:
    """The worker attends to older keys while the new ones are still to come."""
    with crews[1].join() as workers, crews[1].join() as others:
        shape = {"heads": (8, 4), "head_dim": 8, "capacity": 4096}
        cache = OffloadedCache(Causal(), workers=workers, **shape)
        cache.attend(*(torch.randn(1, 4000, n, 8) for n in (8, 4, 4)))
        ((member, _),) = cache._remote.by_member()
        (other,) = others.members.values()
        before = others.status_of(other)["busy"]
        roster = member.roster(tuple(part.shard for part in cache._remote.parts), None)
        about = {"layer": 0, "tokens": 1, "roster": roster}
        member.send(Kind.ATTEND, torch.randn(8, 8), replies=True, argument=bits_of(0.3), **about)
        while others.status_of(other)["busy"] == before:
            time.sleep(0.01)
        assert member.channel.received.by_kind[Kind.RESULT][0] == member.channel.sent.by_kind[Kind.ATTEND][0] - 1
        member.send(Kind.APPEND, torch.randn(2, 4, 8), **about)
        assert member.reply().header.kind is Kind.RESULT


def test_a_batch_that_waits_for_its_worker_lets_another_compute(crews: dict[int, Crew]) -> None:
    turns, computed = Turns(), threading.Event()
    with turns.mine(), crews[1].join(turns=turns) as workers:
        (member,) = workers.members.values()
        channel = member.channel
        receive = channel.receive

        def meanwhile(deadline: float | None = None) -> Frame:
            assert computed.wait(20)
            return receive(deadline)

        def compute() -> None:
            with turns.mine():
                computed.set()

        channel.receive = meanwhile  # type: ignore[method-assign]
        other = threading.Thread(target=compute)
        other.start()
        workers.status_of(member)
        other.join()


def test_answers_of_a_call_that_failed_are_nobody_else_s() -> None:
    """Two caches share connections; what a healthy worker still answered to the first is not the second's."""
    with crew({}, {}) as two, two.join(deadline=10) as workers:
        shape = {"heads": (8, 4), "head_dim": 8, "capacity": 64, "placement": Placement(heads=1)}
        first = OffloadedCache(Causal(), workers=workers, batch=2, **shape)
        second = OffloadedCache(Causal(), workers=workers, **shape)
        second.migrate(0, 1)
        local = KVCache(Causal(), heads=(8, 4), head_dim=8, capacity=64)
        q, k, v = (torch.randn(2, 3, n, 8) for n in (8, 4, 4))
        first.attend(q, k, v)
        two.kill(workers.members[0])
        with pytest.raises(WorkerLost):
            first.attend(q, k, v)
        for _ in range(3):
            assert error(second.attend(q[:1], k[:1], v[:1]), local.attend(q[:1], k[:1], v[:1])) <= 1e-6


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MASKS)
def test_appending_gives_what_the_whole_gives(name: str, place: str, made: Callable[..., OffloadedCache]) -> None:
    cache, outs, sizes = made(place, MASKS[name][0]), [], (64, 1, 1, 1)
    while cache.length < LENGTH:
        outs.append(append(cache, min(sizes[len(outs) % len(sizes)], LENGTH - cache.length)))
    assert error(torch.cat(outs, 1), whole(name)) <= 1e-10


@pytest.mark.parametrize(
    ("place", "schedule"), [("2 by heads", "ring"), ("4 by both", "tree"), ("2 by both and here", "ring")]
)
@pytest.mark.parametrize("name", MASKS)
def test_rows_of_unequal_length(name: str, place: str, schedule: str, made: Callable[..., OffloadedCache]) -> None:
    """Padded on the left: 100 columns by a plan, then 31 more, some, and one by one; one row has none at first."""
    pads, total = (0, 37, 110), 151
    rows = [torch.cat([x, x[:1].flip(1)])[:, :total] for x in inputs()]
    padded = [torch.stack([torch.roll(x[row], pad, 0) for row, pad in enumerate(pads)]) for x in rows]
    cache, at, outs = made(place, MASKS[name][0], batch=3), 0, []
    for count in (100, 31, 15, *[1] * 5):
        new, counts = slice(at, at + count), [max(0, min(count, at + count - pad)) for pad in pads]
        local = [x[:, new] for x in padded]
        if at < 131:
            plan = cache.plan(count, counts=counts, schedule=schedule)
            outs.append(cache.prefill(*local, plan))
        else:
            outs.append(cache.attend(*local, counts=counts))
            assert not outs[-1][2, : count - counts[2]].any(), "padding gives zeros"
        at += count
    assert cache.lengths == tuple(total - pad for pad in pads)
    out = torch.cat(outs, 1)
    for row, pad in enumerate(pads):
        expected, _ = dense_attention(*(x[row : row + 1, : total - pad] for x in rows), seen(name, total - pad))
        assert error(out[row : row + 1, pad:], expected) <= 1e-10


@pytest.mark.parametrize(
    ("name", "place"), list(zip(MASKS, ["4 by both", "2 by both and here", "4 by heads"] * 2, strict=True))
)
def test_truncate_free_and_go_on(name: str, place: str, made: Callable[..., OffloadedCache]) -> None:
    cache, outs = made(place, MASKS[name][0]), []
    q, k, v = inputs()
    append(cache, 90)
    cache.free()
    while cache.length < LENGTH:
        at, count = cache.length, min(30, LENGTH - cache.length)
        wrong = slice(at, at + count)
        cache.attend(q[:, wrong].flip(1), k[:, wrong].flip(1) * 3, v[:, wrong].flip(1))
        cache.truncate(at)
        outs.append(append(cache, min(count, 17)))
    assert error(torch.cat(outs, 1), whole(name)) <= 1e-10
    cache.free([1])
    cache.truncate([LENGTH - 10, 0])
    out = cache.attend(*(torch.stack([x[0, -10:], x[1, :10]]) for x in (q, k, v)))
    assert error(out, torch.stack([whole(name)[0, -10:], whole(name)[1, :10]])) <= 1e-10


@pytest.mark.parametrize("place", PLACES)
def test_scale_and_sinks(place: str, made: Callable[..., OffloadedCache]) -> None:
    sinks, expected = torch.linspace(-2, 3, HEADS[0], dtype=torch.float64), []
    cache = made(place, MASKS["window"][0])
    out = [append(cache, count, scale=0.4, sinks=sinks) for count in (100, 1, 1, 99)]
    expected, _ = dense_attention(*inputs(), seen("window"), sinks, 0.4)
    assert error(torch.cat(out, 1), expected) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["1 worker", "2 by segments", "4 by both", "2 by both and here"])
def test_other_dtypes(place: str, dtype: torch.dtype, made: Callable[..., OffloadedCache]) -> None:
    cache = made(place, Causal(), dtype=dtype)
    out = torch.cat([append(cache, count) for count in (180, *[1] * 21)], 1)
    given = inputs(dtype)
    expected, _ = dense_attention(*(x.double() for x in given), seen("causal"))
    if dtype is torch.float32:
        assert error(out, expected) <= 1e-5
        return
    theirs = scaled_dot_product_attention(*(x.transpose(1, 2) for x in given), is_causal=True, enable_gqa=True)
    assert error(out, expected) <= 2 * error(theirs.transpose(1, 2), expected)


def test_layers_share_nothing(made: Callable[..., OffloadedCache]) -> None:
    cache = made("4 by both", Causal(), layers=2)
    q, k, v = inputs()
    for new in (slice(0, 50), slice(50, LENGTH)):
        assert error(cache.attend(q[:, new], k[:, new], v[:, new]), whole("causal")[:, new]) <= 1e-10
        other = cache.attend(q[:, new], k[:, new] * 0, v[:, new], layer=1)
        mean = v.cumsum(1) / torch.arange(1, LENGTH + 1).view(1, -1, 1, 1)
        assert error(other, mean.repeat_interleave(2, 2)[:, new]) <= 1e-10


@pytest.mark.parametrize("name", ["causal", "s2", "by head"])
@pytest.mark.parametrize("place", ["2 by heads", "4 by both"])
def test_parts_move_between_steps(place: str, name: str, made: Callable[..., OffloadedCache]) -> None:
    """To another worker, here, and back; each of several layers with what it has; results stay as they are."""
    cache, outs = made(place, MASKS[name][0], layers=2), []
    q, k, v = inputs()

    def step(count: int) -> None:
        new = slice(cache.length, cache.length + count)
        outs.append(cache.attend(q[:, new], k[:, new], v[:, new]))
        twice = cache.attend(q[:, new], k[:, new], v[:, new] * 2, layer=1)
        assert error(twice, outs[-1] * 2) <= 1e-10

    def holders(**wanted: object) -> set[str]:
        lines = cache.ledger.lines
        return {line.holder for line in lines if all(getattr(line, name) == value for name, value in wanted.items())}

    step(77)
    some = cache.ledger.lines[0]
    cache.migrate(0, 1, heads=some.heads, segment=some.segment)
    assert holders(sequence=0, heads=some.heads, segment=some.segment) == {"worker 1 (w1)"}
    step(1)
    cache.migrate(1, None)
    assert holders(sequence=1) == {"here"}
    step(1)
    cache.migrate(1, 0)
    assert holders(sequence=1) == {"worker 0 (w0)"}
    step(33)
    cache.migrate(0, None, segment=0)
    assert holders(sequence=0, segment=0) == {"here"}
    cache.truncate(100)
    step(LENGTH - 100)
    outs[3] = outs[3][:, : 100 - 79]
    assert error(torch.cat(outs, 1), whole(name)) <= 1e-10


@pytest.mark.parametrize(
    ("dtype", "sinks"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.ones(HEADS[0])),
        (torch.float64, torch.ones(HEADS[0])),
    ],
    ids=["fp32", "bf16", "bf16 sinks", "fp64 sinks"],
)
@pytest.mark.parametrize("place", PLACES)
def test_bytes(place: str, dtype: torch.dtype, sinks: Tensor | None, made: Callable[..., OffloadedCache]) -> None:
    """Per layer and step ``e B (S H (D + Dv) + Hkv (D + Dv))``, and where partials come back their lse, ``4 S B H``."""
    number, placement = PLACES[place]
    cache, rows, totals = made(place, Causal(), dtype=dtype, layers=2), inputs(dtype), set()
    away = [line for line in cache.ledger.lines if line.holder != "here"]
    e, asked = dtype.itemsize, sum(len(line.heads) for line in away) * HEADS[0] // HEADS[1]
    has_lse = placement.segments > 1 or sinks is not None
    for context in (31, 32, 170):  # the second begins a page
        before = slice(cache.length, context)
        for layer in range(2):
            cache.attend(*(x[:, before] for x in rows), layer=layer, sinks=sinks)
        segment = context // cache.page % placement.segments
        kept = sum(len(line.heads) for line in away if line.segment == segment)
        for layer in range(2):
            new = [x[:, context : context + 1] for x in rows]
            step = lambda new=new, layer=layer: cache.attend(*new, layer=layer, sinks=sinks)  # noqa: E731
            found, total = moved(cache._workers, step)
            assert found == {
                "sent ATTEND": (number, e * asked * DIMS[0]),
                "sent APPEND": (number, e * kept * sum(DIMS)),
                "received RESULT": (number, e * asked * DIMS[1] + has_lse * asked * max(4, e)),
            }
            assert total == sum(payload for _, payload in found.values()) + number * 3 * 72
            totals.add(total)
        cache.truncate(context)
    if not placement.local:
        stated = e * 2 * (placement.segments * HEADS[0] + HEADS[1]) * sum(DIMS)
        stated += has_lse * max(4, e) * placement.segments * 2 * HEADS[0]
        assert totals == {stated + number * 3 * 72}, "whatever the context"


@pytest.mark.parametrize("place", ["1 worker", "4 by heads", "4 by both"])
def test_a_prompt_streams_keys_and_values_only(place: str, made: Callable[..., OffloadedCache]) -> None:
    number, _ = PLACES[place]
    cache = made(place, Causal(), layers=2)
    plan = cache.plan(120, schedule="ring")
    for layer in range(2):
        step = lambda layer=layer: cache.prefill(*(x[:, :120] for x in inputs()), plan, layer=layer)  # noqa: E731
        found, total = moved(cache._workers, step)
        roster = found.pop("sent ROSTER") if layer == 0 else (0, 0)
        assert found == {"sent APPEND": (number, 8 * 2 * 120 * HEADS[1] * sum(DIMS))}
        assert total == found["sent APPEND"][1] + roster[1] + (number + roster[0]) * FRAME
    assert error(append(cache, 1), whole("causal")[:, 120:121]) <= 1e-10


def test_what_exceeds_the_capacity_is_refused_before_anything_is_sent(made: Callable[..., OffloadedCache]) -> None:
    cache = made("4 by both", Causal(), capacity=100)
    append(cache, 90)

    def refused() -> None:
        with pytest.raises(ValueError, match="got 11 tokens for row 0, which has 90, expected at most 10"):
            append(cache, 11)
        with pytest.raises(ValueError, match="offloaded cache: got rows"):
            cache.fork(0, 1)
        with pytest.raises(ValueError, match="to: got worker 9, expected one of"):
            cache.migrate(0, 9)
        with pytest.raises(ValueError, match="migrate: got sequence 0, heads None, segment 7, expected a part that"):
            cache.migrate(0, 1, segment=7)

    assert moved(cache._workers, refused) == ({}, 0)
    assert error(append(cache, 10), whole("causal")[:, 90:100]) <= 1e-10


@pytest.mark.parametrize("placement", [Placement(), Placement(segments=2), Placement(heads=2, local=1)], ids=str)
@pytest.mark.parametrize("name", ["causal", "s2"])
def test_frames_are_cut_at_a_workers_limit(name: str, placement: Placement) -> None:
    with crew({"limit": 4096}) as small, small.join() as workers:
        cache = OffloadedCache(
            MASKS[name][0], workers=workers, placement=placement, heads=HEADS, head_dim=DIMS, batch=2, page=16,
            dtype=torch.float64, capacity=LENGTH, chunk=40,
        )  # fmt: skip
        outs = []
        found, _ = moved(workers, lambda: outs.append(append(cache, 40)))
        assert found["sent ATTEND"][0] >= 5, "of 40 tokens with up to 1 KiB of queries each"
        plan = cache.plan(81, schedule="tree")
        found, _ = moved(workers, lambda: outs.append(cache.prefill(*(x[:, 40:121] for x in inputs()), plan)))
        cache.migrate(0, None)
        outs.append(append(cache, 1))
        cache.migrate(0, 0)
        outs.append(append(cache, 79))
        assert error(torch.cat(outs, 1), whole(name)) <= 1e-10


def test_a_worker_that_refuses_is_named(joined: dict[int, Workers]) -> None:
    (member,) = joined[1].members.values()
    with pytest.raises(WorkerRefused, match=r"attention worker 0 \(w0\): mask: got"):
        member.ask(Kind.OPEN, text={"mask": [], "dtype": "fp32"})
