"""seqpar inside DeepSpeed: losses and gradients of one plain rank at every ZeRO stage, its attention, its mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.example import run_example
from support.jobs_deepspeed import (
    beside_an_mpu,
    in_turn,
    instead_of_deepspeeds_attention,
    refused_by_deepspeed,
    train_deepspeed,
)
from support.ranks import run_gloo

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'seqpar[deepspeed]'")

TWO = {"sequence_parallel_size": 2}


def check_training(ranks: list[dict[int, Any]], stages: set[int]) -> None:
    """10 steps' losses and the first step's gradients, on every rank."""
    for worst in ranks:
        assert worst.keys() == stages
        for stage, (loss, gradient) in worst.items():
            assert loss <= 1e-4, stage
            assert gradient <= 1e-5, stage


def test_one_rank(tmp_path: Path) -> None:
    check_training(run_gloo(1, train_deepspeed, {2: {"layout": "contiguous"}}, str(tmp_path)), {2})


def test_two_ranks_train_attend_and_are_refused(tmp_path: Path) -> None:
    """ZeRO 0, 1 and 3 over two sequence ranks; `DistributedAttention` against DeepSpeed's own; mistakes."""
    jobs = [
        (train_deepspeed, ({0: {}, 1: {"schedule": "ulysses"}, 3: {}}, str(tmp_path))),
        (instead_of_deepspeeds_attention, ()),
        (refused_by_deepspeed, ()),
    ]
    ranks = run_gloo(2, in_turn, jobs)
    check_training([training for training, _, _ in ranks], {0, 1, 3})
    assert max(worst for _, worst, _ in ranks) <= 1e-5
    told = ranks[0][2]
    assert told == ranks[1][2]
    expected = {
        "key": "unknown key 'sequence_parallel'; did you mean 'sequence_parallel_size'? expected keys among schedule, ",
        "value": 'section "seqpar" of the DeepSpeed config: window: got None with mask window',
        "one rank's": "deepspeed.initialize: ranks disagree on seqpar: got DeepSpeedOptions(",
        "size": "sequence_parallel_size: got 3 for 2 ranks, expected a divisor of 2",
        "mpu": "mpu: got object, expected None",
        "mesh": "mesh_param: got tuple, expected None",
        "top": 'sequence_parallel_size: got 2 at the top of the config, expected it in "seqpar" alone',
        "predivided": "gradient_predivide_factor: got 2.0, expected 1.0",
        "tensor parallel": "tensor_parallel.autotp_size: got 2, expected 0",
        "mics": "zero_optimization.mics_shard_size: got 2, expected -1",
        "quantized": "zero_optimization.zero_quantized_gradients: got True, expected False",
        "not scattered": "zero_optimization.reduce_scatter: got False, expected True",
        "other model": "model: got Linear with attn_implementation=None, expected a transformers model loaded with",
        "other attention": "for other models call deepspeed.initialize with mpu=SequenceParallel() and give layers",
        "kernel": "kernel: got 'reference', expected 'auto' for transformers models",
        "no config": "config: got NoneType, expected a dict or the path of a JSON file",
        "two configs": "config: got one here and another in args.deepspeed_config",
        "mpu's size": "sequence_parallel_size: got 3 for 2 ranks, expected a divisor of 2",
        "local attention": "local_attention: got Identity, expected None for causal attention, a mask",
        "scatter": "scatter_idx, gather_idx: got 1, 0, expected 2 (heads) and 0 or 1 (tokens)",
        "gather": "scatter_idx, gather_idx: got 2, 2, expected",
        "stream": "sp_stream: got a stream, expected None",
        "layers": "s2_dense_layers: got (1,), expected none; give those layers seqpar.Causal()",
        "rotary": "rotary_pos_emb: got tuple, expected none",
        "argument": "further arguments: got tuple, expected none",
        "keyword": "attn_mask: got Tensor, expected none",
        "axis": "and batch_dim_idx 2, expected 4 dims each, [batch, tokens, heads, head_dim] for 0",
        "dims": "got (6, 4, 8), (6, 4, 8), (6, 4, 8) and batch_dim_idx 0, expected 4 dims each",
        "heads": "num_kv_heads: got 4 and keys of 2 heads, expected as many",
        "kernel of a layer": "kernel='library': got tensors on cpu, expected CUDA",
        "uneven": "ranks disagree on length: got 12 on rank 0, 10 on rank 1",
        "version": "deepspeed: got version 0.20.1, expected >=0.19,<0.20",
    }
    assert expected.keys() == told.keys()
    for name, text in expected.items():
        assert text in told[name], name


def test_two_sequences_over_two_ranks_each(tmp_path: Path) -> None:
    """ZeRO 2 and 3 beside data parallelism; and a model that is not of transformers, with our mpu and attention."""
    jobs = [(train_deepspeed, ({2: TWO, 3: TWO}, str(tmp_path))), (beside_an_mpu, ((1, 3),))]
    ranks = run_gloo(4, in_turn, jobs)
    check_training([training for training, _ in ranks], {2, 3})
    assert max(worst for _, worst in ranks) <= 1e-5


def test_the_example_learns(tmp_path: Path) -> None:
    printed = run_example("deepspeed_finetune.py", 2, tmp_path, "--rows", 16, "--length", 301)
    losses = [float(x) for x in re.findall(r"^micro-step \d+ loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 16
    assert losses[0] == pytest.approx(5.55, abs=0.1)
    assert losses[-1] < 5
