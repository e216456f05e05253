"""Positions, held as strided runs, behave as the plain sorted numbers that they stand for."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seqpar.positions import Positions, union

numbers = st.lists(st.integers(0, 60), max_size=25, unique=True).map(sorted)
bounds = st.lists(st.integers(-3, 80), min_size=1, max_size=20)
interval = st.tuples(st.integers(0, 40), st.integers(0, 45))
# (gap before the run, count, step): few runs and many take different paths.
run_tables = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 5)), max_size=9)


def runs_of(table: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """``(start, count, step)``, each run behind the one before."""
    runs, free = [], 0
    for gap, count, step in table:
        start = free + gap
        runs.append((start, count, step))
        free = start + max(count - 1, 0) * step + 1
    return runs


def listed(runs: list[tuple[int, int, int]]) -> list[int]:
    return [start + i * step for start, count, step in runs for i in range(count)]


@given(numbers)
def test_of_holds_exactly_the_numbers_given(values: list[int]) -> None:
    positions = Positions.of(torch.tensor(values, dtype=torch.int64))
    assert positions.tensor.tolist() == values
    assert positions.tensor.dtype == torch.int64
    assert len(positions) == len(values)


@given(run_tables)
def test_runs_hold_every_step_of_every_run(table: list[tuple[int, int, int]]) -> None:
    runs = runs_of(table)
    positions = Positions.runs(runs)
    assert positions.tensor.tolist() == listed(runs)
    assert len(positions) == len(listed(runs))


@given(run_tables, bounds)
def test_count_below_counts(table: list[tuple[int, int, int]], below: list[int]) -> None:
    runs = runs_of(table)
    expected = [sum(x < bound for x in listed(runs)) for bound in below]
    positions = Positions.runs(runs)
    assert positions.count_below(torch.tensor(below)).tolist() == expected
    assert positions.count_below(torch.tensor([below, below])).tolist() == [expected, expected]


def segments_of(values: set[int]) -> Tensor:
    """The numbers as sorted disjoint ``[S, 2]`` segments."""
    begins = [x for x in sorted(values) if x - 1 not in values]
    ends = [x + 1 for x in sorted(values) if x + 1 not in values]
    return torch.tensor(list(zip(begins, ends, strict=True)), dtype=torch.int64).view(-1, 2)


@given(run_tables, st.sets(st.integers(0, 70)))
def test_within_keeps_what_lies_in_the_segments(table: list[tuple[int, int, int]], wanted: set[int]) -> None:
    runs = runs_of(table)
    kept = Positions.runs(runs).within(segments_of(wanted))
    assert kept.tensor.tolist() == [x for x in listed(runs) if x in wanted]
    # What comes back is as good as new.
    values = kept.tensor.tolist()
    assert kept.count_below(torch.arange(80)).tolist() == [sum(x < bound for x in values) for bound in range(80)]


@given(numbers, numbers)
def test_equal_and_equally_hashed_where_the_numbers_are(one: list[int], other: list[int]) -> None:
    a, b, again = (Positions.of(torch.tensor(x, dtype=torch.int64)) for x in (one, other, one))
    assert a == again
    assert hash(a) == hash(again)
    assert (a == b) == (one == other)
    assert a != one


@given(st.integers(1, 3).flatmap(lambda rows: st.lists(st.lists(interval, min_size=rows, max_size=rows), min_size=1)))
def test_union_is_the_covered_numbers_in_sorted_disjoint_segments(intervals: list[list[tuple[int, int]]]) -> None:
    """Of intervals ``[rows, T]`` as masks have them: both bounds non-decreasing in each row, some empty."""
    start, end = torch.tensor(intervals).transpose(0, 1).sort(1).values.unbind(-1)
    end = torch.maximum(start, end)
    covered = {x for a, b in zip(start.flatten().tolist(), end.flatten().tolist(), strict=True) for x in range(a, b)}
    assert torch.equal(union(start, end), segments_of(covered))


def test_a_million_tokens_are_a_handful_of_numbers() -> None:
    striped = Positions.runs([(3, 1 << 20, 64)])
    assert len(striped) == 1 << 20
    assert striped.starts.numel() == 1
    window = torch.tensor([[1_000_000, 1_000_640]])
    assert striped.within(window).tensor.tolist() == list(range(1_000_003, 1_000_640, 64))
    assert striped.within(window).starts.numel() == 1


def test_printed_briefly() -> None:
    assert repr(Positions.runs([(0, 3, 1), (9, 2, 4)])) == "Positions(5: 0+3x1, 9+2x4)"
    assert repr(Positions.runs([(10 * i, 1, 1) for i in range(6)])).endswith(", ...)")
