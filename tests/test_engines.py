"""`seqpar train --engine`: PyTorch, DeepSpeed and Megatron-Core train the same model alike."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from seqpar.launch import train
from seqpar.launch.cli import main, parse_train
from seqpar.launch.data import Batch
from seqpar.launch.engine_megatron import packed
from seqpar.launch.engines import engine_class
from seqpar.launch.errors import RunError
from seqpar.launch.manifest import whole_checkpoints
from seqpar.launch.megatron_weights import names, to_megatron, to_transformers
from seqpar.launch.options import OptionError
from seqpar.launch.spawn import alone
from support.jobs_engines import fork_engines
from support.train import SMALL, Finished, Run, losses, metrics, once, write_texts

STEPS, BEGUN, WARMUP = 20, 12, 12
"""The rates of the first steps, of the warm-up, do not depend on how many follow."""

CPU = torch.device("cpu")
LLAMA = LlamaConfig(hidden_size=12, intermediate_size=6, num_hidden_layers=2, vocab_size=5, num_attention_heads=6)
ZERO_3 = ("--engine", "deepspeed", "--zero-stage", 3, "--checkpoint-activations", "full")
SPARSE = ("--mask", "s2", "--s2-block", 16, "--s2-local", 1, "--s2-dense-layers", 0)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the DeepSpeed engine would leave behind in this process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest's workers, so that the runs are made once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engines"


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Finished]:
    """Finished runs, each in the folder that its name begins with; those of frameworks are stopped and continued."""
    with once(folder / "texts") as first:
        if first:
            write_texts(folder / "data")

    def run(name: str, steps: int, *options: object, ranks: int = 2) -> Run:
        return Run(ranks=ranks, options=_options(folder, name.split()[0], "--steps", steps, *options))

    wanted = {"torch": run("torch", STEPS, "--sample-tokens", 4, ranks=1)}
    for name in ("deepspeed", "megatron"):
        engine = ("--engine", name, "--verify")
        wanted[name] = run(name, BEGUN, *engine)
        wanted[f"{name} continued"] = run(name, STEPS, *engine, "--resume", "--sample-tokens", 4)
    wanted["zero3"] = run("zero3", 2, *ZERO_3, "--verify")
    wanted["zero3 continued"] = run("zero3", 4, *ZERO_3, "--resume", "--sample-tokens", 2)
    engine = ("--engine", "deepspeed", "--zero-stage", 1, "--sp", 1, "--verify")
    wanted["zero1-begun"] = run("zero1-begun", 2, *engine, "--init", folder / "megatron")
    engine = ("--engine", "megatron", "--sp", 1, "--verify")
    wanted["megatron-begun"] = run("megatron-begun", 2, *engine, "--init", folder / "deepspeed")
    engine = ("--engine", "megatron", "--schedule", "ulysses", "--checkpoint-activations", "selective", "--verify")
    wanted["sparse"] = run("sparse", 1, *engine, *SPARSE)
    for name, how in (("deepspeed", "selective"), ("megatron", "full")):
        engine = ("--engine", name, "--dtype", "bf16", "--checkpoint-activations", how, "--verify")
        wanted[f"{name}-bf16"] = run(f"{name}-bf16", 1, *engine)
    return dict(zip(wanted, fork_engines(list(wanted.values()), folder / "first"), strict=True))


def _options(folder: Path, name: str, *more: object) -> list[object]:
    sizes = ("--seq-len", 131, "--warmup", WARMUP, "--save-every", 50, "--eval-every", 10, "--eval-batches", 1)
    return [*SMALL, *sizes, "--data", folder / "data", "--out", folder / name, *more]


def test_every_run_ends_well_and_quietly(runs: dict[str, Finished]) -> None:
    for name, run in runs.items():
        assert set(run.codes) == {0}, f"{name}: {run.output}"
        assert "Warning" not in run.output, f"{name}: {run.output}"
        assert "[INFO]" not in run.output, f"{name}: {run.output}"


@pytest.mark.parametrize("name", ["deepspeed", "megatron"])
def test_20_steps_stopped_and_continued_equal_those_of_one_rank(
    name: str, folder: Path, runs: dict[str, Finished]
) -> None:
    assert f"resumed after step {BEGUN}" in runs[f"{name} continued"].output
    expected, found = metrics(folder / "torch"), metrics(folder / name)
    assert [line["step"] for line in found] == [*range(1, STEPS + 1)]
    for field in ("loss", "grad_norm", "lr", "tokens"):
        assert [line[field] for line in found] == pytest.approx([line[field] for line in expected], rel=1e-4), field
    held_out = {line["step"]: line["eval_loss"] for line in found if "eval_loss" in line}
    for line in expected:
        if "eval_loss" in line:
            assert held_out[line["step"]] == pytest.approx(line["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["deepspeed", "megatron"])
def test_the_sample_is_what_one_rank_writes(name: str, runs: dict[str, Finished]) -> None:
    def sample(run: Finished) -> str:
        return run.output.split("\nsample: ")[1]

    assert sample(runs[f"{name} continued"]) == sample(runs["torch"])


def test_zero_3_gathers_what_it_has_sharded(folder: Path, runs: dict[str, Finished]) -> None:
    assert losses(folder / "zero3") == pytest.approx(losses(folder / "torch")[:4], rel=1e-4)
    assert "sample: 64 tokens of text, then [2 tokens by the model]" in runs["zero3 continued"].output


@pytest.mark.parametrize(
    "name", ["deepspeed", "megatron", "deepspeed continued", "megatron continued", "zero3", "zero1-begun",
             "megatron-begun", "sparse"],
)  # fmt: skip
def test_steps_equal_unsharded_ones(name: str, runs: dict[str, Finished]) -> None:
    verdict = re.search(r"passed: largest of 21 gradients (\S+) .*, loss (\S+) ", runs[name].output)
    assert verdict, runs[name].output
    assert float(verdict[1]) < 1e-5
    assert float(verdict[2]) < 1e-6


@pytest.mark.parametrize(("name", "sends"), [("deepspeed", 2), ("megatron", 3)])
def test_bf16_computes_in_it(name: str, sends: int, folder: Path, runs: dict[str, Finished]) -> None:
    """Keys are half as long; DeepSpeed's run recomputes all but attention and sends them twice, Megatron's all."""
    (line,) = metrics(folder / f"{name}-bf16")
    assert 1e-3 < line["verified"]["gradient_difference"] < 1e-1
    assert line["bytes_by_kind"]["kv"] == metrics(folder / name)[0]["bytes_by_kind"]["kv"] / 2 * sends / 2


def test_a_run_begins_with_weights_that_another_engine_left(folder: Path, runs: dict[str, Finished]) -> None:
    first, second = losses(folder / "zero1-begun"), losses(folder / "megatron-begun")
    assert first == pytest.approx(second, rel=1e-4)
    dense = losses(folder / "torch")
    assert abs(first[0] - dense[-1]) < 0.2 * (dense[0] - dense[-1])


def test_bytes_are_attention_s_by_any_engine(folder: Path, runs: dict[str, Finished]) -> None:
    """Keys are sent in the forward and in the backward; and once more where all of a layer is recomputed."""
    plain, again = (metrics(folder / name)[0]["bytes_by_kind"] for name in ("deepspeed", "zero3"))
    assert again == plain | {"kv": plain["kv"] * 3 // 2}
    padded = metrics(folder / "megatron")[0]["bytes_by_kind"]
    assert plain["kv"] < padded["kv"] < 1.1 * plain["kv"]
    assert padded["agree"] > 0
    assert "kv" not in metrics(folder / "megatron-begun")[0]["bytes_by_kind"]  # which shares no sequence


def test_generate_reads_every_engine_s_run(
    folder: Path, runs: dict[str, Finished], capfd: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for name in ("torch", "deepspeed", "megatron", "zero3"):
        assert main(["generate", "--model", str(folder / name), "--prompt", "ab", "--max-new-tokens", "6"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3]


@pytest.mark.parametrize(
    ("run", "options", "complaint"),
    [
        ("deepspeed", (), "was made with engine deepspeed, this run has torch"),
        ("torch", ("--engine", "megatron"), "was made with engine torch, this run has megatron"),
        ("deepspeed", ("--engine", "deepspeed"), "was made with ranks 2, this run has 1"),
        ("zero3", ("--engine", "deepspeed"), "was made with zero_stage 3, this run has 2"),
    ],
)
def test_a_checkpoint_of_other_making_is_refused(
    run: str, options: tuple[object, ...], complaint: str, folder: Path, runs: dict[str, Finished]
) -> None:
    config = parse_train([str(x) for x in _options(folder, run, "--steps", 99, "--resume", *options)])
    before = torch.get_num_threads()
    with alone() as place, pytest.raises(ValueError, match=complaint):
        train.run(config, place)
    torch.set_num_threads(before)


def test_deepspeed_makes_no_update_by_a_gradient_that_is_not_finite_and_goes_on(
    folder: Path, runs: dict[str, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step's gradient is spoiled, not its loss. Continued, the run has what its options say by then."""
    kind: Any = engine_class("deepspeed")
    backward, settings = kind.backward, []

    def spoiled(self: Any, loss: Tensor) -> None:
        settings.append([(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups])
        nothing = 0 * loss
        backward(self, loss + nothing.sqrt() if len(settings) == 3 else loss)

    engine = ("--engine", "deepspeed", "--zero-stage", 3)
    options = _options(folder, str(tmp_path / "out"), "--steps", 4, *engine, "--save-every", 1)
    complaint = r"step 3 has loss [\d.]+ and gradient norm inf, expected finite"
    before = torch.get_num_threads()
    monkeypatch.setattr(kind, "backward", spoiled)
    with alone() as place, pytest.raises(RunError, match=complaint):
        train.run(parse_train([str(x) for x in options]), place)
    monkeypatch.setattr(kind, "backward", backward)
    assert settings[1:] == [[(3e-3 * step / WARMUP, decay) for decay in (0.1, 0.0)] for step in (1, 2)]
    assert whole_checkpoints(tmp_path / "out" / "checkpoints")[0].name == "step-00000002"
    with alone() as place:
        train.run(parse_train([str(x) for x in [*options, "--resume", "--weight-decay", 20]]), place)
    torch.set_num_threads(before)
    *same, changed = zip(losses(tmp_path / "out"), losses(folder / "torch")[:4], strict=True)
    assert [ours for ours, _ in same] == pytest.approx([plain for _, plain in same], rel=1e-4)
    assert changed[0] != pytest.approx(changed[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--engine", "deepspeed", "--zero-stage", "3", "--checkpoint-activations", "selective"), "expected none or"),
        (("--zero-stage", "1"), "--zero-stage 1 got --engine torch; only --engine deepspeed has one"),
        (("--engine", "megatron", "--zero-stage", "3"), "--zero-stage 3 got --engine megatron"),
        (("--engine", "megatron", "--layout", "contiguous"), "--layout contiguous got --engine megatron"),
    ],
)
def test_options_of_another_engine_are_refused(options: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        parse_train(options)


@pytest.mark.parametrize(
    ("options", "shape", "complaint"),
    [
        ((), Qwen2Config(), "got a model of model_type qwen2, expected llama"),
        ((), LlamaConfig(attention_bias=True), "attention_bias=True, expected False"),
        ((), LlamaConfig(hidden_act="gelu"), "hidden_act=gelu, expected silu"),
        ((), LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type dynamic, expected"),
        (("--schedule", "hybrid"), LlamaConfig(), "--schedule hybrid got --engine megatron, expected one of ring"),
    ],
)
def test_what_megatron_can_not_make_is_refused(
    options: tuple[str, ...], shape: PretrainedConfig, complaint: str
) -> None:
    config = parse_train(["--engine", "megatron", *options])
    with pytest.raises(ValueError, match=complaint):
        engine_class("megatron").check(config, shape, CPU)


@pytest.mark.parametrize(("engine", "module"), [("deepspeed", "deepspeed"), ("megatron", "megatron.core")])
def test_a_missing_or_untested_framework_is_named(engine: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, kind = parse_train(["--engine", engine]), engine_class(engine)
    kind.check(config, LLAMA, CPU)
    with monkeypatch.context() as patch:
        patch.setattr("seqpar.integrations.supported.installed_version", lambda package: "0.99")
        patch.setattr(f"{module}.__version__", "0.99")
        with pytest.raises(ValueError, match=r"got version 0\.99, expected >="):
            kind.check(config, LLAMA, CPU)
    monkeypatch.delitem(sys.modules, f"seqpar.integrations.{engine}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=re.escape(f"run pip install 'seqpar[{engine}]'")):
        kind.check(config, LLAMA, CPU)


def test_weights_go_to_megatron_and_back() -> None:
    """Queries, keys and values of a group lie together there: told by numbers that say whose they are."""
    shape = LlamaConfig(**{**LLAMA.to_dict(), "num_key_value_heads": 3, "head_dim": 2})
    sizes: dict[str, Any] = {"q": 12, "k": 6, "v": 6}
    wanted = [name for parts in names(shape).values() for name in parts]
    ours = {name: torch.randn(sizes.get(name.split(".")[-2][0], 4), 12) for name in wanted}
    theirs = to_megatron(ours, shape)
    back = to_transformers(theirs, shape)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor)
    q, k, v = (ours[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    group = theirs["decoder.layers.1.self_attention.linear_qkv.weight"].unflatten(0, (3, 8))[1]
    assert torch.equal(group, torch.cat([q[4:8], k[2:4], v[2:4]]))
    tied = LlamaConfig(**{**shape.to_dict(), "tie_word_embeddings": True})
    assert names(shape).keys() - names(tied).keys() == {"output_layer.weight"}


def test_a_batch_is_packed_document_by_document() -> None:
    batch = Batch(torch.arange(1, 15).view(2, 7), [[0, 5, 7], [0, 1, 7]])
    tokens, labels, lengths, begins = packed(batch, unit=4)
    assert begins == [0, 8, 12, 16, 24]
    assert lengths == [0, 5, 7, 8, 14]
    assert tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 0, 0, 8, 0, 0, 0, 9, 10, 11, 12, 13, 14, 0, 0]
    none = -100
    assert labels.tolist() == [
        2, 3, 4, 5, none, none, none, none, 7, none, none, none,
        none, none, none, none, 10, 11, 12, 13, 14, none, none, none,
    ]  # fmt: skip
