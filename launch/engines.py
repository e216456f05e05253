"""What trains the model: an engine is one framework's forward, backward and update on this rank."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

import seqpar
from seqpar.comm import World

from .config import TrainConfig
from .data import Batch
from .distributed import Ranks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CLASSES = {
    "torch": ("engine_torch", "TorchEngine"),
    "deepspeed": ("engine_deepspeed", "DeepSpeedEngine"),
    "megatron": ("engine_megatron", "MegatronEngine"),
}


@dataclass(frozen=True)
class Setup:
    """What any engine is made for. masks: of each layer, inside a document. dtype: of the computation."""

    config: TrainConfig
    ranks: Ranks
    masks: list[seqpar.Mask]
    dtype: torch.dtype


class Engine(ABC):
    """A model and its optimizer, trained by one framework. All ranks call a method together.

    `loss`, `seqpar.token_mean` over all ranks, `backward`, `update`: that is a step. Parameters, gradients and moments
    are fp32. Weights and gradients go by the names that they have in the Hugging Face model, whatever the framework
    makes of it.

    model: what is called; `train()` and `eval()` switch it. optimizer: its groups have the settings. worlds: groups of
    ranks whose meters count what attention sends. placement: how the parameters lie on ranks, in words.
    """

    placement: str
    model: nn.Module
    optimizer: Optimizer

    def __init__(self, setup: Setup, model: PreTrainedModel) -> None:
        """model: whole, in fp32 on the CPU, the same on every rank, with seqpar's attention; the engine's from here."""
        self.setup, self.shape = setup, model.config

    @classmethod
    def check(cls, config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> None:
        """Raise ValueError where the framework is missing, or can't train this model with these options."""
        return None

    @classmethod
    def identity(cls, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
        """What a run must share with a checkpoint that it continues, by name."""
        return {"engine": config.engine}

    @property
    def worlds(self) -> Sequence[World]:
        """See the class."""
        return self.setup.ranks.sequence, self.setup.ranks.everyone

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of this rank's tokens of its rows [B, S], and their number."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean over the tokens of all ranks, as `seqpar.token_mean` returned it."""
        loss.backward()

    def update(self, rate: float) -> float:
        """Clip gradients, step at this learning rate, and forget them; returns their norm, all together, unclipped.

        Where that is not finite, the weights stay.
        """
        largest = self.setup.config.grad_clip or math.inf
        total = torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        self._set_rate(rate)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Every weight, whole, on the CPU of rank 0 at least."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Every parameter's gradient after `backward`, whole and averaged, on the CPU of rank 0 at least."""

    @abstractmethod
    def writer(self) -> PreTrainedModel:
        """The model as transformers has it, to generate text with."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and optimizer, "model" in torch.distributed.checkpoint's format, for any engine to read.

        Raises CheckpointException or OSError where that fails.
        """

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. The optimizer's settings stay this run's."""
        mine = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        self._load(folder)
        for group, settings in zip(self.optimizer.param_groups, mine, strict=True):
            group.update(settings)

    @abstractmethod
    def _load(self, folder: Path) -> None: ...


def engine_class(name: str) -> type[Engine]:
    """The engine that --engine names; only its framework's module is imported."""
    module, kind = _CLASSES[name]
    engine: type[Engine] = getattr(import_module(f".{module}", __package__), kind)
    return engine


def adamw(model: nn.Module, config: TrainConfig) -> AdamW:
    """The optimizer of a run, whose weight decay is for matrices alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def missing(engine: str, error: ImportError) -> ValueError:
    """What to say where a framework can't be imported."""
    return ValueError(
        f"--engine {engine} got no {engine} that can be imported ({error}); expected it installed beside seqpar: run "
        f"pip install 'seqpar[{engine}]'"
    )
