"""The engine of Megatron-Core: a GPTModel with seqpar's attention, context-parallel over the ranks of a sequence."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from seqpar.comm import World
from seqpar.integrations import huggingface
from seqpar.integrations.options import AttentionOptions
from seqpar.integrations.packing import zigzag_by_document

from .config import TrainConfig
from .data import Batch
from .engines import Engine, Setup, adamw, missing
from .masks import mask_options
from .megatron_weights import to_megatron, to_transformers
from .model import build, checkpointed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What a Llama's config may ask for and this engine doesn't make: each with the value that asks for nothing.
_NOT_MADE = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"}
# Kinds of rotary embedding that are frequencies and nothing else.
_ROPES = ("default", "linear", "llama3")
_SCHEDULES = ("ring", "allgather", "ulysses", "auto")


class MegatronEngine(Engine):
    """Context-parallel over the ranks of a sequence; PyTorch's DDP, which replicates the model, over all ranks.

    A batch is one packed sequence (THD): documents padded to a multiple of 2 * CP tokens and dealt zigzag one by one.
    Megatron's schedules and optimizers are not used, which know only GPUs. Continued on any number of ranks.
    """

    placement = "replicated by Megatron-Core"

    def __init__(self, setup: Setup, model: PreTrainedModel) -> None:
        super().__init__(setup, model)
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel

        from seqpar.integrations.megatron import layer_spec

        config, ranks, shape = setup.config, setup.ranks, self.shape
        parallel_state.destroy_model_parallel()  # of an earlier run in this process
        parallel_state.initialize_model_parallel(
            context_parallel_size=ranks.sequence.size,
            distributed_timeout_minutes=config.timeout / 60,
            create_gloo_process_groups=False,
        )
        group = parallel_state.get_context_parallel_group()
        mine = torch.distributed.get_process_group_ranks(ranks.mesh["sp"].get_group())
        assert torch.distributed.get_process_group_ranks(group) == mine, "consecutive ranks share a sequence"
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # in bf16, by its norms
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # over options that are not set
            gpt = GPTModel(
                transformer_config(shape, context_parallel_size=ranks.sequence.size),
                layer_spec(attention_options(config)),
                vocab_size=shape.vocab_size,
                max_sequence_length=config.seq_len,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=shape.tie_word_embeddings,
            )
        gpt.rotary_pos_emb = _Rotary(model.model.rotary_emb.inv_freq)
        self._gpt = gpt
        self._core = gpt.decoder.layers[0].self_attention.core_attention
        self._set_weights(model.state_dict())
        nn.Module.to(gpt, ranks.device)
        for number in range(shape.num_hidden_layers):
            checkpointed(gpt, f"decoder.layers.{number}", config.checkpoint_activations)
        self.model = DistributedDataParallel(gpt, device_ids=None if ranks.device.type == "cpu" else [ranks.device])
        self.model.train()
        self.optimizer = adamw(self.model, config)

    @classmethod
    def check(cls, config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> None:
        """See :class:`Engine`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # over what is not installed beside it
                from seqpar.integrations.megatron import check_version
        except ImportError as error:
            raise missing("megatron", error) from error
        check_version()
        if shape.model_type != "llama":
            raise ValueError(
                f"--engine megatron got a model of model_type {shape.model_type}, expected llama, whose layers are "
                "Megatron's too: use --engine torch or deepspeed"
            )
        for name, made in _NOT_MADE.items():
            if getattr(shape, name, made) != made:
                raise ValueError(
                    f"--engine megatron got a model with {name}={getattr(shape, name)}, expected {made}: use --engine "
                    "torch or deepspeed"
                )
        rope = (shape.rope_parameters or {}).get("rope_type", "default")
        if rope not in _ROPES:
            raise ValueError(
                f"--engine megatron got a model with rope_type {rope}, expected one of {', '.join(_ROPES)}: use "
                "--engine torch or deepspeed"
            )
        if config.schedule not in _SCHEDULES:
            raise ValueError(
                f"--schedule {config.schedule} got --engine megatron, expected one of {', '.join(_SCHEDULES)}"
            )
        attention_options(config)

    @property
    def worlds(self) -> Sequence[World]:
        """See :class:`Engine`; attention's is Megatron's context-parallel group."""
        return self._core.plans.world, self.setup.ranks.everyone

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        device, world = self.setup.ranks.device, self.setup.ranks.sequence
        tokens, labels, lengths, begins = packed(batch, unit=2 * world.size if world.size > 1 else 1)
        here = zigzag_by_document(tuple(begins), world.size).queries[world.rank].tensor
        with self._computing():
            logits = self.model(
                tokens[None, here].to(device), None, None, packed_seq_params=_packed_params(lengths, begins, device)
            )
        labels = labels[here].to(device)
        loss = F.cross_entropy(logits[0].float(), labels, ignore_index=-100, reduction="sum")
        return loss, (labels != -100).sum()

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        with self._computing():  # Megatron's own backward passes remember that on GPUs alone
            loss.backward()

    def _computing(self) -> torch.autocast:
        dtype = self.setup.dtype
        return torch.autocast(self.setup.ranks.device.type, dtype, enabled=dtype != torch.float32)

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`; on every rank."""
        whole = to_transformers({name: x.detach().cpu() for name, x in self._named()}, self.shape)
        if self.shape.tie_word_embeddings:
            whole["lm_head.weight"] = whole["model.embed_tokens.weight"]
        return whole

    def gradients(self) -> dict[str, Tensor]:
        """See :class:`Engine`; on every rank."""
        gradients = {name: x.grad.cpu() for name, x in self._named() if x.grad is not None}  # all of them
        return to_transformers(gradients, self.shape)

    def writer(self) -> PreTrainedModel:
        """See :class:`Engine`; a second model with these weights, whole on every rank."""
        model = build(self.setup.config, self.shape, huggingface.NAME)
        model.load_state_dict(self.weights())
        nn.Module.to(model, self.setup.ranks.device)
        return model

    def save(self, folder: Path) -> None:
        """See :class:`Engine`; the optimizer's state goes by Megatron's names."""
        moments = get_optimizer_state_dict(self.model, self.optimizer)
        dcp.save({"model": self.weights(), "optimizer": moments}, checkpoint_id=folder)

    def _load(self, folder: Path) -> None:
        weights, moments = self.weights(), get_optimizer_state_dict(self.model, self.optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        self._set_weights(weights)
        set_optimizer_state_dict(self.model, self.optimizer, moments)

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        theirs, parameters = to_megatron(weights, self.shape), dict(self._named())
        assert theirs.keys() == parameters.keys(), "every parameter is known by name"
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(theirs[name])

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        mark = "_checkpoint_wrapped_module."
        return [(name.replace(mark, ""), parameter) for name, parameter in self._gpt.named_parameters()]


class _Rotary(nn.Module):
    """A rotary embedding of given frequencies [D / 2], in place of Megatron's, which moves its own to a GPU."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def get_rotary_seq_len(self, *others: Any) -> int:
        """The longest document of the batch, which is the last of what Megatron gives."""
        *_, batch = others
        return int(batch.max_seqlen_q)

    def forward(self, length: int, **_: Any) -> Tensor:
        """Angles of the positions of a document, [length, 1, 1, D]."""
        angles = torch.outer(torch.arange(length, device=self.frequencies.device).float(), self.frequencies)
        return torch.cat((angles, angles), -1)[:, None, None]


def transformer_config(shape: PretrainedConfig, context_parallel_size: int) -> Any:
    """A Llama's configuration as Megatron-Core's, in fp32, of layers that need neither TransformerEngine nor a GPU."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        context_parallel_size=context_parallel_size,
        transformer_impl="local",
        use_cpu_initialization=True,
        perform_initialization=False,  # every weight is given
    )


def packed(batch: Batch, unit: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """A batch as one sequence of T tokens, each document padded to a multiple of `unit`.

    Tokens and labels [T], -100 where there is none; the documents' cumulative lengths; and where their places begin,
    with T for the last.
    """
    documents = list(batch.documents())
    lengths = [document.shape[1] for document in documents]
    begins = [0, *accumulate(-(-length // unit) * unit for length in lengths)]
    tokens, labels = torch.zeros(begins[-1], dtype=torch.long), torch.full((begins[-1],), -100)
    for begin, length, document in zip(begins, lengths, documents, strict=False):
        tokens[begin : begin + length] = document[0]
        labels[begin : begin + length - 1] = document[0, 1:]
    return tokens, labels, [0, *accumulate(lengths)], begins


def _packed_params(lengths: list[int], begins: list[int], device: torch.device) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    longest = max(end - begin for begin, end in pairwise(begins))
    real, places = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, begins))
    return PackedSeqParams("thd", real, real, places, places, longest, longest)


def attention_options(config: TrainConfig) -> AttentionOptions:
    """What the run's options are for the adapter."""
    schedule: Any = config.schedule
    return dataclasses.replace(mask_options(config), schedule=schedule, exchange=config.exchange)
