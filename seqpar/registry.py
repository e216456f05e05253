"""Live plans by number, because an operator of ``torch.library`` takes numbers and tensors, not objects."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from .planning import Plan

_numbers = itertools.count()
_live: WeakValueDictionary[int, Plan] = WeakValueDictionary()


def register(plan: Plan) -> int:
    """Give ``plan`` a number; the registry does not keep it alive."""
    number = next(_numbers)
    _live[number] = plan
    return number


def find(number: int) -> Plan:
    """The plan with that number."""
    plan = _live.get(number)
    if plan is None:
        raise ValueError("the plan of this attention call is gone, expected it alive; keep a reference until backward")
    return plan
