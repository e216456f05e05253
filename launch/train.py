"""One rank of `seqpar train`: the loop, and what comes before and after it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import seqpar
from seqpar.comm import KINDS
from seqpar.integrations import huggingface

from .checkpoint import Checkpoints
from .config import TrainConfig
from .data import Corpus, find_documents, load_corpus
from .distributed import Ranks, connected
from .engines import Engine, Setup, engine_class
from .errors import RunError
from .manifest import step_of
from .masks import describe, layer_masks
from .model import build, load_text, model_config, model_fields
from .outputs import CHECKPOINTS, prepare, remove_partial
from .report import Report, Step, peak_memory
from .runs import write_model
from .sample import generate
from .spawn import Place
from .text import Text
from .verify import Comparison, compare, reference_step

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROMPT_TOKENS = 64
"""Tokens of held-out text that the sample continues."""

# Options that a continued run may change, and that change what it computes.
_MAY_CHANGE = ("steps", "lr", "warmup", "weight_decay", "grad_clip", "dtype")
# Options that may differ between ranks without changing what is computed; data and model are compared by content.
_OF_ONE_RANK = ("nproc", "threads", "out", "debug", "timeout", "data", "model", "init")


def run(config: TrainConfig, place: Place) -> None:
    """Train as this rank. Raises ValueError for input that is wrong, RunError for what befalls the run."""
    huggingface.register()
    sp = config.sequence_ranks(place.size)
    with connected(place, sp=sp, threads=config.threads, timeout=config.timeout) as ranks:
        out = Path(ranks.on_rank0(lambda: str(prepare(config))))
        options = {name: value for name, value in config.as_dict().items() if name not in _OF_ONE_RANK}
        options["init"] = "given" if config.init else "not given"  # ranks load together
        with ranks.together():
            text, corpus, shape = _read(config)
            engine = engine_class(config.engine)
            engine.check(config, shape, ranks.device)
        identity = {**engine.identity(config, ranks), **_identity(config, corpus, shape)}
        ranks.agree({**options, **identity})
        this = _Run(config, ranks, out, text, corpus, shape, engine, identity)
        # Not sooner: only now a run that is resumed is known to be of this model.
        ranks.on_rank0(lambda: write_model(out, config, shape, text))
        this.train()


def _read(config: TrainConfig) -> tuple[Text, Corpus, PretrainedConfig]:
    """Tokenizer, data and the model's shape. Raises ValueError where they cannot be read or do not fit together."""
    text, shape = load_text(config), model_config(config)
    if text.vocabulary > shape.vocab_size:
        raise ValueError(
            f"--model {config.model}: got a tokenizer of {text.vocabulary} tokens and an embedding of "
            f"{shape.vocab_size}, expected one for each; resize the model's embedding, or use its own tokenizer"
        )
    layer_masks(config, shape)
    corpus = load_corpus(
        find_documents(config.data, config.suffixes),
        text.encode,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    return text, corpus, shape


class _Run:
    """A rank's engine and data, and the steps taken with them."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        out: Path,
        text: Text,
        corpus: Corpus,
        shape: PretrainedConfig,
        engine: type[Engine],
        identity: dict[str, Any],
    ) -> None:
        self.config, self.ranks, self.text, self.corpus = config, ranks, text, corpus
        name = config.dtype or ("bf16" if ranks.device.type == "cuda" else "fp32")
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        self.masks = layer_masks(config, shape)
        if ranks.rank == 0:
            remove_partial(out / CHECKPOINTS)
        changeable = {name: value for name, value in config.as_dict().items() if name in _MAY_CHANGE}
        self.checkpoints = Checkpoints(out / CHECKPOINTS, identity, changeable, config.keep, ranks)
        begun = self.checkpoints.to_continue() if config.resume else None
        self.done = step_of(begun) if begun else 0
        model = build(config, shape, huggingface.NAME)
        self.num_parameters = model.num_parameters()
        if config.init is not None:
            self.checkpoints.load_weights(config.init, model)
        self.engine = engine(Setup(config, ranks, self.masks, self.dtype), model)
        if begun:
            self.engine.load(begun)
        self.report = Report(out, config.steps, self.done, is_rank0=ranks.rank == 0)

    def train(self) -> None:
        """All remaining steps, with their evaluations and checkpoints; then the plot and the sample."""
        config = self.config
        self._introduce()
        try:
            for index in range(self.done, config.steps):
                step = self._step(index)
                due = index + 1 == config.steps
                if config.eval_every and len(self.corpus.held_out) and (due or (index + 1) % config.eval_every == 0):
                    step.eval_loss = self._evaluate()
                self.report.step(step)
                if config.save_every and (due or (index + 1) % config.save_every == 0):
                    self.checkpoints.save(index + 1, self.engine)
        finally:
            self.report.close()
        plot = self.report.plot()
        self.report.line(f"metrics, {plot.name if plot else 'plot'} and checkpoints are in {self.report.out}")
        if config.sample_tokens:
            self._sample()

    def _introduce(self) -> None:
        corpus, ranks, line = self.corpus, self.ranks, self.report.line
        skipped = f", {corpus.skipped} binary files passed over" if corpus.skipped else ""
        line(
            f"data: {len(corpus.train.tokens):,} tokens in {len(corpus.train.starts):,} documents to train on, "
            f"{len(corpus.held_out.tokens):,} in {len(corpus.held_out.starts):,} held out{skipped}"
        )
        if self.config.eval_every and not len(corpus.held_out):
            line("data: too little is held out for a row of --seq-len; the held-out text is not evaluated")
        line(
            f"model: {self.num_parameters:,} parameters {self.engine.placement} over {ranks.size} ranks of "
            f"{ranks.device.type}, {ranks.sequence.size} to a sequence, {str(self.dtype).removeprefix('torch.')}"
        )
        if self.done:
            line(f"resumed after step {self.done}")

    def _step(self, index: int) -> Step:
        """Forward, backward and update on one batch; its figures."""
        config, began = self.config, time.perf_counter()
        for world in self.engine.worlds:
            world.meter.reset()
        loss_sum, count = self.engine.loss(self.corpus.train.batch(self.ranks.rows(self.corpus.indices(index))))
        loss = seqpar.token_mean(loss_sum, count, self.ranks.everyone)
        self.engine.backward(loss)
        paused = time.perf_counter()
        verified = self._verify(index, loss.item()) if config.verify and index == self.done else None
        paused = time.perf_counter() - paused
        rate = learning_rate(config, index)
        norm = self.engine.update(rate) if math.isfinite(loss.item()) else math.nan
        if not math.isfinite(norm):
            raise RunError(
                f"step {index + 1} has loss {loss.item()} and gradient norm {norm}, expected finite numbers; "
                "its update was not made: lower --lr or raise --warmup, and --resume"
            )
        tokens, memory, traffic = self._figures(int(count))
        seconds = time.perf_counter() - began - paused
        return Step(
            step=index + 1,
            loss=loss.item(),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            bytes_sent=sum(traffic.values()),
            bytes_by_kind=traffic,
            grad_norm=norm,
            lr=rate,
            peak_memory_bytes=memory,
            verified=verified,
        )

    def _figures(self, count: int) -> tuple[int, int, dict[str, int]]:
        """Over all ranks: the sum of their tokens, the largest peak of memory, and the sum of their bytes by kind."""
        meters = [world.meter.by_kind for world in self.engine.worlds]
        sent = [sum(meter[kind].bytes for meter in meters if kind in meter) for kind in KINDS]
        figures = self.ranks.gather([count, peak_memory(self.ranks.device), *sent])
        totals = figures.sum(0).tolist()
        traffic = {kind: total for kind, total in zip(KINDS, totals[2:], strict=True) if total}
        return totals[0], int(figures[:, 1].max()), traffic

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean loss on held-out rows."""
        self.engine.model.eval()
        losses, counts = [], []
        for number in range(self.config.eval_batches):
            rows = self.ranks.rows(self.corpus.held_out_indices(number))
            loss, count = self.engine.loss(self.corpus.held_out.batch(rows))
            losses.append(loss)
            counts.append(count)
        self.engine.model.train()
        return seqpar.token_mean(torch.stack(losses).sum(), torch.stack(counts).sum(), self.ranks.everyone).item()

    def _verify(self, index: int, loss: float) -> dict[str, float]:
        """Compare a step's loss and gradients with an unsharded computation; raises RunError where they differ."""
        weights, gradients = self.engine.weights(), self.engine.gradients()
        comparison: Comparison | None = None

        def check() -> str:
            nonlocal comparison
            reference = build(self.config, model_config(self.config), "sdpa")
            reference.load_state_dict(weights)
            batch = self.corpus.train.batch(self.corpus.indices(index))
            comparison = compare(loss, gradients, reference_step(reference, batch, self.config), self.dtype)
            self.report.line(comparison.table())
            if not comparison.passed:
                raise RunError(
                    f"--verify: step {index + 1} differs from the unsharded computation: loss by "
                    f"{comparison.loss_difference:.2e}, the gradient of {comparison.worst[0]} by "
                    f"{comparison.worst[1]:.2e}; expected at most {comparison.bounds[0]:.0e} and "
                    f"{comparison.bounds[1]:.0e}: this is a bug, please report it with the command"
                )
            return ""

        self.ranks.on_rank0(check)
        if comparison is None:
            return {}
        return {"loss_difference": comparison.loss_difference, "gradient_difference": comparison.worst[1]}

    def _sample(self) -> None:
        """Print a continuation of held-out text."""
        rows = self.corpus.held_out if len(self.corpus.held_out) else self.corpus.train
        prompt = rows.tokens[: min(PROMPT_TOKENS, self.config.seq_len)].tolist()
        chosen = generate(
            self.engine.writer(),
            prompt,
            self.config.sample_tokens,
            masks=self.masks,
            vocabulary=self.text.vocabulary,
            seed=self.config.seed,
            ranks=self.ranks,
        )
        self.report.line(f"sample: {len(prompt)} tokens of text, then [{len(chosen)} tokens by the model]")
        self.report.line(f"{self.text.decode(prompt)}[{self.text.decode(chosen)}]")


def learning_rate(config: TrainConfig, index: int) -> float:
    """The rate of the step with this index, from 0: a linear rise over the warm-up, then a cosine to a tenth."""
    if index < config.warmup:
        return config.lr * (index + 1) / config.warmup
    progress = (index - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def _identity(config: TrainConfig, corpus: Corpus, shape: PretrainedConfig) -> dict[str, Any]:
    """What a continued run must share with its checkpoint, and all ranks with each other, by name."""
    return {
        "seed": config.seed,
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "mask": describe(config, shape),
        "data": f"{corpus.train.digest()}-{corpus.held_out.digest()}",
        **model_fields(shape),
    }
