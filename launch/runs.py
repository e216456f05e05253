"""What a run leaves of its model besides checkpoints: enough to load and use it, without being told anything.

`model/` in the folder of a run holds the Hugging Face config, the tokenizer where there is one, and seqpar.json: what
the tokens are, and the options of the mask, none of them left to a default.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .errors import RunError
from .manifest import read_manifest
from .masks import describe, s2_sizes
from .model import model_fields
from .outputs import MODEL, OPTIONS, newest_checkpoint
from .text import ByteText, Text, TokenizerText

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KINDS = {ByteText.name, TokenizerText.name}
_MASKS = {"causal", "window", "s2"}


def write_model(out: Path, config: TrainConfig, shape: PretrainedConfig, text: Text) -> str:
    """Write what belongs to the run's model, over what is there, and say where. Raises RunError where that fails."""
    folder = out / MODEL
    options = {"tokens": text.name, **_mask_options(config, shape)}
    try:
        folder.mkdir(exist_ok=True)
        (folder / OPTIONS).write_text(json.dumps(options, indent=1) + "\n")
        shape.save_pretrained(folder)
        text.save(folder)
    except OSError as error:
        raise RunError(
            f"{folder} can't be written: {error}; free space or mend the folder, then start again"
        ) from error
    return str(folder)


def _mask_options(config: TrainConfig, shape: PretrainedConfig) -> dict[str, Any]:
    """The options of the mask, by the names of their fields."""
    if config.mask == "causal":
        return {"mask": "causal"}
    if config.mask == "window":
        return {"mask": "window", "window": config.window_tokens}
    block, local, stride = s2_sizes(config, shape)
    return {
        "mask": "s2",
        "s2_block": block,
        "s2_local": local,
        "s2_stride": stride,
        "s2_dense_heads": config.s2_dense_heads,
        "s2_dense_layers": sorted(config.s2_dense_layers),
        "s2_allow_incomplete": config.s2_allow_incomplete,
    }


@dataclass(frozen=True)
class SavedRun:
    """A run's model as its folder has it.

    folder: of the config and the tokenizer. checkpoint: the newest whole one. mask: a configuration with its mask.
    """

    folder: Path
    checkpoint: Path
    shape: PretrainedConfig
    text: Text
    mask: TrainConfig


def read_run(out: Path, report: Callable[[str], None]) -> SavedRun:
    """All about a run's model but its weights. Raises ValueError for what is missing, broken or contradictory.

    `report` gets a line about each checkpoint that is passed over, not being whole.
    """
    from transformers import AutoConfig

    folder, checkpoint = out / MODEL, newest_checkpoint(out, report)
    tokens, mask = _read_options(folder / OPTIONS)
    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(_broken(folder / "config.json", "the config of the run's model")) from error
    text = ByteText() if tokens == ByteText.name else TokenizerText.load(folder)
    manifest = read_manifest(checkpoint)
    for name, value in {"mask": describe(mask, shape), **model_fields(shape)}.items():
        if manifest.get(name) != value:
            raise ValueError(
                f"--model {out}: its checkpoint {checkpoint.name} was made with {name} {manifest.get(name)}, its "
                f"{MODEL}/ has {value}; expected the same: resume the run, which writes {MODEL}/ again"
            )
    return SavedRun(folder, checkpoint, shape, text, mask)


def _read_options(path: Path) -> tuple[str, TrainConfig]:
    try:
        options = dict(json.loads(path.read_text()))
        tokens, kind = options.pop("tokens"), options.pop("mask")
        dense = tuple(options.pop("s2_dense_layers", ()))
        mask = TrainConfig(mask=kind, **options, s2_dense_layers=dense)
        if tokens not in _KINDS or kind not in _MASKS:
            raise ValueError(f"got tokens {tokens!r} and mask {kind!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_broken(path, f"what `seqpar train` writes ({error})")) from error
    # The run was let have this mask: whether its heads see everything together is no question any more.
    return tokens, replace(mask, s2_allow_incomplete=True) if mask.mask == "s2" else mask


def _broken(path: Path, expected: str) -> str:
    return f"{path} is missing or broken; expected {expected}: resume the run, which writes it again"
