"""Masks against their definition, pair by pair."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seqpar import Causal, Chunked, Documents, Full, Mask, PrefixLM, SlidingWindow
from support.cases import MaskCase
from support.strategies import TERMS, Term, boundaries, mask_cases, terms


def seen(mask: Mask, length: int, kv_length: int | None = None, query: Tensor | None = None) -> Tensor:
    """bool ``[rows, T, kv_length]``: the pairs in the mask's intervals, of all queries or of some."""
    kv_length = length if kv_length is None else kv_length
    lo, hi = mask.intervals(torch.arange(length) if query is None else query, length, kv_length)
    key = torch.arange(kv_length)
    return (key >= lo.unsqueeze(-1)) & (key < hi.unsqueeze(-1))


@given(mask_cases())
def test_intervals_hold_exactly_the_allowed_pairs(case: MaskCase) -> None:
    case.mask.check(case.length, case.kv_length)
    assert torch.equal(seen(case.mask, case.length, case.kv_length), case.dense())


@given(mask_cases(), st.data())
def test_intervals_of_any_sorted_queries_are_in_order(case: MaskCase, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, case.length - 1), min_size=1, unique=True).map(sorted))
    query = torch.tensor(chosen)
    assert torch.equal(seen(case.mask, case.length, case.kv_length, query), case.dense()[:, query])

    lo, hi = case.mask.intervals(query, case.length, case.kv_length)
    assert lo.dtype == hi.dtype == torch.int64
    assert lo.min() >= 0
    assert hi.max() <= case.kv_length
    for bound in (lo, hi):
        assert (bound.diff(dim=1) >= 0).all()
    before = torch.cat([torch.zeros_like(hi[:, :1]), hi[:, :-1]], 1)
    empty = hi == lo
    assert (lo <= hi).all()
    assert torch.equal(hi[empty], before[empty]), "an empty row repeats the previous hi"


@pytest.mark.parametrize("name", TERMS)
def test_packed_documents_see_what_each_sees_alone(name: str) -> None:
    @given(TERMS[name], st.integers(1, 30).flatmap(boundaries))
    def check(term: Term, cu_seqlens: tuple[int, ...]) -> None:
        mask, _ = term
        packed = seen(mask & Documents(cu_seqlens), cu_seqlens[-1])[0]
        alone = [seen(mask, b - a)[0] for a, b in pairwise(cu_seqlens)]
        assert torch.equal(packed, torch.block_diag(*(x.int() for x in alone)).bool())

    check()


@pytest.mark.parametrize("name", TERMS)
def test_cross_documents_see_what_each_sees_alone(name: str) -> None:
    lengths = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4)

    @given(TERMS[name], lengths)
    def check(term: Term, documents: list[tuple[int, int]]) -> None:
        mask, _ = term
        cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in zip(*documents, strict=True))
        packed = seen(mask & Documents(cu_q, cu_k), int(cu_q[-1]), int(cu_k[-1]))[0]
        expected = torch.zeros_like(packed)
        for index, (n, m) in enumerate(documents):
            if n and m:
                rows, keys = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
                expected[rows, keys] = seen(mask, n, m)[0]
        assert torch.equal(packed, expected)

    check()


@given(st.lists(terms, min_size=2, max_size=4), st.integers(1, 15).flatmap(boundaries), st.randoms())
def test_and_is_associative_and_commutative(parts: list[Term], cu_seqlens: tuple[int, ...], random) -> None:
    masks = [mask for mask, _ in parts] + [Documents(cu_seqlens)]
    left, right = masks[0], masks[-1]
    for mask in masks[1:]:
        left = left & mask
    for mask in reversed(masks[:-1]):
        right = mask & right
    shuffled = masks[0]
    random.shuffle(masks)
    shuffled = masks[0]
    for mask in masks[1:]:
        shuffled = shuffled & mask
    length = cu_seqlens[-1]
    assert left == right
    assert torch.equal(seen(left, length), seen(shuffled, length))


@given(st.integers(1, 20).flatmap(lambda length: st.tuples(boundaries(length), boundaries(length))))
def test_documents_and_documents_part_where_either_does(both: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    one, other = (Documents(cu_seqlens) for cu_seqlens in both)
    refined = (Causal() & one & other).documents
    assert refined == Documents(sorted({*both[0], *both[1]}))
    # Block-diagonal in both; the other masks then count from the refined documents' beginnings.
    length = both[0][-1]
    assert torch.equal(seen(one & other, length), seen(one, length) & seen(other, length))


def test_documents_and_documents_of_batch_rows() -> None:
    rows = Documents([[0, 2, 6], [0, 3, 6]]) & Documents([0, 5, 6])
    assert rows.documents == Documents([[0, 2, 5, 6], [0, 3, 5, 6]])


@pytest.mark.parametrize(
    ("mask", "same_as"),
    [
        (SlidingWindow(-1, 0), Causal()),
        (SlidingWindow(-1, -1), Full()),
        (SlidingWindow(-1, 20), Full()),
        (PrefixLM(0), Causal()),
        (PrefixLM(99), Full()),
        (Chunked(20), Full()),
        (Documents([0, 12]), Full()),
        (Documents([0, 5, 10, 12]), Chunked(5)),
        (Causal() & Full(), Causal()),
    ],
    ids=str,
)
def test_masks_that_are_the_same(mask: Mask, same_as: Mask) -> None:
    assert torch.equal(seen(mask, 12), seen(same_as, 12))


def test_boundaries_come_in_any_form() -> None:
    rows = [[0, 3, 8], [0, 8]]
    as_tensors = Documents([torch.tensor(row) for row in rows])
    assert Documents(rows) == Documents(tuple(map(tuple, rows))) == as_tensors
    assert Documents([0, 3, 8]) == Documents(torch.tensor([0, 3, 8], dtype=torch.int32)) == Documents([[0, 3, 8]])
    assert Documents(torch.tensor([[0, 3, 8], [0, 4, 8]])) == Documents([[0, 3, 8], [0, 4, 8]])


def test_equal_masks_are_one_key() -> None:
    def make() -> list[Mask]:
        return [Full(), Causal(), SlidingWindow(3), SlidingWindow(3, 1), PrefixLM(3), Chunked(3), Documents([0, 3]),
                Documents([0, 3], [0, 4]), Causal() & Chunked(3), Causal() & Documents([0, 3])]  # fmt: skip

    assert len({*make(), *make()}) == len(make())
    contents = [repr(mask.content) for mask in make()]
    assert len(set(contents)) == len(contents), "what tells ranks' masks apart"
    assert contents == [repr(mask.content) for mask in make()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(-2), r"SlidingWindow\(left=\): got -2, expected an integer >= -1; -1 means unlimited"),
        (lambda: SlidingWindow(3, 1.5), r"SlidingWindow\(right=\): got 1.5"),
        (lambda: PrefixLM(True), r"PrefixLM\(prefix=\): got True"),
        (lambda: Chunked(0), r"Chunked\(size=\): got 0, expected an integer >= 1"),
        (lambda: Documents([]), "got cu_seqlens=\\[\\], expected"),
        (lambda: Documents([0]), "batch row 0 is \\[0\\], expected integers that start at 0"),
        (lambda: Documents([1, 5]), "start at 0"),
        (lambda: Documents([0, 2.5, 5]), "expected integers"),
        (lambda: Documents([[0, 5], [0, 3, 3, 5]]), "batch row 1 goes from 3 to 3, expected increasing"),
        (lambda: Documents([0, 4, 3]), "goes from 4 to 3"),
        (lambda: Documents([0, 4, 4], [0, 4, 3]), "cu_seqlens_k of batch row 0 goes from 4 to 3"),
        (lambda: Documents([0, 4], [0, 2, 4]), r"got \[1\] documents of queries and \[2\] of keys"),
        (lambda: (Documents([0, 4], [0, 3]) & Documents([0, 4])).documents, "expected self-attention boundaries"),
        (lambda: (Documents([[0, 4]] * 2) & Documents([[0, 4]] * 3)).documents, "got 2 and 3 batch rows"),
        (lambda: Documents([[0, 9], [0, 4]]).check(9, 9), "cu_seqlens of batch row 1 ends at 4, expected 9"),
        (lambda: (Causal() & Documents([0, 9], [0, 4])).check(9, 5), "cu_seqlens_k of batch row 0 ends at 4"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_only_masks_intersect() -> None:
    with pytest.raises(TypeError):
        Causal() & 3
