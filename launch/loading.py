"""A model to generate with, whole on every rank: a Hugging Face folder's, or that of a run's newest checkpoint."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import seqpar
from seqpar.integrations import huggingface

from .checkpoint import cause
from .masks import layer_masks
from .outputs import is_run
from .runs import read_run
from .text import Text, TokenizerText

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Source:
    """What there is to know of a model before its weights are read.

    path: as --model has it. folder: of its config. masks: of its layers, None for what its config says. ends: tokens
    that close a text. checkpoint: of a run, where the weights are.
    """

    path: Path
    folder: Path
    shape: PretrainedConfig
    text: Text
    masks: list[seqpar.Mask] | None
    ends: tuple[int, ...]
    checkpoint: Path | None = None

    @property
    def positions(self) -> int | None:
        """How many tokens in a row the model has positions for, where its config says so."""
        return getattr(self.shape.get_text_config(), "max_position_embeddings", None)

    @property
    def embeddings(self) -> int:
        """How many different tokens the model reads and writes, padding among them."""
        return int(self.shape.get_text_config().vocab_size)


def read_source(path: Path, report: Callable[[str], None]) -> Source:
    """The model in a folder: a run's, or Hugging Face's. Raises ValueError for what is missing or can't be read.

    `report` gets a line about each checkpoint of a run that is passed over, not being whole.
    """
    if is_run(path):
        run = read_run(path, report)
        masks = layer_masks(run.mask, run.shape)
        ends = _ends(run.text, run.shape)
        return Source(path, run.folder, run.shape, run.text, masks, ends, run.checkpoint)
    from transformers import AutoConfig

    try:
        shape = AutoConfig.from_pretrained(path, local_files_only=True)
        generation = path / "generation_config.json"
        settings = json.loads(generation.read_text()) if generation.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {path} has a config that can't be read ({_first_line(error)}); expected the folder of a Hugging "
            "Face model, as save_pretrained writes it: use such a one"
        ) from error
    text = TokenizerText.load(path, as_documents=False)
    ends = _ends(text, shape, settings.get("eos_token_id"))
    return Source(path, path, shape, text, None, ends)


def _ends(text: Text, shape: PretrainedConfig, others: int | Iterable[int] | None = None) -> tuple[int, ...]:
    """Every token that closes a text by its tokenizer, by the model's config, or besides: one, several, or none."""
    by_config = getattr(shape.get_text_config(), "eos_token_id", None)
    found = [[each] if isinstance(each, int) else each or () for each in (text.ends, by_config, others)]
    return tuple(dict.fromkeys(token for tokens in found for token in tokens))


def load_model(source: Source, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The whole model, with seqpar's attention, on this rank's device.

    Raises ValueError where weights are missing or don't fit, and where the model's attention can't be taken over.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": huggingface.NAME, "dtype": dtype}
    wrong: list[str] = []
    try:
        if source.checkpoint is not None:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(source.shape, **options)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                **options,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
            model, report = loaded
            wrong = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"--model {source.path} has weights that can't be read ({_first_line(error)}); expected those of its "
            "config, as save_pretrained writes them: complete the folder"
        ) from error
    except (ValueError, ImportError) as error:
        raise ValueError(_not_taken_over(source, _first_line(error))) from error
    if not type(model)._supports_attention_backend:
        raise ValueError(_not_taken_over(source, f"{type(model).__name__} doesn't let it be replaced"))
    if source.checkpoint is not None:
        _read_checkpoint(source.checkpoint, model)
    if wrong:
        raise ValueError(
            f"--model {source.path} lacks {len(wrong)} weights of its config's model, or has them in other shapes, "
            f"{wrong[0]} among them; expected all of them: complete the folder, or mend its config.json"
        )
    nn.Module.to(model, device)
    return model.eval()


def _not_taken_over(source: Source, reason: str) -> str:
    return (
        f"--model {source.path} can't be run with seqpar's attention ({reason}); expected a causal language model "
        "whose attention transformers can replace: use another model"
    )


def _read_checkpoint(path: Path, model: PreTrainedModel) -> None:
    """Every parameter from a run's checkpoint, on this rank alone: no rank waits for another."""
    parameters = get_model_state_dict(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
            dcp.load({"model": parameters}, checkpoint_id=path, no_dist=True)
    except dcp.api.CheckpointException as error:
        raise ValueError(
            f"checkpoint {path} can't be read ({cause(error)}); expected the weights of the run's model: remove it, "
            "and the one before is used"
        ) from error
    set_model_state_dict(model, parameters)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells a model's weights from others: a digest of names, shapes, dtypes, and sums of the bits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        bits = tensor.contiguous().view(_BITS[tensor.element_size()])
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
