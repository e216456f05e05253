"""Functions with the names and signatures of the `ring-flash-attn` package: moving over is changing one import.

    from seqpar.integrations.flash_attn import zigzag_ring_flash_attn_func

Every rank calls them with its own T tokens, as many as the others: `q [B, T, H, D]` and `k, v [B, T, Hkv, D]`, without
B in the `varlen` functions. Names say which tokens of the P ranks' those are, in order:

- `ring_...`: contiguous ones. `ring_..._varlen_...`: of every document a contiguous share.
- `zigzag_ring_...`: chunks r and 2P - 1 - r of 2P equal ones. `zigzag_ring_..._varlen_...`: those of every document.
- `stripe_...`: tokens r, r + P, r + 2P, ...
- `llama3_..._varlen_...`: contiguous ones of all documents in a row, wherever those begin and end.

`..._qkvpacked_func` and `..._kvpacked_func` take one tensor with an axis of 3 or 2 before the heads.

Here, and nowhere else in seqpar, `group=None` means all ranks of the default group, or one rank where there is none.
Every call makes a plan, on which all ranks agree in small collectives: `seqpar.plan` and `seqpar.attention` do that
once for all layers of a batch, and take any lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from seqpar.comm import Group

from .local_calls import Bounds, Options, Result, attend, plan_rows, plan_shares, plan_slices, slice_documents


@dataclass(frozen=True)
class _Batched:
    """Functions of rows that ranks share in one layout."""

    layout: str

    def func(
        self, q: Tensor, k: Tensor, v: Tensor,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """Exact attention over all ranks' tokens.

        q [B, T, H, D], k and v [B, T, Hkv, D] -> out [B, T, H, D], or with return_attn_probs `(out, softmax_lse, None)`
        with softmax_lse [B, H, T] in fp32, which has a gradient too. window_size: how many keys to its left and right
        a query sees, -1 for all; causal leaves none to the right. deterministic: it always is. Raises ValueError, on
        every rank, for dropout, ALiBi slopes and softcap, and where the ranks' calls differ.
        """
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        return attend((q, k, v), options, partial(plan_rows, self.layout), 4)

    def kvpacked_func(
        self, q: Tensor, kv: Tensor,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """As `func`, from q [B, T, H, D] and kv [B, T, 2, Hkv, D]."""
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        return attend((q, kv), options, partial(plan_rows, self.layout), 4)

    def qkvpacked_func(
        self, qkv: Tensor,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """As `func`, from qkv [B, T, 3, H, D]."""
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        return attend((qkv,), options, partial(plan_rows, self.layout), 4)


@dataclass(frozen=True)
class _Varlen:
    """Functions of packed documents, each of which ranks share in one layout."""

    layout: str

    def func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Bounds, max_seqlen: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """Exact attention in packed documents, each of which all ranks share evenly.

        q [T, H, D], k and v [T, Hkv, D] -> out [T, H, D], or with return_attn_probs `(out, softmax_lse [H, T], None)`.
        cu_seqlens: bounds [0, ..., T] of the documents' shares on a rank, the whole ones divided by the number of
        ranks. max_seqlen: the longest share's tokens, or more. The rest as in the functions without documents.
        """
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        return attend((q, k, v), options, partial(plan_shares, self.layout, cu_seqlens, max_seqlen), 3)

    def kvpacked_func(
        self, q: Tensor, kv: Tensor, cu_seqlens: Bounds, max_seqlen: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """As `func`, from q [T, H, D] and kv [T, 2, Hkv, D]."""
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        return attend((q, kv), options, partial(plan_shares, self.layout, cu_seqlens, max_seqlen), 3)

    def qkvpacked_func(
        self, qkv: Tensor, cu_seqlens: Bounds, max_seqlen: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """As `func`, from qkv [T, 3, H, D]."""
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        return attend((qkv,), options, partial(plan_shares, self.layout, cu_seqlens, max_seqlen), 3)


@dataclass(frozen=True)
class _Llama3:
    """Functions of packed documents that ranks share in one row."""

    def func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Bounds, cu_seqlens_k: Bounds,
        max_seqlen_q: int, max_seqlen_k: int, heads_k_stride: int, local_k_slice: slice,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """Exact attention in packed documents, of which each rank holds the next T tokens, whatever their bounds.

        q [T, H, D], k and v [T, Hkv, D] -> out [T, H, D], or with return_attn_probs `(out, softmax_lse [H, T], None)`.
        cu_seqlens_q to max_seqlen_k and local_k_slice: as `llama3_flash_attn_prepare_cu_seqlens` returns them.
        heads_k_stride: a divisor of Hkv; it changes nothing, since only needed keys travel, rank by rank.
        """
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        given = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice
        return attend((q, k, v), options, partial(plan_slices, *given), 3)

    def kvpacked_func(
        self, q: Tensor, kv: Tensor, cu_seqlens_q: Bounds, cu_seqlens_k: Bounds,
        max_seqlen_q: int, max_seqlen_k: int, heads_k_stride: int, local_k_slice: slice,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """As `func`, from q [T, H, D] and kv [T, 2, Hkv, D]."""
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        given = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice
        return attend((q, kv), options, partial(plan_slices, *given), 3)

    def qkvpacked_func(
        self, qkv: Tensor, cu_seqlens_q: Bounds, cu_seqlens_k: Bounds,
        max_seqlen_q: int, max_seqlen_k: int, heads_k_stride: int, local_k_slice: slice,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group = None, *, softcap: float = 0.0,
    ) -> Result:  # fmt: skip
        """As `func`, from qkv [T, 3, H, D]."""
        options = Options(
            dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_attn_probs, group, softcap
        )
        given = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice
        return attend((qkv,), options, partial(plan_slices, *given), 3)


llama3_flash_attn_prepare_cu_seqlens = slice_documents

_ring, _zigzag, _stripe = _Batched("contiguous"), _Batched("zigzag"), _Batched("striped")
_ring_varlen, _zigzag_varlen, _llama3 = _Varlen("contiguous"), _Varlen("document_zigzag"), _Llama3()

ring_flash_attn_func = _ring.func
ring_flash_attn_kvpacked_func = _ring.kvpacked_func
ring_flash_attn_qkvpacked_func = _ring.qkvpacked_func
zigzag_ring_flash_attn_func = _zigzag.func
zigzag_ring_flash_attn_kvpacked_func = _zigzag.kvpacked_func
zigzag_ring_flash_attn_qkvpacked_func = _zigzag.qkvpacked_func
stripe_flash_attn_func = _stripe.func
stripe_flash_attn_kvpacked_func = _stripe.kvpacked_func
stripe_flash_attn_qkvpacked_func = _stripe.qkvpacked_func
ring_flash_attn_varlen_func = _ring_varlen.func
ring_flash_attn_varlen_kvpacked_func = _ring_varlen.kvpacked_func
ring_flash_attn_varlen_qkvpacked_func = _ring_varlen.qkvpacked_func
zigzag_ring_flash_attn_varlen_func = _zigzag_varlen.func
zigzag_ring_flash_attn_varlen_kvpacked_func = _zigzag_varlen.kvpacked_func
zigzag_ring_flash_attn_varlen_qkvpacked_func = _zigzag_varlen.qkvpacked_func
llama3_flash_attn_varlen_func = _llama3.func
llama3_flash_attn_varlen_kvpacked_func = _llama3.kvpacked_func
llama3_flash_attn_varlen_qkvpacked_func = _llama3.qkvpacked_func
