"""`seqpar attention-worker` and `seqpar generate --attention-workers`: the same text, whatever becomes of workers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from seqpar.launch.cli import main, parse_attention_worker
from support.train import COMMAND, run_command

PROMPTS = ("x", "What the rain said, and to whom; once more, with å and 語.", "Two words", "Once")
TOKENS = 16
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
EXAMPLE = Path(__file__).parents[1] / "examples" / "offload_two_nodes.sh"
NOBODY = "127.0.0.1:9"
PATIENCE = 180.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough to say different things, and a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = LlamaConfig(vocab_size=len(letters), max_position_embeddings=1024, eos_token_id=None, **SHAPE, **heads)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


class Job:
    """A `seqpar attention-worker` with its processes, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line that has it."""
        return until(lambda: next(filter(None, (re.search(pattern, line) for line in self.lines)), None), self.said)

    def said(self) -> str:
        """Everything."""
        return "\n".join(self.lines)

    @property
    def address(self) -> str:
        """Where model ranks find it, once it is ready."""
        return self.wait_for(r"^seqpar attention-worker: ready at (\S+), ")[1]

    def workers(self) -> list[int]:
        """The ids of the worker processes that are left."""
        return children(self.process.pid)

    def ended(self) -> int:
        """The exit code, when it has ended."""
        code = self.process.wait(PATIENCE)
        self._reader.join(10)
        return code


def children(process: int) -> list[int]:
    """The ids of a process's children."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def until(condition: Callable[[], Any], said: Callable[[], str] = str) -> Any:
    """What the condition says, as soon as that is something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited for {PATIENCE:g} s in vain: {said()}")


@contextmanager
def job(
    *options: object, command: Sequence[object] = (COMMAND, "attention-worker"), **environment: str
) -> Iterator[Job]:
    """It runs as long as the context lasts; no process of it is left then."""
    process = subprocess.Popen(
        [*map(str, command), *map(str, options)], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    running = Job(process)
    family: list[int] = []
    try:
        yield running
        family = children(process.pid) if process.poll() is None else []
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        running.ended()
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in family))
    assert "terminate called" not in running.said()


def given(model: Path, *more: object, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS) -> list[str]:
    """Options of `seqpar generate`."""
    options = ["--model", model, "--prompt", *prompts, "--max-new-tokens", tokens, "--threads", 1, "--timeout", 60]
    return ["generate", *map(str, [*options, *more])]


def generated(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON that the command prints, in this process."""
    capfd.readouterr()
    code = main([*map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


class Generation:
    """`seqpar generate` in a thread of this process, of one prompt, whose text is told as it comes."""

    def __init__(self, capfd: pytest.CaptureFixture[str], arguments: Sequence[str]) -> None:
        self.out, self.err, self._capfd, self._code = "", "", capfd, list[int]()
        capfd.readouterr()
        self._thread = threading.Thread(target=lambda: self._code.append(main(arguments)), daemon=True)
        self._thread.start()

    def is_writing(self) -> bool:
        """Whether some text has been told."""
        out, err = self._capfd.readouterr()
        self.out, self.err = self.out + out, self.err + err
        return bool(self.out)

    def ended(self) -> int:
        """The exit code, when it has ended."""
        self._thread.join(PATIENCE)
        self.is_writing()
        return self._code[0]


def test_text_is_the_same_wherever_keys_and_values_are(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sampling = ("--temperature", 0.9, "--seed")
    expected = generated(capfd, *given(model))
    with job("--listen", "127.0.0.1:0", "--nproc", 2, "--memory", 0.0004, "--name", "shelf", "--threads", 1) as workers:
        at = ("--attention-workers", workers.address)
        workers.wait_for(r", 2 workers, 0\.0 GiB each; use: seqpar generate --attention-workers ")
        q, k = 4 * 4 * 8, 4 * 2 * 8  # bytes of a token in a layer
        for options, sent, received, parts in (
            ((), q + 2 * k, q, 8),
            (("--offload-heads", 1, "--offload-segments", 2), 2 * q + 2 * k, 2 * (q + 4 * 4), 8),
            (("--offload-heads", 2, "--offload-local", 1), (q + 2 * k) / 2, q / 2, 4),
            (("--batches", 2), q + 2 * k, q, 8),
        ):
            told = generated(capfd, *given(model, *at, *options))
            assert told["tokens"] == expected["tokens"], options
            assert (told["wire_bytes_sent"], told["wire_bytes_received"]) == (sent, received), options
            assert sum(worker["parts"] for worker in told["workers"]) == parts
            assert (told["cache_bytes"] > 0) == (parts < 8)
            assert [(w["name"], w["lost"]) for w in told["workers"]] == [("shelf", False)] * 2
            assert told["losses"] == []

        halves = [given(model, *sampling, 3, prompts=PROMPTS[:2]), given(model, *sampling, 4, prompts=PROMPTS[2:])]
        drawn = [row for half in halves for row in generated(capfd, *half)["tokens"]]
        assert generated(capfd, *given(model, *at, "--batches", 2, *sampling, 3))["tokens"] == drawn

        assert main(given(model, *at, "--ledger")) == 0
        out, err = capfd.readouterr()
        assert out.endswith(f"--- prompt 4 of 4: Once\n{expected['texts'][3]}\n")
        first, _, *table, last = err.splitlines()
        assert first == "seqpar generate: keys and values of prompts 1 to 4, sequences from 0:"
        assert sum(bool(re.search(r"worker [01] \(shelf\)", line)) for line in table) == len(table) == 8
        assert re.search(
            r"256 B to workers and 128 B back per layer and token · cache \S+ KB on worker 0 \(shelf\)", last
        )

        assert main(given(model, *at, tokens=900)) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert re.search(r"error: attention workers: got [\d,]+ bytes to hold, expected at most", line)
        workers.wait_for(r"worker [01]: caller \d+ left, after")
        workers.process.send_signal(signal.SIGTERM)
        assert workers.ended() == 0, workers.said()


def test_workers_of_a_run_end_with_it_and_ranks_share_the_prompts(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sampling = ("--temperature", 0.9, "--seed")
    halves = [given(model, *sampling, 3, prompts=PROMPTS[:2]), given(model, *sampling, 4, prompts=PROMPTS[2:])]
    drawn = [row for half in halves for row in generated(capfd, *half)["tokens"]]
    mark = f"--deadline={30 + os.getpid() / 2**20!r}"
    workers = ("--attention-workers", 2, "--worker-memory", 0.01, f"--worker-{mark[2:]}")
    run = run_command(*given(model, "--nproc", 2, *workers, *sampling, 3, "--json"))
    assert (run.returncode, run.stderr) == (0, "")
    told = json.loads(run.stdout)
    assert told["tokens"] == drawn
    assert (told["ranks"], len(told["workers"])) == (2, 2)
    assert [worker["memory_bytes"] for worker in told["workers"]] == [int(0.01 * 2**30)] * 2
    until(lambda: not any(mark in line for line in command_lines()))


def command_lines() -> Iterator[str]:
    """Of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().decode(errors="replace")
        except OSError:
            continue


def test_text_goes_on_when_workers_leave_or_are_lost(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"prompts": PROMPTS[1:2], "tokens": 150}
    (text,) = generated(capfd, *given(model, **options))["texts"]
    with job("--listen", "127.0.0.1:0", "--nproc", 3, "--memory", 0.01, "--threads", 1) as workers:
        at = ("--attention-workers", workers.address)

        generation = Generation(capfd, given(model, *at, "--offload-heads", 1, "--offload-segments", 3, **options))
        until(generation.is_writing)
        os.kill(workers.workers()[0], signal.SIGKILL)
        assert generation.ended() == 0, generation.err
        assert generation.out == f"{text}\n"
        lost, summary = generation.err.splitlines()
        assert re.match(r"attention worker \d \(.+\) was lost, .+; what it held was rebuilt from the tokens$", lost)
        assert " · cache " in summary
        workers.wait_for(r"worker \d was killed by signal 9; 2 of 3 go on")

        halved = (*at, "--offload-heads", 1, "--offload-segments", 2)
        generation = Generation(capfd, given(model, *halved, "--worker-loss", "fail", **options))
        until(generation.is_writing)
        os.kill(workers.workers()[1], signal.SIGKILL)
        assert generation.ended() == 1
        (error,) = generation.err.splitlines()
        assert re.match(r"seqpar generate: error: attention worker \d \(.+\) was lost, which held part of", error)
        assert "use --worker-loss recompute to go on with" in error
        workers.wait_for("1 of 3 go on")

        with job("--store", workers.address, "--memory", 0.01, "--threads", 1, "--name", "shelf") as more:
            assert more.address == workers.address
            generation = Generation(capfd, given(model, *halved, **options))
            until(generation.is_writing)
            more.process.send_signal(signal.SIGTERM)
            more.wait_for("leaving, when model ranks have taken what they keep here elsewhere")
            assert more.ended() == 0, more.said()
            assert generation.ended() == 0, generation.err
            assert generation.out == f"{text}\n"
            (summary,) = generation.err.splitlines()
            assert "shelf" not in summary
        workers.process.send_signal(signal.SIGTERM)
        assert workers.ended() == 1, "two were killed"


def test_a_second_signal_ends_workers_at_once(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with job("--listen", "127.0.0.1:0", "--memory", 0.01, "--threads", 1) as workers:
        generation = Generation(
            capfd, given(model, "--attention-workers", workers.address, prompts=PROMPTS[:1], tokens=900)
        )
        until(generation.is_writing)
        workers.process.send_signal(signal.SIGTERM)
        workers.wait_for("leaving, when model ranks have taken what they keep here elsewhere")
        assert workers.process.poll() is None, "there is nowhere else"
        workers.process.send_signal(signal.SIGTERM)
        assert workers.ended() == 128 + signal.SIGTERM
        assert generation.ended() == 1
        (error,) = generation.err.splitlines()
        assert "no worker is left to go on with: start some, and run the command again" in error


def test_the_example_s_two_nodes(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"ADDRESS": address, "WORKERS": "2", "PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    example = ("sh", EXAMPLE)
    with job("memory", "--memory", 0.01, "--threads", 1, command=example, **environment) as memory:
        assert memory.address == address
        memory.wait_for(", 2 workers, ")
        options = given(model, "--json")[1:]
        run = subprocess.run(
            ["sh", EXAMPLE, "compute", *options], capture_output=True, text=True, check=False, timeout=PATIENCE,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert (run.returncode, run.stderr) == (0, "")
        assert len(json.loads(run.stdout)["workers"]) == 2
    assert json.loads(run.stdout)["tokens"] == generated(capfd, *given(model))["tokens"]


REFUSALS = {
    "no prompts for a rank": (
        ("--nproc", 5, "--attention-workers", NOBODY),
        "got 4 prompts for 5 ranks",
        "use 4 ranks",
    ),
    "no prompts for a batch": (
        ("--nproc", 3, "--batches", 2, "--attention-workers", NOBODY),
        "got 4 prompts for 3 ranks of 2 batches, each with prompts of its own; expected 6 or more: drop --batches 2",
    ),
    "batches": (("--batches", 3, "--attention-workers", NOBODY), "--batches is 3; expected 1 or 2"),
    "schedule": (("--schedule", "tree", "--attention-workers", NOBODY), "drop --schedule"),
    "layout": (("--layout", "zigzag", "--attention-workers", NOBODY), "drop --layout"),
    "memory": (("--worker-memory", 1, "--attention-workers", NOBODY), "drop it, and give --memory to those"),
    "no workers": (("--worker-loss", "fail"), "--worker-loss got no --attention-workers; expected some"),
    "no ledger": (("--ledger",), "--ledger got no --attention-workers; expected some"),
    "number": (("--attention-workers", 0), "--attention-workers is 0; expected 1 or more"),
    "port": (("--attention-workers", 29600), "--attention-workers is 29600; expected at most 256 to start here, or"),
    "address": (("--attention-workers", "host"), "--attention-workers is 'host'; expected HOST:PORT"),
    "heads": (("--offload-heads", 0, "--attention-workers", NOBODY), "--offload-heads is 0; expected 1 or more"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_has_no_meaning_with_workers_is_refused(case: str, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, *words = REFUSALS[case]
    assert main(given(model, *options)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("seqpar generate: error: ")
    for word in words:
        assert word in line


def test_nobody_at_the_address(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*given(model, "--attention-workers", NOBODY), "--timeout", "1"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"got nobody at {NOBODY} within 1 s" in line
    assert "start them first, or mend the address" in line


def test_torchrun_starts_no_workers_of_a_run(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in {**places, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    assert main(given(model, "--attention-workers", 2)) == 2
    assert "--attention-workers 2 got ranks by torchrun; expected HOST:PORT" in capfd.readouterr().err
    assert main(["attention-worker", "--listen", "127.0.0.1:0", "--nproc", "2"]) == 2
    assert "leave --nproc out under torchrun" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "options"),
    {
        "--listen and --store are both missing; expected one": (),
        "--listen and --store are both given; expected one": ("--listen", "a:1", "--store", "a:1"),
        "--listen is 'a'; expected HOST:PORT": ("--listen", "a"),
        "--store is 'a:0'; expected HOST:PORT, or [HOST]:PORT for IPv6, a port of 1 to 65535": ("--store", "a:0"),
        "--memory is 0.0; expected a positive number": ("--store", "a:1", "--memory", "0"),
        "--nproc is 0; expected 1 or more": ("--store", "a:1", "--nproc", "0"),
        "--deadline is 1000000.0; expected": ("--store", "a:1", "--deadline", "1e6"),
        "--name is ''; expected 1 to 200 printable characters": ("--store", "a:1", "--name", ""),
        "expected one interface's; the store has no password": ("--listen", "0.0.0.0:0"),
    }.items(),
)
def test_a_worker_s_options_are_checked(
    words: str, options: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["attention-worker", *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("seqpar attention-worker: error: ")
    assert words in line


def test_help_names_every_option_of_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["attention-worker", "--help"])
    assert stop.value.code == 0
    listed = capfd.readouterr().out
    for name in parse_attention_worker(["--listen", "a:1"]).__dataclass_fields__:
        assert f"--{name}" in listed
