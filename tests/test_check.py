"""`seqpar check`: what agrees passes, each kind of fault is found where it is, and wrong input gets one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

import seqpar
from seqpar.comm import run_loopback
from seqpar.launch import check
from seqpar.launch.check_config import LAYOUTS, SCHEDULES, CheckConfig
from seqpar.launch.check_findings import BOUNDS, Difference, Findings, LayerFinding
from seqpar.launch.check_input import read_batch, read_model
from seqpar.launch.cli import main, parse_check
from seqpar.layouts import LAYOUT_NAMES
from seqpar.schedules import resolve_schedule
from support import jobs_check
from support.jobs_check import DOCUMENTS, SHAPE, SHAPES, checked, model_of
from support.train import COMMAND, Finished, Run, once, run_command, write_texts

# A server as support.train's, whose ranks check. One that is told to go astray gives the unsharded side other weights.
_SERVER = """
import sys; sys.path.pop(0); sys.path.append(sys.argv[1])
import torch, transformers.models.llama.modeling_llama, seqpar.launch.check as check
import seqpar.launch.cli as cli, support.jobs_check as faults, support.train

def parse(options):
    if "astray" in options:
        options.remove("astray")
        own = check.with_own_attention
        def astray(model):
            faults.other_weight(model)
            return own(model)
        check.with_own_attention = astray
    return cli.parse_check(options)

cli.parse_train = parse
support.train._server()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest's workers: models and texts, made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "check"
    with once(folder / "made") as first:
        if first:
            for kind, shape in SHAPES.items():
                shape().save_pretrained(folder / kind)
            model_of("llama").save_pretrained(folder / "weights")
            _save_tokenizer(folder / "weights")
            LlamaConfig(**{**SHAPE, "vocab_size": 5}).save_pretrained(folder / "small")
            _save_tokenizer(folder / "small")
            LlamaConfig(**SHAPE, attention_dropout=0.1).save_pretrained(folder / "dropout")
            Gemma2Config(**SHAPE).save_pretrained(folder / "softcap")
            LlamaConfig(**{**SHAPE, "vocab_size": 50}).save_pretrained(folder / "few tokens")
            T5Config(vocab_size=300).save_pretrained(folder / "encoder")
            (folder / "broken").mkdir()
            (folder / "broken" / "config.json").write_text("{")
            (folder / "nothing").mkdir()
            (folder / "latin.txt").write_bytes("é".encode("latin-1") * 999)
            (folder / "letters.txt").write_text("ab" * 50)
            (folder / "short.txt").write_text("short")
            (folder / "long.txt").write_text("A text of words, and some of them — few — beyond ASCII. " * 9)
    return folder


def _save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 4, "b": 5}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def _find(world: int, kind: str, fault: Any = None, **options: Any) -> Findings:
    findings, *others = run_loopback(world, partial(checked, **options), model_of(kind), fault)
    assert others == [None] * (world - 1)
    assert findings is not None
    return findings


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", list(SHAPES))
def test_models_agree(kind: str, world: int) -> None:
    findings = _find(world, kind)
    assert findings.passed
    assert findings.first is None
    assert findings.worst < 2e-5
    assert findings.loss_difference < 1e-6
    assert len(findings.layers) == 3
    assert all(layer.attention is not None and layer.gradient is not None for layer in findings.layers)
    assert set(findings.gradients) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert findings.about["unsharded_attention"] == ("eager" if kind == "gpt-oss" else "sdpa")


@pytest.mark.parametrize(
    ("schedule", "layout"), [("allgather", "contiguous"), ("ulysses", "whole_documents"), ("auto", "auto")]
)
def test_any_schedule_and_layout_agrees(schedule: str, layout: str) -> None:
    documents = DOCUMENTS[:1] * 2 if layout == "whole_documents" else DOCUMENTS
    findings = _find(3, "mistral", schedule=schedule, layout=layout, documents=documents)
    assert findings.worst < 2e-5
    assert (findings.about["schedule"], findings.about["layout"]) == (schedule, layout)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 3e-7), (torch.bfloat16, 5e-2)])
def test_bounds_follow_the_precision(dtype: torch.dtype, bound: float) -> None:
    (findings,) = run_loopback(1, partial(checked, dtype=dtype), model_of("llama").to(dtype))
    assert findings is not None
    assert findings.passed
    assert findings.worst < bound
    assert findings.bounds == BOUNDS[dtype]


FAULTS = {
    "other_scaling": "layer 1 is the first that differs, in its attention: by ",
    "other_weight": "layer 1 is the first that differs, in what comes after its attention: by ",
    "nan_weight": "layer 2 is the first that differs, in what comes after its attention: by nan",
    "other_embedding": "what goes into layer 0 differs, by 1.00e-02, expected at most 1e-04",
    "other_head": "every layer's output agrees, but not the logits: they differ by ",
    "other_gradient": "layer 0 is the first on the way back that differs, in mlp.down_proj.weight: by 1.00e-02",
    "lost_head_gradient": "all outputs agree, but not the gradient of lm_head.weight: it differs by 1.00e+00, expected",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_where_it_is(name: str) -> None:
    findings = _find(2, "llama", getattr(jobs_check, name))
    assert not findings.passed
    assert FAULTS[name] in str(findings.first)
    assert "FAILED" in findings.table()
    assert "*" in findings.table()


def test_a_layer_that_looks_at_other_tokens_past_its_attention_is_found() -> None:
    """The same model on both sides, which is no good for sharding."""
    for world in (1, 2):  # on one rank it sees into the document before
        findings = _find(world, "llama", jobs_check.mixing_layer, both=True)
        assert str(findings.first).startswith("layer 1 is the first that differs, in what comes after its attention")


def test_layers_with_different_masks_hold_the_same_tokens() -> None:
    assert _find(2, "gpt-oss", layout="balanced").worst < 2e-5


def test_a_model_whose_layers_are_not_known_is_refused() -> None:
    model = model_of("llama")
    model._no_split_modules = []
    with pytest.raises(ValueError, match="got 0 modules that transformers calls its layers, expected 3, as its config"):
        run_loopback(2, checked, model)


def test_masks_that_are_not_the_model_s_are_refused() -> None:
    with pytest.raises(ValueError, match="got a layer with sliding_window=9 and a plan of"):
        _find(2, "mistral", masks=[seqpar.Causal()] * 3)


def test_an_unsharded_side_with_seqpar_s_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_check, "with_own_attention", lambda model: model)
    with pytest.raises(ValueError, match="unsharded: got a model with seqpar's attention, expected another"):
        _find(1, "llama")


def _findings(**changed: Any) -> Findings:
    layer = LayerFinding(attention=1e-7, output=2e-7, gradient=3e-7, gradient_of="w")
    plain: dict[str, Any] = {"input": 0.0, "layers": [layer] * 2, "logits": 1e-7, "loss": 2.0, "reference_loss": 2.0}
    return Findings(**{**plain, "gradients": {}, "bounds": BOUNDS[torch.float32], "dtype": "float32", **changed})


def test_findings_as_text_and_json() -> None:
    good = _findings()
    assert good.passed
    assert good.table().splitlines()[-1].startswith("passed: differs by 3.00e-07 at most (bounds 1e-04")
    without = LayerFinding(attention=None, output=0.1, gradient=None, gradient_of=None)
    bad = _findings(layers=[without], gradients={"head": math.nan})
    assert str(bad.first).startswith("layer 0 is the first that differs, and has no attention: by 1.00e-01")
    assert "layer 0                             1.0e-01*" in bad.table()
    told = json.loads(bad.as_json())
    assert (told["passed"], told["first_difference"]) == (False, bad.first)
    assert (told["layers"][0]["attention"], told["gradients"]) == (None, {"head": None})
    assert "but not the loss" in str(_findings(loss=2.001).first)
    assert not _findings(loss=math.nan).passed


def test_a_difference_adds_up_over_parts() -> None:
    got, expected = torch.tensor([3.0, 4.5, 1.0]), torch.tensor([3.0, 4.0, 0.0])
    difference = Difference()
    for part in (slice(0, 2), slice(2, 3)):
        difference.add(got[part], expected[part])
    assert difference.relative() == pytest.approx(float((got - expected).norm() / expected.norm()))
    assert difference.relative(least=10.0) == pytest.approx(float((got - expected).norm() / 10))
    assert Difference().relative() == 0
    assert Difference(of=1.0).relative() == math.inf
    assert math.isnan(Difference(of=math.nan, expected=1.0).relative())


def test_rows_hold_documents_of_very_different_lengths(folder: Path) -> None:
    source, _ = read_model(folder / "few tokens", lambda line: None)
    config = CheckConfig(model=folder / "few tokens", text=folder / "long.txt", batch_size=4, seq_len=100)
    batch = read_batch(config, source, ranks=3)
    assert batch.tokens.shape == (4, 100)
    assert 5 < int(batch.tokens.max()) < 50
    lengths = [document.shape[1] for document in batch.documents()]
    assert sum(lengths) == 400
    assert len(lengths) > 8
    assert min(lengths) < 10
    assert max(lengths) >= 50
    assert read_batch(config, source, ranks=1).cu_seqlens == batch.cu_seqlens
    assert read_batch(CheckConfig(**{**vars(config), "seed": 1}), source, ranks=1).cu_seqlens != batch.cu_seqlens
    alike = read_batch(CheckConfig(**{**vars(config), "layout": "document_zigzag"}), source, ranks=1)
    assert alike.cu_seqlens == batch.cu_seqlens[:1] * 4
    whole = read_batch(CheckConfig(**{**vars(config), "no_documents": True}), source, ranks=1)
    assert whole.cu_seqlens == [[0, 100]] * 4


def _command(capfd: pytest.CaptureFixture[str], *options: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["check", "--threads", "1", *map(str, options)])
    return code, *capfd.readouterr()


def test_the_command_alone_and_a_fault_s_exit_code(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = _command(capfd, folder / "mistral")
    assert code == 0
    assert "passed: differs by " in out
    assert "tokens are bytes: the folder has no tokenizer" in err
    assert "on 1 rank of cpu, fp32, with random weights of --seed 0: the folder has none" in err
    assert "windows of" not in err
    own = check.with_own_attention

    def wrong(model: PreTrainedModel) -> PreTrainedModel:
        jobs_check.other_weight(model)
        return own(model)

    monkeypatch.setattr(check, "with_own_attention", wrong)
    code, out, err = _command(capfd, folder / "weights", "--seq-len", 70, "--json")
    assert code == 1
    told = json.loads(out)
    assert (told["passed"], told["seq_len"]) == (False, 70)
    last = err.splitlines()[-1]
    assert last == f"seqpar check: {told['first_difference']}; --dtype fp64 tells a fault from rounding"
    assert last.startswith("seqpar check: layer 1 is the first that differs, in what comes after its attention: by ")


def test_weights_and_tokenizer_of_the_folder_are_used(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    losses = {}
    for options in ((), ("--seed", 5), ("--dtype", "fp64")):
        code, out, err = _command(capfd, folder / "weights", "--text", folder / "long.txt", "--json", *options)
        assert code == 0
        assert "bytes" not in err
        assert "random" not in err
        losses[options] = json.loads(out)["loss"]
    (plain, documents, fine) = losses.values()
    assert plain == pytest.approx(fine, rel=1e-5)
    assert plain != documents, "other documents"


def test_routed_experts_are_checked_in_fp64(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _command(capfd, folder / "gpt-oss", "--dtype", "fp64")
    assert code == 0
    assert "bounds 1e-06, loss 1e-06, float64" in out


def test_a_window_that_cuts_nothing_is_mentioned(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = _command(capfd, folder / "mistral", "--seq-len", jobs_check.WINDOW)
    assert code == 0
    assert f"windows of {jobs_check.WINDOW} tokens leave nothing out: the longest document has " in err


@pytest.mark.parametrize("mask", [("s2", "--s2-block", 16, "--s2-local", 1), ("window", "--window", 7)])
def test_a_run_is_checked_under_its_own_mask(
    mask: Sequence[object], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_texts(tmp_path / "data", documents=4), tmp_path / "run"
    small = ["--seq-len", 64, "--steps", 2, "--batch-size", 1, "--sample-tokens", 0, "--eval-every", 0, "--threads", 1]
    train = ["train", "--preset", "tiny", "--data", data, "--out", out, "--mask", *mask, *small]
    assert main([str(argument) for argument in train]) == 0
    code, text, err = _command(capfd, "--model", out)
    assert code == 0, err
    assert "passed" in text
    monkeypatch.setattr("seqpar.launch.check_steps.seen_pairs", lambda run, shape, length: [None] * 2)
    code, text, err = _command(capfd, out)
    assert code == 1
    assert "layer 0 is the first that differs, in its attention" in err


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict[str, Finished]:
    """Runs of several ranks."""

    def run(model: str, *options: object, ranks: int = 2, **by_rank: Sequence[object]) -> Run:
        others = {int(rank[4:]): given for rank, given in by_rank.items()}
        common = (folder / model, "--threads", 1, "--timeout", 60)
        return Run(ranks=ranks, options=[*common, *options], by_rank=others)

    wanted = {
        "3": run("gpt-oss", "--json", ranks=3),
        "astray": run("llama", rank0=["astray"]),
        "softcap": run("softcap"),
        "dropout": run("dropout"),
        "seed": run("llama", rank1=["--seed", 5]),
        "text": run("llama", "--seq-len", 50, rank1=["--text", folder / "long.txt"]),
        "short rows": run("llama", "--seq-len", 2, ranks=3),
    }
    base = folder / "server"
    with once(base) as first:
        if first:
            jobs = [{**vars(each), "options": [*map(str, each.options)]} for each in wanted.values()]
            command = [sys.executable, "-c", _SERVER, Path(__file__).parent, base]
            subprocess.run(command, input=json.dumps(jobs, default=str), text=True, timeout=240, check=True)
    return {
        name: Finished(json.loads((base / f"{number}.codes").read_text()), (base / f"{number}.output").read_text())
        for number, name in enumerate(wanted)
    }


def test_three_processes_agree(finished: dict[str, Finished]) -> None:
    run = finished["3"]
    assert run.codes == [0, 0, 0], run.output
    (line,) = (line for line in run.output.splitlines() if line.startswith("{"))
    told = json.loads(line)
    assert told["passed"]
    assert (told["ranks"], told["unsharded_attention"], told["documents"]) == (3, "eager", told["documents"])
    assert max(layer["gradient"] for layer in told["layers"]) < 2e-5


def test_every_rank_ends_with_the_verdict_and_one_says_it(finished: dict[str, Finished]) -> None:
    run = finished["astray"]
    assert run.codes == [1, 1], run.output
    assert run.output.count("layer 1 is the first that differs, in what comes after its attention: by ") == 1
    assert "Traceback" not in run.output


REFUSALS = {
    "softcap": "seqpar attention got softcap=50.0; expected none",
    "dropout": "seqpar attention got dropout=0.1; expected none: set attention_dropout=0 in the model's config",
    "seed": "options and data: ranks disagree on seed: got 0 on rank 0, 5 on rank 1; expected the same",
    "text": "options and data: ranks disagree on text: got ",
    "short rows": "--seq-len is 2 for 3 ranks; expected a token for each: use a larger one, or fewer ranks",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_refused_on_every_rank(name: str, finished: dict[str, Finished]) -> None:
    run = finished[name]
    assert set(run.codes) == {2}, run.output
    for rank in range(len(run.codes)):
        assert f"seqpar check: rank {rank}: error: {REFUSALS[name]}" in run.output
    assert "Traceback" not in run.output


# A folder, options, and what the line says.
CASES = {
    "no model": ("nothing", "", "--model {0}/nothing holds no config.json, and is no run; name the folder of"),
    "broken config": ("broken", "", "--model {0}/broken has a config that can't be read ("),
    "no causal model": ("encoder", "", "--model {0}/encoder can't be run with seqpar's attention (Unrecognized"),
    "unknown option": ("llama", "--sequence-length 5", "unknown option --sequence-length; did you mean --seq-len?"),
    "two models": ("llama", "{0}/mistral", "Unrecognized options: {0}/mistral"),
    "positions": ("llama", "--seq-len 129", "--seq-len is 129; expected 128 at most, for the model has that many"),
    "one token": ("llama", "--seq-len 1", "--seq-len is 1; expected 2 or more"),
    "no rows": ("llama", "--batch-size 0", "--batch-size is 0; expected 1 or more"),
    "no ranks": ("llama", "--nproc 0", "--nproc is 0; expected 1 or more"),
    "no threads": ("llama", "--threads 0", "--threads is 0; expected 1 or more"),
    "endless timeout": ("llama", "--timeout inf", "--timeout is inf; expected a positive number"),
    "negative seed": ("llama", "--seed=-1", "--seed is -1; expected 0 or more"),
    "unknown schedule": ("llama", "--schedule tree", "--schedule", "'tree'", "ring"),
    "unknown dtype": ("llama", "--dtype fp16", "--dtype", "'fp16'", "fp64"),
    "no text": ("llama", "--text {0}", "--text {0} is no file; name a file of UTF-8 text"),
    "undecodable text": ("llama", "--text {0}/latin.txt", "--text {0}/latin.txt is not UTF-8; expected text: convert"),
    "short text": ("llama", "--text {0}/short.txt", "{0}/short.txt holds 7 tokens; expected 256 or more", "add text"),
    "no embedding": ("small", "--seq-len 9 --text {0}/letters.txt", "makes token 5 of the text, and embeddings of 5"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong(case: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, options, *expected = CASES[case]
    assert main(["check", str(folder / name), *options.format(folder).split()]) == 2
    out, err = capfd.readouterr()
    *_, line = err.splitlines()
    assert line.startswith("seqpar check: error: ")
    for part in expected:
        assert part.format(folder) in line
    assert "Traceback" not in err
    assert out == ""


def test_the_model_needs_no_name(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = folder / "llama"
    expected = CheckConfig(model=model, nproc=2, json=True)
    for given in ("{} --nproc 2 --json", "--nproc 2 --json {}", "--json {} --nproc=2", "--nproc 2 --json --model {}"):
        assert parse_check(given.format(model).split()) == expected
    assert main(["check"]) == 2
    assert "Missing from seqpar check: --model PATH" in capfd.readouterr().err


def test_every_choice_is_one_of_seqpar_s() -> None:
    for schedule in SCHEDULES:
        resolve_schedule(schedule)
    assert set(LAYOUTS) == {*LAYOUT_NAMES, "auto"}


def test_help_names_every_option(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", "--help"])
    assert stop.value.code == 0
    listed = capfd.readouterr().out
    for name in CheckConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in listed
    assert main(["--help"]) == 0
    assert "  check     " in capfd.readouterr().out


def test_the_launcher_starts_the_ranks(folder: Path, tmp_path: Path) -> None:
    run = run_command("check", folder / "mistral", "--nproc", 2, "--threads", 1, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("passed: differs by ")
    assert "2 rows of 128 tokens" in run.stderr


def test_torchrun_starts_the_ranks(folder: Path, tmp_path: Path) -> None:
    torchrun = Path(sysconfig.get_path("scripts"), "torchrun")
    launch = [torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", 2]
    command = [*launch, "--no-python", COMMAND, "check", folder / "llama", "--json"]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["ranks"] == 2
