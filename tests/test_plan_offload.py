"""`seqpar plan-offload`: its formulas against figures by hand, its advice, its refusals, and its page in the docs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.launch import offload_costs as costs
from seqpar.launch.cli import main
from seqpar.launch.offload_costs import Pool, Setup, Shape, Step
from seqpar.launch.offload_devices import DEVICES, MODELS, figures_of
from seqpar.launch.offload_report import binding
from seqpar.launch.plan_offload import PlanOffloadConfig, plan

DOCS = Path(__file__).parents[1] / "docs" / "offload_costs.md"
SHAPE = Shape(layers=2, heads=8, kv_heads=2, head_dim=10, parameters=1000)


def setup(**changes: Any) -> Setup:
    """Round numbers: 4,000 bytes of K and V per sequence of 25 tokens."""
    model = Pool(count=2, flops=1e4, memory=1e4, bandwidth=1e3, price=3.0)
    workers = Pool(count=2, flops=1e6, memory=4e3, bandwidth=2e3, price=1.0)
    whole: dict[str, Any] = {
        "shape": SHAPE,
        "context": 25,
        "size": 2,
        "model": model,
        "workers": workers,
        "link": 80.0,
        "latency": 0.25,
        "header": 0,
    }
    return Setup(**{**whole, **changes})


@pytest.mark.parametrize(
    ("model", "batch", "segments", "expected"),
    [
        ("llama-3-8b", 1, 1, 20_480),
        ("llama-3-70b", 1, 1, 36_864),
        ("llama-3-8b", 64, 1, 1_310_720),
        ("llama-65b", 1, 1, 65_536),
        # 2*3*(2*4*4096 + 2*1024) and 4*4*3*32 of log-sum-exps.
        ("llama-3-8b", 3, 4, 210_432),
    ],
)
def test_bytes_on_the_wire(model: str, batch: int, segments: int, expected: int) -> None:
    assert costs.wire_bytes(MODELS[model], batch, 2, segments) == expected
    there = costs.sent_bytes(MODELS[model], batch, 2, segments)
    assert there + costs.returned_bytes(MODELS[model], batch, 2, segments) == expected
    assert costs.wire_bytes(MODELS[model], batch, 4) == 2 * costs.wire_bytes(MODELS[model], batch, 2)


@pytest.mark.parametrize(
    ("devices", "workers", "segments", "expected"),
    [(1, 1, 1, 3), (1, 4, 1, 12), (2, 1, 1, 6), (1, 4, 2, 12), (1, 4, 4, 12), (2, 4, 4, 24)],
)
def test_frames_of_every_pair(devices: int, workers: int, segments: int, expected: int) -> None:
    """q, o, and k with v for each pair of a device and a worker that share heads."""
    usual = setup()
    model = dataclasses.replace(usual.model, count=devices)
    made = setup(
        model=model,
        workers=dataclasses.replace(usual.workers, count=workers),
        segments=segments,
        header=72,
        shape=dataclasses.replace(SHAPE, kv_heads=4),
    )
    assert made.headers == 72 * expected
    assert made.moved(0) == made.headers


def test_seconds_by_hand() -> None:
    step = costs.step_of(setup(), 4)
    # Weights: 2,000 bytes at 2 x 1,000/s; FLOP: 8,000 at 2 x 10,000/s.
    assert step.model == pytest.approx(1.0)
    # 4 sequences of 4,000 bytes, half of them on each worker, at 2,000/s.
    assert step.attention == pytest.approx(4.0)
    # 2 layers of 2*4*(2*80 + 2*20) bytes over two links of 80/s; q, k and v are 960 of them, o 640.
    assert step.transfer == pytest.approx(20.0)
    assert step.busy == pytest.approx(12.0)
    assert step.latency == pytest.approx(1.0)
    assert step.sequence == pytest.approx(26.0)
    assert step.rotation == pytest.approx(26.0)
    assert costs.step_of(setup(), 20).model == pytest.approx(2.0)  # 40,000 FLOP by now
    # Four segments' log-sum-exps, 128 bytes, are more than k and v, 80: o takes longer than q, k and v. 2*768/160.
    cut = setup(workers=dataclasses.replace(setup().workers, count=4), segments=4)
    assert costs.step_of(cut, 1).busy == pytest.approx(9.6)
    slow = setup(workers=Pool(count=2, flops=1e3, memory=4e3, bandwidth=2e3, price=1.0))
    assert costs.step_of(slow, 4).attention == pytest.approx(32.0)  # 4*2*8*10*25 FLOP of each sequence, in halves


def test_batches_by_hand() -> None:
    found = setup()
    assert found.most == 2  # 2,000 bytes of each sequence on a worker with 4,000
    assert setup(workers=dataclasses.replace(found.workers, count=3), segments=3).most == 3
    # Two devices hold 20,000 bytes, of which weights take 2,000: room for 4 sequences.
    alone = costs.alone(found, found.model)
    assert alone is not None
    assert (alone.batch, alone.most, alone.dollars) == (4, 4, 6.0)
    # Weights in 1 s, then 16,000 bytes at 2 x 1,000/s.
    assert alone.seconds == pytest.approx(9.0)
    assert alone.speed == pytest.approx(4 / 9)
    assert alone.per_dollar == pytest.approx(3600 * 4 / 9 / 6)
    sequence, rotation = costs.in_sequence(found), costs.in_rotation(found)
    assert sequence is not None
    assert rotation is not None
    assert (sequence.batch, sequence.each, sequence.dollars) == (2, 2, 8.0)
    assert (rotation.batch, rotation.each) == (2, 1)
    assert rotation.step == costs.step_of(found, 1)
    assert costs.in_rotation(found, batch=1) is None
    assert costs.alone(setup(context=1000), found.model) is None


def test_a_worker_with_more_heads_than_others_holds_the_rest_up() -> None:
    shape = dataclasses.replace(SHAPE, heads=8, kv_heads=8)
    three = setup(shape=shape, workers=dataclasses.replace(setup().workers, count=3))
    assert three.share == pytest.approx(3 / 8)
    assert setup(shape=shape, workers=three.workers, segments=3).share == pytest.approx(1 / 3)


def test_experts_read_what_their_tokens_choose() -> None:
    pool = Pool(count=1, flops=math.inf, memory=0.0, bandwidth=1.0, price=0.0)
    shape = dataclasses.replace(SHAPE, active=300)
    assert [costs.model_seconds(shape, n, 1, pool) for n in (1, 2, 3, 4, 100)] == [300, 600, 900, 1000, 1000]
    assert costs.model_seconds(shape, 50, 1, dataclasses.replace(pool, flops=1.0)) == 2 * 300 * 50


FEW = st.integers(0, 40)


@given(model=st.integers(1, 40), worker=st.integers(1, 40), there=FEW, back=FEW, latency=FEW)
def test_rotation_is_what_two_batches_that_take_turns_need(
    model: int, worker: int, there: int, back: int, latency: int
) -> None:
    """Against a simulation, layer after layer: sides, and the link each way, serve one batch at a time."""
    stations = ((model, 0), (there, latency), (worker, 0), (back, latency))  # seconds of service, then of flight
    free, ready, ends = [0] * 4, [0, 0], list[int]()
    for _ in range(400):
        for batch in (0, 1):
            for n, (service, flight) in enumerate(stations):
                free[n] = max(ready[batch], free[n]) + service
                ready[batch] = free[n] + flight
        ends.append(ready[0])
    layers = 300
    step = Step(
        model=layers * model,
        attention=layers * worker,
        transfer=layers * (there + back),
        latency=layers * 2 * latency,
        busy=layers * max(there, back),
    )
    assert ends[-1] - ends[-1 - layers] == step.rotation


@given(
    batch=st.integers(1, 50),
    context=st.integers(1, 200),
    segments=st.sampled_from([1, 2, 4]),
    side=st.sampled_from(["flops", "bandwidth", "count"]),
    factor=st.integers(1, 5),
)
def test_better_machines_are_never_slower(batch: int, context: int, segments: int, side: str, factor: int) -> None:
    usual = setup()
    workers = dataclasses.replace(usual.workers, count=4)
    base = setup(context=context, segments=segments, workers=workers, shape=dataclasses.replace(SHAPE, kv_heads=4))
    better = [
        dataclasses.replace(base, link=base.link * factor),
        dataclasses.replace(base, latency=base.latency / factor),
        dataclasses.replace(base, model=_times(base.model, side, factor)),
    ]
    if side != "count":
        better.append(dataclasses.replace(base, workers=_times(workers, side, factor)))
    for one in better:
        assert costs.step_of(one, batch).sequence <= costs.step_of(base, batch).sequence
        assert costs.step_of(one, batch).rotation <= costs.step_of(base, batch).rotation
    longer = dataclasses.replace(base, context=context + 1)
    for larger in (costs.step_of(base, batch + 1), costs.step_of(longer, batch)):
        assert larger.sequence >= costs.step_of(base, batch).sequence
        assert larger.rotation >= costs.step_of(base, batch).rotation


def _times(pool: Pool, name: str, factor: int) -> Pool:
    return dataclasses.replace(pool, **{name: getattr(pool, name) * factor})


@given(batch=st.integers(1, 100), share=st.floats(0.01, 1), context=st.integers(1, 1000))
def test_the_least_bandwidth_gives_transfers_their_share(batch: int, share: float, context: int) -> None:
    base = setup(context=context, header=72)
    step = costs.step_of(dataclasses.replace(base, link=costs.minimum_bandwidth(base, batch, share)), batch)
    assert step.transfer == pytest.approx(share * (step.model + step.attention))


@given(context=st.integers(1, 100_000), model=st.sampled_from(sorted(MODELS)))
def test_balance_is_where_both_sides_take_as_long(context: int, model: str) -> None:
    made = plan(PlanOffloadConfig(model=model, devices=16, workers=4, worker_memory=1e9, context=context)).setup
    even = costs.balance(made)
    if even is None:
        step = costs.step_of(made, 1e6)
        assert step.attention <= step.model
    else:
        step = costs.step_of(made, even)
        assert step.attention == pytest.approx(step.model)
        assert costs.step_of(made, 2 * even).attention > costs.step_of(made, 2 * even).model


@given(limit=st.floats(0.02, 2))
def test_the_largest_batch_within_a_time(limit: float) -> None:
    made = plan(PlanOffloadConfig(model="llama-3-8b", workers=2, worker="cpu-12xddr5-4800")).setup
    for way, least in ((costs.in_sequence, 1), (costs.in_rotation, 2)):
        found = way(made, limit=limit)
        if found is None:
            more = way(made, batch=least)
            assert more is not None
            assert more.seconds > limit
        elif found.batch < found.most:
            more = way(made, batch=found.batch + 1)
            assert more is not None
            assert found.seconds <= limit < more.seconds


def test_a_cpu_host_is_called_after_its_memory() -> None:
    host = figures_of("cpu-12xddr5-4800")
    assert host is not None
    assert host.bandwidth == pytest.approx(460.8)  # 12 channels of 8 bytes, 4,800 million times a second
    assert host.memory == 768
    assert figures_of("cpu-0xddr5-4800") is None
    assert all(figures_of(name) == figures for name, figures in DEVICES.items())


BINDINGS = {
    "memory": {"model": "llama-3-70b", "devices": 2, "workers": 4},
    "batch": {"model": "llama-3-70b", "devices": 2, "workers": 4, "batch": 8},
    "worker bandwidth": {"model": "llama-3-8b", "worker": "cpu-12xddr5-4800"},
    "worker compute": {"model": "llama-3-8b", "worker_tflops": 1.0},
    "model compute": {"model": "llama-3-70b", "devices": 2, "workers": 4, "context": 1024},
    "link": {"model": "llama-3-8b", "link_latency": 2000.0},
}


@pytest.mark.parametrize("name", BINDINGS)
def test_what_binds(name: str) -> None:
    assert binding(plan(PlanOffloadConfig(**BINDINGS[name]))) == name


@pytest.mark.parametrize(
    ("name", "mended"),
    [
        ("memory", {"worker_memory": 192.0}),
        ("batch", {"batch": 16}),
        ("worker bandwidth", {"worker_bandwidth": 4608.0}),
        ("worker compute", {"worker_tflops": 10.0}),
        ("model compute", {"device_tflops": 5000.0}),
        ("link", {"link_latency": 1.0}),
    ],
)
def test_mending_what_binds_makes_more_tokens(name: str, mended: dict[str, Any]) -> None:
    before, after = BINDINGS[name], {**BINDINGS[name], **mended}
    assert plan(PlanOffloadConfig(**after)).best.speed > 1.2 * plan(PlanOffloadConfig(**before)).best.speed


def test_workers_share_as_evenly_as_they_can() -> None:
    for workers, segments in ((1, 1), (4, 1), (8, 1), (3, 3), (12, 3), (16, 2)):
        made = plan(PlanOffloadConfig(model="llama-3-8b", workers=workers)).setup
        assert made.segments == segments
        assert made.share == pytest.approx(1 / workers)


def _json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan-offload", *options, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "--model", "llama-3-8b", "--batch", "1")
    assert list(found) == [
        *("model", "context", "dtype", "devices", "workers", "segments", "wire_bytes", "minimum_bandwidth"),
        *("balance_batch", "alone", "sequence", "rotation", "best", "binds", "advice"),
    ]
    assert found["wire_bytes"] == {
        "batch": 1,
        "by_heads": 20_480,
        "by_segments": 37_120,
        "compared_segments": 2,
        "headers": 3 * 72,
    }
    assert found["rotation"] is None
    assert list(found["sequence"]) == [
        *("devices", "batch", "largest_batch", "model_seconds", "attention_seconds", "network_seconds"),
        *("token_seconds", "tokens_per_second", "dollars_per_hour", "tokens_per_dollar"),
    ]
    parts = [found["sequence"][f"{name}_seconds"] for name in ("model", "attention", "network")]
    assert sum(parts) == pytest.approx(found["sequence"]["token_seconds"])


def test_what_costs_nothing_has_no_tokens_per_dollar(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "llama-3-8b", "--device-price", "0", "--worker-price", "0")
    assert _json(capsys, *options)["sequence"]["tokens_per_dollar"] is None
    assert main(["plan-offload", *options]) == 0


def test_it_says_where_workers_don_t_pay_and_where_nothing_else_works(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "llama-3-8b", "--worker", "cpu-12xddr5-4800")
    poor = _json(capsys, *options)
    assert poor["advice"].startswith("Don't offload here: without workers a dollar buys ")
    only = _json(capsys, *options, "--context", "4000000", "--alone", "1")
    assert only["alone"] is None
    assert only["advice"].startswith("Without workers it can't be done. ")


def test_by_hand_as_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--layers", "32", "--heads", "32", "--kv-heads", "8", "--hidden", "4096", "--parameters", "8030261248")
    figures = [
        option
        for side, name in (("device", "h100-sxm"), ("worker", "h20"))
        for figure, value in DEVICES[name]._asdict().items()
        for option in (f"--{side}-{figure}", str(value))
    ]
    by_name = _json(capsys, "--model", "llama-3-8b")
    by_hand = _json(capsys, *sizes, "--device", "l4", "--worker", "cpu-1xddr4-3200", *figures)
    for found, names in ((by_name, ("h100-sxm", "h20")), (by_hand, ("l4", "cpu-1xddr4-3200"))):
        assert (found["devices"].pop("name"), found["workers"].pop("name")) == names
    assert by_hand == by_name


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-32b", "qwen3-30b-a3b"])
def test_a_folder_as_its_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Published configs: the sizes of the known models are theirs."""
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    qwen = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
    published = {
        "llama-3-8b": LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8,
        ),
        "qwen3-32b": Qwen3Config(
            hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
            num_key_value_heads=8, **qwen,
        ),
        "qwen3-30b-a3b": Qwen3MoeConfig(
            hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, **qwen,
        ),
    }  # fmt: skip
    published[name].save_pretrained(tmp_path)
    assert _json(capsys, "--model", str(tmp_path)) == _json(capsys, "--model", name)


def test_folders_that_won_t_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import DeepseekV3Config, Qwen3NextConfig

    small = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 64}
    DeepseekV3Config(**small).save_pretrained(tmp_path / "latent")
    Qwen3NextConfig(**small, num_experts=4).save_pretrained(tmp_path / "linear")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("latent", "has latent attention; expected K and V of every token"),
        ("linear", "has linear_attention layers; expected K and V of every token"),
        ("empty", "has a config that can't be read"),
    ):
        assert main(["plan-offload", "--model", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


BY_HAND = "--layers 32 --heads 32 --parameters 8e9"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "no model; give --model, a folder or one of llama-3-8b, "),
        ("--model lama", "--model is 'lama'; expected the folder of a Hugging Face model, or one of llama-3-8b, "),
        ("--model llama-3-8b --layers 3", "--model and --layers both describe the model; leave one of them out"),
        ("--layers 3", "a model by hand needs --heads too"),
        (BY_HAND, "a model by hand needs --head-dim, or else --hidden"),
        (f"{BY_HAND} --head-dim 128 --hidden 4096", "a model by hand needs --head-dim, or else --hidden"),
        (f"{BY_HAND} --hidden 100", "--hidden is 100; expected a multiple of --heads 32"),
        (f"{BY_HAND} --head-dim 128 --kv-heads 5", "--kv-heads is 5; expected a divisor of --heads 32"),
        (f"{BY_HAND} --head-dim 128 --active-parameters 9e9", "--active-parameters is 9e+09; expected at most"),
        ("--layers 3 --parameters inf", "--parameters is inf; expected a positive number"),
        ("--model llama-3-8b --device tpu", "--device is 'tpu'; expected one of h100-sxm, "),
        ("--model llama-3-8b --worker cpu", "or a CPU host by its memory, as cpu-12xddr5-4800"),
        ("--model llama-3-8b --dtype fp32", "no TFLOP/s are listed; give --device-tflops"),
        ("--model llama-3-70b", "--devices is 1, with 72 GB to use; expected 141 GB for the weights: use 2 or more"),
        (
            "--model llama-3-8b --batch 99",
            "with room for 20 sequences of 32,768 tokens; expected room for 99: use more",
        ),
        ("--model llama-3-8b --context 999999", "with room for 0 sequences of 999,999 tokens; expected room for 1"),
        ("--model llama-3-8b --workers 6 --segments 4", "--segments is 4; expected one of 1, 2, 3, 6, so that"),
        ("--model llama-3-8b --token-ms 5", "--token-ms is 5; expected at least 9.27, what one sequence takes"),
        ("--model llama-3-8b --token-ms 50 --batch 3", "--batch and --token-ms both say how many sequences"),
        ("--model llama-3-8b --context 0", "--context is 0; expected 1 or more"),
        ("--model llama-3-8b --transfer-share 2", "--transfer-share is 2.0; expected a positive number, at most 1"),
        ("--model llama-3-8b --memory-used nan", "--memory-used is nan; expected a positive number, at most 1"),
        ("--model llama-3-8b --worker-price -1", "--worker-price is -1.0; expected a positive number"),
        ("--model llama-3-8b --link-bandwidth 0", "--link-bandwidth is 0.0; expected a positive number"),
        ("--model llama-3-8b --link-latency -1", "--link-latency is -1.0; expected 0 or more microseconds"),
        ("--model llama-3-8b --wrkers 2", "unknown option --wrkers; did you mean --workers?"),
    ],
)
def test_one_line_says_what_is_wrong(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-offload", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("seqpar plan-offload: error: ")
    assert words in line


def test_the_docs_example_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```\n\$ seqpar (.*?)\n(.*?)```", DOCS.read_text(), re.S)
    assert main(shlex.split(example[0])) == 0
    assert capsys.readouterr().out == example[1]


def test_the_docs_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.S)
    commands = block.strip().replace("path/to/model", str(tmp_path)).splitlines()
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


def test_the_docs_comparison_is_what_the_model_says() -> None:
    rows = re.findall(r"^\| (llama-\S+) \| ([\d,]+) \|.*$", DOCS.read_text(), re.M)
    assert len(rows) == 12
    for line in re.findall(r"^\| llama-.*$", DOCS.read_text(), re.M):
        model, context, alone, its, pair, batch, gain, dollars, least = line.strip("| ").split(" | ")
        devices, workers = map(int, pair.split(" + "))
        tokens = int(context.replace(",", ""))
        found = plan(PlanOffloadConfig(model=model, context=tokens, devices=devices, workers=workers))
        best, other = found.best, found.alone
        assert other is not None
        assert (str(found.pool.count), f"{other.batch:,}", f"{best.batch:,}") == (alone, its, batch)
        assert f"{best.speed / other.speed - 1:+.0%}" == gain
        assert f"{best.per_dollar / other.per_dollar:.2f}" == dollars
        assert f"{costs.minimum_bandwidth(found.setup, best.each, 0.2) / 1e9:.1f}" == least
