"""Documents, their held-out split, and rows of tokens packed from them.

The order of rows depends on the seed, the step and the row alone, never on the number of ranks: any number of ranks
sees the same data, and a run continues exactly with another number of ranks.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HELD_OUT = 0.05
"""Share of the documents that is never trained on."""

_SNIFF = 1 << 16


@dataclass(frozen=True)
class Document:
    """A text file. `name` is its path relative to the folder that was given; `named` if it was given itself."""

    name: str
    path: Path
    named: bool

    @property
    def held_out(self) -> bool:
        """Whether the hash of its name falls in the held-out share, which is the same wherever it lies."""
        digest = hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64

    def read(self) -> str | None:
        """Its text; None for a file of a folder that isn't UTF-8 text. Raises ValueError where it was named itself."""
        try:
            raw = self.path.read_bytes()
            text = None if b"\0" in raw[:_SNIFF] else raw.decode()
        except UnicodeDecodeError:
            text = None
        except OSError as error:
            raise ValueError(f"--data {self.path} can't be read: {error.strerror}; name a readable file") from error
        if text is None and self.named:
            raise ValueError(f"--data {self.path} is binary; expected UTF-8 text: convert it, or leave it out")
        return text


def standard_library() -> Path:
    """The folder of Python's own sources, which every machine that runs this has."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_documents(paths: Sequence[Path], suffixes: Sequence[str] = ()) -> list[Document]:
    """The documents of the given files and folders, sorted by name; of Python's standard library for no paths.

    Hidden files and folders are passed over, and so are files of folders that end in none of `suffixes`, if it has any.
    Raises ValueError naming the path where one is missing, empty, or a named file is binary.
    """
    if not paths:
        skipped = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")
        return _in_folder(standard_library(), (".py",), skipped)
    documents: list[Document] = []
    for path in paths:
        if path.is_dir():
            found = _in_folder(path, tuple(suffixes))
            if not found:
                wanted = f"ending in {' or '.join(suffixes)}" if suffixes else "that isn't empty or hidden"
                raise ValueError(f"--data {path} holds no file {wanted}; name a folder or file with text")
            documents += found
        elif not path.exists():
            raise ValueError(f"--data {path} does not exist; name a file or folder with text")
        elif not path.stat().st_size:
            raise ValueError(f"--data {path} is empty; name a file with text")
        else:
            document = Document(path.name, path, named=True)
            document.read()
            documents.append(document)
    return documents


def _in_folder(folder: Path, suffixes: tuple[str, ...], skipped: Sequence[str] = ()) -> list[Document]:
    documents = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("__pycache__", *skipped)]
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and name.endswith(suffixes or "") and path.is_file() and path.stat().st_size:
                documents.append(Document(path.relative_to(folder).as_posix(), path, named=False))
    return sorted(documents, key=lambda document: document.name)


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    tokens: [B, S] int64, on the CPU. cu_seqlens: for each row the bounds of its documents, [0, ..., S].
    """

    tokens: torch.Tensor
    cu_seqlens: list[list[int]]

    def documents(self) -> Iterator[torch.Tensor]:
        """Each document, or piece of one, of each row: [1, L]."""
        for row, bounds in zip(self.tokens, self.cu_seqlens, strict=True):
            for start, end in pairwise(bounds):
                yield row[None, start:end]


class Rows:
    """A stream of documents cut into rows of `seq_len` tokens; what doesn't fill the last row is left out.

    tokens: [N] int32, the documents end to end. starts: [D] int64, where each begins, ascending from 0.
    """

    def __init__(self, tokens: torch.Tensor, starts: torch.Tensor, seq_len: int) -> None:
        self.tokens, self.starts, self.seq_len = tokens, starts, seq_len

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows with these indices, in this order."""
        import torch

        rows, bounds = [], []
        for index in indices:
            begin, end = index * self.seq_len, (index + 1) * self.seq_len
            first, last = torch.searchsorted(self.starts, torch.tensor([begin + 1, end])).tolist()
            bounds.append([0, *(self.starts[first:last] - begin).tolist(), self.seq_len])
            rows.append(self.tokens[begin:end])
        return Batch(torch.stack(rows).long(), bounds)

    def digest(self) -> str:
        """Identifies tokens and documents."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        digest.update(self.starts.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, rows that are held out, and how many files of folders were passed over as binary."""

    train: Rows
    held_out: Rows
    skipped: int
    batch_size: int
    seed: int

    def indices(self, step: int) -> list[int]:
        """Rows of the whole batch of a step: each epoch goes through all rows in an order of its own."""
        import torch

        orders: dict[int, torch.Tensor] = {}
        chosen = []
        for row in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(row, len(self.train))
            if epoch not in orders:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(len(self.train), generator=generator)
            chosen.append(int(orders[epoch][place]))
        return chosen

    def held_out_indices(self, number: int) -> list[int]:
        """Rows of the evaluation's batch of that number, from the first on, and round again where they run out."""
        first = number * self.batch_size
        return [row % len(self.held_out) for row in range(first, first + self.batch_size)]


def load_corpus(
    documents: Sequence[Document],
    encode: Callable[[str], torch.Tensor],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
) -> Corpus:
    """Read and encode documents (`encode` gives [L] int32), and pack them in an order that the seed shuffles.

    Raises ValueError where there is less text than one row.
    """
    import torch

    held_out_names = _held_out_names(documents)
    generator = torch.Generator().manual_seed(seed)
    streams: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    skipped = 0
    for place in torch.randperm(len(documents), generator=generator).tolist():
        text = documents[place].read()
        if text is None:
            skipped += 1
        else:
            streams[documents[place].name in held_out_names].append(encode(text))
    if skipped == len(documents):
        raise ValueError(f"--data got {skipped} files, all of them binary; expected UTF-8 text: name other files")
    train, held_out = (_pack(streams[part], seq_len) for part in (False, True))
    if not len(train):
        raise ValueError(
            f"--data holds {len(train.tokens)} tokens of text to train on; expected {seq_len} or more, one row: "
            f"add text, or use a smaller --seq-len"
        )
    return Corpus(train, held_out, skipped, batch_size, seed)


def _held_out_names(documents: Sequence[Document]) -> set[str]:
    """The held-out share; where it is nothing or everything, the last document alone, if there is another."""
    names = sorted({document.name for document in documents})
    held_out = {document.name for document in documents if document.held_out}
    if held_out and len(held_out) < len(names):
        return held_out
    return {names[-1]} if len(names) > 1 else set()


def _pack(pieces: list[torch.Tensor], seq_len: int) -> Rows:
    import torch

    pieces = [piece for piece in pieces if len(piece)]
    lengths = torch.tensor([0, *map(len, pieces)])
    return Rows(torch.cat([torch.empty(0, dtype=torch.int32), *pieces]), lengths.cumsum(0)[:-1], seq_len)
