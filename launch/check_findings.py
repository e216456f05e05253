"""What `seqpar check` finds: how far two computations of the same are apart, and where they part first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences: of the loss; and of outputs, logits and gradients.

    noise: gradients whose norm is a smaller part of all gradients' than this count as if it were this: a gradient that
    is zero but for rounding has no digits to compare.
    """

    loss: float
    values: float
    noise: float


BOUNDS = {
    torch.float64: Bounds(1e-6, 1e-6, 1e-5),
    torch.float32: Bounds(1e-4, 1e-4, 1e-3),
    torch.bfloat16: Bounds(1e-2, 1e-1, 1e-2),
}
"""Of each precision; models take their norms and softmax in fp32 in fp64, too. In bf16 either side rounds to 8 bits."""


@dataclass
class Difference:
    """Of two tensors, by parts: the squared norm of their difference, and of what was expected."""

    of: float = 0.0
    expected: float = 0.0

    def add(self, got: Tensor, expected: Tensor) -> None:
        """Another part of both, in any precision; they may lie on different devices."""
        assert got.shape == expected.shape, f"{tuple(got.shape)} against {tuple(expected.shape)}"
        wide = torch.promote_types(expected.dtype, torch.float32)
        got, expected = got.to(expected.device, wide), expected.to(wide)
        self.of += _squares(got - expected)
        self.expected += _squares(expected)

    def relative(self, least: float = 0.0) -> float:
        """Norm of the difference over the expected norm, which counts as `least` where it is less."""
        norm = max(math.sqrt(self.expected), least)
        return math.sqrt(self.of) / norm if norm > 0 else (math.inf if self.of > 0 else math.sqrt(self.of))


def _squares(x: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    return norm * norm


@dataclass(frozen=True, kw_only=True)
class LayerFinding:
    """Relative differences of one layer.

    attention: of its attention's output, None where it has none. output: of its own. gradient: of that parameter's
    among its own which differs most, and `gradient_of` is its name; None where it has none.
    """

    attention: float | None
    output: float
    gradient: float | None
    gradient_of: str | None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Of a whole model: relative differences, all of them norm of the difference over norm.

    input: of what goes into the first layer. loss, reference_loss: of all ranks, and unsharded. gradients: of
    parameters outside the layers, by name.
    """

    input: float
    layers: Sequence[LayerFinding]
    logits: float
    loss: float
    reference_loss: float
    gradients: Mapping[str, float]
    bounds: Bounds
    dtype: str
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def loss_difference(self) -> float:
        """Relative."""
        return abs(self.loss - self.reference_loss) / max(abs(self.reference_loss), 1e-30)

    @property
    def first(self) -> str | None:
        """Where the two part first, by how much, and what is right before that; None where they agree."""
        bound = f"expected at most {self.bounds.values:.0e}"
        if self._parts(self.input):
            return f"what goes into layer 0 differs, by {self.input:.2e}, {bound}: its embeddings or positions"
        for number, layer in enumerate(self.layers):
            if layer.attention is not None and self._parts(layer.attention):
                return f"layer {number} is the first that differs, in its attention: by {layer.attention:.2e}, {bound}"
            if self._parts(layer.output):
                after = "in what comes after its attention" if layer.attention is not None else "and has no attention"
                return f"layer {number} is the first that differs, {after}: by {layer.output:.2e}, {bound}"
        if self._parts(self.logits):
            return f"every layer's output agrees, but not the logits: they differ by {self.logits:.2e}, {bound}"
        if not self.loss_difference <= self.bounds.loss:
            return (
                f"the logits agree, but not the loss: it differs by {self.loss_difference:.2e}, expected at most "
                f"{self.bounds.loss:.0e}"
            )
        # Gradients come from the last layer on.
        for number, layer in reversed(list(enumerate(self.layers))):
            if layer.gradient is not None and self._parts(layer.gradient):
                return (
                    f"all outputs agree, but not the gradients: layer {number} is the first on the way back that "
                    f"differs, in {layer.gradient_of}: by {layer.gradient:.2e}, {bound}"
                )
        for name, gradient in self.gradients.items():
            if self._parts(gradient):
                return f"all outputs agree, but not the gradient of {name}: it differs by {gradient:.2e}, {bound}"
        return None

    @property
    def passed(self) -> bool:
        """Whether everything is within the bounds; NaN is not."""
        return self.first is None

    @property
    def worst(self) -> float:
        """The largest difference of any output or gradient."""
        of_layers = [x for layer in self.layers for x in (layer.attention, layer.output, layer.gradient)]
        return max(x for x in (self.input, self.logits, *of_layers, *self.gradients.values()) if x is not None)

    def _parts(self, difference: float) -> bool:
        return not difference <= self.bounds.values

    def as_json(self) -> str:
        """One line of JSON; what is not a number is null."""
        return json.dumps(
            {
                "passed": self.passed,
                "first_difference": self.first,
                "loss": _number(self.loss),
                "reference_loss": _number(self.reference_loss),
                "loss_difference": _number(self.loss_difference),
                "logits": _number(self.logits),
                "input": _number(self.input),
                "layers": [
                    {
                        "layer": number,
                        "attention": _number(layer.attention),
                        "output": _number(layer.output),
                        "gradient": _number(layer.gradient),
                        "gradient_of": layer.gradient_of,
                    }
                    for number, layer in enumerate(self.layers)
                ],
                "gradients": {name: _number(gradient) for name, gradient in self.gradients.items()},
                "bounds": {"loss": self.bounds.loss, "values": self.bounds.values},
                "dtype": self.dtype,
                **self.about,
            },
            ensure_ascii=False,
        )

    def table(self) -> str:
        """The differences as text, a row for each layer, then the rest, and the verdict."""
        head = f"{'relative difference':<22} {'attention':>10} {'output':>10} {'gradient':>10}   of"
        lines = [head, self._row("into layer 0", None, self.input, None)]
        for number, layer in enumerate(self.layers):
            inside = layer.gradient_of or ""
            lines.append(self._row(f"layer {number}", layer.attention, layer.output, layer.gradient, inside))
        lines.append(self._row("logits", None, self.logits, None))
        lines += [self._row("", None, None, gradient, name) for name, gradient in self.gradients.items()]
        lines.append(
            f"loss {self.loss:.8f} sharded, {self.reference_loss:.8f} unsharded: differs by {self.loss_difference:.2e}"
        )
        bounds = f"bounds {self.bounds.values:.0e}, loss {self.bounds.loss:.0e}, {self.dtype}"
        verdict = f"passed: differs by {self.worst:.2e} at most" if self.passed else "FAILED: beyond the bounds where *"
        return "\n".join([*lines, f"{verdict} ({bounds})"])

    def _row(
        self, name: str, attention: float | None, output: float | None, gradient: float | None, of: str = ""
    ) -> str:
        cells = (_cell(x, self.bounds.values) for x in (attention, output, gradient))
        return f"{name:<22} {' '.join(cells)}  {of}".rstrip()


def _cell(difference: float | None, bound: float) -> str:
    """A number, marked where it is beyond the bound."""
    if difference is None:
        return f"{'':>10}"
    return f"{difference:>9.1e}{' ' if difference <= bound else '*'}"


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
