"""What an attention call costs a rank: seconds, bytes and memory, predicted from its itinerary and the machine's rates.

Pure, per batch row, and as simple as the loop that it predicts: in each step of :mod:`seqpar.ring` a kernel runs while
the next shard is under way; around it :mod:`seqpar.ulysses` trades, with nothing to hide behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from seqpar.kernels import Intervals, accumulator_dtype

from .dealing import deal_heads
from .itinerary import Itinerary
from .layouts import Layout
from .rates import Rates
from .schedules import Inner, Schedule, Tree, Ulysses
from .sections import Block
from .trading import messages
from .tree import traffic
from .validation import HeadShape

MASK_CALLS = 2  # as much time as filling in the mask of a ragged tile takes
CPU_TILE = 512  # keys that PyTorch's flash attention for the CPU computes together, wherever a triangle ends


class Call(NamedTuple):
    """One attention call over the whole sequence: its heads, and the kind of device that computes it."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, told: HeadShape, device: torch.device) -> Call:
        """As a plan was told."""
        assert told.heads is not None, "the plan was told the heads"
        assert told.head_dim is not None, "the plan was told the head dims"
        assert told.dtype is not None, "the plan was told the dtype"
        return cls(*told.heads, *told.head_dim, told.dtype, device.type)

    @property
    def kv_row(self) -> int:
        """Elements of one token's K and V."""
        return self.kv_heads * (self.dim + self.value_dim)


@dataclass(frozen=True)
class Cost:
    """Of one attention call and one batch row, on one rank: seconds, bytes sent, and bytes of memory.

    Attributes:
        forward, backward: seconds.
        kernel: how many of those seconds kernels run.
        bytes: sent in both passes.
        memory: the most that is held at a time besides the call's own inputs, output and gradients.
    """

    forward: float
    backward: float
    kernel: float
    bytes: int
    memory: int

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward + self.backward


def cost(schedule: Schedule, layout: Layout, work: Itinerary, call: Call, rates: Rates, rank: int) -> Cost:
    """What ``rank`` pays in forward and backward, where ``work`` is its itinerary (or its block's, in Ulysses)."""
    if isinstance(schedule, Tree):
        return _meet(schedule, work, call, rates, rank)
    if not isinstance(schedule, Ulysses):
        return _attend(work, call, rates, rates.node or len(layout.queries), grad_wire(schedule, call.dtype))
    degree, node = len(layout.queries) // work.world, rates.node or len(layout.queries)
    me, size = rank % degree, call.dtype.itemsize
    hands = deal_heads(call.heads, call.kv_heads, degree)
    mine = hands.queries[me]
    dealt = call._replace(heads=mine.stop - mine.start, kv_heads=hands.keys[me].stop - hands.keys[me].start)
    inner = _attend(work, dealt, rates, max(1, node // degree), grad_wire(schedule.inner, call.dtype))
    seconds, sent = {}, 0
    for way in ("forward", "backward"):
        links = {True: [0, 0], False: [0, 0]}
        for peer, elements in messages(layout, degree, rank, call.heads, call.kv_heads, call.dim, call.value_dim)[way]:
            link = links[(rank - me + peer) // node == rank // node]
            link[0] += 1
            link[1] += elements * size
        moved = links[True][1] + links[False][1]
        sent += moved
        near, far = ((link[0], link[1]) for link in (links[True], links[False]))
        everything = moved * degree / max(1, degree - 1)  # with what stays here
        seconds[way] = rates.transfer(near, far) + 3 * everything / rates.copy  # packed, received, unpacked
    tokens, keys = len(work.queries), len(work.keys)
    traded = tokens * dealt.heads * (call.dim + call.value_dim) + keys * dealt.kv_row
    return Cost(
        forward=inner.forward + seconds["forward"],
        backward=inner.backward + seconds["backward"],
        kernel=inner.kernel,
        bytes=inner.bytes + sent,
        memory=inner.memory + 2 * traded * size,
    )


def _meet(schedule: Tree, work: Itinerary, call: Call, rates: Rates, rank: int) -> Cost:
    """Kernels, and before and after them what travels of queries and partial results, with nothing to hide behind."""
    attended = _attend(work, call, rates, work.world, accumulator_dtype(call.dtype))
    layout, world, size = work.layout, work.world, call.dtype.itemsize
    node = min(rates.node or world, world)
    levels = traffic(schedule, layout, 1, call.heads, (call.dim, call.value_dim), call.dtype, rank)
    seconds = {"forward": attended.forward, "backward": attended.backward}
    for way, sent in levels.items():
        for n, (calls, count) in enumerate(sent):
            inside = (node - 1) / (world - 1) if len(sent) == 1 else float(n == 0)
            near, far = ((round(calls * x), round(count * x)) for x in (inside, 1 - inside))
            seconds[way] += rates.transfer(near, far) + 3 * count / rates.copy  # packed, received, merged
    rows = sum(map(len, layout.queries)) if not schedule.replicated else len(layout.queries[rank])
    row = call.heads * (call.dim + call.value_dim) * (size + accumulator_dtype(call.dtype).itemsize)
    total = sum(count for sent in levels.values() for _, count in sent)
    return Cost(seconds["forward"], seconds["backward"], attended.kernel, total, rows * row)


def _attend(work: Itinerary, call: Call, rates: Rates, node: int, wire: torch.dtype) -> Cost:
    """The loop over blocks: kernels beside transfers."""
    if not call.heads:
        return Cost(0.0, 0.0, 0.0, 0, 0)
    accumulator = accumulator_dtype(call.dtype).itemsize
    row = call.kv_row // call.kv_heads if work.single else call.kv_row
    kv, grads = row * call.dtype.itemsize, row * wire.itemsize
    fetches, touches = _fetches(work, node), 3 if work.exchange == "gather" else 2
    forward = backward = kernel = 0.0
    for step, block in enumerate(work.blocks):
        scores, calls = _load(work, block, call)
        ahead = scores * 2 * (call.dim + call.value_dim) / rates.forward + calls * rates.call
        back = scores * 2 * (3 * call.dim + 2 * call.value_dim) / rates.backward + calls * rates.backward_call
        (near, near_rows), (far, far_rows) = fetches[step]
        # Gradients follow a step behind, as many rows: the last ones have no kernel beside them.
        coming = rates.transfer((near, near_rows * kv), (far, far_rows * kv))
        leaving = rates.transfer((near, near_rows * grads), (far, far_rows * grads))
        rows = near_rows + far_rows
        # Packed and received, and if gathered put in order; gradients zeroed, filled, added; packed, received, added.
        moved = rows * kv * touches / rates.copy
        added = (
            3 * block.rows * (row if block.keys is None else call.kv_row) * accumulator + rows * grads * touches
        ) / rates.copy
        forward += rates.beside(ahead, coming) + moved
        backward += rates.beside(back, coming + leaving) + moved + added
        kernel += ahead + back
    rows = sum(block.rows for block in work.blocks[1:])
    held = rows if work.exchange == "gather" else 2 * max((block.rows for block in work.blocks[1:]), default=0)
    sent = sum(work.messages(work.rank, grads=False)) * kv
    returned = sum(work.messages(work.rank, grads=True)) * grads
    memory = held * (2 * kv if work.exchange == "gather" else kv) + held * (row * accumulator + grads)
    return Cost(forward, backward, kernel, 2 * sent + returned, memory)


def grad_wire(schedule: Inner, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which dK and dV of ``dtype`` inputs travel."""
    accumulator = accumulator_dtype(dtype)
    return torch.bfloat16 if schedule.grad_wire == "bf16" and accumulator == torch.float32 else accumulator


def _load(work: Itinerary, block: Block, call: Call) -> tuple[int, int]:
    """The scores that a block's kernel calls compute, over all query heads, and in how many calls of a library."""
    scores = calls = 0
    for section in (section for section in block.sections if section.pairs):
        heads = work.groups[section.group].heads
        share = call.heads if heads is None else call.heads * len(heads) // call.kv_heads
        pairs, count = load(section.intervals, call.device)
        scores += pairs * share // section.intervals.start.shape[1]
        calls += count
    return scores, calls


Link = tuple[int, int]  # messages, and their rows


def _fetches(work: Itinerary, node: int) -> list[tuple[Link, Link]]:
    """What arrives while each block is computed: messages and rows from inside the node, and from outside."""
    nothing: tuple[Link, Link] = ((0, 0), (0, 0))
    fetches = [nothing] * len(work.blocks)
    if work.world == 1 or work.exchange == "none":
        return fetches
    if work.exchange == "gather":
        lengths = [len(keys) for keys in work.layout.keys]
        first = work.rank - work.rank % node
        here, total = sum(lengths[first : first + node]), sum(lengths)
        neighbours = len(lengths[first : first + node])
        outside = len(lengths) - neighbours, total - here
        return [((neighbours - 1, here - lengths[work.rank]), outside), nothing]
    crosses = work.world > node  # then the slowest hop of a ring does, and all wait for it
    for step, block in enumerate(work.blocks[1:]):
        assert block.source is not None, "only gathered blocks come from several ranks"
        rows = block.rows
        if work.inside < work.world and (step + 1) % work.inside:
            far = work.inside > node
        elif work.inside < work.world:  # beside all the steps of a ring
            for part in range(step + 1 - work.inside, step + 1):
                fetches[part] = fetches[part][0], (1, rows // work.inside)
            continue
        else:
            far = crosses if work.exchange == "forward" else block.source // node != work.rank // node
        fetch = (int(rows > 0), rows)
        fetches[step] = (nothing[0], fetch) if far else (fetch, nothing[1])
    return fetches


def load(intervals: Intervals, device: str) -> tuple[int, int]:
    """The query-key pairs that a kernel computes, and in how many calls, over all batch rows and heads that differ.

    On the CPU those of dense pieces, with the hidden pairs of ragged tiles and of the tiles along a diagonal; elsewhere
    those that the mask allows.
    """
    if device != "cpu":
        return int((intervals.end - intervals.start).sum()), 1
    pieces = [
        (piece, intervals.start.shape[1] // len(row)) for row in intervals.pieces for head in row for piece in head
    ]
    pairs = 0
    for piece, alike in pieces:
        rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        hidden = rows * max(0, rows - CPU_TILE) // 2 if piece.kind == "causal" else 0
        pairs += (rows * keys - hidden) * alike
    return pairs, len(pieces) + MASK_CALLS * sum(piece.kind == "masked" for piece, _ in pieces)
