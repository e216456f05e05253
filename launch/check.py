"""`seqpar check`: a model's batch forward and backward on all ranks, and again on rank 0 alone, compared on the way.

The second computation shares nothing with the first but weights and tokens: PyTorch's own attention over each document
alone, no packing, no plan, no sharding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import seqpar
from seqpar.comm import World
from seqpar.integrations import huggingface
from seqpar.integrations.model_config import heads_of, masks_of
from seqpar.integrations.sharing import layer_plans

from .check_config import CheckConfig
from .check_findings import BOUNDS, Findings, LayerFinding
from .check_input import build_model, has_weights, read_batch, read_model
from .check_steps import (
    ATTENTION,
    INPUT,
    OUTPUT,
    Sharded,
    Telling,
    Unsharded,
    gradient_differences,
    sharded_step,
    unsharded_step,
)
from .config import TrainConfig
from .data import Batch
from .distributed import connected
from .loading import Source, fingerprint
from .model import decoder_layers, model_fields
from .spawn import Place

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

# Options that may differ between ranks without changing what is computed; model and text are compared by content.
_OF_ONE_RANK = ("model", "text", "json", "nproc", "threads", "timeout", "debug")


def run(config: CheckConfig, place: Place) -> bool:
    """Check as this rank, and tell on rank 0; whether the two computations agree, on every rank.

    Raises ValueError for input that is wrong and for attention that seqpar refuses, RunError for what befalls the run.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface.register()
    with connected(place, sp=place.size, threads=config.threads, timeout=config.timeout) as ranks:
        dtype, telling = DTYPES[config.dtype], Telling(ranks.rank == 0)
        with ranks.together():
            source, run_masks = read_model(config.model, telling.line)
            batch = read_batch(config, source, ranks.size)
        ranks.agree(_identity(config, source, batch))
        masks = source.masks or own_layer_masks(source.shape)
        _mention_idle_windows(masks, batch, telling)

        def build() -> PreTrainedModel:
            return build_model(source, dtype, ranks.device, config.seed)

        def sharded() -> PreTrainedModel:
            how = "" if has_weights(source) else f", with random weights of --seed {config.seed}: the folder has none"
            telling.line(f"loading {config.model} on {_ranks(ranks.size)} of {ranks.device.type}, {config.dtype}{how}")
            with ranks.together():
                model = build()
            ranks.agree({"weights": fingerprint(model)})
            return model

        findings = check_model(
            sharded,
            lambda: with_own_attention(build()),
            batch,
            masks,
            ranks.everyone,
            device=ranks.device,
            dtype=dtype,
            schedule=config.schedule,
            layout=config.layout,
            run_masks=run_masks,
            telling=telling,
        )
        if findings is not None:
            print(findings.as_json() if config.json else findings.table(), flush=True)
            if not findings.passed:
                finer = {"bf16": "fp32", "fp32": "fp64"}.get(config.dtype)
                remedy = f"; --dtype {finer} tells a fault from rounding" if finer else ""
                print(f"seqpar check: {findings.first}{remedy}", file=sys.stderr, flush=True)
        return bool(ranks.from_rank0(findings is not None and findings.passed))


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _identity(config: CheckConfig, source: Source, batch: Batch) -> dict[str, Any]:
    """What all ranks must share, by name."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OF_ONE_RANK}
    digest = hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest()[:16]
    checkpoint = source.checkpoint and source.checkpoint.name
    return {**options, "text": digest, "masks": source.masks, "checkpoint": checkpoint, **model_fields(source.shape)}


def _mention_idle_windows(masks: Sequence[seqpar.Mask], batch: Batch, telling: Telling) -> None:
    longest = max(document.shape[1] for document in batch.documents())
    windows = [mask.left + 1 for mask in masks if isinstance(mask, seqpar.SlidingWindow)]
    if windows and max(windows) >= longest:
        telling.line(
            f"windows of {max(windows)} tokens leave nothing out: the longest document has {longest}; use a larger "
            "--seq-len to check them"
        )


def with_own_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model with PyTorch's attention: fused where the model supports that (with sinks, say, it doesn't)."""
    model.set_attn_implementation("sdpa" if type(model)._supports_sdpa else "eager")
    return model


def own_layer_masks(shape: PretrainedConfig) -> list[seqpar.Mask]:
    """What a model's config says of each layer: causal, with its windows."""
    return masks_of(shape.get_text_config(decoder=True))


def check_model(
    sharded: Callable[[], PreTrainedModel],
    unsharded: Callable[[], PreTrainedModel],
    batch: Batch,
    masks: Sequence[seqpar.Mask],
    world: World,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    schedule: str = "ring",
    layout: str = "zigzag",
    run_masks: TrainConfig | None = None,
    telling: Telling | None = None,
) -> Findings | None:
    """Compare a batch's loss, logits, layers and gradients on all ranks of `world` with those on rank 0 alone.

    Args:
        sharded, unsharded: make the model, whole, on `device` and in `dtype`: every rank with
            attn_implementation="seqpar", and rank 0 alone with another. Only one of them is held at a time.
        batch: whole rows, the same on every rank.
        masks: who attends to whom inside a document, of each layer.
        run_masks: where the unsharded model gets its masks from, if not from its own config.

    Returns:
        The findings on rank 0, None on the others. Raises ValueError for attention that seqpar refuses.
    """
    telling = telling or Telling(speaks=False)
    model = sharded()
    plans = layer_plans(
        masks,
        _documents(batch),
        length=batch.tokens.shape[1],
        group=world,
        layout=layout,
        schedule=schedule,
        dtype=dtype,
        **heads_of(model.config.get_text_config(decoder=True)),
    )
    documents = sum(len(bounds) - 1 for bounds in batch.cu_seqlens)
    rows, length = batch.tokens.shape
    telling.line(f"sharded: {rows} rows of {length} tokens, {documents} documents, {_ranks(world.size)}, {schedule}")
    first = sharded_step(model, batch, plans, world, device, telling)
    del model
    if world.rank:
        return None
    telling.line(f"unsharded: {documents} documents, one by one")
    reference = unsharded()
    if reference.config._attn_implementation == huggingface.NAME:
        raise ValueError("unsharded: got a model with seqpar's attention, expected another: make it without")
    second = unsharded_step(reference, batch, first.outputs, run_masks, device, telling)
    about = {
        "ranks": world.size,
        "rows": rows,
        "seq_len": length,
        "documents": documents,
        "schedule": schedule,
        "layout": layout,
        "unsharded_attention": reference.config._attn_implementation,
        "device": device.type,
    }
    return _findings(first, second, reference, dtype, about)


def _documents(batch: Batch) -> seqpar.Documents:
    """One list of bounds where all rows have the same, which some layouts need."""
    same = batch.cu_seqlens[1:] == batch.cu_seqlens[:-1]
    return seqpar.Documents(batch.cu_seqlens[0] if same else batch.cu_seqlens)


def _findings(
    first: Sharded, second: Unsharded, reference: PreTrainedModel, dtype: torch.dtype, about: Mapping[str, object]
) -> Findings:
    """Put together by layer. Takes the gradients of both."""
    bounds, layers = BOUNDS[dtype], [name for name, _ in decoder_layers(reference)]
    gradients = gradient_differences(first, reference)
    noise = bounds.noise * math.sqrt(sum(difference.expected for difference in gradients.values()))
    relative = {name: difference.relative(noise) for name, difference in gradients.items()}
    outputs = {where: difference.relative() for where, difference in second.outputs.items()}
    found = []
    for number, layer in enumerate(layers):
        inside = {name: relative.pop(name) for name in list(relative) if name.startswith(f"{layer}.")}
        worst = max(inside, key=lambda name: _sortable(inside[name]), default=None)
        found.append(
            LayerFinding(
                attention=outputs.get((number, ATTENTION)),
                output=outputs[number, OUTPUT],
                gradient=None if worst is None else inside[worst],
                gradient_of=None if worst is None else worst.removeprefix(f"{layer}."),
            )
        )
    return Findings(
        input=outputs[0, INPUT],
        layers=found,
        logits=outputs[len(layers), OUTPUT],
        loss=first.loss,
        reference_loss=second.loss,
        gradients=relative,
        bounds=bounds,
        dtype=str(dtype).removeprefix("torch."),
        about=about,
    )


def _sortable(difference: float) -> float:
    """NaN is the worst of all."""
    return math.inf if math.isnan(difference) else difference
