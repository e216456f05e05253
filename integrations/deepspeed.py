"""seqpar inside DeepSpeed: `initialize` for transformers models, an mpu and `DistributedAttention` for others.

`initialize` takes what `deepspeed.initialize` takes, and a config with a section of its own:

    {"seqpar": {"sequence_parallel_size": 4, "schedule": "ring"}, "zero_optimization": {"stage": 3}, ...}

**Which loss.** `engine(input_ids=rows, labels=rows).loss` is the mean over all valid tokens that all ranks have in this
micro-step, however unequally they share them. Over gradient accumulation those means are averaged, each with the same
weight: what DeepSpeed computes on one rank that is given the rows of all replicas, in as many micro-steps. (Plain data
parallelism averages the ranks' own means instead, and so depends on which rank has which row.)

**Which gradient.** With an mpu of P sequence ranks DeepSpeed 0.19 sums gradients over all ranks and divides by the
number of data-parallel ones, P times the average; but ZeRO 3, which scatters them, averages over all. `initialize`
accounts for that. Who gives DeepSpeed the mpu and computes a loss gets the same, in ZeRO 0 to 2, by

    loss = seqpar.token_mean(loss_sum, num_tokens, torch.distributed.group.WORLD)
    engine.backward(loss / mpu.get_sequence_parallel_world_size())

and in ZeRO 3 without the division.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Annotated, Any

import torch.distributed as dist

from seqpar.comm import agree, connect

from .deepspeed_attention import DistributedAttention
from .options import AttentionOptions
from .sharded_calls import ShardedCalls
from .supported import require

__all__ = ["DeepSpeedOptions", "DistributedAttention", "SequenceParallel", "initialize"]

SECTION = "seqpar"
"""The key of our section in a DeepSpeed config."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions(AttentionOptions):
    """What the section may say: the options of attention, and how ranks are shared out."""

    sequence_parallel_size: Annotated[int | None, "consecutive ranks that share a sequence; all where not given"] = None
    layout: Annotated[str, "who holds which tokens: zigzag, contiguous, balanced, ..."] = "zigzag"


class SequenceParallel:
    """An `mpu` for `deepspeed.initialize`: consecutive ranks share sequences, and replicas of those share the rows.

    `get_data_parallel_group` is all ranks, although `get_data_parallel_world_size` counts replicas: over the one ZeRO 3
    partitions parameters and sums their gradients, by the other DeepSpeed counts and deals rows.
    """

    def __init__(self, sequence_parallel_size: int | None = None) -> None:
        """Every rank calls it, after `deepspeed.init_distributed()`. sequence_parallel_size: of all ranks if None."""
        if not dist.is_initialized():
            raise ValueError("SequenceParallel: got no process group, expected one; call deepspeed.init_distributed()")
        world, size = dist.get_world_size(), _divisor(sequence_parallel_size)
        self._size, self._replicas = size, world // size
        self._sequence, _ = dist.new_subgroups_by_enumeration([list(range(r, r + size)) for r in range(0, world, size)])
        self._alone, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(world)])

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's sequences."""
        return self._sequence

    def get_sequence_parallel_world_size(self) -> int:
        """How many."""
        return self._size

    def get_sequence_parallel_rank(self) -> int:
        """This rank's place among them."""
        return dist.get_rank() % self._size

    def get_sequence_data_parallel_group(self) -> Any:
        """All ranks, over which ZeRO partitions."""
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        """How many."""
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return dist.get_rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers."""
        return list(range(dist.get_world_size()))

    def get_data_parallel_world_size(self) -> int:
        """How many replicas there are, each with rows of its own."""
        return self._replicas

    def get_data_parallel_rank(self) -> int:
        """Which of the replicas this rank belongs to."""
        return dist.get_rank() // self._size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This rank alone: every rank has whole layers."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """One."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Zero."""
        return 0

    get_data_parallel_group = get_sequence_data_parallel_group
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a transformers model, called with whole rows and computing this rank's tokens of them.

    The ranks of a sequence are given the same rows, replicas others: training_data is dealt so. Batch sizes count rows,
    of a replica and in all. Calls of the engine are as `huggingface.parallelize` has them, its handle `engine.seqpar`.
    Raises ValueError, on every rank, for a section, model or size that doesn't fit, and for another mpu or mesh.
    """
    require("deepspeed", "0.19", "0.20")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    options, refusal = DeepSpeedOptions(), None
    try:
        args, config = _config_of(args, config_params if config is None else config)
        options = DeepSpeedOptions.of(config.pop(SECTION, {}), f'section "{SECTION}" of the DeepSpeed config')
        _check(config, options, model, {"mpu": mpu, "mesh_param": mesh_param})
    except Exception as error:  # whatever it is, the other ranks must hear of it
        refusal = error
    world: Any = dist.group.WORLD
    agree(connect(world), "seqpar.integrations.deepspeed.initialize", {SECTION: options}, refusal)
    ranks = SequenceParallel(options.sequence_parallel_size)
    calls = ShardedCalls(
        model, ranks.get_sequence_parallel_group(), options, layout=options.layout, loss_group=world,
        averaged_over=dist.get_world_size() if _zero(config, "stage", 0) == 3 else ranks.get_data_parallel_world_size(),
    )  # fmt: skip
    try:
        engine, *others = deepspeed.initialize(
            args, model, optimizer, model_parameters, training_data, lr_scheduler, distributed_port, ranks,
            dist_init_required, collate_fn, config,
        )  # fmt: skip
    except BaseException:
        calls.remove()
        raise
    engine.seqpar = calls
    return engine, *others


def _config_of(args: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """args without the path of a config, and a copy of the config, wherever it was given."""
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    path = getattr(args, "deepspeed_config", None)
    if path is not None and config is not None:
        raise ValueError("config: got one here and another in args.deepspeed_config, expected one; leave one out")
    if path is not None:
        args = copy.copy(args)
        args.deepspeed_config, config = None, path
    if not isinstance(config, (dict, str, os.PathLike)):
        raise ValueError(f"config: got {type(config).__name__}, expected a dict or the path of a JSON file")
    return args, dict(config) if isinstance(config, dict) else load_ds_config(os.fspath(config))


def _check(config: dict[str, Any], options: DeepSpeedOptions, model: Any, unwanted: dict[str, Any]) -> None:
    for name, got in unwanted.items():
        if got is not None:
            raise ValueError(f"{name}: got {type(got).__name__}, expected None; {SECTION} makes its own")
    for name in ("sequence_parallel_size", "data_parallel_size"):
        if name in config:
            raise ValueError(f'{name}: got {config[name]} at the top of the config, expected it in "{SECTION}" alone')
    zero3 = _zero(config, "stage", 0) == 3
    for name, got, expected in (
        ("tensor_parallel.autotp_size", (config.get("tensor_parallel") or {}).get("autotp_size", 0), (1, 0)),
        ("gradient_predivide_factor", config.get("gradient_predivide_factor", 1.0), (1.0,)),
        ("zero_optimization.mics_shard_size", _zero(config, "mics_shard_size", -1), (-1,)),
        ("zero_optimization.zero_quantized_gradients", _zero(config, "zero_quantized_gradients", False), (False,)),
        # Without it ZeRO 3 sums the gradients of small buckets, and averages those of large ones.
        ("zero_optimization.reduce_scatter", not zero3 or _zero(config, "reduce_scatter", True), (True,)),
    ):
        if got not in expected:
            raise ValueError(f"{name}: got {got!r}, expected {expected[-1]!r}; gradients would be of another scale")
    _divisor(options.sequence_parallel_size)
    # Wrappers of transformers models have their config, too.
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention != "seqpar":
        raise ValueError(
            f"model: got {type(model).__name__} with attn_implementation={attention!r}, expected a transformers model "
            "loaded with 'seqpar'; for other models call deepspeed.initialize with mpu=SequenceParallel() and give "
            "layers this module's DistributedAttention"
        )


def _zero(config: dict[str, Any], name: str, default: Any) -> Any:
    return (config.get("zero_optimization") or {}).get(name, default)


def _divisor(size: int | None) -> int:
    """A checked sequence_parallel_size."""
    world = dist.get_world_size()
    size = world if size is None else size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or world % size:
        raise ValueError(f"sequence_parallel_size: got {size!r} for {world} ranks, expected a divisor of {world}")
    return size
