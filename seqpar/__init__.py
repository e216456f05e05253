"""seqpar: attention over sequences that are split over ranks; exact, and over ``torch.distributed``."""

from .cache import KVCache
from .functional import AttentionOutput, attention, attention_with_lse, token_mean
from .layouts import Layout
from .masks import Causal, Chunked, Documents, Full, Mask, PrefixLM, SlidingWindow
from .operators import checkpoint_context
from .planning import Plan, plan
from .rates import Rates
from .schedules import AllGather, Auto, DoubleRing, Ring, Tree, Ulysses
from .sparse import PerHead, SinkWindow, SparselySharded

__all__ = [
    "AllGather",
    "AttentionOutput",
    "Auto",
    "Causal",
    "Chunked",
    "Documents",
    "DoubleRing",
    "Full",
    "KVCache",
    "Layout",
    "Mask",
    "PerHead",
    "Plan",
    "PrefixLM",
    "Rates",
    "Ring",
    "SinkWindow",
    "SlidingWindow",
    "SparselySharded",
    "Tree",
    "Ulysses",
    "attention",
    "attention_with_lse",
    "checkpoint_context",
    "plan",
    "token_mean",
]
__version__ = "0.1.0"
