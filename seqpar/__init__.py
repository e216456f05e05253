"""seqpar: attention over sequences that are split over ranks; exact, and over ``torch.distributed``."""

from .functional import AttentionOutput, attention, attention_with_lse, token_mean
from .layouts import Layout
from .masks import Causal, Chunked, Documents, Full, Mask, PrefixLM, SlidingWindow
from .operators import checkpoint_context
from .planning import Plan, plan
from .rates import Rates
from .schedules import AllGather, Auto, DoubleRing, Ring, Ulysses

__all__ = [
    "AllGather",
    "AttentionOutput",
    "Auto",
    "Causal",
    "Chunked",
    "Documents",
    "DoubleRing",
    "Full",
    "Layout",
    "Mask",
    "Plan",
    "PrefixLM",
    "Rates",
    "Ring",
    "SlidingWindow",
    "Ulysses",
    "attention",
    "attention_with_lse",
    "checkpoint_context",
    "plan",
    "token_mean",
]
__version__ = "0.1.0"
