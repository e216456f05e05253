"""Plans as a training script uses them: tokens, positions and labels dealt to ranks, losses put together again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import seqpar
from seqpar import Causal, Documents, Full, Ring, SlidingWindow, registry
from seqpar.comm import World, run_loopback
from support.cases import MASKS, layout_of

WORLDS = pytest.mark.parametrize("world", [1, 2, 3, 4])
DOCUMENTS = [0, 4, 5, 13]
BATCH_DOCUMENTS = [[0, 4, 5, 13], [0, 12, 13]]
LAYOUTS = {
    "contiguous": lambda world: "contiguous",
    "zigzag": lambda world: "zigzag",
    "striped": lambda world: "striped",
    "document_zigzag": lambda world: "document_zigzag",
    "last_has_none": lambda world: (
        [list(range(r, 13, world - 1)) for r in range(world - 1)] + [[]] if world > 1 else [range(13)]
    ),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("layout", "world"), [(x, world) for x in LAYOUTS for world in (1, 2, 3, 4) if x != "last_has_none" or world > 1]
)
def test_shard_and_unshard_are_each_others_inverse_and_gradient(layout: str, world: int) -> None:
    whole, weight = normal(2, 13, 3), normal(2, 13, 3, seed=1)

    def check(w: World, dim: int) -> None:
        plan = seqpar.plan(Causal() & Documents(DOCUMENTS), length=13, group=w, layout=LAYOUTS[layout](world))
        mine = plan.layout.queries[w.rank].tensor
        x, g = (t.movedim(1, dim) for t in (whole, weight))
        x = x.clone().requires_grad_()
        local = plan.shard(x, dim)
        assert torch.equal(local, x.index_select(dim, mine))
        # A loss of all ranks' tokens: every rank comes to know the whole gradient.
        (grad,) = torch.autograd.grad((local * g.index_select(dim, mine)).sum(), x)
        assert torch.equal(grad, g)

        local = local.detach().requires_grad_()
        again = plan.unshard(local, dim)
        assert torch.equal(again, x)
        (grad,) = torch.autograd.grad((again * g).sum(), local)
        assert torch.equal(grad, g.index_select(dim, mine))

    for dim in (0, 1, 2, -1):
        run_loopback(world, check, dim)


@WORLDS
def test_keys_are_sharded_by_their_own_positions(world: int) -> None:
    whole = normal(1, 17, 2)

    def check(w: World) -> None:
        plan = seqpar.plan(Full(), length=9, kv_length=17, group=w, layout="striped")
        local = plan.shard(whole, of="keys")
        assert torch.equal(local, whole[:, w.rank :: world])
        assert torch.equal(plan.unshard(local, of="keys"), whole)

    run_loopback(world, check)


@WORLDS
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16], ids=str)
def test_any_dtype_is_sharded(dtype: torch.dtype, world: int) -> None:
    whole = torch.arange(26).view(2, 13).to(dtype)

    def check(w: World) -> None:
        plan = seqpar.plan(Causal(), length=13, group=w)
        assert torch.equal(plan.unshard(plan.shard(whole)), whole)

    run_loopback(world, check)


@WORLDS
@pytest.mark.parametrize("documents", [None, DOCUMENTS, BATCH_DOCUMENTS], ids=["one", "packed", "rows"])
def test_positions_and_labels_keep_to_their_documents(documents: list | None, world: int) -> None:
    """The whole rows, position by position, from their definition."""
    length, batch = 13, 2
    tokens = torch.arange(batch * length).view(batch, length)
    tokens[0, 7] = tokens[1, 0] = tokens[1, 2] = -100
    rows = [[0, length]] if documents is None else documents if isinstance(documents[0], list) else [documents]
    positions = torch.tensor([[i - max(b for b in row if b <= i) for i in range(length)] for row in rows])
    labels = torch.full_like(tokens, -100)
    for b in range(batch):
        row = rows[b % len(rows)]
        for i in range(length - 1):
            if i + 1 not in row:
                labels[b, i] = tokens[b, i + 1]

    def check(w: World) -> None:
        mask = Causal() if documents is None else Causal() & Documents(documents)
        plan = seqpar.plan(mask, length=length, group=w)
        mine = plan.layout.queries[w.rank].tensor
        assert torch.equal(plan.position_ids, positions[:, mine])
        assert torch.equal(plan.shift_labels(tokens), labels[:, mine])
        assert torch.equal(plan.unshard(plan.shift_labels(tokens)), labels)

    run_loopback(world, check)


@pytest.mark.parametrize("counts", [[3, 1, 4, 2], [3, 0, 4, 2], [5, 0, 0, 0]], ids=str)
@WORLDS
def test_token_mean_is_the_mean_over_all_ranks_tokens(counts: list[int], world: int) -> None:
    counts = counts[:world]
    losses = [normal(n, seed=n) for n in counts]

    def average_gradient(w: World) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        count = len(losses[w.rank]) if w.rank % 2 else torch.tensor(len(losses[w.rank]))
        loss = seqpar.token_mean((scale * losses[w.rank]).sum(), count, w)
        (grad,) = torch.autograd.grad(3 * loss, scale)
        return loss.detach(), w.all_reduce(grad, "test") / world  # as DDP and FSDP do

    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    expected = (scale * torch.cat(losses)).mean()
    (expected_grad,) = torch.autograd.grad(3 * expected, scale)
    for loss, grad in run_loopback(world, average_gradient):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, expected_grad)


@WORLDS
def test_token_mean_of_no_tokens_is_zero(world: int) -> None:
    def check(w: World) -> None:
        logits = torch.zeros(0, requires_grad=True)
        loss = seqpar.token_mean(logits.sum(), 0, w)
        loss.backward()
        assert loss == 0
        assert loss.dtype == torch.float32

    run_loopback(world, check)


def test_token_mean_counts_beyond_fp32() -> None:
    """16,777,217 is the first integer that fp32 lacks; in bf16 sums stop growing at 256."""
    many = 2**24 + 1
    loss = seqpar.token_mean(torch.tensor(float(2**25)), many, None)
    assert loss == torch.tensor(2**25 / many)
    (first, _) = run_loopback(2, lambda w: seqpar.token_mean(torch.tensor(256.0, dtype=torch.bfloat16), 1 + w.rank, w))
    assert first == torch.tensor(512 / 3, dtype=torch.bfloat16)


@WORLDS
@pytest.mark.parametrize("mask", ["causal", "batch_documents_window", "cross_documents"])
def test_another_plan_leaves_tokens_where_they_are(mask: str, world: int) -> None:
    """A layer with a window, say, in a model whose tokens are dealt for its global layers."""
    case = MASKS[mask]

    def check(w: World) -> None:
        sizes = {"length": case.length, "kv_length": case.kv_length, "group": w}
        one = seqpar.plan(case.mask, layout=layout_of(case, "explicit", world), **sizes)
        other = seqpar.plan(Full(), layout=one.layout, **sizes)
        assert other.layout == one.layout
        assert torch.equal(other.position_ids[0], other.layout.queries[w.rank].tensor)

    run_loopback(world, check)


def test_ranks_without_tokens_take_part() -> None:
    layout = [[], [2, 3, 4], [0, 1]]
    q = normal(1, 5, 2, 4)
    alone = seqpar.plan(Causal(), length=5)
    expected = seqpar.attention(q, q, q, alone)

    def check(w: World) -> None:
        for exchange in ("forward", "direct"):
            plan = seqpar.plan(Causal(), length=5, group=w, layout=layout, schedule=Ring(exchange))
            local = plan.shard(q).requires_grad_()
            assert local.shape[1] == len(layout[w.rank])
            out = seqpar.attention(local, local, local, plan)
            torch.testing.assert_close(plan.unshard(out), expected)
            out.sum().backward()
            assert local.grad.shape == local.shape

    run_loopback(3, check)


def test_explain_states_the_facts() -> None:
    def explain(w: World) -> str:
        return seqpar.plan(
            SlidingWindow(99),
            length=4_000,
            group=w,
            layout="contiguous",
            heads=(8, 2),
            head_dim=(64, 32),
            dtype=torch.bfloat16,
        ).explain()

    text = run_loopback(4, explain)[1]
    halo = 99 * 2 * (64 + 32)  # elements of 99 rows; K and V travel in bf16, their gradients in fp32
    for fact in (
        "SlidingWindow(left=99, right=0)",
        "4,000 tokens",
        "contiguous on 4 rank(s)",
        "this is rank 1",
        f"{4_000 * 100 - 99 * 100 // 2:,} query-key pairs in all",
        "direct exchange, chosen",
        "moves 3,000 rows passing shards on, 99 sending them directly",
        f"forward: {2 * halo:,} by this rank in 1 messages, {2 * halo:,} by the busiest, {3 * 2 * halo:,} in all",
        f"backward: {6 * halo:,} by this rank in 2 messages, {6 * halo:,} by the busiest, {3 * 6 * halo:,} in all",
    ):
        assert fact in text, text
    steps = [line.split() for line in text.splitlines()[-4:]]
    outside = 99 * 100 // 2  # pairs of the first 99 queries with keys of the rank before
    expected = [(0, 1, 1_000, 100_000 - outside), (1, 0, 99, outside), (2, 3, 0, 0), (3, 2, 0, 0)]
    assert steps == [[f"{x:,}" for x in row] for row in expected], text


def test_explain_says_what_it_was_not_told() -> None:
    def explain(w: World) -> str:
        return seqpar.plan(Full(), length=8, kv_length=12, group=w, schedule=Ring("forward")).explain()

    text = run_loopback(3, explain)[2]
    for fact in (
        "8 tokens x 12 keys",
        "this is rank 2",
        "forward exchange, asked for",
        "give the plan heads, head_dim and dtype",
    ):
        assert fact in text, text
    assert "nothing travels" in seqpar.plan(Causal(), length=8).explain()


def test_a_plan_that_is_gone_is_missed_clearly() -> None:
    q = normal(1, 4, 2, 4)
    plan = seqpar.plan(Causal(), length=4)
    handle = plan.handle
    assert registry.find(handle) is plan
    torch.ops.seqpar.attention(q, q, q, None, handle, 0.5, "auto", True)
    del plan
    with pytest.raises(ValueError, match="the plan of this attention call is gone, expected it alive; keep a ref"):
        torch.ops.seqpar.attention(q, q, q, None, handle, 0.5, "auto", True)


def test_the_graph_keeps_the_plan_until_backward() -> None:
    q = normal(1, 4, 2, 4).requires_grad_()
    plan = seqpar.plan(Causal(), length=4)
    handle = plan.handle
    out = seqpar.attention(q, q, q, plan)
    del plan
    out.sum().backward()
    assert q.grad.isfinite().all()
    del out
    with pytest.raises(ValueError, match="is gone"):
        registry.find(handle)


MOVED = [torch.arange(0, 4000, 2), torch.arange(1, 4000, 2)]
SWAPPED = [x.clone() for x in MOVED]
SWAPPED[0][500], SWAPPED[1][500] = 1001, 1000


@pytest.mark.parametrize(
    ("field", "mine", "theirs"),
    [
        ("length", {}, {"length": 4001}),
        ("kv_length", {}, {"kv_length": 4001}),
        ("mask", {}, {"mask": SlidingWindow(3)}),
        ("mask", {"mask": Documents([0, 9, 4000])}, {"mask": Documents([0, 8, 4000])}),
        ("layout", {}, {"layout": "striped"}),
        pytest.param("layout", {"layout": MOVED}, {"layout": SWAPPED}, id="positions"),
        ("schedule", {}, {"schedule": Ring(grad_wire="bf16")}),
        ("heads", {"heads": (4, 2)}, {"heads": 4}),
        ("head_dim", {}, {"head_dim": 64}),
        ("dtype", {"dtype": torch.bfloat16}, {"dtype": torch.float16}),
    ],
)
def test_ranks_that_disagree(field: str, mine: dict, theirs: dict) -> None:
    def refused(w: World) -> str:
        arguments = {"mask": Causal(), "length": 4000, **(theirs if w.rank else mine)}
        with pytest.raises(
            ValueError, match=f"seqpar.plan: ranks disagree on {field}: got .* on rank 0, .* on rank 1"
        ) as raised:
            seqpar.plan(arguments.pop("mask"), group=w, **arguments)
        return str(raised.value)

    first, second = run_loopback(2, refused, timeout=10)
    assert first == second


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask": "causal"}, "mask: got 'causal', expected a mask such as seqpar.Causal()"),
        ({"length": 0}, "length: got 0, expected a positive number of tokens"),
        ({"length": 8.0}, "length: got 8.0"),
        ({"kv_length": -1}, "kv_length: got -1"),
        ({"length": 1}, "length: got 1 tokens for 2 ranks, expected at least one each"),
        ({"mask": Documents([0, 7])}, "ends at 7, expected 8, the plan's number of tokens"),
        ({"layout": "diagonal"}, "layout: got 'diagonal'"),
        ({"layout": [[0, 1], [2, 3]]}, "layout: queries hold 4 positions"),
        (
            {"schedule": "bus"},
            "schedule: got 'bus', expected one of ring, allgather, ulysses, tree, auto, double_ring, hybrid, or",
        ),
        ({"heads": (6, 4)}, r"heads: got \(6, 4\), expected query heads to be a multiple of KV heads"),
        ({"head_dim": 0}, "head_dim: got 0, expected a positive integer"),
        ({"dtype": torch.int8}, "dtype: got torch.int8, expected one of float64, float32"),
    ],
)
def test_arguments_wrong_on_one_rank_are_refused_on_all(wrong: dict, message: str) -> None:
    def refused(w: World) -> str:
        arguments = {"mask": Causal(), "length": 8, **(wrong if w.rank else {})}
        with pytest.raises(ValueError, match=message) as raised:
            seqpar.plan(arguments.pop("mask"), group=w, **arguments)
        return str(raised.value)

    first, second = run_loopback(2, refused, timeout=10)
    assert first == second
    assert first.startswith("rank 1: ")


def test_ring_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Ring\(exchange=\): got 'ring', expected one of auto, forward, direct"):
        Ring("ring")
    with pytest.raises(ValueError, match=r"Ring\(grad_wire=\): got 'fp16', expected one of fp32, bf16"):
        Ring(grad_wire="fp16")


def test_tensors_of_another_length_are_refused() -> None:
    plan = seqpar.plan(Causal(), length=8, kv_length=9)
    x = torch.zeros(1, 7)
    with pytest.raises(ValueError, match=r"shard: got shape \(1, 7\), expected 8 queries along dim 1, all of them"):
        plan.shard(x)
    with pytest.raises(ValueError, match=r"shard: got shape \(1, 7\), expected 9 keys along dim 1"):
        plan.shard(x, of="keys")
    with pytest.raises(
        ValueError, match=r"unshard: got shape \(1, 7\), expected 8 queries along dim 1, rank 0's share; give what"
    ):
        plan.unshard(x)
    with pytest.raises(ValueError, match="shard: got shape"):
        plan.shard(x, dim=2)
    with pytest.raises(ValueError, match="of: got 'values', expected 'queries' or 'keys'"):
        plan.shard(x, of="values")
    with pytest.raises(ValueError, match=r"tokens: got shape \(1, 7\), expected \[batch, 8\]; give whole rows"):
        plan.shift_labels(x)
    rows = seqpar.plan(Documents([[0, 3, 8], [0, 8]]), length=8)
    for batch in (1, 3):
        with pytest.raises(ValueError, match="tokens: got"):
            rows.shift_labels(torch.zeros(batch, 8, dtype=torch.int64))
