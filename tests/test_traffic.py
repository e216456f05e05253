"""Bytes and calls on the wire are the plan's, exactly, and the closed form's where the tokens divide evenly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

import seqpar
from seqpar.comm import Traffic, World, run_loopback
from support.cases import HEADS, LAYOUTS, MASKS, SCHEDULES, MaskCase, fits, layout_of, scheduled, tensors
from support.jobs import attend

EVEN = 64


def measured(
    world: int,
    mask: str,
    layout: str,
    heads: tuple[int, int],
    dtype: torch.dtype,
    schedule: Any,
    value_dim: int = 16,
) -> list[tuple[dict[str, Traffic], dict[str, Traffic], dict[str, Traffic]]]:
    """Per rank: what the plan says, what forward sent, what forward and backward sent."""
    case = MASKS[mask]
    inputs = tensors(case, heads, dtype, value_dim=value_dim)

    def job(w: World) -> tuple[dict[str, Traffic], dict[str, Traffic], dict[str, Traffic]]:
        plan = seqpar.plan(
            case.of(heads[1]),
            length=case.length,
            kv_length=case.kv_length,
            group=w,
            layout=layout_of(case, layout, world),
            schedule=schedule,
            heads=heads,
        )
        predicted = plan.traffic(batch=2, heads=heads, head_dim=(16, value_dim), dtype=dtype)
        result = attend(w, mask, layout, inputs, schedule=schedule)
        return predicted, result["forward"], result["both"]

    return run_loopback(world, job)


@pytest.mark.parametrize(("schedule", "world"), scheduled(1, 2, 3, 4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_sent_is_what_the_plan_says(layout: str, world: int, schedule: str) -> None:
    for mask in MASKS:
        if not fits(mask, layout):
            continue
        given = SCHEDULES[schedule]
        for how in (given, replace(given, grad_wire="bf16")) if hasattr(given, "grad_wire") else (given,):
            for predicted, forward, both in measured(world, mask, layout, HEADS["gqa"], torch.bfloat16, how, 8):
                assert predicted["forward"] == total(forward)
                assert sums(predicted["forward"], predicted["backward"]) == total(both)


def sums(*traffic: Traffic) -> Traffic:
    return Traffic(sum(t.calls for t in traffic), sum(t.bytes for t in traffic))


def total(sent: dict[str, Traffic]) -> Traffic:
    """Of everything that belongs to attention without lse."""
    kinds = ("kv", "grad", "trade", "out", "dout", "q", "partial", "dq")
    return sums(*(sent.get(kind, Traffic(0, 0)) for kind in kinds))


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_the_closed_form_of_ulysses(world: int, heads: tuple[int, int]) -> None:
    """Per rank and batch row, 16-bit: 4(eta + kappa)T(P-1)/P each way, while there are as many KV heads as ranks."""
    even = replace(MASKS["causal"], length=EVEN, kv_length=EVEN)
    with patch.dict(MASKS, causal=even):
        for predicted, forward, both in measured(world, "causal", "zigzag", heads, torch.bfloat16, seqpar.Ulysses()):
            kappa = max(heads[1], world)  # KV heads repeat beyond
            expected = 2 * 4 * (heads[0] + kappa) * 16 * (EVEN // world) * (world - 1) // world
            assert total(forward) == predicted["forward"] == (2 * (world - 1), expected)
            assert total(both).bytes == 2 * expected
            assert forward["lse"].bytes == 2 * 4 * heads[0] * (EVEN // world) * (world - 1) // world


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("schedule", ["forward", "allgather"])
def test_the_closed_form(schedule: str, world: int, heads: tuple[int, int]) -> None:
    """Per rank and batch row, 16-bit: 4(P-1)kT forward; 12(P-1)kT backward, 8(P-1)kT with bf16 on the wire."""
    even = replace(MASKS["causal"], length=EVEN, kv_length=EVEN)
    with patch.dict(MASKS, causal=even):
        for wire, factor in (("fp32", 12), ("bf16", 8)):
            results = measured(
                world, "causal", "zigzag", heads, torch.bfloat16, replace(SCHEDULES[schedule], grad_wire=wire)
            )
            for predicted, forward, both in results:
                unit = 2 * (world - 1) * heads[1] * 16 * EVEN // world  # batch x (P-1) x kappa x T
                assert forward["kv"] == predicted["forward"] == (world - 1, 4 * unit)
                backward = both["kv"].bytes - forward["kv"].bytes + both["grad"].bytes
                assert backward == predicted["backward"].bytes == factor * unit


def test_kv_heads_that_kernels_want_repeated_travel_once() -> None:
    """16 query heads on 3 ranks are 5, 5 and 6, which read 2 KV heads each: a block sends those 2 to the other."""
    schedule = seqpar.Ulysses(seqpar.Ring("forward"), degree=3)
    for predicted, forward, both in measured(6, "causal", "contiguous", (16, 4), torch.bfloat16, schedule):
        rows = forward["kv"].bytes / (2 * 2 * (16 + 16) * 2)  # batch x KV heads x (D + Dv) x bytes
        assert rows in (30, 31)
        assert predicted["forward"] == total(forward)
        assert sums(predicted["forward"], predicted["backward"]) == total(both)


def test_direct_on_causal_zigzag_moves_a_quarter_less_in_all() -> None:
    even = replace(MASKS["causal"], length=EVEN, kv_length=EVEN)
    with patch.dict(MASKS, causal=even):
        for world in (2, 4, 8):
            forward, direct = (
                sum(
                    sent["kv"].bytes for _, sent, _ in measured(world, "causal", "zigzag", (8, 2), torch.bfloat16, ring)
                )
                for ring in (seqpar.Ring("forward"), seqpar.Ring("direct"))
            )
            assert direct * 4 == forward * 3


def test_a_window_moves_only_its_halo() -> None:
    """1,024 keys back over 32,768 tokens at P=4: before each of a rank's chunks, 1,023 rows that another rank holds."""
    window, length, world = 1024, 32_768, 4
    case = MaskCase(seqpar.SlidingWindow(window - 1), lambda i, j, n, m: i - window < j <= i, length, length)
    heads, dims = (2, 1), 8
    inputs = tensors(case, heads, torch.bfloat16, dims, dims, batch=1)
    with patch.dict(MASKS, halo=case):
        sent = run_loopback(world, partial(attend, mask="halo", layout="zigzag", inputs=inputs))
    row = heads[1] * 2 * dims * 2
    # Zigzag has 8 chunks, of which the first has nothing before it and the fifth follows the fourth on the same rank.
    assert sum(rank["forward"]["kv"].bytes for rank in sent) == 6 * (window - 1) * row
    assert max(rank["forward"]["kv"].bytes for rank in sent) <= 2 * (window - 1) * row


def test_agreement_costs_one_small_gather_per_plan_and_kind_of_call() -> None:
    def job(world: World) -> list[Traffic]:
        seen = []
        plan = seqpar.plan(seqpar.Causal(), length=8, group=world)
        seen.append(world.meter.by_kind["agree"])
        x = plan.shard(torch.randn(1, 8, 2, 8))
        for _ in range(3):
            seqpar.attention(x, x, x, plan)
        seen.append(world.meter.by_kind["agree"])
        seqpar.attention(x.double(), x.double(), x.double(), plan)
        seen.append(world.meter.by_kind["agree"])
        return seen

    for seen in run_loopback(3, job):
        assert seen == [(n, n * 2 * 13 * 8) for n in (1, 2, 3)]
