"""Wrong input is one ValueError with got, expected and remedy, on every rank, before anything but agreement is sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual

import seqpar
from seqpar.comm import World, run_loopback
from seqpar.validation import admit
from support.ranks import run_gloo
from support.refusals import attend_wrongly, plan_wrongly, refusal

X = torch.zeros(1, 8, 4, 8)  # [batch, global tokens, heads, head_dim]

Cases = dict[str, tuple[dict[str, Any], str]]

PLANS: Cases = {
    "no tokens": ({"length": 0}, r"length: got 0, expected a positive number of tokens"),
    "not a mask": ({"mask": "causal"}, r"mask: got 'causal', expected a mask such as seqpar.Causal\(\)"),
    "layout": ({"layout": "zigzagged"}, r"layout: got 'zigzagged', expected one of contiguous, zigzag, striped"),
    "schedule": (
        {"schedule": "rings"},
        r"schedule: got 'rings', expected one of ring, allgather, ulysses, tree, auto, double_ring, hybrid",
    ),
    "no mesh": (
        {"schedule": "double_ring"},
        r"schedule='double_ring': got a group of one axis, expected a 2-D DeviceMesh .*; pass one",
    ),
    "auto": (
        {"schedule": "auto", "heads": 4},
        r"compare what schedules cost: got heads=\(4, 4\), head_dim=None, dtype=None, expected all three; give them",
    ),
    "cu_seqlens too long": (
        {"mask": seqpar.Documents([0, 4, 9])},
        r"cu_seqlens of batch row 0 ends at 9, expected 8, the plan's number of tokens; give padding a document",
    ),
    "cu_seqlens too short": ({"mask": seqpar.Documents([[0, 8], [0, 7]])}, r"cu_seqlens of batch row 1 ends at 7"),
    "no documents": ({"layout": "document_zigzag"}, r"layout='document_zigzag': the mask has no Documents"),
    "heads": ({"heads": (4, 3)}, r"heads: got \(4, 3\), expected query heads to be a multiple of KV heads"),
    "head_dim": ({"head_dim": 0}, r"head_dim: got 0, expected a positive integer"),
    "dtype": ({"dtype": torch.int8}, r"dtype: got torch.int8, expected one of float64, float32, bfloat16, float16"),
}

PLANS_OF_THREE: Cases = {
    "too short": ({"length": 2}, r"length: got 2 tokens for 3 ranks, expected at least one each; use fewer ranks"),
    "keys too short": ({"kv_length": 1}, r"kv_length: got 1 tokens for 3 ranks"),
    "token twice": (
        {"layout": [[0, 1], [1, 2, 3], [4, 5, 6, 7]]},
        r"9 positions, 8 of them distinct, expected each of",
    ),
    "ranks of a node": (
        {"schedule": seqpar.DoubleRing(2)},
        r"DoubleRing\(degree=\): got 2 for 3 ranks, expected a divisor of their number",
    ),
    "ranks that trade": ({"schedule": seqpar.Ulysses(degree=2)}, r"Ulysses\(degree=\): got 2 for 3 ranks, expected"),
    "ranks that trade around a double ring": (
        {"schedule": seqpar.Ulysses(seqpar.DoubleRing(2), degree=1)},
        r"DoubleRing\(degree=\): got 2 for 3 ranks",
    ),
    "documents for all": (
        {"layout": "whole_documents", "mask": seqpar.Documents([0, 5, 8])},
        r"layout='whole_documents': got 2 documents for 3 ranks, expected at least one each; use fewer",
    ),
    "token missing": ({"layout": [[0, 1], [2, 3], [4, 5, 6]]}, r"hold 7 positions, 7 of them distinct, expected"),
    "unsorted": ({"layout": [[1, 0, 2], [3, 4], [5, 6, 7]]}, r"queries of rank 0 are not .* increasing; sort them"),
    "ranks of layout": ({"layout": [[0, 1, 2, 3], [4, 5, 6, 7]]}, r"for 2 ranks, expected 3, the group's size"),
}

CALLS: Cases = {
    "dims": ({"q": X[0]}, r"q: got shape .*, expected 4 dims \[batch, tokens, heads, head_dim\]"),
    "tokens": ({"k": X[:, :7]}, r"k: got 7 tokens, expected \d, rank \d's share of the plan's tokens; shard with"),
    "values' tokens": ({"v": X[:, :7]}, r"v: got 7 tokens, expected \d"),
    "heads": (
        {"q": X[:, :, :3], "k": X[:, :, :2], "v": X[:, :, :2]},
        r"q: got 3 heads over 2 KV heads, expected a mul",
    ),
    "no heads": ({"k": X[:, :, :0], "v": X[:, :, :0]}, r"q: got 4 heads over 0 KV heads"),
    "values' heads": ({"v": X[:, :, :2]}, r"v: got 2 heads, expected k's 4"),
    "head_dim": ({"k": X[..., :4]}, r"k: got head_dim 4, expected q's 8; only v's may differ"),
    "batch": ({"v": X.expand(2, -1, -1, -1)}, r"v: got batch 2, expected q's 1"),
    "dtype": ({"q": X.int()}, r"q: got torch.int32, expected one of float64"),
    "mixed dtypes": (
        {"k": X.double()},
        r"k: got torch.float64 on cpu, expected q's torch.float32 on cpu; cast or move",
    ),
    "sinks": ({"sinks": torch.zeros(3)}, r"sinks: got \(3,\) torch.float32 on cpu, expected a floating \[4\]"),
    "integer sinks": ({"sinks": torch.zeros(4).int()}, r"sinks: got \(4,\) torch.int32"),
    "kernel": ({"kernel": "cuda"}, r"kernel: got 'cuda', expected one of auto, reference, cpu"),
}

DISAGREEMENTS: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "length": (
        lambda rank: {"length": 8 + (rank == 1)},
        r"disagree on length: got 8 on ranks 0, 2, 9 on rank 1; expec",
    ),
    "mask": (
        lambda rank: {"mask": seqpar.Full() if rank == 2 else seqpar.Causal()},
        r"disagree on mask: got .*Causal\(\).* on ranks 0, 1, .*Full\(\).* on rank 2",
    ),
    "documents": (
        lambda rank: {"mask": seqpar.Documents([0, 3 + (rank == 0), 8])},
        r"disagree on mask: got .* on rank 0, .* on ranks 1, 2",
    ),
    "layout": (lambda rank: {"layout": "striped" if rank else "zigzag"}, r"disagree on layout"),
    "schedule": (lambda rank: {"schedule": seqpar.Ring(grad_wire="bf16") if rank else "ring"}, r"disagree on schedule"),
    "heads": (lambda rank: {"heads": 4 + rank}, r"disagree on heads: got \(4, 4\) on rank 0, \(5, 5\) on rank 1"),
    "dtype": (lambda rank: {"dtype": torch.half if rank else torch.bfloat16}, r"disagree on dtype"),
    "refused on one rank": (lambda rank: {"length": 8 if rank else 0}, r"^rank 0: length: got 0, expected a positive"),
}

WRONG_TYPES: Cases = {
    "no tensor": ({"k": [1.0]}, r"k: got list, expected a dense tensor; convert it"),
    "sparse": ({"q": X.to_sparse()}, r"q: got a torch.sparse_coo tensor, expected a dense tensor"),
    "no dims": ({"q": torch.tensor(1.0)}, r"q: got shape \(\), expected 4 dims"),
    "no head_dim": ({name: X[..., :0] for name in "qkv"}, r"q, v: got head_dim 0 and 0, expected at least 1"),
    "scale": ({"scale": "x"}, r"scale: got 'x', expected a finite number"),
    "infinite scale": ({"scale": float("inf")}, r"scale: got inf, expected a finite number"),
    "learnable scale": ({"scale": torch.tensor(1.0)}, r"scale: got tensor\(1.\), .* a learnable scale belongs into q"),
    "sinks": ({"sinks": [0.0] * 4}, r"sinks: got list, expected a dense tensor"),
    "kernel": ({"kernel": 3}, r"kernel: got 3, expected one of auto, reference, cpu"),
}

DISAGREEING_CALLS: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "dtype": (lambda rank: {n: X.to(torch.half if rank else torch.bfloat16) for n in "qkv"}, r"disagree on dtype"),
    "heads": (lambda rank: {n: X[:, :, : 4 - rank] for n in "qkv"}, r"disagree on heads: got .* on rank 0"),
    "batch": (lambda rank: {n: X.expand(1 + (rank == 1), -1, -1, -1) for n in "qkv"}, r"disagree on batch"),
    "scale": (lambda rank: {"scale": 1.0 + (rank == 2)}, r"disagree on scale: got 1.0 on ranks 0, 1, 2.0 on rank 2"),
    "sinks": (lambda rank: {"sinks": torch.zeros(4) if rank else None}, r"disagree on sinks"),
    "kernel": (lambda rank: {"kernel": "cpu" if rank else "reference"}, r"disagree on kernel"),
    "plan": (lambda rank: {"plan": seqpar.Full() if rank else seqpar.Causal()}, r"disagree on plan: got .* on rank 0"),
    "requires_grad": (
        lambda rank: {"q": X.clone().requires_grad_(rank == 0)},
        r"disagree on (call|requires_grad): got .* on rank 0",
    ),
    "refused on one rank": (lambda rank: {"k": X[:, :7]} if rank == 1 else {}, r"^rank 1: k: got 7 tokens, expected"),
}


def assert_refused(messages: list[str | None], pattern: str) -> None:
    """Every rank refused, all in the same words, and those say what they should."""
    assert None not in messages, f"accepted by ranks {[r for r, m in enumerate(messages) if m is None]}"
    assert len(set(messages)) == 1, f"ranks raised different errors: {messages}"
    assert re.search(pattern, str(messages[0])), messages[0]
    assert "\n" not in str(messages[0])


@pytest.mark.parametrize(
    ("case", "world"), [*((case, world) for case in PLANS for world in (1, 3)), *((case, 3) for case in PLANS_OF_THREE)]
)
def test_plan_refuses(case: str, world: int) -> None:
    arguments, pattern = (PLANS | PLANS_OF_THREE)[case]
    assert_refused(run_loopback(world, plan_wrongly, lambda rank: arguments), pattern)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("world", [1, 3])
def test_attention_refuses(case: str, world: int) -> None:
    arguments, pattern = CALLS[case]
    assert_refused(run_loopback(world, attend_wrongly, X, lambda rank: arguments), pattern)


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_one_rank_with_something_else_altogether(case: str) -> None:
    arguments, pattern = WRONG_TYPES[case]
    messages = run_loopback(3, attend_wrongly, X, lambda rank: arguments if rank == 1 else {})
    assert_refused(messages, r"^rank 1: " + pattern)


@pytest.mark.parametrize(
    "case", [{"heads": 3.5}, {"length": "8"}, {"layout": 5}, {"layout": [["a"], [0], [1]]}], ids=str
)
def test_one_rank_that_plans_nonsense(case: dict[str, Any]) -> None:
    assert_refused(run_loopback(3, plan_wrongly, lambda rank: case if rank == 2 else {}), r"^rank 2: .*expected")


def test_ranks_that_unshard_different_tensors() -> None:
    def job(world: World) -> str:
        plan = seqpar.plan(seqpar.Causal(), length=9, group=world)
        with pytest.raises(ValueError, match=r"seqpar\.unshard: ranks disagree on dtype") as caught:
            plan.unshard(torch.zeros(1, 3, dtype=torch.half if world.rank else torch.bfloat16))
        return str(caught.value)

    assert len(set(run_loopback(3, job))) == 1


def test_forward_mode_is_refused() -> None:
    plan = seqpar.plan(seqpar.Full(), length=8)
    with dual_level(), pytest.raises(ValueError, match="q: got a forward-mode tangent, expected none"):
        seqpar.attention(make_dual(X, torch.ones_like(X)), X, X, plan)


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_disagree_on_a_plan(case: str) -> None:
    arguments, pattern = DISAGREEMENTS[case]
    assert_refused(run_loopback(3, plan_wrongly, arguments), pattern)


@pytest.mark.parametrize("case", DISAGREEING_CALLS)
def test_ranks_that_disagree_on_a_call(case: str) -> None:
    arguments, pattern = DISAGREEING_CALLS[case]
    assert_refused(run_loopback(3, attend_wrongly, X, arguments), pattern)


@pytest.mark.parametrize("strict", [False, True], ids=["gloo", "strict"])
def test_processes_refuse_alike(strict: bool) -> None:
    assert_refused(run_gloo(2, refusal, "plan", strict=strict), r"disagree on length: got 8 on rank 0, 9 on rank 1")
    assert_refused(run_gloo(2, refusal, "attention", strict=strict), r"disagree on dtype")
    assert_refused(run_gloo(2, refusal, "call", strict=strict), r"disagree on call")


def test_a_later_call_is_checked_too() -> None:
    def job(world: World) -> str | None:
        plan = seqpar.plan(seqpar.Causal(), length=9, group=world)
        x = plan.shard(torch.zeros(1, 9, 2, 8))
        seqpar.attention(x, x, x, plan)
        before = world.meter.calls
        with pytest.raises(ValueError, match=r"q: got 2 tokens, expected 3") as caught:
            seqpar.attention(x[:, :2], x, x, plan)
        assert world.meter.calls == before
        return str(caught.value)

    assert len(run_loopback(3, job)) == 3


def test_a_plan_refuses_other_tensors_than_it_was_told() -> None:
    x = torch.zeros(1, 8, 4, 8)
    for told, pattern in (
        ({"heads": (4, 2)}, r"heads: got \(4, 4\), expected \(4, 2\), which the plan was told; make a plan"),
        ({"head_dim": (8, 16)}, r"head_dim: got \(8, 8\), expected \(8, 16\)"),
        ({"dtype": torch.bfloat16}, r"dtype: got torch.float32, expected torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=pattern):
            seqpar.attention(x, x, x, seqpar.plan(seqpar.Causal(), length=8, **told))


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: seqpar.Documents([0, 5, 5, 8]), r"cu_seqlens of batch row 0 goes from 5 to 5, expected increasing"),
        (lambda: seqpar.Documents([0, 5, 3]), r"goes from 5 to 3, expected increasing cumulative lengths"),
        (lambda: seqpar.Documents([1, 5]), r"is \[1, 5\], expected integers that start at 0 and end at the length"),
        (
            lambda: seqpar.Documents([]),
            r"Documents: got cu_seqlens=\[\], expected \[0, ..., length\], or a list of such",
        ),
        (lambda: seqpar.Documents(5), r"Documents: got cu_seqlens=5, expected"),
        (lambda: seqpar.Documents([[0, 5], 7]), r"cu_seqlens of batch row 1 is 7, expected integers"),
        (lambda: seqpar.Documents([0, 2.5]), r"expected integers"),
        (lambda: seqpar.Documents([0, 4], [0, 2, 4]), r"1\] documents of queries and \[2\] of keys per batch row"),
        (
            lambda: seqpar.SlidingWindow(-2),
            r"SlidingWindow\(left=\): got -2, expected an integer >= -1; -1 means unlim",
        ),
        (lambda: seqpar.Chunked(0), r"Chunked\(size=\): got 0, expected an integer >= 1"),
        (lambda: seqpar.PrefixLM(1.5), r"PrefixLM\(prefix=\): got 1.5, expected an integer >= 0"),
        (lambda: seqpar.Ring(exchange="both"), r"Ring\(exchange=\): got 'both', expected one of auto, forward, direct"),
        (lambda: seqpar.plan(seqpar.Causal(), length=8, group="sp"), r"group: got 'sp', expected a ProcessGroup"),
        (lambda: seqpar.attention(X, X, X, None), r"plan: got NoneType, expected the result of seqpar.plan"),
        (
            lambda: seqpar.attention([1.0], X, X, seqpar.plan(seqpar.Full(), length=8)),
            r"q: got list, expected a dense tensor; convert it",
        ),
    ],
)
def test_values_refuse(make: Callable[[], object], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        make()


def test_devices_must_agree() -> None:
    plan = seqpar.plan(seqpar.Full(), length=8)
    expected = r"v: got torch.float32 on meta, expected q's torch.float32 on cpu; cast or move it"
    with pytest.raises(ValueError, match=expected):
        admit(plan, X, X, X.to("meta"), None, 1.0, "auto", False)
    with pytest.raises(ValueError, match=r"kernel='cpu': got tensors on meta, expected the CPU; use kernel='auto'"):
        admit(plan, *[X.to("meta")] * 3, None, 1.0, "cpu", False)


def test_ranks_of_which_some_want_the_lse() -> None:
    """In Ulysses it is traded: those who do not want it would not take part."""

    def job(world: World) -> str | None:
        plan = seqpar.plan(seqpar.Causal(), length=8, group=world, schedule="ulysses")
        x = plan.shard(X)
        try:
            (seqpar.attention if world.rank else seqpar.attention_with_lse)(x, x, x, plan)
        except ValueError as error:
            return str(error)
        return None

    assert_refused(
        run_loopback(2, job), r"ranks disagree on lse: got True on rank 0, False on rank 1; expected the same"
    )
