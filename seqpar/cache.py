"""Keys and values of what was generated so far, without those that no later query can see."""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.kernels import kernel_named

from .masks import Mask, check_int
from .parts import HeadGroup, Part
from .ring import attend
from .sections import Bound, Found, Section, Seen, section_of
from .validation import HeadShape, check_scale

NEVER = 1 << 40  # a position that no text reaches


class KVCache:
    """A growing sequence's keys and values, in pages per KV head, freed once the mask hides them from all that follows.

    ::

        cache = seqpar.KVCache(seqpar.SparselySharded(64, 16, 8), heads=(32, 8), head_dim=128)
        out = cache.attend(q, k, v)  # the next tokens' [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv] -> [B, T, H, Dv]

    A causal head keeps everything; one with a window, the window; a sparsely-sharded one, its band and its stripes:
    after ``i`` blocks ``local_blocks + (i - local_blocks) / stride`` pages. Results are those of the whole sequence at
    once, also where several tokens are appended at a time. A long prompt is best appended some thousand tokens at a
    time: what later ones can't see is freed in between, and memory that was needed once is kept.

    Args:
        mask: as for :func:`seqpar.plan`, without documents: a cache holds one document (per batch row, of one length).
        heads, head_dim: ``(query heads, KV heads)`` and ``(D, Dv)``, or one number for both.
        batch: rows.
        dtype, device: of what is kept.
        page: tokens of a page; the mask's blocks where it has stripes, else 64.

    Attributes:
        length: tokens appended so far.
    """

    def __init__(
        self,
        mask: Mask,
        *,
        heads: int | tuple[int, int],
        head_dim: int | tuple[int, int],
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page: int | None = None,
    ) -> None:
        if not isinstance(mask, Mask):
            raise ValueError(f"mask: got {mask!r}, expected a mask such as seqpar.Causal()")
        if mask.documents is not None:
            raise ValueError(f"KVCache: got {mask!r}, expected a mask without documents; give each its own cache")
        shape = HeadShape.of(heads, head_dim, dtype)
        for name, value in (("heads", shape.heads), ("head_dim", shape.head_dim), ("dtype", dtype)):
            if value is None:
                raise ValueError(f"{name}: got None, expected what the cache is to hold")
        assert shape.heads is not None, "checked just now"
        assert shape.head_dim is not None, "checked just now"
        check_int("batch", batch, least=1, remedy="it is a number of rows")
        self.heads, self.kv_heads = shape.heads
        mask.check(1, 1, self.kv_heads)
        every = range(self.kv_heads)
        self._groups = [group.among(every) for group in mask.groups(self.kv_heads)]
        blocks = {part.stripes.block for group in self._groups for part in group.parts if part.stripes is not None}
        (self.page,) = blocks or {64 if page is None else page}
        if page is not None and page != self.page:
            raise ValueError(f"page: got {page}, expected {self.page}, the mask's block; leave it out")
        check_int("page", self.page, least=1, remedy="it is a number of tokens")
        self.length = 0
        self._last = [[_limits(part, NEVER - 1)[1] for part in group.parts] for group in self._groups]
        for group in self._groups:
            if any(_limits(part, 0)[1] > 1 for part in group.parts):
                raise ValueError(
                    f"KVCache: got {mask!r}, under which queries see later keys, expected a causal mask; write "
                    "mask & seqpar.Causal()"
                )
        dim, value_dim = shape.head_dim
        self._k = torch.zeros(batch, 0, 1, dim, dtype=dtype, device=device)  # rows of one head each, page after page
        self._v = torch.zeros(batch, 0, 1, value_dim, dtype=dtype, device=device)
        self._free: list[int] = []  # pages
        self._pages = torch.zeros(self.kv_heads, 0, dtype=torch.int64)  # of each head, by place in the text; -1: freed

    @property
    def resident_pages(self) -> list[int]:
        """How many pages each KV head holds."""
        return (self._pages >= 0).sum(1).tolist()

    @property
    def resident_bytes(self) -> int:
        """Of the pages that are held, over all heads and batch rows."""
        of_page = self._k.shape[0] * self.page * (self._k.shape[3] + self._v.shape[3]) * self._k.itemsize
        return sum(self.resident_pages) * of_page

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, kernel: str = "auto") -> Tensor:
        """Append the next tokens' keys and values, and attend to all that their queries see.

        Args:
            q: ``[B, T, H, D]``, of the tokens that are appended.
            k: ``[B, T, Hkv, D]``.
            v: ``[B, T, Hkv, Dv]``.
            scale: of the scores; ``D ** -0.5`` by default.
            kernel: as for :func:`seqpar.attention`.

        Returns:
            ``[B, T, H, Dv]`` in q's dtype.

        Raises:
            ValueError: for other shapes, dtypes or devices than the cache's; it is then as it was.
        """
        self._check(q, k, v, scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        backend, count, pages = kernel_named(kernel), k.shape[1], self._pages.shape[1]
        self._reserve(count)
        sections = self._sections(count)
        try:
            backend.check(q, k, v, [section.intervals for section in sections])
        except ValueError:
            self._free += self._pages[:, pages:].flatten().tolist()
            self.length, self._pages = self.length - count, self._pages[:, :pages]
            raise
        self._write(k, v)
        there = [(sections, (self._k, self._v))]
        partial = attend(self._groups, there, q, self.kv_heads, v.shape[3], None, scale, backend)
        self._release()
        return partial.out.to(q.dtype)

    def _sections(self, count: int) -> list[Section]:
        """The kernel calls of the last ``count`` tokens' queries."""
        queries, sections = torch.arange(self.length - count, self.length), []
        for number, group in enumerate(self._groups):
            for part in group.parts:
                low, high = part.mask.intervals(queries, self.length, self.length)
                if not bool((high > low).any()):
                    continue
                seen = Seen(part, Bound(low), Bound(high), ((0, self.length),))
                sections += section_of(number, seen, [self._found(group, part, seen)], of_one_head=True)
        return sections

    def _found(self, group: HeadGroup, part: Part, seen: Seen) -> list[Found]:
        """The group's keys in a part that are held and that some query sees, and where they are."""
        assert group.heads is not None, "groups are of heads here"
        sees = seen.high.bounds > seen.low.bounds
        low, high = int(seen.low.bounds[sees].min()), int(seen.high.bounds[sees].max())
        places = torch.arange(low // self.page, -(-high // self.page))
        found = []
        for number, head in enumerate(group.heads):
            mine = places
            if part.stripes is not None:
                mine = places[places % part.stripes.stride == part.stripes.residues[number]]
            positions, rows = (
                (x.unsqueeze(1) * self.page + torch.arange(self.page)).flatten()
                for x in (mine, self._pages[head, mine])
            )
            within = (positions >= low) & (positions < high)
            assert bool((rows[within] >= 0).all()), "a page was freed that is still seen"
            found.append(Found(positions[within], rows[within]))
        return found

    def _reserve(self, count: int) -> None:
        """Take pages of each head for so many more tokens."""
        self.length += count
        missing = -(-self.length // self.page) - self._pages.shape[1]
        if missing > 0:
            taken = torch.tensor(self._take(missing * self.kv_heads)).view(self.kv_heads, missing)
            self._pages = torch.cat([self._pages, taken], 1)

    def _write(self, k: Tensor, v: Tensor) -> None:
        """Write the last tokens to pages of their own heads."""
        positions = torch.arange(self.length - k.shape[1], self.length)
        rows = self._pages[:, positions // self.page] * self.page + positions % self.page  # [heads, T]
        for into, x in ((self._k, k), (self._v, v)):
            into[:, rows.to(into.device).flatten(), 0] = x.transpose(1, 2).flatten(1, 2)

    def _take(self, count: int) -> list[int]:
        """Pages that are free; more are made by an eighth of what there is, where there are too few."""
        if count > len(self._free):
            have = self._k.shape[1] // self.page
            more = max(count - len(self._free), have // 8)
            self._free += range(have, have + more)
            self._k, self._v = (
                torch.cat([x, x.new_zeros(x.shape[0], more * self.page, 1, x.shape[3])], 1) for x in (self._k, self._v)
            )
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _release(self) -> None:
        """Free every page of which the next query, and so each later one, sees nothing."""
        begin = torch.arange(self._pages.shape[1]) * self.page
        kept = torch.zeros_like(self._pages, dtype=torch.bool)
        for group, lasts in zip(self._groups, self._last, strict=True):
            assert group.heads is not None, "groups are of heads here"
            heads = kept[group.heads.start : group.heads.stop]
            for part, last in zip(group.parts, lasts, strict=True):
                low, _ = _limits(part, self.length)
                seen = (begin + self.page > low) & (begin < last) & (low < last)
                if part.stripes is not None:
                    seen = seen & part.stripes.hold(begin, (0, NEVER))
                heads |= seen
        freed = (self._pages >= 0) & ~kept
        self._free += self._pages[freed].tolist()
        self._pages[freed] = -1

    def _check(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                "KVCache: got inputs that require gradients, expected none, for nothing differentiates a cache; call "
                "it under torch.no_grad()"
            )
        check_scale(scale)
        batch, _, _, dim = self._k.shape
        tokens = q.shape[1] if q.dim() == 4 else 0
        for name, x, heads, width in (
            ("q", q, self.heads, dim),
            ("k", k, self.kv_heads, dim),
            ("v", v, self.kv_heads, self._v.shape[3]),
        ):
            if tuple(x.shape) != (batch, tokens, heads, width) or not tokens:
                expected = f"[{batch}, tokens, {heads}, {width}], of as many tokens, at least one, in q, k and v"
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
            if x.dtype != self._k.dtype or x.device != self._k.device:
                raise ValueError(
                    f"{name}: got {x.dtype} on {x.device}, expected the cache's {self._k.dtype} on {self._k.device}"
                )


def _limits(part: Part, query: int) -> tuple[int, int]:
    """Before which key, and from which on, neither a query nor a later one (an earlier one) sees anything in a part.

    Of each term by itself: of an interval that is empty, :meth:`Mask.intervals` says nothing of either end.
    """
    at, many = torch.tensor([query]), torch.tensor(NEVER)
    rules = [term.rule(at, many, many) for term in part.mask.terms]
    return max(int(low) for low, _ in rules), min(int(high) for _, high in rules)
