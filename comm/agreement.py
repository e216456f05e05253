"""Agreement between ranks, before anything is sent whose size or meaning depends on it.

gloo lets bf16 be received as fp16, leaves a stale tail after a shorter send, and hangs on different calls. So every
rank first says what it is about to do, and all of them raise the same error where they differ.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from .world import World

_FIELDS = 12
_TEXT_BYTES = 1024


def agree(world: World, what: str, fields: Mapping[str, object], refusal: Exception | None = None) -> None:
    """Raise the same ValueError on every rank unless all of them have equal ``fields`` and none has a ``refusal``.

    Args:
        what: the call that is agreed on, itself part of what must agree.
        fields: by name, what must be equal; compared by ``repr``, at most 11 of them.
        refusal: why this rank's own checks failed, if they did. It still takes part, so that nobody waits for it.

    One all-gather of 104 bytes per rank, and a second of 1,024 bytes per rank only where something is wrong.
    """
    reason = str(refusal) if isinstance(refusal, ValueError) else f"{type(refusal).__name__}: {refusal}"
    if world.size == 1:
        if refusal is not None:
            raise ValueError(reason) from refusal
        return
    shown = {"call": what, **{name: repr(value) for name, value in fields.items()}}
    assert len(shown) <= _FIELDS, f"agree on {_FIELDS} fields at most"
    digests = [_digest(value) for value in shown.values()]
    record = torch.tensor([int(refusal is not None), *digests, *[0] * (_FIELDS - len(digests))])
    records = [tuple(r.tolist()) for r in world.all_gather(record.to(world.control_device), "agree")]
    refused = [rank for rank, (refuses, *_) in enumerate(records) if refuses]
    if refused:
        reasons = _ranks_by(_all_gather_text(world, reason), refused)
        unanimous = len(reasons) == 1 and len(refused) == world.size
        raise ValueError("; ".join(m if unanimous else f"{r}: {m}" for m, r in reasons.items())) from refusal
    if len(set(records)) > 1:
        # The first field that differs: ranks in different calls share no other than the call itself.
        field = next(i for i, values in enumerate(zip(*records, strict=True)) if len(set(values)) > 1) - 1
        name, mine = list(shown.items())[field]
        values = _ranks_by(_all_gather_text(world, mine), range(world.size))
        where = "seqpar" if name == "call" else what
        got = ", ".join(f"{value} on {ranks}" for value, ranks in values.items())
        raise ValueError(f"{where}: ranks disagree on {name}: got {got}; expected the same on every rank of the group")


def _digest(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little", signed=True)


def _all_gather_text(world: World, text: str) -> list[str]:
    raw = bytearray(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"))
    sent = torch.frombuffer(raw, dtype=torch.uint8).to(world.control_device)
    received = world.all_gather(sent, "agree")
    return [bytes(x.tolist()).rstrip(b"\0").decode(errors="replace") for x in received]


def _ranks_by(texts: list[str], ranks: Iterable[int]) -> dict[str, str]:
    """Each text with the ranks that it came from, in words."""
    by_text = defaultdict(list)
    for rank in ranks:
        by_text[texts[rank]].append(rank)
    return {t: f"rank{'s' if len(r) > 1 else ''} {', '.join(map(str, r))}" for t, r in by_text.items()}
