"""Messages of several tensors, whatever their shapes and dtypes: one to each peer, and one from each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .world import World

Form = tuple[tuple[int, ...], torch.dtype]  # of one tensor in a message


def blank(forms: Sequence[Form], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """A flat message of bytes, to be filled, and its parts."""
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms)
    message = torch.empty(size, dtype=torch.uint8, device=device)
    return message, carve(message, forms)


def carve(message: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """The parts of a flat message of bytes; the widest dtypes lie first, so that all are aligned."""
    parts = [message] * len(forms)
    offset = 0
    for i in sorted(range(len(forms)), key=lambda i: -forms[i][1].itemsize):
        shape, dtype = forms[i]
        size = math.prod(shape) * dtype.itemsize
        parts[i] = message[offset : offset + size].view(dtype).view(shape)
        offset += size
    return parts


def swap(
    world: World,
    pack: Callable[[int, list[Tensor]], None],
    sent: Sequence[Sequence[Form]],
    arriving: Sequence[Sequence[Form]],
    device: torch.device,
    kind: str,
) -> list[list[Tensor]]:
    """One message to each peer, which ``pack`` fills, and one from each: its parts by rank, nothing for this one.

    ``sent`` and ``arriving``: the parts of each rank's message, by rank.
    """
    sends, receives = [], []
    received: list[list[Tensor]] = [[] for _ in arriving]
    for peer in (world.peer(step) for step in range(1, world.size)):
        outgoing, parts = blank(sent[peer], device)
        pack(peer, parts)
        sends.append((peer, outgoing))
        incoming, received[peer] = blank(arriving[peer], device)
        receives.append((peer, incoming))
    world.start(sends, receives, kind).wait()
    return received


def gather(world: World, tensors: Sequence[Tensor], kind: str) -> list[list[Tensor]]:
    """Every rank's tensors, of equal shapes and dtypes, by rank: one all-gather of them all."""
    forms = [(tuple(x.shape), x.dtype) for x in tensors]
    message, parts = blank(forms, tensors[0].device)
    for part, x in zip(parts, tensors, strict=True):
        part.copy_(x)
    return [carve(gathered, forms) for gathered in world.all_gather(message, kind)]
