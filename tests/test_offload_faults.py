"""Attention workers that are killed, stopped, cut off or slow; ranks that vanish; frames that are none of ours."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import signal
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from seqpar.integrations import huggingface
from seqpar.offload import Placement, WorkerLost, Workers
from seqpar.offload.budget import Budget
from seqpar.offload.channel import Channel, Lost
from seqpar.offload.dialect import STREAMS, bits_of
from seqpar.offload.frames import HEADER_BYTES, FrameError, Header, Kind, encode, encode_trailer
from seqpar.offload.meeting import join_store, knock
from seqpar.offload.session import Common, Session
from support.jobs_channel import later, make_links, send_raw
from support.jobs_offload import Text, WorkerProcess, half_a_call, settled, vanish, worker_process
from support.network import Network, Unavailable, address, network
from support.ranks import _processes

huggingface.register()

DEADLINE = 0.7
MEMORY = 1 << 22
FAULTS = ("kill", "stop", "partition", "slow link")
WHENS = ("before", "during", "after")


@pytest.fixture(scope="module")
def net() -> Iterator[Network | str]:
    """Three hosts: the model's, the bystander's and the victim's; or what is missing for them."""
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(network(3))
        except Unavailable as missing:
            yield str(missing)


class Site:
    """Two workers, of which the victim holds the first row, and a model rank: on one host, or each on its own."""

    def __init__(self, fault: str, bystander: WorkerProcess, victim: WorkerProcess, net: Network | None) -> None:
        self.fault, self.bystander, self.victim, self.net = fault, bystander, victim, net
        self._held = False

    @contextlib.contextmanager
    def workers(self) -> Iterator[Workers]:
        """The model rank's connections; it is on its host meanwhile."""
        with contextlib.ExitStack() as stack:
            if self.net is not None:
                stack.enter_context(self.net.at(0))
            workers = stack.enter_context(Workers.join(self.bystander.address, deadline=20, least=2))
            workers.members[1].channel.deadline = DEADLINE  # the other may take longer on a busy machine
            yield workers

    def strike(self) -> None:
        """The fault."""
        if self.fault == "partition":
            self.network.shape(2, up=False)
        elif self.fault == "slow link":
            self.network.shape(2, rate=100.0, delay=DEADLINE)
        else:
            self.victim.send_signal(signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)
            while self.fault == "stop" and Path(f"/proc/{self.victim.pid}/stat").read_text().split()[2] != "T":
                time.sleep(0.001)

    def mend(self) -> None:
        """The victim is well again, unless it is dead."""
        if self.fault == "stop":
            self.victim.send_signal(signal.SIGCONT)
        elif self.net is not None:
            self.net.shape(2)
        if self._held and self.fault != "kill":
            self._held = False
            self.victim.release()

    @property
    def network(self) -> Network:
        """Where there is one."""
        assert self.net is not None, "faults of the network need one"
        return self.net

    @contextlib.contextmanager
    def struck(self, when: str) -> Iterator[None]:
        """A call in which the fault strikes, once the victim is at work on it, or has struck just before."""
        if when != "during":
            self.strike()
            yield
            return
        self.victim.hold()
        self._held = True
        timer = later(0.2, self.strike)
        yield
        timer.join()


@contextlib.contextmanager
def site(fault: str, net: Network | str) -> Iterator[Site]:
    """The worker with more memory is the victim: it gets the first row."""
    inside = fault in ("partition", "slow link")
    if inside and isinstance(net, str):
        pytest.skip(f"{fault}: {net}")
    hosts = net if inside and isinstance(net, Network) else None
    places = [(address(host) + ":0", hosts.namespace(host)) for host in (1, 2)] if hosts else [("", ""), ("", "")]
    with (
        worker_process(places[0][0], namespace=places[0][1], memory=MEMORY, name="bystander") as bystander,
        worker_process(bystander.address, namespace=places[1][1], memory=MEMORY + 1, name="victim") as victim,
    ):
        found = Site(fault, bystander, victim, hosts)
        try:
            yield found
        finally:
            found.mend()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What must not take longer."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"{took:.2f} s"


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_worker_ends_the_call_in_time_and_nothing_half_done_is_seen(
    fault: str, when: str, net: Network | str
) -> None:
    """The typed error names worker and sequences; after `restore` a repeated step is exact."""
    text = Text(6)
    with site(fault, net) as place, place.workers() as workers:
        held = text.cache(workers, placement=Placement(heads=1))
        done = 0 if when == "before" else 3
        for step in range(done):
            text.step(held, step)
        if when == "during":
            text.call(held, done, 0)  # the step is half done when its second layer is lost
        lengths = held.lengths
        with place.struck(when), within(DEADLINE + 1 + 0.2 * (when == "during")), pytest.raises(WorkerLost) as lost:
            text.call(held, done, int(when == "during"))
        assert (lost.value.worker, lost.value.sequences) == ("1 (victim)", (0,))
        assert "worker 1 (victim) was lost, which held part of sequences 0: " in str(lost.value)
        assert (held.lengths, held.lost_rows(lengths), sorted(workers.alive)) == (lengths, [0], [0])
        with within(0.3):
            for layer in (0, 1, 0, 1):
                with pytest.raises(WorkerLost, match="victim"):
                    text.call(held, done, layer)
        held.restore(lengths, rebuilt=[0])
        assert held.lengths == (0, sum(text.tokens[:done]))
        assert "victim" not in str(held.ledger)
        text.write_anew(held, 0, done)
        assert held.lengths == lengths
        for step in range(done, 6):
            text.step(held, step)
        held.release()
        assert workers.free() == {0: MEMORY}
        if fault != "kill":
            place.mend()
            # A link that was down is tried again after a while that doubles.
            expected = {"free": MEMORY + 1, "shards": 0, "sessions": 0}
            assert settled(lambda: _some(place.victim.leftovers(), expected), expected) == expected


def _some(found: dict[str, int], names: Any) -> dict[str, int]:
    return {name: found[name] for name in names}


def test_a_link_that_is_slow_but_not_too_slow_is_exact(net: Network | str) -> None:
    text = Text(4)
    with site("slow link", net) as place, place.workers() as workers:
        held = text.cache(workers, placement=Placement(heads=1, segments=2))
        workers.members[1].channel.deadline = 20
        delay = 0.05
        place.network.shape(2, rate=20_000, delay=delay)
        began = time.monotonic()
        for step in range(4):
            text.step(held, step)
        assert len(workers.alive) == 2
        assert time.monotonic() - began > 4 * text.LAYERS * 2 * delay, "the link was not slow"


# ---- recompute


@cache
def _model(attention: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


@cache
def _prompt() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(21) >= torch.tensor([[0], [9]])).long()
    return torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(1)) * mask, mask


@cache
def _expected(count: int) -> tuple[Tensor, Tensor]:
    return _generate(_model("eager"), count)


def _generate(model: Any, count: int, **options: Any) -> tuple[Tensor, Tensor]:
    tokens, mask = _prompt()
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("fault", FAULTS)
def test_recompute_goes_on_with_the_same_text(fault: str, when: str, net: Network | str) -> None:
    """Before: the first call after the prompt finds the victim gone. After: the one that follows a token's does."""
    model, (tokens, mask) = copy.deepcopy(_model("seqpar")), _prompt()
    with site(fault, net) as place, place.workers() as workers, contextlib.ExitStack() as meanwhile:
        held = huggingface.offloaded_cache(
            model, workers, capacity=40, batch=2, placement=Placement(heads=1), loss="recompute", chunk=8, page=4
        )
        huggingface.prefill(model, tokens, held, attention_mask=mask, schedule="ring")
        if when == "before":
            meanwhile.enter_context(place.struck(when))
        calls = 0

        def strike_once(_: Tensor, scores: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 4 and when != "before":
                meanwhile.enter_context(place.struck(when))
            return scores

        sequences, logits = _generate(model, 12, past_key_values=held, logits_processor=[strike_once])
        assert calls == 12
        assert [(loss.worker, loss.sequences) for loss in held.losses] == [("1 (victim)", (0,))]
        assert "victim" not in str(held.ledger)
    assert torch.equal(sequences, _expected(12)[0])
    torch.testing.assert_close(logits, _expected(12)[1], rtol=1e-5, atol=1e-5)


# ---- ranks that vanish


def test_a_hundred_aborted_requests_leave_nothing() -> None:
    """Ranks leave in the middle of a call by BYE, without a word, by an exception, or are killed."""
    text = Text(3)
    with worker_process(memory=MEMORY) as worker, Workers.join(worker.address, deadline=20) as friend:
        held = text.cache(friend)
        text.step(held, 0)
        _vanish_somehow(worker.address, 1, text)
        expected = settled(worker.leftovers, None, 0.5)
        for number in range(84):
            _vanish_somehow(worker.address, number % 3, text)
        for _ in range(4):
            process = _processes.Process(target=vanish, args=(worker.address, 4), daemon=True)
            process.start()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        assert settled(worker.leftovers, expected) == expected
        for step in range(1, 3):
            text.step(held, step)
        held.release()
        status = friend.status_of(friend.members[0])
        assert (status["free"], status["shards"], status["connections"]) == (MEMORY, 0, 1)


def _vanish_somehow(address: str, how: int, text: Text) -> None:
    workers = Workers.join(address, deadline=20)
    if how == 0:
        half_a_call(workers, text)
        workers.close()
    elif how == 1:
        half_a_call(workers, text)
        workers.members[0].channel.close()
    else:
        with contextlib.suppress(ZeroDivisionError), workers:
            half_a_call(workers, text)
            raise ZeroDivisionError


def test_who_is_silent_for_too_long_is_let_go() -> None:
    text = Text(4)
    with worker_process(memory=MEMORY, lease=1.0) as worker, contextlib.ExitStack() as stack:
        silent, friend = (stack.enter_context(Workers.join(worker.address, deadline=20)) for _ in range(2))
        text.step(text.cache(silent), 0)
        held = text.cache(friend)
        text.step(held, 0)
        size = held._remote.shape.bytes_of(held._remote.parts[0].rooms) * text.ROWS
        wanted = {"free": MEMORY - size, "shards": text.ROWS, "sessions": 1}

        def asked() -> dict[str, int]:
            friend.free()
            return _some(worker.leftovers(), wanted)

        assert asked() == {"free": MEMORY - 2 * size, "shards": 2 * text.ROWS, "sessions": 2}
        assert settled(asked, wanted) == wanted
        for step in range(1, 4):
            text.step(held, step)
        with pytest.raises(WorkerLost):
            silent.free()


# ---- frames that are none of ours


def frame(number: int, kind: int, payload: bytes = b"", dtype: torch.dtype | None = None, **fields: Any) -> bytes:
    """A frame whose header is right, whatever it says."""
    header = Header(Kind(kind), number, len(payload), dtype, **fields)
    return encode(header) + payload + encode_trailer(number)


def told(number: int, kind: Kind, value: Any, **fields: Any) -> bytes:
    """A frame of JSON."""
    return frame(number, kind, json.dumps(value).encode(), torch.uint8, **fields)


def patched(data: bytes, place: int, new: bytes) -> bytes:
    """Other bytes in a header, whose checksum is right nevertheless."""
    changed = bytearray(data)
    changed[place : place + len(new)] = new
    changed[40:44] = struct.pack("<I", zlib.crc32(changed[:40] + changed[44:HEADER_BYTES]))
    return bytes(changed)


OPEN: dict[str, Any] = {
    "mask": [["Causal", {}]], "heads": [4, 2], "head_dim": [8, 8], "dtype": "fp32", "capacity": 64, "chunk": 64,
    "page": 4, "layers": 2, "length": 0, "shards": [[0, 0, 2, 0, 1]],
}  # fmt: skip
ROWS = bytes(4 * 2 * 2 * 8)  # keys and values of a token

ENDING = {
    "a byte": [b"\0"],
    "noise": [bytes(range(200))],
    "other magic": [b"SQPB" + frame(0, Kind.STATUS)[4:]],
    "other version": [patched(frame(0, Kind.STATUS), 4, b"\2")],
    "bad checksum": [frame(0, Kind.STATUS)[:12] + b"\1" + frame(0, Kind.STATUS)[13:]],
    "unknown kind": [patched(frame(0, Kind.STATUS), 6, b"\x10")],
    "an answer": [frame(0, Kind.RESULT)],
    "oversized": [patched(frame(0, Kind.STORE, bytes(8), torch.uint8), 32, struct.pack("<Q", (1 << 16) + 1))],
    "very oversized": [patched(frame(0, Kind.STORE, bytes(8), torch.uint8), 32, b"\xff" * 8)],
    "cut short": [told(0, Kind.OPEN, OPEN)[:-30]],
    "cut in its header": [told(0, Kind.OPEN, OPEN)[:40]],
    "replayed": [told(0, Kind.OPEN, OPEN), told(0, Kind.OPEN, OPEN)],
    "reordered": [told(1, Kind.OPEN, OPEN), told(0, Kind.HELLO, {})],
    "left out": [told(0, Kind.OPEN, OPEN), frame(2, Kind.STATUS)],
    "no JSON": [frame(0, Kind.OPEN, b"{]", torch.uint8)],
    "JSON of another type": [told(0, Kind.OPEN, [OPEN])],
    "numbers for JSON": [frame(0, Kind.OPEN, bytes(8), torch.float64)],
    "payload apart": [frame(0, Kind.STORE, dtype=torch.float32, flags=0x80)],
    "keys of no call": [frame(0, Kind.APPEND, ROWS, torch.float32, tokens=1)],
    "no keys to a call": [
        told(0, Kind.OPEN, OPEN), told(1, Kind.ROSTER, {"shards": [0], "counts": None}),
        frame(2, Kind.ATTEND, bytes(128), torch.float32, tokens=1), frame(3, Kind.STATUS),
    ],
    "keys of another call": [
        told(0, Kind.OPEN, OPEN), told(1, Kind.ROSTER, {"shards": [0], "counts": None}),
        frame(2, Kind.ATTEND, bytes(128), torch.float32, tokens=1),
        frame(3, Kind.APPEND, ROWS, torch.float32, tokens=1, layer=1),
    ],
}  # fmt: skip

REFUSED: dict[str, tuple[list[bytes], str]] = {
    "no fields": ([told(0, Kind.OPEN, {})], "mask"),
    "an unknown mask": ([told(0, Kind.OPEN, {**OPEN, "mask": [["os.system", {}]]})], "mask: got"),
    "a number's place taken by a text": ([told(0, Kind.OPEN, {**OPEN, "capacity": "64"})], "number: got '64'"),
    "negative": ([told(0, Kind.OPEN, {**OPEN, "layers": -1})], "number: got -1"),
    "more pages than a text may have": ([told(0, Kind.OPEN, {**OPEN, "capacity": 1 << 28})], "open: got"),
    "more layers than a model may have": ([told(0, Kind.OPEN, {**OPEN, "layers": 1 << 20})], "expected at most 4096"),
    "shards without rows": (
        [told(0, Kind.OPEN, {**OPEN, "layers": 4096, "shards": [[n, 0, 2, 500, 1000] for n in range(600)]})],
        "memory: got",
    ),
    "more tokens than a frame has": (
        [
            told(0, Kind.OPEN, OPEN), told(1, Kind.ROSTER, {"shards": [0], "counts": [1]}),
            frame(2, Kind.APPEND, ROWS, torch.float32, tokens=1 << 26, flags=STREAMS), frame(3, Kind.SYNC),
        ],
        "tokens: got 67108864",
    ),
    "too large a number": ([told(0, Kind.OPEN, {**OPEN, "layers": 1 << 40})], "number: got 1099511627776"),
    "too much memory": ([told(0, Kind.OPEN, {**OPEN, "capacity": 1 << 20})], "memory: got"),
    "a shard twice": ([told(0, Kind.OPEN, {**OPEN, "shards": [[0, 0, 2, 0, 1]] * 2})], "number twice"),
    "heads that are not there": ([told(0, Kind.OPEN, {**OPEN, "shards": [[0, 0, 3, 0, 1]]})], "heads 0 to 3"),
    "an unknown dtype": ([told(0, Kind.OPEN, {**OPEN, "dtype": "pickle"})], "dtype: got 'pickle'"),
    "an unknown shard": ([told(0, Kind.FREE, {"shards": [7]})], "shards: got \\[7\\]"),
    "rows out of range": (
        [told(0, Kind.OPEN, OPEN), frame(1, Kind.FETCH, tokens=1, argument=1 << 40)], "rows: got 1099511627776"
    ),
    "an unknown roster": (
        [frame(0, Kind.ATTEND, bytes(128), torch.float32, tokens=1), frame(1, Kind.APPEND, ROWS, torch.float32)],
        "roster: got 0",
    ),
    "a length that it does not have": (
        [told(0, Kind.OPEN, OPEN), told(1, Kind.TRUNCATE, {"shards": [0], "lengths": [3]})], "truncate: got 3"
    ),
    "no scale": (
        [
            told(0, Kind.OPEN, OPEN), told(1, Kind.ROSTER, {"shards": [0], "counts": None}),
            frame(2, Kind.ATTEND, bytes(128), torch.float32, tokens=1, argument=bits_of(float("nan"))),
            frame(3, Kind.APPEND, ROWS, torch.float32, tokens=1),
        ],
        "scale",
    ),
}  # fmt: skip


def test_bad_frames_end_their_connection_or_are_refused_and_the_worker_keeps_serving() -> None:
    """While another rank's results stay exact, and nothing is kept of what was sent."""
    text = Text(len(ENDING) + len(REFUSED) + 1)
    with worker_process(memory=MEMORY, limit=1 << 16) as worker, Workers.join(worker.address, deadline=20) as friend:
        held = text.cache(friend)
        text.step(held, 0)
        step = 1
        for messages, words in [*((x, None) for x in ENDING.values()), *REFUSED.values()]:
            link = knock(join_store(worker.address, 20), 0, 20)
            channel, sent = Channel(link, limit=1 << 16, deadline=20), send_raw(link, *messages)
            answer = None
            with contextlib.suppress(Lost):
                while answer is None or answer.header.kind is not Kind.REFUSED:
                    answer = channel.receive()
            if words is None:
                assert channel.closed, messages
                assert answer is None or answer.header.kind is Kind.DONE
            else:
                assert answer is not None
                assert re.search(words, answer.text()["error"]), answer.text()
            channel.close()
            del sent
            text.step(held, step)
            step += 1
        held.release()
        expected = {"free": MEMORY, "shards": 0, "sessions": 1}
        assert settled(lambda: _some(worker.leftovers(), expected), expected) == expected


def conversation(generator: random.Random) -> list[bytes]:
    """Frames of every kind that a rank sends, one of them changed, left out, repeated or in another's place."""
    step = bytes(generator.randbytes(1)) * 128
    frames: list[tuple[Kind, Any, dict[str, Any]]] = [
        (Kind.HELLO, {"dialect": 1}, {}),
        (Kind.OPEN, copy.deepcopy(OPEN), {}),
        (Kind.ROSTER, {"shards": [0], "counts": None}, {}),
        (Kind.ROSTER, {"shards": [0], "counts": [1]}, {"roster": 1}),
        (Kind.ATTEND, step, {"tokens": 1, "argument": bits_of(0.3)}),
        (Kind.APPEND, step, {"tokens": 1}),
        (Kind.APPEND, step, {"tokens": 1, "layer": 1, "roster": 1, "flags": STREAMS}),
        (Kind.STORE, step, {"tokens": 2, "layer": 1}),
        (Kind.FETCH, None, {"tokens": 2}),
        (Kind.TRUNCATE, {"shards": [0], "lengths": [1]}, {}),
        (Kind.SYNC, None, {}),
        (Kind.FREE, {"shards": [0]}, {}),
    ]
    number, way = generator.randrange(len(frames)), generator.randrange(6)
    kind, value, fields = frames[number]
    if way == 0 and isinstance(value, dict):
        _spoil(value, generator)
    elif way == 0 and value is not None:
        frames[number] = kind, value[: generator.randrange(1, 33) * 4], fields
    elif way == 1:
        fields[generator.choice(["layer", "tokens", "roster", "argument"])] = generator.choice(
            [0, 1, 2, 3, 65, 1 << 16]
        )
    elif way == 2:
        fields["flags"] = generator.randrange(16)
    elif way == 3:
        frames[number] = generator.choice(list(Kind)), value, fields
    elif way == 4:
        frames[number : number + 1] = generator.choice([[], [frames[number]] * 2, [frames[number - 1]]])
    whole = [
        told(n, kind, value, **fields)
        if isinstance(value, dict)
        else frame(n, kind, value or b"", torch.float32 if value is not None else None, **fields)
        for n, (kind, value, fields) in enumerate(frames)
    ]
    if way == 5:
        place = generator.randrange(HEADER_BYTES)
        whole[number] = patched(whole[number], place, generator.randbytes(generator.randrange(1, 5)))[
            : len(whole[number])
        ]
    return [*whole, frame(len(whole), Kind.STATUS)]


def _spoil(value: Any, generator: random.Random) -> None:
    """Another thing in one place of a JSON object."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = generator.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and generator.random() < 0.7:
        _spoil(value[key], generator)
    elif isinstance(value, dict) and generator.random() < 0.2:
        del value[key]
    else:
        value[key] = generator.choice([None, True, "x", "bf16", [], {}, [[]], -1, 0, 1, 2, 3, 7, 1000, 1 << 70, 0.5])


def test_mutated_conversations_end_or_are_refused(pytestconfig: pytest.Config) -> None:
    """Whatever is sent: an answer to every request or the end of the connection, and all memory free behind it."""
    generator, ended, refused, served = random.Random(8), 0, 0, 0
    common = Common(Budget(MEMORY), torch.device("cpu"))
    for _ in range(pytestconfig.getoption("--frames") // 3):
        link, there = make_links()
        session, endings = Session(Channel(there, limit=1 << 16, deadline=20), common), list[Exception | None]()
        thread = threading.Thread(target=_serve, args=(session, endings))
        thread.start()
        sent, channel = send_raw(link, *conversation(generator)), Channel(link, limit=1 << 16, deadline=20)
        kinds = []
        with contextlib.suppress(Lost):
            while True:
                answer = channel.receive()
                kinds.append(answer.header.kind)
                if answer.header.dtype is torch.uint8 and "free" in answer.text():
                    served += 1
                    break
        channel.close()
        del sent, link
        thread.join(20)
        assert [type(error) for error in endings] in ([Lost], [FrameError], [type(None)]), endings
        assert (common.budget.free, session.shards) == (MEMORY, {})
        refused += Kind.REFUSED in kinds
        ended += isinstance(endings[0], FrameError)
    assert min(ended, refused, served) > 0, (ended, refused, served)


def _serve(session: Session, endings: list[Exception | None]) -> None:
    try:
        session.serve(20)
        endings.append(None)
    except Exception as error:
        endings.append(error)
