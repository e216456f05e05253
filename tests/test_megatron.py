"""Megatron-Core's own GPTModel, trained with our attention on several ranks and with its own on one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from seqpar.integrations.options import AttentionOptions, options_of
from seqpar.integrations.supported import require
from seqpar.launch import megatron as command
from support import jobs_megatron as jobs
from support.ranks import run_gloo

FOUR = ("hierarchical", "double ring", "tp", "tp s2", "pp")
TWO = tuple(name for name in jobs.CASES if name not in FOUR)


@pytest.mark.parametrize(
    ("ranks", "names"), [(1, ("causal", "packed")), (2, TWO), (4, ("causal", "packed", *FOUR))], ids=["1", "2", "4"]
)
def test_losses_and_gradients_are_those_of_megatrons_own_attention(ranks: int, names: tuple[str, ...]) -> None:
    for errors in run_gloo(ranks, jobs.compare, names, timeout=240):
        wrong = {name: error for name, error in errors.items() if not (error[0] <= 1e-5 and error[1] <= 1e-5)}
        assert not wrong
        assert tuple(errors) == names


def test_one_layer_agrees_for_all_and_on_every_batch() -> None:
    # A plan each time, and once for the first attention with each of two plans.
    assert run_gloo(2, jobs.agreements) == [[2, 1, 2]] * 2


def test_every_rank_hears_what_is_wrong_on_one() -> None:
    first, second = run_gloo(2, jobs.refusals)
    expected = [
        "rank 1: seqpar attention got a document of 17 tokens, expected a multiple of 4",
        "seqpar attention got cu_seqlens up to 40 for 48 tokens",
        "rank 1: seqpar attention got an attention_mask of (1, 1, 24, 48) that is not 48 tokens' causal one",
        "rank 1: seqpar attention got 23 tokens on each of 2 ranks",
        "seqpar attention got 24 queries and 12 keys",
        "seqpar attention got attn_mask_type arbitrary, expected causal, padding_causal, no_mask, padding",
    ]
    for heard in (first, second):
        assert [h[: len(e)] for h, e in zip(heard, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("config", "arguments", "options", "message"),
    [
        ({"attention_dropout": 0.1}, {}, {}, "attention_dropout=0.1, expected 0"),
        ({"qk_clip": True}, {}, {}, "qk_clip=True, expected False"),
        ({"fp8_dot_product_attention": True}, {}, {}, "fp8_dot_product_attention=True"),
        ({}, {"attention_type": "cross"}, {}, "attention_type='cross', expected 'self'"),
        ({}, {"cp_comm_type": "p3p"}, {}, "cp_comm_type 'p3p', expected one of p2p, allgather"),
        ({}, {"cp_comm_type": "a2a"}, {"schedule": "ring"}, "--seqpar-schedule ring and --cp-comm-type a2a"),
        ({}, {}, {"schedule": "hybrid"}, "schedule hybrid and sizes None, expected --hierarchical"),
        ({"window_size": (4, 0)}, {}, {"mask": "full"}, "window_size=(4, 0) and mask full, expected one"),
    ],
)
def test_what_is_not_computed_is_refused_before_training(
    config: dict, arguments: dict, options: dict, message: str
) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from seqpar.integrations.megatron import CoreAttention

    asked = {"attention_type": "self", **arguments}
    with jobs.on_cpu(), pytest.raises(ValueError, match=re.escape(message)):
        CoreAttention(
            jobs.config_of(jobs.Case("wrong", config=config)),
            1,
            AttnMaskType.causal,
            options=AttentionOptions(**options),
            **asked,
        )


def test_flags_and_yaml_say_the_same() -> None:
    yaml = SimpleNamespace(seqpar_mask="s2", seqpar_s2_dense_layers=[0], num_layers=2, seqpar_window=None)
    assert options_of(yaml) == AttentionOptions(mask="s2", s2_dense_layers=(0,))
    with pytest.raises(ValueError, match=r"unknown key 'maks'; did you mean 'mask'\?"):
        options_of(SimpleNamespace(seqpar_maks="s2"))


def test_other_versions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"megatron-core: got version 0\.15\.3, expected >=0\.16,<0\.20"):
        require("megatron-core", "0.16", "0.20", got="0.15.3")
    require("megatron-core", "0.16", "0.20", got="0.19.0rc1")


def test_a_script_that_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; name a script of a Megatron-LM checkout"):
        command.prepare([str(tmp_path / "pretrain_gpt.py")])
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("")
    with pytest.raises(ValueError, match="--spec got a layer of your own"):
        command.prepare([str(script), "--spec", "mine", "layer"])
    with pytest.raises(ValueError, match="Megatron-LM can't be imported beside it"):
        command.prepare([str(script)])


def test_megatron_lm_itself(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--megatron-lm")
    if folder is None:
        pytest.skip("needs a checkout of Megatron-LM: --megatron-lm FOLDER")
    alone = _losses(folder, 1, ["--window-size", "7,0"])
    assert len(alone) == 3
    assert alone == _losses(folder, 2, ["--seqpar-mask", "window", "--seqpar-window", "8", "--cp-comm-type", "a2a"])


ARGUMENTS = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 1 --global-batch-size 2 --train-iters 3 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer
--vocab-size 127 --distributed-backend gloo --transformer-impl local --attention-dropout 0 --hidden-dropout 0
--no-bias-dropout-fusion --no-gradient-accumulation-fusion --no-masked-softmax-fusion --use-cpu-initialization
--no-persist-layer-norm --no-bias-gelu-fusion --no-rope-fusion --position-embedding-type rope --log-interval 1
--eval-iters 0 --eval-interval 100 --clip-grad 0 --no-create-attention-mask-in-dataloader
"""


ONES = ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE")


def _losses(folder: str, ranks: int, arguments: list[str]) -> list[float]:
    """Of each step of pretrain_gpt.py, on so many context-parallel ranks."""
    driver = Path(__file__).parent / "support" / "megatron_lm.py"
    launch = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(ranks)]
    script = ["pretrain_gpt.py", "--context-parallel-size", str(ranks), *shlex.split(ARGUMENTS), *arguments]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(driver), *script],
        cwd=folder,
        env={**os.environ, **dict.fromkeys(ONES, "1")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, "\n".join(re.findall(r"^\[rank.*", run.stderr, re.M)) or run.stderr[-4000:]
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", run.stdout)]
