"""One rank of `seqpar generate`: every rank has the whole model, and its share of the prompts' keys and values."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqpar.comm import KINDS
from seqpar.integrations import huggingface

from .decoding import closing_tokens, forget_settings, now, rows_of, said, settings
from .distributed import Ranks, connected
from .errors import RunError
from .generate_config import GenerateConfig
from .loading import Source, fingerprint, load_model, read_source
from .model import model_fields
from .offloading import OffloadedGeneration, look_for_workers
from .prompts import encode_prompts, left_padded, read_prompts
from .spawn import Place
from .telling import Result, Telling, tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Options that may differ between ranks without changing what is computed; model and prompts are compared by content.
_OF_ONE_RANK = (
    "model", "prompt", "prompt_file", "attention_workers", "json", "ledger", "nproc", "threads", "timeout", "debug",
)  # fmt: skip


def run(config: GenerateConfig, place: Place) -> None:
    """Generate as this rank. Raises ValueError for input that is wrong, RunError for what befalls the run."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface.register()
    with connected(place, sp=place.size, threads=config.threads, timeout=config.timeout) as ranks:

        def report(line: str) -> None:
            if ranks.rank == 0:
                print(f"seqpar generate: {line}", file=sys.stderr, flush=True)

        with ranks.together():
            source, texts = read_source(config.model, report), read_prompts(config)
            prompts = encode_prompts(
                texts,
                source.text,
                max_new_tokens=config.max_new_tokens,
                positions=source.positions,
                embeddings=source.embeddings,
            )
        offloaded = config.attention_workers is not None
        if offloaded:
            look_for_workers(config)
            with ranks.together():
                generation: _Generation | OffloadedGeneration = OffloadedGeneration(config, ranks, source, prompts)
        else:
            generation = _Generation(config, ranks, source, prompts)
        name = config.dtype or ("bf16" if ranks.device.type == "cuda" else "fp32")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        ranks.agree(_identity(config, source, prompts, dtype))
        with ranks.together():
            model = load_model(source, dtype, ranks.device)
        ranks.agree({"weights": fingerprint(model)})
        result = generation.result(model)
        if ranks.rank == 0:
            tell(result, texts, as_json=config.json)


def _identity(
    config: GenerateConfig, source: Source, prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> dict[str, Any]:
    """What all ranks must share, by name."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OF_ONE_RANK}
    return {
        **options,
        "dtype": dtype,
        "on attention workers": config.attention_workers is not None,
        "prompts": _digest(prompts),
        "tokens": source.text.name,
        "closing tokens": source.ends,
        "masks": source.masks,
        "checkpoint": source.checkpoint and source.checkpoint.name,
        **model_fields(source.shape),
    }


class _Generation:
    """A batch of prompts, each of them tokens, and what follows them.

    Every rank computes the same logits, bit for bit, and draws from the same seed: so all of them have every token.
    """

    def __init__(self, config: GenerateConfig, ranks: Ranks, source: Source, prompts: Sequence[list[int]]) -> None:
        self.config, self.ranks, self.source, self.prompts = config, ranks, source, prompts
        self.ends = closing_tokens(config, source)

    @torch.no_grad()
    def result(self, model: PreTrainedModel) -> Result:
        """Fill the cache, the ranks sharing each chunk of the prompts, and let `model.generate` do the rest on each.

        Raises RunError where ranks have generated different tokens.
        """
        config, ranks = self.config, self.ranks
        tokens, mask = (x.to(ranks.device) for x in left_padded(self.prompts, self.source.text.padding))
        cache = huggingface.sharded_cache(
            model,
            capacity=tokens.shape[1] + config.max_new_tokens,
            batch=len(self.prompts),
            group=ranks.sequence,
            masks=self.source.masks,
            chunk=config.chunk,
        )
        with contextlib.closing(self._telling()) as telling:
            began = now(self.ranks.device)
            huggingface.prefill(
                model,
                tokens,
                cache,
                attention_mask=mask,
                schedule=config.schedule or "tree",
                layout=config.layout or "zigzag",
                progress=telling.prefilled,
            )
            prefilled = now(self.ranks.device)
            read = int(mask[:, : cache.get_seq_length()].sum())
            cache.world.meter.reset()
            torch.manual_seed(config.seed)
            forget_settings(model)
            generates: Any = model
            output = generates.generate(
                tokens,
                attention_mask=mask,
                past_key_values=cache,
                streamer=telling,
                generation_config=settings(config, self.source),
            )
            ended = now(self.ranks.device)
        return self._collected(output[:, tokens.shape[1] :], cache, read, (prefilled - began, ended - prefilled))

    def _telling(self) -> Telling:
        is_rank0 = self.ranks.rank == 0
        streams = is_rank0 and len(self.prompts) == 1 and not self.config.json
        return Telling(
            self.source.text.stream(self.prompts[0]) if streams else None,
            silent=self.ends,
            steps=self.config.max_new_tokens,
            shows=is_rank0,
        )

    def _collected(self, output: Tensor, cache: Any, read: int, seconds: tuple[float, float]) -> Result:
        """output [B, N]: the generated tokens of each prompt, filled up after one that closes the text.

        read: tokens that were prefilled. seconds: of the prefill, and of all that came after it.
        """
        ranks, text, ends = self.ranks, self.source.text, self.ends
        rows = rows_of(output, ends)
        meter = cache.world.meter.by_kind
        try:
            ranks.agree({"generated tokens": _digest(rows)})
        except ValueError as error:
            raise RunError(f"{error}; this is a bug, please report it with the command") from error
        sent = [meter[kind].bytes if kind in meter else 0 for kind in KINDS]
        figures = ranks.gather([*sent, cache.resident_bytes])
        busiest = figures[int(figures[:, :-1].sum(1).argmax()), :-1].tolist()
        return Result(
            **said(self.prompts, rows, text, ends),
            prefilled_tokens=read,
            prefill_seconds=seconds[0],
            decode_seconds=seconds[1],
            decode_bytes={kind: number for kind, number in zip(KINDS, busiest, strict=True) if number},
            cache_bytes=int(figures[:, -1].max()),
            ranks=ranks.size,
            device=ranks.device.type,
        )


def _digest(tokens: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(repr([list(row) for row in tokens]).encode()).hexdigest()[:16]
