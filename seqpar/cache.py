"""Keys and values of what was generated so far, spread over ranks, without those that no later query can see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from seqpar.comm import Dealt, Group, agree, connect, to_heads
from seqpar.kernels import Kernel, Partial, kernel_named

from . import tree
from .functional import attention
from .masks import Documents, Mask, check_int
from .planning import Plan, fingerprint, plan
from .schedules import Schedule, Tree, node_size, resolve_schedule
from .shards import Memory, Rooms, Shard, Step, joined
from .stores import Appended
from .validation import HeadShape, check_scale

CAPACITY, CHUNK = 4096, 512


class KVCache:
    """Growing texts' keys and values, spread evenly over ranks, kept only while the mask lets a later query see them.

    ::

        cache = seqpar.KVCache(mask, heads=(32, 8), head_dim=128, capacity=100_000, layers=32, group=group)
        out = cache.attend(q, k, v, layer=0)  # the next tokens' [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv]

    Every rank calls it with the same tokens, keeps those keys that are its own, attends to them, and one exchange
    merges what all ranks found (Tree attention): results are those of the whole text, and the same on every rank to the
    last bit. Several tokens at once see each other as the mask says: so drafts are verified. All memory is taken at the
    start. A causal head has room for ``capacity`` tokens, over all ranks; one with a window, for the window; a
    sparsely-sharded one, for its band and its stripes.

    Args:
        mask: as for :func:`seqpar.plan`, causal and without documents: a batch row holds one text.
        heads, head_dim: ``(query heads, KV heads)`` and ``(D, Dv)``, or one number for both.
        capacity: tokens that each batch row may have.
        batch: rows.
        layers: that share the mask; each has room of its own.
        group: the ranks, as for :func:`seqpar.plan`; None for this one alone.
        schedule: ``tree``, or a :class:`Tree` that says how partial results are merged.
        dtype, device: of what is kept.
        page: tokens that are kept on one rank before the next rank's turn; the mask's blocks where it has stripes.
        chunk: the most tokens appended at once where a part of the mask forgets keys; longer calls are cut.
    """

    def __init__(
        self,
        mask: Mask,
        *,
        heads: int | tuple[int, int],
        head_dim: int | tuple[int, int],
        capacity: int = CAPACITY,
        batch: int = 1,
        layers: int = 1,
        group: Group = None,
        schedule: str | Tree = "tree",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        if not isinstance(mask, Mask):
            raise ValueError(f"mask: got {mask!r}, expected a mask such as seqpar.Causal()")
        shape = HeadShape.of(heads, head_dim, dtype)
        for name, value in (("heads", shape.heads), ("head_dim", shape.head_dim), ("dtype", dtype)):
            if value is None:
                raise ValueError(f"{name}: got None, expected what the cache is to hold")
        assert shape.heads is not None, "checked just now"
        assert shape.head_dim is not None, "checked just now"
        for name, number in (("capacity", capacity), ("chunk", chunk)):
            check_int(name, number, least=1, remedy="it is a number of tokens")
        check_int("batch", batch, least=1, remedy="it is a number of rows")
        check_int("layers", layers, least=1, remedy="it is a number of layers")
        self.mask, self.world = mask, connect(group)
        self.heads, self.kv_heads = shape.heads
        self.capacity, self.batch, self.layers, self.chunk = capacity, batch, layers, chunk
        self.schedule = self._tree(schedule)
        self._levels = [x for x in self.world.split(node_size(self.schedule, self.world.size)) if x.size > 1]
        place = self.world.rank, self.world.size
        rooms = Rooms(mask, self.kv_heads, capacity=capacity, chunk=chunk, place=place, page=page)
        self.page, self._rooms = rooms.page, rooms
        self._head_dim, self._dtype, self._device = shape.head_dim, dtype, torch.device(device)
        self._shard = self._take_memory()
        self._lengths = [[0] * batch for _ in range(layers)]
        self._written = [[0] * batch for _ in range(layers)]  # the longest that each text was since it was freed
        self._agreed = False
        self._plans: WeakKeyDictionary[Plan, list[int]] = WeakKeyDictionary()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each batch row that every layer has."""
        return tuple(min(row) for row in zip(*self._lengths, strict=True))

    @property
    def length(self) -> int:
        """Tokens of the longest row that every layer has."""
        return max(self.lengths)

    @property
    def resident_bytes(self) -> int:
        """What this rank holds: its room for all layers and batch rows, whatever is in it."""
        return self._shard.nbytes

    def resident_pages(self, row: int = 0) -> list[int]:
        """How many pages of a batch row this rank keeps for each KV head that later queries can see."""
        length = self.lengths[row]
        seen = torch.zeros(self.kv_heads, -(-length // self.page), dtype=torch.bool)
        for store in self._rooms.stores:
            seen[store.heads.start : store.heads.stop] |= store.pages(length)
        return seen.sum(1).tolist()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int = 0,
        counts: Sequence[int] | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
        kernel: str = "auto",
    ) -> Tensor:
        """Append the next tokens' keys and values, and attend to all that their queries see. Every rank calls it alike.

        Args:
            q: ``[B, T, H, D]``, of the tokens that are appended, the same on every rank.
            k: ``[B, T, Hkv, D]``.
            v: ``[B, T, Hkv, Dv]``.
            layer: whose keys they are.
            counts: how many of the T tokens each batch row appends, its last ones; what stands before is padding, whose
                output is 0. All of them by default.
            scale: of the scores; ``D ** -0.5`` by default.
            sinks: softmax offsets ``[H]``.
            kernel: as for :func:`seqpar.attention`.

        Returns:
            ``[B, T, H, Dv]`` in q's dtype.

        Raises:
            ValueError: for other shapes, dtypes or devices than the cache's, and for more tokens than fit; the cache is
                then as it was. At a text's first call on every rank, where the ranks' caches or calls differ.
        """
        rows, backend = self._admit(q, k, v, None, layer, counts, scale, sinks, kernel)
        whole = joined(self._append(q, k, v, layer, rows, scale, sinks, backend))
        return tree.merged(self._levels, whole, q.dtype, self.schedule.merge, wants_lse=False)[0]

    def plan(
        self, tokens: int, *, counts: Sequence[int] | None = None, layout: str = "zigzag",
        schedule: str | Schedule = "tree",
    ) -> Plan:  # fmt: skip
        """A plan of the next ``tokens`` tokens, for ranks that share them: they go to :meth:`prefill` in every layer.

        ``schedule``: how the first tokens of a text meet each other; those that follow go to the keys where these are
        (``tree``).
        """
        rows = self._counted(counts, tokens)
        self._check_room(rows, self._lengths[0])
        resolved = resolve_schedule(schedule, self.world.inside)
        if isinstance(schedule, Tree) and schedule not in (Tree(), Tree("sharded")):
            raise ValueError(f"schedule: got {schedule}, expected 'tree': each rank gets the output of its own tokens")
        if isinstance(resolved, Tree) or any(map(any, self._lengths)):
            resolved = Tree("sharded")
        mask = self.mask
        if min(rows) < tokens:
            mask = mask & Documents([sorted({0, tokens - count, tokens}) for count in rows])
        made = plan(
            mask, length=tokens, group=self.world, layout=layout, schedule=resolved, heads=(self.heads, self.kv_heads),
            head_dim=self._head_dim, dtype=self._dtype,
        )  # fmt: skip
        self._plans[made] = rows
        return made

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        *,
        layer: int = 0,
        scale: float | None = None,
        sinks: Tensor | None = None,
        kernel: str = "auto",
    ) -> Tensor:
        """As :meth:`attend`, where each rank has its tokens of a :meth:`plan`, and gets their output.

        Args:
            q: ``[B, T, H, D]``, this rank's tokens of the plan; so are k and v.
            plan: from :meth:`plan`, which was told how many tokens each row has; the output of padding means nothing.
            layer, scale, sinks, kernel: as for :meth:`attend`.

        Keys and values go to the ranks that keep them; where the plan's schedule is ``tree``, so do queries.
        """
        rows, backend = self._admit(q, k, v, plan, layer, None, scale, sinks, kernel)
        meets = isinstance(plan.schedule, Tree)
        moved = [q, k, v] if meets else [k, v]
        everyone = [slice(0, x.shape[2]) for x in moved]
        dealt = [Dealt([heads] * self.world.size, plan.tokens_on(q.device)) for heads in everyone]
        out = None if meets else attention(q, k, v, plan, scale=scale, sinks=sinks, kernel=kernel)
        *queries, keys, values = to_heads(self.world, moved, dealt, "kv")
        partials = self._append(queries[0] if meets else None, keys, values, layer, rows, scale, sinks, backend)
        return tree.merged_of_tokens(plan, joined(partials), q.dtype)[0] if out is None else out

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget all but the first tokens of every row: of each row so many, where a list is given. On all ranks alike.

        Raises ValueError, and changes nothing, for more tokens than there are; and where the mask forgets keys, for
        fewer than the longest that the text was less :attr:`chunk` (or none): what went before may be overwritten.
        """
        wanted = self.check_truncate(length)
        self._shard.truncate(wanted)
        self._set_lengths(wanted)

    def check_truncate(self, length: int | Sequence[int]) -> list[int]:
        """The length of each row after :meth:`truncate`, or its ValueError; nothing is changed."""
        wanted = [length] * self.batch if isinstance(length, int) else list(length)
        if len(wanted) != self.batch or not all(_is_count(n) for n in wanted):
            raise ValueError(f"length: got {length!r}, expected a number of tokens, or one for each row")
        for lengths, written in zip(self._lengths, self._written, strict=True):
            for row, (n, had, most) in enumerate(zip(wanted, lengths, written, strict=True)):
                if n > had:
                    raise ValueError(
                        f"length: got {n} for row {row}, expected at most {had}, its length in every layer"
                    )
                if self._rooms.forgets and 0 < n < min(had, most - self.chunk):
                    raise ValueError(
                        f"length: got {n} for row {row} of {had} tokens, expected 0, or at least {most - self.chunk}: "
                        "the mask forgets keys, and those of more than the last chunk may be gone"
                    )
        return wanted

    def free(self, rows: Iterable[int] | None = None) -> None:
        """Forget the texts of some rows, or of all, which may then begin anew. On all ranks alike."""
        freed = set(range(self.batch) if rows is None else self._rows(rows))
        self._shard.truncate([0 if row in freed else None for row in range(self.batch)])
        for values in (*self._lengths, *self._written):
            values[:] = [0 if row in freed else n for row, n in enumerate(values)]
        self._agreed = False

    def fork(self, row: int, into: int | Sequence[int]) -> None:
        """Give other rows the text of ``row``, from which they then go on by themselves. On all ranks alike."""
        (row,), targets = self._rows([row]), self._rows([into] if isinstance(into, int) else into)
        order = list(range(self.batch))
        for target in targets:
            order[target] = row
        self.reorder(order)

    def reorder(self, rows: Sequence[int]) -> None:
        """Let each row continue the text of another: row ``i`` that of ``rows[i]``, as in beam search."""
        order = self._rows(rows)
        if len(order) != self.batch:
            raise ValueError(f"rows: got {len(order)}, expected {self.batch}, whose text each row is to continue")
        changed = [row for row, source in enumerate(order) if row != source]
        sources = [order[row] for row in changed]
        self._shard.reorder(changed, sources)
        for values in (*self._lengths, *self._written):
            values[:] = [values[source] for source in order]
        self._agreed = False

    def _take_memory(self) -> Memory:
        return Shard(
            self._rooms, head_dim=self._head_dim, batch=self.batch, layers=self.layers, dtype=self._dtype,
            device=self._device,
        )  # fmt: skip

    def _append(
        self, q: Tensor | None, k: Tensor, v: Tensor, layer: int, counts: Sequence[int], scale: float | None,
        sinks: Tensor | None, backend: Kernel,
    ) -> list[Partial]:  # fmt: skip
        """Write new tokens, and attend with their queries (if any) to what is here: a chunk at a time where keys go."""
        before = list(self._lengths[layer])
        try:
            return self._append_chunks(q, k, v, layer, counts, scale, sinks, backend)
        except Exception:
            self._lengths[layer][:] = before
            raise

    def _append_chunks(
        self, q: Tensor | None, k: Tensor, v: Tensor, layer: int, counts: Sequence[int], scale: float | None,
        sinks: Tensor | None, backend: Kernel,
    ) -> list[Partial]:  # fmt: skip
        partials = []
        for new, some in self._cut(k.shape[1], counts):
            step = self._advance(layer, some, new.stop - new.start)
            mine = sinks if self.world.rank == 0 else None
            factor = k.shape[3] ** -0.5 if scale is None else scale
            queries = None if q is None else q[:, new]
            found = self._shard.take(
                layer, step, queries, k[:, new], v[:, new], scale=factor, kernel=backend, sinks=mine
            )
            if found is not None:
                partials.append(found)
        return partials

    def _cut(self, tokens: int, counts: Sequence[int]) -> list[tuple[slice, tuple[int, ...]]]:
        """Slices of the tokens, and how many of each every row appends."""
        size = self.chunk if self._rooms.forgets else tokens
        cuts = []
        for first in range(0, tokens, size):
            end = min(first + size, tokens)
            cuts.append((slice(first, end), tuple(max(0, end - max(first, tokens - count)) for count in counts)))
        return cuts

    def _advance(self, layer: int, counts: Sequence[int], tokens: int) -> Step:
        lengths, written = self._lengths[layer], self._written[layer]
        lengths[:] = [length + count for length, count in zip(lengths, counts, strict=True)]
        written[:] = [max(pair) for pair in zip(written, lengths, strict=True)]
        return self._rooms.step(tuple(map(Appended, lengths, counts)), tokens)

    def _set_lengths(self, wanted: Sequence[int]) -> None:
        """Of all layers; how long a text was still counts, unless it begins anew."""
        for lengths, written in zip(self._lengths, self._written, strict=True):
            lengths[:] = wanted
            written[:] = [most if n else 0 for n, most in zip(wanted, written, strict=True)]
        self._agreed = False

    def _tree(self, schedule: str | Tree) -> Tree:
        found = resolve_schedule(schedule, self.world.inside)
        if not isinstance(found, Tree) or not found.replicated:
            raise ValueError(f"schedule: got {schedule!r}, expected 'tree' or a seqpar.Tree(merge=, degree=)")
        return found

    def _rows(self, rows: Iterable[int]) -> list[int]:
        found = list(rows) if isinstance(rows, Iterable) else [rows]
        for row in found:
            if not _is_count(row) or row >= self.batch:
                raise ValueError(f"row: got {row!r}, expected 0 .. {self.batch - 1}")
        return found

    def _admit(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan | None, layer: int, counts: Sequence[int] | None,
        scale: float | None, sinks: Tensor | None, kernel: str,
    ) -> tuple[list[int], Kernel]:  # fmt: skip
        """How many tokens each row appends, and the kernel; ValueError for what can't be: on all ranks at first."""
        found, refusal = None, None
        try:
            found = self._check(q, k, v, plan, layer, counts, scale, sinks), kernel_named(kernel)
            found[1].check(q, k, v, [])
        except Exception as error:  # whatever it is, the other ranks must hear of it
            refusal = error
        if self._agreed and refusal is not None:
            raise refusal
        if not self._agreed:
            tokens = q.shape[1:2] if plan is None else plan.length
            call = layer, tokens, found and found[0], scale, kernel, sinks is not None, plan and plan.identity
            agree(self.world, "seqpar.KVCache", self._fields(call), refusal)
            self._agreed = True
        assert found is not None, "an inadmissible call was agreed on"
        return found

    def _fields(self, call: object) -> dict[str, object]:
        """What all ranks must have in common: the cache, what is in it, and the call."""
        return {
            "mask": fingerprint(self.mask),
            "heads": (self.heads, self.kv_heads),
            "head_dim": self._head_dim,
            "dtype": self._dtype,
            "capacity": (self.capacity, self.page, self.chunk),
            "batch and layers": (self.batch, self.layers),
            "schedule": self.schedule,
            "lengths": self._lengths,
            "call": call,
        }

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan | None, layer: int, counts: Sequence[int] | None,
        scale: float | None, sinks: Tensor | None,
    ) -> list[int]:  # fmt: skip
        if not _is_count(layer) or layer >= self.layers:
            raise ValueError(f"layer: got {layer!r}, expected 0 .. {self.layers - 1}; make the cache with more layers")
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
            raise ValueError(
                "KVCache: got inputs that require gradients, expected none, for nothing differentiates a cache; call "
                "it under torch.no_grad()"
            )
        check_scale(scale)
        tokens, least = q.shape[1] if q.dim() == 4 else 0, "at least one, "
        if plan is not None:
            if plan not in self._plans:
                raise ValueError(f"plan: got {plan!r}, expected one that this cache's plan() made")
            if not isinstance(plan.schedule, Tree) and any(self._lengths[layer]):
                raise ValueError(
                    f"plan: got {plan.schedule} for tokens that follow {max(self._lengths[layer])} others, expected "
                    "queries that go to the keys; make it anew with cache.plan"
                )
            tokens, least = len(plan.queries), f"{len(plan.queries)} of this rank's, "
        for name, x, heads, width in (
            ("q", q, self.heads, self._head_dim[0]),
            ("k", k, self.kv_heads, self._head_dim[0]),
            ("v", v, self.kv_heads, self._head_dim[1]),
        ):
            if tuple(x.shape) != (self.batch, tokens, heads, width) or not (tokens or plan):
                expected = f"[{self.batch}, tokens, {heads}, {width}], of as many tokens, {least}in q, k and v"
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
            if x.dtype != self._dtype or x.device != self._device:
                raise ValueError(
                    f"{name}: got {x.dtype} on {x.device}, expected the cache's {self._dtype} on {self._device}"
                )
        if sinks is not None and (
            tuple(sinks.shape) != (self.heads,) or not sinks.is_floating_point() or sinks.device != self._device
        ):
            got = f"{tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
            raise ValueError(f"sinks: got {got}, expected a floating [{self.heads}] on {self._device}")
        tokens = tokens if plan is None else plan.length
        rows = self._counted(counts, tokens) if plan is None else self._plans[plan]
        self._check_room(rows, self._lengths[layer])
        return rows

    def _counted(self, counts: Sequence[int] | None, tokens: int) -> list[int]:
        """How many of so many tokens each row appends."""
        rows = [tokens] * self.batch if counts is None else list(counts) if isinstance(counts, Sequence) else [-1]
        if len(rows) != self.batch or not all(_is_count(n) and n <= tokens for n in rows):
            raise ValueError(f"counts: got {counts!r}, expected 0 .. {tokens} for each of {self.batch} rows")
        return rows

    def _check_room(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        for row, (length, count) in enumerate(zip(lengths, rows, strict=True)):
            if length + count > self.capacity:
                raise ValueError(
                    f"KVCache: got {count} tokens for row {row}, which has {length}, expected at most "
                    f"{self.capacity - length}, for capacity={self.capacity}; make it with a larger capacity, or free "
                    "or truncate the row"
                )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
