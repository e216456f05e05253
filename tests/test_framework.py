"""Attention inside PyTorch's machinery: compilers, checkpoints, autocast, meshes, autograd's limits."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

import seqpar
from seqpar.comm import World, run_loopback
from support.cases import SCHEDULES
from support.jobs import beside_other_axes, checkpointed, compiled, on_mesh_axes
from support.ranks import run_gloo


def causal(length: int) -> seqpar.Plan:
    return seqpar.plan(seqpar.Causal(), length=length)


def test_a_compiled_model_keeps_its_graph_and_survives_new_plans() -> None:
    weight = torch.randn(32, 32)

    def model(x: Tensor, w: Tensor, plan: seqpar.Plan) -> Tensor:
        q = (x @ w).view(1, -1, 4, 8)
        return (seqpar.attention(q, q[:, :, :2], q[:, :, :2], plan).flatten(2) @ w).relu().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (13, 14, 15, 16, 17):
        plan = causal(length)
        x = torch.randn(1, length, 32)
        grads = []
        for function in (model, compiled):
            w = weight.clone().requires_grad_()
            grads.append(torch.autograd.grad(function(x, w, plan), w)[0])
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 2, "one graph for the first plan, one for all that follow"


def test_operators_keep_the_rules_of_torch_library() -> None:
    q, k, v = (torch.randn(1, 7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    plan = causal(7)
    for sinks in (None, torch.randn(4, requires_grad=True)):
        torch.library.opcheck(torch.ops.seqpar.attention.default, (q, k, v, sinks, plan.handle, 0.3, "auto", True))
    for schedule in ("ring", "ulysses"):
        plan = seqpar.plan(seqpar.Causal(), length=7, schedule=schedule)
        for wants_lse in (True, False):
            arguments = (q, k, v, None, plan.handle, 0.3, "auto", wants_lse)
            torch.library.opcheck(torch.ops.seqpar.attention.default, arguments)
    # What its fake promises to a compiler, whatever the strides and head dims of the inputs.
    q, k, v = (torch.randn(1, heads, 7, 8).transpose(1, 2) for heads in (4, 2, 2))
    for value in (v, v[..., :5]):
        torch.library.opcheck(torch.ops.seqpar.attention.default, (q, k, value, None, plan.handle, 0.3, "auto", True))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_checkpointed_layer(mode: str) -> None:
    """Plain checkpoints recompute attention, selective ones neither compute nor communicate twice."""
    plain = run_loopback(3, checkpointed, "none")
    for before, after in zip(plain, run_loopback(3, checkpointed, mode), strict=True):
        torch.testing.assert_close(after["grad"], before["grad"], rtol=1e-12, atol=0)
        assert before["forwards"] == 1
        kv, grads = before["traffic"]["kv"], before["traffic"]["grad"]
        assert kv.calls == 4, "2 hops forward, 2 hops backward"
        if mode == "selective":
            assert after["forwards"] == 1
            assert after["traffic"] == before["traffic"]
        else:
            assert after["forwards"] == 2
            assert after["traffic"]["kv"] == (6, kv.bytes * 3 // 2)
            assert after["traffic"]["grad"] == grads


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_selective_checkpoint_repeats_no_schedules_messages(schedule: str) -> None:
    plain, kept = (run_loopback(4, checkpointed, mode, SCHEDULES[schedule]) for mode in ("none", "selective"))
    for before, after in zip(plain, kept, strict=True):
        torch.testing.assert_close(after["grad"], before["grad"], rtol=1e-12, atol=0)
        assert after["forwards"] == 1
        assert after["traffic"] == before["traffic"]


@pytest.mark.parametrize("schedule", ["ring", "allgather", "ulysses", seqpar.Tree("sharded")], ids=str)
def test_every_schedule_compiles_to_one_graph(schedule: str) -> None:
    for worst, graphs in run_gloo(2, compiled, schedule):
        assert worst <= 1e-12
        assert graphs == 2, "one graph for the first plan, one for all that follow"


@pytest.mark.parametrize("schedule", ["ring", "allgather", "ulysses", seqpar.Tree("sharded")], ids=str)
def test_fsdp_and_tensor_parallel_on_other_axes(schedule: str) -> None:
    assert max(run_gloo(4, beside_other_axes, schedule)) <= 1e-10


@pytest.mark.parametrize("schedule", ["ring", "ulysses"])
def test_a_backward_keeps_q_k_v_out_and_lse_once(schedule: str) -> None:
    def job(world: World) -> float:
        plan = seqpar.plan(seqpar.Causal(), length=64, group=world, schedule=schedule)
        q, k, v = (torch.randn(1, 32, 4, 16, requires_grad=True) for _ in range(3))
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            seqpar.attention(q, k, v, plan)
        return sum(kept.values()) / q.nbytes

    for of_q in run_loopback(2, job):
        assert 4.0 < of_q < 4.2


def test_autocast_casts_as_sdpa_does() -> None:
    plan = causal(6)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(1, 6, 2, 8, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = seqpar.attention(x, x, x, plan)
            theirs = scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        assert torch.autograd.grad(ours.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_autocast_stays_outside(kernel: str) -> None:
    """It casts the inputs, not what is computed of them; nor a backward that happens to run under it."""
    plan = causal(6)
    x = torch.randn(1, 6, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    plain = seqpar.attention_with_lse(x, x, x, plan, kernel=kernel)
    (expected,) = torch.autograd.grad(plain.out.sum() + plain.lse.sum(), x, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = seqpar.attention_with_lse(x, x, x, plan, kernel=kernel)
        (grad,) = torch.autograd.grad(plain.out.sum() + plain.lse.sum(), x)
    assert torch.equal(out, plain.out)
    assert torch.equal(lse, plain.lse)
    assert torch.equal(grad, expected)


def test_a_copied_model_shares_its_plan() -> None:
    plan = causal(5)
    assert copy.deepcopy({"plan": plan})["plan"] is plan


def test_a_sink_of_minus_infinity_over_no_keys() -> None:
    plan = seqpar.plan(seqpar.Causal(), length=4, kv_length=2)
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8)
    sinks = torch.full((2,), -torch.inf, requires_grad=True)
    (grad,) = torch.autograd.grad(seqpar.attention(q, k, k, plan, sinks=sinks).sum(), sinks)
    assert torch.equal(grad, torch.zeros(2))


def test_one_axis_of_a_mesh_is_a_group_and_two_are_a_hybrids() -> None:
    for refused in run_gloo(4, on_mesh_axes):
        assert "3-D mesh ('dp', 'node', 'sp'), expected one or two axes; pass mesh[names]" in refused["cube"]
        assert "got a group of one axis, expected a 2-D DeviceMesh" in refused["axis"]


def test_autograd_keeps_the_plan_alive() -> None:
    x = torch.randn(1, 5, 2, 8, requires_grad=True)
    out = seqpar.attention(x, x, x, causal(5))
    gc.collect()
    out.sum().backward()
    assert x.grad is not None


def test_double_backward_raises() -> None:
    x = torch.randn(1, 5, 2, 8, requires_grad=True)
    plan = causal(5)
    (grad,) = torch.autograd.grad(seqpar.attention(x, x, x, plan).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward through seqpar\.attention_backward"):
        grad.sum().backward()


def test_any_strides() -> None:
    plan = causal(11)
    q, k, v = torch.randn(3, 2, 4, 11, 16, dtype=torch.float64).transpose(2, 3)  # [B, H, T, D] underneath
    packed = torch.randn(2, 11, 3, 4, 16, dtype=torch.float64)
    last = torch.randn(2, 11, 4, 16, 3, dtype=torch.float64)
    expanded = torch.randn(2, 11, 4, 1, dtype=torch.float64).expand(-1, -1, -1, 16)
    for tensors in ((q, k, v), packed.unbind(2), last.unbind(-1), [expanded] * 3):
        contiguous = [x.contiguous() for x in tensors]
        torch.testing.assert_close(seqpar.attention(*tensors, plan), seqpar.attention(*contiguous, plan))
