"""`seqpar picture` draws what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqpar.launch.cli import main


def test_it_writes_a_picture_and_says_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s2.png"
    assert main(["picture", "--length", "131072", "--ranks", "8", "--heads", "16", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "131,072 tokens, zigzag on 8 ranks: 7.7% of the causal pairs, busiest / mean 1.001" in told
    assert "the busiest rank moves 7.4% of a dense ring's K and V" in told


@pytest.mark.parametrize("ranks", ["1", "3"])
def test_few_ranks_and_dense_heads(ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--ranks",
        ranks,
        "--heads",
        "3",
        "--dense-heads",
        "1",
        "--length",
        "2000",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert main(["picture", *options]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert ("the busiest rank moves" in capsys.readouterr().out) == (ranks == "3")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--block", "20"], "block=): got 20, expected a power of two"),
        (["--heads", "2", "--stride", "4"], "no head sees older blocks of residue 2, 3"),
        (["--out", "x.jpg"], "--out is x.jpg; expected the name of a .png file"),
        (["--ranks", "0"], "--ranks is 0; expected 1 or more"),
        (["--rnks", "2"], "unknown option --rnks; did you mean --ranks?"),
        (["--layout", "spiral"], "layout: got 'spiral', expected one of contiguous"),
        (["--out", "/nowhere/x.png"], "--out /nowhere/x.png can't be written"),
    ],
)
def test_one_line_says_what_is_wrong(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["picture", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("seqpar picture: error: ")
    assert words in line
