"""What :func:`seqpar.attention` requires of its inputs, checked before anything is computed or sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqpar.comm import agree
from seqpar.kernels import Kernel, kernel_named

if TYPE_CHECKING:
    from .planning import Plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadShape:
    """What a plan was told about the tensors to come; None where it was not told."""

    heads: tuple[int, int] | None = None
    dims: tuple[int, int] | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls, heads: int | tuple[int, int] | None, head_dim: int | tuple[int, int] | None, dtype: torch.dtype | None
    ) -> HeadShape:
        """From the arguments of :func:`seqpar.plan`, a single number standing for both of a pair."""
        shape = cls(_pair("heads", heads, "(query heads, KV heads)"), _pair("head_dim", head_dim, "(D, Dv)"), dtype)
        if shape.heads is not None and shape.heads[0] % shape.heads[1]:
            raise ValueError(f"heads: got {shape.heads}, expected query heads to be a multiple of KV heads")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype}, expected one of {_names(DTYPES)}")
        return shape


def admit(plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: str) -> Kernel:
    """The kernel for these tensors, or a ValueError: the same on every rank at the first call of a kind with a plan.

    Later calls of that kind (same heads, dims, dtypes, batch, device, scale, kernel) are checked on this rank alone, so
    that they cost no communication.
    """
    kind = _kind(q, k, v, sinks, scale, kernel)
    known = tuple(kind.values()) in plan.agreed
    backend, refusal = None, None
    try:
        backend = _check(plan, q, k, v, sinks, kernel)
    except ValueError as error:
        if known:
            raise
        refusal = error
    if not known:
        agree(plan.world, "seqpar.attention", kind, refusal)
        plan.agreed.add(tuple(kind.values()))
    assert backend is not None, "an inadmissible call was agreed on"
    return backend


def _kind(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: str) -> dict[str, object]:
    """What every rank's call must have in common: all but the number of tokens."""
    return {
        "batch": q.shape[:1],
        "heads": (tuple(q.shape[2:3]), tuple(k.shape[2:3])),
        "head_dim": (tuple(q.shape[3:]), tuple(v.shape[3:])),
        "dtype": (q.dtype, k.dtype, v.dtype),
        "device": q.device.type,
        "sinks": None if sinks is None else tuple(sinks.shape),
        "scale": scale,
        "kernel": kernel,
    }


def _check(plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, kernel: str) -> Kernel:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected 4 dims [batch, tokens, heads, head_dim]")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: got {x.dtype}, expected one of {_names(DTYPES)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: got {x.dtype} on {x.device}, expected q's {q.dtype} on {q.device}; cast or move it"
            )
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected q's {q.shape[0]}")
    for name, x, expected in (
        ("q", q, len(plan.work.queries)),
        ("k", k, len(plan.work.keys)),
        ("v", v, len(plan.work.keys)),
    ):
        if x.shape[1] != expected:
            raise ValueError(
                f"{name}: got {x.shape[1]} tokens, expected {expected}, rank {plan.world.rank}'s share of the plan's "
                "tokens; shard with plan.shard, or make a plan for this length"
            )
    heads, kv_heads = q.shape[2], k.shape[2]
    if v.shape[2] != kv_heads:
        raise ValueError(f"v: got {v.shape[2]} heads, expected k's {kv_heads}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q: got {heads} heads over {kv_heads} KV heads, expected a multiple; each group shares a KV head"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: got head_dim {k.shape[3]}, expected q's {q.shape[3]}; only v's may differ")
    given = HeadShape((heads, kv_heads), (q.shape[3], v.shape[3]), q.dtype)
    for name in ("heads", "dims", "dtype"):
        got, planned = getattr(given, name), getattr(plan.told, name)
        if planned is not None and got != planned:
            raise ValueError(f"{name}: got {got}, expected {planned}, as the plan was told")
    documents = plan.mask.documents
    if documents is not None and len(documents.queries) not in (1, q.shape[0]):
        raise ValueError(
            f"q: got batch {q.shape[0]}, expected {len(documents.queries)}, the rows of the plan's Documents"
        )
    if sinks is not None and (
        tuple(sinks.shape) != (heads,) or not sinks.is_floating_point() or sinks.device != q.device
    ):
        got = f"{tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        raise ValueError(f"sinks: got {got}, expected a floating [{heads}], one per query head, on {q.device}")
    backend = kernel_named(kernel, q.device)
    backend.check(q, k, v)
    return backend


def _pair(name: str, value: int | tuple[int, int] | None, meaning: str) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(x, int) and x > 0 for x in pair):
        raise ValueError(f"{name}: got {value!r}, expected a positive integer or {meaning}")
    return pair[0], pair[1]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
