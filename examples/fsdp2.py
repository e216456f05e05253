"""Trains a small Llama-like model on Python's own sources: FSDP2 over all ranks, sequences split over some of them.

    torchrun --nproc-per-node 4 examples/fsdp2.py --sp 2 --length 4096

makes two groups of two ranks; each group takes a row of 4,096 tokens, packed files, in a step, and each rank half of
it. On GPUs where there are some, else on CPUs. All that knows of sequences being split is marked "seqpar:".
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from seqpar.integrations.torch import parallelize

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32
HIDDEN = HEADS * HEAD_DIM


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.kv = nn.Linear(HIDDEN, 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, HIDDEN]; cos, sin [1|B, 1, T, HEAD_DIM / 2]."""
        rows, tokens, _ = x.shape
        q = self.q(x).view(rows, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = self.kv(x).view(rows, tokens, 2 * KV_HEADS, HEAD_DIM).transpose(1, 2).chunk(2, dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).reshape(rows, tokens, HIDDEN))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(), nn.RMSNorm(HIDDEN)
        self.mlp_norm, self.gate_up = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(256, HIDDEN), nn.RMSNorm(HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, T], positions [1|B, T] -> logits [B, T, 256]."""
        # seqpar: positions come from the batch; arange(T) would be right on one rank only.
        frequencies = 10_000 ** -torch.linspace(0, 1, HEAD_DIM // 2, device=tokens.device)
        angles = positions[:, None, :, None] * frequencies
        x, cos, sin = self.embedding(tokens), angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


def packed_rows(length: int, first: int, step: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Tokens [1, length] of every `step`-th row of files, from the `first` on, and the files' bounds in it."""
    files = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    text, ends = b"".join(files), torch.tensor([len(file) for file in files]).cumsum(0)
    row = first
    while True:
        begin = row * length % (len(text) - length)
        inside = ends[(ends > begin) & (ends < begin + length)] - begin
        yield torch.frombuffer(bytearray(text[begin : begin + length]), dtype=torch.uint8).long()[None], [
            0, *inside.unique().tolist(), length,
        ]  # fmt: skip
        row += step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"sp": 2, "length": 2048, "steps": 20, "layers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    torch.manual_seed(0)

    mesh = init_device_mesh(device, (dist.get_world_size() // args.sp, args.sp), mesh_dim_names=("dp", "sp"))
    model = Llama(args.layers).to(device)
    handle = parallelize(model, mesh, axes="sp")  # seqpar: SDPA now attends to the tokens of all ranks along "sp"
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)  # over all ranks, dp x sp
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    rows = packed_rows(args.length, mesh.get_local_rank("dp"), mesh.size(0))
    for step, (tokens, cu_seqlens) in zip(range(args.steps), rows, strict=False):
        # seqpar: every rank along "sp" gives the same whole row, and has its own tokens, positions and labels back.
        batch = handle.shard(tokens.to(device), cu_seqlens=cu_seqlens)
        logits = model(batch.tokens, batch.position_ids)
        total = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum")
        loss = handle.loss(total, (batch.labels != -100).sum())  # seqpar: the mean over the labels of all ranks
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
