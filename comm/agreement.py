"""Agreement between ranks, before anything is sent whose size or meaning depends on it.

gloo lets bf16 be received as fp16, leaves a stale tail after a shorter send, and hangs on different calls. So every
rank first says what it is about to do, and all of them raise the same error where they differ.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

import torch

from .world import World

_FIELDS = 12
_MESSAGE_BYTES = 1024
_REFUSED = 1


def agree(world: World, what: str, fields: Mapping[str, object], refusal: ValueError | None = None) -> None:
    """Raise the same ValueError on every rank unless all of them have equal ``fields`` and none has a ``refusal``.

    Args:
        what: the call that is agreed on, itself part of what must agree.
        fields: by name, what must be equal; compared by ``repr``, at most 10 of them.
        refusal: why this rank's own checks failed, if they did. It still takes part, so that nobody waits for it.

    One all-gather of 104 bytes per rank, and a second of 1,024 bytes per rank only where something is wrong.
    """
    if world.size == 1:
        if refusal is not None:
            raise refusal
        return
    shown = {"call": what, **{name: repr(value) for name, value in fields.items()}}
    assert len(shown) <= _FIELDS, f"agree on {_FIELDS} fields at most"
    digests = [_digest(value) for value in shown.values()]
    record = [_REFUSED if refusal else 0, *digests, *[0] * (_FIELDS - len(digests))]
    device = world.control_device
    records = [r.tolist() for r in world.all_gather(torch.tensor(record, device=device), "agree")]
    if all(r == records[0] and r[0] != _REFUSED for r in records):
        return

    reasons: list[str] = []
    refused = [rank for rank, r in enumerate(records) if r[0] == _REFUSED]
    differing = None if refused else next(i for i in range(_FIELDS) if len({r[1 + i] for r in records}) > 1)
    # Fields after the first are only comparable between ranks in the same call, so the first that differs is named.
    mine = str(refusal or "") if differing is None else list(shown.items())[min(differing, len(shown) - 1)][1]
    messages = [_decode(m) for m in world.all_gather(_encode(mine).to(device), "agree")]
    if differing is None:
        by_message = _ranks_by([(messages[rank], rank) for rank in refused])
        everyone = len(refused) == world.size
        reasons = [m if everyone and len(by_message) == 1 else f"{_ranks(r)}: {m}" for m, r in by_message.items()]
        raise ValueError("; ".join(reasons))
    by_value = _ranks_by([(message, rank) for rank, message in enumerate(messages)])
    name = list(shown)[min(differing, len(shown) - 1)]
    got = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_value.items())
    raise ValueError(f"{what}: ranks disagree on {name}: got {got}; expected the same on every rank of the group")


def _digest(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little", signed=True)


def _encode(message: str) -> torch.Tensor:
    raw = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _decode(message: torch.Tensor) -> str:
    return bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")


def _ranks_by(pairs: list[tuple[str, int]]) -> dict[str, list[int]]:
    ranks = defaultdict(list)
    for key, rank in pairs:
        ranks[key].append(rank)
    return dict(ranks)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
