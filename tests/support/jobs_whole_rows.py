"""What a rank does in tests of Hugging Face calls with whole rows, and what other tests need of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from seqpar.comm import World
from seqpar.integrations import huggingface
from seqpar.integrations.options import AttentionOptions

from .oracle import error

VOCABULARY, LENGTH, WINDOW, ACCUMULATED = 61, 75, 9, 2


class Rows(NamedTuple):
    """A replica's rows in one micro-step: tokens, labels, position_ids [B, S], and each row's document bounds."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    bounds: list[list[int]]


def rows_of(seed: int, batch: int = 1, length: int = LENGTH) -> Rows:
    """Packed documents of unequal lengths, of which unequally many tokens count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    bounds = []
    for _ in range(batch):
        cuts = torch.randperm(length - 1, generator=generator)[: 1 + seed % 4] + 1
        bounds.append([0, *sorted(cuts.tolist()), length])
    positions = torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in bounds])
    ignored = torch.rand(batch, length, generator=generator) < (0.1, 0.8, 0.5)[seed % 3]
    return Rows(tokens, tokens.masked_fill(ignored, -100), positions, bounds)


def llama(attention: str, layers: int = 2, kind: str = "LlamaConfig", **options: Any) -> Any:
    """A small Llama, or such, with grouped heads, the same weights wherever it is made."""
    import transformers

    huggingface.register()
    torch.manual_seed(3)
    config = getattr(transformers, kind)(
        hidden_size=48, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, initializer_range=0.2, attn_implementation=attention, **options,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).train()


def loss_sum(model: Any, rows: Rows) -> tuple[Tensor, int]:
    """The summed loss of rows and the number of its tokens, each document on its own through a plain model."""
    total, count = torch.zeros(()), 0
    for row, bounds in enumerate(rows.bounds):
        for start, end in pairwise(bounds):
            logits = model(rows.tokens[row : row + 1, start:end], use_cache=False).logits[0]
            labels = rows.labels[row, start + 1 : end]
            total = total + F.cross_entropy(logits[:-1], labels, reduction="sum", ignore_index=-100)
            count += int((labels != -100).sum())
    return total, count


def batches(step: int, replica: int) -> Iterator[Rows]:
    """A replica's rows in each micro-step of a step."""
    for micro in range(ACCUMULATED):
        yield rows_of(100 * step + 10 * micro + replica)


def ten_steps(world: World) -> tuple[float, float]:
    """The largest relative errors of a loss in ten steps and of a gradient in the first; all ranks share a sequence."""
    alone, model = llama("sdpa"), llama("seqpar")
    huggingface.parallelize(model, dist.group.WORLD)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (alone, model)]
    losses, gradients = [], []
    for step in range(10):
        rows = rows_of(step)
        total, count = loss_sum(alone, rows)
        (total / count).backward()
        out = model(input_ids=rows.tokens, labels=rows.labels, position_ids=rows.positions)
        out.loss.backward()
        losses.append(abs(float(out.loss) * count / float(total) - 1))
        for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(parameter.grad)
            parameter.grad /= world.size
            if step == 0:
                gradients.append(error(parameter.grad, other.grad))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return max(losses), max(gradients)


class Wrapper(nn.Module):
    """Calls the forward of what it wraps without its hooks, as adapters of weights do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


class Call(NamedTuple):
    """A call with whole rows, the same rows by document, what the model is, and what `parallelize` is told."""

    given: dict[str, Any]
    rows: Rows
    plain: dict[str, Any] = {}  # noqa: RUF012
    model: dict[str, Any] = {}  # noqa: RUF012
    told: dict[str, Any] = {}  # noqa: RUF012


def whole_calls() -> dict[str, Call]:
    """Every kind of call."""
    packed, one, plain = rows_of(1, batch=2), rows_of(3), rows_of(2)._replace(bounds=[[0, LENGTH]])
    cu = torch.tensor(one.bounds[0], dtype=torch.int32)
    flash = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": LENGTH, "max_length_k": LENGTH}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 60:], mask[1, :13] = 0, 0
    padded = Rows(packed.tokens, packed.tokens.masked_fill(mask == 0, -100), packed.positions, [[0, 60], [13, LENGTH]])
    shifted = packed.labels.roll(-1, 1)
    for row, bounds in enumerate(packed.bounds):
        shifted[row, [end - 1 for end in bounds[1:]]] = -100
    of = {"input_ids": packed.tokens, "labels": packed.labels, "position_ids": packed.positions}
    kinds = ["sliding_attention", "full_attention"]
    layers = {"kind": "Qwen3Config", "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
    mistral = {"kind": "MistralConfig", "sliding_window": WINDOW}
    return {
        "positions": Call(of, packed),
        "plain": Call({"input_ids": plain.tokens, "labels": plain.labels}, plain),
        "flash": Call({"input_ids": one.tokens, "labels": one.labels, **flash}, one),
        "padding": Call({"input_ids": padded.tokens, "labels": padded.labels, "attention_mask": mask}, padded),
        "shifted": Call({**of, "labels": packed.tokens.flip(1), "shift_labels": shifted}, packed),
        "items": Call({**of, "num_items_in_batch": torch.tensor(101.0)}, packed),
        "embeds": Call({name: x for name, x in of.items() if name != "input_ids"}, packed),
        "auto": Call(of, packed, told={"options": AttentionOptions(schedule="auto"), "layout": "auto"}),
        "windows of layers": Call(of, packed, layers, layers),
        "window": Call(of, packed, mistral, {}, {"options": AttentionOptions(mask="window", window=WINDOW)}),
    }


def called_with_whole_rows(world: World) -> dict[str, tuple[float, float, float]]:
    """The worst errors of the loss, of a gradient and of the whole logits, for every kind of call."""
    worst = {}
    for name, (given, rows, options, own, told) in whole_calls().items():
        plain, model = llama("sdpa", **options), llama("seqpar", **own)
        total, count = loss_sum(plain, rows)
        expected = total / given.get("num_items_in_batch", count)
        expected.backward()
        called = Wrapper(model) if name == "plain" else model
        calls = huggingface.parallelize(called, dist.group.WORLD, **told)
        if name == "items":
            model.gradient_checkpointing_enable()
        if name == "embeds":
            given = {**given, "inputs_embeds": model.get_input_embeddings()(rows.tokens)}
        args = ()
        if name == "positions":
            args, given = (rows.tokens, None), {key: x for key, x in given.items() if key != "input_ids"}
        out = called(*args, **given)
        out.loss.backward()
        wrong = 0.0
        for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
            wrong = max(wrong, error(world.all_reduce(mine.grad, "test") / world.size, its.grad))
        logits, off = calls.plan.unshard(out.logits.detach()), 0.0
        for row, bounds in enumerate(rows.bounds):
            for start, end in pairwise(bounds):
                with torch.no_grad():
                    alone = plain(rows.tokens[row : row + 1, start:end], use_cache=False).logits[0]
                off = max(off, error(logits[row, start:end], alone))
        worst[name] = abs(out.loss.item() / expected.item() - 1), wrong, off
        assert len({id(plan) for plan in calls.plans}) == (2 if name == "windows of layers" else 1)
        calls.remove()
        assert model.loss_function is plain.loss_function
        assert not called._forward_pre_hooks
        assert not called._forward_hooks
    return worst


def beside_data_parallel(world: World) -> tuple[float, float, float]:
    """The worst errors of a loss, and of DDP's gradients: with the mean of every call; with tokens counted before."""
    mesh = dist.init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("dp", "sp"))
    replicas, replica = world.size // 2, mesh["dp"].get_local_rank()
    model = llama("seqpar")
    huggingface.parallelize(model, mesh["sp"], loss_group=dist.group.WORLD)
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    mine = [{"input_ids": x.tokens, "labels": x.labels, "position_ids": x.positions} for x in batches(0, replica)]
    off, wrong = 0.0, []
    for counted in (False, True):
        plain, total, tokens = llama("sdpa"), torch.zeros(()), 0
        for micro in zip(*[batches(0, r) for r in range(replicas)], strict=True):
            pairs = [loss_sum(plain, rows) for rows in micro]
            number = sum(count for _, count in pairs)
            mean = sum(x for x, _ in pairs) / (1 if counted else number * ACCUMULATED)
            total, tokens = total + mean, tokens + number
        total = total / tokens if counted else total
        total.backward()
        parallel.zero_grad()
        loss = torch.zeros(())
        # What transformers' Trainer does: it counts every rank's rows, those of a sequence once for each of its ranks.
        items = torch.tensor(2.0 * tokens)
        for index, call in enumerate(mine):
            more = {"num_items_in_batch": items} if counted else {}
            with parallel.no_sync() if index + 1 < ACCUMULATED else torch.enable_grad():
                part = parallel(**call, **more).loss * (world.size if counted else 1 / ACCUMULATED)
                part.backward()
            loss = loss + part.detach()
        loss = world.all_reduce(loss, "test") / world.size
        off = max(off, abs(loss.item() / total.item() - 1))
        gradients = zip(parallel.module.parameters(), plain.parameters(), strict=True)
        wrong.append(max(error(a.grad, b.grad) for a, b in gradients))
    return off, *wrong


def refused_calls(world: World) -> dict[str, str]:
    """What calls are told that would not compute what they do on one rank; the model afterwards as good as before."""
    model = llama("seqpar")
    huggingface.parallelize(model, dist.group.WORLD)
    told = {}
    for name, (call, settings) in wrong_calls(world.rank).items():
        before = {key: getattr(model.config, key, None) for key in settings}
        for key, value in settings.items():
            setattr(model.config, key, value)
        try:
            model(**call)
        except ValueError as error:
            told[name] = str(error)
        for key, value in before.items():
            setattr(model.config, key, value)
    rows = rows_of(0)
    assert model(input_ids=rows.tokens, labels=rows.labels).loss.isfinite()
    return told


def wrong_calls(rank: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Keywords of a call, and settings of the config, by what is wrong with them."""
    rows = rows_of(0)
    ids, length = {"input_ids": rows.tokens}, LENGTH
    mask = torch.ones(1, length, dtype=torch.long)
    padded = mask.clone()
    padded[0, 70:] = 0
    holes = mask.clone()
    holes[0, 20:30] = 0
    odd = rows.positions.clone()
    odd[0, 5] += 1
    from transformers import DynamicCache

    return {
        "other rows": ({"input_ids": rows.tokens + rank}, {}),
        "other length": ({"input_ids": rows.tokens[:, rank:]}, {}),
        "other labels": ({**ids, "labels": rows.tokens.masked_fill(rows.tokens == rank, -100)}, {}),
        "other documents": ({**ids, "position_ids": rows.positions if rank else torch.arange(length)[None]}, {}),
        "one rank's own mistake": ({**ids, "position_ids": odd if rank else rows.positions}, {}),
        "dropout": (ids, {"attention_dropout": 0.1}),
        "cache": ({**ids, "past_key_values": DynamicCache()}, {}),
        "attentions": ({**ids, "output_attentions": True}, {}),
        "routers": (ids, {"output_router_logits": True}),
        "kept logits": ({**ids, "logits_to_keep": 1}, {}),
        "plan": ({**ids, "seqpar_plan": object()}, {}),
        "4-D mask": ({**ids, "attention_mask": torch.ones(1, 1, length, length)}, {}),
        "weights in the mask": ({**ids, "attention_mask": mask * 2}, {}),
        "holes": ({**ids, "attention_mask": holes}, {}),
        "labels at padding": ({**ids, "labels": rows.tokens, "attention_mask": padded}, {}),
        "positions": ({**ids, "position_ids": odd}, {}),
        "positions of a rank": ({**ids, "position_ids": rows.positions[:, :40]}, {}),
        "falling bounds": ({**ids, "cu_seq_lens_q": torch.tensor([0, 40, 20, 75])}, {}),
        "used cache": ({**ids, "use_cache": True}, {}),
        "bounds": ({**ids, "cu_seq_lens_q": torch.tensor([0, 9])}, {}),
        "other bounds": ({**ids, "cu_seq_lens_q": [0, 9, length], "cu_seq_lens_k": [0, 8, length]}, {}),
        "bounds of keys": ({**ids, "cu_seq_lens_k": [0, length]}, {}),
        "bounds and positions": ({**ids, "cu_seq_lens_q": [0, 9, length], "position_ids": rows.positions}, {}),
        "unknown": ({**ids, "token_type_ids": torch.zeros(1, length)}, {}),
        "shifted alone": ({**ids, "shift_labels": rows.labels}, {}),
        "neither": ({"labels": rows.labels}, {}),
        "both": ({**ids, "inputs_embeds": torch.zeros(1, length, 48)}, {}),
        "short": ({"input_ids": rows.tokens[:, :1]}, {}),
    }
