"""Which heads each rank gets when tokens are traded for heads."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import gcd
from typing import NamedTuple


class Hands(NamedTuple):
    """Which heads each rank of a group gets: query heads in order, and the KV heads that they read.

    Attributes:
        queries, keys: a slice of the query heads, and of the KV heads, for each rank.
        repeats: for each rank, how often each of its KV heads must be there for kernels, which want every one to have
            the same number of query heads.
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    repeats: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=64)
def deal_heads(heads: int, kv_heads: int, ranks: int) -> Hands:
    """Deal heads to ranks, as evenly as their numbers allow; a rank gets none where there are fewer than ranks."""
    group = heads // kv_heads
    queries, keys, repeats = [], [], []
    for first, last in pairwise(rank * heads // ranks for rank in range(ranks + 1)):
        low, high = first // group, -(-last // group) if last > first else first // group
        readers = [min(last, (kv + 1) * group) - max(first, kv * group) for kv in range(low, high)]
        common = gcd(*readers)
        queries.append(slice(first, last))
        keys.append(slice(low, high))
        repeats.append(tuple(count // common for count in readers))
    return Hands(tuple(queries), tuple(keys), tuple(repeats))
