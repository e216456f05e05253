"""The comparison behind `seqpar train --verify`: what passes, and that each kind of mistake fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar.launch.verify import compare

EXPECTED = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0]]), "unused": torch.zeros(2)}


def _changed(name: str, gradient: Tensor | None) -> dict[str, Tensor]:
    gradients = {**EXPECTED, name: gradient}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def test_equal_steps_pass() -> None:
    comparison = compare(2.0, EXPECTED, (2.0, EXPECTED), torch.float32)
    assert comparison.passed
    assert comparison.table().splitlines()[-1].startswith("passed: largest of 3 gradients 0.00e+00")


@pytest.mark.parametrize(
    ("loss", "gradients", "largest"),
    [
        pytest.param(2.001, EXPECTED, 0.0, id="loss"),
        pytest.param(float("nan"), EXPECTED, 0.0, id="loss is NaN"),
        pytest.param(2.0, _changed("a", torch.tensor([3.0, 4.01])), 0.002, id="gradient"),
        pytest.param(2.0, _changed("a", torch.tensor([3.0, float("nan")])), None, id="gradient is NaN"),
        pytest.param(2.0, _changed("b", None), float("inf"), id="gradient is missing"),
        pytest.param(2.0, _changed("c", torch.ones(1)), float("inf"), id="gradient is one too many"),
        pytest.param(2.0, _changed("unused", torch.ones(2)), 2**0.5, id="gradient should be zero"),
    ],
)
def test_a_difference_fails(loss: float, gradients: dict[str, Tensor], largest: float | None) -> None:
    comparison = compare(loss, gradients, (2.0, EXPECTED), torch.float32)
    assert not comparison.passed
    assert "FAILED" in comparison.table()
    if largest is not None:
        assert comparison.worst[1] == pytest.approx(largest, rel=1e-3)


def test_bf16_has_a_looser_bound() -> None:
    gradients = _changed("a", torch.tensor([3.0, 4.1]))
    assert not compare(2.0, gradients, (2.0, EXPECTED), torch.float32).passed
    assert compare(2.0, gradients, (2.0, EXPECTED), torch.bfloat16).passed
