"""How text becomes tokens, and tokens become text again, also one at a time: bytes, or a model's own tokenizer."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = 256
"""Token that opens and closes a document where tokens are bytes."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character is 4 bytes at most, and a tokenizer that is at a loss writes one token for each.
_LONGEST_CHARACTER = 8


class Stream(ABC):
    """Tokens that come one at a time, as text: whole characters only, which never change afterwards."""

    @abstractmethod
    def put(self, token: int) -> str:
        """What can be said for certain since the last time."""

    @abstractmethod
    def end(self) -> str:
        """What is left; a character that was not finished becomes a replacement character."""


class Text(ABC):
    """Text as tokens, and back.

    name: what the tokens are. vocabulary: tokens from this on stand for nothing, being the padding of an embedding.
    ends: tokens that close a text. padding: what fills up the shorter rows of a batch, where nothing looks at it.
    """

    name: str
    vocabulary: int
    ends: tuple[int, ...]
    padding: int

    @abstractmethod
    def encode(self, text: str) -> torch.Tensor:
        """A document's tokens, [L] int32, with those that open and close it."""

    @abstractmethod
    def prompt(self, text: str) -> list[int]:
        """The tokens of a text that is to go on: opened, and not closed."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these tokens, without those that open and close it."""

    @abstractmethod
    def stream(self, before: Sequence[int]) -> Stream:
        """The text of the tokens to come, after those `before`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what it takes to load this again, if anything, into a folder."""

    def after(self, before: Sequence[int], tokens: Iterable[int]) -> str:
        """The text that the tokens add to those `before`: what a stream makes of them."""
        stream = self.stream(before)
        return "".join([*map(stream.put, tokens), stream.end()])


class ByteText(Text):
    """Bytes of UTF-8; one token more opens and closes a document."""

    name, vocabulary, ends, padding = "bytes", SEPARATOR + 1, (SEPARATOR,), SEPARATOR

    def encode(self, text: str) -> torch.Tensor:
        """See :class:`Text`."""
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0)
        edge = torch.tensor([SEPARATOR], dtype=torch.int32)
        return torch.cat([edge, content.int(), edge])

    def prompt(self, text: str) -> list[int]:
        """See :class:`Text`."""
        return [SEPARATOR, *text.encode()]

    def decode(self, tokens: Iterable[int]) -> str:
        """See :class:`Text`."""
        return bytes(token for token in tokens if token < SEPARATOR).decode(errors="replace")

    def stream(self, before: Sequence[int]) -> Stream:
        """See :class:`Text`."""
        return _ByteStream()

    def save(self, folder: Path) -> None:
        """Nothing: bytes are what they are."""


class _ByteStream(Stream):
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < SEPARATOR else ""

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class TokenizerText(Text):
    """A Hugging Face tokenizer.

    as_documents: open prompts as `encode` opens documents, for a model that was trained on those; otherwise with the
    special tokens that the tokenizer itself puts around a text.
    """

    name = "tokenizer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, as_documents: bool = True) -> None:
        self._tokenizer, self._as_documents = tokenizer, as_documents
        self._opening = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self._closing = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.vocabulary = len(tokenizer)
        self.ends = tuple(self._closing)
        self.padding = next((token for token in (tokenizer.pad_token_id, *self._closing) if token is not None), 0)

    @classmethod
    def load(cls, folder: Path, *, as_documents: bool = True) -> TokenizerText:
        """The tokenizer in a folder. Raises ValueError where there is none that can be read."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model {folder} holds no tokenizer that can be read; expected the folder of a Hugging Face "
                f"checkpoint with its tokenizer, as save_pretrained writes it"
            ) from error
        return cls(tokenizer, as_documents=as_documents)

    def encode(self, text: str) -> torch.Tensor:
        """See :class:`Text`."""
        return torch.tensor([*self._opening, *self._plain(text), *self._closing], dtype=torch.int32)

    def prompt(self, text: str) -> list[int]:
        """See :class:`Text`."""
        if self._as_documents:
            return [*self._opening, *self._plain(text)]
        return list(self._tokenizer(text, verbose=False).input_ids)

    def decode(self, tokens: Iterable[int]) -> str:
        """See :class:`Text`."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stream(self, before: Sequence[int]) -> Stream:
        """See :class:`Text`."""
        return _TokenStream(self.decode, before)

    def save(self, folder: Path) -> None:
        """See :class:`Text`."""
        self._tokenizer.save_pretrained(folder)

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


class _TokenStream(Stream):
    """What the newest tokens add to a window of those before, whose own text says where words begin."""

    def __init__(self, decode: Callable[[Iterable[int]], str], before: Sequence[int]) -> None:
        self._decode = decode
        self._known, self._new = list(before[-_LONGEST_CHARACTER:]), list[int]()

    def put(self, token: int) -> str:
        self._new.append(token)
        added = self._added()
        if len(self._new) < _LONGEST_CHARACTER and (not added or added.endswith(_UNFINISHED)):
            return ""
        self._known, self._new = self._new, []
        return added

    def end(self) -> str:
        return self._added()

    def _added(self) -> str:
        return self._decode(self._known + self._new)[len(self._decode(self._known)) :]
