"""transformers' `generate` from a cache that is spread over ranks gives what one process gives."""

from __future__ import annotations

import copy
from functools import cache
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

import seqpar
from seqpar.comm import Traffic, World, run_loopback
from seqpar.integrations import huggingface
from support.generation import prompts_of, random_model
from support.oracle import error

huggingface.register()

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=11),
    "qwen3": Qwen3Config(**SHAPE),
    "gpt-oss": GptOssConfig(**SHAPE, sliding_window=11, num_local_experts=2, num_experts_per_tok=1),
}
PROMPTS = {1: [45], 4: [45, 3, 21, 30]}


MAKING = Lock()  # ranks are threads, and share PyTorch's generator of random numbers


def model_of(name: str, attention: str) -> Any:
    with MAKING:
        return _model_of(name, attention)


@cache
def _model_of(name: str, attention: str) -> Any:
    return random_model(MODELS[name], attention)


def prompts(batch: int) -> tuple[Tensor, Tensor]:
    return prompts_of(PROMPTS[batch])


OPTIONS: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@cache
def expected(name: str, batch: int, count: int) -> tuple[Tensor, Tensor]:
    tokens, mask = prompts(batch)
    out = model_of(name, "eager").generate(tokens, attention_mask=mask, max_new_tokens=count, **OPTIONS)
    return out.sequences, torch.stack(out.logits, 1)


def generated(
    world: World, name: str, batch: int, count: int, schedule: str = "tree", **options: Any
) -> tuple[Tensor, Tensor, dict[str, Traffic]]:
    """Tokens and logits, and what was sent once the prompt was read."""
    tokens, mask = prompts(batch)
    model = copy.deepcopy(model_of(name, "seqpar"))
    held = huggingface.sharded_cache(
        model, capacity=tokens.shape[1] + count + 4, batch=batch, group=world, chunk=16, page=8
    )
    huggingface.prefill(model, tokens, held, attention_mask=mask, schedule=schedule)
    world.meter.reset()
    out = model.generate(tokens, attention_mask=mask, past_key_values=held, max_new_tokens=count, **OPTIONS, **options)
    return out.sequences, torch.stack(out.logits, 1), dict(world.meter.by_kind)


@pytest.mark.parametrize("batch", PROMPTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_two_hundred_tokens(world: int, batch: int) -> None:
    """One exchange per layer and token, whose payload is (P-1)(e*eta + 4H), and no other call at all."""
    count = 200
    sequences, logits = expected("llama", batch, count)
    for ours, theirs, sent in run_loopback(world, generated, "llama", batch, count):
        assert torch.equal(ours, sequences)
        assert error(theirs, logits) <= 1e-5
        if world > 1:
            payload = (world - 1) * batch * (4 * 48 + 4 * 6)
            assert sent == {"partial": (2 * count, 2 * count * payload)}


@pytest.mark.parametrize("schedule", ["tree", "ring"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_models_with_windows_and_sinks(name: str, schedule: str) -> None:
    sequences, logits = expected(name, 4, 30)
    for ours, theirs, _ in run_loopback(3, generated, name, 4, 30, schedule):
        assert torch.equal(ours, sequences)
        assert error(theirs, logits) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_drafts_that_are_looked_up_in_the_prompt(name: str) -> None:
    """Several tokens at once, of which wrong ones are taken back (`prompt_lookup_num_tokens`)."""
    sequences, _ = expected(name, 1, 60)

    def job(world: World) -> Tensor:
        tokens, mask = prompts(1)
        model = copy.deepcopy(model_of(name, "seqpar"))
        held = huggingface.sharded_cache(model, capacity=130, group=world, page=8)
        return model.generate(
            tokens, attention_mask=mask, past_key_values=held, max_new_tokens=60, do_sample=False,
            prompt_lookup_num_tokens=4,
        )  # fmt: skip

    for ours in run_loopback(2, job):
        assert torch.equal(ours, sequences)


def test_drafts_after_a_prefill_are_refused() -> None:
    """transformers gives the first step of drafts the whole prompt, whatever the cache holds."""
    tokens, mask = prompts(1)
    model = copy.deepcopy(model_of("llama", "seqpar"))
    held = huggingface.sharded_cache(model, capacity=130)
    huggingface.prefill(model, tokens, held)
    with pytest.raises(ValueError, match="got tokens up to position 44 for row 0, expected 88, those after the 44"):
        model.generate(tokens, attention_mask=mask, past_key_values=held, prompt_lookup_num_tokens=3, do_sample=False)
    held.reset()
    ours = model.generate(tokens, attention_mask=mask, past_key_values=held, max_new_tokens=9, do_sample=False)
    assert torch.equal(ours, expected("llama", 1, 9)[0])


def test_refused_crops_and_masks_change_nothing() -> None:
    model = copy.deepcopy(model_of("llama", "seqpar"))
    masks = [seqpar.Causal(), seqpar.SlidingWindow(10)]
    held = huggingface.sharded_cache(model, capacity=900, masks=masks, page=8)
    tokens = torch.ones(1, 800, dtype=torch.int64)
    huggingface.prefill(model, tokens, held)
    with pytest.raises(ValueError, match="expected 0, or at least"):
        held.crop(-600)
    with pytest.raises(ValueError, match="crop: got -800, expected at least -799"):
        held.crop(-800)
    with pytest.raises(ValueError, match="crop the cache"):
        held.layers[0].crop(-1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 5\), expected \[1, 800\]"):
            model(tokens[:, :1], attention_mask=torch.zeros(1, 5, dtype=torch.int64), past_key_values=held)
    assert [c.lengths for c in held.caches.values()] == [(799,), (799,)]
    assert held.get_seq_length() == 799
    held.crop(-9)
    assert [c.lengths for c in held.caches.values()] == [(790,), (790,)]
    assert held.get_seq_length() == 790


def test_beams() -> None:
    tokens, mask = prompts(1)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False}
    beams = model_of("llama", "eager").generate(tokens, attention_mask=mask, **options)

    def job(world: World) -> Tensor:
        model = copy.deepcopy(model_of("llama", "seqpar"))
        held = huggingface.sharded_cache(model, capacity=80, batch=3, group=world, page=8)
        return model.generate(tokens, attention_mask=mask, past_key_values=held, **options)

    for ours in run_loopback(2, job):
        assert torch.equal(ours, beams)


def test_a_prompt_that_is_too_long_leaves_the_cache_usable() -> None:
    def job(world: World) -> None:
        model = copy.deepcopy(model_of("llama", "seqpar"))
        held = huggingface.sharded_cache(model, capacity=50, group=world, page=8)
        tokens = torch.ones(1, 51, dtype=torch.int64)
        with pytest.raises(ValueError, match="got a prompt of 51 tokens, expected at most 50, the cache's capacity"):
            huggingface.prefill(model, tokens, held)
        with pytest.raises(ValueError, match="got 51 tokens for row 0, which has 0, expected at most 50, for capacity"):
            model.generate(tokens, past_key_values=held, max_new_tokens=2, do_sample=False)
        tokens, mask = prompts(1)
        out = model.generate(tokens, attention_mask=mask, past_key_values=held, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, expected("llama", 1, 5)[0])
        held.reset()
        out = model.generate(tokens, attention_mask=mask, past_key_values=held, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, expected("llama", 1, 5)[0])

    run_loopback(2, job)


def wrong(name: str, **options: Any) -> None:
    model = copy.deepcopy(model_of(name, "seqpar"))
    tokens, mask = prompts(1)
    given = {"attention_mask": mask, **options}
    held = huggingface.sharded_cache(model, capacity=80, masks=given.pop("masks", None))
    model.generate(tokens, past_key_values=held, max_new_tokens=2, do_sample=False, **given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: huggingface.sharded_cache(model_of("llama", "eager"), capacity=9),
            "got a model with attn_implementation='eager', expected 'seqpar'; load it with",
        ),
        (
            lambda: huggingface.sharded_cache(model_of("llama", "seqpar"), capacity=9, masks=[seqpar.Causal()]),
            "masks: got 1, expected 2, one for each layer",
        ),
        (
            lambda: wrong("mistral", masks=[seqpar.Causal()] * 2),
            "got a layer with sliding_window=11 and a plan of Causal()",
        ),
        (
            lambda: wrong("llama", attention_mask=prompts(1)[1].flip(1).index_fill(1, torch.tensor([44]), 0)),
            "attention_mask: got padding after a token, expected it before all others; pad on the left",
        ),
    ],
)
def test_refusals(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is looked at
        call()
    assert words in str(caught.value)
