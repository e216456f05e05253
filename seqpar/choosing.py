"""``schedule="auto"`` and ``layout="auto"``: all ways to attend to a batch, what each would cost, and the cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seqpar.comm import World

from .costs import Call, Cost, cost
from .dealing import deal_heads
from .itinerary import Itinerary, itinerary
from .layouts import Layout, resolve_layout
from .masks import Mask
from .rates import Rates
from .schedules import AllGather, Auto, DoubleRing, Ring, Schedule, Tree, Ulysses, heads_degree

UNEVEN = 1.1  # the most tokens a rank may hold, over the mean: the rest of the model waits for that rank
ALIKE = 1.01  # predictions that differ by less are as good as equal: then the fewest bytes decide


@dataclass(frozen=True)
class Candidate:
    """A way to attend, what it costs the rank that it costs most, and why it is out of the question, if it is."""

    schedule: Schedule
    layout: Layout
    cost: Cost
    excluded: str = ""


@dataclass(frozen=True)
class Decision:
    """What was chosen among which candidates, by which rates."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    rates: Rates


def schedules_to_try(
    asked: Schedule | Auto, world: int, inside: int | None, *, fewer_queries: bool = False
) -> list[Schedule]:
    """What a schedule may turn out to be; of equals the first is taken. Queries go to keys where they are fewer."""
    if not isinstance(asked, Auto):
        return [asked]
    found: list[Schedule] = [Ring("direct"), *([Ring("forward")] if world > 2 else []), AllGather(), Ulysses()]
    if inside is not None and 1 < inside < world:
        found += [DoubleRing(inside), Ulysses(degree=inside)]
    if fewer_queries:
        found.append(Tree("sharded"))
    return found


def layouts_to_try(
    asked: str | Layout,
    mask: Mask,
    length: int,
    kv_length: int,
    world: int,
    kv_heads: int | None = None,
    replicated: bool = False,
) -> list[Layout]:
    """What a layout may turn out to be: those that hold about as many tokens on every rank."""
    if asked != "auto" or replicated:  # of replicated queries, work is as even as keys
        name = "zigzag" if asked == "auto" else asked
        return [resolve_layout(name, mask, length, kv_length, world, kv_heads, replicated)]
    names = ["zigzag", "balanced"]
    documents = mask.documents
    if documents is not None and len(documents.queries) == 1:
        names.append("document_zigzag")
        if sum(a != b for a, b in zip(documents.queries[0], documents.queries[0][1:], strict=False)) >= world:
            names.append("whole_documents")
    layouts = [resolve_layout(name, mask, length, kv_length, world, kv_heads) for name in names]
    even = [x for x in layouts if max(map(len, x.queries)) <= UNEVEN * length / world or x.name != "whole_documents"]
    return list({repr(x.content): x for x in reversed(even)}.values())[::-1]  # of equals the first


def work_of(
    schedule: Schedule,
    mask: Mask,
    held: Layout,
    length: int,
    kv_length: int,
    world: int,
    rank: int,
    heads: tuple[int, int] | None = None,
) -> Itinerary:
    """The itinerary of a rank; in Ulysses of the ranks that it trades with, as one, for the heads that it gets."""
    degree = heads_degree(schedule, world)
    inner = schedule.inner if isinstance(schedule, Ulysses) else schedule
    whole = mask, held.merged(degree), inner, length, kv_length, world // degree, rank // degree
    if not mask.by_head or heads is None:
        return itinerary(*whole)
    keys = deal_heads(*heads, degree).keys[rank % degree]
    return itinerary(*whole, heads[1], range(keys.start, keys.stop))


def decide(
    world: World,
    schedules: Sequence[Schedule],
    layouts: Sequence[Layout],
    mask: Mask,
    length: int,
    kv_length: int,
    call: Call,
    rates: Rates,
    memory: int | None,
) -> Decision:
    """The cheapest for the rank that it costs most, the same on every rank; one small all-gather.

    ValueError, on every rank, where all of them need more than ``memory`` bytes per batch row.
    """
    ways = [(schedule, layout) for layout in layouts for schedule in schedules]
    record, failure = torch.full((len(ways), 5), torch.nan, dtype=torch.float64), None
    try:
        for n, (s, held) in enumerate(ways):
            heads = call.heads, call.kv_heads
            work = work_of(s, mask, held, length, kv_length, world.size, world.rank, heads)
            c = cost(s, held, work, call, rates, world.rank)
            record[n] = torch.tensor([c.forward, c.backward, c.kernel, c.bytes, c.memory], dtype=torch.float64)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    everybodys = torch.stack(world.all_gather(record.to(world.control_device), "agree")).cpu()
    failed = everybodys.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    if failed:
        why = f": {failure}" if failure else ""
        raise ValueError(f"seqpar.plan: ranks {failed} could not predict what schedules cost{why}") from failure
    slowest = everybodys[:, :, :2].sum(-1).argmax(0)
    candidates = []
    for n, (schedule, layout) in enumerate(ways):
        forward, backward, kernel, *_ = everybodys[slowest[n], n].tolist()
        most = everybodys[:, n].amax(0)
        found = Cost(forward, backward, kernel, int(most[3]), int(most[4]))
        excluded = f"needs {found.memory:,} bytes" if memory is not None and found.memory > memory else ""
        candidates.append(Candidate(schedule, layout, found, excluded))
    allowed = [candidate for candidate in candidates if not candidate.excluded]
    if not allowed:
        least = min(candidate.cost.memory for candidate in candidates)
        raise ValueError(
            f"Auto(memory=): got {memory:,} bytes per batch row, expected at least {least:,}, the least that any "
            "schedule needs; allow more, or use more ranks"
        )
    quickest = min(candidate.cost.seconds for candidate in allowed)
    alike = [candidate for candidate in allowed if candidate.cost.seconds <= ALIKE * quickest]
    chosen = min(alike, key=lambda candidate: candidate.cost.bytes)
    return Decision(chosen, tuple(candidates), rates)
