"""The first step computed a second time, unsharded, sharing nothing with the first but weights and data.

Rank 0 runs the plain Hugging Face model with PyTorch's own attention over each document alone: no packing, no plan, no
sharding, no seqpar attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from .config import TrainConfig
from .data import Batch
from .masks import seen_pairs
from .model import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOUNDS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-2, 1e-1)}
"""Largest relative differences of loss and gradient. In bf16 either side rounds every product to 8 bits."""


@dataclass(frozen=True)
class Comparison:
    """Relative difference of the loss, and of each parameter's gradient: norm of the difference over norm."""

    loss: float
    reference_loss: float
    loss_difference: float
    gradients: dict[str, float]
    bounds: tuple[float, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much."""
        return max(self.gradients.items(), key=lambda item: item[1])

    @property
    def passed(self) -> bool:
        """Whether both are within the bounds; NaN is not."""
        return self.loss_difference <= self.bounds[0] and all(x <= self.bounds[1] for x in self.gradients.values())

    def table(self, rows: int = 5) -> str:
        """The differences as text: the loss, and the gradients that differ most."""
        lines = [
            f"{'verification':<44} {'sharded':>12} {'unsharded':>12} {'difference':>11}",
            f"{'loss':<44} {self.loss:>12.8f} {self.reference_loss:>12.8f} {self.loss_difference:>11.2e}",
        ]
        ordered = sorted(self.gradients.items(), key=lambda item: -item[1])
        lines += [f"{'gradient of ' + name:<70} {difference:>11.2e}" for name, difference in ordered[:rows]]
        verdict = "passed" if self.passed else "FAILED"
        lines.append(
            f"{verdict}: largest of {len(ordered)} gradients {self.worst[1]:.2e} (bound {self.bounds[1]:.0e}), "
            f"loss {self.loss_difference:.2e} (bound {self.bounds[0]:.0e})"
        )
        return "\n".join(lines)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, gathered from all ranks, on the CPU. All ranks must call it."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[clean(name)] = whole.cpu()
    return gradients


def clean(name: str) -> str:
    """A parameter's name without the marks of activation checkpointing."""
    return name.replace("_checkpoint_wrapped_module.", "")


def reference_step(model: PreTrainedModel, batch: Batch, config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole batch on the plain model, document by document, in fp32 on the CPU."""
    model.train()
    count = sum(document.shape[1] - 1 for document in batch.documents())
    total = 0.0
    for document in batch.documents():
        if document.shape[1] > 1:
            with masked_layers(model, seen_pairs(config, model.config, document.shape[1])):
                logits = model(input_ids=document, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1].float(), document[0, 1:], reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def masked_layers(model: PreTrainedModel, masks: Sequence[Tensor | None]) -> Iterator[None]:
    """Give each layer's attention its own mask, bool [1, H|1, L, L]; the model's own, causal one where None."""
    layers = [layer for _, layer in decoder_layers(model)]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
        for layer, mask in zip(layers, masks, strict=True)
        if mask is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compare(
    loss: float, gradients: Mapping[str, Tensor], reference: tuple[float, Mapping[str, Tensor]], dtype: torch.dtype
) -> Comparison:
    """The comparison of a sharded step with the reference's loss and gradients."""
    reference_loss, expected = reference
    names = expected.keys() | gradients.keys()
    return Comparison(
        loss,
        reference_loss,
        abs(loss - reference_loss) / abs(reference_loss),
        {name: _difference(gradients.get(name), expected.get(name)) for name in sorted(names)},
        BOUNDS[dtype],
    )


def _difference(gradient: Tensor | None, expected: Tensor | None) -> float:
    if gradient is None or expected is None:
        return float("inf")
    norm = expected.double().norm()
    return float((gradient.double() - expected.double()).norm() / (norm if norm > 0 else 1.0))
