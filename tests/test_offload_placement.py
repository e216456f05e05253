"""Where sequences go, what is refused, and how masks and steps are told: of workers, and of what they are sent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import reduce
from operator import and_
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import Causal, Chunked, Documents, Full, Mask, PerHead, PrefixLM, SinkWindow, SlidingWindow, SparselySharded
from seqpar.offload import OffloadedCache, Placement, WorkerLost, WorkerRefused, Workers
from seqpar.offload.dialect import STREAMS, bits_of, cut
from seqpar.offload.frames import Kind
from seqpar.offload.mask_text import from_text, to_text
from seqpar.offload.placement import NoRoom, assign
from seqpar.offload.workers import Member
from seqpar.stores import Appended
from support.offload import MEMORY, Crew, crew, free_of
from support.oracle import dense_attention, error

HEADS, DIM, CAPACITY = (4, 2), 4, 64
SEQUENCE = CAPACITY * HEADS[1] * 2 * DIM * 4  # bytes, in fp32
BIG, SMALL = 4 * SEQUENCE, 2 * SEQUENCE - 1


@pytest.fixture(scope="module")
def unequal() -> Iterator[Crew]:
    with crew({"memory": BIG}, {"memory": SMALL}) as found:
        yield found


@pytest.fixture
def workers(unequal: Crew) -> Iterator[Workers]:
    with unequal.join() as found:
        assert free_of(found, {0: BIG, 1: SMALL}) == {0: BIG, 1: SMALL}, "those before have given back all"
        yield found


def cache_on(workers: Workers, **options: Any) -> OffloadedCache:
    given = {"heads": HEADS, "head_dim": DIM, "capacity": CAPACITY, "placement": Placement(heads=1)}
    return OffloadedCache(options.pop("mask", Causal()), workers=workers, **given | options)


def holders(cache: OffloadedCache) -> list[str]:
    return [line.holder[len("worker ") :][:1] for line in cache.ledger.lines]


def test_sequences_go_where_memory_is_free(workers: Workers) -> None:
    first = cache_on(workers, batch=3)
    assert holders(first) == ["0", "0", "0"], "4, 3 and 2 sequences fit there, and almost 2 on the other"
    second, third = cache_on(workers), cache_on(workers)
    assert holders(second) + holders(third) == ["1", "0"]
    assert workers.free() == {0: 0, 1: SMALL - SEQUENCE}
    first.release()
    assert workers.free() == {0: 3 * SEQUENCE, 1: SMALL - SEQUENCE}
    assert holders(cache_on(workers, placement=Placement(heads=2))) == ["0", "1"], "parts of a sequence keep apart"


def test_what_fits_nowhere_is_refused_and_reserves_nothing(workers: Workers) -> None:
    words = rf"got {SEQUENCE:,} bytes to hold, expected at most {SMALL - SEQUENCE:,}, the most that is free on one of 2"
    with pytest.raises(ValueError, match=words):
        cache_on(workers, batch=6)
    assert workers.free() == {0: BIG, 1: SMALL}
    cache = cache_on(workers, batch=4)
    with pytest.raises(
        WorkerRefused, match=f"memory: got {SEQUENCE:,} bytes to hold, expected at most {SMALL - SEQUENCE:,}, which"
    ):
        [cache.migrate(row, 1 - int(holders(cache)[row])) for row in (3, 0, 1, 2)]
    x = torch.ones(4, CAPACITY, HEADS[1], DIM)
    assert error(cache.attend(x.repeat_interleave(2, 2), x, x), x.repeat_interleave(2, 2)) <= 1e-6, "it goes on"


def test_memory_that_another_takes_meanwhile_is_no_half_placement(unequal: Crew, workers: Workers) -> None:
    """Between the look at what is free and the taking: the parts that were opened already are freed."""
    with unequal.join() as others:
        look = workers.free

        def free() -> dict[int, int]:
            found = look()
            if not taken:
                taken.append(cache_on(others, batch=4))
            return found

        workers.free, taken = free, []  # type: ignore[method-assign]
        with pytest.raises(NoRoom, match=r"attention workers: got .* bytes to hold, expected at most"):
            cache_on(workers, batch=4)
        workers.free = look  # type: ignore[method-assign]
        assert sum(workers.free().values()) == BIG + SMALL - 4 * SEQUENCE, "what the other has, and no more"


def test_memory_is_free_again_when_a_connection_ends(unequal: Crew, workers: Workers) -> None:
    with unequal.join() as others:
        cache_on(others, batch=4)
        assert sum(workers.free().values()) == BIG + SMALL - 4 * SEQUENCE
    assert free_of(workers, {0: BIG, 1: SMALL}) == {0: BIG, 1: SMALL}


def test_workers_that_leave_are_no_loss() -> None:
    """One after the other; what is made afterwards goes to those that stay."""
    with crew({}, {}, {}) as three, three.join() as workers:
        cache, (q, k, v) = cache_on(workers, batch=3, mask=SlidingWindow(5)), (torch.cat([x] * 3) for x in rows(9))
        outs = [cache.attend(q[:, :5], k[:, :5], v[:, :5])]
        for number in range(2):
            member = workers.members[number]
            three.ask_to_leave(member)
            while not member.leaving:
                workers.status_of(member)
            cache.leave(number)
            assert three.ended(member)
            at = slice(5 + 2 * number, 7 + 2 * number)
            outs.append(cache.attend(q[:, at], k[:, at], v[:, at]))
        assert set(holders(cache)) == set(holders(cache_on(workers))) == {"2"}
        i, j = torch.arange(9)[:, None], torch.arange(9)[None, :]
        expected, _ = dense_attention(q, k, v, ((j <= i) & (i - j <= 5))[None])
        assert error(torch.cat(outs, 1), expected) <= 1e-6


def test_a_migration_from_a_lost_worker_leaves_nothing_behind() -> None:
    with crew({}, {}) as two, two.join() as workers:
        cache = cache_on(workers)
        cache.attend(*rows(5))
        source = int(holders(cache)[0])
        two.kill(workers.members[source])
        with pytest.raises(WorkerLost, match="which held part of sequences 0"):
            cache.migrate(0, 1 - source)
        assert workers.free() == {1 - source: MEMORY}


def test_a_loss_names_the_sequences_of_every_cache() -> None:
    with crew({}) as one, one.join() as workers:
        first, second = cache_on(workers, batch=2), cache_on(workers, batch=2)
        second.migrate(0, None)
        first.release()
        one.kill(workers.members[0])
        with pytest.raises(WorkerLost, match="which held part of sequences 1: ") as caught:
            second.attend(*(torch.cat([x] * 2) for x in rows(5)))
        assert caught.value.sequences == (1,)


def test_segments_of_texts_that_are_too_short_to_have_them(workers: Workers) -> None:
    cache = cache_on(workers, page=CAPACITY, placement=Placement(heads=1, segments=3))
    expected, _ = dense_attention(*rows(5), torch.ones(1, 5, 5).tril().bool())
    assert error(cache.attend(*rows(5)), expected) <= 1e-6
    assert sorted(line.bytes for line in cache.ledger.lines) == [256, 256, SEQUENCE]


def test_the_ledger_as_it_is_printed(workers: Workers) -> None:
    cache = cache_on(workers, batch=2, page=16, placement=Placement(heads=2, segments=2, local=1), capacity=1 << 6)
    x = torch.zeros(2, 21, HEADS[1], DIM)
    cache.attend(x.repeat_interleave(2, 2), x, x, counts=[21, 3])
    assert (
        str(cache.ledger)
        == """\
sequence  layers  KV heads  segment         holder  tokens  MiB
       0       1       0-0   1 of 2           here      16  0.0
       0       1       0-0   2 of 2  worker 0 (w0)       5  0.0
       0       1       1-1   1 of 2  worker 1 (w1)      16  0.0
       0       1       1-1   2 of 2  worker 0 (w0)       5  0.0
       1       1       0-0   1 of 2           here       3  0.0
       1       1       0-0   2 of 2  worker 0 (w0)       0  0.0
       1       1       1-1   1 of 2  worker 1 (w1)       3  0.0
       1       1       1-1   2 of 2  worker 0 (w0)       0  0.0"""
    )
    assert {line.bytes for line in cache.ledger.lines} == {SEQUENCE // 4}
    assert cache.resident_bytes == 2 * SEQUENCE // 4, "here"


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (lambda: Placement(heads=0), r"Placement\(heads=\): got 0, expected an integer >= 1"),
        (lambda: Placement(segments=0), r"Placement\(segments=\): got 0, expected an integer >= 1"),
        (lambda: Placement(local=-1), r"Placement\(local=\): got -1, expected an integer >= 0"),
        (lambda: Placement(heads=3).cuts(2, 1), r"Placement\(heads=\): got 3 for 2 KV heads, expected at most so many"),
        (lambda: Placement(heads=2, local=3).cuts(2, 1), r"Placement\(local=\): got 3, expected at most 2, of 2 range"),
        (lambda: Placement().cuts(2, 0), "Placement: got no workers for 1 parts, expected one or more"),
    ],
)
def test_placements_that_can_not_be(placement: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        placement()


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9))
def test_cuts_are_all_heads_and_all_segments_once(kv_heads: int, segments: int, workers: int) -> None:
    cuts = Placement(segments=segments).cuts(kv_heads, workers)
    assert sorted((head, part.segment) for part in cuts for head in part.heads) == [
        (head, segment) for head in range(kv_heads) for segment in range(segments)
    ]
    sizes = {len(part.heads) for part in cuts}
    assert max(sizes) - min(sizes) <= 1


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=8),
    st.dictionaries(st.integers(0, 9), st.integers(0, 40), max_size=5),
    st.dictionaries(st.integers(0, 9), st.integers(1, 2), max_size=3),
)
def test_assign(sizes: list[int], free: dict[int, int], taken: dict[int, int]) -> None:
    """Each part goes where the fewest others of its sequence are, of those places where most is free."""
    left, held = dict(free), {worker: taken.get(worker, 0) for worker in free}
    if not free or max(sizes) > max(free.values()):
        with pytest.raises(ValueError, match=rf"expected at most \d+, the most that is free on one of {len(free)}"):
            assign(sizes, free, taken)
        return
    try:
        found = assign(sizes, free, taken)
    except NoRoom:
        assert sum(sizes) > min(free.values()), "or all would fit on any of them"
        return
    assert len(found) == len(sizes)
    for size, worker in zip(sizes, found, strict=True):
        assert size <= left[worker]
        for other, room in left.items():
            assert room < size or (held[worker], -left[worker]) <= (held[other], -room)
        left[worker] -= size
        held[worker] += 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), min_size=1, max_size=4), st.integers(1, 12))
def test_steps_are_cut_into_steps(rows: list[tuple[int, int]], most: int) -> None:
    """The same columns are padding, and the others the same tokens of each text, as in the whole step."""
    tokens = max(1, max(new for new, _ in rows))
    whole = [Appended(before + new, new) for new, before in rows]
    columns: list[list[int | None]] = [[] for _ in rows]
    for new, pieces in cut(whole, tokens, most):
        size = new.stop - new.start
        assert 0 < size <= most
        assert new.start == len(columns[0])
        for row, piece in zip(columns, pieces, strict=True):
            row += [None] * (size - piece.new) + list(range(piece.length - piece.new, piece.length))
    for row, (length, new) in zip(columns, whole, strict=True):
        assert row == [None] * (tokens - new) + list(range(length - new, length))


counts = st.integers(1, 1 << 40)
simple = st.one_of(
    st.just(Causal()),
    st.builds(Chunked, counts),
    st.builds(PrefixLM, counts),
    st.builds(SlidingWindow, st.integers(-1, 1 << 40), st.integers(-1, 9)),
    st.builds(SinkWindow, counts, counts),
)
combined = st.lists(simple, min_size=1, max_size=3).map(lambda each: reduce(and_, each))
sparse = st.builds(
    SparselySharded,
    st.sampled_from([16, 64]),
    st.integers(1, 9),
    st.just(3),
    dense_heads=st.integers(0, 1),
    offsets=st.sampled_from([None, (0, 1, 2), (2, 1, 0, 0)]),
    allow_incomplete=st.booleans(),
)
masks = st.one_of(
    combined,
    st.builds(lambda one, other: one & other, sparse, combined),
    st.lists(combined, min_size=1, max_size=4).map(PerHead),
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["Causal", "Chunked", "size", "left"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["size", "left", "right"]), inner),
)
wrong = st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.integers()) | st.integers(max_value=-2)


@given(masks)
def test_masks_go_to_text_and_back(mask: Mask) -> None:
    assert from_text(json.loads(json.dumps(to_text(mask)))) == mask


@given(junk)
def test_junk_is_no_mask(terms: Any) -> None:
    try:
        found = from_text(terms)
    except ValueError:
        return
    assert json.loads(json.dumps(to_text(found))) == terms, "if it says a mask, then in our words"


@pytest.mark.parametrize("mask", [Causal() & Chunked(5), SlidingWindow(4, 0), SinkWindow(2, 3), SparselySharded()])
@given(data=st.data())
def test_masks_with_wrong_numbers_are_refused(mask: Mask, data: st.DataObject) -> None:
    terms = to_text(mask)
    fields = data.draw(st.sampled_from([fields for _, fields in terms if fields]))
    name = data.draw(st.sampled_from(sorted(fields)))
    if isinstance(fields[name], bool) or name == "offsets":
        return
    fields[name] = data.draw(wrong)
    with pytest.raises(ValueError, match="got"):
        from_text(json.loads(json.dumps(terms)))


@pytest.mark.parametrize("mask", [Full(), Causal() & Documents([0, 4])], ids=str)
def test_masks_that_workers_do_not_know(mask: Mask) -> None:
    with pytest.raises(ValueError, match=r"expected one of Causal, Chunked, .* which attention workers know"):
        to_text(mask)


def opening(**changes: Any) -> dict[str, Any]:
    return {
        "mask": to_text(Causal()), "heads": HEADS, "head_dim": (DIM, DIM), "dtype": "fp32", "capacity": 8, "chunk": 8,
        "page": 4, "layers": 1, "length": 0, "shards": [[7, 0, 2, 0, 1]],
    } | changes  # fmt: skip


def rows(tokens: int) -> list[torch.Tensor]:
    """q, k and v of so many tokens."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, tokens, heads, DIM, generator=generator) for heads in (HEADS[0], HEADS[1], HEADS[1])]


def call(
    member: Member, tokens: int = 1, roster: int = 7, layer: int = 0, scale: float = DIM**-0.5,
    dtype: torch.dtype = torch.float32, counts: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of some tokens to shard 7, as frames."""
    if roster == 7:
        member.send(Kind.ROSTER, text={"shards": [7], "counts": counts}, roster=7)
    fields = {"layer": layer, "tokens": tokens, "roster": roster}
    q, k, v = (x.to(dtype) for x in rows(tokens))
    member.send(Kind.ATTEND, q, replies=True, argument=bits_of(scale), **fields)
    member.send(Kind.APPEND, k, v, **fields)
    return member.reply().tensors(q.shape)[0].clone()


def store(member: Member, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
    """Rows for shard 7; what is wrong with it, the next answer says."""
    rows = torch.ones(2, 2 * DIM, dtype=dtype)
    member.send(Kind.STORE, rows, tokens=2, roster=7, **fields)
    member.ask(Kind.SYNC)


def stream(member: Member, **fields: Any) -> None:
    member.send(Kind.ROSTER, text={"shards": [7], "counts": None}, roster=7)
    member.send(Kind.APPEND, torch.ones(2, 4, DIM), flags=STREAMS, **{"tokens": 2, "roster": 7} | fields)
    member.ask(Kind.SYNC)


REFUSED: dict[str, tuple[Callable[[Member], Any], str]] = {
    "unknown roster": (lambda m: call(m, roster=5), "roster: got 5, expected one of those that were named"),
    "dtype of queries": (lambda m: call(m, dtype=torch.float64), "dtype: got torch.float64, expected torch.float32"),
    "layer of queries": (lambda m: call(m, layer=1), "call: got 1 of 1 tokens for layer 1, expected a layer below 1"),
    "capacity": (lambda m: call(m, tokens=9), "call: got 9 of 9 tokens for layer 0, .* at most 8 tokens in all"),
    "scale": (lambda m: call(m, scale=float("nan")), "scale: got nan, expected a finite number"),
    "more new tokens than tokens": (lambda m: call(m, counts=[2]), "call: got 2 of 1 tokens"),
    "counts of a roster": (
        lambda m: [m.send(Kind.ROSTER, text={"shards": [7], "counts": [1, 1]}, roster=9), m.ask(Kind.SYNC)],
        r"numbers: got \[1, 1\], expected a list of 1",
    ),
    "streaming to an unknown roster": (lambda m: stream(m, roster=8), "roster: got 8, expected one of those"),
    "streaming more than fits": (lambda m: [stream(m) for _ in range(9)], "call: got 2 of 2 tokens for layer 0"),
    "roster of unknown shards": (
        lambda m: [m.send(Kind.ROSTER, text={"shards": [3], "counts": None}), m.ask(Kind.SYNC)],
        r"shards: got \[3\], expected those of this connection",
    ),
    "truncate to more": (
        lambda m: m.ask(Kind.TRUNCATE, text={"shards": [7], "lengths": [4]}),
        "truncate: got 4, expected at most 3 tokens",
    ),
    "truncate unknown": (
        lambda m: m.ask(Kind.TRUNCATE, text={"shards": [0], "lengths": [0]}),
        r"shards: got \[0\], expected those of this connection",
    ),
    "free unknown": (lambda m: m.ask(Kind.FREE, text={"shards": [0]}), r"shards: got \[0\], expected those of this c"),
    "fetch beyond": (
        lambda m: m.ask(Kind.FETCH, tokens=5, roster=7, argument=2),
        "rows: got 2 and 5 more, expected such among 6",
    ),
    "fetch before": (lambda m: m.ask(Kind.FETCH, tokens=1, roster=7, argument=-1), "rows: got -1 and 1 more"),
    "fetch from a layer": (lambda m: m.ask(Kind.FETCH, layer=3, roster=7), "layer: got 3, expected one below 1"),
    "fetch from an unknown shard": (lambda m: m.ask(Kind.FETCH, roster=3), "3"),
    "store beyond": (lambda m: store(m, argument=5), "rows: got 5 and 2 more, expected such among 6"),
    "store of another dtype": (lambda m: store(m, dtype=torch.float16), "dtype: got torch.float16, expected torch.fl"),
    "open twice": (lambda m: m.ask(Kind.OPEN, text=opening()), "open: got a shard's number twice, expected new ones"),
    "open too much": (
        lambda m: m.ask(Kind.OPEN, text=opening(capacity=1 << 16, shards=[[8, 0, 1, 0, 1], [9, 0, 1, 0, 1]])),
        "memory: got 2,097,152 bytes to hold, expected at most",
    ),
    "open heads that are not": (
        lambda m: m.ask(Kind.OPEN, text=opening(shards=[[8, 0, 3, 0, 1]])),
        "open: got heads 0 to 3, segment 0 of 1",
    ),
    "open with a length": (lambda m: m.ask(Kind.OPEN, text=opening(length=9)), "number: got 9, expected at most 8"),
    "open with a mask": (lambda m: m.ask(Kind.OPEN, text=opening(mask=[["Dense", {}]])), "mask: got .*Dense"),
    "open with a mask of later keys": (
        lambda m: m.ask(Kind.OPEN, text=opening(mask=to_text(Chunked(4)), shards=[[8, 0, 2, 0, 1]])),
        "under which queries see later keys",
    ),
    "open with a huge number in a mask": (
        lambda m: m.ask(
            Kind.OPEN, text=opening(mask=[["Causal", {}], ["Chunked", {"size": 10**30}]], shards=[[8, 0, 2, 0, 1]])
        ),
        "attention worker 0",
    ),
    "open with a dtype": (lambda m: m.ask(Kind.OPEN, text=opening(dtype="int8")), "dtype: got 'int8', expected one"),
    "open without": (lambda m: m.ask(Kind.OPEN, text={}), "KeyError: 'mask'"),
    "open with lists": (lambda m: m.ask(Kind.OPEN, text=opening(heads=4)), "numbers: got 4, expected a list of 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_are_refused_leave_the_connection_as_it_was(name: str, unequal: Crew) -> None:
    request, words = REFUSED[name]
    with unequal.join() as workers:
        member = workers.members[0]
        member.ask(Kind.OPEN, text=opening())
        call(member, 3)
        free = workers.free()
        with pytest.raises(WorkerRefused, match=words):
            request(member)
        assert workers.free() == free
        if "streaming more" not in name:
            both = [torch.cat(pair, 1) for pair in zip(rows(3), rows(5), strict=True)]
            expected, _ = dense_attention(*both, torch.ones(1, 8, 8).tril().bool())
            assert error(call(member, 5), expected[:, 3:]) <= 1e-6


def misfit(member: Member, kind: Kind, *tensors: torch.Tensor, **fields: Any) -> None:
    member.send(Kind.ROSTER, text={"shards": [7], "counts": None}, roster=7)
    member.send(kind, *tensors, replies=True, **{"tokens": 1, "roster": 7} | fields)
    member.reply()


MALFORMED: dict[str, Callable[[Member], Any]] = {
    "queries of another size": lambda m: misfit(m, Kind.ATTEND, torch.ones(3), argument=bits_of(1.0)),
    "rows of another size": lambda m: misfit(m, Kind.STORE, torch.ones(3)),
    "keys of another size": lambda m: [
        m.send(Kind.ROSTER, text={"shards": [7], "counts": None}, roster=7),
        m.send(Kind.ATTEND, torch.ones(HEADS[0], DIM), roster=7, tokens=1, argument=bits_of(1.0), replies=True),
        m.send(Kind.APPEND, torch.ones(5), roster=7, tokens=1),
        m.reply(),
    ],
    "queries without keys": lambda m: [
        m.send(Kind.ROSTER, text={"shards": [7], "counts": None}, roster=7),
        m.send(Kind.ATTEND, torch.ones(HEADS[0], DIM), roster=7, tokens=1, argument=bits_of(1.0), replies=True),
        m.ask(Kind.STATUS),
    ],
    "keys without queries": lambda m: misfit(m, Kind.APPEND, torch.ones(16)),
    "an answer": lambda m: m.ask(Kind.RESULT, torch.ones(1)),
    "no text": lambda m: m.ask(Kind.OPEN, torch.ones(1)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_ends_its_connection_and_no_other(name: str, unequal: Crew, workers: Workers) -> None:
    cache, outs = cache_on(workers), []
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, h, DIM, generator=generator) for h in (HEADS[0], HEADS[1], HEADS[1]))
    outs.append(cache.attend(q[:, :7], k[:, :7], v[:, :7]))
    with unequal.join(deadline=5) as others:
        member = others.members[0]
        member.ask(Kind.OPEN, text=opening())
        call(member, 3)
        with pytest.raises(WorkerLost, match=r"attention worker 0 \(w0\) was lost"):
            MALFORMED[name](member)
        outs.append(cache.attend(q[:, 7:], k[:, 7:], v[:, 7:]))
        assert free_of(workers, {0: BIG - SEQUENCE, 1: SMALL})[0] == BIG - SEQUENCE
    expected, _ = dense_attention(q, k, v, torch.ones(1, 9, 9).tril().bool())
    assert error(torch.cat(outs, 1), expected) <= 1e-6


def test_a_worker_that_was_killed_keeps_nobody_waiting() -> None:
    """It is still registered, but gives no sign of life."""
    with crew({}, {}) as two:
        with two.join() as workers:
            two.kill(workers.members[0])
        began = time.monotonic()
        with two.join(least=1, deadline=60) as workers:
            assert time.monotonic() - began < 30
            assert sorted(workers.members) == [1]
            (line,) = workers.absent
            assert line.startswith("worker 0: ")
