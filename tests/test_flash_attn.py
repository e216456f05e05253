"""The functions named as in ring-flash-attn: exact on whole tensors in every layout and form, and nothing dropped."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar.comm import World, run_loopback
from seqpar.integrations import flash_attn
from support.jobs_dropins import Call, drop_in, drop_in_by_default
from support.oracle import dense_attention, dense_mask, error
from support.ranks import run_gloo


def _calls(ranks: int) -> dict[str, Call]:
    """Of every family and form, with lengths that its layout allows, odd where it does."""
    odd, even = 7 * ranks, 6 * ranks
    shares = tuple(ranks * x for x in (0, 3, 4, 9))
    pairs = tuple(ranks * x for x in (0, 2, 6, 8))
    anywhere = tuple(sorted({0, 2, min(9, odd - 1), 7 * (ranks - 1), odd}))
    varlen = {"length": shares[-1], "cu": shares}
    zigzag = {"length": pairs[-1], "cu": pairs}
    llama = {"name": "llama3_flash_attn_varlen", "length": odd, "cu": anywhere}
    return {
        "ring causal": Call(name="ring_flash_attn", length=odd),
        "ring full": Call(name="ring_flash_attn", length=odd, causal=False, scale=0.7),
        "ring window": Call(name="ring_flash_attn", length=odd, window=(3, 5), form="kvpacked_func"),
        "zigzag causal": Call(name="zigzag_ring_flash_attn", length=even, heads=(4, 4), form="qkvpacked_func"),
        "zigzag two-sided": Call(name="zigzag_ring_flash_attn", length=even, causal=False, window=(2, 1)),
        "zigzag right alone": Call(name="zigzag_ring_flash_attn", length=even, causal=False, window=(-1, 2)),
        "zigzag left alone": Call(name="zigzag_ring_flash_attn", length=even, causal=False, window=(4, -1)),
        "stripe causal": Call(name="stripe_flash_attn", length=odd, form="kvpacked_func"),
        "stripe by window": Call(name="stripe_flash_attn", length=odd, causal=False, window=(-1, 0)),
        "ring varlen": Call(name="ring_flash_attn_varlen", **varlen),
        "ring varlen full": Call(name="ring_flash_attn_varlen", **varlen, causal=False, form="kvpacked_func"),
        "zigzag varlen": Call(name="zigzag_ring_flash_attn_varlen", **zigzag, scale=0.7),
        "zigzag varlen packed": Call(
            name="zigzag_ring_flash_attn_varlen", **zigzag, window=(2, 0), heads=(2, 2), form="qkvpacked_func"
        ),
        "llama3": Call(**llama),
        "llama3 full": Call(**llama, causal=False, form="kvpacked_func"),
        "llama3 window": Call(**llama, window=(3, 0), heads=(2, 2), form="qkvpacked_func"),
    }


def _sees(call: Call, query: int, key: int, *_: int) -> bool:
    left, right = call.window[0], 0 if call.causal else call.window[1]
    return (left < 0 or query - key <= left) and (right < 0 or key - query <= right)


def _check(call: Call, ranks: list[dict[str, Tensor]]) -> None:
    """Against dense attention over the whole tensors."""
    whole = call.inputs()
    leaves = [whole[name].requires_grad_() for name in "qkv"]
    mask = dense_mask(partial(_sees, call), call.bounds, call.bounds)
    out, lse = dense_attention(*leaves, mask.unsqueeze(0), scale=call.scale)
    objective = (out * whole["dout"]).sum() + (lse.transpose(1, 2) * whole["dlse"]).sum()
    grads = torch.autograd.grad(objective, leaves)
    expected = {"out": out.detach(), "lse": lse.detach().transpose(1, 2), **dict(zip("qkv", grads, strict=True))}
    assert sorted(torch.cat([rank["held"] for rank in ranks]).tolist()) == list(range(call.length))
    for name, value in expected.items():
        got = torch.full_like(value, torch.nan)
        for rank in ranks:
            got[:, rank["held"]] = rank[name]
        assert error(got, value) < 1e-10, name


@pytest.mark.parametrize("kind", _calls(1))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_function_is_exact_on_whole_tensors(ranks: int, kind: str) -> None:
    call = _calls(ranks)[kind]
    _check(call, run_loopback(ranks, drop_in, call))


def test_no_group_means_the_default_group() -> None:
    calls = [_calls(2)[kind] for kind in ("zigzag causal", "ring varlen", "llama3")]
    for call, ranks in zip(calls, zip(*run_gloo(2, drop_in_by_default, calls), strict=True), strict=True):
        _check(call, list(ranks))


def test_no_group_without_any_is_one_rank() -> None:
    x = torch.randn(1, 5, 2, 8)
    alone = flash_attn.zigzag_ring_flash_attn_func(x, x, x, causal=True)
    (expected,) = run_loopback(1, lambda world: flash_attn.ring_flash_attn_func(x, x, x, causal=True, group=world))
    assert torch.equal(alone, expected)
    assert not torch.equal(alone, flash_attn.ring_flash_attn_func(x, x, x))


ROWS = torch.randn(2, 6, 2, 8)
PACKED = ROWS[0]
BOUNDS, ODD = torch.tensor([[0, 2, 6], [0, 3, 6]], dtype=torch.int32)
KV = torch.stack([PACKED, PACKED], 1)
# What rank 1 of 2 is told with llama3's functions, for documents of 4 and 8 tokens.
SLICED = [BOUNDS.new_tensor([0, 6]), BOUNDS.new_tensor([0, 8]), 6, 8, 1, slice(4, 12)]
FIRST = [BOUNDS.new_tensor([0, 4, 6]), BOUNDS.new_tensor([0, 4, 6]), 4, 4, 1, slice(0, 6)]


RING, ZIGZAG, LLAMA3 = "ring_flash_attn", "zigzag_ring_flash_attn", "llama3_flash_attn_varlen_func"
THREE, PACKED_THREE = [ROWS] * 3, [PACKED] * 3
# Function, its arguments, what rank 0 alone gets (options, or one token less), and what all ranks are told.
REFUSED: dict[str, tuple[str, list[Any], Any, str]] = {
    "dropout": (f"{RING}_func", THREE, {"dropout_p": 0.1}, "dropout_p: got 0.1"),
    "softcap": ("stripe_flash_attn_func", THREE, {"softcap": 30.0}, "softcap: got 30.0"),
    "alibi": (f"{ZIGZAG}_func", THREE, {"alibi_slopes": torch.ones(2)}, "alibi_slopes: got some, expected None"),
    "window": (f"{RING}_func", THREE, {"window_size": 4}, "window_size: got 4, expected (left, right)"),
    "left": (f"{RING}_func", THREE, {"window_size": (-2, 0)}, "got -2, expected an integer >= -1"),
    "causal of one": (f"{RING}_func", THREE, {"causal": True}, "ranks disagree on mask"),
    "scale of one": (f"{RING}_func", THREE, {"softmax_scale": 0.3}, "ranks disagree on scale"),
    "tokens of one": (f"{RING}_func", THREE, 1, "ranks disagree on length"),
    "odd": (f"{ZIGZAG}_func", THREE, 1, "q: got 5 tokens on a rank, expected an even number"),
    "dims": (
        f"{RING}_func",
        PACKED_THREE,
        None,
        "q: got (6, 2, 8), expected a tensor [batch, tokens, heads, head_dim]",
    ),
    "kv dims": (f"{RING}_kvpacked_func", [ROWS, ROWS], None, "expected a tensor [batch, tokens, 2, heads, head_dim]"),
    "kv as qkv": (f"{RING}_varlen_qkvpacked_func", [KV, BOUNDS, 4], None, "expected a tensor [tokens, 3, heads, head_"),
    "longest": (f"{RING}_varlen_func", [*PACKED_THREE, BOUNDS, 3], None, "max_seqlen: got 3, expected 4 or more"),
    "bounds": (f"{ZIGZAG}_varlen_func", [*PACKED_THREE, BOUNDS, 4], 1, "rising bounds from 0 to 5, this rank's tokens"),
    "odd document": (f"{ZIGZAG}_varlen_func", [*PACKED_THREE, ODD, 4], None, "a document with 3 tokens on a rank"),
    "llama3 tokens": (LLAMA3, [*PACKED_THREE, *SLICED], 1, "cu_seqlens_q: got [0, 4, 6]"),
    "llama3 causal": (LLAMA3, [*PACKED_THREE, *SLICED], {"causal": False}, "expected ([0, 4, 6], [0, 4, 12]"),
    "llama3 stride": (LLAMA3, [*PACKED_THREE, *SLICED[:4], 3, SLICED[5]], None, "heads_k_stride: got 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_result_is_refused_on_every_rank(case: str) -> None:
    name, arguments, changed, expected = REFUSED[case]

    def attend(world: World) -> str:
        given, options = list(arguments), {"causal": name == LLAMA3}
        if name == LLAMA3 and world.rank == 0:
            given[3:] = [*FIRST[:4], given[7], FIRST[5]]
        if world.rank == 0 and isinstance(changed, dict):
            options |= changed
        elif world.rank == 0 and changed:
            given[:3] = [x[..., :-1, :, :] for x in given[:3]]
        with pytest.raises(ValueError, match=r"\w+: ") as refused:
            getattr(flash_attn, name)(*given, group=world, **options)
        return str(refused.value)

    for message in run_loopback(2, attend, timeout=10):
        assert expected in message


def test_signatures_are_those_that_users_know() -> None:
    tail = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) alibi_slopes=None deterministic=False"
    tail = f"{tail} return_attn_probs=False group=None softcap=0.0"
    sliced = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k heads_k_stride local_k_slice"
    for family, between in {
        "ring_flash_attn": "",
        "zigzag_ring_flash_attn": "",
        "stripe_flash_attn": "",
        "ring_flash_attn_varlen": "cu_seqlens max_seqlen ",
        "zigzag_ring_flash_attn_varlen": "cu_seqlens max_seqlen ",
        "llama3_flash_attn_varlen": f"{sliced} ",
    }.items():
        for form, first in {"func": "q k v", "kvpacked_func": "q kv", "qkvpacked_func": "qkv"}.items():
            function = getattr(flash_attn, f"{family}_{form}")
            got = [
                name if x.default is x.empty else f"{name}={x.default}"
                for name, x in inspect.signature(function).parameters.items()
            ]
            assert " ".join(got) == f"{first} {between}{tail}"
            assert function.__doc__
