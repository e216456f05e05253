"""Megatron-Core's own GPTModel, trained with our attention on several ranks and with its own on one."""

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import seqpar
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


def test_one_layer_agrees_batches_bring_groups_and_every_rank_hears_what_is_wrong_on_one() -> None:
    for agreements, worst, heard in run_gloo(2, jobs.small):
        # A plan each time, and once for the first attention with each of two plans.
        assert agreements == [2, 1, 2]
        assert worst <= 1e-5
        expected = [
            "rank 1: seqpar attention got a document of 17 tokens, expected a multiple of 4",
            "seqpar attention got cu_seqlens up to 40 for 48 tokens",
            "rank 1: seqpar attention got an attention_mask of (1, 1, 24, 48) that is not the causal one of 48 tokens",
            "rank 1: seqpar attention got 23 tokens on each of 2 ranks",
            "seqpar attention got 24 queries and 12 keys",
            "seqpar attention got attn_mask_type arbitrary, expected causal, padding_causal, no_mask, padding",
            "seqpar attention got local_cp_size 2 without a cp_group, expected both, or a size of 1",
            "the script built a model of other layers than --spec seqpar.integrations.megatron layer names",
            "nothing about 8",
        ]
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
        ({}, {}, {"schedule": "hybrid"}, "schedule hybrid, sizes None, expected --hierarchical"),
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


@pytest.mark.parametrize(
    ("told", "options", "schedule"),
    [
        (None, {}, seqpar.Ring()),
        ("p2p", {"exchange": "direct"}, seqpar.Ring("direct")),
        ("p2p", {"schedule": "ulysses"}, "ulysses"),
        ("all_gather", {}, "allgather"),
        ("a2a", {"schedule": "ulysses"}, "ulysses"),
        ("a2a+p2p", {}, seqpar.Ulysses(degree=2)),
        ("p2p", {"schedule": "double_ring"}, seqpar.DoubleRing(degree=2)),
        ("p2p", {"schedule": "hybrid", "degree": 4}, seqpar.Ulysses(degree=4)),
    ],
)
def test_schedules_are_those_of_megatrons_flags(told: str | None, options: dict, schedule: object) -> None:
    from seqpar.integrations.megatron import _schedule

    config = jobs.config_of(jobs.Case("sizes", config={"hierarchical_context_parallel_sizes": [2, 4]}))
    given = AttentionOptions(**options)
    assert replace(given, **_schedule(given, told, config)).schedule_object == schedule


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


def test_megatron_lm_itself_on_two_nodes(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--megatron-lm")
    if folder is None:
        pytest.skip("needs a checkout of Megatron-LM: --megatron-lm FOLDER")
    alone = _losses(folder, 1, ["--window-size", "7,0"])
    assert len(alone) == 3
    assert alone == _losses(folder, 2, ["--seqpar-mask", "window", "--seqpar-window", "8"])


# The example's model made small, and what Megatron does with a GPU alone left out.
SMALL = """
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 --seq-length 64
--max-position-embeddings 64 --global-batch-size 2 --train-iters 3 --lr 1e-3 --vocab-size 127 --eval-interval 100
--distributed-backend gloo --transformer-impl local --use-cpu-initialization --no-persist-layer-norm --no-rope-fusion
--no-bias-dropout-fusion --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
--clip-grad 0 --seqpar-schedule ring
"""


def _losses(folder: str, nodes: int, arguments: list[str]) -> list[float]:
    """Of each step of examples/megatron_lm.sh, on so many nodes of one rank."""
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    said = {"NODES": nodes, "PORT": port, "GPUS": 1, "PRECISION": "", "OMP_NUM_THREADS": 1, "TORCHDYNAMO_DISABLE": 1}
    said["RUN"] = f"{sys.executable} {here / 'support' / 'megatron_lm.py'}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["sh", str(here.parent / "examples" / "megatron_lm.sh"), *shlex.split(SMALL), *arguments]
    runs = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **{name: str(value) for name, value in said.items()}, "NODE": str(node), "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]
    try:
        outputs = [run.communicate(timeout=300)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * nodes, "\n".join(output[-4000:] for output in outputs)
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", "".join(outputs))]
