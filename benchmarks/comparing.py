"""Contenders against each other: each right on a small copy of a case before it is timed on the case, all in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from contenders import CONTENDERS, Case, Contender, Inputs
from measuring import Iteration, median
from torch import Tensor

from seqpar.kernels import DIRECTIONS, OutputGradient, kernel_named
from seqpar.kernels.flash import Direction

Value = float | str  # a figure, or why there is none
Clock = Callable[[Mapping[str, Iteration], int], dict[str, list[float]]]
GRADIENTS = ("dq", "dk", "dv")
# Largest relative error, as a norm, of the output and of gradients.
BOUNDS = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3), torch.float32: (1e-4, 1e-4)}


@dataclass(frozen=True)
class Bench:
    """Where and how to measure."""

    device: torch.device
    clock: Clock
    runs: int
    until: float
    """When to measure nothing more, as ``time.monotonic()`` says it."""
    checked: dict[tuple[str, Case, bool], dict[Direction, str]] = field(default_factory=dict)

    def fault(self, name: str, case: Case, direction: Direction) -> str:
        """What is wrong with a contender; found out once for all cases whose small copy is the same."""
        key = name, case.small, torch.are_deterministic_algorithms_enabled()
        if key not in self.checked:
            self.checked[key] = check(CONTENDERS[name], case, self.device)
        return self.checked[key][direction]


def measure(
    bench: Bench,
    case: Case,
    names: Sequence[str],
    directions: Sequence[Direction] = DIRECTIONS,
    besides: Mapping[str, Iteration] | None = None,
) -> dict[Direction, dict[str, Value]]:
    """Median seconds by direction and contender, and of ``besides`` in the same turns."""
    inputs, calls, results = case.inputs(bench.device), {}, {}
    for direction in directions:
        results[direction] = values = {}
        ready: dict[str, Iteration] = dict(besides or {})
        for name in names:
            print(f"  {case.mask} {case.queries:,} {direction} {name}", file=sys.stderr, flush=True)
            if time.monotonic() > bench.until:
                values[name] = "not reached"
                continue
            if problem := bench.fault(name, case, direction):
                values[name] = problem
                continue
            try:
                if name not in calls:
                    calls[name] = CONTENDERS[name].prepare(case, inputs)
                call = calls[name].forward if direction == "forward" else calls[name].start_backward()
                call()
                ready[name] = call
            except Exception as error:  # such as too little memory: it belongs in the table
                values[name] = first_line(error)
        values |= {name: median(seconds) for name, seconds in bench.clock(ready, bench.runs).items()}
        results[direction] = {name: values[name] for name in (*(besides or {}), *names)}  # columns of one table
    return results


def rates(case: Case, direction: Direction, seconds: Mapping[str, Value]) -> dict[str, Value]:
    """TFLOP/s: only the pairs that the mask allows count."""
    flop = case.flop(direction)
    return {name: value if isinstance(value, str) else flop / value / 1e12 for name, value in seconds.items()}


# Right or wrong.


class Corner(NamedTuple):
    """One KV head of one batch row, with its query heads, and what is right there."""

    batch: slice
    heads: slice
    kv_heads: slice
    expected: dict[str, Tensor]


def corners(case: Case, inputs: Inputs) -> list[Corner]:
    """The first KV head of the first batch row and the last one of the last, by the reference kernel in fp64."""
    group, found = case.heads // case.kv_heads, []
    for row, head in dict.fromkeys([(0, 0), (case.batch - 1, case.kv_heads - 1)]):
        batch, heads, kv_heads = slice(row, row + 1), slice(head * group, (head + 1) * group), slice(head, head + 1)
        q, dout = (x[batch, :, heads].double() for x in (inputs.q, inputs.dout))
        k, v = (x[batch, :, kv_heads].double() for x in (inputs.k, inputs.v))
        reference, call = kernel_named("reference"), (q, k, v, case.intervals, case.scale)
        partial = reference.forward(*call, None)
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        reference.backward(OutputGradient(partial.out, partial.lse, dout, None), *call, *grads)
        found.append(Corner(batch, heads, kv_heads, {"out": partial.out, **dict(zip(GRADIENTS, grads, strict=True))}))
    return found


def fault(case: Case, right: list[Corner], got: dict[str, Tensor]) -> str:
    """What is wrong with results by name (out, dq, dk, dv); nothing if they are right."""
    faults = []
    for name, whole in got.items():
        bound = BOUNDS[case.dtype][name in GRADIENTS]
        for corner in right:
            heads = corner.kv_heads if name in ("dk", "dv") else corner.heads
            if not (error := relative_error(whole[corner.batch, :, heads], corner.expected[name])) <= bound:
                faults.append(f"{name} is off by {error:.1e}, allowed are {bound:.0e}")
    return "wrong: " + "; ".join(dict.fromkeys(faults)) if faults else ""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in norm; NaN where got has one."""
    return float((got.double() - expected).norm() / expected.norm())


def check(contender: Contender, case: Case, device: torch.device) -> dict[Direction, str]:
    """What is wrong with a contender on a small copy of a case, or the first line of what it raised, by direction."""
    small = case.small
    inputs = small.inputs(device)
    right = corners(small, inputs)
    try:
        calls = contender.prepare(small, inputs)
    except Exception as error:  # whatever others' code raises belongs in the table
        return dict.fromkeys(DIRECTIONS, first_line(error))
    runs: dict[Direction, Callable[[], dict[str, Tensor]]] = {
        "forward": lambda: {"out": calls.forward()},
        "backward": lambda: dict(zip(GRADIENTS, calls.start_backward()(), strict=True)),
    }
    found: dict[Direction, str] = {}
    for direction, run in runs.items():
        try:
            found[direction] = fault(small, right, run())
        except Exception as error:
            found[direction] = first_line(error)
    return found


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
