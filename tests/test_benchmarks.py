"""The GPU benchmark and the tuner without a GPU: everything but the clock and the compiler, on small cases."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from seqpar.kernels import kernel_named
from seqpar.kernels.choices import Row as Choice
from seqpar.kernels.choices import read_choices, write_choices
from seqpar.kernels.triton import configurations, forward, launching
from seqpar.kernels.triton.configurations import Row, Tiles
from seqpar.kernels.triton.offline import Compiled
from support.blocks import pairs

pytestmark = pytest.mark.skipif(not launching.interpreted(), reason="needs TRITON_INTERPRET=1: a GPU is at hand")
FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def b() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which find each other as scripts do; gone again, for one is called ``kernels``."""
    names = ("contenders", "comparing", "choosing", "tuning", "kernels")
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in (*names, "measuring"):
            sys.modules.pop(name, None)


@pytest.fixture
def case(b: SimpleNamespace) -> Callable[..., Any]:
    """Small cases: the interpreter multiplies fp16 right, and bf16 wrong."""
    small = {"dtype": torch.float16, "queries": 96, "keys": 96, "heads": 4, "kv_heads": 2, "dim": 16, "value_dim": 16}
    return lambda **changes: b.contenders.Case(**{**small, **changes})


class Clock:
    """Calls everything once, and makes up how long it took: by name, or a second."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.timed = seconds, []

    def __call__(self, calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
        for name, call in calls.items():
            self.timed.append(name)
            call()
        return {name: [self.seconds.get(name, 1.0)] * runs for name in calls}


def bench(b: SimpleNamespace, clock: Callable[..., Any] | None = None, until: float = float("inf")) -> Any:
    return b.comparing.Bench(CPU, clock or Clock(), 3, until)


# Cases.


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
def test_useful_work_is_counted_pair_by_pair(mask: str, b: SimpleNamespace, case: Callable[..., Any]) -> None:
    one = case(mask=mask, batch=3, dim=24, value_dim=8)
    bounds, count = b.contenders.documents(96), 0
    for query in range(96):
        for key in range(96):
            together = any(low <= key <= query < high for low, high in pairwise(bounds))
            allowed = {"full": True, "causal": key <= query, "window": query - 24 < key <= query, "documents": together}
            count += allowed[mask]
    count *= 3 * 4
    assert one.pairs == count
    assert one.flop("forward") == count * (2 * 24 + 2 * 8)
    assert one.flop("backward") == count * (3 * 2 * 24 + 2 * 2 * 8)
    assert case(mask=mask, dim=128, value_dim=128).flop("forward") == 4 * 128 * count // 3
    assert case(mask=mask, dim=128, value_dim=128).flop("backward") == 10 * 128 * count // 3


def test_documents_are_the_documented_ones(b: SimpleNamespace) -> None:
    lengths = b.contenders.DOCUMENTS
    assert sum(lengths) == 16_384
    for times in (1, 4):
        sizes = torch.tensor(b.contenders.documents(times * 16_384)).diff()
        assert tuple(sizes.tolist()) == lengths * times
    assert b.contenders.documents(2048)[-1] == 2048
    assert b.contenders.Case(mask="window").pairs == 32 * (4096 * 4097 // 2 + (16_384 - 4096) * 4096)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
def test_flex_attention_gets_the_same_mask(mask: str, b: SimpleNamespace, case: Callable[..., Any]) -> None:
    one = case(mask=mask, dtype=torch.float32)
    block_mask = b.contenders.Flex._block_mask(one, CPU)
    query, key = torch.arange(96).view(-1, 1), torch.arange(96).view(1, -1)
    assert torch.equal(block_mask.mask_mod(0, 0, query, key), pairs(one.intervals, 96)[0, 0])
    q, k, v, _ = (x.transpose(1, 2) for x in one.inputs(CPU))
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    right = b.comparing.corners(one, one.inputs(CPU))
    assert not b.comparing.fault(one, right, {"out": out.transpose(1, 2)})


# Right or wrong.


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("name", ["triton", "triton_atomic", "auto"])
def test_right_contenders_pass(name: str, mask: str, b: SimpleNamespace, case: Callable[..., Any]) -> None:
    contender = b.contenders.CONTENDERS[name]
    assert b.comparing.check(contender, case(mask=mask, batch=2), CPU) == {"forward": "", "backward": ""}


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_pytorchs_function_passes(mask: str, b: SimpleNamespace, case: Callable[..., Any]) -> None:
    one = case(mask=mask, dtype=torch.float32, batch=2, kv_heads=4)
    contender = b.contenders.CONTENDERS["sdpa:flash"]
    assert b.comparing.check(contender, one, CPU) == {"forward": "", "backward": ""}


class Off:
    """Attention that is a little off in one place of one result."""

    def __init__(self, ours: Any, result: str, change: Callable[[Tensor], object]) -> None:
        self.ours, self.result, self.change = ours, result, change

    def prepare(self, case: Any, inputs: Any) -> Any:
        calls = self.ours.prepare(case, inputs)

        def changed(named: dict[str, Tensor]) -> tuple[Tensor, ...]:
            if self.result in named:
                self.change(named[self.result])
            return tuple(named.values())

        def start_backward() -> Callable[[], tuple[Tensor, ...]]:
            backward = calls.start_backward()
            return lambda: changed(dict(zip(("dq", "dk", "dv"), backward(), strict=True)))

        return type(calls)(lambda: changed({"out": calls.forward()})[0], start_backward)


@pytest.mark.parametrize("result", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("change", [lambda x: x[-1:, :, -1:].mul_(1.01), lambda x: x[0, 7, 0, 3].fill_(torch.nan)])
def test_wrong_contenders_are_found(
    result: str, change: Callable[[Tensor], object], b: SimpleNamespace, case: Callable[..., Any]
) -> None:
    wrong = Off(b.contenders.Ours(kernel_named("cpu")), result, change)
    found = b.comparing.check(wrong, case(batch=2), CPU)
    where = "forward" if result == "out" else "backward"
    assert found[where].startswith(f"wrong: {result} is off by")
    assert not found["backward" if where == "forward" else "forward"]


def test_what_is_wrong_raises_or_is_not_reached_is_not_timed(
    b: SimpleNamespace, case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Off(b.contenders.CONTENDERS["auto"], "dk", lambda x: x.zero_())
    monkeypatch.setitem(b.contenders.CONTENDERS, "wrong", wrong)
    names, clock = ("triton", "library:cudnn", "wrong"), Clock(triton=0.5, wrong=0.25)
    found = b.comparing.measure(bench(b, clock), case(), names)
    assert clock.timed == ["triton", "wrong", "triton"]
    for direction, seconds in found.items():
        assert "got tensors on cpu, expected CUDA" in seconds.pop("library:cudnn")
        assert seconds["triton"] == 0.5
        assert seconds["wrong"] == 0.25 if direction == "forward" else seconds["wrong"].startswith("wrong: dk")
    rates = b.comparing.rates(case(), "backward", found["backward"])
    assert rates["triton"] == case().flop("backward") / 0.5 / 1e12
    assert rates["wrong"] == found["backward"]["wrong"]
    late = b.comparing.measure(bench(b, until=0.0), case(), names)
    assert set(late["forward"].values()) == {"not reached"}


# The groups.


@pytest.fixture
def small_groups(b: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """Every kind of group, with a thousandth of the tokens, one narrow head, and fp16."""
    for name, value in {"SHORT": 16, "LONG": 32, "LONGER": 32, "BATCHES": (1, 2), "QUERIES": (1, 3)}.items():
        monkeypatch.setattr(b.kernels, name, value)
    size = {"dtype": torch.float16, "heads": 1, "kv_heads": 1, "dim": 16, "value_dim": 16}
    monkeypatch.setattr(b.kernels, "Case", lambda **about: b.contenders.Case(**{**about, **size}))
    tiny = {"fp16": b.kernels.Case(queries=32, keys=32)}
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # refuses to differentiate on the CPU
    return {
        "32": partial(b.kernels.shapes, length=32, kv_heads=1),
        "few": partial(b.kernels.few_queries, keys=96),
        "auto": b.kernels.automatic,
        "dtypes": partial(b.kernels.variants, title="dtypes", cases=tiny),
    }


def test_groups_are_measured_shown_and_kept(
    small_groups: dict[str, Callable[..., Any]], b: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(**{"triton": 1e-7, "flex": 1.0, "copy": 1e-3, "auto": 1.0})
    b.kernels.compare(bench(b, clock), small_groups, "kernels-cpu", tmp_path)
    kept = json.loads((tmp_path / "kernels-cpu.json").read_text())["groups"]
    assert kept.keys() == small_groups.keys()
    rows = {(row["mask"], row["pass"]): row for row in kept["32"]["rows"]}
    assert rows.keys() == {(m, p) for m in ("full", "causal", "window", "documents") for p in ("forward", "backward")}
    assert rows["causal", "forward"]["triton"] == pytest.approx(4 * 16 * (32 * 33 // 2) / 1e-7 / 1e12)
    assert rows["causal", "forward"]["sdpa:flash"] > 0
    assert rows["window", "backward"]["sdpa:flash"] == "no window mask"
    assert "does not support backward on CPU" in rows["window", "backward"]["flex"]
    goals = {goal["what"]: goal for goal in kept["32"]["goals"]}
    assert goals["causal backward: triton_atomic, TFLOP/s"]["asked"] == 360.0
    dense = goals["window forward: triton / triton full"]
    assert dense["asked"] == 0.85
    assert dense["got"] == rows["window", "forward"]["triton"] / rows["full", "forward"]["triton"]
    assert goals["window forward: triton / flex"]["got"] is None
    few = kept["few"]["rows"]
    assert [(row["batch"], row["queries"]) for row in few] == [(x, y) for x in "12" for y in "13"]
    assert few[3]["triton"] == pytest.approx(2 * 96 * 32 * 2 / 1e-7 / 1e9)
    assert few[0]["copy"] == pytest.approx(2 * (96 << 14) / 1e-3 / 1e9)
    automatic = kept["auto"]["rows"]
    assert [row["pass"] for row in automatic[:3]] == ["forward", "backward", "backward, repeatable"]
    assert {row["chosen"] for row in automatic} == {"cpu"}
    assert kept["auto"]["goals"][0]["got"] == automatic[0]["auto"] / automatic[0]["sdpa:flash"]
    shown = capsys.readouterr().out
    assert "480" in shown
    assert "does not support backward on CPU" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"groups": [], "out": None, "tune": False}),
        (["few", "auto", "--out", "x"], {"groups": ["few", "auto"], "out": Path("x")}),
        (["--tune", "--minutes", "3"], {"tune": True, "minutes": 3.0}),
    ],
)
def test_options(arguments: list[str], expected: dict[str, Any], b: SimpleNamespace) -> None:
    chosen = vars(b.kernels.options(arguments))
    assert {name: chosen[name] for name in expected} == expected


def test_unknown_groups_are_refused(b: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        b.kernels.options(["fews"])
    assert "got fews, expected some of 16k, 16k-gqa, few" in capsys.readouterr().err


def test_results_are_named_after_the_gpu(b: SimpleNamespace) -> None:
    assert b.kernels.gpu_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert b.kernels.gpu_name("NVIDIA H200") == "h200"


# The tuner.

ROW = Row("sm_90", "forward", 32, 64, Tiles(64, 32, 8, 2), "compiled")
GOOD = Compiled(registers=128, spilled_bytes=0, shared_bytes=1 << 16, products="wgmma", serialised=())


class Made(Executor):
    """Instead of a compiler: what it says of tiles, and nothing of those that it has not."""

    def __init__(self, says: Mapping[Tiles, object]) -> None:
        self.says = says

    def submit(self, function: Callable[..., Any], row: Row, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if row.tiles in self.says:
            future.set_result(self.says[row.tiles])
        return future


class TilesClock:
    """Seconds by the tiles with which the forward kernel is launched."""

    def __init__(self, seconds: Mapping[Tiles, float]) -> None:
        self.seconds = seconds

    def __call__(self, calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
        found = {}
        for name, call in calls.items():
            tiles = next(cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, Tiles))
            found[name] = [self.seconds[tiles]] * runs
        return found


@pytest.fixture
def few_heads(b: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems with 4/2 heads."""
    monkeypatch.setattr(b.tuning, "Case", lambda **about: b.contenders.Case(**{**about, "heads": 4, "kv_heads": 2}))


@pytest.fixture
def tried(b: SimpleNamespace, few_heads: None, monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """Five candidates, of which the interpreter finds the third wrong."""
    tiles = [ROW.tiles, Tiles(32, 32, 8, 2), Tiles(32, 16, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2)]
    monkeypatch.setattr(b.tuning, "candidates", lambda row: tiles)
    plain = forward.forward

    def sometimes_wrong(*args: Any, tiles: Tiles | None = None, **options: Any) -> Any:
        result = plain(*args, tiles=tiles, **options)
        if tiles == Tiles(32, 16, 8, 2):
            result.out[-1, -1, -1] += 0.1
        return result

    monkeypatch.setattr(forward, "forward", sometimes_wrong)
    return tiles


def test_the_fastest_right_tiles_that_may_ship_are_written(
    tried: list[Tiles], b: SimpleNamespace, tmp_path: Path
) -> None:
    table, says = tmp_path / "table.csv", dict.fromkeys(tried, GOOD)
    others = [row for row in configurations.table() if row.architecture != "sm_90"]
    configurations.write([*others, ROW], table)
    says[tried[3]] = replace(GOOD, spilled_bytes=8)
    clock = TilesClock(dict(zip(tried, (5.0, 3.0, 1.0, 2.0, 4.0), strict=True)))
    b.tuning.tune_rows(bench(b, clock), [ROW], Made(says), str(tmp_path), table, 32)
    tuned = configurations.table(table)
    assert [row for row in tuned if row.architecture != "sm_90"] == others
    (row,) = (row for row in tuned if row.architecture == "sm_90")
    assert row.tiles == tried[1]
    assert row.measured.startswith("CPU 20")


def test_tiles_stay_where_time_is_up_or_none_will_do(tried: list[Tiles], b: SimpleNamespace, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    configurations.write([ROW], table)
    before, clock = table.read_text(), TilesClock(dict.fromkeys(tried, 1.0))
    b.tuning.tune_rows(bench(b, clock, until=0.0), [ROW], Made({}), str(tmp_path), table, 32)
    b.tuning.tune_rows(bench(b, clock), [ROW], Made(dict.fromkeys(tried, "too large")), str(tmp_path), table, 32)
    assert table.read_text() == before


@pytest.mark.usefixtures("few_heads")
@pytest.mark.parametrize("kernel", configurations.KERNELS)
def test_every_kernel_is_checked_on_its_problem(kernel: str, b: SimpleNamespace) -> None:
    problem = b.tuning.Problem(replace(ROW, kernel=kernel), CPU, 16)
    assert not problem.fault(Tiles(32, 32, 8, 2))
    assert set(problem.launch(Tiles(32, 32, 8, 2))()) == {
        "forward": {"out"}, "few": {"out"}, "dq": {"dq"}, "dkv": {"dk", "dv"}, "dkv_atomic": {"dq", "dk", "dv"},
    }[kernel]  # fmt: skip
    assert problem.fault(Tiles(32, 32, 8, 2, descriptors=True)) == ""
    problem._right[-1].expected["out" if "out" in problem.launch(Tiles(32, 32, 8, 2))() else kernel[:2]].mul_(1.01)
    assert problem.fault(Tiles(32, 32, 8, 2)).startswith("wrong: ")


def test_candidates(b: SimpleNamespace) -> None:
    rows = [row for row in configurations.table() if row.architecture == "sm_90"]
    for row in rows:
        found = b.tuning.candidates(row)
        assert found[0] == row.tiles
        assert len(found) == len(set(found)) > 10
    ranked = b.tuning.in_order(rows)
    assert [(row.kernel, row.bits, row.head_dim) for row in ranked[:2]] == [("forward", 16, 128), ("dkv", 16, 128)]
    assert not b.tuning.may_fit(replace(ROW, bits=16, head_dim=256), Tiles(128, 128, 4, 2))


def test_what_may_ship(b: SimpleNamespace) -> None:
    row, wide = replace(ROW, bits=16), replace(ROW, bits=16, head_dim=256)
    assert b.tuning.may_ship(row, GOOD)
    bad = {"spilled_bytes": 4, "products": "mma", "serialised": ("C7510",)}
    assert not any(b.tuning.may_ship(row, replace(GOOD, **{name: value})) for name, value in bad.items())
    assert b.tuning.may_ship(wide, replace(GOOD, spilled_bytes=64))
    assert not b.tuning.may_ship(wide, replace(GOOD, spilled_bytes=65))
    assert b.tuning.may_ship(replace(row, kernel="few"), replace(GOOD, products="mma"))
    assert b.tuning.may_ship(ROW, replace(GOOD, products="none"))
    assert not b.tuning.may_ship(row, "out of resource: shared memory")
    variants = list(b.tuning.variants(replace(row, head_dim=128, tiles=replace(row.tiles, descriptors=True))))
    assert [variant.head_dim for variant, _ in variants] == [128, 128, 128, 128, 80, 96]
    assert [variant.tiles.descriptors for variant, _ in variants] == [True, True, True, False, True, True]


COMPILE = """
import os, sys
sys.path.insert(0, {folder!r})
import tuning
from tuning import Row, Tiles, examine, may_ship
for tiles in (Tiles(64, 64, 4, 2, True), Tiles(128, 128, 4, 2, True), Tiles(128, 128, 8, 8, True))[:{number}]:
    cache = os.path.join({cache!r}, str(tiles.rows * tiles.stages))
    row = Row("sm_90", {kernel!r}, 16, 128, tiles, "compiled")
    compiled = examine(row, cache)
    print(may_ship(row, compiled), os.path.isdir(cache), compiled if isinstance(compiled, str) else "", sep="|")
"""


@pytest.mark.parametrize(("kernel", "number"), [("forward", 3), ("few", 1)])
def test_candidates_are_compiled_without_a_gpu(kernel: str, number: int, tmp_path: Path) -> None:
    """In a process of its own, where nothing is interpreted: what fits, what spills, and what does not fit at all."""
    script = COMPILE.format(folder=str(FOLDER), cache=str(tmp_path), kernel=kernel, number=number)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    fits, *others = run.stdout.splitlines()
    assert fits == "True|True|"
    if others:
        assert others[0] == "False|False|"
        assert "out of resource: shared memory" in others[1]


# Choices.


def test_choices_replace_only_what_was_measured(
    b: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "choices.csv"
    path.write_text("# Made up.\n")
    old = Choice("sm_90", 16, 16, 16, "causal", "forward", 64, "library:cudnn", 1.0, "old")
    kept = [replace(old, architecture="sm_80"), replace(old, length=128), replace(old, head_dim=24)]
    write_choices([old, *kept], path)
    monkeypatch.setattr(b.choosing, "HEAD_DIMS", ((16, 16),))
    monkeypatch.setattr(b.choosing, "architecture", lambda device: "sm_90")
    small = partial(b.contenders.Case, dtype=torch.float16)
    monkeypatch.setattr(b.choosing, "Case", lambda **about: small(**{**about, "batch": 1}))
    b.choosing.choose(bench(b, Clock(triton=1e-6)), path, lengths=(64,), heads=4)
    rows = read_choices(path)
    assert [row for row in rows if row.measured == "old"] == sorted(kept, key=lambda row: str(row))
    new = [row for row in rows if row.measured != "old"]
    assert [(row.kind, row.direction) for row in new] == [
        ("causal", "backward"), ("causal", "forward"), ("full", "backward"), ("full", "forward"),
    ]  # fmt: skip
    assert {row.kernel for row in new} == {"triton"}
    assert new[-1].tflops == pytest.approx(4 * 16 * 4 * 64 * 64 / 1e-6 / 1e12, rel=1e-3)
    assert new[0].measured.startswith("CPU, triton 3")


def test_only_kernels_that_repeat_are_chosen_from(b: SimpleNamespace) -> None:
    repeats = b.choosing.repeats
    assert all(repeats(name, "forward") for name in ("triton", "library:cudnn", "library:flash", "library:flash_attn"))
    assert not repeats("library:flash", "backward")
    with b.contenders.repeatable():
        assert repeats("library:flash", "backward")
        assert not repeats("library:cudnn", "backward")
    assert not torch.are_deterministic_algorithms_enabled()
