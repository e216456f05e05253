"""PyTorch models that call `F.scaled_dot_product_attention`, with their sequences split over ranks.

    handle = parallelize(model, mesh, axes="sp")  # mesh: all ranks that train the model together
    batch = handle.shard(tokens)  # whole rows, the same on all ranks of a sequence
    logits = model(batch.tokens, batch.position_ids)
    total = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")  # -100 is ignored
    handle.loss(total, (batch.labels != -100).sum()).backward()

The model must take positions, for RoPE or learned ones: a rank's tokens don't begin at 0, and are not consecutive.
Everything else in it must work token by token. See examples/fsdp2.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import seqpar
from seqpar.comm import Group, World, agree, connect
from seqpar.validation import ATTENTION, agree_once

from .interception import Call, Calls, Interception, surroundings, wrap
from .options import AttentionOptions
from .whole_rows import digest

DEFAULTS = AttentionOptions()
"""Causal attention in a ring."""


class Batch(NamedTuple):
    """This rank's part of a batch: tokens [B, T], positions in their documents [1|B, T], next-token labels [B, T]."""

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor


def parallelize(
    model: nn.Module,
    mesh: Group,
    options: AttentionOptions = DEFAULTS,
    *,
    axes: str | Sequence[str] | None = None,
    layout: str = "zigzag",
    heads: int | tuple[int, int] | None = None,
    head_dim: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Parallelized:
    """Let every call of `F.scaled_dot_product_attention` in the model's modules attend to all ranks' tokens.

    Before or after `fully_shard`, activation checkpoints and `torch.compile` (which then makes a graph of the code
    between modules). A layer is checkpointed by calling a module again, not a function inside one.

    Args:
        model: its modules' forwards are wrapped, in place.
        mesh: all ranks over which the model's gradients are averaged; a mesh, a process group, or None for one rank.
        options: mask, schedule and kernel; all layers have the same mask.
        axes: the mesh's axis, or two of them (the last inside the node), along which ranks share a sequence. It may be
            left out where the mesh has one axis.
        layout: how tokens are dealt, see `seqpar.plan`.
        heads, head_dim, dtype: (query heads, KV heads), ...; what schedule and layout "auto" and mask "s2" must know.

    Raises:
        ValueError: for models and options that can't be had so. And a forward raises it, instead of attending to one
            rank's tokens alone, where SDPA's arguments contradict the options, other attention is called, or none.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    for module in model.modules():
        if isinstance(module, (nn.MultiheadAttention, torch.jit.ScriptModule)):
            raise ValueError(
                f"model: got a {type(module).__name__}, expected modules in Python that call "
                "F.scaled_dot_product_attention themselves; replace it"
            )
        if hasattr(module.forward, "parallelized"):
            raise ValueError("model: got one that is parallelized already; call remove() of its handle first")
    if options.s2_dense_layers:
        got = f"s2_dense_layers: got {options.s2_dense_layers}"
        raise ValueError(f"{got}, expected none: all layers share a plan here; take s2_dense_heads, or another adapter")
    told = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
    return Parallelized(model, *_worlds(mesh, axes), options, {"layout": layout, **told})


def _worlds(mesh: Group, axes: str | Sequence[str] | None) -> tuple[World, World]:
    """The ranks that share a sequence with this one, and all of them."""
    if not isinstance(mesh, DeviceMesh) or (mesh.ndim == 1 and axes is None):
        if axes is not None:
            raise ValueError(f"axes: got {axes!r} with {type(mesh).__name__}, expected a mesh that has them, or none")
        return connect(mesh), connect(mesh)
    names, wanted = mesh.mesh_dim_names or (), (axes,) if isinstance(axes, str) else tuple(axes or ())
    if not 1 <= len(wanted) <= 2 or not set(wanted) <= set(names):
        raise ValueError(f"axes: got {axes!r}, expected one or two of the mesh's axes {names}, which share a sequence")
    return connect(mesh[wanted]), connect(mesh if mesh.ndim < 3 else mesh._flatten())


class Parallelized:
    """What `parallelize` returns: the batches' way in, and the loss's way out."""

    def __init__(
        self, model: nn.Module, sequence: World, everyone: World, options: AttentionOptions, told: dict[str, Any]
    ) -> None:
        self.sequence, self.everyone, self.options, self._told = sequence, everyone, options, told
        self._calls, self._wrapped = Calls(), []
        mode = Interception(self._attend)
        for module in model.modules():
            # PyTorch's own modules only call others, which are wrapped, and are many.
            if module is model or not type(module).__module__.startswith("torch.nn.modules."):
                self._wrapped.append((module, module.__dict__.get("forward")))
                wrap(module, self._calls, mode, _finish if module is model else None)

    @property
    def plan(self) -> seqpar.Plan:
        """Of the last batch: `plan.shard` for other tensors of it, `plan.unshard` for outputs."""
        if self._calls.plan is None:
            raise ValueError("a parallelized model got no batch yet, expected one: call handle.shard(tokens) first")
        return self._calls.plan

    def shard(
        self, tokens: Tensor, *, labels: Tensor | None = None, cu_seqlens: Sequence | Tensor | None = None
    ) -> Batch:
        """Take the next batch; every rank of a sequence calls it, with the same whole rows.

        tokens: int [B, S], any S. labels: what each token is as a label, -100 for none; by default the tokens. They are
        shifted here: give labels that are shifted already to `handle.plan.shard`. cu_seqlens: bounds [0, ..., S] of
        documents packed in the rows, or a list of bounds for each row. Raises ValueError on all ranks of the sequence
        where one's arguments are wrong or differ.
        """
        refusal: Exception | None = None
        fields: dict[str, object] = {}
        mask: seqpar.Mask = seqpar.Full()
        try:
            for name, x in (("tokens", tokens), ("labels", tokens if labels is None else labels)):
                if not isinstance(x, Tensor) or x.dim() != 2 or x.is_floating_point() or x.shape != tokens.shape:
                    got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                    raise ValueError(f"{name}: got {got}, expected whole rows of token ids [B, S]")
                fields[name] = digest(x)
            mask = self.options.layer_mask(0, self._kv_heads)
            if cu_seqlens is not None:
                documents = seqpar.Documents(cu_seqlens)
                rows, mask = len(documents.queries), mask & documents
                if rows not in (1, len(tokens)):
                    raise ValueError(f"cu_seqlens: got bounds of {rows} rows, expected {len(tokens)}, or those of all")
        except Exception as error:  # whatever it is, the other ranks must hear of it
            refusal = error
        agree(self.sequence, "handle.shard", fields, refusal)
        plan = seqpar.plan(
            mask, length=tokens.shape[1], group=self.sequence, schedule=self.options.schedule_object, **self._told
        )
        self._calls.renew(plan)
        labels = plan.shift_labels(tokens if labels is None else labels)
        return Batch(plan.shard(tokens), plan.position_ids.to(tokens.device), labels)

    def loss(self, loss_sum: Tensor, count: Tensor | int) -> Tensor:
        """The mean over all ranks' tokens, from a rank's sum of losses and its number of labels; see `token_mean`."""
        return seqpar.token_mean(loss_sum, count, self.everyone)

    def remove(self) -> None:
        """Give the model its own attention back."""
        for module, forward in self._wrapped:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._wrapped.clear()

    @property
    def _kv_heads(self) -> int:
        heads = self._told["heads"]
        return (heads[1] if isinstance(heads, (tuple, list)) else heads) or 1

    @torch.compiler.disable
    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """SDPA's arguments: query [B, H, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv] -> [B, H, T, Dv]."""
        call = self._calls.current
        assert call is not None, "attention was caught outside of a forward"
        plan = call.plan or self.plan
        try:
            self._check(call, plan, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        except ValueError as error:
            agree_once(plan, ATTENTION, {}, error)
        call.attended = True
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return seqpar.attention(q, k, v, plan, scale=scale, kernel=self.options.kernel).transpose(1, 2)

    def _check(
        self,
        call: Call,
        plan: seqpar.Plan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        enable_gqa: bool,
    ) -> None:
        """Raise ValueError for what the plan would not do."""
        if attn_mask is not None:
            raise ValueError(_refused("attn_mask", "a mask", "none: say it in the options, and documents to shard"))
        if dropout_p:
            raise ValueError(_refused("dropout_p", dropout_p, "0: set the model's attention dropout to 0"))
        if is_causal != (self.options.mask != "full"):
            expected = f"{not is_causal} for mask {self.options.mask!r}: change the model, or the options"
            raise ValueError(_refused("is_causal", is_causal, expected))
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 4 or x.shape[2] != len(plan.queries):
                expected = f"[B, heads, {len(plan.queries)}, head_dim], this rank's tokens of the batch given to shard"
                raise ValueError(_refused(name, f"shape {tuple(x.shape)}", expected))
        if not enable_gqa and key.shape[1] != query.shape[1]:
            heads = f"{query.shape[1]} and {key.shape[1]} heads"
            raise ValueError(_refused("query and key", heads, "as many, or enable_gqa=True"))
        (recorded, hooks), (records, hooks_now) = call.surroundings, surroundings()
        if hooks_now != hooks or (recorded and not records):
            raise ValueError(
                "scaled_dot_product_attention: got a call inside a checkpoint (or no_grad, or hooks of saved tensors) "
                "that its module's forward began, whose recomputation would not be seen; expected the whole module to "
                "be called inside it: move the attention to a module, or the checkpoint around the module"
            )


def _finish(call: Call) -> None:
    if not call.attended:
        raise ValueError(
            "a parallelized model's forward never called F.scaled_dot_product_attention: it attended to this rank's "
            "tokens alone, if at all; expected calls of that: choose SDPA as its attention"
        )


def _refused(name: str, got: object, expected: str) -> str:
    return f"scaled_dot_product_attention: got {name} {got}, expected {expected}"
