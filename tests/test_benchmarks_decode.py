"""The benchmark of decoding, on small sizes: contenders agree and send what it says, and its prediction makes sense."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.ranks import run_gloo

FOLDER = Path(__file__).parents[1] / "benchmarks"
CONTEXT = 512


@pytest.fixture(scope="module")
def decode() -> Iterator[ModuleType]:
    """The benchmark, which finds its neighbours as a script does; gone again, for other tests load them too."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("decode")  # ranks import it from there too
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("decode", "simulate", "schedules", "measuring"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
def test_contenders_agree_and_send_what_they_say(ranks: int, dtype: torch.dtype, decode: ModuleType) -> None:
    results = run_gloo(ranks, decode.first_steps, CONTEXT, dtype)
    (heads, _), dim, size = decode.HEADS, decode.DIM, dtype.itemsize
    whole = oracle(decode, ranks, dtype)
    # In bf16 partials are rounded on their way, and then the result: half a unit in the last place, twice.
    close = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-8}
    row = CONTEXT // ranks * decode.HEADS[1] * dim * 2 * size
    for rank, found in enumerate(results):
        for name in ("ours", "published") if rank else ("ours", "published", "forward", "direct"):
            torch.testing.assert_close(torch.from_numpy(found[name][0]), whole, **close)
        assert (found["ours"][0] == results[0]["ours"][0]).all()
        assert found["again"][1:] == (1, (ranks - 1) * (size * heads * dim + 4 * heads))
        assert found["published"][1:] == (3, 2 * (ranks - 1) * (4 * heads * dim + 8 * heads) // ranks)
        assert found["direct"][2] >= (row if rank else 0)
    assert max(found["forward"][2] for found in results) >= (ranks - 1) * row


def oracle(decode: ModuleType, ranks: int, dtype: torch.dtype) -> torch.Tensor:
    """Dense attention in fp64 to all ranks' keys and the new one."""
    (query, new), generator = decode.token(dtype), torch.Generator()
    keys = [new]
    for rank in range(ranks):
        shape = (1, CONTEXT // ranks, decode.HEADS[1], decode.DIM)
        keys.append(torch.randn(shape, generator=generator.manual_seed(rank)).to(dtype))
    k = torch.cat(keys, 1).double().transpose(1, 2).repeat_interleave(decode.HEADS[0] // decode.HEADS[1], 1)
    scores = query.double().transpose(1, 2) @ k.transpose(2, 3) * decode.DIM**-0.5
    return (scores.softmax(-1) @ k).transpose(1, 2).float()


def test_a_context_that_leaves_ranks_uneven_is_refused(decode: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^context: got 1000, expected a multiple of 64, a page for each rank$"):
        decode.cached(decode.seqpar.comm.connect(None), 1000, torch.float32)


def test_prediction_makes_sense(decode: ModuleType) -> None:
    rows = decode.simulated()
    assert len(rows) == 25
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    ring = {(row["context"], row["GPUs"]): row["ring, us"] for row in rows}
    for row in rows:
        flat, nested = row["tree, us"], row["tree, nodes first, us"]
        assert nested == flat if row["GPUs"] == decode.NODE else nested < flat
        assert nested < row["three all-reduces, us"] < row["ring, us"]
        assert row["ring / ours"] == pytest.approx(row["ring, us"] / min(flat, nested))
    for gpus in (8, 32, 128, 512, 1024):
        times = [ring[context, gpus] for context in contexts]
        assert times == sorted(set(times)), "a ring's time grows with the context"


def test_an_all_reduce_takes_the_faster_way(decode: ModuleType) -> None:
    assert decode.all_reduce_seconds(0, 8, 1.0, 1.0) == 3.0
    assert decode.all_reduce_seconds(512, 1, 1.0, 1.0) == 0.0
    assert decode.all_reduce_seconds(1 << 20, 8, 0.0, 1.0) == 2 * (1 << 20) * 7 / 8
