"""`seqpar generate`: on any number of ranks the text of plain Hugging Face; and what a run leaves of its model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import seqpar
from seqpar.integrations import huggingface
from seqpar.launch.cli import main
from seqpar.launch.loading import fingerprint, load_model, read_source
from support.train import COMMAND, SMALL, Finished, Run, once, run_command, write_texts

PROMPTS = ("x", "What the rain said, and to whom; once more, with å and 語.", "Two words")
VOCABULARY, EMBEDDINGS = 258, 264
"""Bytes and two special tokens, and what the model has room for."""
TOKENS = 24

# A server as support.train's, whose ranks generate. One that is told to go astray draws other numbers than it should.
_SERVER = """
import sys; sys.path.pop(0); sys.path.append(sys.argv[1])
import torch, transformers.models.llama.modeling_llama, seqpar.launch.generate
import seqpar.launch.cli as cli, support.train

def parse(options):
    if "astray" in options:
        options.remove("astray")
        seed = torch.manual_seed
        torch.manual_seed = lambda number: seed(number + 1)
    return cli.parse_generate(options)

cli.parse_train = parse
support.train._server()
"""


def fork_ranks(runs: Sequence[Run], folder: Path) -> list[Finished]:
    """As support.train's, of `seqpar generate`."""
    jobs = [{**vars(run), "options": [*map(str, run.options)]} for run in runs]
    with once(folder) as first:
        if first:
            command = [sys.executable, "-c", _SERVER, Path(__file__).parent, folder]
            subprocess.run(command, input=json.dumps(jobs, default=str), text=True, timeout=240, check=True)
    return [
        Finished(json.loads((folder / f"{number}.codes").read_text()), (folder / f"{number}.output").read_text())
        for number in range(len(runs))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest's workers: models, and runs of `seqpar train`, made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "generate"
    with once(folder / "made") as first:
        if first:
            _save_model(folder / "plain", seed=0)
            _save_model(folder / "other", seed=1)
            data = write_texts(folder / "data", documents=12)
            sparse = ("--mask", "s2", "--s2-block", 16, "--s2-local", 1, "--s2-dense-layers", 0)
            _train("--data", data, "--out", folder / "s2", "--steps", 30, "--preset", "tiny", *sparse)
            _train("--data", data, "--out", folder / "tuned", "--steps", 2, "--model", folder / "plain")
    return folder


def _save_model(path: Path, seed: int) -> None:
    """A model with random weights, large enough to say different things, and a tokenizer of bytes."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = LlamaConfig(vocab_size=EMBEDDINGS, max_position_embeddings=256, eos_token_id=None, **sizes, **heads)
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    tokens = {"<s>": 0, "</s>": 1}
    tokens |= {letter: 2 + place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)


def _train(*options: object) -> None:
    small = SMALL[SMALL.index("--seq-len") :]
    assert main(["train", *small, "--eval-every", "0", "--batch-size", "1", *map(str, options)]) == 0


def _options(model: Path, *more: object, prompts: Sequence[str] = PROMPTS) -> list[object]:
    length = ("--max-new-tokens", TOKENS, "--ignore-eos")
    return ["--model", model, "--prompt", *prompts, *length, "--json", "--threads", 1, "--timeout", 60, *more]


def _generate(capfd: pytest.CaptureFixture[str], *options: object) -> dict[str, Any]:
    """The JSON that the command prints, in this process and alone."""
    capfd.readouterr()
    assert main(["generate", *map(str, options)]) == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    assert err == ""
    return json.loads(out)


def _printed(finished: Finished) -> dict[str, Any]:
    assert set(finished.codes) == {0}, finished.output
    (line,) = finished.output.splitlines()
    return json.loads(line)


def _ids(path: Path, prompt: str) -> list[int]:
    return PreTrainedTokenizerFast.from_pretrained(path)(prompt).input_ids


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """What the plain model, with PyTorch's attention, generates after each prompt alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "plain")
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    nothing = list(range(VOCABULARY, EMBEDDINGS))
    rows = []
    for prompt in PROMPTS:
        tokens = torch.tensor([_ids(folder / "plain", prompt)])
        free, bound = (
            model.generate(tokens, generation_config=GenerationConfig(suppress_tokens=suppressed, **settings))
            for suppressed in (None, nothing)
        )
        assert prompt != PROMPTS[0] or bool((free >= VOCABULARY).any()), "tokens that stand for nothing are likely"
        rows.append(bound[0, tokens.shape[1] :].tolist())
    return rows


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict[str, Finished]:
    """Runs of several ranks."""
    plain, sampled = folder / "plain", ("--temperature", 0.9, "--top-k", 40, "--top-p", 0.95, "--seed", 3)

    def run(*options: object, ranks: int = 2, model: Path = plain, **by_rank: Sequence[object]) -> Run:
        others = {int(rank[4:]): given for rank, given in by_rank.items()}
        return Run(ranks=ranks, options=_options(model, *options), by_rank=others)

    wanted = {
        "2": run(),
        "3": run("--schedule", "ring", "--layout", "contiguous", "--chunk", 17, ranks=3),
        "sampled": run(*sampled),
        "s2": run(model=folder / "s2"),
        "tuned": run(model=folder / "tuned"),
        "seed": run(rank1=["--seed", 5]),
        "prompt": run(rank1=["--prompt", "one more"]),
        "model": run(rank1=["--model", folder / "other"]),
        "file": run(rank1=["--prompt-file", folder / "nowhere"]),
        "astray": run(*sampled, rank1=["astray"]),
    }
    return dict(zip(wanted, fork_ranks(list(wanted.values()), folder / "server"), strict=True))


def test_a_batch_of_unequal_prompts_says_what_each_says_alone(
    folder: Path, expected: list[list[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    told = _generate(capfd, *_options(folder / "plain"))
    assert told["tokens"] == expected
    alone = _generate(capfd, *_options(folder / "plain", prompts=PROMPTS[1:2]))
    assert (alone["tokens"], alone["texts"]) == (told["tokens"][1:2], told["texts"][1:2])


@pytest.mark.parametrize("ranks", ["2", "3"])
def test_any_number_of_ranks_says_the_same(
    ranks: str, expected: list[list[int]], finished: dict[str, Finished]
) -> None:
    told = _printed(finished[ranks])
    assert told["tokens"] == expected
    assert told["ranks"] == int(ranks)


def test_the_figures_are_those_of_the_run(
    folder: Path, finished: dict[str, Finished], capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = _generate(capfd, *_options(folder / "plain")), _printed(finished["2"])
    for told in (one, two):
        assert told["prompt_tokens"] == [len(_ids(folder / "plain", prompt)) for prompt in PROMPTS]
        assert told["prefilled_tokens"] == sum(told["prompt_tokens"]) - len(PROMPTS)
        assert told["generated_tokens"] == [TOKENS] * len(PROMPTS)
        assert told["finished"] == ["length"] * len(PROMPTS)
        assert told["decode_tokens_per_second"] == pytest.approx(TOKENS * len(PROMPTS) / told["decode_seconds"])
        assert told["bytes_per_token"] == sum(told["decode_bytes"].values()) / (TOKENS * len(PROMPTS))
    assert one["bytes_per_token"] == 0
    assert two["bytes_per_token"] > 0
    assert two["cache_bytes"] < one["cache_bytes"]


def test_the_same_seed_draws_the_same_on_any_number_of_ranks(
    folder: Path, finished: dict[str, Finished], capfd: pytest.CaptureFixture[str]
) -> None:
    sampling = ("--temperature", 0.9, "--top-k", 40, "--top-p", 0.95, "--seed")
    one, other = (_generate(capfd, *_options(folder / "plain", *sampling, seed)) for seed in (3, 4))
    assert _printed(finished["sampled"])["tokens"] == one["tokens"]
    assert other["tokens"] != one["tokens"]


def test_tokens_that_stand_for_nothing_are_never_drawn(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = _generate(capfd, *_options(folder / "plain", "--temperature", 100))
    drawn = {token for row in told["tokens"] for token in row}
    assert len(drawn) > 40, "almost any is as likely as another"
    assert max(drawn) < VOCABULARY


def test_top_k_is_heard(folder: Path, expected: list[list[int]], capfd: pytest.CaptureFixture[str]) -> None:
    for restricted in (("--top-k", 1), ("--top-p", 1e-6)):
        told = _generate(capfd, *_options(folder / "plain", "--temperature", 2, *restricted))
        assert told["tokens"] == expected


@pytest.mark.parametrize("ignored", [False, True], ids=["heard", "ignored"])
def test_the_model_s_own_settings_close_texts_and_do_nothing_else(
    ignored: bool, folder: Path, expected: list[list[int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A text ends with its first closing token, others of the batch go on; sampling stays as it was asked for."""
    shutil.copytree(folder / "plain", tmp_path / "model")
    closing = next(token for token in expected[1][3:] if token not in expected[0])
    own = {"do_sample": True, "temperature": 9.0, "top_k": 3, "suppress_tokens": expected[0][:1], "min_new_tokens": 20}
    settings = {"eos_token_id": [closing, 1], "repetition_penalty": 5.0, "max_length": 7, **own}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    options = [option for option in _options(tmp_path / "model") if ignored or option != "--ignore-eos"]
    told = _generate(capfd, *options)
    if ignored:
        assert told["tokens"] == expected
        return
    lengths = [1 + next((i for i, token in enumerate(row) if token in (closing, 1)), TOKENS - 1) for row in expected]
    assert lengths[1] < lengths[0]
    assert told["tokens"] == [row[:length] for row, length in zip(expected, lengths, strict=True)]
    assert told["generated_tokens"] == lengths
    assert told["finished"] == ["end" if row[-1] in (closing, 1) else "length" for row in told["tokens"]]
    assert told["texts"][1].encode() == bytes_of(folder, expected[1][: lengths[1] - 1])


def bytes_of(folder: Path, tokens: Sequence[int]) -> bytes:
    """The UTF-8 text of these tokens, as the tokenizer decodes them at once."""
    return PreTrainedTokenizerFast.from_pretrained(folder / "plain").decode(tokens, skip_special_tokens=True).encode()


def test_a_run_s_folder_holds_what_its_model_takes(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "s2" / "model").iterdir()) == ["config.json", "seqpar.json"]
    held = {path.name for path in (folder / "tuned" / "model").iterdir()}
    assert held >= {"config.json", "seqpar.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((folder / "tuned" / "model" / "seqpar.json").read_text()) == {
        "tokens": "tokenizer",
        "mask": "causal",
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["s2", "tuned"])
def test_a_run_s_weights_are_those_of_its_checkpoint(name: str, folder: Path) -> None:
    huggingface.register()
    source = read_source(folder / name, report=pytest.fail)
    model = load_model(source, torch.float32, torch.device("cpu"))
    saved = {key: torch.full_like(value, torch.nan) for key, value in model.state_dict().items()}
    dcp.load({"model": saved}, checkpoint_id=source.checkpoint)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    before = fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ["s2", "tuned"])
def test_a_run_goes_on_under_its_own_mask(
    name: str, folder: Path, finished: dict[str, Finished], capfd: pytest.CaptureFixture[str]
) -> None:
    """One rank and two say what the whole sequence, computed anew for each token, says."""
    source = read_source(folder / name, report=pytest.fail)
    huggingface.register()
    model = load_model(source, torch.float32, torch.device("cpu"))
    told = _generate(capfd, *_options(folder / name))
    assert _printed(finished[name])["tokens"] == told["tokens"]
    for prompt, chosen in zip(PROMPTS, told["tokens"], strict=True):
        tokens = [*source.text.prompt(prompt), *chosen]
        assert _likeliest(model, source.masks or [], tokens, source.text.vocabulary)[-TOKENS - 1 : -1] == chosen


@torch.no_grad()
def _likeliest(model: PreTrainedModel, masks: list[seqpar.Mask], tokens: list[int], vocabulary: int) -> list[int]:
    """The likeliest token after each."""
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    plans = [seqpar.plan(mask, length=len(tokens), heads=heads) for mask in masks]
    positions = plans[0].position_ids
    logits = model(torch.tensor([tokens]), position_ids=positions, use_cache=False, seqpar_plan=plans).logits
    return logits[0, :, :vocabulary].argmax(-1).tolist()


def test_resuming_writes_the_model_again_and_a_foreign_folder_is_left_alone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "s2", tmp_path / "s2")
    shutil.rmtree(tmp_path / "s2" / "model")
    options = ["--data", folder / "data", "--out", tmp_path / "s2", "--resume", "--steps", 30, "--preset", "tiny"]
    sparse = ["--mask", "s2", "--s2-block", 16, "--s2-local", 1, "--s2-dense-layers", 0]
    _train(*options, *sparse)
    for name in ("config.json", "seqpar.json"):
        assert (tmp_path / "s2" / "model" / name).read_bytes() == (folder / "s2" / "model" / name).read_bytes()
    before = (tmp_path / "s2" / "model" / "seqpar.json").stat().st_mtime_ns
    small = SMALL[SMALL.index("--seq-len") :]
    assert main(["train", *small, "--batch-size", "1", *map(str, options)]) == 2
    assert "was made with mask s2" in capfd.readouterr().err
    assert (tmp_path / "s2" / "model" / "seqpar.json").stat().st_mtime_ns == before

    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "config.json").write_text("mine")
    assert main(["train", *small, "--data", str(folder / "data"), "--out", str(tmp_path / "out")]) == 2
    assert f"--out {tmp_path / 'out'} holds a folder model/ that is no run's" in capfd.readouterr().err
    assert (tmp_path / "out" / "model" / "config.json").read_text() == "mine"


def test_a_truncated_checkpoint_gives_way_to_the_one_before(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "tuned", tmp_path / "run")
    shutil.copytree(
        tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "run" / "checkpoints" / "step-00000004"
    )
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").write_text("{")
    assert main(["generate", *map(str, _options(tmp_path / "run", prompts=("a",)))]) == 0
    out, err = capfd.readouterr()
    assert err.startswith("seqpar generate: checkpoint ")
    assert "step-00000004 is not whole and is passed over" in err
    assert len(json.loads(out)["tokens"][0]) == TOKENS


DISAGREEMENTS = {
    "seed": "options and data: ranks disagree on seed: got 0 on rank 0, 5 on rank 1; expected the same",
    "prompt": "options and data: ranks disagree on prompts: got",
    "model": "options and data: ranks disagree on weights: got",
    "file": "rank 1: --prompt-file {0}/nowhere can't be read: No such file or directory; name a file of text",
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_were_told_different_things_all_say_so(
    name: str, folder: Path, finished: dict[str, Finished]
) -> None:
    run = finished[name]
    assert run.codes == [2, 2], run.output
    for rank in (0, 1):
        assert f"seqpar generate: rank {rank}: error: {DISAGREEMENTS[name].format(folder)}" in run.output
    assert "Traceback" not in run.output


def test_ranks_that_draw_different_tokens_say_so(finished: dict[str, Finished]) -> None:
    run = finished["astray"]
    assert run.codes == [1, 1], run.output
    assert "ranks disagree on generated tokens" in run.output
    assert "this is a bug, please report it with the command" in run.output
    assert "{" not in run.output


def test_the_launcher_streams_one_text(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    options = ["--nproc", 2, "--prompt-file", "prompt.txt", "--max-new-tokens", TOKENS, "--ignore-eos", "--threads", 1]
    (tmp_path / "prompt.txt").write_text(PROMPTS[1], encoding="utf-8")
    run = run_command("generate", "--model", folder / "plain", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.encode() == bytes_of(folder, expected[1]) + b"\n"
    prompt = len(_ids(folder / "plain", PROMPTS[1]))
    assert run.stderr.startswith(f"{prompt} prompt tokens · {TOKENS} generated · prefill ")
    assert run.stderr.count("\n") == 1


def test_torchrun_starts_the_ranks(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    torchrun = Path(sysconfig.get_path("scripts"), "torchrun")
    launch = [torchrun, "--standalone", "--nproc-per-node", 2, "--no-python", COMMAND, "generate"]
    run = subprocess.run(
        [*map(str, [*launch, *_options(folder / "plain")])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["tokens"] == expected
