"""Tree attention: one packed exchange of partial results, its bytes, and what few queries need."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import seqpar
from seqpar.comm import Traffic, World, run_loopback
from seqpar.tree import levels_of, merged, partials_wire, traffic
from support.cases import MASKS, tensors
from support.jobs import attend, tree_on_a_mesh
from support.oracle import dense_attention, error
from support.ranks import run_gloo
from support.refusals import plan_wrongly

WAYS = {
    "gather": seqpar.Tree(merge="gather"),
    "scatter": seqpar.Tree(merge="scatter"),
    "nodes, gather": seqpar.Tree(merge="gather", degree=2),
    "nodes, scatter": seqpar.Tree(merge="scatter", degree=2),
}


def latents(world: World, schedule: Any, queries: int, keys: int, heads: tuple[int, int]) -> float:
    """The worst error of output, lse and every gradient: few queries over many keys, all seen."""
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int, count: int, dim: int) -> Tensor:
        return torch.randn(2, tokens, count, dim, dtype=torch.float64, generator=generator)

    whole = [normal(queries, heads[0], 8), normal(keys, heads[1], 8), normal(keys, heads[1], 6)]
    dout = normal(queries, heads[0], 6)
    ours, dense = ([x.clone().requires_grad_() for x in whole] for _ in range(2))
    plan = seqpar.plan(seqpar.Full(), length=queries, kv_length=keys, group=world, layout="striped", schedule=schedule)
    q, k, v = ours
    out, lse = seqpar.attention_with_lse(plan.shard(q), plan.shard(k, of="keys"), plan.shard(v, of="keys"), plan)
    out, lse = plan.unshard(out), plan.unshard(lse, dim=2)
    everything = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    expected, expected_lse = dense_attention(*dense, everything)
    pairs = [(out, expected), (lse, expected_lse)]
    grads = torch.autograd.grad((out * dout).sum() + lse.sin().sum(), ours)
    pairs += zip(grads, torch.autograd.grad((expected * dout).sum() + expected_lse.sin().sum(), dense), strict=True)
    return max(error(a.detach(), b.detach()) for a, b in pairs)


@pytest.mark.parametrize("heads", [(6, 2), (3, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("queries", [1, 5])
def test_few_queries_and_their_gradients(queries: int, world: int, heads: tuple[int, int]) -> None:
    """Also fewer queries than ranks, and fewer heads, of which a rank then merges none."""
    for name, schedule in WAYS.items():
        if not name.startswith("nodes") or world % 2 == 0:
            assert max(run_loopback(world, latents, schedule, queries, 43, heads)) <= 1e-10, name
    if queries >= world:
        assert max(run_loopback(world, latents, seqpar.Tree("sharded"), queries, 43, heads)) <= 1e-10


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_gets_the_same_bits(way: str) -> None:
    """Of 16-bit partials too, which are rounded on their way."""
    inputs = tensors(MASKS["causal"], (6, 2), torch.bfloat16)
    results = run_loopback(4, partial(attend, schedule=WAYS[way]), "causal", "zigzag", inputs)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in ("out", "lse", "q"))


def test_the_closed_form_of_one_token() -> None:
    """Llama-3-8B's heads in bf16 at P=8: (P-1)(e*eta + 4H), or 1/P of that and (P-1)e*eta/P home."""
    partial_of = partial(_merge, heads=32, dim=128, dtype=torch.bfloat16)
    gathered, scattered = (run_loopback(8, partial_of, merge)[0] for merge in ("gather", "scatter"))
    assert gathered == {"partial": (1, 7 * (8192 + 128))}
    assert scattered == {"partial": (7, 7280), "out": (7, 7168)}
    assert run_loopback(8, partial_of, "auto")[0] == gathered, "one call is cheaper than fewer bytes in two"
    many = run_loopback(4, partial(partial_of, tokens=512), "auto")[0]
    assert set(many) == {"partial", "out"}, "and bytes are dearer where there are many"


def _merge(world: World, merge: Any, heads: int, dim: int, dtype: torch.dtype, tokens: int = 1) -> dict[str, Traffic]:
    found = seqpar.kernels.Partial(torch.zeros(1, tokens, heads, dim), torch.zeros(1, heads, tokens))
    merged([world], found, dtype, merge, wants_lse=False)
    return dict(world.meter.by_kind)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [6, 1])
def test_bytes_of_levels_are_what_is_sent(way: str, heads: int) -> None:
    schedule = WAYS[way]

    def job(world: World) -> None:
        plan = seqpar.plan(
            seqpar.Causal(), length=3, kv_length=50, group=world, schedule=schedule, heads=(heads, 1), head_dim=8,
            dtype=torch.float32,
        )  # fmt: skip
        q, k = torch.randn(2, 3, heads, 8), torch.randn(2, 50, 1, 8)
        keys = plan.shard(k, of="keys")
        world.meter.reset()
        out = seqpar.attention(q.requires_grad_(), keys, keys, plan)
        forward = {kind: sent for kind, sent in world.meter.by_kind.items() if kind != "agree"}
        levels = traffic(schedule, plan.layout, 2, heads, (8, 8), torch.float32, world.rank)
        assert (
            len(levels["forward"]) == len(levels_of(schedule, 4, world.rank)) == (1 if schedule.degree is None else 2)
        )
        assert sum(sent.bytes for sent in forward.values()) == sum(sent.bytes for sent in levels["forward"])
        assert sum(sent.calls for sent in forward.values()) == sum(sent.calls for sent in levels["forward"])
        out.sum().backward()
        assert world.meter.by_kind["dq"] == plan.traffic(2, (heads, 1), 8, torch.float32)["backward"]

    run_loopback(4, job)


def test_what_is_sent_does_not_grow_with_the_context() -> None:
    def job(world: World) -> list[dict[str, Traffic]]:
        sent = []
        for context in (100, 1000, 10_000):
            cache = seqpar.KVCache(seqpar.Causal(), heads=(4, 2), head_dim=8, capacity=context + 1, group=world)
            x = torch.randn(1, context, 4, 8)
            cache.attend(x, x[:, :, :2], x[:, :, :2])
            world.meter.reset()
            cache.attend(x[:, :1], x[:, :1, :2], x[:, :1, :2])
            sent.append(dict(world.meter.by_kind))
        return sent

    for sent in run_loopback(3, job):
        assert sent == [{"partial": (1, 2 * 4 * (4 * 8 + 4))}] * 3


def test_a_mesh_merges_inside_the_node_first() -> None:
    for worst, levels, same in run_gloo(4, tree_on_a_mesh):
        assert worst <= 1e-10
        assert levels == 2
        assert same


def test_auto_lets_few_queries_go_to_the_keys() -> None:
    rates = seqpar.Rates(
        forward=3e14, backward=2e14, call=1e-5, backward_call=1e-5, copy=1e12, bandwidth=5e10, latency=5e-6
    )

    def job(world: World) -> tuple[Any, str]:
        shape: dict[str, Any] = {"heads": (32, 8), "head_dim": 128, "dtype": torch.bfloat16}
        few = seqpar.plan(
            seqpar.Causal(), length=64, kv_length=65_536, group=world, schedule=seqpar.Auto(rates=rates), **shape
        )
        equal = seqpar.plan(seqpar.Causal(), length=8192, group=world, schedule=seqpar.Auto(rates=rates), **shape)
        assert not isinstance(equal.schedule, seqpar.Tree)
        return few.schedule, few.explain()

    for schedule, words in run_loopback(4, job):
        assert schedule == seqpar.Tree("sharded")
        assert "queries are gathered, keys stay where they are, and partial results are merged" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"schedule": "tree", "kv_length": 2}, "kv_length: got 2 tokens for 3 ranks, expected at least one each"),
        ({"schedule": seqpar.Tree(degree=2)}, "Tree(degree=): got 2 for 3 ranks, expected a divisor of their number"),
        ({"schedule": "tree", "layout": "whole_documents"}, "the mask has no Documents, expected Documents"),
        ({"schedule": "tree", "layout": [[0, 1], [2, 3], [4, 5, 7]]}, "expected each of 0..7 on exactly one rank"),
    ],
)
def test_refused_plans(arguments: dict[str, Any], words: str) -> None:
    messages = run_loopback(3, plan_wrongly, lambda rank: arguments)
    assert len(set(messages)) == 1
    assert words in str(messages[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: seqpar.Tree("split"), r"Tree\(queries=\): got 'split', expected one of replicated, sharded"),
        (lambda: seqpar.Tree(merge="reduce"), r"Tree\(merge=\): got 'reduce', expected one of auto, gather, scatter"),
        (lambda: seqpar.Tree("sharded", merge="gather"), "got merge='gather', degree=None, expected neither"),
        (lambda: seqpar.Tree(degree=0), r"Tree\(degree=\): got 0, expected a positive number of ranks"),
        (lambda: seqpar.Ulysses(seqpar.Tree()), r"Ulysses\(inner=\): got Tree"),
    ],
)
def test_refused_schedules(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_layout_of_replicated_queries_is_no_ring_s() -> None:
    def job(world: World) -> str:
        held = seqpar.plan(seqpar.Causal(), length=8, group=world, schedule="tree").layout
        again = seqpar.plan(seqpar.Causal(), length=8, group=world, schedule="tree", layout=held)
        assert again.layout == held
        with pytest.raises(ValueError, match="queries hold 16 positions, 8 of them distinct") as caught:
            seqpar.plan(seqpar.Causal(), length=8, group=world, layout=held)
        return str(caught.value)

    assert len(set(run_loopback(2, job))) == 1


def test_wire_dtypes() -> None:
    assert partials_wire(torch.bfloat16, "auto", wants_lse=False).dtypes == (torch.bfloat16, torch.float32)
    assert partials_wire(torch.float64, "auto", wants_lse=True).home == (torch.float64, torch.float64)
