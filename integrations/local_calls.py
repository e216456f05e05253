"""Attention calls that know nothing but a rank's own tokens, in the arguments that FlashAttention's functions have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

import seqpar
from seqpar.comm import Group, World, agree, connect
from seqpar.positions import Positions

from .sharing import bounds_of

Bounds: TypeAlias = Tensor | Sequence[int]
Result: TypeAlias = Tensor | tuple[Tensor, Tensor, None]
Planned: TypeAlias = tuple[seqpar.Mask, int, str | seqpar.Layout]


class Options(NamedTuple):
    """What all functions take last; `deterministic` says nothing, since seqpar always is."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    alibi_slopes: Tensor | None
    return_attn_probs: bool
    group: Group
    softcap: float

    def mask(self) -> seqpar.Mask:
        """What a query sees of its document. Raises ValueError for options that nothing here supports."""
        for name in ("dropout_p", "softcap"):
            if getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0: it is not supported; drop it")
        if self.alibi_slopes is not None:
            raise ValueError("alibi_slopes: got some, expected None: they are not supported; drop them")
        if not isinstance(self.window_size, (tuple, list)) or len(self.window_size) != 2:
            raise ValueError(f"window_size: got {self.window_size!r}, expected (left, right), of which -1 is no limit")
        left, right = self.window_size[0], 0 if self.causal else self.window_size[1]
        if left == -1 and right in (-1, 0):
            return seqpar.Full() if right else seqpar.Causal()
        return seqpar.SlidingWindow(left, right)


# A planner raises before it has talked to other ranks, and returns a function where it has to.
Planner: TypeAlias = Callable[[World, Options, Tensor, Tensor], Planned | Callable[[], Planned]]


def attend(inputs: Sequence[Tensor], options: Options, plan_for: Planner, dims: int) -> Result:
    """Attention over this rank's tokens, from `(q, k, v)` of so many dims, `(q, kv)` or `(qkv,)`.

    plan_for: gives the mask, the global length and the layout for q and k. Raises ValueError on every rank where one
    of them refuses its inputs.
    """
    everyone = options.group is None and dist.is_available() and dist.is_initialized()
    world = connect(dist.group.WORLD if everyone else options.group)
    try:
        q, k, v = _unpacked(inputs, dims)
        planned = plan_for(world, options, q, k)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        agree(world, "seqpar.plan", {}, error)
        raise
    mask, length, layout = planned() if callable(planned) else planned
    plan = seqpar.plan(mask, length=length, group=world, layout=layout)
    if dims == 3:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    if not options.return_attn_probs:
        out = seqpar.attention(q, k, v, plan, scale=options.softmax_scale)
        return out[0] if dims == 3 else out
    out, lse = seqpar.attention_with_lse(q, k, v, plan, scale=options.softmax_scale)
    return (out[0], lse[0], None) if dims == 3 else (out, lse, None)


def _unpacked(inputs: Sequence[Tensor], dims: int) -> Sequence[Tensor]:
    """q, k and v, from them, or from q and kv, or from qkv. Raises ValueError for other shapes."""
    names = {1: ["qkv"], 2: ["q", "kv"], 3: ["q", "k", "v"]}[len(inputs)]
    shape = ["batch"] * (dims - 3) + ["tokens", "heads", "head_dim"]
    for name, x in zip(names, inputs, strict=True):
        expected = shape if len(name) == 1 else [*shape[:-2], str(len(name)), *shape[-2:]]
        if not isinstance(x, Tensor) or x.dim() != len(expected) or (len(name) > 1 and x.shape[-3] != len(name)):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: got {got}, expected a tensor [{', '.join(expected)}]")
    return [part for name, x in zip(names, inputs, strict=True) for part in (x.unbind(-3) if len(name) > 1 else [x])]


def plan_rows(layout: str, world: World, options: Options, q: Tensor, k: Tensor) -> Planned:
    """For q and k [B, T, heads, D] of rows that ranks share in a named layout."""
    tokens = q.shape[1]
    if layout == "zigzag" and tokens % 2 and world.size > 1:
        raise ValueError(f"q: got {tokens} tokens on a rank, expected an even number for two chunks; pad them")
    return options.mask(), tokens * world.size, layout


def plan_shares(
    layout: str, cu_seqlens: Bounds, max_seqlen: int, world: World, options: Options, q: Tensor, k: Tensor
) -> Planned:
    """For q and k [T, heads, D] of documents, each of which ranks share evenly: contiguous or document_zigzag."""
    ranks, shares = world.size, list(pairwise(_bounds("", cu_seqlens, max_seqlen, len(q))))
    mask = options.mask() & seqpar.Documents([0, *(end * ranks for _, end in shares)])
    if layout == "contiguous":
        runs = [[(a * ranks + rank * (b - a), b - a, 1) for a, b in shares] for rank in range(ranks)]
        held = tuple(map(Positions.runs, runs))
        return mask, len(q) * ranks, seqpar.Layout("document_contiguous", held, held)
    for begin, end in shares:
        if (end - begin) % 2 and ranks > 1:
            got = f"a document with {end - begin} tokens on a rank"
            raise ValueError(f"cu_seqlens: got {got}, expected an even number for two chunks; pad it")
    return mask, len(q) * ranks, layout


def plan_slices(
    cu_seqlens_q: Bounds, cu_seqlens_k: Bounds, max_seqlen_q: int, max_seqlen_k: int, heads_k_stride: int,
    local_k_slice: slice, world: World, options: Options, q: Tensor, k: Tensor,
) -> Callable[[], Planned]:  # fmt: skip
    """For q and k [T, heads, D] of all documents in a row, of which every rank has the next T tokens."""
    tokens, mask = len(q), options.mask()
    seen = _bounds("_k", cu_seqlens_k, max_seqlen_k, local_k_slice.stop - local_k_slice.start)
    given = _bounds("_q", cu_seqlens_q, max_seqlen_q, tokens), seen, local_k_slice
    if not isinstance(heads_k_stride, int) or heads_k_stride < 1 or k.shape[1] % heads_k_stride:
        raise ValueError(f"heads_k_stride: got {heads_k_stride}, expected a divisor of {k.shape[1]}, the KV heads")

    def plan() -> Planned:
        # A rank knows the documents that it has tokens of: all of them become known from where each rank's begin.
        agree(world, "llama3_flash_attn_varlen_func", {"tokens": tokens})
        begins = torch.zeros(tokens, dtype=torch.uint8)
        begins[given[0][1:-1]] = 1
        begins[0] = local_k_slice.start == world.rank * tokens
        everyones = torch.cat(world.all_gather(begins.to(world.control_device), "agree"))
        bounds = torch.cat([everyones[1:].nonzero().flatten().cpu() + 1, torch.tensor([len(everyones)])])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), bounds])
        cu_q, cu_k, _, _, sliced = slice_documents(bounds, options.causal, world.rank, world.size)
        if given != (cu_q.tolist(), cu_k.tolist(), sliced):
            expected = cu_q.tolist(), cu_k.tolist(), sliced
            refusal = ValueError(
                f"cu_seqlens_q, cu_seqlens_k, local_k_slice: got {given}, expected {expected} by where other ranks' "
                "documents begin; give what llama3_flash_attn_prepare_cu_seqlens returns, for the same causal"
            )
            agree(world, "seqpar.plan", {}, refusal)
        return mask & seqpar.Documents(bounds), len(everyones), "contiguous"

    return plan


def slice_documents(
    cu_seqlens: Bounds, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """`(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice)` of a rank, from the whole bounds.

    The slice is of keys that the rank's queries may see, and cu_seqlens_k are documents' bounds in it. Raises
    ValueError where ranks don't get equally many tokens.
    """
    given = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.tensor(cu_seqlens, dtype=torch.int32)
    bounds = sorted(set(bounds_of(given)))
    tokens, rest = divmod(bounds[-1], world_size)
    if rest or tokens == 0:
        raise ValueError(f"cu_seqlens: got {bounds[-1]} tokens, expected a multiple of {world_size} ranks; pad them")
    begin, end = rank * tokens, (rank + 1) * tokens
    inner = [bound for bound in bounds if begin < bound < end]
    left = max(bound for bound in bounds if bound <= begin)
    right = end if causal else min(bound for bound in bounds if bound >= end)
    seen_q = [0, *(bound - begin for bound in inner), tokens]
    seen_k = [0, *(bound - left for bound in inner), right - left]
    tensors = [given.new_tensor(seen) for seen in (seen_q, seen_k)]
    longest = [max(b - a for a, b in pairwise(seen)) for seen in (seen_q, seen_k)]
    return tensors[0], tensors[1], longest[0], longest[1], slice(left, right)


def _bounds(name: str, given: Bounds, longest: int, tokens: int) -> list[int]:
    """Of documents on a rank, without empty ones. Raises ValueError unless they cover its tokens."""
    bounds = bounds_of(given) if isinstance(given, Tensor) else list(given)
    if bounds[:1] != [0] or bounds[-1] != tokens or sorted(bounds) != bounds:
        got = f"{bounds[:4]}{' ...' if len(bounds) > 4 else ''} up to {bounds[-1:]}"
        raise ValueError(f"cu_seqlens{name}: got {got}, expected rising bounds from 0 to {tokens}, this rank's tokens")
    found = max((end - begin for begin, end in pairwise(bounds)), default=0)
    if longest < found:
        raise ValueError(f"max_seqlen{name}: got {longest}, expected {found} or more, the longest document's here")
    return sorted(set(bounds))
