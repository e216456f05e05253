"""Channels over real gloo: what arrives, what is refused, who is lost and when, and how two processes meet."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from seqpar.offload.channel import LARGEST, Channel, Frame, Lost, Tally
from seqpar.offload.frames import FrameError, Header, Kind, encode, encode_trailer
from seqpar.offload.meeting import MOST_TEXT, Porch, host_store, join_store, knock, workers
from support.jobs_channel import (
    both,
    channels,
    echo,
    first_caller,
    keep_store,
    later,
    make_links,
    peer_process,
    send_raw,
)
from support.ranks import _processes


def message(sequence: int, payload: bytes = b"", **fields: object) -> bytes:
    """A whole frame of uint8."""
    header = Header(Kind.DONE, sequence, len(payload), torch.uint8, **fields)
    return encode(header) + payload + encode_trailer(sequence)


# ---- frames over a channel


@pytest.mark.parametrize("bulk", [False, True], ids=["gloo alone", "bulk group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=str)
def test_tensors_arrive_as_they_were(dtype, bulk):
    values = torch.arange(48).view(2, 4, 6).to(dtype)
    pieces = values, values.transpose(0, 2)[1:4], values[:, :0], values[0, 0, 3]
    with channels(bulk) as (here, there):
        here.send(Kind.ATTEND, *pieces, flags=5, layer=3, tokens=4, roster=5, argument=-6)
        frame = there.receive()
        for got, sent in zip(frame.tensors(*(piece.shape for piece in pieces)), pieces, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, sent, rtol=0, atol=0)
        size = sum(piece.numel() for piece in pieces) * dtype.itemsize
        assert (frame.header.kind, frame.header.sequence, frame.header.payload) == (Kind.ATTEND, 0, size)
        numbers = frame.header.layer, frame.header.tokens, frame.header.roster, frame.header.argument
        assert numbers == (3, 4, 5, -6)
        assert (frame.header.flags, frame.header.dtype) == (5 | 0x80 * bulk, dtype)
        there.send(Kind.STATUS, text={"free": 3, "ü": [1]})
        there.send(Kind.SYNC)
        assert here.receive().text() == {"free": 3, "ü": [1]}
        assert here.receive().payload.numel() == 0


def test_traffic_is_counted():
    with channels() as (here, there):
        for _ in range(2):
            here.send(Kind.ATTEND, torch.zeros(5, dtype=torch.bfloat16))
        here.send(Kind.SYNC)
        for _ in range(3):
            there.receive()
        expected = Tally(3, 20, 20 + 3 * 72, {Kind.ATTEND: (2, 20), Kind.SYNC: (1, 0)})
        assert here.sent == there.received == expected
        assert here.received == there.sent == Tally()


def test_a_payload_lives_until_the_second_next_receive():
    """Even where the receives after it were posted early."""
    with channels() as (here, there):
        frames: list[Frame] = []
        for step in range(9):
            here.send(Kind.STORE, torch.full((1000 - step,), step, dtype=torch.uint8))
            there.expect()
            for past, frame in enumerate(frames[-2:][::-1]):
                assert (frame.payload == step - 1 - past).all()
            frames.append(there.receive())
            there.expect()
            assert (frames[-1].payload == step).all()
            assert len(frames) < 2 or (frames[-2].payload == step - 1).all()


def test_payloads_of_the_limit_arrive_and_larger_ones_are_not_sent():
    with channels(limit=LARGEST) as (here, there):
        values = torch.arange(LARGEST // 8, dtype=torch.float64)
        for _ in range(4):
            here.send(Kind.STORE, values)
            assert torch.equal(there.receive().tensors([values.numel()])[0], values)
        for refused in (torch.zeros(LARGEST + 1, dtype=torch.uint8), torch.zeros(LARGEST // 4 + 1)):
            with pytest.raises(ValueError, match=rf"payload: got .* bytes, expected at most {LARGEST}; split"):
                here.send(Kind.STORE, refused)
        here.send(Kind.SYNC)
        assert there.receive().header.kind == Kind.SYNC


def test_what_cannot_be_sent_is_refused_before_it_is():
    one = torch.zeros(2)
    with channels() as (here, there):
        for arguments, options, name in [
            ((one, one.double()), {}, "tensors"),
            ((one,), {"dtype": torch.bfloat16}, "tensors"),
            ((one.long(),), {}, "dtype"),
            ((one,), {"text": {}}, "payload"),
            ((one,), {"flags": 0x80}, "flags"),
            ((one,), {"tokens": 2**32}, "header"),
            ((), {"text": {"long": "x" * LARGEST}}, "payload"),
        ]:
            with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
                here.send(Kind.ATTEND, *arguments, **options)
        here.send(Kind.ATTEND, dtype=torch.bfloat16)
        header = there.receive().header
        assert (header.sequence, header.dtype, header.payload) == (0, torch.bfloat16, 0)
        for options, name in [
            ({"limit": LARGEST + 1}, "limit"),
            ({"limit": 0}, "limit"),
            ({"deadline": 0.0}, "deadline"),
        ]:
            with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
                Channel(here._link, **{"deadline": 1.0, **options})


def test_payloads_that_are_not_what_they_should_be_are_refused():
    with channels() as (here, there):
        here.send(Kind.RESULT, torch.zeros(6))
        frame = there.receive()
        for shapes in [(), ([5],), ([7],), ([2, 3], [1]), ([6], [-1])]:
            with pytest.raises((FrameError, RuntimeError), match=r"payload: got 24 bytes|negative"):
                frame.tensors(*shapes)
        with pytest.raises(FrameError, match=r"payload: got torch.float32, expected JSON text"):
            frame.text()
        for payload in (b"[]", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b""):
            here.send(Kind.STATUS, torch.frombuffer(bytearray(payload) or bytearray(1), dtype=torch.uint8))
            with pytest.raises(FrameError, match=r"payload: got .*expected a JSON object"):
                there.receive().text()


def test_the_window_waits_for_the_peer():
    """Frames beyond it wait, at most for the deadline; those within are on their way meanwhile."""
    with channels(deadline=0.4, window=(2, 1 << 20)) as (here, there):
        for _ in range(2):
            here.send(Kind.APPEND, torch.zeros(10))
        timer = later(0.1, lambda: there.receive(5))
        here.send(Kind.APPEND, torch.zeros(10))
        timer.join()
        began = time.monotonic()
        with pytest.raises(Lost, match=r"sending a frame of 40 bytes: .*0\.4"):
            here.send(Kind.APPEND, torch.zeros(10))
        assert time.monotonic() - began < 1.4
        assert here.closed
    with channels(deadline=0.2, window=(9, 100)) as (here, there):
        for _ in range(3):
            here.send(Kind.APPEND, torch.zeros(10))
            there.receive()
        for _ in range(2):
            here.send(Kind.APPEND, torch.zeros(10))
        with pytest.raises(Lost):
            here.send(Kind.APPEND, torch.zeros(10))


# ---- malformed frames


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        pytest.param([message(0), message(0)], "sequence: got 0, expected 1", id="replayed"),
        pytest.param([message(0), message(2)], "sequence: got 2, expected 1", id="dropped"),
        pytest.param([message(1), message(0)], "sequence: got 1, expected 0", id="reordered"),
        pytest.param([message(0, bytes(100))[:-1]], "trailer", id="first cut by a byte"),
        pytest.param([message(0, bytes(100))[:-8]], "trailer", id="first without trailer"),
        pytest.param([message(0, bytes(100))[:64]], "trailer", id="first without payload"),
        pytest.param([message(0)[:63]], "crc|sequence", id="cut in the header"),
        pytest.param([b"\0"], "magic", id="a byte"),
        pytest.param([message(0, bytes(1001))], "payload: got 1001 bytes, expected at most 1000", id="oversized"),
        pytest.param([message(0, bytes(8), flags=0x80)], "flags: got 0x80, .* bulk", id="no bulk group"),
        # The buffers come round after three frames: each was full of what would do for the fourth's trailer.
        pytest.param(
            [*(message(n, encode_trailer(4) * 100) for n in range(4)), message(4, bytes(400))[:-8]],
            "trailer: got 0x0, expected sequence number 0x4",
            id="stale tail",
        ),
    ],
)
def test_malformed_frames_end_the_connection_and_no_other(messages, reason):
    link, there = make_links()
    receiver = Channel(there, limit=1000, deadline=20)
    with channels() as (friend, server):
        sent = send_raw(link, *messages)
        for _ in messages[:-1] if "reordered" not in reason else ():
            if messages[0] == message(1):
                break
            receiver.receive()
        with pytest.raises(FrameError, match=reason):
            receiver.receive()
        assert receiver.closed
        for call in (receiver.receive, receiver.expect, receiver.flush, lambda: receiver.send(Kind.BYE)):
            with pytest.raises(Lost, match="closed"):
                call()
        friend.send(Kind.HELLO, text={"as": "before"})
        assert server.receive().text() == {"as": "before"}
    del sent
    link.close()


# ---- peers that are gone


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
@pytest.mark.parametrize("when", ["before a receive", "during a receive", "before a big send", "during a big send"])
def test_lost_peers_are_told_within_the_deadline(how, when):
    deadline = 0.7
    with peer_process(deadline, window=(1, LARGEST)) as (process, channel):
        channel.send(Kind.HELLO, torch.ones(3), argument=4)
        answer = channel.receive(20)
        assert (answer.header.argument, answer.tensors([3])[0].tolist()) == (4, [1, 1, 1])
        if when.startswith("before"):
            os.kill(process.pid, how)
            time.sleep(0.05)
        else:
            timer = later(0.2, lambda: os.kill(process.pid, how))
        began = time.monotonic()
        with pytest.raises(Lost) as lost:  # noqa: PT012
            if when.endswith("receive"):
                channel.receive()
            else:
                while time.monotonic() < began + 10:  # the peer's answers are left unread
                    channel.send(Kind.STORE, torch.zeros(LARGEST, dtype=torch.uint8))
        late = time.monotonic() - began - deadline - (0.2 if when.startswith("during") else 0)
        assert late < 1, f"{late} s after the deadline: {lost.value}"
        assert channel.closed
        if when.startswith("during"):
            timer.join()


def test_a_bulk_payload_that_never_comes_is_lost():
    with channels(bulk=True, deadline=0.3) as (here, there):
        header = Header(Kind.RESULT, 0, 400, torch.float32, 0x80)
        sent = send_raw(here._link, encode(header) + encode_trailer(0))
        began = time.monotonic()
        with pytest.raises(Lost, match="400 bytes of payload over the bulk group"):
            there.receive()
        assert time.monotonic() - began < 1.3
        assert there.closed
        del sent


def test_the_peers_close_ends_a_receive_at_once():
    with channels(deadline=30) as (here, there):
        timer = later(0.1, here.close)
        began = time.monotonic()
        with pytest.raises(Lost, match="onnection closed"):
            there.receive()
        assert time.monotonic() - began < 10
        timer.join()
        here.close()


def test_what_was_flushed_arrives_before_the_end():
    with peer_process(20) as (_, channel):
        for _ in range(3):
            channel.send(Kind.BYE)
        channel.expect()
        assert channel.receive().header.kind == Kind.BYE
        with pytest.raises(Lost):
            channel.receive()


def test_connections_leave_nothing_behind():
    def open_and_close(number: int) -> Lost | None:
        with channels(limit=1 << 10) as (here, there):
            here.send(Kind.SYNC)
            there.expect()
            if number % 4 == 0:
                return None  # with a frame on its way
            there.receive()
            there.send(Kind.DONE)
            if number % 4 == 1:
                here.close()
                with pytest.raises(Lost) as lost:
                    there.receive()
                return lost.value  # whose traceback holds the frames of the calls
        return None

    def leftovers() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    errors = [open_and_close(1)]
    before = leftovers()
    errors += [open_and_close(number) for number in range(200)]
    after = leftovers()
    assert after <= before, f"descriptors and threads: {before} before, {after} after"
    assert sum(error is not None for error in errors) == 51


# ---- meeting


def test_workers_and_callers_meet():
    with host_store("127.0.0.1:0") as hosted:
        porch, other = Porch(hosted.store), Porch(join_store(hosted.address, 10))
        assert workers(hosted.store) == {}
        assert (porch.register({"memory": 5}), other.register({})) == (0, 1)
        caller = join_store(hosted.address, 10)
        assert workers(caller) == {0: {"memory": 5}, 1: {}}
        assert list(porch.waiting()) == []
        for expected in range(2):
            ours, theirs = both(
                lambda expected=expected: porch.let_in(first_caller(porch)), lambda: knock(caller, 0, 20)
            )
            a, b = Channel(ours, deadline=10), Channel(theirs, deadline=10)
            a.send(Kind.HELLO, argument=expected)
            assert b.receive().header.argument == expected
            a.close()
            b.close()
        assert list(porch.waiting()) == list(other.waiting()) == []
        porch.leave()
        porch.leave()
        assert workers(caller) == {1: {}}
        with pytest.raises(Lost, match=r"worker 0 is not registered; choose one of \[1\]"):
            knock(caller, 0, 5)
        with pytest.raises(ValueError, match="call register first"):
            next(porch.waiting())
        assert porch.register({}) == 2


def test_a_worker_that_does_not_answer_is_lost_to_its_caller():
    with host_store("127.0.0.1:0") as hosted:
        porch = Porch(hosted.store)
        porch.register({})
        caller = join_store(hosted.address, 10)
        began = time.monotonic()
        with pytest.raises(Lost, match=r"worker 0 did not answer within 0\.3 s"):
            knock(caller, 0, 0.3)
        assert time.monotonic() - began < 1.3
        timer = later(0.2, porch.leave)
        with pytest.raises(Lost, match="worker 0 has left"):
            knock(caller, 0, 20)
        timer.join()
        for missing in (-1, 1):
            with pytest.raises(Lost, match=f"worker {missing} is not registered"):
                knock(caller, missing, 5)


def test_a_caller_that_died_costs_its_thread_only():
    with host_store("127.0.0.1:0") as hosted:
        porch = Porch(hosted.store)
        porch.register({})
        hosted.store.add("worker/0/callers", 1)  # one died before it said anything, one after
        hosted.store.set("worker/0/caller/1", '{"gpu": ""}')
        hosted.store.add("worker/0/callers", 1)
        lost: list[BaseException] = []

        def let_in(number: int) -> None:
            try:
                porch.let_in(number, 1.5)
            except Lost as error:
                lost.append(error)

        threads = [threading.Thread(target=let_in, args=(number,)) for number in porch.waiting()]
        for thread in threads:
            thread.start()
        ours, theirs = both(
            lambda: porch.let_in(first_caller(porch)), lambda: knock(join_store(hosted.address, 10), 0, 20)
        )
        assert not lost, "the living caller waited for the dead"
        for thread in threads:
            thread.join(10)
        assert len(lost) == len(threads) == 2
        ours.close()
        theirs.close()


def test_texts_in_the_store_are_checked():
    with host_store("127.0.0.1:0") as hosted:
        porch = Porch(hosted.store)
        with pytest.raises(ValueError, match=rf"info: got .* bytes of JSON, expected at most {MOST_TEXT}"):
            porch.register({"long": "x" * MOST_TEXT})
        porch.register({})
        for text in ("[]", "{", '{"info": 3}', '{"info": {}, "long": "' + "x" * MOST_TEXT + '"}'):
            hosted.store.set("worker/0", text)
            for call in (lambda: workers(hosted.store), lambda: knock(hosted.store, 0, 5)):
                with pytest.raises(FrameError, match=r"worker/0: got .*expected"):
                    call()
        for number, text in enumerate(("3", "{}", '{"gpu": 3}')):
            hosted.store.add("worker/0/callers", 1)
            hosted.store.set(f"worker/0/caller/{number}", text)
        for number in porch.waiting():
            with pytest.raises(FrameError, match=rf"worker/0/caller/{number}: got .*expected"):
                porch.let_in(number, 5)
        hosted.store.set("worker/0", '{"info": {}}')
        timer = later(0.2, lambda: hosted.store.set("worker/0/caller/3/answer", '{"bulk": 1}'))
        with pytest.raises(FrameError, match="answer: got 1, expected true or false"):
            knock(join_store(hosted.address, 10), 0, 20)
        timer.join()
        hosted.store.add("workers", 1 << 20)
        with pytest.raises(FrameError, match="workers: got 1048577, expected 0 to 65536"):
            workers(hosted.store)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:x", "host:70000", "host:-1", "::1:5", "[::1]", "host:1:2", "a b:3"]
)
def test_malformed_addresses_are_refused(address):
    for call in (host_store, lambda address: join_store(address, 1)):
        with pytest.raises(ValueError, match=r"address: got .*, expected HOST:PORT"):
            call(address)


def test_a_store_listens_where_it_says():
    with host_store("127.0.0.1:0") as hosted:
        port = int(hosted.address.rsplit(":", 1)[1])
        with pytest.raises(ConnectionRefusedError):  # a listener on every interface would answer
            socket.create_connection(("127.0.0.2", port), timeout=5)
        with pytest.raises(ValueError, match=r"address: got .*expected a free one of this host"):
            host_store(hosted.address)
    for everywhere in ("0.0.0.0:0", "[::]:0"):
        with pytest.raises(ValueError, match=r"address: got .*expected one"):
            host_store(everywhere)
    with pytest.raises(ValueError, match=r"address: got '203.0.113.1:0' .*expected a free one of this host"):
        host_store("203.0.113.1:0")
    with pytest.raises(ValueError, match="port of 1 to 65535"):
        join_store("127.0.0.1:0", 1)


def test_nobody_at_an_address_is_told_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(Lost, match=rf"nobody at 127.0.0.1:{port} within 0.3 s .*serves no store"):
            join_store(f"127.0.0.1:{port}", 0.3)
    with pytest.raises(Lost, match=r"nobody at .*start them first, or mend the address"):
        join_store(f"127.0.0.1:{port}", 0.3)
    assert time.monotonic() - began < 3.3


def test_a_lost_store_is_told():
    with host_store("127.0.0.1:0") as hosted:
        client = join_store(hosted.address, 10)
        porch = Porch(client)
        porch.register({})
    for call in (lambda: workers(client), lambda: list(porch.waiting()), porch.leave, lambda: knock(client, 0, 2)):
        with pytest.raises(Lost, match="could not be reached"):
            call()


def test_a_stopped_store_is_told_in_time():
    """torch's own calls would wait for ever."""
    here, there = multiprocessing.Pipe()
    process = _processes.Process(target=keep_store, args=(there,), daemon=True)
    process.start()
    try:
        client = join_store(here.recv(), 10)
        os.kill(process.pid, signal.SIGSTOP)
        while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.001)  # until then it answers
        for call in (lambda: workers(client, 0.3), lambda: knock(client, 0, 0.3)):
            began = time.monotonic()
            with pytest.raises(Lost, match="could not be reached: no answer of the store"):
                call()
            assert time.monotonic() - began < 1.3
    finally:
        process.kill()
        process.join()


def test_a_killed_caller_is_lost_and_the_next_one_is_let_in():
    """Two processes, one after the other; the second says goodbye."""
    with host_store("127.0.0.1:0") as hosted:
        porch = Porch(hosted.store)
        worker = porch.register({})
        for ending in ("killed", "goodbye"):
            process = _processes.Process(target=echo, args=(hosted.address, worker), daemon=True)
            process.start()
            channel = Channel(porch.let_in(first_caller(porch)), deadline=20)
            channel.send(Kind.SYNC, argument=3)
            assert channel.receive().header.argument == 3
            if ending == "killed":
                process.kill()
                with pytest.raises(Lost):
                    channel.receive()
            else:
                channel.send(Kind.BYE)
                assert channel.receive().header.kind == Kind.BYE
            channel.close()
            process.join(20)
            assert process.exitcode == (-signal.SIGKILL if ending == "killed" else 0)


def test_groups_are_made_without_the_default_one():
    assert not dist.is_initialized()
