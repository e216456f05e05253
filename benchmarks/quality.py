"""What sparsely-sharded attention costs in quality: held-out losses of a small model, and recall of planted needles.

Run ``python benchmarks/quality.py``; about an hour on two cores. Every run has the same steps, tokens and order of
the data; a window sees as many query-key pairs as the sparsely-sharded layers that it stands beside.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from measuring import show, write
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import seqpar
from seqpar.integrations import huggingface
from seqpar.launch.config import TrainConfig
from seqpar.launch.data import Corpus, find_documents, load_corpus
from seqpar.launch.model import load_text

HEADS = 8


@dataclass(frozen=True)
class Model:
    """A Llama of 8 query and KV heads, and the mask of each of its layers."""

    name: str
    masks: tuple[seqpar.Mask, ...]
    vocabulary: int
    length: int
    hidden: int = 128

    def build(self, seed: int) -> LlamaForCausalLM:
        """With random weights."""
        torch.manual_seed(seed)
        huggingface.register()
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3,
            num_hidden_layers=len(self.masks),
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            tie_word_embeddings=False,
            initializer_range=self.hidden**-0.5,
        )
        return LlamaForCausalLM._from_config(config, attn_implementation=huggingface.NAME, dtype=torch.float32)

    def logits(self, model: LlamaForCausalLM, tokens: Tensor, documents: seqpar.Documents) -> Tensor:
        """``[B, T, V]``."""
        plans = {mask: seqpar.plan(mask & documents, length=self.length, heads=HEADS) for mask in set(self.masks)}
        ids = plans[self.masks[0]].position_ids
        each = [plans[mask] for mask in self.masks]
        return model(tokens, position_ids=ids, use_cache=False, seqpar_plan=each).logits


def density(mask: seqpar.Mask, length: int) -> float:
    """The share of all causal pairs."""
    pairs = int(seqpar.plan(mask, length=length, heads=HEADS).work.pairs.sum())
    return pairs / (HEADS if mask.by_head else 1) / (length * (length + 1) / 2)


def window_like(mask: seqpar.Mask, length: int) -> seqpar.SlidingWindow:
    """The window that sees as many pairs."""
    return seqpar.SlidingWindow(round(length * (1 - math.sqrt(1 - density(mask, length)))) - 1)


def steps_of(model: LlamaForCausalLM, steps: int, rate: float) -> Iterator[int]:
    """Numbers of the steps; takes one after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * s / steps)))
    )
    for step in range(steps):
        yield step
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def text_loss(model: Model, seed: int, steps: int, evaluations: int) -> float:
    """The mean loss on held-out text, nats per byte, after training on the standard library's sources."""
    config = TrainConfig(seq_len=model.length, seed=seed)
    text = load_text(config)
    corpus: Corpus = load_corpus(find_documents(()), text.encode, seq_len=model.length, batch_size=2, seed=seed)
    network = model.build(seed)

    def loss_of(batch: object) -> Tensor:
        documents = seqpar.Documents(batch.cu_seqlens)
        labels = seqpar.plan(seqpar.Causal() & documents, length=model.length).shift_labels(batch.tokens)
        logits = model.logits(network, batch.tokens, documents)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    for step in steps_of(network, steps, 3e-3):
        loss_of(corpus.train.batch(corpus.indices(step))).backward()
    with torch.no_grad():
        rows = [corpus.held_out_indices(number) for number in range(evaluations)]
        return statistics.fmean(float(loss_of(corpus.held_out.batch(row))) for row in rows)


KEYS = VALUES = 4
PAIRS, QUERIES, ANSWERS, NOISE = 0, KEYS * VALUES, KEYS * VALUES + KEYS, KEYS * VALUES + KEYS + VALUES
NEEDLE_VOCABULARY = NOISE + 16


def needles(generator: torch.Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[rows, length]``: each key once with a value in the first quarter, asked for in the last.

    Between a pair and its question are at least ``length / 2`` tokens: more than two layers of the window reach.
    """
    tokens = torch.randint(NOISE, NEEDLE_VOCABULARY, (rows, length), generator=generator)
    labels = torch.full_like(tokens, -100)
    for row in range(rows):
        values = torch.randint(0, VALUES, (KEYS,), generator=generator)
        places = torch.randperm(length // 4, generator=generator)[:KEYS]
        tokens[row, places] = PAIRS + torch.arange(KEYS) * VALUES + values
        asked = torch.randperm(KEYS, generator=generator)
        at = 3 * length // 4 + 2 * torch.randperm(length // 8, generator=generator)[:KEYS]
        tokens[row, at], tokens[row, at + 1] = QUERIES + asked, ANSWERS + values[asked]
        labels[row, at] = ANSWERS + values[asked]
    return tokens, labels


def recall(model: Model, seed: int, steps: int, evaluations: int) -> float:
    """The share of needles recalled, in sequences never trained on."""
    generator, network = torch.Generator().manual_seed(seed), model.build(seed)
    whole = seqpar.Documents([0, model.length])
    for _ in steps_of(network, steps, 3e-3):
        tokens, labels = needles(generator, 16, model.length)
        F.cross_entropy(model.logits(network, tokens, whole).flatten(0, 1), labels.flatten()).backward()
    with torch.no_grad():
        tokens, labels = needles(generator, 16 * evaluations, model.length)
        guesses = torch.cat([model.logits(network, part, whole).argmax(-1) for part in tokens.split(16)])
        return float((guesses == labels)[labels >= 0].float().mean())


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train."""

    steps: int = 300
    """Of the language model, 2 rows of 2,048 bytes each."""
    needle_steps: int = 600
    """Of the recall, 16 rows of 256 tokens each."""
    seeds: int = 3
    """Runs of each model."""
    jobs: int = 2
    """Runs at a time, with one thread each."""


def language_models(length: int = 2048) -> list[Model]:
    """Four layers: dense, half of them dense, none dense."""
    sparse = seqpar.SparselySharded(block=16, local_blocks=16, stride=HEADS)
    window, dense = window_like(sparse, length), seqpar.Causal()
    masks = {
        "dense": (dense,) * 4,
        "S2, half of the layers dense": (dense, sparse) * 2,
        "window, half of the layers dense": (dense, window) * 2,
        "S2": (sparse,) * 4,
        "window": (window,) * 4,
    }
    return [Model(name, layers, 264, length) for name, layers in masks.items()]


def needle_models(length: int = 256) -> list[Model]:
    """Two layers."""
    sparse = seqpar.SparselySharded(block=16, local_blocks=2, stride=HEADS)
    window, dense = window_like(sparse, length), seqpar.Causal()
    return [
        Model(name, (mask,) * 2, NEEDLE_VOCABULARY, length, hidden=64)
        for name, mask in (("dense", dense), ("S2", sparse), ("window", window))
    ]


def main(options: Options) -> None:
    """Train everything, print the tables, write ``results/quality.json``."""
    jobs = [
        (name, model, seed, partial(function, model, seed, steps, evaluations))
        for name, function, models, steps, evaluations in (
            ("recall", recall, needle_models(), options.needle_steps, 16),
            ("text", text_loss, language_models(), options.steps, 16),
        )
        for model in models
        for seed in range(options.seeds)
    ]
    found: dict[tuple[str, str], list[float]] = {}
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.jobs, torch.set_num_threads, (1,)) as pool:
        for (name, model, seed, _), value in zip(jobs, pool.imap(_call, [job[3] for job in jobs]), strict=True):
            found.setdefault((name, model.name), []).append(value)
            print(f"{time.perf_counter() - began:6.0f} s  {name}, {model.name}, seed {seed}: {value:.4f}", flush=True)
    tables = {}
    for name, models, title in (
        ("text", language_models(), f"held-out loss, nats per byte, after {options.steps} steps of 4,096 bytes"),
        ("recall", needle_models(), f"needles recalled after {options.needle_steps} steps (chance: 0.25)"),
    ):
        rows = []
        for model in models:
            values = found[name, model.name]
            share = statistics.fmean(density(mask, model.length) for mask in model.masks)
            row: dict[str, object] = {"attention": model.name, "pairs of dense": round(share, 3)}
            row |= {f"seed {seed}": round(value, 4) for seed, value in enumerate(values)}
            rows.append(row | {"mean": round(statistics.fmean(values), 4)})
        show(title, rows)
        tables[title] = rows
    write("quality", tables)


def _call(function: partial) -> float:
    return function()


if __name__ == "__main__":
    main(tyro.cli(Options))
