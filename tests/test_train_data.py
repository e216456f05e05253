"""Documents, their split and the rows packed from them: pure, without ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar.launch.config import TrainConfig
from seqpar.launch.data import Corpus, Document, Rows, find_documents, load_corpus
from seqpar.launch.manifest import last_whole, name_of, read_manifest, write_manifest
from seqpar.launch.model import SEPARATOR, load_text
from seqpar.launch.train import learning_rate
from support.train import write_texts

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def _rows(lengths: list[int], seq_len: int) -> Rows:
    tokens = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    return Rows(tokens.int(), torch.tensor([0, *lengths]).cumsum(0)[:-1], seq_len)


@given(lengths, st.integers(1, 50))
def test_rows_cover_the_stream_and_bounds_are_where_documents_meet(lengths: list[int], seq_len: int) -> None:
    rows = _rows(lengths, seq_len)
    assert len(rows) == sum(lengths) // seq_len
    batch = rows.batch(range(len(rows))) if len(rows) else None
    if batch is not None:
        assert batch.tokens.flatten().tolist() == rows.tokens[: len(rows) * seq_len].tolist()
        for row, bounds in zip(batch.tokens, batch.cu_seqlens, strict=True):
            changes = (row[1:] != row[:-1]).nonzero().flatten() + 1
            assert bounds == [0, *changes.tolist(), seq_len]
        pieces = [set(document.flatten().tolist()) for document in batch.documents()]
        assert all(len(piece) == 1 for piece in pieces)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 3))
def test_each_epoch_sees_every_row_once(num_rows: int, batch_size: int, seed: int) -> None:
    rows = _rows([num_rows * 3], 3)
    corpus = Corpus(rows, rows, 0, batch_size, seed)
    seen = [index for step in range(2 * num_rows) for index in corpus.indices(step)]
    for epoch in range(2 * batch_size):
        assert sorted(seen[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_the_batch_size_cuts_one_order_of_rows() -> None:
    rows = _rows([70], 3)
    one, four = Corpus(rows, rows, 0, 1, 5), Corpus(rows, rows, 0, 4, 5)
    assert [one.indices(step)[0] for step in range(80)] == [row for step in range(20) for row in four.indices(step)]


def test_the_split_is_by_document_and_stays(tmp_path: Path) -> None:
    documents = [Document(f"{number}.txt", tmp_path / f"{number}.txt", named=False) for number in range(2000)]
    held_out = [document.name for document in documents if document.held_out]
    assert 60 < len(held_out) < 140
    assert held_out[:3] == [d.name for d in documents[:200] if d.held_out][:3]


def test_two_documents_give_one_held_out_and_one_alone_none(tmp_path: Path) -> None:
    encode = load_text(TrainConfig()).encode
    for number, expected in ((1, 0), (2, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in range(number):
            (folder / f"{name}.txt").write_text("text " * 50)
        corpus = load_corpus(find_documents([folder]), encode, seq_len=10, batch_size=1, seed=0)
        assert (len(corpus.train.starts), len(corpus.held_out.starts)) == (1, expected)


def test_folders_pass_over_what_is_hidden_binary_or_of_another_suffix(tmp_path: Path) -> None:
    write_texts(tmp_path, documents=3)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("seen")
    (tmp_path / "zeros").write_bytes(bytes(10))
    assert [document.name for document in find_documents([tmp_path])] == [
        "0.txt",
        "1.txt",
        "2.txt",
        "deep/a.md",
        "zeros",
    ]
    assert [document.name for document in find_documents([tmp_path], (".md",))] == ["deep/a.md"]
    corpus = load_corpus(find_documents([tmp_path]), load_text(TrainConfig()).encode, seq_len=1, batch_size=1, seed=0)
    assert corpus.skipped == 1


def test_the_default_is_python_s_own_library() -> None:
    documents = find_documents([])
    assert len(documents) > 300
    assert {document.path.suffix for document in documents} == {".py"}
    assert not any("site-packages" in document.path.parts for document in documents)


def test_bytes_are_tokens_and_come_back() -> None:
    text = load_text(TrainConfig())
    tokens = text.encode("aß語")
    assert tokens.tolist() == [SEPARATOR, *"aß語".encode(), SEPARATOR]
    assert tokens.dtype == torch.int32
    assert text.decode(tokens.tolist()) == "aß語"
    assert text.encode("").tolist() == [SEPARATOR, SEPARATOR]
    assert text.decode([0xE8, 0xAA]) == "\N{REPLACEMENT CHARACTER}"


def test_a_checkpoint_is_whole_only_with_every_byte(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        folder = tmp_path / name_of(step)
        folder.mkdir()
        (folder / "shard").write_bytes(bytes(50))
        write_manifest(folder, {"step": step})
    assert last_whole(tmp_path) == tmp_path / name_of(100)
    assert read_manifest(tmp_path / name_of(5)) == {"step": 5, "files": {"shard": 50}}
    (tmp_path / name_of(100) / "shard").write_bytes(bytes(49))
    (tmp_path / name_of(10) / "manifest.json").write_text("{")
    lines: list[str] = []
    assert last_whole(tmp_path, lines.append) == tmp_path / name_of(5)
    assert "shard has 49 bytes; expected 50 bytes" in lines[0]
    assert "manifest.json is missing or broken" in lines[1]
    assert last_whole(tmp_path / "nowhere") is None


def test_the_rate_rises_and_falls() -> None:
    config = TrainConfig(lr=1.0, warmup=4, steps=20)
    rates = [learning_rate(config, index) for index in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.02)
