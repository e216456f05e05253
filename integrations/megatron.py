"""seqpar's attention inside Megatron: context parallelism by any schedule and mask, on its own groups and batches.

    torchrun ... --no-python seqpar megatron pretrain_gpt.py <Megatron's own arguments> --seqpar-schedule ring

runs a Megatron-LM script as it is. Who starts it otherwise adds `--spec seqpar.integrations.megatron layer`, and
`extra_args_provider=add_arguments` for the flags; who builds a model, `GPTModel(config, layer_spec(options), ...)`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

import seqpar

from .options import AttentionOptions, add_arguments, options_of, share_of_heads
from .packing import check_causal, packed_documents, refusal
from .sharing import SharedPlans
from .supported import require

__all__ = ["CoreAttention", "Layer", "add_arguments", "layer", "layer_spec", "options_of"]

TESTED = "0.16", "0.20"  # versions of Megatron-Core, from the first on and below the second

_SCHEDULE_OF = {"p2p": "ring", "allgather": "allgather", "a2a": "ulysses", "a2a+p2p": "hybrid"}
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_FULL = (AttnMaskType.no_mask, AttnMaskType.padding)
# What a configuration may ask of attention and we don't compute: each with the value that asks for nothing.
_NOT_COMPUTED = {
    "qk_clip": False,
    "log_max_attention_logit": False,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "experimental_attention_variant": None,
    "heterogeneous_block_specs": False,
    "mtp_num_layers": None,
}


def check_version() -> None:
    """Raise ValueError for a Megatron-Core that we haven't been tested with."""
    require("megatron-core", *TESTED, got=megatron.core.__version__)


def layer_spec(options: AttentionOptions | None = None) -> ModuleSpec:
    """A layer for `GPTModel(transformer_layer_spec=...)` with our attention, and otherwise as Megatron's own.

    options: by default what Megatron-LM's arguments say, or the defaults where there is no Megatron-LM.
    """
    return ModuleSpec(module=Layer, params={"options": options})


class Layer(TransformerLayer):
    """A transformer layer of whatever kind the configuration asks for, with our attention in it."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        options: AttentionOptions | None = None,
        **others: Any,
    ) -> None:
        check_version()
        options = _told() if options is None else options
        groups = others.get("pg_collection")
        stage = groups.pp.rank() if groups else parallel_state.get_pipeline_model_parallel_rank()
        number = layer_number - 1 + get_transformer_layer_offset(config, others.get("vp_stage"), stage)
        te = gpt_layer_specs.HAVE_TE and config.transformer_impl == "transformer_engine"
        theirs = gpt_layer_specs.get_gpt_decoder_layer_specs(config, te, config.normalization, config.qk_l2_norm)
        layer = theirs[number].submodules
        core = ModuleSpec(module=CoreAttention, params={"options": options})
        ours = dataclasses.replace(layer.self_attention.submodules, core_attention=core)
        attention = dataclasses.replace(layer.self_attention, submodules=ours)
        options.layer_masks(config.num_layers, config.num_query_groups)  # whether they fit the model
        if options.mask == "s2" and config.num_query_groups < config.tensor_model_parallel_size:
            raise refusal(f"mask s2 and {config.num_query_groups} query groups", "one or more for each of TP's ranks")
        layer = dataclasses.replace(layer, self_attention=attention)
        super().__init__(config, layer, layer_number, **others)


layer = layer_spec()
"""For `--spec seqpar.integrations.megatron layer`."""


class CoreAttention(MegatronModule):
    """Attention over the context-parallel group: the `core_attention` of a layer spec, instead of Megatron's.

    Tokens lie as Megatron deals them: sequence [S] or, packed, each document, in 2 * CP chunks of which rank r has the
    r-th from either end. Raises ValueError, on every rank, for what it does not compute.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None, cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None, *, options: AttentionOptions | None = None,
        k_channels: int | None = None, v_channels: int | None = None,  # which the tensors say, too
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        options = _told() if options is None else options
        self.layer, self.attn_mask_type, self.softmax_scale = max(1, layer_number) - 1, attn_mask_type, softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        asked = {"attention_dropout": (dropout, 0), "attention_type": (attention_type, "self")}
        asked |= {name: (getattr(config, name, nothing), nothing) for name, nothing in _NOT_COMPUTED.items()}
        for name, (got, computed) in asked.items():
            if got != computed:
                raise refusal(f"{name}={got!r}", f"{computed!r}; it computes no other")
        self.options = dataclasses.replace(options, **_schedule(options, cp_comm_type, config))
        self.window = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size
            if options.mask != "causal":
                raise refusal(f"window_size={config.window_size} and mask {options.mask}", "one of them")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.tp_group = groups.tp
        self.plans = self._plans = SharedPlans.of(groups.cp if config.context_parallel_size > 1 else None)
        self.team = id(config), self.options, self.window, self.layer in options.s2_dense_layers
        self._make_offsets(config)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # fmt: skip
        """query [S/CP, B, H, D], key [S/CP, B, Hkv, D], value [S/CP, B, Hkv, Dv] -> [S/CP, B, H * Dv].

        Packed (THD): [T/CP, H, D] and so on -> [T/CP, H * Dv]; padding at documents' ends is kept apart from them.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        self.plans = self._plans_of(packed_seq_params)
        q, k, v = (x.unsqueeze(0) if packed else x.transpose(0, 1) for x in (query, key, value))
        if attention_bias is not None:
            raise refusal("an attention_bias", "none")
        kind, documents = attn_mask_type or self.attn_mask_type, packed_seq_params if packed else None
        plan = self._plan(q, k, v, attention_mask, kind, documents)
        out = seqpar.attention(
            q, k, v, plan, scale=self.softmax_scale, sinks=self.softmax_offset, kernel=self.options.kernel
        ).flatten(2)
        return out[0] if packed else out.transpose(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The learnable softmax offset, of which each tensor-parallel rank has its heads'."""
        learnt = self.state_dict(prefix="", keep_vars=True) if self.config.softmax_type == "learnable" else {}
        return make_sharded_tensors_for_checkpoint(
            learnt, prefix, {"softmax_offset": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )  # fmt: skip

    def _plans_of(self, batch: PackedSeqParams | None) -> SharedPlans:
        """Over the context-parallel group, unless the batch brings a group of its own, or says that it goes without."""
        if batch is None or not (batch.cp_group or batch.local_cp_size):
            return self._plans
        if batch.cp_group is None and batch.local_cp_size != 1:
            raise refusal(f"local_cp_size {batch.local_cp_size} without a cp_group", "both, or a size of 1")
        return SharedPlans.of(batch.cp_group)

    def _plan(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, kind: AttnMaskType, packed: PackedSeqParams | None
    ) -> seqpar.Plan:
        ranks, heads = self.plans.world.size, (q.shape[2], k.shape[2])
        length, leads = q.shape[1] * ranks, self.plans.leads(self, self.team)
        layout: str | seqpar.Layout = "zigzag"
        try:
            mask = self._mask(kind, length, heads[1])
            if k.shape[1] != q.shape[1]:
                raise refusal(f"{q.shape[1]} queries and {k.shape[1]} keys", "as many: it trains, and caches nothing")
            if packed is not None:
                documents, layout = packed_documents(packed, length, ranks)
                mask = mask & documents
            elif ranks > 1 and q.shape[1] % 2:
                raise refusal(f"{q.shape[1]} tokens on each of {ranks} ranks", "as many from either end of all")
            if hidden is not None and kind not in _CAUSAL:
                raise refusal(f"an attention_mask and attn_mask_type {kind.name}", "no mask: pack documents (THD)")
            if hidden is not None and leads:
                check_causal(hidden, length, self.plans.world)
        except ValueError as error:
            self.plans.refuse(leads, error)
        how = {"length": length, "layout": layout, "schedule": self.options.schedule_object}
        return self.plans.plan(leads, mask, **how, heads=heads, head_dim=(q.shape[3], v.shape[3]), dtype=q.dtype)

    def _mask(self, kind: AttnMaskType, length: int, kv_heads: int) -> seqpar.Mask:
        """Inside a document, by the type that Megatron names and the options."""
        causal, chosen = kind in _CAUSAL, self.options.mask
        if not causal and kind not in _FULL:
            raise refusal(f"attn_mask_type {kind.name}", ", ".join(known.name for known in (*_CAUSAL, *_FULL)))
        if (chosen == "full") if causal else (chosen not in ("causal", "full")):
            raise refusal(f"attn_mask_type {kind.name} and mask {chosen}", "one that is as causal; drop --seqpar-mask")
        if self.window is not None:
            left, right = (length if side < 0 else side for side in self.window)
            return seqpar.SlidingWindow(left, 0 if causal else right)
        if not causal:
            return seqpar.Full()
        everyone, tp = self.config.num_query_groups, self.tp_group
        mask = self.options.layer_mask(self.layer, everyone)
        return mask if kv_heads == everyone else share_of_heads(mask, everyone, tp.rank(), tp.size(), length)

    def _make_offsets(self, config: TransformerConfig) -> None:
        """The softmax offset of each of this rank's heads: none, zeros, or learnt."""
        self.softmax_offset: Tensor | None = None
        if config.softmax_type == "vanilla":
            return
        heads = config.num_attention_heads // self.tp_group.size()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        offsets = torch.zeros(heads, dtype=config.params_dtype, device=device)
        if config.softmax_type == "learnable":
            offsets = torch.nn.Parameter(offsets)
            if config.perform_initialization:
                config.init_method(offsets.data)
            tensor_parallel.set_tensor_model_parallel_attributes(offsets, is_parallel=True, dim=0, stride=1)
        self.softmax_offset = offsets


def _told() -> AttentionOptions:
    """What Megatron-LM's arguments say, where it runs."""
    megatron_lm = sys.modules.get("megatron.training")
    return AttentionOptions() if megatron_lm is None else options_of(megatron_lm.get_args())


def _schedule(options: AttentionOptions, told: str | None, config: TransformerConfig) -> dict[str, Any]:
    """The schedule and its degree, where Megatron's `--cp-comm-type` and hierarchical sizes say them."""
    theirs = _SCHEDULE_OF.get((told or "p2p").replace("_", ""))
    if theirs is None:
        raise refusal(f"cp_comm_type {told!r}", f"one of {', '.join(_SCHEDULE_OF)}")
    if options.schedule not in (None, theirs) and theirs != "ring":  # which is what Megatron says if it is not asked
        raise refusal(f"--seqpar-schedule {options.schedule} and --cp-comm-type {told}", "one of them, or the same")
    schedule, degree = options.schedule or theirs, options.degree
    if schedule in ("double_ring", "hybrid") and degree is None:
        sizes = config.hierarchical_context_parallel_sizes
        if not sizes or len(sizes) != 2:
            raise refusal(f"schedule {schedule}, sizes {sizes}", "--hierarchical-context-parallel-sizes INSIDE NODES")
        degree = sizes[0]
    return {"schedule": schedule, "degree": degree}
