"""Hugging Face models called with whole rows: loss, gradients and logits of one rank; and a Trainer around one."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seqpar
from seqpar.integrations import huggingface
from seqpar.integrations.options import AttentionOptions
from support.example import run_example
from support.jobs_whole_rows import (
    WINDOW,
    beside_data_parallel,
    called_with_whole_rows,
    llama,
    refused_calls,
    rows_of,
    ten_steps,
    whole_calls,
    wrong_calls,
)
from support.ranks import run_gloo

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'seqpar[hf]'")


def test_loss_gradients_and_logits_equal_each_document_s_alone() -> None:
    """Over an odd number of ranks, for every way to say documents, padding, labels and windows."""
    for worst in run_gloo(3, called_with_whole_rows):
        assert worst.keys() == whole_calls().keys()
        for kind, (loss, gradient, logits) in worst.items():
            assert loss <= 1e-6, kind
            assert gradient <= 1e-5, kind
            assert logits <= 1e-5, kind


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ten_steps_equal_those_of_the_unsharded_model(ranks: int) -> None:
    """Packed documents of unequal counts, and grouped-query attention."""
    for loss, gradient in run_gloo(ranks, ten_steps):
        assert loss <= 1e-4
        assert gradient <= 1e-5


def test_beside_data_parallel_the_loss_is_the_mean_over_all_tokens() -> None:
    """2 sequences over 2 ranks each, DDP over all; micro-steps averaged, or tokens counted as a Trainer counts them."""
    for loss, averaged, counted in run_gloo(4, beside_data_parallel):
        assert loss <= 1e-6
        assert averaged <= 1e-5
        assert counted <= 1e-5


def test_calls_that_would_not_be_exact_are_refused_on_every_rank() -> None:
    ranks = run_gloo(2, refused_calls)
    assert ranks[0] == ranks[1]
    expected = {
        "other rows": "ranks disagree on rows: got '(1, 75) torch.int64",
        "other length": "ranks disagree on rows: got '(1, 75) torch.int64",
        "other labels": "the same on every rank of a sequence: ranks disagree on labels",
        "other documents": "ranks disagree on mask: got 'Causal() & Documents(1 of 75",
        "one rank's own mistake": "rank 1: position_ids: got 6 at token 5 of row 0, expected 5, counting from 0 in",
        "dropout": "attention_dropout: got 0.1 in training, expected 0",
        "cache": "past_key_values: got a DynamicCache, expected none; generate without the handle",
        "attentions": "output_attentions: got True, expected none",
        "routers": "output_router_logits: got True, expected False",
        "kept logits": "logits_to_keep: got 1, expected none; take them from handle.plan.unshard",
        "plan": "seqpar_plan: got a object, expected none; the handle makes the plans",
        "4-D mask": "attention_mask: got (1, 1, 75, 75), expected [1, 75]",
        "weights in the mask": "attention_mask: got other values than 0 and 1",
        "holes": "attention_mask: got padding between tokens of a row, expected it on the left or right",
        "labels at padding": "labels: got some at padding, expected -100 wherever attention_mask is 0",
        "positions": "position_ids: got 6 at token 5 of row 0, expected 5",
        "positions of a rank": "position_ids: got (1, 40), expected [1, 75]",
        "falling bounds": "cu_seq_lens_q: got [0, 40, 20] ... [75] for 1 rows of 75 tokens, expected one row and",
        "used cache": "use_cache: got True, expected none; a cache would be of one rank's tokens",
        "bounds": "cu_seq_lens_q: got [0, 9] ... [9] for 1 rows of 75 tokens, expected one row and rising bounds",
        "other bounds": "and cu_seq_lens_k equal to it; flatten the batch",
        "bounds of keys": "cu_seq_lens_k: got it alone, expected cu_seq_lens_q with it",
        "bounds and positions": "position_ids: got 9 at token 9 of row 0, expected 0",
        "unknown": "token_type_ids: got a tensor of shape (1, 75) for rows of 75 tokens, expected none but input_ids",
        "shifted alone": "shift_labels: got them without labels, expected both",
        "neither": "input_ids and inputs_embeds: got None and None, expected one of",
        "both": "input_ids and inputs_embeds: got (1, 75) and (1, 75, 48), expected one of",
        "short": "length: got 1 tokens for 2 ranks, expected at least one each",
    }
    assert expected.keys() == wrong_calls(0).keys()
    for name, text in expected.items():
        assert text in ranks[0].get(name, "nothing"), name


@pytest.mark.parametrize(
    ("attention", "model", "options", "expected"),
    [
        pytest.param("sdpa", {}, {}, "got attn_implementation='sdpa', expected 'seqpar'; load it with", id="attention"),
        pytest.param("seqpar", {}, {"kernel": "reference"}, "kernel: got 'reference', expected 'auto'", id="kernel"),
        pytest.param(
            "seqpar",
            {"kind": "MistralConfig", "sliding_window": WINDOW},
            {"mask": "window", "window": 8},
            "mask: got window 8 for layer 0 of a model with sliding_window=9, expected causal",
            id="another window",
        ),
        pytest.param(
            "seqpar",
            {"kind": "MistralConfig", "sliding_window": WINDOW},
            {"mask": "s2", "s2_stride": 2},
            "mask: got s2 for layer 0 of a model with sliding_window=9, expected causal",
            id="another mask",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(attention: str, model: dict, options: dict, expected: str) -> None:
    made = llama(attention, **model)
    with pytest.raises(ValueError, match=re.escape(expected)):
        huggingface.parallelize(made, None, AttentionOptions(**options))
    assert not made._forward_pre_hooks


def test_other_models_and_second_handles_are_refused() -> None:
    with pytest.raises(ValueError, match="model: got Linear, expected a transformers model"):
        huggingface.parallelize(nn.Linear(2, 2), None)
    model = llama("seqpar")
    calls = huggingface.parallelize(model, None)
    with pytest.raises(ValueError, match="parallelized already; call remove"):
        huggingface.parallelize(model, None)
    with pytest.raises(ValueError, match="got 9 arguments without a name, expected keywords"):
        model(*[None] * 9)
    calls.remove()
    huggingface.parallelize(model, None).remove()


def test_a_model_with_a_loss_of_its_own_is_refused() -> None:
    rows = rows_of(0)
    given = {"input_ids": rows.tokens, "labels": rows.labels}
    model = llama("seqpar")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    calls = huggingface.parallelize(model, None)
    with pytest.raises(ValueError, match="labels: got a model whose loss is <lambda>, expected ForCausalLMLoss"):
        model(**given)
    calls.remove()
    assert model.loss_function.__name__ == "<lambda>"

    class Inline(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **others: Any) -> Any:
            return super().forward(input_ids=input_ids, position_ids=position_ids, **others)

    inline = Inline(llama("seqpar").config)
    huggingface.parallelize(inline, None)
    with pytest.raises(ValueError, match="got a model that called its loss_function 0 times, expected once"):
        inline(**given)


def test_layers_may_be_sparse_or_dense() -> None:
    """The options' masks by layer reach the layers: sparse ones give other logits than dense ones."""
    rows, model = rows_of(2), llama("seqpar")
    options = AttentionOptions(mask="s2", s2_block=16, s2_local=1, s2_stride=2, s2_dense_layers=(1,))
    calls = huggingface.parallelize(model, None, options)
    given = {"input_ids": rows.tokens, "position_ids": rows.positions}
    with torch.no_grad():
        sparse = model(**given).logits
    assert [type(plan.mask.terms[0]) for plan in calls.plans] == [seqpar.SparselySharded, seqpar.Causal]
    plans = calls.plans
    calls.remove()
    with torch.no_grad():
        by_hand = model(**given, use_cache=False, seqpar_plan=plans).logits
    assert torch.equal(sparse, by_hand)


def test_a_trainer_on_two_ranks_has_the_losses_of_one(tmp_path: Path) -> None:
    """The example, with packed documents and gradient accumulation."""

    def train(ranks: int) -> torch.Tensor:
        printed = run_example("huggingface_trainer.py", ranks, tmp_path, "--steps", 10)
        return torch.tensor([float(x) for x in re.findall(r"^step \d+ loss (\S+)$", printed, re.MULTILINE)])

    with ThreadPoolExecutor() as both:
        losses = list(both.map(train, (1, 2)))
    assert [len(x) for x in losses] == [10, 10]
    assert losses[0][0] - losses[0][-1] > 0.5
    assert ((losses[1] - losses[0]).abs() <= 1e-4 * losses[0]).all()
