"""Packed batches as frameworks describe them: documents and the padding after each, dealt document by document."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import seqpar
from seqpar.layouts import resolve_layout


def padded_documents(lengths: Sequence[int], begins: Sequence[int]) -> seqpar.Documents:
    """Documents of which each fills the first tokens of its place; what is left of a place is a document of its own.

    lengths: cumulative lengths of the documents, [0, ...]. begins: where their places begin, and where the last ends.
    """
    ends = [begin + last - first for begin, (first, last) in zip(begins, pairwise(lengths), strict=False)]
    return seqpar.Documents(sorted({*begins, *ends}))


@lru_cache(maxsize=32)
def zigzag_by_document(begins: tuple[int, ...], ranks: int) -> seqpar.Layout:
    """Every document in 2 * ranks chunks, of which each rank has one from either end: how Megatron deals tokens."""
    length = begins[-1]
    return resolve_layout("document_zigzag", seqpar.Documents(begins), length, length, ranks)
