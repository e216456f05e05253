"""The CPU's attention of few queries: compiled in one pass, and by PyTorch alone, against the reference in fp64."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from seqpar.kernels import Intervals, Partial, cpu, few_queries_cpu, kernel_named
from support.blocks import assert_exact, generator

pytest.importorskip("numba", reason="needs Numba")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``compiled``: whatever its size; ``torch``: as if Numba were not installed.

    PyTorch's flash kernel still takes triangles, a few keys; where it took more of bf16, errors would be a hundred
    times as large as what is allowed the compiled way.
    """
    monkeypatch.setattr(few_queries_cpu, "WORTH", 0)
    monkeypatch.setattr(few_queries_cpu, "CHUNK", 192)  # several chunks for few keys
    if request.param == "torch":
        monkeypatch.setattr(few_queries_cpu, "has_numba", lambda: False)
    else:
        monkeypatch.setattr(cpu, "two_products", None)  # must not be taken
    return request.param


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, major: str = "head", batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of ``(queries, keys, heads, KV heads, D, Dv)``; K and V lie as ``[B, Hkv, T, D]``, or by token."""
    queries, keys, heads, kv_heads, dim, value_dim = shape
    g = generator(sum(shape))
    q = torch.randn(batch, queries, heads, dim, generator=g).to(dtype)
    if major == "head":
        k, v = (torch.randn(batch, kv_heads, keys, n, generator=g).to(dtype).transpose(1, 2) for n in (dim, value_dim))
    else:
        both = torch.randn(batch, keys, kv_heads, dim + value_dim + 1, generator=g).to(dtype)
        k, v = both[..., :dim], both[..., dim : dim + value_dim]
    return q, k, v


def steps(batch: int, groups: int, queries: int, start: int, end: int, step: tuple[int, int] = (0, 0)) -> Intervals:
    """The same for all rows and heads; the bounds grow by ``step`` per query."""
    i = torch.arange(queries, dtype=torch.int32)
    return Intervals((start + step[0] * i).expand(batch, groups, -1), (end + step[1] * i).expand(batch, groups, -1))


def assert_as_reference(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, bound: float, scale: float | None = None
) -> Partial:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    want = kernel_named("reference").forward(q.double(), k.double(), v.double(), intervals, scale, None)
    got = kernel_named("cpu").forward(q, k, v, intervals, scale, None)
    assert torch.equal(got.lse == -torch.inf, want.lse == -torch.inf)
    seen = want.lse > -torch.inf
    assert_exact(got.out, want.out, bound)
    assert not got.out.transpose(1, 2)[~seen].any()
    if seen.any():
        assert_exact(got.lse[seen], want.lse[seen], 1e-5 if bound < 1e-4 else 1e-3)
    return got


def bound_of(dtype: torch.dtype, way: str) -> float:
    """What the compiled way computes from bf16 is as exact as from fp32."""
    return 1e-2 if (dtype, way) == (torch.bfloat16, "torch") else 1e-5


@DTYPES
@pytest.mark.parametrize("way", ["compiled", "torch"], indirect=True)
@pytest.mark.parametrize(
    "shape",
    [(1, 1000, 8, 2, 128, 128), (1, 301, 3, 3, 64, 64), (3, 67, 10, 2, 33, 33), (2, 513, 8, 1, 40, 24),
     (8, 200, 4, 2, 16, 40), (1, 1, 2, 1, 8, 8), (5, 193, 6, 1, 7, 5)],
    ids=["gqa4", "mha", "odd_dim", "mqa8_narrow_v", "eight_wide_v", "one_key", "mqa30"],
)  # fmt: skip
@pytest.mark.parametrize("major", ["head", "token"])
def test_shapes_and_strides(shape: tuple[int, ...], major: str, dtype: torch.dtype, way: str) -> None:
    q, k, v = tensors(shape, dtype, major)
    assert_as_reference(q, k, v, steps(1, 1, shape[0], 0, shape[1]), bound_of(dtype, way))


@DTYPES
@pytest.mark.parametrize("way", ["compiled", "torch"], indirect=True)
def test_rows_of_unequal_lengths_windows_and_empty_rows(dtype: torch.dtype, way: str) -> None:
    """What a row does not see is NaN: neither its own keys outside the interval, nor those of a longer row."""
    q, k, v = tensors((4, 700, 8, 2, 32, 32), dtype, batch=5)
    start = torch.tensor([0, 130, 5, 699, 77], dtype=torch.int32)
    end = torch.tensor([700, 500, 5, 700, 80], dtype=torch.int32)
    for row, (a, b) in enumerate(zip(start, end, strict=True)):
        for x in (k, v):
            x[row, :a], x[row, b:] = torch.nan, torch.nan
    intervals = Intervals(*(x.view(-1, 1, 1).expand(-1, 1, 4) for x in (start, end)))
    some = start < end
    want = kernel_named("reference").forward(
        q.double(), k.double().nan_to_num(), v.double().nan_to_num(), intervals, 0.2, None
    )
    got = kernel_named("cpu").forward(q, k, v, intervals, 0.2, None)
    assert_exact(got.out, want.out, bound_of(dtype, way))
    assert_exact(got.lse[some], want.lse[some], 1e-3)
    assert (got.lse[~some] == -torch.inf).all()
    assert not got.out[~some].any()


@DTYPES
@pytest.mark.parametrize("way", ["compiled", "torch"], indirect=True)
@pytest.mark.parametrize("groups", [1, 2, 8], ids=["all_heads", "kv_heads", "query_heads"])
@pytest.mark.parametrize("step", [(0, 1), (1, 1), (3, 2)], ids=["causal", "window", "growing"])
def test_each_query_has_its_own_keys(step: tuple[int, int], groups: int, dtype: torch.dtype, way: str) -> None:
    q, k, v = tensors((6, 420, 8, 2, 16, 16), dtype)
    intervals = steps(1, groups, 6, 3, 400, step)
    if groups > 1:  # heads differ, a little and much
        shift = torch.arange(groups, dtype=torch.int32).view(1, -1, 1)
        intervals = Intervals(intervals.start + shift, intervals.end - 40 * shift)
    triangle = dtype == torch.bfloat16 and step == (0, 1)
    assert_as_reference(q, k, v, intervals, max(bound_of(dtype, way), 5e-4 if triangle else 0.0))


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_masked_rows_without_keys_among_those_that_have_some(way: str) -> None:
    """The first queries see nothing of a masked piece; a whole block of keys is hidden from others."""
    q, k, v = tensors((4, 300, 4, 2, 16, 16), torch.float32)
    start = torch.tensor([0, 0, 150, 290], dtype=torch.int32).view(1, 1, -1)
    end = torch.tensor([0, 3, 160, 300], dtype=torch.int32).view(1, 1, -1)
    assert_as_reference(q, k, v, Intervals(start, end), 1e-5)


@pytest.mark.parametrize("way", ["compiled", "torch"], indirect=True)
@pytest.mark.parametrize("peak", [1.0, 8.0, 40.0])
def test_bf16_is_as_exact_as_pytorch_s(peak: float, way: str) -> None:
    """Scores of up to about 4, 30 and 150; the error of PyTorch's own bf16 attention is the measure."""
    q, k, v = tensors((1, 4096, 8, 2, 64, 64), torch.bfloat16, batch=1)
    q = q * peak
    got = kernel_named("cpu").forward(q, k, v, steps(1, 1, 1, 0, 4096), 0.125, None)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    want = scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True, scale=0.125)
    theirs = scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.125)
    ours = (got.out.transpose(1, 2) - want).norm() / want.norm()
    assert ours <= (2 if way == "torch" else 0.1) * (theirs - want).norm() / want.norm()


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("score", [1e4, -1e4, 0.0])
def test_extreme_scores(score: float, way: str) -> None:
    q, k, v = torch.ones(1, 1, 4, 1), torch.full((1, 300, 1, 1), score), torch.ones(1, 300, 1, 1)
    k[:, 200:] += 1.0
    assert_as_reference(q, k, v, steps(1, 1, 1, 0, 300), 1e-5, scale=1.0)


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("where", [0, 100, 299])
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_is_not_swallowed(which: str, where: int, way: str) -> None:
    q, k, v = tensors((1, 300, 2, 1, 16, 16), torch.float32, batch=1)
    (k if which == "k" else v)[0, where, 0, 3] = torch.nan
    out = kernel_named("cpu").forward(q, k, v, steps(1, 1, 1, 0, 300), 0.25, None).out
    assert out.isnan().any(-1).all()


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_is_not_positive(scale: float, way: str) -> None:
    q, k, v = tensors((2, 300, 4, 2, 16, 16), torch.float32)
    assert_as_reference(q, k, v, steps(1, 1, 2, 0, 300), 1e-5, scale)


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_a_carry_is_continued(way: str) -> None:
    q, k, v = tensors((2, 600, 4, 2, 16, 16), torch.bfloat16)
    kernel, both = kernel_named("cpu"), steps(1, 1, 2, 0, 600)
    first = kernel.forward(q, k[:, :250], v[:, :250], steps(1, 1, 2, 0, 250), 0.25, None)
    after = kernel.forward(q, k[:, 250:], v[:, 250:], steps(1, 1, 2, 0, 350), 0.25, first)
    want = kernel_named("reference").forward(q.double(), k.double(), v.double(), both, 0.25, None)
    assert_exact(after.out, want.out, 1e-5)
    assert_exact(after.lse, want.lse, 1e-5)


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_the_same_bits_on_any_number_of_threads(way: str) -> None:
    q, k, v = tensors((1, 2000, 8, 2, 64, 64), torch.bfloat16)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(kernel_named("cpu").forward(q, k, v, steps(1, 1, 1, 0, 2000), 0.1, None).out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_work_is_done_once_wherever_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two callers at once share the threads; an error of any item reaches its caller."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    done: list[list[int]] = [[], []]
    callers = [threading.Thread(target=few_queries_cpu._on_all_threads, args=(numbers.append, 500)) for numbers in done]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [sorted(numbers) for numbers in done] == [list(range(500))] * 2

    def fail(item: int) -> None:
        if item == 7:
            raise ArithmeticError(item)

    with pytest.raises(ArithmeticError):
        few_queries_cpu._on_all_threads(fail, 20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    few_queries_cpu._on_all_threads(lambda _: None, 50)
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        few_queries_cpu._on_all_threads(seen.append, 50)
        os._exit(0 if sorted(seen) == list(range(50)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_small_or_of_another_dtype_is_left_to_pytorch() -> None:
    big = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, few_queries_cpu.WORTH, 1, 1)
    q = torch.empty(1, 1, 4, 1)
    assert few_queries_cpu.takes(q, big, big)
    assert few_queries_cpu.takes(q, big.float(), big.float())
    assert not few_queries_cpu.takes(q, big[:, 1:], big)
    assert not few_queries_cpu.takes(q, big, big.float())
    assert not few_queries_cpu.takes(q.expand(-1, 9, -1, -1), big, big)
    assert not few_queries_cpu.takes(q, big.half(), big.half())
    assert not few_queries_cpu.takes(q, big.double(), big.double())
