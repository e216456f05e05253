"""What decoding costs with attention on workers, and without: bytes, seconds, batches, tokens per dollar.

Pure formulas, a roofline for each side: docs/offload_costs.md says where they come from and what they leave out. Units
are bytes, seconds, FLOP and dollars; a step makes one token for every sequence of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model: its layers, heads and parameters; `active` of them, if not all, compute a token."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    active: int | None = None

    @property
    def computing(self) -> int:
        """Parameters that compute one token."""
        return self.active or self.parameters

    def kv_bytes(self, context: int, size: int) -> int:
        """Of K and V of one sequence, all layers, in elements of `size` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context * size


@dataclass(frozen=True, kw_only=True)
class Pool:
    """`count` devices alike. Each: FLOP/s, bytes/s and bytes of memory that programs get out of it, $ per hour."""

    count: int
    flops: float
    memory: float
    bandwidth: float
    price: float

    @property
    def dollars(self) -> float:
        """Per hour, of all."""
        return self.count * self.price


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is planned: a model and a context, on model devices, with workers for attention behind a link.

    Workers hold a share of the KV heads each, of one of `segments` parts of every sequence. Each device of either side
    has a link of `link` bytes/s each way; a message of no size takes `latency` seconds. `size`: bytes of an element.
    `header`: bytes of a frame besides its tensors, those behind them included.
    """

    shape: Shape
    context: int
    size: int
    model: Pool
    workers: Pool
    link: float
    latency: float
    segments: int = 1
    header: int = 0

    @property
    def groups(self) -> int:
        """How many parts the KV heads are dealt in."""
        return self.workers.count // self.segments

    @property
    def share(self) -> float:
        """Of all K and V, what the worker with the most heads holds."""
        return math.ceil(self.shape.kv_heads / self.groups) / self.shape.kv_heads / self.segments

    @property
    def links(self) -> int:
        """That carry traffic at once: those of the side with fewer."""
        return min(self.model.count, self.workers.count)

    @property
    def headers(self) -> int:
        """Bytes of headers per layer and step: of q, of k and v (empty but for one segment), and of o."""
        return self.header * max(self.model.count, self.groups) * 3 * self.segments

    def moved(self, batch: float) -> float:
        """Bytes both ways per layer and step, headers included."""
        return wire_bytes(self.shape, batch, self.size, self.segments) + self.headers

    @property
    def dollars(self) -> float:
        """Per hour, of both sides."""
        return self.model.dollars + self.workers.dollars

    @property
    def most(self) -> int:
        """The largest batch that the workers' memory holds."""
        return int(self.workers.memory / (self.shape.kv_bytes(self.context, self.size) * self.share))


def sent_bytes(shape: Shape, batch: float, size: int, segments: int = 1) -> float:
    """q to every segment, k and v to one: per layer and step, without headers."""
    return size * batch * (segments * shape.heads + 2 * shape.kv_heads) * shape.head_dim


def returned_bytes(shape: Shape, batch: float, size: int, segments: int = 1) -> float:
    """o of every segment; where they are several, with its log-sum-exp in fp32: per layer and step, without headers."""
    lse = 4 * segments * batch * shape.heads if segments > 1 else 0
    return size * batch * segments * shape.heads * shape.head_dim + lse


def wire_bytes(shape: Shape, batch: float, size: int, segments: int = 1) -> float:
    """Both ways, per layer and step, without headers; whatever the context's length.

    By heads (one segment) ``e*B*(2*H*D + 2*Hkv*D)``, else ``e*B*(2*S*H*D + 2*Hkv*D) + 4*S*B*H``.
    """
    return sent_bytes(shape, batch, size, segments) + returned_bytes(shape, batch, size, segments)


def model_seconds(shape: Shape, batch: float, size: int, pool: Pool) -> float:
    """All of a step but attention: 2 FLOP per parameter and token, or reading the weights, whichever takes longer."""
    read = min(shape.parameters, shape.computing * max(1.0, batch))
    return max(2 * shape.computing * batch / pool.flops, size * read / pool.bandwidth) / pool.count


def attention_seconds(shape: Shape, batch: float, context: int, size: int, pool: Pool, share: float) -> float:
    """Of a step, on a device that holds `share` of K and V: reading them, or ``4*H*D`` FLOP per key and layer."""
    read = shape.kv_bytes(context, size) / pool.bandwidth
    computed = 4 * shape.layers * shape.heads * shape.head_dim * context / pool.flops
    return batch * share * max(read, computed)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one batch's step: on model devices, on workers, and on the way: bytes, then messages of no size.

    busy: how long the fuller direction of a link is taken.
    """

    model: float
    attention: float
    transfer: float = 0.0
    latency: float = 0.0
    busy: float = 0.0

    @property
    def network(self) -> float:
        """There and back, in all layers."""
        return self.transfer + self.latency

    @property
    def sequence(self) -> float:
        """Of a batch by itself: one thing after another."""
        return self.model + self.attention + self.network

    @property
    def rotation(self) -> float:
        """Of two batches like it that take turns: each side serves both, and none can overtake itself."""
        return max(2 * self.model, 2 * self.attention, 2 * self.busy, self.sequence)


def step_of(setup: Setup, batch: float) -> Step:
    """Of one batch of so many sequences."""
    shape, size, link = setup.shape, setup.size, setup.links * setup.link
    back = returned_bytes(shape, batch, size, setup.segments)
    there = sent_bytes(shape, batch, size, setup.segments)
    return Step(
        model=model_seconds(shape, batch, size, setup.model),
        attention=attention_seconds(shape, batch, setup.context, size, setup.workers, setup.share),
        transfer=shape.layers * setup.moved(batch) / link,
        latency=shape.layers * 2 * setup.latency,
        busy=shape.layers * max(there, back) / link,
    )


def minimum_bandwidth(setup: Setup, batch: float, share: float) -> float:
    """Bytes/s of each link, so that transfers take at most `share` of the time of model and attention.

    Lamina's (arXiv 2405.01814): ``bytes / (share * (t_model + t_attention))``; latency is left out.
    """
    step = step_of(setup, batch)
    return setup.shape.layers * setup.moved(batch) / (share * (step.model + step.attention)) / setup.links


def balance(setup: Setup) -> float | None:
    """The batch whose model and attention parts take as long; None where attention is always the shorter one.

    Below it the model is the slower one, above it the workers.
    """
    one = step_of(setup, 1).attention
    if one <= 2 * setup.shape.computing / setup.model.flops / setup.model.count:
        return None
    low, high = 0.0, 1.0
    while step_of(setup, high).attention < step_of(setup, high).model:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        step = step_of(setup, middle)
        low, high = (middle, high) if step.attention < step.model else (low, middle)
    return high


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way to decode: its batch, the most that memory holds, and what comes out.

    each: sequences of one batch; of the larger one, in rotation. step: of that one. seconds: from a sequence's token to
    its next one. dollars: per hour.
    """

    batch: int
    most: int
    each: int
    step: Step
    seconds: float
    dollars: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.batch / self.seconds

    @property
    def per_dollar(self) -> float:
        """Tokens per dollar; infinite where nothing costs anything."""
        return 3600 * self.speed / self.dollars if self.dollars else math.inf


def in_sequence(setup: Setup, batch: int | None = None, limit: float = math.inf) -> Outcome | None:
    """With workers, all sequences in one batch: `batch` of them, or the most that memory and `limit` seconds allow."""
    return _outcome(setup.most, batch, limit, setup.dollars, lambda n: step_of(setup, n), lambda step: step.sequence, 1)


def in_rotation(setup: Setup, batch: int | None = None, limit: float = math.inf) -> Outcome | None:
    """With workers, in two batches that take turns, each half of them. None where there is but one sequence."""
    return _outcome(setup.most, batch, limit, setup.dollars, lambda n: step_of(setup, n), lambda step: step.rotation, 2)


def alone(setup: Setup, pool: Pool, batch: int | None = None, limit: float = math.inf) -> Outcome | None:
    """On `pool` without workers, which has K and V beside the weights. None where not one sequence has room."""
    shape, size = setup.shape, setup.size
    room = pool.memory * pool.count - size * shape.parameters
    most = max(0, int(room / shape.kv_bytes(setup.context, size)))

    def step(n: int) -> Step:
        attended = attention_seconds(shape, n, setup.context, size, pool, 1 / pool.count)
        return Step(model=model_seconds(shape, n, size, pool), attention=attended)

    return _outcome(most, batch, limit, pool.dollars, step, lambda step: step.sequence, 1)


def _outcome(
    most: int,
    batch: int | None,
    limit: float,
    dollars: float,
    step: Callable[[int], Step],
    seconds: Callable[[Step], float],
    batches: int,
) -> Outcome | None:
    """With as many sequences, in so many batches, as `most`, or `batch` if less, and `limit` seconds allow."""
    low, high = batches, min(most, batch or most)

    def took(total: int) -> float:
        return seconds(step(-(-total // batches)))

    if high < low or took(low) > limit:
        return None
    while low < high:  # more sequences never take less time
        middle = (low + high + 1) // 2
        low, high = (middle, high) if took(middle) <= limit else (low, middle - 1)
    each = -(-low // batches)
    return Outcome(batch=low, most=most, each=each, step=step(each), seconds=took(low), dollars=dollars)
