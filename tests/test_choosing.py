"""``auto``: its predictions count what is sent, its choices follow the machine, and every rank makes the same."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import seqpar
from seqpar import Causal, Documents, Full, Mask, SlidingWindow
from seqpar.choosing import decide, layouts_to_try, schedules_to_try, work_of
from seqpar.comm import World, run_loopback
from seqpar.costs import Call, cost
from seqpar.layouts import resolve_layout
from support.cases import LAYOUTS, MASKS, SCHEDULES, fits, layout_of, scheduled
from support.jobs import plan_automatically, rates_of_meshes
from support.ranks import run_gloo

RATES = seqpar.Rates(
    forward=500e12, backward=400e12, call=10e-6, backward_call=10e-6, copy=1e12,
    bandwidth=100e9, latency=10e-6, overlap=1.0,
)  # fmt: skip
SLOW_LINKS = replace(RATES, bandwidth=1e9)
MORE: dict[str, Any] = {"head_dim": 16, "dtype": torch.bfloat16}
TOLD: dict[str, Any] = {"heads": (8, 2), "head_dim": (16, 8), "dtype": torch.bfloat16}


@pytest.mark.parametrize(("schedule", "world"), scheduled(1, 2, 3, 4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_predicted_bytes_are_those_that_the_plan_sends(layout: str, world: int, schedule: str) -> None:
    call = Call(8, 2, 16, 8, torch.bfloat16, "cuda")
    for name, case in MASKS.items():
        if not fits(name, layout):
            continue
        size, mask = (case.length, case.kv_length), case.of(2)
        held = resolve_layout(seqpar.layouts.as_layout(layout_of(case, layout, world)), mask, *size, world, 2)

        def job(w: World, case: Any = case, held: Any = held, mask: Any = mask) -> list[int]:
            plan = seqpar.plan(
                mask, length=case.length, kv_length=case.kv_length, group=w, layout=held,
                schedule=SCHEDULES[schedule], heads=(8, 2),
            )  # fmt: skip
            sent = plan.traffic(1, (8, 2), (16, 8), torch.bfloat16)
            return [sum(way.bytes for way in sent.values())]

        for rank, (expected,) in enumerate(run_loopback(world, job)):
            work = work_of(SCHEDULES[schedule], mask, held, *size, world, rank, (8, 2))
            assert cost(SCHEDULES[schedule], held, work, call, RATES, rank).bytes == expected


def test_a_prediction_by_hand() -> None:
    """Two ranks, full attention, a ring: a kernel beside K and V, then one alone."""
    rates = seqpar.Rates(
        forward=1e9, backward=2e9, call=1e-3, backward_call=2e-3, copy=1e15, bandwidth=1e6, latency=5e-3, overlap=0.5
    )
    call = Call(4, 2, 8, 8, torch.float32, "cuda")
    held = resolve_layout("contiguous", Full(), 64, 64, 2)
    work = work_of(seqpar.Ring("forward"), Full(), held, 64, 64, 2, 0)
    predicted = cost(seqpar.Ring("forward"), held, work, call, rates, 0)
    forward, backward = (32 * 32 * 4 * flop / rate + c for flop, rate, c in ((32, 1e9, 1e-3), (80, 2e9, 2e-3)))
    kv = 5e-3 + 32 * 2 * 16 * 4 / 1e6
    assert predicted.kernel == pytest.approx(2 * (forward + backward))
    # Half of a transfer's time is taken from the kernel beside it.
    assert predicted.forward == pytest.approx(max(kv, forward + kv / 2) + forward)
    assert predicted.backward == pytest.approx(max(2 * kv, backward + kv) + backward)
    assert predicted.bytes == 3 * 32 * 2 * 16 * 4


def choice(
    mask: Mask,
    world: int,
    rates: seqpar.Rates = RATES,
    heads: tuple[int, int] = (8, 8),
    memory: int | None = None,
) -> seqpar.Plan:
    """The plan of the last rank, after all have chosen the same."""

    def job(w: World) -> seqpar.Plan:
        return seqpar.plan(
            mask, length=32_768, group=w, layout="auto", schedule=seqpar.Auto(rates, memory), heads=heads, head_dim=128,
            dtype=torch.bfloat16,
        )  # fmt: skip

    plans = run_loopback(world, job)
    assert len({(plan.schedule, repr(plan.layout.content)) for plan in plans}) == 1
    return plans[-1]


def test_documents_that_fit_on_ranks_are_not_moved() -> None:
    """The same number of tokens on every rank, whole documents: nothing to send, and nothing sent."""
    documents = Documents(range(0, 32_769, 2048))
    plan = choice(Causal() & documents, 4, SLOW_LINKS)
    assert [sum(t.bytes for t in plan.traffic(1, 8, 128, torch.bfloat16, rank).values()) for rank in range(4)] == [
        0
    ] * 4


def test_windows_fetch_their_halo() -> None:
    plan = choice(SlidingWindow(1023), 4, SLOW_LINKS)
    assert isinstance(plan.schedule, seqpar.Ring)
    assert plan.work.exchange == "direct"
    assert max(max(plan.work.messages(rank, grads=False), default=0) for rank in range(4)) <= 1023


def test_few_kv_heads_travel_by_ring_and_many_heads_are_traded() -> None:
    """Per token, a ring of 8 moves 7 times K and V (and more back), Ulysses q, k, v and out once."""
    assert isinstance(choice(Causal(), 8, SLOW_LINKS, heads=(32, 32)).schedule, seqpar.Ulysses)
    assert not isinstance(choice(Causal(), 2, SLOW_LINKS, heads=(32, 1)).schedule, seqpar.Ulysses)


def test_memory_excludes_what_does_not_fit() -> None:
    free = choice(Causal(), 2, heads=(8, 1))
    assert free.decision is not None
    used = free.decision.chosen.cost.memory
    tight = choice(Causal(), 2, heads=(8, 1), memory=used - 1)
    assert tight.decision is not None
    assert tight.schedule != free.schedule
    assert tight.decision.chosen.cost.memory < used
    assert f"excluded: needs {used:,} bytes" in tight.explain()
    with pytest.raises(ValueError, match=r"Auto\(memory=\): got 5 bytes per batch row, expected at least [\d,]+, the"):
        choice(Causal(), 8, memory=5)


@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (5, 5), (7, 1)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
def test_no_candidate_has_both_less_work_and_fewer_bytes(mask: str, heads: tuple[int, int], world: int) -> None:
    masks = {"causal": Causal(), "window": SlidingWindow(511), "documents": Causal() & Documents([0, 900, 5000, 8192])}

    def job(w: World) -> None:
        layouts = layouts_to_try("auto", masks[mask], 8192, 8192, world)
        call = Call(*heads, 64, 64, torch.bfloat16, "cuda")
        schedules = schedules_to_try(seqpar.Auto(), world, None)
        decision = decide(w, schedules, layouts, masks[mask], 8192, 8192, call, SLOW_LINKS, None)
        chosen = decision.chosen.cost
        for other in decision.candidates:
            assert not (other.cost.bytes < chosen.bytes and other.cost.kernel < 0.99 * chosen.kernel), other

    run_loopback(world, job)


def test_rates_are_measured_once_per_group_by_all_ranks_together() -> None:
    (first, second, rates), others = run_gloo(2, plan_automatically)
    assert first > 0
    assert second == 0
    assert others == (first, second, rates)
    assert 1e8 < rates.forward < 1e15
    assert 1e8 < rates.backward < 1e15
    assert 1e6 < rates.bandwidth < 1e13
    assert 0 < rates.latency < 1
    assert 0 <= rates.overlap <= 1


@pytest.mark.parametrize("where", ["seqpar.choosing.cost", "seqpar.probing._kernel"])
def test_a_rank_that_fails_to_predict_tells_the_others(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = where.rsplit(".", 1)
    original, failing = getattr(sys.modules[module], name), threading.local()

    def fail(*args: Any) -> Any:
        if failing.rank == 1:
            raise MemoryError("no memory left")
        return original(*args)

    monkeypatch.setattr(where, fail)
    messages = []

    def job(w: World) -> None:
        failing.rank = w.rank
        try:
            seqpar.plan(Causal(), length=64, group=w, schedule="auto", **TOLD)
        except ValueError as error:
            messages.append(str(error))

    run_loopback(3, job)
    assert len(messages) == 3
    assert all("1" in message for message in messages)


def test_a_mesh_of_two_axes_is_measured_along_both() -> None:
    for plain, both, again in run_gloo(4, rates_of_meshes):
        assert plain.node is None
        assert both.node == again.node == 2
        assert both.far_bandwidth


def test_explain_lists_candidates_and_says_why() -> None:
    text = choice(SlidingWindow(1023), 4, SLOW_LINKS).explain()
    assert "auto: 500,000 and 400,000 GFLOP/s forward and backward, 1.00 GB/s, 10 us a message" in text
    for name in ("Ring(exchange='direct'", "Ring(exchange='forward'", "AllGather(", "Ulysses("):
        assert name in text
    assert text.count("-> ") == 1
    assert "chosen: " in text


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (seqpar.Ring(), ["busiest rank / mean 1.0"]),
        (seqpar.DoubleRing(2), ["busiest rank / mean 1.0", "forward exchange, around rings of 2, and between them"]),
        (seqpar.AllGather(), ["gather exchange, every rank holds all keys at once"]),
        (seqpar.Ulysses(degree=2), ["busiest block of 2 ranks / mean 1.0", "among those with the same heads"]),
    ],
    ids=str,
)
def test_explain_says_how_a_schedule_moves(schedule: Any, words: list[str]) -> None:
    def job(w: World) -> str:
        return seqpar.plan(Causal(), length=64, group=w, schedule=schedule, heads=(8, 2), **MORE).explain()

    for text in run_loopback(4, job):
        assert all(word in text for word in words), text


def test_one_rank_chooses_nothing() -> None:
    plan = seqpar.plan(Causal(), length=9, schedule="auto", layout="auto", **TOLD)
    assert plan.decision is None
    assert "nothing travels" in plan.explain()


def test_a_choice_can_be_pinned() -> None:
    def job(w: World) -> None:
        plan = seqpar.plan(Causal(), length=64, group=w, schedule=seqpar.Auto(RATES), layout="auto", **TOLD)
        again = seqpar.plan(Causal(), length=64, group=w, schedule=plan.schedule, layout=plan.layout)
        assert (again.schedule, again.layout) == (plan.schedule, plan.layout)

    run_loopback(3, job)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "auto"}, "compare what schedules cost: got heads=None, head_dim=None, dtype=None, expected all"),
        ({"layout": "auto", "heads": 4}, r"got heads=\(4, 4\), head_dim=None, dtype=None, expected all three; give"),
    ],
)
def test_auto_without_heads_is_refused(arguments: dict[str, Any], message: str) -> None:
    def job(w: World) -> None:
        seqpar.plan(Causal(), length=8, group=w, **arguments)

    with pytest.raises(ValueError, match=message):
        run_loopback(2, job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": 5}, r"Auto\(rates=\): got 5, expected a seqpar.Rates"),
        ({"memory": -1}, r"Auto\(memory=\): got -1, expected a number of bytes, or None"),
    ],
)
def test_auto_refuses_odd_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seqpar.Auto(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth": 0}, r"Rates\(bandwidth=\): got 0, expected more"),
        ({"latency": -1.0}, r"Rates\(latency=\): got -1.0, expected a number >= 0"),
        ({"overlap": 1.5}, r"Rates\(overlap=\): got 1.5, expected 0 .. 1"),
        ({"node": 0}, r"Rates\(node=\): got 0, expected a number >= 1"),
        ({"node": 2.5}, r"Rates\(node=\): got 2.5, expected a number >= 1"),
        ({"bandwidth": True}, r"Rates\(bandwidth=\): got True, expected a number"),
        ({"call": "fast"}, r"Rates\(call=\): got 'fast', expected a number >= 0"),
    ],
)
def test_rates_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RATES, **change)


def test_between_nodes_other_rates_hold() -> None:
    """A ring over two nodes waits for the slow link in every step, a double ring once per round."""
    rates = replace(RATES, node=4, far_bandwidth=1e9, far_latency=1e-4)
    call = Call(32, 8, 128, 128, torch.bfloat16, "cuda")
    held = resolve_layout("zigzag", Causal(), 65_536, 65_536, 8)
    predicted = {}
    for schedule in (seqpar.Ring("forward"), seqpar.DoubleRing(4), seqpar.Ulysses(degree=4), seqpar.Ulysses()):
        work = work_of(schedule, Causal(), held, 65_536, 65_536, 8, 0)
        predicted[type(schedule).__name__, getattr(schedule, "degree", None)] = cost(
            schedule, held, work, call, rates, 0
        ).seconds
    ring, double, hybrid, traded = predicted.values()
    assert double < ring / 2
    assert hybrid < ring
    assert hybrid < traded
