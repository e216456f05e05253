"""The engine that needs nothing but PyTorch: FSDP2, with parameters, gradients and optimizer sharded over all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional as F

import seqpar
from seqpar.integrations.model_config import heads_of
from seqpar.integrations.sharing import layer_plans

from .data import Batch
from .engines import Engine, Setup, adamw
from .model import shard
from .verify import whole_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersEngine(Engine):
    """An engine that calls the Hugging Face model itself, with a plan for each of its layers."""

    model: Any

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        plans, device = self._plans(batch), self.setup.ranks.device
        plan = plans[0]
        tokens = batch.tokens.to(device)
        logits = self.model(
            input_ids=plan.shard(tokens),
            position_ids=plan.position_ids.to(device),
            use_cache=False,
            seqpar_plan=plans,
        ).logits
        labels = plan.shift_labels(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, (labels != -100).sum()

    def _plans(self, batch: Batch) -> list[seqpar.Plan]:
        config = self.setup.config
        return layer_plans(
            self.setup.masks,
            seqpar.Documents(batch.cu_seqlens),
            length=config.seq_len,
            group=self.setup.ranks.sequence,
            layout=config.layout,
            schedule=seqpar.Ring(exchange=config.exchange) if config.schedule == "ring" else config.schedule,
            dtype=self.setup.dtype,
            **heads_of(self.shape),
        )


class TorchEngine(TransformersEngine):
    """FSDP2 over all ranks and AdamW. A checkpoint is continued on any number of ranks."""

    placement = "sharded"

    def __init__(self, setup: Setup, model: PreTrainedModel) -> None:
        super().__init__(setup, model)
        shard(model, setup.config, setup.ranks, setup.dtype)
        self.model, self.optimizer = model, adamw(model, setup.config)

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`; on rank 0 alone."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.model, options=whole)
        return weights

    def gradients(self) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return whole_gradients(self.model)

    def writer(self) -> PreTrainedModel:
        """See :class:`Engine`; its parameters are gathered a layer at a time."""
        model: PreTrainedModel = self.model
        return model

    def save(self, folder: Path) -> None:
        """See :class:`Engine`; every rank writes its shards."""
        parameters, moments = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": parameters, "optimizer": moments}, checkpoint_id=folder)

    def _load(self, folder: Path) -> None:
        parameters, moments = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": parameters, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=parameters, optim_state_dict=moments)
