"""The two computations of `seqpar check`: on all ranks with seqpar's attention, and on one rank without it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqpar
from seqpar.comm import World

from .check_findings import Difference
from .config import TrainConfig
from .data import Batch
from .masks import seen_pairs
from .model import decoder_layers
from .verify import masked_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Where = tuple[int, str]
"""A layer, and which part of it; the logits are the OUTPUT of the layer after the last."""
INPUT, ATTENTION, OUTPUT = "input", "attention", "output"

_SECONDS = 5.0
# Elements of a gradient that travel at a time.
_AT_ONCE = 1 << 24


class Telling:
    """Lines of progress on rank 0; on other ranks it says nothing."""

    def __init__(self, speaks: bool) -> None:
        self._speaks, self._last = speaks, time.monotonic()

    def line(self, text: str) -> None:
        """A line on stderr."""
        if self._speaks:
            self._last = time.monotonic()
            print(f"seqpar check: {text}", file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """A line, unless the last is only seconds old."""
        if time.monotonic() - self._last > _SECONDS:
            self.line(text)


@dataclass
class Sharded:
    """What all ranks computed, whole and in order, on the CPU of rank 0; elsewhere only the loss.

    outputs: [B, S, ...] by place, the logits' layer being the one after the last. gradients: by parameter.
    """

    loss: float = 0.0
    outputs: dict[Where, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def sharded_step(
    model: PreTrainedModel,
    batch: Batch,
    plans: Sequence[seqpar.Plan],
    world: World,
    device: torch.device,
    telling: Telling,
) -> Sharded:
    """Forward and backward of this rank's tokens; all that is compared is gathered as it comes."""
    result, plan, layers = Sharded(), plans[0], len(plans)
    found = len(decoder_layers(model))
    if found != layers:
        raise ValueError(
            f"{type(model).__name__}: got {found} modules that transformers calls its layers, expected {layers}, as "
            "its config says: such a model can't be checked by layer"
        )

    def keep(where: Where, output: Tensor) -> None:
        telling.progress(f"sharded: layer {where[0]} of {layers}")
        rows = []
        for row in output.detach().split(1):  # whole on every rank, so not all of them at once
            whole = plan.unshard(row)
            if world.rank == 0:
                rows.append(whole.cpu())
        if rows:
            result.outputs[where] = torch.cat(rows)

    tokens = batch.tokens.to(device)
    for _, layer in decoder_layers(model):
        attention = _attention_of(layer)
        if attention is not None:
            attention.training = True  # so that dropout of its weights is refused, as it would be in training
    with _watched(model, keep):
        logits = model(
            input_ids=plan.shard(tokens), position_ids=plan.position_ids.to(device), use_cache=False, seqpar_plan=plans
        ).logits
    keep((layers, OUTPUT), logits)
    labels = plan.shift_labels(tokens)
    total = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    loss = seqpar.token_mean(total, (labels != -100).sum(), world)
    telling.progress("sharded: backward")
    loss.backward()
    for name, parameter in model.named_parameters():
        gradient = _over_ranks(parameter, world)
        if world.rank == 0:
            result.gradients[name] = gradient.cpu()
    result.loss = loss.item()
    return result


def _over_ranks(parameter: nn.Parameter, world: World) -> Tensor:
    """The gradient, which is the average of the ranks', in fp32 or wider; zeros where no rank has one."""
    gradient = parameter.grad
    parameter.grad = None
    local = torch.zeros_like(parameter) if gradient is None else gradient
    parts = [world.all_reduce(part, "reduce") for part in _wide(local).flatten().split(_AT_ONCE)]
    return (torch.cat(parts) / world.size).view(parameter.shape)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Unsharded:
    """The loss, and how far the sharded outputs are from these."""

    loss: float = 0.0
    outputs: dict[Where, Difference] = field(default_factory=dict)


def unsharded_step(
    model: PreTrainedModel,
    batch: Batch,
    sharded: dict[Where, Tensor],
    run_masks: TrainConfig | None,
    device: torch.device,
    telling: Telling,
) -> Unsharded:
    """Forward and backward of each document alone; what comes out is compared and not kept, but for the gradients."""
    result = Unsharded(outputs={where: Difference() for where in sharded})
    layers = len(decoder_layers(model))
    predicted = sum(document.shape[1] - 1 for document in batch.documents())
    number, documents = 0, sum(len(bounds) - 1 for bounds in batch.cu_seqlens)
    for row, bounds in enumerate(batch.cu_seqlens):
        for start, end in pairwise(bounds):
            number += 1
            place = (row, slice(start, end))

            def compare(where: Where, output: Tensor, place: tuple[int, slice] = place) -> None:
                result.outputs[where].add(sharded[where][place].to(output.device), output.detach()[0])

            document = batch.tokens[row : row + 1, start:end].to(device)
            masks = [None] * layers if run_masks is None else seen_pairs(run_masks, model.config, end - start)
            with masked_layers(model, [mask if mask is None else mask.to(device) for mask in masks]):
                with _watched(model, compare):
                    logits = model(input_ids=document, use_cache=False).logits
                compare((layers, OUTPUT), logits)
                total = F.cross_entropy(_wide(logits)[0, :-1], document[0, 1:], reduction="sum") / predicted
                total.backward()
            result.loss += float(total.detach())
            telling.progress(f"unsharded: document {number} of {documents}")
    return result


@contextmanager
def _watched(model: PreTrainedModel, see: Callable[[Where, Tensor], None]) -> Iterator[None]:
    """Show what goes into the first layer, and what comes out of every layer and its attention, [B, T, ...]."""

    def shower(where: Where) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, given, out: see(where, out if torch.is_tensor(out) else out[0])

    def show_input(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        see((0, INPUT), given[0] if given else named["hidden_states"])

    layers = [layer for _, layer in decoder_layers(model)]
    hooks = [layers[0].register_forward_pre_hook(show_input, with_kwargs=True)]
    for number, layer in enumerate(layers):
        attention = _attention_of(layer)
        if attention is not None:
            hooks.append(attention.register_forward_hook(shower((number, ATTENTION))))
        hooks.append(layer.register_forward_hook(shower((number, OUTPUT))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention_of(layer: nn.Module) -> nn.Module | None:
    """The layer's attention with its projections: the outermost module inside whose class is called so."""
    inside = (module for module in layer.modules() if module is not layer)
    return next((module for module in inside if "attention" in type(module).__name__.lower()), None)


def gradient_differences(sharded: Sharded, reference: PreTrainedModel) -> dict[str, Difference]:
    """Of each parameter, by name; zeros where the reference has no gradient. Takes the gradients of both."""
    differences = {}
    for name, parameter in reference.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        differences[name] = Difference()
        differences[name].add(sharded.gradients.pop(name), expected)
        parameter.grad = None
    return differences
