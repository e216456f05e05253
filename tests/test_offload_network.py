"""Generation with attention workers on another host, behind a link that is no loopback: exact, counted, and cut."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from seqpar.integrations import huggingface
from seqpar.offload import Placement, WorkerLost, WorkerRefused, Workers
from seqpar.offload.frames import HEADER_BYTES, TRAILER_BYTES, Kind
from support.jobs_offload import WorkerProcess, worker_process
from support.network import Network, Unavailable, address, network

huggingface.register()

MBIT = 1e6 / 8
RATE, DELAY = 100 * MBIT, 0.005
TOKENS, LAYERS, HEADS, KV_HEADS, DIM, BATCH = 8, 2, 4, 2, 16, 2
PROMPT = 40
DEADLINE = 1.5


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    """The model's host, and the workers', whose link has a bandwidth and a delay."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(network(2))
        except Unavailable as missing:
            pytest.skip(f"a network that is not loopback: {missing}")
        made.shape(1, rate=RATE, delay=DELAY)
        yield made


@pytest.fixture(scope="module")
def fleet(net: Network) -> Iterator[WorkerProcess]:
    """Two workers on the second host, which also serves the store."""
    there = net.namespace(1)
    with (
        worker_process(address(1) + ":0", namespace=there, memory=1 << 24) as first,
        worker_process(first.address, namespace=there, memory=1 << 24),
    ):
        yield first


def _model(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=HEADS * DIM, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def _prompt() -> Tensor:
    return torch.randint(1, 97, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))


def _generate(model: LlamaForCausalLM, **options: object) -> tuple[Tensor, Tensor]:
    tokens = _prompt()
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def _counted(workers: Workers) -> dict[str, int]:
    """Frames of calls, their payloads, and all bytes of both directions with headers and trailers."""
    tallies = [tally for member in workers.members.values() for tally in (member.channel.sent, member.channel.received)]
    calls = [tally.by_kind.get(kind, (0, 0)) for tally in tallies for kind in (Kind.ATTEND, Kind.APPEND, Kind.RESULT)]
    return {
        "calls' frames": sum(frames for frames, _ in calls),
        "calls' bytes": sum(size for _, size in calls),
        "headers": sum(tally.total - tally.bytes for tally in tallies),
        "frames": sum(tally.frames for tally in tallies),
    }


@pytest.mark.parametrize("segments", [1, 2])
def test_generation_is_exact_and_sends_what_the_formula_says(segments: int, net: Network, fleet: WorkerProcess) -> None:
    """By heads ``e B (2 H D + 2 Hkv D)`` a layer and step; by S segments queries and partials go S times, with lse."""
    model = _model("seqpar")
    with net.at(0), Workers.join(fleet.address, deadline=20, least=2) as workers:
        placement = Placement(heads=2 // segments, segments=segments)
        held = huggingface.offloaded_cache(
            model, workers, capacity=64, batch=BATCH, placement=placement, chunk=16, page=8
        )
        huggingface.prefill(model, _prompt(), held, schedule="ring")
        assert set(held.offloaded[0].lengths) == {PROMPT - 1}
        before, began = _counted(workers), time.monotonic()
        sequences, logits = _generate(model, past_key_values=held)
        took = time.monotonic() - began
        sent = {name: count - before[name] for name, count in _counted(workers).items()}
        held.release()
    expected_sequences, expected_logits = _generate(_model("eager"))
    assert torch.equal(sequences, expected_sequences)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    calls = TOKENS * LAYERS
    wire = 4 * BATCH * (2 * segments * HEADS * DIM + 2 * KV_HEADS * DIM) + 4 * segments * BATCH * HEADS * (segments > 1)
    assert sent["calls' bytes"] == calls * wire
    assert sent["calls' frames"] == calls * 3 * 2
    assert sent["headers"] == sent["frames"] * (HEADER_BYTES + TRAILER_BYTES)
    assert took > calls * 2 * DELAY, "the link has no delay"


def test_the_link_has_its_bandwidth(net: Network, fleet: WorkerProcess) -> None:
    """A megabyte takes no less than it must."""
    size = 1 << 20
    with net.at(0), Workers.join(fleet.address, deadline=20, least=2) as workers:
        member = workers.members[0]
        began = time.monotonic()
        member.send(Kind.STORE, torch.zeros(size, dtype=torch.uint8))
        with pytest.raises(WorkerRefused):  # there is no such shard
            member.ask(Kind.SYNC)
        assert time.monotonic() - began > 0.9 * size / RATE


def test_a_cut_link_loses_the_workers_in_time_and_they_serve_on_when_it_is_back(
    net: Network, fleet: WorkerProcess
) -> None:
    model = _model("seqpar")
    with net.at(0):
        with Workers.join(fleet.address, deadline=DEADLINE, least=2) as workers:
            held = huggingface.offloaded_cache(model, workers, capacity=64, batch=BATCH, chunk=16, page=8)
            huggingface.prefill(model, _prompt(), held, schedule="ring")
            net.shape(1, up=False)
            try:
                began = time.monotonic()
                with pytest.raises(WorkerLost, match=r"worker 0 .*which held part of sequences 0, 1") as lost:
                    _generate(model, past_key_values=held)
                assert time.monotonic() - began < DEADLINE + 1
                assert lost.value.sequences == (0, 1)
            finally:
                net.shape(1, rate=RATE, delay=DELAY)
        with Workers.join(fleet.address, deadline=20, least=2) as workers:
            held = huggingface.offloaded_cache(model, workers, capacity=64, batch=BATCH, chunk=16, page=8)
            assert torch.equal(_generate(model, past_key_values=held)[0], _generate(_model("eager"))[0])
