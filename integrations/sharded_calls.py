"""Hugging Face models that are called with whole rows, as ever, and compute one rank's tokens of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import seqpar
from seqpar.comm import Group, agree, connect
from seqpar.planning import IGNORED_LABEL

from . import huggingface
from .model_config import check_layers, heads_of, windows_of
from .options import AttentionOptions
from .sharing import layer_plans
from .whole_rows import CONSUMED, check_call, digest, documents_of, rows_of


class ShardedCalls:
    """What `huggingface.parallelize` returns: the latest call's plans, and the way back.

    Attributes:
        plan: the first layer's in the latest call: `plan.unshard(out.logits)` is whole; None before the first call.
        plans: of each layer.
    """

    def __init__(
        self,
        model: Any,
        group: Group,
        options: AttentionOptions,
        *,
        layout: str,
        loss_group: Group,
        averaged_over: int | None = None,
    ) -> None:
        """See `huggingface.parallelize`. averaged_over: what sums of gradients over all ranks are divided by."""
        self.plan: seqpar.Plan | None = None
        self.plans: list[seqpar.Plan] = []
        self._world = connect(group)
        self._loss_world = self._world if loss_group is None else connect(loss_group)
        self._averaged_over = averaged_over or self._loss_world.size
        self._options, self._layout = options, layout
        self._losses: int | None = None  # how often the call under way computed one; None where it is to have none
        self._num_items: Any = None
        refusal = None
        try:
            self._inner, self._config = _inside(model)
            self._masks = _masks(self._config, options, shared=self._world.size > 1)
            if self._loss_world.size % self._world.size:
                got = f"{self._loss_world.size} ranks for sequences over {self._world.size}"
                raise ValueError(f"loss_group: got {got}, expected all ranks whose gradients are averaged")
        except ValueError as error:
            refusal = error
        agree(self._world, "parallelize", {"options": options, "layout": layout}, refusal)
        parameters = inspect.signature(model.forward).parameters.values()
        self._names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        self._model_loss, own = self._inner.loss_function, vars(self._inner).get("_loss_function")
        self._inner.loss_function, self._own_loss = self._loss, own
        self._hooks = [
            model.register_forward_pre_hook(self._shard, with_kwargs=True),
            model.register_forward_hook(self._check_loss),
        ]

    def remove(self) -> None:
        """Make the model what it was."""
        for hook in self._hooks:
            hook.remove()
        if self._own_loss is None:
            vars(self._inner).pop("_loss_function", None)
        else:
            self._inner.loss_function = self._own_loss

    def __deepcopy__(self, memo: object) -> ShardedCalls:
        """Itself: a copied model shares it, as it shares the ranks."""
        return self

    def _shard(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        fields: dict[str, object] = {}
        refusal = None
        try:
            if len(args) > len(self._names):
                raise ValueError(f"got {len(args)} arguments without a name, expected keywords; name them")
            whole = rows_of(given)
            check_call(given, whole, self._config, training=module.training, shared=self._world.size > 1)
            self._check_loss_kind(given)
            documents = documents_of(given, *whole.shape[:2])
            labels, items = given.get("labels"), given.get("num_items_in_batch")
            fields = {
                "rows": digest(whole, content=whole.dim() == 2),
                "labels": None if labels is None else digest(given.get("shift_labels", labels)),
                "num_items_in_batch": items.tolist() if isinstance(items, Tensor) else items,
                "keywords": sorted(name for name, value in given.items() if value is not None),
                "training": (module.training, torch.is_grad_enabled()),
            }
        except Exception as error:  # whatever it is, the other ranks must hear of it
            refusal = error
        agree(self._world, "a call with whole rows, the same on every rank of a sequence", fields, refusal)
        self.plans = self._plan(whole, documents)
        plan, here = self.plans[0], self.plans[0].queries.tensor.to(whole.device)
        local = {name: value for name, value in given.items() if name not in CONSUMED}
        # Not plan.shard: as with parameters, each rank's gradient of what made the embeddings is its part of it.
        local["input_ids" if whole.dim() == 2 else "inputs_embeds"] = whole.index_select(1, here)
        local |= {"position_ids": plan.position_ids.to(whole.device), "use_cache": False, "seqpar_plan": self.plans}
        self.plan, self._num_items, self._losses = plan, items, None
        if labels is not None:
            shifted = given.get("shift_labels")
            local["labels"] = plan.shift_labels(labels) if shifted is None else plan.shard(shifted)
            self._losses = 0
        return (), local

    def _check_loss_kind(self, given: dict[str, Any]) -> None:
        name = getattr(self._model_loss, "__name__", type(self._model_loss).__name__)
        if given.get("labels") is not None and name != "ForCausalLMLoss":
            raise ValueError(
                f"labels: got a model whose loss is {name}, expected ForCausalLMLoss; compute another loss from the "
                "logits: call without labels"
            )

    def _plan(self, whole: Tensor, documents: seqpar.Documents) -> list[seqpar.Plan]:
        schedule, told = self._options.schedule_object, dict[str, Any](heads_of(self._config))
        if "auto" in (schedule, self._layout):
            autocast = torch.is_autocast_enabled(whole.device.type)
            told["dtype"] = torch.get_autocast_dtype(whole.device.type) if autocast else self._inner.dtype
        else:
            del told["head_dim"]
        return layer_plans(
            self._masks, documents, length=whole.shape[1], group=self._world, layout=self._layout, schedule=schedule,
            **told,
        )  # fmt: skip

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
        """In place of the model's loss: its sum over this rank's tokens, then the mean over all ranks'."""
        if self._losses is None:
            return self._model_loss(logits=logits, labels=labels, vocab_size=vocab_size, **others)
        self._losses += 1
        given = {**others, "labels": labels, "shift_labels": labels, "num_items_in_batch": 1}
        loss_sum = self._model_loss(logits=logits, vocab_size=vocab_size, **given)
        count = (labels != IGNORED_LABEL).sum().double()
        if self._num_items is None:
            sums = torch.stack([loss_sum.detach().double(), count])
            total, tokens = self._loss_world.all_reduce(sums, "reduce")
            replicas = 1.0
        else:  # what this call would return on one rank, which whoever counted relies on
            total = self._world.all_reduce(loss_sum.detach().double(), "reduce")
            tokens = torch.as_tensor(self._num_items, dtype=torch.float64, device=loss_sum.device)
            replicas = self._loss_world.size / self._world.size
        share = torch.where(tokens == 0, 0.0, 1.0 / tokens)
        return _Mean.apply(loss_sum, total * share, self._averaged_over / replicas * share)

    def _check_loss(self, module: nn.Module, args: tuple, out: Any) -> None:
        """Raise ValueError where a model made a loss of its own from labels that were already shifted."""
        if self._losses is not None and self._losses != 1:
            raise ValueError(
                f"labels: got a model that called its loss_function {self._losses} times, expected once; "
                "compute the loss from the logits: call without labels"
            )
        self._losses = None


class _Mean(torch.autograd.Function):
    """The mean over all ranks, whose gradient goes to this rank's sum alone."""

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor.to(loss_sum.dtype)
        return mean.to(loss_sum.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None, None


def _inside(model: Any) -> tuple[Any, Any]:
    """The transformers model in what was given, itself or what it wraps, and its config."""
    from transformers import PreTrainedModel

    modules = model.modules() if isinstance(model, nn.Module) else ()
    inner = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"model: got {type(model).__name__}, expected a transformers model")
    config = inner.config.get_text_config(decoder=True)
    if config._attn_implementation != huggingface.NAME:
        raise ValueError(
            f"model: got attn_implementation={config._attn_implementation!r}, expected {huggingface.NAME!r}; "
            f"load it with attn_implementation={huggingface.NAME!r}, after huggingface.register()"
        )
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError(f"model: got {type(inner).__name__} without position_ids, expected a model that takes them")
    if isinstance(getattr(inner.loss_function, "__self__", None), ShardedCalls):
        raise ValueError("model: got one that is parallelized already; call remove() of its handle first")
    return inner, config


def _masks(config: Any, options: AttentionOptions, shared: bool) -> list[seqpar.Mask]:
    """Of each layer, with the model's own windows where it has some."""
    if options.kernel != "auto":
        raise ValueError(f"kernel: got {options.kernel!r}, expected 'auto' for transformers models; leave it out")
    check_layers(config, shared)
    masks = options.layer_masks(config.num_hidden_layers, heads_of(config)["heads"][1])
    for layer, window in enumerate(windows_of(config)):
        if window is None or (options.mask == "window" and options.window == window):
            continue
        if options.mask != "causal":
            got = f"{options.mask}{f' {options.window}' if options.window else ''}"
            raise ValueError(
                f"mask: got {got} for layer {layer} of a model with sliding_window={window}, expected causal, which "
                "leaves the model its windows"
            )
        masks[layer] = seqpar.SlidingWindow(window - 1)
    return masks
