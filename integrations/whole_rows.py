"""What a Hugging Face model call with whole rows says: its documents, and what could not be sharded."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

import seqpar
from seqpar.planning import IGNORED_LABEL

_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_SHARDED = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "labels", "shift_labels")
CONSUMED = frozenset({*_PACKING, *_SHARDED, "num_items_in_batch", "use_cache"})
"""Keywords of a call that are understood here, and given to the model otherwise or not at all."""

_REFUSED = {
    "use_cache": "a cache would be of one rank's tokens; leave it out",
    "past_key_values": "generate without the handle: call its remove() first",
    "output_attentions": "the weights are never held as a whole",
    "logits_to_keep": "take them from handle.plan.unshard(out.logits)",
    "cache_position": "position_ids say where tokens stand",
    "seqpar_plan": "the handle makes the plans; call its remove() to pass your own",
}


def rows_of(given: dict[str, Any]) -> Tensor:
    """The whole input_ids [B, S] or inputs_embeds [B, S, E] among a call's keywords."""
    tokens, embeds = given.get("input_ids"), given.get("inputs_embeds")
    whole, dims = (tokens, 2) if embeds is None else (embeds, 3)
    if (tokens is None) == (embeds is None) or not isinstance(whole, Tensor) or whole.dim() != dims:
        got = [tuple(x.shape) if isinstance(x, Tensor) else x for x in (tokens, embeds)]
        raise ValueError(
            f"input_ids and inputs_embeds: got {got[0]} and {got[1]}, expected one of [batch, tokens] and "
            "[batch, tokens, hidden]; give whole rows"
        )
    return whole


def check_call(given: dict[str, Any], whole: Tensor, config: Any, *, training: bool, shared: bool) -> None:
    """Raise ValueError for a call that would not compute what it does on one rank."""
    for name, remedy in _REFUSED.items():
        value = given.get(name)
        if value is not None and not (isinstance(value, int) and not value):
            got = value if isinstance(value, int) else f"a {type(value).__name__}"
            raise ValueError(f"{name}: got {got}, expected none; {remedy}")
    dropout = getattr(config, "attention_dropout", 0.0)
    if training and dropout:
        raise ValueError(f"attention_dropout: got {dropout} in training, expected 0; set it to 0 in model.config")
    if shared and given.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise ValueError("output_router_logits: got True, expected False; its loss would be of one rank's tokens")
    batch, length = whole.shape[:2]
    mask = given.get("attention_mask")
    from_the_left = isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())
    restarts = from_the_left or given.get("cu_seq_lens_q") is not None
    if restarts and given.get("position_ids") is None and not getattr(config, "rope_parameters", None):
        raise ValueError(
            "position_ids: got none for documents or padding on the left and a model without RoPE, whose positions "
            "count from 0 in every document here; expected them: give position_ids that do"
        )
    for name, value in given.items():
        if name in _SHARDED[2:] and value is not None:
            rows = (1, batch) if name == "position_ids" else (batch,)
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if shape not in [(b, length) for b in rows]:
                raise ValueError(
                    f"{name}: got {shape}, expected [{batch}, {length}] as the rows have; who attends to whom is said "
                    "by documents, padding and the options' mask"
                )
        if name not in (*CONSUMED, *_REFUSED) and isinstance(value, Tensor) and length in value.shape:
            raise ValueError(
                f"{name}: got a tensor of shape {tuple(value.shape)} for rows of {length} tokens, expected none but "
                f"{', '.join(_SHARDED)} to be of tokens; it would not be sharded with them: leave it out"
            )
    if given.get("labels") is None and given.get("shift_labels") is not None:
        raise ValueError("shift_labels: got them without labels, expected both; the model makes no loss otherwise")


def documents_of(given: dict[str, Any], batch: int, length: int) -> seqpar.Documents:
    """The documents in a model call's keywords: position_ids [1|B, S], attention_mask [B, S], cu_seq_lens_q.

    Padding is documents of its own. Raises ValueError where they contradict each other, or labels count padding.
    """
    place = torch.arange(length).expand(batch, length)
    positions, mask, bounds = (given.get(name) for name in ("position_ids", "attention_mask", "cu_seq_lens_q"))
    if positions is not None:
        positions = positions.detach().cpu().expand(batch, length)
    starts, real = place == 0, torch.ones(batch, length, dtype=torch.bool)
    if mask is not None:
        mask = mask.detach().cpu()
        real = mask == 1
        if bool((~real & (mask != 0)).any()):
            raise ValueError("attention_mask: got other values than 0 and 1, expected 1 for tokens and 0 for padding")
        starts[:, 1:] |= real.diff(dim=1)
        runs = (starts & real).sum(1)
        if positions is None and bool((runs > 1).any()):
            raise ValueError(
                "attention_mask: got padding between tokens of a row, expected it on the left or right; say where "
                "documents begin by position_ids that restart at 0"
            )
        name = "labels" if given.get("shift_labels") is None else "shift_labels"
        labels = given.get(name)
        if labels is not None and bool((labels.detach().cpu().masked_select(~real) != IGNORED_LABEL).any()):
            raise ValueError(f"{name}: got some at padding, expected {IGNORED_LABEL} wherever attention_mask is 0")
    keys = given.get("cu_seq_lens_k")
    if bounds is not None:
        bounds = [int(x) for x in bounds]
        differ = keys is not None and [int(x) for x in keys] != bounds
        covers = bounds[:1] == [0] and bounds[-1] == length and sorted(bounds) == bounds
        if batch != 1 or differ or not covers:
            raise ValueError(
                f"cu_seq_lens_q: got {bounds[:3]} ... {bounds[-1:]} for {batch} rows of {length} tokens, expected one "
                f"row and rising bounds [0, ..., {length}], and cu_seq_lens_k equal to it; flatten the batch"
            )
        starts[0, bounds[:-1]] = True
    elif keys is not None:
        raise ValueError("cu_seq_lens_k: got it alone, expected cu_seq_lens_q with it")
    elif positions is not None:
        starts |= (positions == 0) & real
    if positions is not None:
        expected = place - torch.where(starts, place, 0).cummax(1).values
        wrong = ((positions != expected) & real).nonzero().tolist()
        if wrong:
            row, column = wrong[0]
            got = f"{positions[row, column]} at token {column} of row {row}"
            raise ValueError(
                f"position_ids: got {got}, expected {expected[row, column]}, counting from 0 in every document"
            )
    rows = [[*row.nonzero().flatten().tolist(), length] for row in starts]
    return seqpar.Documents(rows[:1] if all(row == rows[0] for row in rows) else rows)


def digest(x: Tensor, content: bool = True) -> str:
    """Shape and dtype, and what tells its content from another's."""
    raw = x.detach().cpu().contiguous().numpy().tobytes() if content else b""
    return f"{tuple(x.shape)} {x.dtype} {hashlib.blake2b(raw, digest_size=6).hexdigest()}"
