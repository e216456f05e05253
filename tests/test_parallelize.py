"""PyTorch models with their SDPA calls taken over: the same losses and gradients, however layers are recomputed."""

from __future__ import annotations

import copy
import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqpar.comm import World, run_loopback
from seqpar.integrations.options import AttentionOptions
from seqpar.integrations.torch import parallelize
from support.jobs_dropins import CHECKPOINTS, DOCUMENTS, Net, gradients, loss_alone, loss_shared, recompute, rows, train
from support.oracle import error
from support.ranks import run_gloo


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ten_steps_under_fsdp2_equal_the_unsharded_model_s(ranks: int) -> None:
    run_gloo(ranks, train)


def test_checkpoints_and_compilers_change_no_gradient() -> None:
    found = run_gloo(2, recompute)
    assert len(found[0]) == 6


def test_a_backward_finds_the_plan_of_its_own_batch() -> None:
    """Two batches of one length are under way, with other documents, when layers are recomputed."""
    batches = [(rows(), DOCUMENTS), (rows().flip(0), [[0, 30, 53], [0, 2, 11, 53]])]
    alone = Net()
    for tokens, documents in batches:
        loss_alone(alone, tokens, documents).backward()

    def both(world: World, model: nn.Module, order: list[int]) -> list[Tensor]:
        model = copy.deepcopy(model)
        handle = parallelize(model, world)
        losses = [loss_shared(model, handle, *batch) for batch in batches]
        for first in order[:-1]:
            losses[first].backward()
        return gradients(world, model, losses[order[-1]])

    for kind in CHECKPOINTS:
        for order in ([0, 1], [1, 0]):
            for grads in run_loopback(2, both, Net(checkpoint=kind), order):
                for got, expected in zip(grads, alone.parameters(), strict=True):
                    assert error(got, expected.grad) < 1e-5


def _copied(model: nn.Module) -> nn.Module:
    """As under mixed precision: what a layer gets was copied before, and again when it is recomputed."""
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: tuple(x.clone() for x in inputs))
    return model


def test_copied_inputs_are_recomputed_where_one_batch_is_under_way_and_refused_where_more_are() -> None:
    alone = Net()
    loss_alone(alone, rows(), DOCUMENTS).backward()

    def run(world: World, model: nn.Module) -> tuple[list[Tensor], str]:
        model = _copied(copy.deepcopy(model))
        handle = parallelize(model, world)
        for _ in range(2):
            model.zero_grad()
            grads = gradients(world, model, loss_shared(model, handle, rows(), DOCUMENTS))
        first = loss_shared(model, handle, rows(), DOCUMENTS)
        second = loss_shared(model, handle, rows(), [[0, 53]] * 2)
        with pytest.raises(ValueError, match="one of several batches") as refused:
            (first + second).backward()
        return grads, str(refused.value)

    for grads, _ in run_loopback(2, run, Net(checkpoint="reentrant")):
        for got, expected in zip(grads, alone.parameters(), strict=True):
            assert error(got, expected.grad) < 1e-5


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_next_batch_may_come_before_the_backward_of_one_whose_inputs_were_copied(kind: str) -> None:
    alone = Net()
    loss_alone(alone, rows(), DOCUMENTS).backward()
    model = Net(checkpoint=kind)
    handle = parallelize(model, None)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = loss_shared(model, handle, rows(), DOCUMENTS)
    gc.collect()
    handle.shard(rows(), cu_seqlens=[[0, 53]] * 2)
    loss.backward()
    for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert error(got.grad, expected.grad) < 1e-5


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_of_a_function_inside_a_module_is_refused(kind: str) -> None:
    model = Net(inside=kind)
    handle = parallelize(model, None)
    with pytest.raises(ValueError, match="a call inside a checkpoint"):
        loss_shared(model, handle, rows(), DOCUMENTS)


S2 = {"mask": "s2", "s2_block": 16, "s2_local": 1, "s2_stride": 2}
STRIPES = torch.tensor([0, 0, 1, 1]).view(4, 1, 1)  # of each query head


@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({"mask": "full", "schedule": "allgather"}, lambda i, j: j >= 0 * i),
        ({"mask": "window", "window": 5, "schedule": "ulysses"}, lambda i, j: (j <= i) & (i - j < 5)),
        ({"mask": "chunked", "chunk": 7, "kernel": "reference"}, lambda i, j: (j <= i) & (i // 7 == j // 7)),
        (S2, lambda i, j: (j <= i) & ((i // 16 == j // 16) | (j // 16 % 2 == STRIPES))),
    ],
    ids=["full", "window", "chunked", "s2"],
)
def test_the_options_say_who_attends_to_whom(options: dict[str, Any], sees: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Attend(nn.Module):
        def forward(self, x: Tensor, **mask: Any) -> Tensor:
            q, k, v = x.view(*x.shape[:2], 8, 8).transpose(1, 2).split([4, 2, 2], dim=1)
            return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True, **mask)

    x = torch.randn(2, 85, 64, dtype=torch.float64)
    i, j = torch.arange(85)[:, None], torch.arange(85)
    expected = Attend()(x, attn_mask=sees(i, j).expand(4, 85, 85))

    def run(world: World) -> Tensor:
        model = Attend()
        handle = parallelize(model, world, AttentionOptions(**options), layout="striped", heads=(4, 2))
        handle.shard(torch.zeros(2, 85, dtype=torch.int64))
        assert handle.plan.layout.name == "striped"
        return handle.plan.unshard(model(handle.plan.shard(x), is_causal=options["mask"] != "full"), dim=2)

    for whole in run_loopback(3, run):
        assert error(whole, expected) < 1e-10


def test_labels_and_tokens_of_every_rank_and_a_mean_over_all_of_them() -> None:
    tokens, labels = rows(), rows().masked_fill(rows() < 10, -100)

    def run(world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        handle = parallelize(Net(), world)
        batch = handle.shard(tokens, labels=labels, cu_seqlens=torch.tensor([0, 20, 53]))
        unshard = handle.plan.unshard
        mean = handle.loss(batch.labels.clamp(min=0).sum().double(), (batch.labels != -100).sum())
        return unshard(batch.tokens), unshard(batch.position_ids), unshard(batch.labels), mean

    following = torch.cat([labels[:, 1:], labels.new_full((2, 1), -100)], 1)
    following[:, 19] = -100
    for got_tokens, positions, got_labels, mean in run_loopback(3, run):
        assert torch.equal(got_tokens, tokens)
        assert positions.tolist() == [[*range(20), *range(33)]]
        assert torch.equal(got_labels, following)
        assert mean == following[following != -100].double().mean()


def test_a_copy_shares_the_batches_and_a_removal_gives_the_model_its_own_attention_back() -> None:
    model, positions = Net(), torch.arange(53)[None]
    own = model(rows(), positions)
    handle = parallelize(model, None)
    batch = handle.shard(rows(), cu_seqlens=[0, 20, 53])
    packed = model(*batch[:2]).detach()
    assert error(packed, own.detach()) > 1e-2
    assert torch.equal(copy.deepcopy(model)(*batch[:2]), packed)
    handle.remove()
    assert torch.equal(model(rows(), positions), own)
    parallelize(model, None)


@pytest.mark.parametrize("kind", [None, *CHECKPOINTS])
def test_nothing_of_a_batch_outlives_its_backward(kind: str | None) -> None:
    model = Net(checkpoint=kind)
    handle = parallelize(model, None)
    plans = []
    for _ in range(3):
        loss_shared(model, handle, rows(), DOCUMENTS).backward()
        plans.append(weakref.ref(handle.plan))
    assert [plan() is None for plan in plans] == [True, True, False]


class Calls(nn.Module):
    """Calls a function on [B, H, T, D] queries, keys and values in a module of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """x [B, H, T, D]."""
        return self.function(x, x, x)


SDPA = partial(F.scaled_dot_product_attention, is_causal=True)
ROW = torch.arange(12).view(1, 12)
LOCAL = torch.randn(1, 4, 6, 8)


def _multi_head(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = torch.ones(24, 8), None, None, None, False, 0.0, torch.ones(8, 8), None
    return F.multi_head_attention_forward(q[0], k[0], v[0], 8, 2, *weights)


@pytest.mark.parametrize(
    ("function", "mask", "expected"),
    [
        (partial(SDPA, attn_mask=torch.ones(6, 6)), "causal", "got attn_mask a mask, expected none"),
        (partial(SDPA, dropout_p=0.1), "causal", "got dropout_p 0.1, expected 0"),
        (F.scaled_dot_product_attention, "causal", "got is_causal False, expected True for mask 'causal'"),
        (SDPA, "full", "got is_causal True, expected False for mask 'full'"),
        (
            lambda q, k, v: SDPA(q, k[:, :, 1:], v),
            "causal",
            "got key shape (1, 4, 5, 8), expected [B, heads, 6, head_d",
        ),
        (lambda q, k, v: SDPA(q[0], k, v), "causal", "got query shape (4, 6, 8), expected [B, heads, 6, head_dim]"),
        (lambda q, k, v: SDPA(q, k[:, :2], v), "causal", "4 and 2 heads, expected as many, or enable_gqa=True"),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, "causal", "forward never called F.scaled_dot_product_attention"),
        (_multi_head, "causal", "called multi_head_attention_forward, which would see this rank's tokens alone"),
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, "causal", "for_cpu, which would see this rank's"),
    ],
    ids=["mask", "dropout", "not causal", "not full", "keys", "dims", "heads", "none", "MHA", "operator"],
)
def test_attention_that_would_be_another_s_is_refused_on_every_rank(
    function: Callable[..., Any], mask: Any, expected: str
) -> None:
    def run(world: World) -> None:
        model = nn.Sequential(Calls(function))
        parallelize(model, world, AttentionOptions(mask=mask)).shard(ROW)
        with pytest.raises(ValueError, match=re.escape(expected)):
            model(LOCAL)

    run_loopback(2, run, timeout=10)


def test_other_attention_inside_a_compiled_graph_is_refused() -> None:
    other = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    model = Calls(lambda q, k, v: other(SDPA(q, k, v).sin(), k, v)[0])
    parallelize(model, None).shard(ROW[:, :6])
    with pytest.raises(ValueError, match="which would see this rank's tokens alone"):
        torch.compile(model, backend="eager")(LOCAL)


def test_the_options_kernel_computes() -> None:
    model = Calls(SDPA)
    parallelize(model, None, AttentionOptions(kernel="library")).shard(ROW[:, :6])
    with pytest.raises(ValueError, match="library"):
        model(LOCAL)


def test_one_rank_s_wrong_call_is_every_rank_s_error() -> None:
    def run(world: World) -> None:
        model = Calls(lambda q, k, v: SDPA(q, k, v, dropout_p=0.1 * world.rank))
        parallelize(model, world).shard(ROW)
        with pytest.raises(ValueError, match=r"rank 1: scaled_dot_product_attention: got dropout_p 0.1"):
            model(LOCAL)

    run_loopback(2, run, timeout=10)


def test_a_forward_without_a_batch_is_refused() -> None:
    model = Calls(SDPA)
    handle = parallelize(model, None)
    for use in (lambda: model(LOCAL), lambda: handle.plan):
        with pytest.raises(ValueError, match=r"no batch yet, expected one: call handle.shard"):
            use()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param({"tokens": ROW + 1}, "handle.shard: ranks disagree on tokens", id="tokens"),
        pytest.param({"labels": ROW + 1}, "handle.shard: ranks disagree on labels", id="labels"),
        pytest.param({"tokens": ROW[0]}, "tokens: got torch.int64 (12,), expected whole rows", id="dims"),
        pytest.param({"tokens": ROW.float()}, "tokens: got torch.float32 (1, 12), expected whole rows", id="dtype"),
        pytest.param({"labels": ROW[:, 1:]}, "labels: got torch.int64 (1, 11), expected whole rows", id="shape"),
        pytest.param({"cu_seqlens": [[0, 12]] * 2}, "cu_seqlens: got bounds of 2 rows, expected 1", id="rows"),
        pytest.param({"cu_seqlens": [0, 6]}, "ends at 6, expected 12", id="bounds"),
        pytest.param({"cu_seqlens": [0, 9, 6, 12]}, "goes from 9 to 6", id="falling"),
        pytest.param({"cu_seqlens": [0, 6, 12]}, "ranks disagree on mask", id="documents"),
    ],
)
def test_one_rank_s_wrong_batch_is_every_rank_s_error(arguments: dict[str, Any], expected: str) -> None:
    def run(world: World) -> None:
        handle = parallelize(Calls(SDPA), world)
        with pytest.raises(ValueError, match=re.escape(expected)):
            handle.shard(**({"tokens": ROW} | (arguments if world.rank else {})))

    run_loopback(2, run, timeout=10)


def _twice() -> None:
    model = Calls(SDPA)
    parallelize(model, None)
    parallelize(nn.Sequential(model), None)


def _parallelized(model: nn.Module, axes: Any = None, **options: Any) -> Any:
    return parallelize(model, None, AttentionOptions(**options), axes=axes)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_twice, "parallelized already; call remove()"),
        (lambda: _parallelized(nn.TransformerEncoderLayer(8, 2)), "got a MultiheadAttention, expected modules"),
        (lambda: _parallelized(Net(), mask="s2", s2_dense_layers=(0,)), "s2_dense_layers: got (0,), expected none"),
        (lambda: _parallelized(Net(), axes="sp"), "axes: got 'sp' with NoneType, expected a mesh that has them"),
        (lambda: _parallelized(Net(), schedule="auto").shard(ROW), "dtype=None, expected all three; give them"),
    ],
    ids=["twice", "MHA", "dense layers", "axes", "auto"],
)
def test_models_and_options_that_cannot_be_had_are_refused(make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        make()


def test_the_example_trains_on_two_ranks(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "fsdp2.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    command += ["--nproc-per-node", "2", str(example), "--length", "192", "--steps", "4", "--layers", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
