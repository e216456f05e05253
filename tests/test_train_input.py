"""Wrong input to `seqpar train`: one clear line that names it, exit code 2, within seconds, before any rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqpar.launch.cli import main, parse_train
from seqpar.launch.config import TrainConfig
from support.train import Run, fork_ranks, run_command, write_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text, and things that are not: each named for what is wrong with it."""
    write_texts(tmp_path / "text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "zeros.bin").write_bytes(bytes(1000))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "zeros.bin").write_bytes(bytes(1000))
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "metrics.jsonl").touch()
    return tmp_path


CASES = {
    "unknown option": ("--stepz 3", "unknown option --stepz; did you mean --steps?"),
    "unknown option without a likeness": ("--qqqqqqqq 3", "unknown option --qqqqqqqq; see seqpar train --help"),
    "not a number": ("--steps many", "--steps", "'many'", "see seqpar train --help"),
    "not a choice": ("--dtype fp8", "'fp8'", "--dtype", "bf16"),
    "no value": ("--steps", "--steps"),
    "endless timeout": ("--timeout inf", "--timeout is inf; expected a positive number, at most 1e+06"),
    "huge seed": (f"--seed {10**23}", "--seed is", "expected less than 2**63"),
    "no number": ("--weight-decay nan", "--weight-decay is nan; expected"),
    "s2 options of nothing": ("--s2-block 32", "--s2-block got --mask causal; only --mask s2 has it: add it"),
    "s2 block": ("--data {0}/text --mask s2 --s2-block 24", "block=): got 24, expected a power of two"),
    "s2 incomplete": ("--data {0}/text --mask s2 --s2-stride 9", "no head sees older blocks of residue 2, 3"),
    "s2 dense layer": ("--data {0}/text --mask s2 --s2-dense-layers 7", "--s2-dense-layers 7 got a model of 2 layers"),
    "init from nothing": (
        "--init {0}/nothing",
        "--init {0}/nothing got a folder without checkpoints; expected the --out",
    ),
    "init and resume": ("--out {0}/x --resume --init {0}", "--init {0} got --resume too; expected the --out folder of"),
    "window of nothing": ("--window 64", "--window 64 got --mask causal; only --mask window has one: add it"),
    "zero steps": ("--steps 0", "--steps is 0; expected 1 or more"),
    "negative rate": ("--lr -1", "--lr is -1.0; expected a positive number"),
    "missing data": ("--data {0}/nowhere", "--data {0}/nowhere does not exist; name a file or folder"),
    "empty file": ("--data {0}/empty.txt", "--data {0}/empty.txt is empty; name a file with text"),
    "empty folder": ("--data {0}/nothing", "--data {0}/nothing holds no file"),
    "no file with the suffix": ("--data {0}/text --suffixes .py", "--data {0}/text holds no file ending in .py"),
    "binary file": ("--data {0}/zeros.bin", "--data {0}/zeros.bin is binary; expected UTF-8 text"),
    "undecodable file": ("--data {0}/latin.txt", "--data {0}/latin.txt is binary; expected UTF-8 text"),
    "folder of binaries": ("--data {0}/binaries", "--data got 1 files, all of them binary; expected UTF-8 text"),
    "too little text": ("--data {0}/short.txt", "--data holds 13 tokens of text to train on; expected 2048 or more"),
    "sequence shorter than the ranks": ("--nproc 4 --seq-len 3", "--seq-len 3 is shorter than the 4 ranks"),
    "ranks not divisible": ("--nproc 3 --sp 2", "--sp 2 got 3 ranks; expected a multiple"),
    "rows not divisible": ("--nproc 4 --sp 1 --batch-size 2", "--batch-size 2 got 4 groups of 1 ranks"),
    "unwritable folder": ("--data {0}/text --out {0}/file/out", "--out {0}/file/out can't be written: Not a directory"),
    "earlier run": (
        "--data {0}/text --out {0}/earlier",
        "--out {0}/earlier already holds a run; continue it",
    ),
    "nothing to resume": ("--data {0}/text --out {0}/new --resume", "--resume found no checkpoint under {0}/new"),
    "resume without a folder": ("--resume", "--resume got no --out; expected the folder of the run to continue"),
    "model without a checkpoint": ("--data {0}/text --model {0}/nothing", "--model {0}/nothing holds no"),
    "exchange without a ring": ("--schedule ulysses --exchange direct", "--exchange direct got --schedule ulysses"),
    "queries that are keys": (
        "--schedule tree",
        "--schedule tree got training, in which every token is a query; expect",
    ),
    "unknown layout": ("--data {0}/text --layout spiral", "layout", "'spiral'", "zigzag"),
    "unknown schedule": ("--data {0}/text --schedule spiral", "schedule", "'spiral'", "ring"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    options, *expected = (text.format(folder) for text in CASES[case])
    assert main(["train", "--preset", "tiny", "--threads", "1", *options.split()]) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("seqpar train: error: ")
    for part in expected:
        assert part in line


def test_the_command_writes_nothing_but_the_line(folder: Path) -> None:
    run = run_command("train", "--nproc", 2, "--data", folder / "zeros.bin", cwd=folder, timeout=30)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
    assert not (folder / "runs").exists()


def test_ranks_that_were_told_different_things_all_say_so(folder: Path) -> None:
    common = ["--data", folder / "text", "--preset", "tiny", "--seq-len", 100, "--out", folder / "new"]
    (run,) = fork_ranks([Run(ranks=2, options=common, by_rank={1: ["--seed", 5]})], folder / "server")
    assert run.codes == [2, 2]
    for rank in (0, 1):
        assert f"seqpar train: rank {rank}: error: options and data: ranks disagree on seed: got 0" in run.output


def test_an_unknown_command_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    expected = "train, generate, attention-worker, check, megatron, picture or plan-offload"
    assert capfd.readouterr().err == (
        f"seqpar: error: unknown command 'trian'; expected {expected}: see seqpar --help\n"
    )


def test_help_names_every_option(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    listed = capfd.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in listed


def test_options_become_the_configuration() -> None:
    config = parse_train(["--data", "a", "b", "--dtype", "bf16", "--seq_len", "77", "--verify", "--sp", "2"])
    assert config == TrainConfig(data=(Path("a"), Path("b")), dtype="bf16", seq_len=77, verify=True, sp=2)
