"""Flash attention of others for NVIDIA GPUs: cuDNN's and PyTorch's own, and that of the ``flash_attn`` packages.

All know GQA, take bf16 and fp16, and compute rectangles and causal triangles; ragged intervals are for Triton. A
backward adds to dQ in whatever order its programs finish unless told otherwise, so not every library's results repeat.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from .flash import Direction, Shape
from .pieces import Piece

_aten = torch.ops.aten


class _CudaFlash:
    """What the libraries have in common: 16 bits, rows aligned to 16 bytes, and no masks."""

    def refusal(self, shape: Shape, kinds: Sequence[Piece]) -> str:
        """Tensors elsewhere or of other dtypes, and ragged pieces."""
        if shape.device.type != "cuda":
            return f"tensors on {shape.device}, expected CUDA"
        if shape.dtype not in (torch.bfloat16, torch.float16):
            return f"{shape.dtype}, expected bfloat16 or float16"
        if any(piece.kind == "masked" for piece in kinds):
            return "a block of ragged intervals, expected rectangles and triangles"
        return ""

    def head_dims(self, shape: Shape) -> tuple[int, int]:
        """A multiple of 8, the same for keys and values."""
        dim = _multiple_of_8(max(shape.dim, shape.value_dim))
        return dim, dim

    def prepared(self, x: Tensor) -> Tensor:
        """Every row begins at a multiple of 16 bytes, which the kernels rely on without asking."""
        aligned = x.stride(-1) == 1 and not any(n % 8 for n in (x.storage_offset(), *x.stride()[:-1]))
        return x if aligned else x.clone(memory_format=torch.contiguous_format)


class _TorchFlash(_CudaFlash):
    """A backend of PyTorch's ``scaled_dot_product_attention``, which says itself what it takes on this machine."""

    can_use: Callable[[SDPAParams, bool], bool]

    def refusal(self, shape: Shape, kinds: Sequence[Piece]) -> str:
        """Whatever PyTorch refuses."""
        if refused := super().refusal(shape, kinds):
            return refused
        with torch.enable_grad():
            if all(self.can_use(_parameters(shape, self.head_dims(shape), piece), False) for piece in kinds):
                return ""
        got = f"{shape.dtype} of head_dim {shape.dim} and {shape.value_dim} on {shape.device}"
        asked = f"torch.backends.cuda.{self.can_use.__name__}"
        return f"{got}, refused by {asked} (debug=True says why), expected what it allows"


class CudnnFlash(_TorchFlash):
    """cuDNN's, through PyTorch, which cannot ask it for a backward that repeats (as of 2.13)."""

    can_use = staticmethod(can_use_cudnn_attention)

    def repeats(self, direction: Direction) -> bool:
        """The forward only."""
        return direction == "forward"

    def head_dims(self, shape: Shape) -> tuple[int, int]:
        """Multiples of 8."""
        return _multiple_of_8(shape.dim), _multiple_of_8(shape.value_dim)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse.squeeze(-1)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        unused = q.new_empty((), dtype=torch.int64)  # the state of dropout
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, _dense(lse).unsqueeze(-1), unused, unused, None, None, None, q.shape[2], k.shape[2],
            0.0, causal, scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class AtenFlash(_TorchFlash):
    """PyTorch's own FlashAttention-2, or what ``torch.nn.attention.activate_flash_attention_impl`` put in its place."""

    can_use = staticmethod(can_use_flash_attention)

    def repeats(self, direction: Direction) -> bool:
        """The backward under ``torch.use_deterministic_algorithms(True)``."""
        asked = (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        return direction == "forward" or asked

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        out, lse, *_ = _aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        unused = q.new_empty((), dtype=torch.uint64)  # the state of dropout
        return _aten._flash_attention_backward(
            dout, q, k, v, out, _dense(lse), None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused,
            scale=scale,
        )  # fmt: skip


class PackagedFlash(_CudaFlash):
    """That of the ``flash_attn`` packages, of the first installed generation that is meant for the GPU."""

    def refusal(self, shape: Shape, kinds: Sequence[Piece]) -> str:
        """Machines without a package for their GPU, and head dims beyond what it repeats bitwise."""
        if refused := super().refusal(shape, kinds):
            return refused
        package = _package(shape.device)
        if package is None:
            names = " or ".join(_GENERATIONS[n].module for n in _meant_for(shape.device))
            return f"no flash_attn package for {shape.device}, expected {names} installed"
        if max(shape.dim, shape.value_dim) > package.max_head_dim:
            return f"head_dim {shape.dim} and {shape.value_dim}, expected at most {package.max_head_dim}"
        return ""

    def repeats(self, direction: Direction) -> bool:
        """Always: the packages can be asked."""
        return True

    def head_dims(self, shape: Shape) -> tuple[int, int]:
        """As the others; on Blackwell, FlashAttention-4 knows none between 128 and 256."""
        dim, _ = super().head_dims(shape)
        return (dim, dim) if dim <= 128 or _major(shape.device) != 10 else (256, 256)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        package = _package(q.device)
        assert package is not None, "a call without a package was not refused"
        with torch.cuda.device(q.device):
            return package.forward(_imported(package.module), q, k, v, causal, scale)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        package = _package(q.device)
        assert package is not None, "a call without a package was not refused"
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with torch.cuda.device(q.device):
            package.backward(_imported(package.module), (dout, q, k, v, out, _dense(lse)), grads, causal, scale)
        return grads


def _forward_2(package: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = package._flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, lse


def _backward_2(package: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], causal: bool, scale: float) -> None:
    package._flash_attn_backward(
        *saved, *grads, dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip


def _forward_3(package: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=scale, is_causal=causal, num_splits=1)
    return out, lse


def _backward_3(package: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], causal: bool, scale: float) -> None:
    torch.ops.flash_attn_3.bwd(*saved, *grads, softmax_scale=scale, is_causal=causal, deterministic=True)


def _forward_4(package: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = package._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return out, lse


def _backward_4(package: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], causal: bool, scale: float) -> None:
    dout, q, k, v, out, lse = saved
    dq, dk, dv = grads
    package._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, deterministic=True, dq=dq, dk=dk, dv=dv
    )


class _Package(NamedTuple):
    """A generation of FlashAttention: what is imported, up to which head dim its backward repeats, and its calls."""

    module: str
    max_head_dim: int
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., None]


_GENERATIONS = {
    2: _Package("flash_attn.flash_attn_interface", 256, _forward_2, _backward_2),
    3: _Package("flash_attn_interface", 192, _forward_3, _backward_3),
    4: _Package("flash_attn.cute.interface", 256, _forward_4, _backward_4),
}


def _meant_for(device: torch.device) -> tuple[int, ...]:
    # FlashAttention-4's backward repeats bitwise on Blackwell only.
    return {9: (3, 2), 10: (4, 2)}.get(_major(device), (2,))


def _package(device: torch.device) -> _Package | None:
    return next((_GENERATIONS[n] for n in _meant_for(device) if _imported(_GENERATIONS[n].module)), None)


@cache
def _imported(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _multiple_of_8(dim: int) -> int:
    return -(-dim // 8) * 8


def _dense(lse: Tensor) -> Tensor:
    """Contiguous and aligned to 16 bytes."""
    return lse.contiguous() if lse.storage_offset() % 4 == 0 else lse.clone(memory_format=torch.contiguous_format)


def _parameters(shape: Shape, dims: tuple[int, int], piece: Piece) -> SDPAParams:
    """A call on a piece that is to be differentiated, as PyTorch describes it; every row is the same memory."""
    rows, keys = (part.stop - part.start for part in (piece.rows, piece.keys))

    def stand_in(heads: int, tokens: int, dim: int) -> Tensor:
        row = torch.empty(dim, dtype=shape.dtype, device=shape.device)
        return row.as_strided((shape.batch, heads, tokens, dim), (0, 0, 0, 1)).requires_grad_()

    q, k = stand_in(shape.heads, rows, dims[0]), stand_in(shape.kv_heads, keys, dims[0])
    v = stand_in(shape.kv_heads, keys, dims[1])
    return SDPAParams(q, k, v, None, 0.0, piece.kind == "causal", shape.heads != shape.kv_heads)
