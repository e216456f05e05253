"""A gradient that is not finite never reaches the weights, nor a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seqpar.launch import train
from seqpar.launch.config import TrainConfig
from seqpar.launch.errors import RunError
from seqpar.launch.manifest import whole_checkpoints
from seqpar.launch.spawn import alone
from support.train import write_texts


def test_an_infinite_gradient_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the loss is finite: the third step's gradient is made infinite."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spoiled(parameters: object, largest: float) -> torch.Tensor:
        norms.append(clip(parameters, largest))
        return norms[-1] * (float("inf") if len(norms) == 3 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    config = TrainConfig(
        data=(write_texts(tmp_path / "data"),),
        out=tmp_path / "out",
        preset="tiny",
        seq_len=200,
        steps=5,
        save_every=1,
        keep=5,
        threads=1,
    )
    with alone() as place, pytest.raises(RunError, match=r"step 3 has loss .* and gradient norm inf, expected finite"):
        train.run(config, place)
    saved = whole_checkpoints(tmp_path / "out" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002", "step-00000001"]
