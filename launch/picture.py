"""`seqpar picture`: which blocks each head of a sparsely-sharded mask sees, and how much ranks send each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import seqpar
from seqpar.integrations.options import widest_stride
from seqpar.itinerary import Itinerary, itinerary
from seqpar.reach import busiest_rows, forward_rows

from .options import OptionError

HEADS_SHOWN = 8
BLOCKS_SHOWN = 96  # at most, on a side of a head's picture


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Draw a sparsely-sharded mask: what each KV head sees, and what each rank sends to whom.

    Worked out from the plan alone: nothing runs, whatever the number of ranks.
    """

    out: Path = Path("s2.png")
    """The PNG."""
    length: int = 8192
    """Tokens."""
    ranks: int = 4
    """Ranks that share them."""
    layout: str = "zigzag"
    """Who holds which tokens: zigzag, contiguous, striped, or balanced."""
    heads: int = 8
    """KV heads."""
    block: int = 64
    """Tokens of a block, a power of two."""
    local: int = 16
    """Blocks that every head sees up to the query's own."""
    stride: int | None = None
    """A head sees one in so many of the older blocks. Default: the number of sparse heads."""
    dense_heads: int = 0
    """KV heads, the last ones, that see everything."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("length", "ranks", "heads"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} is {getattr(self, name)}; expected 1 or more")
        if self.out.suffix != ".png":
            raise OptionError(f"--out is {self.out}; expected the name of a .png file")

    @property
    def mask(self) -> seqpar.SparselySharded:
        """As the options say."""
        stride = widest_stride(self.heads, self.dense_heads) if self.stride is None else self.stride
        return seqpar.SparselySharded(self.block, self.local, stride, self.dense_heads)


def draw(config: PictureConfig) -> str:
    """Write the picture, and return what it says in a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    work = itinerary(
        config.mask, config.layout, seqpar.Ring("direct"), config.length, config.length, config.ranks, 0, config.heads
    )
    shown = min(HEADS_SHOWN, config.heads)
    columns = min(4, shown)
    lines = -(-shown // columns)
    figure = Figure(figsize=(2.1 * columns + 4.8, max(4.0, 2.2 * lines + 0.8)))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines, columns + 2, width_ratios=[1] * columns + [0.25, 2])
    heads = [*range(shown - 1), config.heads - 1]  # the last ones may be dense
    for place, head in enumerate(heads):
        axis = figure.add_subplot(grid[place // columns, place % columns])
        axis.imshow(_blocks(config, work, head).numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        axis.set_title(f"KV head {head}", fontsize=9)
        axis.set(xticks=[], yticks=[])
    some = f"the first {BLOCKS_SHOWN} " if config.length > BLOCKS_SHOWN * config.block else ""
    figure.axes[0].set_ylabel(f"{some}query blocks", fontsize=8)
    figure.axes[0].set_xlabel("key blocks", fontsize=8)

    moved = work.needed - work.needed.diagonal().diag()
    whole = forward_rows(work.layout.keys).double() * config.heads
    axis = figure.add_subplot(grid[:, -1])
    share = (moved / whole).numpy() * 100
    axis.imshow(share, cmap="Oranges", vmin=0, vmax=max(1.0, share.max()))
    for reader in range(config.ranks) if config.ranks <= 16 else ():
        for owner in range(config.ranks):
            if owner != reader:
                axis.text(owner, reader, f"{share[reader, owner]:.1f}", ha="center", va="center", fontsize=8)
    axis.set(xlabel="from rank", ylabel="to rank")
    axis.set_title("K and V sent, % of the sender's", fontsize=9)
    dense = busiest_rows(forward_rows(work.layout.keys)) * config.heads
    pairs = work.pairs.double()
    causal = config.heads * config.length * (config.length + 1) / 2
    told = (
        f"{config.length:,} tokens, {config.layout} on {config.ranks} ranks: {float(pairs.sum()) / causal:.1%} of the "
        f"causal pairs, busiest / mean {float(pairs.max() / pairs.mean()):.3f}"
    )
    if dense:
        told += f"; the busiest rank moves {busiest_rows(work.needed) / dense:.1%} of a dense ring's K and V"
    figure.suptitle(f"{config.mask}\n{told}", fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(config.out, dpi=130)
    except OSError as error:
        raise ValueError(f"--out {config.out} can't be written: {error.strerror}; name a file that can") from error
    return f"{config.out}: {told}"


def _blocks(config: PictureConfig, work: Itinerary, head: int) -> Tensor:
    """Which of the first key blocks each query block's last query sees, the band darker: ``[blocks, blocks]``."""
    first = torch.arange(0, config.length, config.block)[:BLOCKS_SHOWN]
    last = (first + config.block - 1).clamp(max=config.length - 1)
    picture = torch.zeros(len(last), len(first))
    (group,) = [g for g in work.groups if g.heads is None or head in g.heads]
    for part in group.parts:
        low, high = (bound[0, :, None] for bound in part.mask.intervals(last, config.length, config.length))
        seen = (first >= low) & (first < high)
        if part.stripes is not None and group.heads is not None:
            seen = seen & part.stripes.hold(first, (0, config.length))[head - group.heads.start]
        picture[seen] = 0.75 if part.stripes is not None else 1.2
    return picture
