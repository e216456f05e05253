"""Packed batches as Megatron describes them: documents and the padding after each, dealt document by document."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import seqpar
from seqpar.comm import World
from seqpar.layouts import resolve_layout

from .sharing import bounds_of

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def packed_documents(packed: PackedSeqParams, length: int, ranks: int) -> tuple[seqpar.Documents, seqpar.Layout]:
    """The documents of a packed batch of `length` tokens, and who holds them. Raises ValueError for what can't be."""
    lengths = bounds_of(packed.cu_seqlens_q)
    begins = lengths if packed.cu_seqlens_q_padded is None else bounds_of(packed.cu_seqlens_q_padded)
    for keys, own in ((packed.cu_seqlens_kv, lengths), (packed.cu_seqlens_kv_padded, begins)):
        if keys is not None and bounds_of(keys) != own:
            raise refusal("other cu_seqlens of keys than of queries", "the same")
    if begins[-1] != length:
        raise refusal(f"cu_seqlens up to {begins[-1]} for {length} tokens on {ranks} ranks", "documents of them all")
    uneven = [end - begin for begin, end in pairwise(begins) if ranks > 1 and (end - begin) % (2 * ranks)]
    if uneven:
        raise refusal(
            f"a document of {uneven[0]} tokens", f"a multiple of {2 * ranks}, a chunk from either end; pad it"
        )
    own, places = ([end - begin for begin, end in pairwise(bounds)] for bounds in (lengths, begins))
    if len(own) != len(places) or any(not 0 <= n <= place for n, place in zip(own, places, strict=False)):
        got = f"documents of {own[:4]} tokens in places of {places[:4]}"
        raise refusal(got, "one document in each place of cu_seqlens_q_padded, no longer than it")
    return padded_documents(lengths, begins), zigzag_by_document(tuple(dict.fromkeys(begins)), ranks)


def padded_documents(lengths: Sequence[int], begins: Sequence[int]) -> seqpar.Documents:
    """Documents of which each fills the first tokens of its place; what is left of a place is a document of its own.

    lengths: cumulative lengths of the documents, [0, ...]. begins: where their places begin, and where the last ends.
    """
    ends = [begin + last - first for begin, (first, last) in zip(begins[:-1], pairwise(lengths), strict=True)]
    return seqpar.Documents(sorted({*begins, *ends}))


@lru_cache(maxsize=32)
def zigzag_by_document(begins: tuple[int, ...], ranks: int) -> seqpar.Layout:
    """Every document in 2 * ranks chunks, of which each rank has one from either end: how Megatron deals tokens."""
    length = begins[-1]
    return resolve_layout("document_zigzag", seqpar.Documents(begins), length, length, ranks)


def check_causal(attention_mask: Tensor, length: int, world: World) -> None:
    """Raise ValueError for a mask [B, 1, S/CP, S] (True: not seen) that hides anything else than later tokens."""
    device = attention_mask.device
    here = zigzag_by_document((0, length), world.size).queries[world.rank].tensor.to(device)
    hidden = torch.arange(length, device=device) > here[:, None]
    shape = tuple(attention_mask.shape)
    if shape[-2:] != hidden.shape or bool((attention_mask != hidden).any()):
        got = f"an attention_mask of {shape} that is not the causal one of {length} tokens"
        raise refusal(got, "none: pack documents (THD) instead, and drop --reset-attention-mask")


def refusal(got: str, expected: str) -> ValueError:
    """The error of attention that isn't computed."""
    return ValueError(f"seqpar attention got {got}, expected {expected}")
