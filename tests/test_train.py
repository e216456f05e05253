"""`seqpar train`: the same run on any number of ranks, and continued on any other."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest

from seqpar.launch.manifest import checkpoints, whole_checkpoints
from support.train import SMALL, Finished, Run, fork_ranks, losses, metrics, once, write_texts

STEPS = 20
LAYOUTS = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "4": (4, 4), "2x2": (4, 2)}
"""Ranks, and how many of them share a sequence, of each run."""
OTHERWISE: dict[str, tuple[object, ...]] = {
    "layout": ("--layout", "contiguous"),
    "exchange": ("--exchange", "forward"),
    "weight decay": ("--weight-decay", 20),
    "clipping": ("--grad-clip", 1e-4),
    "rate": ("--lr", 1e-4),
    "bf16": ("--dtype", "bf16", "--verify"),
}
"""Runs of two ranks that differ in one option."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest's workers, so that the runs are made once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "train"


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Finished]:
    """Finished runs that differ in their ranks alone, each in a folder of its name; and some other ones."""
    with once(folder / "texts") as first:
        if first:
            write_texts(folder / "data")
            write_texts(folder / "other data", documents=5)

    def run(name: str, ranks: int, *options: object) -> Run:
        return Run(ranks=ranks, options=_options(folder / "data", folder / name, *options))

    wanted = {name: run(name, ranks, "--sp", sp, "--verify") for name, (ranks, sp) in LAYOUTS.items()}
    wanted["full"] = run("full", 2, "--checkpoint-activations", "full")
    wanted["selective"] = run("selective", 2, "--checkpoint-activations", "selective")
    wanted |= {name: run(name, 2, *options) for name, options in OTHERWISE.items()}
    wanted["auto"] = run("auto", 2, "--schedule", "auto", "--layout", "auto")
    wanted["ulysses"] = run("ulysses", 3, "--schedule", "ulysses", "--layout", "balanced")
    wanted["window"] = run("window", 3, "--mask", "window", "--window", 50, "--verify")
    sparse = ("--mask", "s2", "--s2-block", 16, "--s2-local", 1, "--verify")
    wanted["s2"] = run("s2", 3, *sparse)
    wanted["s2 and dense"] = run(
        "s2 and dense", 2, *sparse, "--s2-dense-heads", 1, "--s2-stride", 3, "--s2-dense-layers", 0
    )
    return dict(zip(wanted, fork_ranks(list(wanted.values()), folder / "first"), strict=True))


@pytest.fixture(scope="module")
def resumed(folder: Path, runs: dict[str, Finished]) -> dict[str, Finished]:
    """Attempts to continue the run of two ranks from its middle, each in a folder of its name."""

    def attempt(name: str, *options: object, ranks: int = 2, largest_file: int | None = None) -> Run:
        options = tuple(_options(folder / "data", folder / f"resumed {name}", "--resume", *options))
        return Run(ranks=ranks, options=options, largest_file=largest_file)

    wanted = {
        "same ranks": attempt("same ranks"),
        "other ranks": attempt("other ranks", ranks=3),
        "truncated": attempt("truncated"),
        "only one kept": attempt("only one kept", "--keep", 1, "--steps", 15, "--save-every", 5, "--weight-decay", 20),
        "all truncated": attempt("all truncated"),
        "full disk": attempt("full disk", largest_file=100_000),
        "seed": attempt("seed", "--seed", 7),
        "seq_len": attempt("seq_len", "--seq-len", 332),
        "batch_size": attempt("batch_size", "--batch-size", 4),
        "data": attempt("data", "--data", folder / "other data"),
        "model head_dim": attempt("model head_dim", "--preset", "small"),
    }
    begun = ("--mask", "s2", "--s2-block", 16, "--s2-local", 2, "--init")
    others = {
        "weights of another": _options(folder / "data", folder / "s2 from dense", *begun, folder / "2", "--steps", 2),
        "weights of another shape": _options(
            folder / "data", folder / "s2 from small", "--preset", "small", *begun, folder / "2"
        ),
    }
    with once(folder / "interrupted") as first:
        for name in wanted if first else ():
            _interrupt(
                folder / "2",
                folder / f"resumed {name}",
                truncate={"truncated": 1, "only one kept": 1, "all truncated": 2}.get(name),
            )
    wanted |= {name: Run(ranks=2, options=tuple(options)) for name, options in others.items()}
    return dict(zip(wanted, fork_ranks(list(wanted.values()), folder / "second"), strict=True))


def _interrupt(run: Path, out: Path, truncate: int | None) -> None:
    """Copy a run without its last checkpoint, or with that many of its last checkpoints truncated."""
    shutil.copytree(run, out)
    checkpoints = sorted((out / "checkpoints").iterdir())
    if truncate is None:
        shutil.rmtree(checkpoints[-1])
    for checkpoint in checkpoints[-truncate:] if truncate is not None else ():
        shard = checkpoint / "__1_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-100])


def _options(data: Path, out: Path, *more: object) -> list[object]:
    steps = ("--steps", STEPS, "--warmup", 5, "--save-every", 10, "--eval-every", 10)
    return [*SMALL, "--data", data, "--out", out, *steps, *more]


def test_every_run_ends_well(runs: dict[str, Finished]) -> None:
    for name, run in runs.items():
        assert set(run.codes) == {0}, f"{name}: {run.output}"


@pytest.mark.parametrize("name", ["2", "3", "4", "2x2", "full", "selective", "auto", "ulysses"])
def test_ranks_and_checkpointing_leave_the_losses_alone(name: str, folder: Path, runs: dict[str, Finished]) -> None:
    assert losses(folder / name) == pytest.approx(losses(folder / "1"), rel=1e-4)
    held_out = [line["eval_loss"] for line in metrics(folder / name) if "eval_loss" in line]
    assert len(held_out) == 2
    assert held_out == pytest.approx([line["eval_loss"] for line in metrics(folder / "1") if "eval_loss" in line], 1e-4)


@pytest.mark.parametrize("name", ["layout", "exchange"])
def test_movement_options_change_bytes_and_nothing_else(name: str, folder: Path, runs: dict[str, Finished]) -> None:
    plain, other = (metrics(folder / run)[0]["bytes_by_kind"]["kv"] for run in ("2", name))
    assert plain != other
    assert losses(folder / name) == pytest.approx(losses(folder / "2"), rel=1e-4)


@pytest.mark.parametrize("name", ["weight decay", "clipping", "rate", "bf16"])
def test_options_of_the_optimizer_and_precision_are_heard(name: str, folder: Path, runs: dict[str, Finished]) -> None:
    plain, other = losses(folder / "2"), losses(folder / name)
    assert other[0] == pytest.approx(plain[0], rel=1e-2)
    assert max(abs(a - b) / b for a, b in zip(other, plain, strict=True)) > 1e-4


def test_the_rate_rises_and_falls_along_a_cosine(folder: Path, runs: dict[str, Finished]) -> None:
    rates = [line["lr"] for line in metrics(folder / "2")]
    assert rates[:5] == pytest.approx([3e-3 * (step + 1) / 5 for step in range(5)])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[12] == pytest.approx(3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 15))))


def test_the_loss_falls(folder: Path, runs: dict[str, Finished]) -> None:
    first, *_, last = losses(folder / "4")
    assert first > 5
    assert last < 4


@pytest.mark.parametrize("name", [*LAYOUTS, "window", "s2", "s2 and dense"])
def test_the_first_step_equals_the_unsharded_one(name: str, folder: Path, runs: dict[str, Finished]) -> None:
    verified = metrics(folder / name)[0]["verified"]
    assert verified["loss_difference"] < 1e-6
    assert verified["gradient_difference"] < 1e-5
    assert "passed: largest of 21 gradients" in runs[name].output


def test_a_run_begins_with_the_weights_of_another(folder: Path, resumed: dict[str, Finished]) -> None:
    """A dense model goes on sparsely-sharded: its first loss is near the dense run's last, not random weights' one."""
    assert resumed["weights of another"].codes == [0, 0], resumed["weights of another"].output
    (first, *_), dense = losses(folder / "s2 from dense"), losses(folder / "2")
    assert abs(first - dense[-1]) < 0.2 * (dense[0] - dense[-1])
    run = resumed["weights of another shape"]
    assert set(run.codes) == {2}
    assert "was made with model" in run.output
    assert "expected the same" in run.output


def test_metrics_name_bytes_memory_and_speed(folder: Path, runs: dict[str, Finished]) -> None:
    for name, (size, _) in LAYOUTS.items():
        for line in metrics(folder / name):
            assert line["peak_memory_bytes"] > 1e7
            assert line["tokens_per_second"] > 0
            assert line["tokens"] == metrics(folder / "1")[line["step"] - 1]["tokens"]
            assert (line["bytes_sent"] > 0) == (size > 1)
            assert line["bytes_sent"] == sum(line["bytes_by_kind"].values())


def test_a_selective_checkpoint_sends_nothing_twice(folder: Path, runs: dict[str, Finished]) -> None:
    plain, selective, full = (metrics(folder / name)[-1]["bytes_by_kind"] for name in ("2", "selective", "full"))
    assert selective["kv"] == plain["kv"]
    assert full["kv"] > plain["kv"]


def test_a_run_leaves_a_plot_and_its_last_checkpoints(folder: Path, runs: dict[str, Finished]) -> None:
    assert (folder / "2" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "2" / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000020",
    ]


def test_resume_is_exact_on_as_many_ranks(folder: Path, resumed: dict[str, Finished]) -> None:
    assert resumed["same ranks"].codes == [0, 0], resumed["same ranks"].output
    assert losses(folder / "resumed same ranks") == losses(folder / "2")


def test_resume_on_another_number_of_ranks(folder: Path, resumed: dict[str, Finished]) -> None:
    assert resumed["other ranks"].codes == [0, 0, 0], resumed["other ranks"].output
    assert losses(folder / "resumed other ranks") == pytest.approx(losses(folder / "2"), rel=1e-4)


def test_a_truncated_checkpoint_gives_way_to_the_last_whole_one(folder: Path, resumed: dict[str, Finished]) -> None:
    run = resumed["truncated"]
    assert run.codes == [0, 0], run.output
    assert "step-00000020 is not whole and is passed over" in run.output
    assert "resumed after step 10" in run.output
    assert losses(folder / "resumed truncated") == losses(folder / "2")


def test_pruning_keeps_whole_checkpoints(folder: Path, resumed: dict[str, Finished]) -> None:
    """A truncated checkpoint of a later step does not count, and does not stay."""
    run = resumed["only one kept"]
    assert run.codes == [0, 0], run.output
    kept = folder / "resumed only one kept" / "checkpoints"
    assert whole_checkpoints(kept) == [kept / "step-00000015"]
    assert checkpoints(kept) == whole_checkpoints(kept)


def test_changed_options_take_effect_and_are_said(folder: Path, resumed: dict[str, Finished]) -> None:
    output = resumed["only one kept"].output
    assert "--weight-decay is 20.0 from here on; it was 0.1" in output
    assert "--steps is 15 from here on; it was 20" in output
    assert losses(folder / "resumed only one kept")[11:] != losses(folder / "2")[11:15]


def test_no_whole_checkpoint_is_an_error(resumed: dict[str, Finished]) -> None:
    run = resumed["all truncated"]
    assert run.codes == [2, 2], run.output
    assert "rank 1: error: --resume found no whole checkpoint under" in run.output
    assert "Traceback" not in run.output


def test_a_failed_save_keeps_the_last_whole_checkpoint(folder: Path, resumed: dict[str, Finished]) -> None:
    run = resumed["full disk"]
    assert run.codes == [1, 1], run.output
    kept = folder / "resumed full disk" / "checkpoints" / "step-00000010"
    errors = [line for line in run.output.splitlines() if "error: " in line]
    assert len(errors) == 2
    for line in errors:
        assert "step-00000020 can't be written: rank" in line
        assert f"the last whole one is {kept}: free space or mend the folder, then --resume" in line
    assert "Traceback" not in run.output


@pytest.mark.parametrize("field", ["seed", "seq_len", "batch_size", "data", "model head_dim"])
def test_resume_refuses_another_run_and_names_the_field(field: str, resumed: dict[str, Finished]) -> None:
    run = resumed[field]
    assert run.codes == [2, 2], run.output
    assert f"was made with {field} " in run.output
    assert "Traceback" not in run.output
