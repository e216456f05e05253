"""transformers' `generate` with its keys and values on attention workers gives what one process gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, LlamaConfig, MistralConfig, PretrainedConfig

from seqpar.integrations import huggingface
from seqpar.offload import OffloadedCache, Placement, Turns, WorkerLost, Workers
from support.generation import prompts_of, random_model
from support.offload import MEMORY, Crew, crew, free_of, moved
from support.oracle import error

huggingface.register()

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=11),
    "gpt-oss": GptOssConfig(**SHAPE, sliding_window=11, num_local_experts=2, num_experts_per_tok=1),
}
PROMPTS = {1: [45], 8: [45, 3, 21, 30, 1, 44, 17, 9]}
OPTIONS: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def crews() -> Iterator[dict[int, Crew]]:
    with crew({}) as one, crew({}, {}) as two, crew({}, {}, {}, {}) as four:
        yield {1: one, 2: two, 4: four}


@cache
def model_of(name: str, attention: str) -> Any:
    return random_model(MODELS[name], attention)


def prompts(batch: int) -> tuple[Tensor, Tensor]:
    return prompts_of(PROMPTS[batch])


@cache
def expected(name: str, batch: int, count: int) -> tuple[Tensor, Tensor]:
    """transformers' own attention, and its own cache."""
    tokens, mask = prompts(batch)
    out = model_of(name, "eager").generate(tokens, attention_mask=mask, max_new_tokens=count, **OPTIONS)
    return out.sequences, torch.stack(out.logits, 1)


def cache_on(workers: Workers, name: str, batch: int, count: int, **options: Any) -> Any:
    longest = max(PROMPTS[batch])
    return huggingface.offloaded_cache(
        model_of(name, "seqpar"), workers, **{"capacity": longest + count, "batch": batch, "page": 8} | options
    )


def check(
    held: Any, name: str, batch: int, count: int, at: dict[int, Callable[[], Any]] | None = None, read: bool = True
) -> None:
    """Generate with a cache and compare text and logits; ``at`` so many new tokens do something."""
    model, (tokens, mask) = model_of(name, "seqpar"), prompts(batch)
    done = []

    def meanwhile(sequences: Tensor, scores: Tensor) -> Tensor:
        event = (at or {}).get(sequences.shape[1] - tokens.shape[1])
        if event is not None:
            event()
            done.append(event)
        return scores

    if read:
        huggingface.prefill(model, tokens, held, attention_mask=mask, schedule="ring")
    out = model.generate(
        tokens, attention_mask=mask, past_key_values=held, max_new_tokens=count, logits_processor=[meanwhile], **OPTIONS
    )
    sequences, logits = expected(name, batch, count)
    assert torch.equal(out.sequences, sequences)
    assert error(torch.stack(out.logits, 1), logits) <= 1e-5
    assert len(done) == len(at or {})


@pytest.mark.parametrize("batch", PROMPTS)
@pytest.mark.parametrize("segments", [False, True], ids=["heads", "segments"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_two_hundred_tokens(number: int, segments: bool, batch: int, crews: dict[int, Crew]) -> None:
    """Also what they move: in all the steps but the prompt's, per layer ``e B (2 S H D + 2 Hkv D)``, and the lse."""
    cut = Placement(heads=1, segments=max(2, number)) if segments else Placement()
    with crews[number].join() as workers:
        held = cache_on(workers, "llama", batch, 200, placement=cut)
        assert {line.holder for line in held.ledger.lines} == {f"worker {n} (w{n})" for n in range(number)}
        model, (tokens, mask) = model_of("llama", "seqpar"), prompts(batch)
        huggingface.prefill(model, tokens, held, attention_mask=mask)
        found, _ = moved(workers, lambda: check(held, "llama", batch, 200, read=False))
        frames, steps = 2 * 200 * number, 2 * 200 * batch
        asked = steps * 4 * cut.segments * 8 * 8
        assert found.pop("sent ROSTER", (0, 0))[0] <= number
        assert found == {
            "sent ATTEND": (frames, asked),
            "sent APPEND": (frames, steps * 4 * 2 * 4 * 8),
            "received RESULT": (frames, asked + (cut.segments > 1) * steps * 4 * cut.segments * 8),
        }
        held.release()
        assert set(free_of(workers).values()) == {MEMORY}


@pytest.mark.parametrize(
    ("name", "number", "cut"),
    [("llama", 2, Placement(heads=4, local=3)), ("mistral", 4, Placement(heads=2, segments=2)),
     ("gpt-oss", 1, Placement(local=1)), ("gpt-oss", 4, Placement(heads=2, segments=2)),
     ("gpt-oss", 2, Placement(heads=2, segments=3, local=2))],
    ids=str,
)  # fmt: skip
def test_windows_sinks_and_other_cuts(name: str, number: int, cut: Placement, crews: dict[int, Crew]) -> None:
    with crews[number].join() as workers:
        check(cache_on(workers, name, 8, 40, placement=cut), name, 8, 40)


@pytest.mark.parametrize(
    ("name", "cut", "batch", "count"),
    [
        ("llama", Placement(), 1, 200),
        ("llama", Placement(heads=1, segments=4), 1, 200),
        ("llama", Placement(heads=2, segments=2), 8, 40),
        ("gpt-oss", Placement(heads=2, segments=2), 8, 40),
    ],
    ids=["heads", "segments", "both", "windows"],
)
def test_migrations_in_mid_generation(
    name: str, cut: Placement, batch: int, count: int, crews: dict[int, Crew]
) -> None:
    with crews[4].join() as workers:
        held, last = cache_on(workers, name, batch, count, placement=cut), batch - 1
        events = {
            3: lambda: held.migrate(0, 2),
            9: lambda: [held.migrate(row, (row + 1) % 4) for row in range(batch)],
            17: lambda: held.migrate(last, None),
            30: lambda: held.migrate(last, 0),
        }
        check(held, name, batch, count, events)
        assert {line.holder for line in held.ledger.lines if line.sequence == last} == {"worker 0 (w0)"}


@pytest.mark.parametrize(
    ("name", "cut", "batch", "count"),
    [
        ("llama", Placement(), 1, 200),
        ("llama", Placement(heads=1, segments=2), 8, 40),
        ("gpt-oss", Placement(heads=2, segments=2), 8, 40),
        ("mistral", Placement(heads=3, local=1), 8, 40),
    ],
    ids=["heads", "segments", "both", "here"],
)
def test_lost_workers_are_made_up_for(name: str, cut: Placement, batch: int, count: int) -> None:
    """Two of three are killed, one after the other; the text is the same."""
    with crew({}, {}, {}) as three, three.join() as workers:
        first, second, _ = workers.members.values()
        held = cache_on(workers, name, batch, count, placement=cut, loss="recompute")
        check(held, name, batch, count, {10: lambda: three.kill(first), 25: lambda: three.kill(second)})
        assert [loss.worker for loss in held.losses] == ["0 (w0)", "1 (w1)"]
        assert {line.holder for line in held.ledger.lines} <= {"worker 2 (w2)", "here"}


def test_a_loss_while_the_prompt_is_read() -> None:
    with crew({}, {}) as two, two.join() as workers:
        held = cache_on(workers, "llama", 8, 40, loss="recompute", chunk=16)
        model, (tokens, mask) = model_of("llama", "seqpar"), prompts(8)
        kill = lambda done, _: two.kill(workers.members[1]) if done == 16 else None  # noqa: E731
        huggingface.prefill(model, tokens, held, attention_mask=mask, progress=kill)
        assert [loss.worker for loss in held.losses] == ["1 (w1)"]
        check(held, "llama", 8, 40, read=False)


def test_a_loss_that_is_not_made_up_for_has_a_name_and_leaves_nothing_half_done() -> None:
    with crew({}, {}) as two, two.join() as workers:
        held = cache_on(workers, "llama", 8, 40, placement=Placement(heads=1))
        lengths = []

        def kill() -> None:
            lengths.append([each.lengths for each in held.caches.values()])
            two.kill(workers.members[0])

        rows = tuple(line.sequence for line in held.ledger.lines if line.holder == "worker 0 (w0)")
        with pytest.raises(WorkerLost, match=r"attention worker 0 \(w0\) was lost, which held part of seq") as caught:
            check(held, "llama", 8, 40, {5: kill})
        assert (caught.value.worker, caught.value.sequences) == ("0 (w0)", rows)
        assert [each.lengths for each in held.caches.values()] == lengths[0]
        assert held.get_seq_length() == max(lengths[0][0])
        with pytest.raises(WorkerLost, match=r"attention worker 0 \(w0\)"):
            held.offloaded[0].attend(*(torch.zeros(8, 1, heads, 8) for heads in (8, 4, 4)))


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_a_second_loss_while_the_first_is_made_up_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with crew({}, {}, {}, {}) as four, four.join() as workers:
        held = cache_on(workers, name, 8, 20, placement=Placement(heads=1), loss="recompute")
        restore, restored = OffloadedCache.restore, list[OffloadedCache]()

        def and_lose(cache: OffloadedCache, *lengths: Any) -> None:
            restore(cache, *lengths)
            restored.append(cache)
            if len(restored) == 1:
                four.kill(workers.members[2])

        monkeypatch.setattr(OffloadedCache, "restore", and_lose)
        check(held, name, 8, 20, {5: lambda: four.kill(workers.members[0])})
        assert {loss.worker for loss in held.losses} == {"0 (w0)", "2 (w2)"}


def test_a_loss_that_fits_nowhere_else_names_the_worker() -> None:
    with crew(*[{"memory": 180_000}] * 2) as two, two.join() as workers:
        held = cache_on(workers, "llama", 8, 40, placement=Placement(heads=1), loss="recompute")
        with pytest.raises(WorkerLost, match=r"worker 0 \(w0\) was lost, .*; what it held fits nowhere else"):
            check(held, "llama", 8, 40, {5: lambda: two.kill(workers.members[0])})


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_workers_that_leave_are_left(name: str) -> None:
    """Two of three end by themselves, one after the other, as soon as nothing is there any more."""
    with crew({}, {}, {}) as three, three.join() as workers:
        first, second, _ = workers.members.values()
        held = cache_on(workers, name, 8, 40, placement=Placement(segments=2))

        def leave(member: Any) -> None:
            three.ask_to_leave(member)
            while not member.leaving:  # whatever it answers says so
                workers.status_of(member)

        def gone() -> None:
            assert three.ended(first)

        check(held, name, 8, 40, {5: lambda: leave(first), 9: gone, 20: lambda: leave(second)})
        assert three.ended(second)
        assert {line.holder for line in held.ledger.lines} == {"worker 2 (w2)"}


def test_a_copy_of_a_model_is_a_model_of_its_own(crews: dict[int, Crew]) -> None:
    """Caches go through a model's `forward`: a copy made afterwards has the copy's weights."""
    with crews[1].join() as workers:
        cache_on(workers, "llama", 1, 1)
        other = copy.deepcopy(model_of("llama", "seqpar"))
        torch.nn.init.zeros_(other.get_decoder().norm.weight)
        held = huggingface.offloaded_cache(other, workers, capacity=50)
        with torch.no_grad():
            assert not other(prompts(1)[0], past_key_values=held).logits.any()


@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
def test_batches_in_rotation_give_what_each_gives_alone(samples: bool, crews: dict[int, Crew]) -> None:
    turns, model = Turns(keeps_random_state=True), model_of("llama", "seqpar")

    def batch(number: int, shared: Turns | None = None) -> Tensor:
        mine = shared or Turns()
        tokens, mask = (x[4 * number : 4 * number + 4] for x in prompts(8))
        with mine.mine(), crews[2].join(turns=shared) as workers:
            torch.manual_seed(number)
            held = huggingface.offloaded_cache(model, workers, capacity=90, batch=4)
            return model.generate(
                tokens, attention_mask=mask, past_key_values=held, max_new_tokens=40, do_sample=samples
            )

    alone = [batch(number) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda number: batch(number, turns), range(2)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
