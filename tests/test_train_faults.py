"""`seqpar train` as a command: ranks that die, disks that fill up, launchers that are stopped, torchrun, --verify."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.train import COMMAND, SMALL, Run, fork_ranks, losses, metrics, run_command, write_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture
def long_run(data: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two ranks under tmp_path / "out" that has saved its first checkpoint and won't end by itself."""
    options = ["--data", data, "--out", tmp_path / "out", "--nproc", 2, "--steps", 100_000, "--save-every", 5]
    command = [COMMAND, "train", *SMALL, *options]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            deadline = time.monotonic() + 90
            while not (tmp_path / "out" / "checkpoints" / "step-00000005").exists():
                assert launcher.poll() is None, launcher.communicate()
                assert time.monotonic() < deadline, "no checkpoint in 90 seconds"
                time.sleep(0.05)
            yield launcher
        finally:
            launcher.kill()


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _ended(processes: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(_alive, processes))


def test_a_killed_rank_ends_the_run_which_can_go_on(
    long_run: subprocess.Popen[str], data: Path, tmp_path: Path
) -> None:
    ranks = _children(long_run.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = long_run.communicate(timeout=20)
    assert long_run.returncode == 1
    first, second = errors.splitlines()
    assert first.startswith("seqpar train: rank 0: error: lost another rank, which ended or no longer answers")
    found = re.fullmatch(
        r"seqpar: rank 1 was killed by signal 9; the other ranks were stopped; last whole checkpoint: "
        r"(\S+/step-\d+) \(step (\d+)\); resume with: seqpar train (.*) --resume",
        second,
    )
    assert found, second
    step = int(found[2])
    assert not any(map(_alive, ranks))

    options = [*found[3].split(), "--resume", "--steps", step + 2]
    (run,) = fork_ranks([Run(ranks=2, options=options)], tmp_path / "server")
    assert run.codes == [0, 0], run.output
    assert f"resumed after step {step}" in run.output
    assert len(losses(tmp_path / "out")) == step + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_rank_outlives_the_launcher(number: signal.Signals, long_run: subprocess.Popen[str]) -> None:
    ranks = _children(long_run.pid)
    os.kill(long_run.pid, number)
    _, errors = long_run.communicate(timeout=20)
    assert long_run.returncode != 0
    assert _ended(ranks, seconds=5)
    if number != signal.SIGKILL:
        assert errors == "seqpar: interrupted; all ranks were stopped\n"


def test_torchrun_starts_the_ranks(data: Path, tmp_path: Path) -> None:
    torchrun = Path(sysconfig.get_path("scripts"), "torchrun")
    launch = [torchrun, "--standalone", "--nproc-per-node", 2, "--no-python", COMMAND, "train"]
    options = [*SMALL, "--data", data, "--out", tmp_path / "out", "--steps", 3, "--verify"]
    run = subprocess.run(
        [*map(str, [*launch, *options])], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "sharded over 2 ranks" in run.stdout
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]


def test_the_launcher_trains_verifies_and_samples(data: Path, tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--seq-len", 331, "--threads", 1, "--steps", 3, "--sample-tokens", 10]
    run = run_command("train", "--nproc", 2, "--verify", "--data", data, *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "passed: largest of 21 gradients" in run.stdout
    assert "sample: 64 tokens of text, then [10 tokens by the model]" in run.stdout
    (out,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "loss.png", "metrics.jsonl", "model"]


def test_verify_fails_when_the_gradients_are_wrong(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.pop(0); import seqpar; mean = seqpar.token_mean; "
        "wrong = lambda loss: loss + 0.001 * (loss - loss.detach()); "
        "seqpar.token_mean = lambda *given: wrong(mean(*given)); "
        "from seqpar.launch.cli import main; sys.exit(main())"
    )
    options = ["train", *SMALL, "--data", data, "--out", tmp_path / "out", "--steps", 2, "--verify"]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, options)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 1
    assert "FAILED: largest of 21 gradients 1.00e-03 (bound 1e-04)" in run.stdout
    assert run.stderr.startswith("seqpar train: error: --verify: step 1 differs from the unsharded computation: loss")
    assert metrics(tmp_path / "out") == []
