"""Catches a model's calls of `F.scaled_dot_product_attention`, and knows which plan each of them belongs to.

A mode of PyTorch's that sees such calls is seen by one thread alone, and a checkpoint recomputes its layers later, on
another. So the mode is entered by the forward of every module, and is there again whenever a module is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSet
from dataclasses import dataclass
from threading import get_ident
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip, skip_code
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import seqpar

# Parts of the names of functions and operators that attend to a rank's own tokens alone.
_OTHERS = ("flash_attn", "flex_attention", "multi_head_attention", "scaled_dot_product", "efficient_attention", "fmha")


class Interception(TorchFunctionMode):
    """Gives calls of `F.scaled_dot_product_attention` to `attend` instead. Raises ValueError for other attention."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchFunctionMode."""
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if not torch.compiler.is_dynamo_compiling():  # which sees through no names
            _refuse_others(func)
        return func(*args, **(kwargs or {}))


# Inside a compiled graph the method is traced. Called between graphs it is none of its own.
skip_code(Interception.__torch_function__.__code__)


def _refuse_others(func: Any) -> None:
    name = getattr(func, "__name__", "")
    if any(other in name for other in _OTHERS):
        raise ValueError(
            f"a parallelized model called {name}, which would see this rank's tokens alone; expected "
            "F.scaled_dot_product_attention: call that in its place"
        )


@dataclass
class Call:
    """A forward under way in one thread."""

    plan: seqpar.Plan | None
    surroundings: tuple[bool, Any]
    recomputes: bool
    attended: bool = False


class Calls:
    """The forwards of a model's modules: whether they recompute, and what for."""

    def __init__(self) -> None:
        self.plan: seqpar.Plan | None = None
        self._under_way: dict[int, Call] = {}
        self._plans: dict[StorageWeakRef, seqpar.Plan | None] = {}
        self._needed: MutableSet[seqpar.Plan] = WeakSet()

    @property
    def current(self) -> Call | None:
        """The one of this thread."""
        return self._under_way.get(get_ident())

    @torch.compiler.disable
    def enter(self, inputs: Iterable[Any]) -> tuple[Call, tuple[bool, Any] | None]:
        """Begin a module's forward: the call that it is part of, and what surrounded that so far, if it was begun."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        call, outside = self.current, None
        if call is None:
            recomputes = torch._C._current_graph_task_id() != -1
            plan = self._recall(tensors) if recomputes else self.plan
            call = self._under_way[get_ident()] = Call(plan, surroundings(), recomputes)
        else:
            outside, call.surroundings = call.surroundings, surroundings()
        if not call.recomputes and call.plan is not None:
            self._remember(tensors, call.plan)
        return call, outside

    @torch.compiler.disable
    def leave(self, call: Call, outside: tuple[bool, Any] | None) -> None:
        """End it."""
        if outside is None:
            del self._under_way[get_ident()]
        else:
            call.surroundings = outside

    def renew(self, plan: seqpar.Plan) -> None:
        """Let later forwards belong to this plan."""
        self._plans = {storage: known for storage, known in self._plans.items() if not storage.expired()}
        # The plan lives as long as its positions are known, and they as long as it: they say nothing.
        self._plans[StorageWeakRef(plan.position_ids.untyped_storage())] = None
        self.plan = plan

    @torch.compiler.disable
    def keep(self, plan: seqpar.Plan, result: Any) -> None:
        """Keep the plan of a forward for as long as its result can be differentiated."""
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                metadata: Any = x.grad_fn.metadata
                metadata["seqpar_plan"] = plan
                self._needed.add(plan)

    def _remember(self, tensors: list[Tensor], plan: seqpar.Plan) -> None:
        """That these are a module's inputs under this plan: what recomputes it is given the same memory."""
        for tensor in tensors:
            storage = StorageWeakRef(tensor.untyped_storage())
            if self._plans.setdefault(storage, plan) is not plan:
                self._plans[storage] = None  # a buffer of the model, say, in which every batch sees the same

    def _recall(self, tensors: list[Tensor]) -> seqpar.Plan:
        found: set[seqpar.Plan | None]
        found = {self._plans.get(StorageWeakRef(tensor.untyped_storage())) for tensor in tensors} - {None}
        if not found:  # inputs that were copied since, by a cast or from another device
            found.update(self._needed)
            found.update(plan for storage, plan in self._plans.items() if plan and not storage.expired())
            found = found or {self.plan}
        plan = found.pop()
        if found or plan is None:
            raise ValueError(
                "a checkpoint recomputes a layer of one of several batches, and its inputs don't say which; expected "
                "those of one: call handle.shard for the next batch after the backward of the last"
            )
        return plan


def surroundings() -> tuple[bool, Any]:
    """Whether gradients are recorded, and the hooks that save tensors for them: a checkpoint changes one of these."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def wrap(module: nn.Module, calls: Calls, mode: Interception, finish: Callable[[Call], None] | None) -> None:
    """Enter the mode in the module's forward. finish: called after the forward, if it was no recomputation."""
    inner = module.__dict__.get("forward")

    # Compilers go on inside. What is done here depends on the thread and the batch, and is no part of their graphs.
    @skip
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = inner or MethodType(type(self).forward, self)
        call, outside = calls.enter((*args, *kwargs.values()))
        try:
            if outside is not None:
                return own(*args, **kwargs)
            with mode:
                result = own(*args, **kwargs)
            if not call.recomputes and call.plan is not None:
                calls.keep(call.plan, result)
        finally:
            calls.leave(call, outside)
        if finish is not None and not call.recomputes:
            finish(call)
        return result

    reason = "seqpar's attention stands between graphs: compile without fullgraph"
    forward.__dict__.update(parallelized=True, _torchdynamo_disable_msg=reason)
    module.forward = MethodType(forward, module)  # a method, so that a copy of the module gets its own
