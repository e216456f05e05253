"""What :func:`seqpar.attention` requires of its inputs, checked before anything is computed or sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from seqpar.comm import SingleRank, agree
from seqpar.kernels import KERNEL_NAMES, Kernel, kernel_named

if TYPE_CHECKING:
    from .planning import Plan

ATTENTION = "seqpar.attention"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadShape:
    """What a plan was told about the tensors to come; None where it was not told."""

    heads: tuple[int, int] | None = None
    head_dim: tuple[int, int] | None = None
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

    @property
    def complete(self) -> bool:
        """Whether it says everything."""
        return None not in (self.heads, self.head_dim, self.dtype)


def agree_once(plan: Plan, call: str, kind: dict[str, object], refusal: Exception | None = None) -> None:
    """Agree on a kind of call with all ranks of a plan, the first time that it comes up; later ones cost nothing.

    Once ranks have agreed on a call, they do not wait for each other there: a refusal is then this rank's alone.
    """
    key = (call, *kind.values())
    if refusal is None and key in plan.agreed:
        return
    alone = refusal is not None and any(agreed[0] == call for agreed in plan.agreed)
    agree(SingleRank() if alone else plan.world, call, kind, refusal)
    plan.agreed.add(key)


def check_scale(scale: float | None) -> None:
    """Raise ValueError for a scale of the scores that is no finite number; None is the default's."""
    if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
        raise ValueError(f"scale: got {scale!r}, expected a finite number; a learnable scale belongs into q")


def check_types(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float | None, kernel: str
) -> None:
    """Refuse what no operator takes, before one is called."""
    try:
        for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
            if x is None and name == "sinks":
                continue
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                got = f"a {x.layout} tensor" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name}: got {got}, expected a dense tensor; convert it")
            if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
                raise ValueError(f"{name}: got a forward-mode tangent, expected none; differentiate in reverse mode")
        check_scale(scale)
        if not isinstance(kernel, str):
            raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(KERNEL_NAMES)}")
    except ValueError as error:
        agree_once(plan, ATTENTION, {}, error)


def admit(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: str, wants_lse: bool
) -> Kernel:
    """The kernel for these tensors, or a ValueError: the same on every rank at the first call of a kind with a plan."""
    backend, refusal = None, None
    try:
        backend = _check(plan, q, k, v, sinks, kernel)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        refusal = error
    agree_once(plan, ATTENTION, _kind(plan, q, k, v, sinks, scale, kernel, wants_lse), refusal)
    assert backend is not None, "an inadmissible call was agreed on"
    return backend


def _kind(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: str, wants_lse: bool
) -> dict[str, object]:
    """What every rank's call must have in common: all but the number of tokens."""
    return {
        "plan": plan.identity,
        "batch": tuple(q.shape[:1]),
        "heads": (tuple(q.shape[2:3]), tuple(k.shape[2:3])),
        "head_dim": (tuple(q.shape[3:]), tuple(v.shape[3:])),
        "dtype": (q.dtype, k.dtype, v.dtype),
        "device": q.device.type,
        "sinks": None if sinks is None else tuple(sinks.shape),
        "scale": scale,
        "kernel": kernel,
        "lse": wants_lse,
        "requires_grad": any(x.requires_grad for x in (q, k, v)),
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
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected q's {q.shape[0]}; expand it")
    for name, x, expected in (
        ("q", q, len(plan.queries)),
        ("k", k, len(plan.keys)),
        ("v", v, len(plan.keys)),
    ):
        if x.shape[1] != expected:
            raise ValueError(
                f"{name}: got {x.shape[1]} tokens, expected {expected}, rank {plan.world.rank}'s share of the plan's "
                "tokens; shard with plan.shard, or make a plan for this length"
            )
    heads, kv_heads = q.shape[2], k.shape[2]
    if v.shape[2] != kv_heads:
        raise ValueError(f"v: got {v.shape[2]} heads, expected k's {kv_heads}; each KV head has a key and a value")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q: got {heads} heads over {kv_heads} KV heads, expected a multiple; each group shares a KV head"
        )
    if not (q.shape[3] and v.shape[3]):
        raise ValueError(f"q, v: got head_dim {q.shape[3]} and {v.shape[3]}, expected at least 1")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: got head_dim {k.shape[3]}, expected q's {q.shape[3]}; only v's may differ")
    given = HeadShape((heads, kv_heads), (q.shape[3], v.shape[3]), q.dtype)
    for name in ("heads", "head_dim", "dtype"):
        got, planned = getattr(given, name), getattr(plan.told, name)
        if planned is not None and got != planned:
            raise ValueError(f"{name}: got {got}, expected {planned}, which the plan was told; make a plan for these")
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
    backend = kernel_named(kernel)
    backend.check(
        q, k, v, [section.intervals for block in plan.work.blocks for section in block.sections if section.pairs]
    )
    return backend


def _pair(name: str, value: int | tuple[int, int] | None, meaning: str) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(x, Integral) and x > 0 for x in pair):
        raise ValueError(f"{name}: got {value!r}, expected a positive integer or {meaning}")
    return int(pair[0]), int(pair[1])


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
