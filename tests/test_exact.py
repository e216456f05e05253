"""Attention over ranks equals dense attention in one: outputs and every gradient, for every mask, layout and world."""

from __future__ import annotations

import zlib
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import seqpar
from seqpar.comm import run_loopback
from support.cases import HEADS, LAYOUTS, LENGTH, MASKS, SCHEDULES, fits, scheduled, tensors
from support.jobs import attend
from support.oracle import dense_attention, error
from support.ranks import run_gloo

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HEAD_COUNTS = [(8, 8), (8, 2), (12, 2), (5, 5), (7, 1), (3, 3)]  # ranks do not divide them, or are more than they are
GRID = [
    pytest.param(mask, layout, world, id=f"{mask}-{layout}-P{world}")
    for mask in MASKS
    for layout in LAYOUTS
    for world in (1, 2, 3, 4)
    if fits(mask, layout)
]


@cache
def oracle(
    mask: str, heads: tuple[int, int], dtype: torch.dtype, value_dim: int = 16, sinks: bool = False, lse: bool = False
) -> dict[str, Tensor]:
    """out, lse and gradients in fp64, for inputs that were rounded to ``dtype``."""
    case = MASKS[mask]
    inputs = {name: x.double() for name, x in tensors(case, heads, dtype, value_dim=value_dim).items()}
    leaves = {name: inputs[name].requires_grad_() for name in ("q", "k", "v", "sinks")}
    out, whole_lse = dense_attention(
        *list(leaves.values())[:3], case.dense_of(*heads), leaves["sinks"] if sinks else None
    )
    objective = (out * inputs["dout"]).sum()
    if lse:
        seen = whole_lse.isfinite()
        objective = objective + (whole_lse[seen] * inputs["dlse"][seen]).sum()
    wanted = list(leaves)[: 4 if sinks else 3]
    grads = torch.autograd.grad(objective, [leaves[name] for name in wanted])
    return {"out": out.detach(), "lse": whole_lse.detach(), **dict(zip(wanted, grads, strict=True))}


@cache
def torch_bf16_errors(mask: str, heads: tuple[int, int]) -> dict[str, float]:
    """The errors of PyTorch's own bf16 attention on the same inputs."""
    case = MASKS[mask]
    inputs = tensors(case, heads, torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    out = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), attn_mask=case.dense_of(*heads), enable_gqa=True
    ).transpose(1, 2)
    empty = ~case.dense_of(*heads).any(-1).transpose(1, 2)  # where PyTorch gives NaN or an average of everything
    out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    grads = torch.autograd.grad(out, leaves, inputs["dout"])
    expected = oracle(mask, heads, torch.bfloat16)
    return {
        name: error(x, expected[name]) for name, x in zip(("out", "q", "k", "v"), (out.detach(), *grads), strict=True)
    }


def assert_exact(results: list[dict[str, Tensor]], expected: dict[str, Tensor], bound: dict[str, float]) -> None:
    """Every rank has every tensor right."""
    for rank, result in enumerate(results):
        errors = {name: error(result[name], expected[name]) for name in expected}
        wrong = {name: e for name, e in errors.items() if e > bound[name]}
        assert not wrong, f"rank {rank} of {len(results)}: relative errors {wrong}, allowed {bound}"


@pytest.mark.parametrize(("mask", "layout", "world"), GRID)
def test_every_mask_layout_and_world_in_fp32(mask: str, layout: str, world: int) -> None:
    """The ring; in fp64 it is in the grid, as every schedule is."""
    for heads in HEADS.values():
        inputs = tensors(MASKS[mask], heads, torch.float32)
        results = run_loopback(world, attend, mask, layout, inputs)
        expected = oracle(mask, heads, torch.float32)
        assert_exact(results, expected, dict.fromkeys(expected, TOLERANCE[torch.float32]))


@pytest.mark.parametrize(("schedule", "world"), scheduled(1, 2, 3, 4))
@pytest.mark.parametrize(("mask", "layout"), [(m, layout) for m in MASKS for layout in LAYOUTS if fits(m, layout)])
def test_the_grid(
    mask: str, layout: str, schedule: str, world: int, pytestconfig: pytest.Config, record_property: Any
) -> None:
    """Every mask in every layout and schedule with all head counts (``--full-grid``), or with one of them each."""
    counts = HEAD_COUNTS
    if not pytestconfig.getoption("--full-grid"):
        counts = [HEAD_COUNTS[zlib.crc32(f"{mask} {layout} {schedule} {world}".encode()) % len(HEAD_COUNTS)]]
    for heads in counts:
        inputs = tensors(MASKS[mask], heads, torch.float64, value_dim=12)
        job = partial(attend, schedule=SCHEDULES[schedule], sinks=True, lse=True)
        expected = oracle(mask, heads, torch.float64, value_dim=12, sinks=True, lse=True)
        assert_exact(run_loopback(world, job, mask, layout, inputs), expected, dict.fromkeys(expected, 1e-10))
    record_property("grid_cases", len(counts))


@pytest.mark.parametrize("heads", HEAD_COUNTS, ids=str)
@pytest.mark.parametrize(
    ("schedule", "world"),
    [*((SCHEDULES[name], world) for name, world in scheduled(3, 4)), (seqpar.Ulysses(degree=3), 6)],
    ids=str,
)
def test_every_head_count(schedule: Any, world: int, heads: tuple[int, int]) -> None:
    """Also without ``--full-grid``: heads dealt unevenly, whose KV heads are there more than once for kernels."""
    inputs = tensors(MASKS["causal"], heads, torch.float64, value_dim=12)
    job = partial(attend, schedule=schedule, sinks=True, lse=True)
    expected = oracle("causal", heads, torch.float64, value_dim=12, sinks=True, lse=True)
    assert_exact(run_loopback(world, job, "causal", "zigzag", inputs), expected, dict.fromkeys(expected, 1e-10))


@pytest.mark.parametrize(("mask", "layout", "world"), [case for case in GRID if case.values[2] in (2, 3)])
def test_bf16_within_pytorchs_own_error(mask: str, layout: str, world: int) -> None:
    for heads in HEADS.values():
        assert_as_exact_as_pytorch(mask, layout, world, heads, "ring")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS)
def test_bf16_of_every_schedule_within_pytorchs_own_error(mask: str, schedule: str) -> None:
    assert_as_exact_as_pytorch(mask, "zigzag", 4, HEADS["gqa"], SCHEDULES[schedule])


def assert_as_exact_as_pytorch(mask: str, layout: str, world: int, heads: tuple[int, int], schedule: Any) -> None:
    """At most twice the error of its output, and three times that of its gradients."""
    results = run_loopback(
        world, partial(attend, schedule=schedule), mask, layout, tensors(MASKS[mask], heads, torch.bfloat16)
    )
    own = torch_bf16_errors(mask, heads)
    bound = {name: (2.0 if name == "out" else 3.0) * own[name] for name in own}
    assert_exact(results, oracle(mask, heads, torch.bfloat16), bound | {"lse": 1e-2})


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize(("schedule", "world"), [*scheduled(3), ("double_ring", 4), ("hybrid", 4)])
@pytest.mark.parametrize("value_dim", [16, 8, 24])
@pytest.mark.parametrize("mask", ["causal", "batch_documents_window", "cross_causal"])
def test_sinks_lse_and_value_dim(mask: str, value_dim: int, schedule: str, world: int, kernel: str) -> None:
    inputs = tensors(MASKS[mask], HEADS["gqa"], torch.float64, value_dim=value_dim)
    job = partial(attend, schedule=SCHEDULES[schedule], kernel=kernel, sinks=True, lse=True)
    results = run_loopback(world, job, mask, "zigzag", inputs)
    expected = oracle(mask, HEADS["gqa"], torch.float64, value_dim, sinks=True, lse=True)
    assert_exact(results, expected, dict.fromkeys(expected, 1e-10))


@pytest.mark.parametrize(("schedule", "world"), scheduled(5, 6, 7, 8))
def test_larger_worlds(world: int, schedule: str) -> None:
    inputs = tensors(MASKS["documents"], HEADS["gqa"], torch.float64)
    job = partial(attend, schedule=SCHEDULES[schedule])
    for layout in ("document_zigzag", "explicit"):
        results = run_loopback(world, job, "documents", layout, inputs)
        expected = oracle("documents", HEADS["gqa"], torch.float64)
        assert_exact(results, expected, dict.fromkeys(expected, 1e-10))


@pytest.mark.parametrize("heads", [(12, 12), (12, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (192, 128), (256, 256), (64, 128)], ids=str)
def test_head_shapes_of_the_field(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    case = MASKS["causal"]
    inputs = tensors(case, heads, torch.float32, *dims, batch=1)
    leaves = [inputs[name].double().requires_grad_() for name in ("q", "k", "v")]
    out, lse = dense_attention(*leaves, case.dense())
    grads = torch.autograd.grad(out, leaves, inputs["dout"].double())
    expected = {"out": out.detach(), "lse": lse.detach(), **dict(zip("qkv", grads, strict=True))}
    results = run_loopback(2, lambda w: attend(w, "causal", "zigzag", inputs))
    assert_exact(results, expected, dict.fromkeys(expected, 1e-5))


@pytest.mark.parametrize("strict", [False, True], ids=["gloo", "strict"])
@pytest.mark.parametrize(
    ("mask", "layout", "schedule", "world"),
    [
        *(("causal", "zigzag", "forward", world) for world in (2, 3, 4)),
        *(("batch_documents_window", "explicit", "direct", world) for world in (2, 3, 4)),
        ("documents", "zigzag", "allgather", 3),
        ("documents", "striped", "ulysses", 3),
        ("window", "zigzag", "hybrid", 4),
        ("causal", "explicit", "double_ring", 4),
        ("s2_documents", "explicit", "direct", 3),
        ("s2", "zigzag", "hybrid", 4),
        ("streaming_heads", "zigzag", "direct", 2),
    ],
)
def test_processes_give_what_threads_give_bit_for_bit(
    mask: str, layout: str, schedule: str, world: int, strict: bool
) -> None:
    inputs = tensors(MASKS[mask], HEADS["gqa"], torch.float32)
    job = partial(attend, schedule=SCHEDULES[schedule])
    threads = run_loopback(world, job, mask, layout, inputs)
    processes = run_gloo(world, job, mask, layout, inputs, strict=strict)
    for one, other in zip(threads, processes, strict=True):
        for name in ("out", "lse", "q", "k", "v"):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["direct", "ulysses", "hybrid"])
def test_lse_in_the_loss_of_some_ranks_only(schedule: str) -> None:
    """What is sent must not depend on which outputs a rank differentiates."""
    inputs = tensors(MASKS["causal"], (4, 2), torch.float64)
    leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
    out, lse = dense_attention(*leaves, MASKS["causal"].dense())

    def job(world: seqpar.comm.World) -> tuple[list[Tensor], Tensor]:
        plan = seqpar.plan(seqpar.Causal(), length=LENGTH, group=world, schedule=SCHEDULES[schedule])
        whole = [inputs[name].clone().requires_grad_() for name in "qkv"]
        out, lse = seqpar.attention_with_lse(*(plan.shard(x) for x in whole), plan)
        loss = out.square().sum() + (lse.square().sum() if world.rank == 0 else 0.0)
        return list(torch.autograd.grad(loss, whole)), plan.queries.tensor

    results = run_loopback(4, job)
    objective = out.square().sum() + lse[:, :, results[0][1]].square().sum()
    expected = torch.autograd.grad(objective, leaves)
    for got, _ in results:
        assert all(error(x, y) <= 1e-10 for x, y in zip(got, expected, strict=True))


def test_the_same_bits_every_time() -> None:
    inputs = tensors(MASKS["causal"], HEADS["gqa"], torch.bfloat16)
    first, second = (run_loopback(4, lambda w: attend(w, "causal", "zigzag", inputs)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in ("out", "lse", "q", "k", "v"):
            assert torch.equal(one[name], other[name])


def test_gradients_on_a_bf16_wire_are_added_in_fp32() -> None:
    inputs = tensors(MASKS["causal"], HEADS["gqa"], torch.float32)
    expected = oracle("causal", HEADS["gqa"], torch.float32)
    exact, rounded = (
        run_loopback(4, lambda w, g=wire: attend(w, "causal", "zigzag", inputs, schedule=seqpar.Ring("forward", g)))[0]
        for wire in ("fp32", "bf16")
    )
    assert error(exact["k"], expected["k"]) < 1e-6 < error(rounded["k"], expected["k"]) < 6e-3
    assert torch.equal(exact["q"], rounded["q"])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradcheck_through_shard_attention_unshard(world: int) -> None:
    length = 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, 2, dtype=torch.float64, generator=generator) for heads in (2, 1, 1))

    def check(w: seqpar.comm.World) -> bool:
        plan = seqpar.plan(seqpar.Causal(), length=length, group=w)

        def function(*whole: Tensor) -> tuple[Tensor, Tensor]:
            local = (plan.shard(x) for x in whole)
            out, lse = seqpar.attention_with_lse(*local, plan, kernel="reference")
            return plan.unshard(out), plan.unshard(lse, dim=2)

        return torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in (q, k, v)])

    assert run_loopback(world, check) == [True] * world
