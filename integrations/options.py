"""What the frameworks' own configurations can say about attention: flags, a JSON section, keyword arguments."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import seqpar
from seqpar.kernels import KERNEL_NAMES

ScheduleName = Literal["auto", "ring", "double_ring", "allgather", "ulysses", "hybrid"]
MaskName = Literal["causal", "full", "window", "chunked", "s2"]
Exchange = Literal["auto", "forward", "direct"]

_BY_DEGREE = {"double_ring": seqpar.DoubleRing, "hybrid": seqpar.Ulysses}
# Options of one mask or schedule only, and of which.
_BELONGS = {
    "window": ("mask", ("window",)),
    "chunk": ("mask", ("chunked",)),
    "s2_block": ("mask", ("s2",)),
    "s2_local": ("mask", ("s2",)),
    "s2_stride": ("mask", ("s2",)),
    "s2_dense_heads": ("mask", ("s2",)),
    "s2_dense_layers": ("mask", ("s2",)),
    "s2_allow_incomplete": ("mask", ("s2",)),
    "degree": ("schedule", tuple(_BY_DEGREE)),
    "exchange": ("schedule", ("ring", None)),
}


_Options = TypeVar("_Options", bound="AttentionOptions")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How a model's attention is computed, in plain values. Raises ValueError for what doesn't fit together."""

    schedule: Annotated[
        ScheduleName | None,
        "How keys and queries of different ranks meet; by default a ring, or what the framework is told otherwise.",
    ] = None
    degree: Annotated[int | None, "Consecutive ranks inside a node, for double_ring and hybrid."] = None
    exchange: Annotated[Exchange, "The ring's exchange: whole shards, or only the rows that some query needs."] = "auto"
    kernel: Annotated[str, "What computes the local blocks: auto, triton, cpu, reference, ..."] = "auto"
    mask: Annotated[MaskName, "Who attends to whom inside a document."] = "causal"
    window: Annotated[int | None, "Tokens that a query sees with mask window, itself included."] = None
    chunk: Annotated[int | None, "Tokens of a chunk with mask chunked, which is causal inside chunks."] = None
    s2_block: Annotated[int, "Tokens of a block with mask s2, a power of two."] = 64
    s2_local: Annotated[int, "Blocks that every head sees up to the query's own, with mask s2."] = 16
    s2_stride: Annotated[
        int | None,
        "With mask s2, a KV head sees one in so many older blocks; by default as many as there are sparse heads.",
    ] = None
    s2_dense_heads: Annotated[int, "KV heads, the last ones, that see everything with mask s2."] = 0
    s2_dense_layers: Annotated[tuple[int, ...], "Layers, counted from 0, that see everything with mask s2."] = ()
    s2_allow_incomplete: Annotated[bool, "Let there be older blocks that no head sees with mask s2."] = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", (None, *get_args(ScheduleName))),
            ("exchange", get_args(Exchange)),
            ("mask", get_args(MaskName)),
            ("kernel", KERNEL_NAMES),
        ):
            self._one_of(name, allowed)
        if not isinstance(self.s2_dense_layers, (tuple, list)):
            raise ValueError(f"s2_dense_layers: got {self.s2_dense_layers!r}, expected a list of layers")
        object.__setattr__(self, "s2_dense_layers", tuple(self.s2_dense_layers))
        for option in fields(self):
            of, values = _BELONGS.get(option.name, ("", ()))
            if values and getattr(self, option.name) != option.default and getattr(self, of) not in values:
                alone = f"{of} {' or '.join(filter(None, values))}"
                raise ValueError(
                    f"{option.name}: got {getattr(self, option.name)!r} with {of} {getattr(self, of)!r}, expected "
                    f"{alone}, which alone has it: set that, or drop {option.name}"
                )
        for name, needs in (("window", "window"), ("chunk", "chunked")):
            value = getattr(self, name)
            if self.mask == needs and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: got {value!r} with mask {needs}, expected a positive number of tokens")
        _ = self.schedule_object, self.sparse(1 + self.s2_dense_heads)

    @classmethod
    def of(cls: type[_Options], given: Mapping[str, Any], where: str) -> _Options:
        """From a configuration's section. Raises ValueError, naming `where`, for keys that there are not."""
        known = [option.name for option in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"{where}: got unknown key {name!r}; {hint}expected keys among {', '.join(known)}")
        try:
            return cls(**given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    @cached_property
    def schedule_object(self) -> str | seqpar.Ring | seqpar.DoubleRing | seqpar.Ulysses:
        """What `seqpar.plan` takes as its schedule."""
        if self.schedule is None or self.schedule == "ring":
            return seqpar.Ring(exchange=self.exchange)
        return self.schedule if self.degree is None else _BY_DEGREE[self.schedule](degree=self.degree)

    def layer_mask(self, layer: int, kv_heads: int) -> seqpar.Mask:
        """The mask of a layer, counted from 0, inside a document; `kv_heads` are the whole model's."""
        if self.mask == "window":
            assert self.window is not None, "a window was checked"
            return seqpar.SlidingWindow(self.window - 1)
        if self.mask == "chunked":
            assert self.chunk is not None, "a chunk was checked"
            return seqpar.Causal() & seqpar.Chunked(self.chunk)
        if self.mask == "s2" and layer not in self.s2_dense_layers:
            return self.sparse(kv_heads)
        return seqpar.Full() if self.mask == "full" else seqpar.Causal()

    def layer_masks(self, layers: int, kv_heads: int) -> list[seqpar.Mask]:
        """Of each layer. Raises ValueError where the options don't fit the model."""
        wrong = [layer for layer in self.s2_dense_layers if not 0 <= layer < layers]
        if wrong:
            raise ValueError(
                f"s2_dense_layers: got {wrong[0]} for a model of {layers} layers, expected 0 .. {layers - 1}"
            )
        return [self.layer_mask(layer, kv_heads) for layer in range(layers)]

    def sparse(self, kv_heads: int) -> seqpar.SparselySharded:
        """Mask s2 of a layer that is not dense."""
        stride = self.s2_stride or widest_stride(kv_heads, self.s2_dense_heads)
        return seqpar.SparselySharded(
            self.s2_block, self.s2_local, stride, self.s2_dense_heads, allow_incomplete=self.s2_allow_incomplete
        )

    def _one_of(self, name: str, allowed: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(filter(None, allowed))}")


def widest_stride(kv_heads: int, dense_heads: int) -> int:
    """With which heads that are not dense just see every block together."""
    return max(1, kv_heads - dense_heads)


def share_of_heads(mask: seqpar.Mask, kv_heads: int, rank: int, ranks: int, length: int) -> seqpar.Mask:
    """The mask of the KV heads that one of `ranks` tensor-parallel ranks has, of `kv_heads` dealt in order."""
    if not isinstance(mask, seqpar.SparselySharded):
        return mask
    mask.check(length, length, kv_heads)  # together they see everything
    share = kv_heads // ranks
    offsets = mask.residues(kv_heads)[rank * share : (rank + 1) * share]
    return replace(mask, offsets=offsets, dense_heads=share - len(offsets), allow_incomplete=True)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--seqpar-schedule`, `--seqpar-mask` and so on to a parser: an `extra_args_provider` for Megatron-LM."""
    group = parser.add_argument_group("seqpar", "attention over sequences that are split over ranks")
    for name, annotated in get_type_hints(AttentionOptions, include_extras=True).items():
        hint, explanation = get_args(annotated)
        kinds = [hint] if get_origin(hint) is Literal else [k for k in get_args(hint) or (hint,) if k is not type(None)]
        how: dict[str, Any] = {"type": kinds[0]}
        if kinds[0] is bool:
            how = {"action": "store_const", "const": True}
        elif get_origin(hint) is tuple:
            how["nargs"] = "*"
        elif get_origin(kinds[0]) is Literal:
            how = {"choices": get_args(kinds[0])}
        group.add_argument(f"--seqpar-{name.replace('_', '-')}", default=None, help=explanation, **how)
    return parser


def options_of(args: Any) -> AttentionOptions:
    """What parsed arguments, or an object with attributes such as `seqpar_mask`, say; those that are None say nothing.

    Raises ValueError for other attributes that begin so.
    """
    prefix = "seqpar_"
    given = {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}
    return AttentionOptions.of(
        {name: value for name, value in given.items() if value is not None}, "--seqpar- arguments"
    )
