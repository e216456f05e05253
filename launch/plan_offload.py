"""`seqpar plan-offload`: whether attention on workers pays, worked out from sizes, data sheets and prices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from seqpar.offload.frames import HEADER_BYTES, TRAILER_BYTES

from . import offload_costs as costs
from .offload_costs import Outcome, Pool, Setup, Shape
from .offload_devices import MODELS, device_names, figures_of
from .offload_shape import read_shape
from .options import OptionError, at_least, option, positive

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_BY_HAND = ("layers", "heads", "kv_heads", "head_dim", "hidden", "parameters", "active_parameters")
_HUGE = 1e15


@dataclass(frozen=True, kw_only=True)
class PlanOffloadConfig:
    """Plan attention offload: bytes on the wire, time per token, batches and tokens per dollar, with and without.

    Nothing runs: two rooflines and a link, as docs/offload_costs.md explains them. Prices are yours to give.
    """

    model: str | None = None
    """A known model's name, or the folder of a Hugging Face model (of which config.json is read)."""
    layers: int | None = None
    """Without --model: its layers."""
    heads: int | None = None
    """Without --model: query heads."""
    kv_heads: int | None = None
    """Without --model: KV heads. Default: --heads."""
    head_dim: int | None = None
    """Without --model: elements of a head."""
    hidden: int | None = None
    """Without --model and --head-dim: the model's width, of which each head has its part."""
    parameters: float | None = None
    """Without --model: parameters, as 8.03e9."""
    active_parameters: float | None = None
    """Without --model: those that compute one token, in a mixture of experts. Default: all."""
    context: int = 32768
    """Tokens of each sequence."""
    batch: int | None = None
    """Sequences decoded at once. Default: as many as memory and --token-ms allow."""
    token_ms: float | None = None
    """The longest time between two tokens of a sequence, in ms. Default: any."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights, K and V, and what travels."""

    device: str = "h100-sxm"
    """The devices with the weights, by name."""
    devices: int = 1
    """How many of them."""
    device_tflops: float | None = None
    """TFLOP/s of one, in --dtype. Default: its data sheet's, bf16 and dense."""
    device_memory: float | None = None
    """GB of one. Default: its data sheet's."""
    device_bandwidth: float | None = None
    """GB/s of one's memory. Default: its data sheet's."""
    device_price: float | None = None
    """$ per hour of one. Default: an example."""

    worker: str = "h20"
    """The attention workers, by name: a device, or a CPU host by its memory, as cpu-12xddr5-4800."""
    workers: int = 1
    """How many of them."""
    worker_tflops: float | None = None
    """TFLOP/s of one, in --dtype. Default: its data sheet's, bf16 and dense."""
    worker_memory: float | None = None
    """GB of one. Default: its data sheet's; 64 per channel of a CPU host."""
    worker_bandwidth: float | None = None
    """GB/s of one's memory. Default: its data sheet's."""
    worker_price: float | None = None
    """$ per hour of one. Default: an example."""
    segments: int | None = None
    """Parts that a sequence is cut in; workers of one part share the KV heads. Default: what shares most evenly."""

    link_bandwidth: float = 50
    """GB/s each way, of every device's link to the other side; 50 is 400 Gb/s."""
    link_latency: float = 30
    """Microseconds until a message of no size is there."""
    transfer_share: float = 0.2
    """Of the time of model and attention, what transfers may take: for the least bandwidth."""
    alone: int | None = None
    """Devices to compare with, without workers. Default: about as many as cost the same."""
    flops_reached: float = 0.6
    """The part of TFLOP/s that programs get."""
    bandwidth_reached: float = 0.8
    """The part of memory bandwidth that programs get."""
    memory_used: float = 0.9
    """The part of memory that weights, K and V may take."""
    json: bool = False
    """Print one line of JSON."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("context", "batch", "devices", "workers", "segments", "alone", *_BY_HAND):
            if getattr(self, name) is not None:
                at_least(1, name, getattr(self, name))
                positive(name, getattr(self, name), _HUGE)
        if self.batch is not None and self.token_ms is not None:
            raise OptionError("--batch and --token-ms both say how many sequences; leave one of them out")
        for name in ("transfer_share", "flops_reached", "bandwidth_reached", "memory_used"):
            positive(name, getattr(self, name), 1)
        for name in ("tflops", "memory", "bandwidth", "price"):
            for side in ("device", "worker"):
                value = getattr(self, f"{side}_{name}")
                if value is not None and (name != "price" or value):
                    positive(f"{side}_{name}", value, _HUGE)
        positive("link_bandwidth", self.link_bandwidth, _HUGE)
        if self.token_ms is not None:
            positive("token_ms", self.token_ms, _HUGE)
        if not 0 <= self.link_latency <= _HUGE:
            raise OptionError(f"--link-latency is {self.link_latency}; expected 0 or more microseconds")
        for side in ("device", "worker"):
            if figures_of(getattr(self, side)) is None:
                raise OptionError(f"--{side} is {getattr(self, side)!r}; expected one of {device_names()}")
            if self.dtype == "fp32" and getattr(self, f"{side}_tflops") is None:
                raise OptionError(f"--dtype is fp32, for which no TFLOP/s are listed; give --{side}-tflops")

    def shape(self) -> Shape:
        """Of --model, or by hand. Raises OptionError where options lack or contradict each other."""
        given = [option(name) for name in _BY_HAND if getattr(self, name) is not None]
        if self.model is not None:
            if given:
                raise OptionError(f"--model and {given[0]} both describe the model; leave one of them out")
            return MODELS[self.model] if self.model in MODELS else read_shape(self.model, ", ".join(MODELS))
        if not given:
            raise OptionError(f"no model; give --model, a folder or one of {', '.join(MODELS)}, or --layers and so on")
        for name in ("layers", "heads", "parameters"):
            if getattr(self, name) is None:
                raise OptionError(f"a model by hand needs {option(name)} too")
        assert self.layers is not None, "just checked, and so are the other two"
        assert self.heads is not None
        assert self.parameters is not None
        return Shape(
            layers=self.layers,
            heads=self.heads,
            kv_heads=self._kv_heads(self.heads),
            head_dim=self._head_dim(self.heads),
            parameters=int(self.parameters),
            active=self._active(),
        )

    def _kv_heads(self, heads: int) -> int:
        if heads % (self.kv_heads or heads):
            raise OptionError(f"--kv-heads is {self.kv_heads}; expected a divisor of --heads {heads}")
        return self.kv_heads or heads

    def _head_dim(self, heads: int) -> int:
        if (self.head_dim is None) == (self.hidden is None):
            raise OptionError("a model by hand needs --head-dim, or else --hidden; give one of them")
        if self.hidden is not None and self.hidden % heads:
            raise OptionError(f"--hidden is {self.hidden}; expected a multiple of --heads {heads}, or give --head-dim")
        return self.head_dim or (self.hidden or 0) // heads

    def _active(self) -> int | None:
        if self.active_parameters is None:
            return None
        if self.active_parameters > (self.parameters or 0):
            raise OptionError(f"--active-parameters is {self.active_parameters:g}; expected at most --parameters")
        return int(self.active_parameters)

    def pool(self, side: Literal["device", "worker"], count: int) -> Pool:
        """So many devices, or workers, as programs find them."""
        listed = figures_of(getattr(self, side))
        assert listed is not None, "checked on construction"
        tflops, memory, bandwidth, price = (
            one if (own := getattr(self, f"{side}_{name}")) is None else own for name, one in listed._asdict().items()
        )
        return Pool(
            count=count,
            flops=tflops * 1e12 * self.flops_reached,
            memory=memory * 1e9 * self.memory_used,
            bandwidth=bandwidth * 1e9 * self.bandwidth_reached,
            price=price,
        )

    def setup(self) -> Setup:
        """All of it. Raises OptionError where workers can't share the heads, or memory is too small."""
        shape, size, workers = self.shape(), SIZES[self.dtype], self.pool("worker", self.workers)
        setup = Setup(
            shape=shape,
            context=self.context,
            size=size,
            model=self.pool("device", self.devices),
            workers=workers,
            link=self.link_bandwidth * 1e9,
            latency=self.link_latency * 1e-6,
            segments=self._cut(shape.kv_heads),
            header=HEADER_BYTES + TRAILER_BYTES,
        )
        weights, room = size * shape.parameters, setup.model.memory * self.devices
        if weights > room:
            raise OptionError(
                f"--devices is {self.devices}, with {room / 1e9:,.0f} GB to use; expected {weights / 1e9:,.0f} GB for "
                f"the weights: use {math.ceil(weights / setup.model.memory)} or more"
            )
        wanted = self.batch or 1
        if setup.most < wanted:
            raise OptionError(
                f"--workers is {self.workers}, with room for {setup.most:,} sequences of {self.context:,} tokens; "
                f"expected room for {wanted:,}: use more workers, a shorter --context, or a smaller --batch"
            )
        return setup

    def _cut(self, kv_heads: int) -> int:
        """Segments: as few as share K and V most evenly."""
        possible = [n for n in range(1, self.workers + 1) if self.workers % n == 0 and self.workers // n <= kv_heads]
        if self.segments not in (None, *possible):
            raise OptionError(
                f"--segments is {self.segments}; expected one of {', '.join(map(str, possible))}, so that each has the "
                f"same part of --workers {self.workers}, and at most {kv_heads}, one for each KV head"
            )
        return self.segments or min(possible, key=lambda n: (-(-kv_heads * n // self.workers) / n, n))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A setup and what comes of it: on `pool` without workers, and with workers in the two ways; None where not at all.

    limit: of the seconds between two tokens of a sequence.
    """

    setup: Setup
    pool: Pool
    limit: float
    alone: Outcome | None
    sequence: Outcome | None
    rotation: Outcome | None

    @property
    def best(self) -> Outcome:
        """Of the two ways with workers, the one of more tokens per second."""
        return max((way for way in (self.sequence, self.rotation) if way), key=lambda way: way.speed)


def plan(config: PlanOffloadConfig) -> Plan:
    """Work it out. Raises OptionError for options that don't fit each other."""
    setup = config.setup()
    device = setup.model
    equal = round(setup.dollars / device.price) if device.price else device.count
    pool = dataclasses.replace(device, count=config.alone or max(1, equal))
    limit = math.inf if config.token_ms is None else config.token_ms / 1e3
    sequence = costs.in_sequence(setup, config.batch, limit)
    rotation = costs.in_rotation(setup, config.batch, limit)
    if sequence is None and rotation is None:
        least = costs.step_of(setup, 1).sequence * 1e3
        raise OptionError(f"--token-ms is {config.token_ms:g}; expected at least {least:.3g}, what one sequence takes")
    return Plan(
        setup=setup,
        pool=pool,
        limit=limit,
        alone=costs.alone(setup, pool, config.batch, limit),
        sequence=sequence,
        rotation=rotation,
    )


def told(config: PlanOffloadConfig) -> str:
    """What the command prints: a table and lines, or JSON."""
    from . import offload_report as report

    found = plan(config)
    return report.as_json(found, config) if config.json else report.as_text(found, config)
