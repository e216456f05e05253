"""What `auto` picks, from what table, and how plans say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import seqpar
from seqpar import Causal, Documents, Full, Mask, Ring, SlidingWindow
from seqpar.itinerary import itinerary
from seqpar.kernels import AUTO, Intervals, Shape, automatic, kernel_named
from seqpar.kernels.automatic import Choice, pick
from seqpar.kernels.choices import COLUMNS, KERNELS, TABLE, Row, measured, read_choices, write_choices
from seqpar.kernels.flash import FlashKernel

H100 = Row("sm_90", 16, 128, 128, "causal", "forward", 16_384, "triton", 480.0, "H100, 2026-01-01")
ROWS = [
    H100,
    replace(H100, kernel="library:cudnn", tflops=590.0),
    replace(H100, kernel="library:flash", tflops=360.0),
    replace(H100, length=2_048, kernel="library:cudnn", tflops=300.0),
    replace(H100, length=2_048, tflops=310.0),
    replace(H100, kind="full", kernel="library:flash_attn", tflops=650.0),
    replace(H100, direction="backward", kernel="library:cudnn", tflops=500.0),
    replace(H100, direction="backward", tflops=400.0),
]
HEADER = ",".join(COLUMNS)


def intervals_of(mask: Mask, length: int, **plan: Any) -> Intervals:
    return seqpar.plan(mask, length=length, **plan).work.blocks[0].intervals


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A made-up table."""
    path = tmp_path / "choices.csv"
    path.write_text("# Made up.\n")
    write_choices(ROWS, path)
    return path


def picked(
    table: Path, mask: Mask | None = None, length: int = 16_384, *, architecture: str = "sm_90",
    dtype: torch.dtype = torch.bfloat16, head_dims: tuple[int, int] = (128, 128), direction: str = "forward",
    unusable: tuple[str, ...] = (), **plan: Any,
) -> Choice:  # fmt: skip
    intervals = intervals_of(mask or Causal(), length, **plan)
    return pick(
        architecture, dtype, head_dims, intervals, direction, measured(table), lambda kernel: kernel not in unusable
    )


CASES: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "fastest": ({}, ("library:cudnn", "590 TFLOP/s at 16,384 tokens")),
    "fp16 as bf16": ({"dtype": torch.float16}, ("library:cudnn", "590 TFLOP/s at 16,384 tokens")),
    "rectangle": ({"mask": Full()}, ("library:flash_attn", "650 TFLOP/s at 16,384 tokens")),
    "short": ({"length": 1000}, ("triton", "310 TFLOP/s at 2,048 tokens")),
    "nearer the short one": ({"length": 5700}, ("triton", "310 TFLOP/s at 2,048 tokens")),
    "nearer the long one": ({"length": 5900}, ("library:cudnn", "590 TFLOP/s at 16,384 tokens")),
    "longer than all": ({"length": 100_000}, ("library:cudnn", "590 TFLOP/s at 16,384 tokens")),
    "backward": ({"direction": "backward"}, ("library:cudnn", "500 TFLOP/s at 16,384 tokens")),
    "not repeatable": (
        {"direction": "backward", "unusable": ("library:cudnn",)},
        ("triton", "400 TFLOP/s at 16,384 tokens"),
    ),
    "none usable": (
        {"mask": Full(), "unusable": ("library:flash_attn",)},
        ("triton", "no other that was measured is usable"),
    ),
    "other head dims": ({"head_dims": (128, 64)}, ("triton", "not measured on sm_90")),
    "other GPU": ({"architecture": "sm_100"}, ("triton", "not measured on sm_100")),
    "window": ({"mask": SlidingWindow(99)}, ("triton", "more than a rectangle or triangle")),
    "documents": ({"mask": Documents([0, 9000, 16_384])}, ("triton", "more than a rectangle or triangle")),
    "rows of documents": (
        {"mask": Documents([[0, 16_384], [0, 16_384]])},
        ("triton", "more than a rectangle or triangle"),
    ),
    "few queries": ({"mask": Full(), "length": 16, "kv_length": 16_384}, ("triton", "few queries")),
    "not few": (
        {"mask": Full(), "length": 17, "kv_length": 16_384},
        ("library:flash_attn", "650 TFLOP/s at 16,384 tokens"),
    ),
    "fp32": ({"dtype": torch.float32}, ("triton", "32 bits")),
    "fp64": ({"dtype": torch.float64}, ("reference", "float64 on sm_90")),
    "CPU": ({"architecture": "cpu"}, ("cpu", "the one for the CPU")),
    "other device": ({"architecture": "mps"}, ("reference", "bfloat16 on mps")),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_picked(case: str, table: Path) -> None:
    arguments, expected = CASES[case]
    assert picked(table, **arguments) == expected


def test_plain_blocks_of_a_ring_are_picked_for(table: Path) -> None:
    """A zigzag step is half the keys or half the queries: of 16,384 x 8,192 pairs, the nearest length is 16,384."""
    for rank in range(2):
        for block in itinerary(Causal(), "zigzag", Ring(), 32_768, 32_768, 2, rank).blocks:
            choice = pick(
                "sm_90", torch.bfloat16, (128, 128), block.intervals, "forward", measured(table), lambda kernel: True
            )
            assert choice.kernel == ("library:cudnn" if block.source == rank else "library:flash_attn")


# The table.


def test_the_shipped_table_is_valid() -> None:
    assert TABLE.read_text().startswith("#")
    assert HEADER.replace(",", ", ") in " ".join(TABLE.read_text().split())
    assert all(row.kernel in KERNELS for row in read_choices())
    assert set(KERNELS) <= {kernel_named(name).name for name in KERNELS}


def test_tables_are_written_as_they_are_read(table: Path) -> None:
    assert sorted(read_choices(table), key=str) == sorted(ROWS, key=str)
    lines = table.read_text().splitlines()
    assert lines[0] == "# Made up."
    assert len({len(line) for line in lines[1:]}) == 1, "columns are aligned"
    before = measured(table)
    write_choices([*read_choices(table), replace(H100, architecture="sm_80")], table)
    assert len(measured(table)) == len(before) + 1, "what is written counts at once"
    write_choices([], table)
    assert read_choices(table) == ()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kernel", "cudnn", r"kernel: got 'cudnn', expected one of \('triton', 'library:cudnn', "),
        ("kernel", "triton_atomic", "kernel: got 'triton_atomic', expected one of"),
        ("kind", "window", r"kind: got 'window', expected one of \('full', 'causal'\)"),
        ("direction", "both", "direction: got 'both'"),
        ("bits", "32", r"bits: got 32, expected one of \(16,\)"),
        ("architecture", "H100", "architecture: got 'H100', expected one such as 'sm_90'"),
        ("head_dim", "0", "head_dim: got 0, expected a positive number"),
        ("tflops", "nan", "tflops: got nan, expected a positive number"),
        ("tflops", "fast", "could not convert string to float: 'fast'"),
        ("length", "16k", "invalid literal for int"),
    ],
)
def test_wrong_rows_are_named_by_line(field: str, value: str, message: str, tmp_path: Path) -> None:
    path, good = tmp_path / "choices.csv", "sm_90, 16, 128, 128, causal, forward, 16384, triton, 480.0, H100, 2026"
    bad = good.split(", ")
    bad[COLUMNS.index(field)] = value
    path.write_text("\n".join(["# comment", HEADER, good, ",".join(bad)]))
    with pytest.raises(ValueError, match=rf"^choices\.csv, line 4: {message}"):
        read_choices(path)


def test_missing_columns_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "choices.csv"
    path.write_text(f"{HEADER}\nsm_90, 16, 128\n")
    with pytest.raises(ValueError, match=r"^choices\.csv, line 2: got 3 columns, expected architecture, bits, "):
        read_choices(path)


# The kernel, and what plans say of it.


def test_auto_computes_with_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, str]] = []

    def spied(name: str, original: Callable) -> Callable:
        def spy(self: Any, *args: Any) -> Any:
            used.append((self.name, name))
            return original(self, *args)

        return spy

    choose = {"forward": "cpu", "backward": "reference"}
    monkeypatch.setattr(type(AUTO), "choose", lambda self, shape, intervals, direction: Choice(choose[direction], ""))
    for name in ("cpu", "reference"):
        kernel = type(kernel_named(name))
        for method in ("check", "forward", "backward"):
            monkeypatch.setattr(kernel, method, spied(method, getattr(kernel, method)))
    q = torch.randn(1, 19, 2, 4, requires_grad=True)
    seqpar.attention(q, q, q, seqpar.plan(Causal(), length=19)).sum().backward()
    assert set(used[:2]) == {("cpu", "check"), ("reference", "check")}
    assert used[2:] == [("cpu", "forward"), ("reference", "backward")]


def test_libraries_are_asked_before_they_are_chosen(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library refuses, or does not repeat bitwise, is left to the next fastest."""
    monkeypatch.setattr(automatic, "measured", lambda: measured(table))
    monkeypatch.setattr(automatic, "architecture", lambda device: "sm_90")
    shape = Shape(torch.device("cuda", 0), torch.bfloat16, 1, 32, 8, 128, 128)
    intervals = intervals_of(Causal(), 16_384)
    refused = {"library:cudnn": "", "library:flash": "", "library:flash_attn": ""}
    monkeypatch.setattr(FlashKernel, "refusal", lambda self, shape, intervals: refused[self.name])
    assert AUTO.choose(shape, intervals, "forward").kernel == "library:cudnn"
    assert AUTO.choose(shape, intervals, "backward").kernel == "triton", "cuDNN's backward does not repeat"
    refused["library:cudnn"] = "anything"
    assert AUTO.choose(shape, intervals, "forward").kernel == "triton"


def test_explain_says_what_auto_picks_and_why(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"heads": (32, 8), "head_dim": 128, "dtype": torch.bfloat16}

    def lines(**arguments: Any) -> list[str]:
        text = seqpar.plan(Causal(), length=16_384, **arguments).explain()
        return [line for line in text.splitlines() if line.startswith("kernel=")]

    assert lines() == []
    if not torch.cuda.is_available():
        here = "cpu in 1 call(s) (the one for the CPU)"
        assert lines(**told) == [f"kernel='auto' on cpu, {way}: {here}" for way in ("forward", "backward")]
    monkeypatch.setattr(automatic, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(automatic, "measured", dict)
    assert all(line.endswith(": triton in 1 call(s) (not measured on sm_90)") for line in lines(**told))
    monkeypatch.setattr(automatic, "measured", lambda: measured(table))
    monkeypatch.setattr(FlashKernel, "refusal", lambda self, shape, intervals: "")
    forward, backward = lines(**told)
    assert forward.endswith("forward: library:cudnn in 1 call(s) (590 TFLOP/s at 16,384 tokens)")
    assert backward.endswith("backward: triton in 1 call(s) (400 TFLOP/s at 16,384 tokens)")
