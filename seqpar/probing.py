"""A short probe of the machine: what :class:`~seqpar.rates.Rates` says, measured by all ranks of a group at once."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from functools import partial
from weakref import WeakKeyDictionary

import torch

from seqpar.comm import World, agree
from seqpar.kernels import AUTO, Intervals, OutputGradient

from .costs import Call
from .rates import Rates

TOKENS = {"cpu": 512, "cuda": 4096}
MESSAGE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
COPIES = 16  # messages that are copied at once: into memory that the allocator has not kept
HEADS = 8
TURNS = 5

# What is known of a group lives as long as the group does.
_known: MutableMapping[object, dict[object, Rates]] = WeakKeyDictionary()


def rates_of(world: World, call: Call, node: int | None) -> Rates:
    """The machine's rates for such calls, the same on every rank; measured the first time, by all ranks together.

    Args:
        world: the ranks.
        call: the heads and dtype to come.
        node: how many consecutive ranks share a node, where the group says so.
    """
    kept = _known.setdefault(world.lasting, {})
    if (call, node) not in kept:
        kept[call, node] = _measure(world, _smaller(call), node)
    return kept[call, node]


def _smaller(call: Call) -> Call:
    """With at most 8 query heads: what a FLOP takes does not depend on them."""
    group = call.heads // call.kv_heads
    kv_heads = max(1, min(call.kv_heads, HEADS // group))
    return call._replace(heads=kv_heads * min(group, HEADS), kv_heads=kv_heads)


def _measure(world: World, call: Call, node: int | None) -> Rates:
    device, refusal = world.payload_device, None
    tokens = TOKENS.get(call.device, 512)
    flop = tokens * tokens * call.heads
    local: list[float] = []
    try:
        few, many = _kernel(call, 16, device), _kernel(call, tokens, device)
        calls = [_seconds(kernel, device) for kernel in few]
        local = [max(1e-9, _seconds(kernel, device) - less) for kernel, less in zip(many, calls, strict=True)]
        large = torch.zeros(MESSAGE_BYTES.get(call.device, 4 << 20), dtype=torch.uint8, device=device)
        huge = large.repeat(COPIES)
        local += [*calls, len(huge) / _seconds(huge.clone, device)]
        del huge
    except Exception as error:  # whatever it is, the other ranks must hear of it before they wait for messages
        refusal = error
    agree(world, "seqpar.plan", {"probe": call}, refusal)
    forward, backward, *calls, copy = local
    near, far = world.split(node or world.size)
    links = [_link(part, large, device) for part in (near, far)]
    slower = near if near.size > 1 else far
    both = _seconds(lambda: _beside(slower, large, many[0]), device)
    alone = _link(slower, large, device)
    hidden = 1 - (both - forward - calls[0]) / max(alone[1], 1e-9)
    mine = [
        -flop * 2 * (call.dim + call.value_dim) / forward,
        -flop * 2 * (3 * call.dim + 2 * call.value_dim) / backward,
        *calls,
        -copy,
        *(value for latency, seconds in links for value in (latency, -len(large) / max(seconds - latency, 1e-9))),
        -min(1.0, max(0.0, hidden)),
    ]
    record = torch.tensor(mine, dtype=torch.float64, device=world.control_device)
    worst = torch.stack(world.all_gather(record, "probe")).amax(0).tolist()  # negative where more is better
    forward_rate, backward_rate, call_seconds, backward_call, copy_rate, *between, overlap = worst
    latency, bandwidth, far_latency, far_bandwidth = between
    apart = node is not None and 1 < node < world.size
    if near.size == 1:
        latency, bandwidth = far_latency, far_bandwidth
    return Rates(
        forward=-forward_rate,
        backward=-backward_rate,
        call=call_seconds,
        backward_call=backward_call,
        copy=-copy_rate,
        bandwidth=-bandwidth,
        latency=latency,
        overlap=-overlap,
        node=node if apart else None,
        far_bandwidth=-far_bandwidth if apart else None,
        far_latency=far_latency if apart else None,
    )


def _kernel(call: Call, tokens: int, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of ``tokens`` queries that see as many keys."""
    heads = (call.heads, call.dim), (call.kv_heads, call.dim), (call.kv_heads, call.value_dim)
    q, k, v = (torch.zeros(1, tokens, h, d, dtype=call.dtype, device=device) for h, d in heads)
    first, last = (torch.full((1, 1, tokens), bound, dtype=torch.int32) for bound in (0, tokens))
    intervals = Intervals(first, last)
    scale = call.dim**-0.5
    result = AUTO.forward(q, k, v, intervals, scale, None)
    out = result.out.to(call.dtype)
    grad = OutputGradient(out, result.lse, torch.zeros_like(out), None)
    grads = [torch.zeros_like(x, dtype=result.lse.dtype) for x in (q, k, v)]
    return (
        partial(AUTO.forward, q, k, v, intervals, scale, None),
        partial(AUTO.backward, grad, q, k, v, intervals, scale, *grads),
    )


def _link(world: World, large: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds for a message of no size worth mentioning, and for a large one, from each rank to the next."""
    if world.size == 1:
        return 0.0, 0.0
    small, seconds = large[:64].clone(), []
    for message in (small, large):
        into = torch.empty_like(message)
        seconds.append(_seconds(lambda m=message, i=into: _pass_on(world, m, i), device))  # type: ignore[misc]
    return seconds[0], seconds[1]


def _pass_on(world: World, message: torch.Tensor, into: torch.Tensor) -> None:
    world.start([(world.peer(1), message)], [(world.peer(-1), into)], "probe").wait()


def _beside(world: World, message: torch.Tensor, kernel: Callable[[], object]) -> None:
    """A kernel while a message is under way."""
    transfer = world.start([(world.peer(1), message)], [(world.peer(-1), torch.empty_like(message))], "probe")
    kernel()
    transfer.wait()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The quickest of some turns, after one that is not counted; all ranks take as many."""
    turns = []
    for turn in range(TURNS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            turns.append(time.perf_counter() - began)
    return min(turns)
