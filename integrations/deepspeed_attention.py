"""DeepSpeed's `DistributedAttention`, computed by seqpar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import seqpar

from .options import AttentionOptions
from .sharing import SharedPlans


class DistributedAttention(nn.Module):
    """In place of `deepspeed.sequence.layer.DistributedAttention`: exact attention over all ranks' tokens.

    local_attention: who attends to whom, as a `seqpar.Mask` or `AttentionOptions`; causal for None. (DeepSpeed calls
    it on all tokens and some heads; here it is never called, and so no module.) sequence_process_group: as DeepSpeed's
    `mpu.get_sequence_parallel_group()`. Ranks hold the sequence in order, as many tokens each. Heads may be any number.
    """

    def __init__(
        self,
        local_attention: seqpar.Mask | AttentionOptions | None,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        """scatter_idx: 2, the heads; gather_idx: 0 or 1, the tokens. Raises ValueError for what is not supported."""
        super().__init__()
        mask: seqpar.Mask | None
        if isinstance(local_attention, seqpar.Mask):
            mask, options = local_attention, AttentionOptions()
        elif local_attention is None or isinstance(local_attention, AttentionOptions):
            mask, options = None, local_attention or AttentionOptions()
        else:
            raise ValueError(
                f"local_attention: got {type(local_attention).__name__}, expected None for causal attention, a mask "
                "such as seqpar.SlidingWindow(1023), or AttentionOptions; it is not called, so say what it does"
            )
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise ValueError(
                f"scatter_idx, gather_idx: got {scatter_idx}, {gather_idx}, expected 2 (heads) and 0 or 1 (tokens)"
            )
        if sp_stream is not None:
            raise ValueError("sp_stream: got a stream, expected None; transfers overlap without one")
        if options.s2_dense_layers:
            raise ValueError(
                f"s2_dense_layers: got {options.s2_dense_layers}, expected none; give those layers seqpar.Causal()"
            )
        self._mask, self._options, self._kv_heads = mask, options, num_kv_heads
        self._team = ("DistributedAttention", self._mask, options)
        self._shared = SharedPlans.of(sequence_process_group)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """query [B, T, H, D], key [B, T, Hkv, D], value [B, T, Hkv, Dv] -> [B, T, H, Dv], this rank's T tokens.

        With batch_dim_idx 1 all of them are [T, B, ...]. Raises ValueError for anything else that DeepSpeed would hand
        on to the local attention.
        """
        leads = self._shared.leads(self, self._team)
        try:
            given = {"rotary_pos_emb": rotary_pos_emb, "further arguments": args or None, **kwargs}
            for name, got in given.items():
                if got is not None:
                    raise ValueError(
                        f"{name}: got {type(got).__name__}, expected none; a mask belongs in local_attention"
                    )
            if batch_dim_idx not in (0, 1) or any(x.dim() != 4 for x in (query, key, value)):
                shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
                raise ValueError(
                    f"query, key, value: got {shapes} and batch_dim_idx {batch_dim_idx}, expected 4 dims each, "
                    "[batch, tokens, heads, head_dim] for 0 and [tokens, batch, heads, head_dim] for 1"
                )
            if self._kv_heads not in (None, key.shape[2]):
                raise ValueError(
                    f"num_kv_heads: got {self._kv_heads} and keys of {key.shape[2]} heads, expected as many"
                )
        except ValueError as error:
            self._shared.refuse(leads, error)
        q, k, v = (x.transpose(0, batch_dim_idx) for x in (query, key, value))
        heads, ranks = (q.shape[2], k.shape[2]), self._shared.world.size
        plan = self._shared.plan(
            leads, self._options.layer_mask(0, heads[1]) if self._mask is None else self._mask,
            length=ranks * q.shape[1], kv_length=ranks * k.shape[1], layout="contiguous",
            schedule=self._options.schedule_object, heads=heads, head_dim=(q.shape[3], v.shape[3]), dtype=_dtype(q),
        )  # fmt: skip
        return seqpar.attention(q, k, v, plan, kernel=self._options.kernel).transpose(0, batch_dim_idx)


def _dtype(q: Tensor) -> torch.dtype:
    """What q is cast to under autocast, or its own."""
    device = q.device.type
    casts = torch.is_autocast_enabled(device) and q.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else q.dtype
