"""Megatron-Core's GPTModel as it is, on the CPU over gloo: with our attention on several ranks, with its own on one.

Megatron takes some things for granted that only a GPU has: `on_cpu` takes them away, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seqpar.comm import World

from .oracle import dense_attention, error

VOCABULARY, HIDDEN = 64, 48


class _Cpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU lie in plain memory."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Megatron's assumptions of a GPU, taken away."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention

    @contextlib.contextmanager
    def fork(*_: Any) -> Iterator[None]:
        yield

    tracker = mock.Mock(fork=fork, get_states=dict, is_initialized=lambda: False)
    with (
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch("torch.cuda.synchronize"),
        _Cpu(),
        # Without TransformerEngine this module takes it for installed and its classes for None.
        mock.patch.object(multi_latent_attention, "HAVE_TE", False),
        mock.patch.object(random, "_get_cuda_rng_state", return_value=torch.zeros(1)),
        mock.patch.object(random, "_set_cuda_rng_state"),
        mock.patch.object(random, "get_cuda_rng_tracker", return_value=tracker),
        mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", return_value=tracker),
    ):
        logging.disable(logging.WARNING)
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is parallel, and its batch.

    config: of the TransformerConfig, besides the sizes below. options: of AttentionOptions. lengths: documents of a
    packed batch, each padded to `pad` tokens; else rows of `length` tokens. mask: [H|1, S, S] bool, True where a query
    sees, for Megatron's own attention.
    """

    name: str
    tp: int = 1
    pp: int = 1
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    mask: Callable[[int], Tensor] | None = None
    mla: bool = False
    steps: int = 1


LENGTH, ROWS, PAD = 48, 2, 16


def chunks(length: int) -> Tensor:
    """Causal inside chunks of 10 tokens."""
    token = torch.arange(length)
    return ((token[:, None] // 10 == token // 10) & (token[:, None] >= token))[None]


def sparse(length: int) -> Tensor:
    """Blocks of 16: a query head sees its own block, and of older ones every other, by its KV head of two."""
    token = torch.arange(length)
    query, key = token[:, None] // 16, token // 16
    heads = [(query == key) | (key % 2 == kv_head) for kv_head in (0, 0, 1, 1)]
    return torch.stack(heads) & (token[:, None] >= token)


_S2 = {"mask": "s2", "s2_block": 16, "s2_local": 1}
_WINDOW = {"window_size": (6, 0), "window_attn_skip_freq": 2}
_RECOMPUTE = {"recompute_granularity": "selective"}
_ALL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12}
DOCUMENTS = (16, 9, 13, 1, 16)
CASES = {
    case.name: case
    for case in (
        Case("causal", steps=10),
        Case("packed", lengths=DOCUMENTS, steps=10),
        Case("window and sinks", config={**_WINDOW, "softmax_type": "learnable", "softmax_scale": 0.4}, steps=2),
        Case("off by one", config={"softmax_type": "off-by-one"}),
        Case("chunked", options={"mask": "chunked", "chunk": 10}, mask=chunks),
        Case("s2", options=_S2, mask=sparse),
        Case("allgather", config={"cp_comm_type": "allgather"}),
        Case("ulysses", config={"cp_comm_type": "a2a"}),
        Case("auto", options={"schedule": "auto"}),
        Case("recompute attention", config=_RECOMPUTE),
        Case("recompute packed", config=_ALL, lengths=DOCUMENTS),
        Case("mla", config=_MLA, mla=True),
        Case("mla packed", config=_MLA | _RECOMPUTE, mla=True, lengths=DOCUMENTS),
        Case("hierarchical", config={"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}),
        Case(
            "double ring", config={"hierarchical_context_parallel_sizes": [2, 2]}, options={"schedule": "double_ring"}
        ),
        Case("tp", tp=2, config={"softmax_type": "learnable"}, steps=2),
        Case("tp s2", tp=2, options=_S2, mask=sparse),
        Case("pp", pp=2, lengths=DOCUMENTS, steps=2),
    )
}


def config_of(case: Case, **parallel: Any) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if case.mla else TransformerConfig
    return kind(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "num_query_groups": 2 if not case.mla else None,
            "ffn_hidden_size": 96,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bias_dropout_fusion": False,
            "use_cpu_initialization": True,
            "transformer_impl": "local",
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            **case.config,
            **parallel,
        }
    )


def build(case: Case, config: Any, spec: Any) -> nn.Module:
    """The model, every weight from its name alone, whatever part of it this rank has."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in named(model):
        split = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = [size * tp if dim == split else size for dim, size in enumerate(parameter.shape)]
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        whole = 1 + 0.1 * whole if "norm" in name else whole * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        parameter.data.copy_(whole.chunk(tp, split)[rank] if split >= 0 else whole)
    return model


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that they have without pipeline stages."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        yield ".".join(parts), parameter


def batch_of(step: int, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels [B, S] and which labels count; of documents one row, each from a multiple of PAD on."""
    generator = torch.Generator().manual_seed(step)
    rows, length = (1, PAD * len(case.lengths)) if case.lengths else (ROWS, LENGTH)
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    counts = torch.ones(rows, length)
    for number, filled in enumerate(case.lengths):
        counts[:, PAD * number + filled : PAD * (number + 1)] = 0
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), counts


def reference(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and the first step's gradients with Megatron's own attention, unsharded; document by document."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    config = config_of(case)
    spec = get_gpt_layer_local_spec(multi_latent_attention=case.mla, normalization="RMSNorm")
    if case.mla:
        spec.submodules.self_attention.submodules.core_attention = _latent_attention()
    model = build(case, config, spec)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses, first = [], {}
    for step in range(case.steps):
        tokens, labels, counts = batch_of(step, case)
        spans = [(PAD * n, PAD * n + filled) for n, filled in enumerate(case.lengths)] or [(0, tokens.shape[1])]
        total = 0.0
        for begin, end in spans:
            part = slice(begin, end)
            hidden = None if case.mask is None else ~case.mask(end - begin)[None]
            loss = model(tokens[:, part], positions(tokens[:, part]), hidden, labels=labels[:, part])
            loss = (loss * counts[:, part]).sum() / counts.sum()
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        first = first or {name: p.grad.clone() for name, p in named(model) if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def _latent_attention() -> type[nn.Module]:
    """Megatron's own attention, which knows no head dimensions of latent attention."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Latent(DotProductAttention):
        def __init__(self, config: Any, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.hidden_size_per_partition = config.num_attention_heads * v_channels

    return Latent


def positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]).expand(tokens.shape)


def compare(world: World, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """For each case, the largest relative error of a loss, and of a gradient, against the reference."""
    known: dict[str, Any] = {}
    with on_cpu():
        return {name: _errors(world, CASES[name], known) for name in names}


# What changes how a model is computed, and not what.
_HOW = ("recompute", "cp_comm_type", "hierarchical")


def _errors(world: World, case: Case, known: dict[str, Any]) -> tuple[float, float]:
    from megatron.core import parallel_state

    config = {name: value for name, value in case.config.items() if not name.startswith(_HOW)}
    plain = dataclasses.replace(case, config=config)
    what = repr((config, case.mask, case.lengths, case.mla, case.steps))
    if what not in known:
        known[what] = reference(plain)
    expected_losses, expected = known[what]
    losses, gradients = sharded(world, case)
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    worst = 0.0
    for name, (gradient, split) in gradients.items():
        whole = expected[name]
        worst = max(worst, error(gradient, whole.chunk(tp, split)[rank] if split >= 0 else whole))
    if case.pp == 1:
        assert gradients.keys() == expected.keys()
    wrong = max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True)) if losses else 0.0
    return wrong, worst


def sharded(world: World, case: Case) -> tuple[list[float], dict[str, tuple[Tensor, int]]]:
    """The same with our attention, on all ranks: CP as large as TP and PP leave it."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    from seqpar.integrations.megatron import layer_spec
    from seqpar.integrations.options import AttentionOptions

    cp = world.size // case.tp // case.pp
    sizes = case.config.get("hierarchical_context_parallel_sizes")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        case.tp, case.pp, context_parallel_size=cp, hierarchical_context_parallel_sizes=sizes
    )
    config = config_of(
        case,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=cp,
        pipeline_dtype=torch.float32,
    )
    model = build(case, config, layer_spec(AttentionOptions(**case.options)))
    group = parallel_state.get_context_parallel_group()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses: list[float] = []
    first: dict[str, tuple[Tensor, int]] = {}

    def forward(batches: Iterator, model: nn.Module) -> tuple[Tensor, Callable]:
        tokens, labels, counts, packed = next(batches)
        out = model(tokens, positions(tokens), None, labels=labels, packed_seq_params=packed)

        def loss_of(losses_here: Tensor) -> tuple[Tensor, dict]:
            loss = (losses_here * counts).sum()
            return loss, {"loss": loss.detach().clone()}

        return out, loss_of

    for step in range(case.steps):
        tokens, labels, counts = batch_of(step, case)
        weights = counts / counts.sum()
        packed = None
        if case.lengths:
            begins = torch.arange(0, tokens.shape[1] + 1, PAD, dtype=torch.int32)
            lengths = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
            packed = PackedSeqParams("thd", lengths, lengths, begins, begins, PAD, PAD)
            mine = _per_document(tokens.shape[1], group)
            here = {"tokens": tokens[:, mine], "labels": labels[:, mine], "weights": weights[:, mine]}
        else:
            here = get_batch_on_this_cp_rank({"tokens": tokens, "labels": labels, "weights": weights}, group)
        report = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([(here["tokens"], here["labels"], here["weights"], packed)]),
            model=[model],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=False,
        )
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= cp  # Megatron multiplies losses by it, and its gradients are averaged
        if report:
            loss = report[0]["loss"]
            dist.all_reduce(loss, group=group)
            losses.append(float(loss))
        first = first or {
            name: (p.grad.clone(), p.partition_dim if getattr(p, "tensor_model_parallel", False) else -1)
            for name, p in named(model)
        }
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def _per_document(length: int, group: dist.ProcessGroup) -> Tensor:
    """Each document in 2 * CP chunks: the tokens of the two that Megatron gives this rank."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    chunks = torch.arange(length).view(-1, 2 * ranks, PAD // (2 * ranks))
    return chunks[:, [rank, 2 * ranks - 1 - rank]].flatten()


def small(world: World) -> tuple[list[int], float, list[str]]:
    """What a small model shows besides losses and gradients."""
    return agreements(world), groups_of_batches(world), refusals(world)


def agreements(world: World) -> list[int]:
    """How often ranks agreed in each of three passes over the same batch, one of which changes its documents."""
    from megatron.core import parallel_state

    counts = []
    with on_cpu():
        model = _small(world)
        shared = model.decoder.layers[0].self_attention.core_attention.plans
        assert shared is model.decoder.layers[1].self_attention.core_attention.plans
        for lengths in ([16, 16, 16], [16, 16, 16], [8, 16, 16]):
            shared.world.meter.reset()
            _packed(model, lengths, parallel_state.get_context_parallel_group())
            counts.append(shared.world.meter.by_kind["agree"].calls)
    return counts


def groups_of_batches(world: World) -> float:
    """The largest error of batches that bring a group, or go without one, or a causal mask that says nothing new."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    with on_cpu():
        core = _small(world).decoder.layers[0].self_attention.core_attention
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(LENGTH, 2, heads, 12, generator=generator) for heads in (4, 2, 2))
        hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
        expected, _ = dense_attention(*(x.transpose(0, 1) for x in (q, k, v)), ~hidden[None, None])
        expected = expected.transpose(0, 1).flatten(2)
        alone = core(q, k, v, None, packed_seq_params=PackedSeqParams("sbhd", local_cp_size=1))
        here = torch.arange(LENGTH).view(2 * world.size, -1)[[world.rank, 2 * world.size - 1 - world.rank]].flatten()
        shard = [x[here] for x in (q, k, v)]
        group = parallel_state.get_context_parallel_group()
        grouped = core(*shard, None, packed_seq_params=PackedSeqParams("sbhd", local_cp_size=2, cp_group=group))
        masked = core(*shard, hidden[here][None, None])
    return max(error(alone, expected), error(grouped, expected[here]), error(masked, expected[here]))


def refusals(world: World) -> list[str]:
    """What every rank hears of input that is wrong on rank 1 alone."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.packed_seq_params import PackedSeqParams

    from seqpar.launch.megatron import check_models

    heard = []
    with on_cpu():
        model = _small(world)
        group = parallel_state.get_context_parallel_group()
        core = model.decoder.layers[0].self_attention.core_attention
        q, k = torch.zeros(24, 1, 4, 12), torch.zeros(24, 1, 2, 12)
        wrong = torch.zeros(1, 1, 24, 48, dtype=torch.bool) if world.rank == 1 else None
        odd = q[:23] if world.rank == 1 else q
        ends = torch.tensor([0, 16, 33 if world.rank == 1 else 32, 48])
        documents, few = PackedSeqParams("thd", ends, ends), torch.tensor([0, 16, 32, 40])
        tries: list[Callable[[], Any]] = [
            lambda: core(q[:, 0], k[:, 0], k[:, 0], None, packed_seq_params=documents),
            lambda: core(q[:, 0], k[:, 0], k[:, 0], None, packed_seq_params=PackedSeqParams("thd", few, few)),
            lambda: core(q, k, k, wrong),
            lambda: core(odd, k[: len(odd)], k[: len(odd)], None),
            lambda: core(q, k[:12], k[:12], None),
            lambda: core(q, k, k, None, attn_mask_type=_kind("arbitrary")),
            lambda: core(q, k, k, None, packed_seq_params=PackedSeqParams("sbhd", local_cp_size=2)),
            lambda: check_models([GPTModel(config_of(Case("theirs")), get_gpt_layer_local_spec(), 8, 8)]),
            lambda: check_models([model]),
        ]
        for number, attempt in enumerate(tries):
            try:
                attempt()
            except ValueError as error:
                heard.append(str(error))
            else:
                heard.append(f"nothing about {number}")
        _packed(model, [16, 16, 16], group)  # and all goes on
    return heard


def _kind(name: str) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    return AttnMaskType[name]


def _small(world: World) -> nn.Module:
    from megatron.core import parallel_state

    from seqpar.integrations.megatron import layer_spec

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=world.size)
    case = Case("small")
    return build(case, config_of(case, context_parallel_size=world.size), layer_spec())


def _packed(model: nn.Module, lengths: Sequence[int], group: dist.ProcessGroup) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    begins = torch.arange(0, PAD * len(lengths) + 1, PAD, dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, begins, begins, PAD, PAD)
    mine = _per_document(PAD * len(lengths), group)[None]
    model(mine % VOCABULARY, mine, None, labels=mine % VOCABULARY, packed_seq_params=packed).sum().backward()
