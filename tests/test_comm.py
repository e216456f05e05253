"""Worlds, exchanges and agreement: the three worlds alike, every fault an error, every byte counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from seqpar.comm import KeyValues, Meter, Traffic, World, agree, connect, run_loopback
from seqpar.itinerary import ring_order
from support import jobs_comm as jobs
from support.ranks import run_gloo

WORLDS = {"loopback": run_loopback, "gloo": run_gloo, "strict": partial(run_gloo, strict=True)}
IN_EVERY_WORLD = pytest.mark.parametrize("world", WORLDS)


@IN_EVERY_WORLD
def test_every_world_brings_the_same(world: str) -> None:
    size = 3
    for rank, (brought, meter) in enumerate(WORLDS[world](size, jobs.communicate)):
        others = [other for other in range(size) if other != rank]
        rows = torch.arange(6.0).view(2, 3).t()
        sums = [torch.tensor([0.1, 1e8]) * (1 + other) for other in range(size)]
        expected = {
            "ring": torch.arange(4.0) + 10 * ((rank - 1) % size),
            "at_once": torch.stack([torch.full((3, 2), other + rank / 4) for other in others]).bfloat16(),
            "gathered": torch.tensor([[[other, 7]] for other in range(size)]),
            "strided": torch.stack([rows + other for other in range(size)]),
            "reduced": sums[0] + sums[1] + sums[2],
        }
        assert brought.keys() == expected.keys()
        for key, tensor in brought.items():
            assert torch.equal(tensor, expected[key]), key
        assert meter == {
            "kv": Traffic(1, 16),  # what is empty is not sent
            "grad": Traffic(2, 2 * 12),
            "gather": Traffic(2, 2 * (16 + 24)),
            "reduce": Traffic(1, 2 * 8),
        }


def test_one_rank_alone_moves_nothing() -> None:
    world = connect(None)
    x = torch.arange(3.0)
    assert (world.rank, world.size) == (0, 1)
    assert [y.tolist() for y in world.all_gather(x, "gather")] == [[0, 1, 2]]
    assert world.all_reduce(x, "reduce").tolist() == [0, 1, 2]
    assert world.meter.bytes == 0


def test_every_group_connects() -> None:
    for rank, told in enumerate(run_gloo(2, jobs.connections)):
        alone, itself, group, sp, dp, sp_group, mesh, others, name = told
        mesh_or_none = "a DeviceMesh of one or two axes, or None for one rank"
        one_of = f"expected a ProcessGroup that this rank is a member of, {mesh_or_none}"
        assert alone == dp == "SingleRank 0 of 1"
        assert itself == group == sp == sp_group == f"ProcessGroupWorld {rank} of 2"
        assert mesh == f"MeshWorld {rank} of 2"
        assert others == ("SingleRank 0 of 1" if rank == 1 else f"group: got -100, {one_of}")
        assert name == f"group: got 'sp', {one_of}"


def test_meter_adds_up_by_kind() -> None:
    meter = Meter()
    meter.add("kv", 1, 100)
    meter.add("kv", 2, 50)
    meter.add("grad", 1, 7)
    assert meter.by_kind == {"kv": Traffic(3, 150), "grad": Traffic(1, 7)}
    assert (meter.calls, meter.bytes) == (4, 157)
    meter.reset()
    assert (meter.calls, meter.bytes, meter.by_kind) == (0, 0, {})


# Loopback.


def test_loopback_returns_by_rank_and_passes_arguments() -> None:
    assert run_loopback(4, lambda world, x: (world.rank, world.size, x), "x") == [(rank, 4, "x") for rank in range(4)]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failing_thread_ends_all_and_its_exception_is_raised(failing: int) -> None:
    others: list[str] = []

    def fail_on_one(world: World) -> None:
        if world.rank == failing:
            raise KeyError("the reason")
        try:
            world.all_gather(torch.zeros(1), "gather")
        except ConnectionError as error:
            others.append(str(error))
            raise

    began = time.monotonic()
    with pytest.raises(KeyError, match="the reason"):
        run_loopback(3, fail_on_one)
    assert time.monotonic() - began < 30, "nobody waited for the timeout"
    assert len(others) == 2
    assert all(f"but rank {failing} failed" in message for message in others)


def test_loopback_waits_no_longer_than_its_timeout() -> None:
    def wait_for_nothing(world: World) -> None:
        if world.rank == 0:
            world.start([], [(1, torch.empty(1))], "kv").wait()

    with pytest.raises(ConnectionError, match=r"rank 0 waited for rank 1, but nothing came within 0\.05 s"):
        run_loopback(2, wait_for_nothing, timeout=0.05)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (torch.ones(3), r"got \(3,\) torch.float32 from rank [01], expected \(4,\) torch.float32"),
        (torch.ones(4, dtype=torch.float16), r"got \(4,\) torch.float16"),
        (torch.ones(2, 2), r"got \(2, 2\) torch.float32"),
    ],
    ids=["size", "dtype", "shape"],
)
def test_loopback_refuses_another_message_than_expected(sent: Tensor, message: str) -> None:
    def swap(world: World) -> None:
        world.start([(1 - world.rank, sent)], [(1 - world.rank, torch.empty(4))], "kv").wait()

    with pytest.raises(ConnectionError, match=message):
        run_loopback(2, swap)


def test_loopback_sends_what_was_there_at_the_start() -> None:
    def overwrite(world: World) -> float:
        mine, into = torch.tensor([float(world.rank)]), torch.empty(1)
        transfer = world.start([(1 - world.rank, mine)], [(1 - world.rank, into)], "kv")
        mine.fill_(9)
        transfer.wait()
        return into.item()

    assert run_loopback(2, overwrite) == [1.0, 0.0]


# The strict world, and the harness that runs ranks as processes.


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("strides", r"strict: tensor for rank [01] has strides \(4,\), expected contiguous"),
        ("strides_received", r"strict: tensor for rank [01] has strides \(4,\), expected contiguous"),
        ("size", r"got \(call, elements, dtype\) \[1, 3, 1\] from rank 0, expected \[1, 4, 1\]"),
        ("dtype", r"got \(call, elements, dtype\) \[1, 4, 2\] from rank 0, expected \[1, 4, 1\]"),
        ("order", r"got \(call, elements, dtype\) \[1, [24], 1\] from rank [01], expected \[1, [24], 1\]"),
        ("order_of_equals", r"got \(call, elements, dtype\) \[[12], 4, 1\] from rank [01], expected \[[12], 4, 1\]"),
        ("overwritten", "rank 0 changed a tensor that was being sent"),
    ],
    ids=lambda text: text if text.isidentifier() else "",
)
def test_strict_world_catches(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_gloo(2, jobs.misbehave, fault, strict=True)


def test_strict_world_shows_nothing_before_wait() -> None:
    for early, late in run_gloo(2, jobs.misbehave, "read_early", strict=True):
        assert early[:4].isnan().all()
        assert early[4:].tolist() == [-1, -1]
        assert late.tolist() == [1, 1, 1, 1, 5, 5]


@pytest.mark.parametrize(
    ("job", "timeout", "message"),
    [
        (jobs.raise_on_one, 60, "(?s)rank 1 of 3 raised:.*RuntimeError: the reason of rank 1"),
        (jobs.die_on_one, 60, "rank 1 of 3 died with exit code 7"),
        (jobs.hang_on_one, 2, "ranks .*1.* of 3 still ran at the deadline"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_harness_fails_when_one_rank(job: Callable, timeout: float, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_gloo(3, job, timeout=timeout)
    assert time.monotonic() - began < 50, "the others were not waited for"


# Exchanges alone.


SIZES = {"forward": (1, 2, 3, 4), "direct": (1, 2, 3, 4), "double": (2, 4)}
EXCHANGES = [(kind, size) for kind, sizes in SIZES.items() for size in sizes]


def test_messages_come_in_the_order_in_which_receives_began() -> None:
    def swap(world: World) -> list[float]:
        peer, into = 1 - world.rank, torch.empty(2, 1)
        transfers = [world.start([(peer, torch.tensor([float(n)]))], [(peer, into[n])], "kv") for n in range(2)]
        for transfer in reversed(transfers) if world.rank else transfers:
            transfer.wait()
        return into.flatten().tolist()

    assert run_loopback(2, swap) == [[0.0, 1.0]] * 2


@pytest.mark.parametrize(("kind", "size"), EXCHANGES)
def test_exchange_brings_keys_and_takes_gradients_home(size: int, kind: str) -> None:
    results = run_loopback(size, jobs.exchange, kind, torch.float32)
    shards = [jobs.shard(rank) for rank in range(size)]
    for rank, (steps, home, _) in enumerate(results):
        sources = ring_order(rank, size, 2 if kind == "double" else size)
        for owner, (k, v) in zip(sources, steps, strict=True):
            rows = jobs.kept_rows(owner, rank) if kind == "direct" and owner != rank else range(jobs.ROWS[owner])
            assert torch.equal(k, shards[owner][0][:, list(rows)])
            assert torch.equal(v, shards[owner][1][:, list(rows)])
        for into, parts in zip((home.k, home.v), _parts(rank, size, kind), strict=True):
            torch.testing.assert_close(into, sum(parts), rtol=1e-6, atol=1e-6)


def _parts(owner: int, size: int, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Every reader's gradient for an owner's K and V, the owner's own first, spread over all its rows."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for reader in [(owner + step) % size for step in range(size)]:
        rows = list(range(jobs.ROWS[owner]))
        if kind == "direct" and reader != owner:
            rows = jobs.kept_rows(owner, reader)
        grad = KeyValues.carve(jobs.gradient(reader, owner, len(rows)), *jobs.shard(owner), len(rows))
        for into, x in zip(parts, (grad.k, grad.v), strict=True):
            whole = torch.zeros(jobs.BATCH, jobs.ROWS[owner], jobs.HEADS, x.shape[-1])
            whole[:, rows] = x
            into.append(whole)
    return parts


@pytest.mark.parametrize(("kind", "size"), [case for case in EXCHANGES if case[1] > 1 and case[0] != "double"])
def test_bf16_rounds_on_the_wire_only(size: int, kind: str) -> None:
    """Every hop rounds what it carries once; sums are in fp32, and a rank's own part is never rounded."""
    for rank, (_, home, _) in enumerate(run_loopback(size, jobs.exchange, kind, torch.bfloat16)):
        for into, (mine, *others) in zip((home.k, home.v), _parts(rank, size, kind), strict=True):
            if kind == "forward":  # one message, that grows from rank to rank
                carried = torch.zeros_like(mine)
                for part in others:
                    carried = (part + carried).bfloat16().float()
                expected = mine + carried
            else:
                expected = mine
                for part in others:
                    expected = expected + part.bfloat16().float()
            assert torch.equal(into, expected)


@pytest.mark.parametrize("grad_wire", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exchange_sends_rows_times_heads_times_dims(size: int, grad_wire: torch.dtype) -> None:
    elements = jobs.BATCH * jobs.HEADS * sum(jobs.DIMS)
    for kind in ("forward", "direct", "double")[: 2 + (size % 2 == 0)]:
        for rank, (_, _, meter) in enumerate(run_loopback(size, jobs.exchange, kind, grad_wire)):
            peers = [other for other in range(size) if other != rank]
            if (
                kind == "double"
            ):  # within its pair a rank passes on its own, and what its first neighbour's pair began with
                keys = [jobs.ROWS[owner] for owner in {rank, (rank - 2) % size}] + [jobs.ROWS[rank]] * (size > 2)
                grads = [jobs.ROWS[owner] for owner in peers]
            elif kind == "forward":  # all shards but the next rank's own go out, and the gradients of all but its own
                keys = [jobs.ROWS[owner] for owner in range(size) if owner != (rank + 1) % size]
                grads = [jobs.ROWS[owner] for owner in peers]
            else:
                keys = [len(jobs.kept_rows(rank, reader)) for reader in peers]
                grads = [len(jobs.kept_rows(owner, rank)) for owner in peers]
            for kind_of, rows, itemsize in (("kv", keys, 4), ("grad", grads, grad_wire.itemsize)):
                expected = Traffic(sum(n > 0 for n in rows), sum(rows) * elements * itemsize)
                assert meter.get(kind_of, Traffic(0, 0)) == expected


@pytest.mark.parametrize("kind", ["forward", "direct", "double"])
def test_exchange_is_strict(kind: str) -> None:
    """Nothing strided is sent, nothing read before it is there, nothing changed while it leaves; to the last bit."""
    threads = run_loopback(4, jobs.exchange, kind, torch.bfloat16)
    processes = run_gloo(4, jobs.exchange, kind, torch.bfloat16, strict=True)
    for (steps, home, meter), (strict_steps, strict_home, strict_meter) in zip(threads, processes, strict=True):
        for pair, strict_pair in zip(steps, strict_steps, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(pair, strict_pair, strict=True))
        assert torch.equal(home.message, strict_home.message)
        assert meter == strict_meter


# Agreement.


@IN_EVERY_WORLD
def test_a_refusal_on_one_rank_is_raised_on_all(world: str) -> None:
    assert WORLDS[world](3, jobs.refuse_on_one) == ["rank 1: x: got 3, expected 4"] * 3


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([3, 3, 4], "3 on ranks 0, 1, 4 on rank 2"),
        ([5, 3, 4], "5 on rank 0, 3 on rank 1, 4 on rank 2"),
        ([None, "a", None], "None on ranks 0, 2, 'a' on rank 1"),
    ],
    ids=["one", "all", "types"],
)
def test_what_ranks_disagree_on_is_named_on_all(values: list, got: str) -> None:
    def call(world: World) -> str:
        return jobs.disagreement(world, "call", {"same": (1, 2), "x": values[world.rank], "later": world.rank})

    expected = f"call: ranks disagree on x: got {got}; expected the same on every rank of the group"
    assert run_loopback(3, call) == [expected] * 3


def test_refusals_for_several_reasons_are_all_told() -> None:
    def call(world: World) -> str:
        reason = ["too long", "too short", "too long", None][world.rank]
        return jobs.disagreement(world, "call", {"x": world.rank}, ValueError(reason) if reason else None)

    assert run_loopback(4, call) == ["ranks 0, 2: too long; rank 1: too short"] * 4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_reason_of_all_ranks_is_told_once(size: int) -> None:
    def call(world: World) -> str:
        return jobs.disagreement(world, "call", {}, ValueError("too long"))

    assert run_loopback(size, call) == ["too long"] * size


def test_long_refusals_are_cut_not_lost() -> None:
    def call(world: World) -> str:
        return jobs.disagreement(world, "call", {}, ValueError("é" * 2000) if world.rank else None)

    first, second = run_loopback(2, call)
    assert first == second
    assert first.startswith("rank 1: " + "é" * 500)


def test_different_calls_are_told_apart() -> None:
    def call(world: World) -> str:
        what, fields = [("plan", {"length": 3, "mask": 1}), ("attention", {"heads": 3})][world.rank]
        return jobs.disagreement(world, what, fields)

    first, second = run_loopback(2, call)
    assert "ranks disagree on call: got plan on rank 0, attention on rank 1" in first
    assert first == second


@pytest.mark.parametrize("size", [1, 2, 4])
def test_agreement_costs_104_bytes_to_each_other_rank(size: int) -> None:
    def cost(world: World) -> tuple[dict[str, Traffic], dict[str, Traffic]]:
        agree(world, "call", {"x": 1, "y": "long" * 1000})
        agreed = dict(world.meter.by_kind)
        world.meter.reset()
        jobs.disagreement(world, "call", {"x": world.rank})
        return agreed, dict(world.meter.by_kind)

    for agreed, disagreed in run_loopback(size, cost):
        if size == 1:
            assert agreed == disagreed == {}
        else:
            assert agreed == {"agree": Traffic(1, 104 * (size - 1))}
            assert disagreed == {"agree": Traffic(2, (104 + 1024) * (size - 1))}
