"""Hugging Face models with seqpar's attention: the same logits and gradients as their own, and nothing dropped."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqpar
from seqpar.comm import World, run_loopback
from seqpar.integrations.huggingface import attention_forward, register
from support.train import SMALL, Run, fork_ranks, losses, write_texts

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'seqpar[hf]'")

LENGTH, WINDOW = 71, 9
DOCUMENTS = [[0, 13, 40, LENGTH], [0, 1, 60, LENGTH]]
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "initializer_range": 0.2,
}


def _model(kind: str) -> nn.Module:
    """A small model with random weights and PyTorch's own attention (eager where it has sinks)."""
    torch.manual_seed(3)
    if kind == "gpt-oss":
        config = transformers.GptOssConfig(
            **SHAPE,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=WINDOW,
            num_local_experts=2,
            num_experts_per_tok=2,
            attn_implementation="eager",
        )
    else:
        config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[kind](
            **SHAPE, attn_implementation="sdpa"
        )
    return transformers.AutoModelForCausalLM.from_config(config).train()


def _reference(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [B, S, V] and the gradients of their mean loss, each document alone."""
    logits = torch.empty(*tokens.shape, SHAPE["vocab_size"])
    total = torch.zeros(())
    for row, bounds in enumerate(DOCUMENTS):
        for start, end in pairwise(bounds):
            document = tokens[row : row + 1, start:end]
            local = model(document, use_cache=False).logits
            logits[row, start:end] = local[0].detach()
            total = total + F.cross_entropy(local[0, :-1], document[0, 1:], reduction="sum")
    (total / _predicted()).backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


def _predicted() -> int:
    return sum(LENGTH - (len(bounds) - 1) for bounds in DOCUMENTS)


def _sharded(world: World, model: nn.Module, tokens: Tensor, windows: tuple[int | None, ...]) -> tuple[Tensor, dict]:
    """The same from this rank's tokens: the whole logits, and this rank's part of the gradients."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("seqpar")
    plans = {}
    for window in windows:
        rule = seqpar.Causal() if window is None else seqpar.SlidingWindow(window - 1, 0)
        plans[window] = seqpar.plan(rule & seqpar.Documents(DOCUMENTS), length=LENGTH, group=world)
    plan = plans[None]
    logits = model(
        plan.shard(tokens),
        position_ids=plan.position_ids,
        use_cache=False,
        seqpar_plan=plans if len(plans) > 1 else plan,
    ).logits
    labels = plan.shift_labels(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    (loss / _predicted()).backward()
    return plan.unshard(logits.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt-oss"])
def test_logits_and_every_gradient_equal_the_model_s_own(kind: str, world: int) -> None:
    register()
    model = _model(kind)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits, gradients = _reference(copy.deepcopy(model), tokens)
    windows = (None, WINDOW) if kind == "gpt-oss" else (None,)
    ranks = run_loopback(world, _sharded, model, tokens, windows)
    for whole, _ in ranks:
        assert (whole - logits).norm() / logits.norm() < 1e-5
    for name, expected in gradients.items():
        total = sum(local[name] for _, local in ranks if local[name] is not None)
        assert (total - expected).norm() / expected.norm() < 1e-5, name


def _plan(mask: seqpar.Mask | None = None) -> Any:
    return seqpar.plan(mask or seqpar.Causal(), length=LENGTH)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"seqpar_plan": None}, "got no plan; expected one: call model(..., seqpar_", id="no plan"),
        pytest.param({"dropout": 0.1}, "got dropout=0.1; expected none: set attention_dropout=0", id="dropout"),
        pytest.param({"softcap": 30.0}, "got softcap=30.0; expected none", id="softcap"),
        pytest.param({"head_mask": torch.ones(6)}, "got head_mask=a tensor of shape (6,); expected", id="head mask"),
        pytest.param({"position_bias": torch.ones(6, 1, 1)}, "got position_bias=a tensor", id="position bias"),
        pytest.param({"output_attentions": True}, "got output_attentions=True; expected none", id="attentions"),
        pytest.param({"is_causal": False}, "got is_causal=False; expected none: say it in the plan's", id="not causal"),
        pytest.param({"cu_seq_lens_q": torch.tensor([0, 9])}, "got cu_seq_lens_q=a tensor", id="packed"),
        pytest.param({"attention_mask": torch.ones(1, 1, 9, 9)}, "got attention_mask=a tensor of shape", id="mask"),
        pytest.param(
            {"sliding_window": 8},
            "got a layer with sliding_window=8 and a plan of Causal(); expected seqpar.SlidingWindow(7, 0)",
            id="window",
        ),
        pytest.param(
            {"sliding_window": 8, "seqpar_plan": {None: None}},
            "got no plan for layers with sliding_window=8",
            id="no plan for the window",
        ),
    ],
)
def test_what_would_change_the_result_is_refused(given: dict[str, Any], expected: str) -> None:
    query, key = torch.randn(1, 6, LENGTH, 16), torch.randn(1, 2, LENGTH, 16)
    mask = given.get("attention_mask")
    options = {"seqpar_plan": _plan(), **{name: value for name, value in given.items() if name != "attention_mask"}}
    with pytest.raises(ValueError, match="seqpar attention got") as raised:
        attention_forward(nn.Module(), query, key, key, mask, **options)
    assert expected in str(raised.value)


def test_layers_with_plans_of_their_own() -> None:
    """A dense layer and a sparsely-sharded one, against the model's own attention under the same masks."""
    model = _model("llama")
    tokens = torch.arange(LENGTH)[None] % SHAPE["vocab_size"]
    sparse = seqpar.plan(seqpar.SparselySharded(16, 1, 2), length=LENGTH, heads=(6, 2))
    dense = seqpar.plan(seqpar.Causal(), length=LENGTH, heads=(6, 2))
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    heads = [(key <= query) & ((query // 16 == key // 16) | (key // 16 % 2 == head)) for head in range(2)]
    mask = torch.stack(heads).repeat_interleave(3, 0)[None]
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "attention_mask": mask}), with_kwargs=True
    )
    expected = model(tokens).logits
    register()
    model.model.layers[1]._forward_pre_hooks.clear()
    model.set_attn_implementation("seqpar")
    ids = dense.position_ids
    got = model(tokens, position_ids=ids, use_cache=False, seqpar_plan=[dense, sparse]).logits
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    other = model(tokens, position_ids=ids, use_cache=False, seqpar_plan=[dense, dense]).logits
    assert (other - expected).norm() > 1e-3 * expected.norm()
    with pytest.raises(ValueError, match="got 3 plans for a model of 2 layers, expected one for each layer"):
        model(tokens, position_ids=ids, use_cache=False, seqpar_plan=[dense] * 3)


def test_layers_whose_tokens_are_held_otherwise_are_refused() -> None:
    register()
    model = _model("llama")
    model.set_attn_implementation("seqpar")
    tokens = torch.arange(LENGTH)[None] % SHAPE["vocab_size"]

    def job(world: World) -> str:
        plans = [seqpar.plan(seqpar.Causal(), length=LENGTH, group=world, layout=x) for x in ("zigzag", "contiguous")]
        with pytest.raises(ValueError, match=r"expected one layout: give the others layout=first\.layout") as caught:
            model(plans[0].shard(tokens), position_ids=plans[0].position_ids, use_cache=False, seqpar_plan=plans)
        return str(caught.value)

    assert len(set(run_loopback(2, job))) == 1


def test_a_window_of_the_plan_or_longer_than_it_is_accepted() -> None:
    query, key = torch.randn(1, 6, LENGTH, 16), torch.randn(1, 2, LENGTH, 16)
    window = seqpar.SlidingWindow(7, 0)
    for plan, size in ((_plan(window), 8), (_plan(seqpar.Causal() & window), 8), (_plan(), LENGTH)):
        out, weights = attention_forward(nn.Module(), query, key, key, None, seqpar_plan=plan, sliding_window=size)
        assert out.shape == (1, LENGTH, 6, 16)
        assert weights is None


@pytest.mark.parametrize(
    ("config", "positions", "expected"),
    [
        pytest.param({}, False, "got other position_ids than the plan's", id="positions of one rank"),
        pytest.param(
            {"rope_parameters": {"rope_type": "dynamic"}}, True, "got a model with rope_type dynamic", id="rope"
        ),
        pytest.param({"layer_types": ["conv", "full_attention"]}, True, "got a model with conv layers", id="layers"),
    ],
)
def test_models_that_would_take_a_rank_for_the_whole_are_refused_on_every_rank(
    config: dict[str, Any], positions: bool, expected: str
) -> None:
    def job(world: World) -> str:
        plan = seqpar.plan(seqpar.Causal(), length=LENGTH, group=world, layout="contiguous")
        count = len(plan.queries)
        query, key = torch.randn(1, 6, count, 16), torch.randn(1, 2, count, 16)
        layer = nn.Module()
        layer.config, layer.layer_idx = SimpleNamespace(**config), 0
        given = plan.position_ids if positions else torch.arange(count)[None]
        with pytest.raises(ValueError, match="seqpar attention got") as raised:
            attention_forward(layer, query, key, key, None, seqpar_plan=plan, position_ids=given)
        return str(raised.value)

    messages = run_loopback(2, job)
    assert messages[0] == messages[1]
    assert expected in messages[0]


def test_a_padding_mask_is_refused_by_the_whole_model() -> None:
    register()
    model = _model("llama")
    model.set_attn_implementation("seqpar")
    tokens = torch.ones(1, LENGTH, dtype=torch.long)
    with pytest.raises(ValueError, match="got attention_mask=a tensor of shape"):
        model(tokens, attention_mask=torch.ones(1, LENGTH), use_cache=False, seqpar_plan=_plan())


def test_a_saved_checkpoint_with_its_tokenizer_trains(tmp_path: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    data = write_texts(tmp_path / "data")
    tokenizer = Tokenizer(BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=ByteLevel.alphabet())
    tokenizer.train([str(path) for path in data.iterdir()], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.save_pretrained(tmp_path / "model")
    shape = transformers.Qwen3Config(**{**SHAPE, "vocab_size": 304}, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "model")

    options = [
        *SMALL[2:],  # without the preset
        "--data",
        data,
        "--model",
        tmp_path / "model",
        "--out",
        tmp_path / "out",
        "--steps",
        3,
        "--verify",
    ]
    (run,) = fork_ranks([Run(ranks=2, options=[*options, "--sample-tokens", 5])], tmp_path / "server")
    assert run.codes == [0, 0], run.output
    assert "sample: 64 tokens of text, then [5 tokens by the model]" in run.output
    assert len(losses(tmp_path / "out")) == 3
