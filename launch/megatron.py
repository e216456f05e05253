"""`seqpar megatron SCRIPT ...`: a Megatron-LM script as it is, with seqpar's attention and seqpar's flags in place."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.nn import Module

USAGE = """usage: seqpar megatron SCRIPT [MEGATRON'S ARGUMENTS] [--seqpar-schedule ...] [--seqpar-mask ...]

Runs a script of Megatron-LM that reads --spec, such as pretrain_gpt.py, as it is, with seqpar's attention over the
ranks of --context-parallel-size. Under torchrun:

  torchrun --nproc-per-node 8 --no-python seqpar megatron pretrain_gpt.py --context-parallel-size 8 ...

The script's own --help lists Megatron's arguments, and seqpar's among them:

  seqpar megatron pretrain_gpt.py --help"""

SPEC = ["--spec", "seqpar.integrations.megatron", "layer"]


def prepare(argv: Sequence[str]) -> Path:
    """Make ready to run the script that comes first, and return it. Raises ValueError where that can't be."""
    script, *arguments = argv
    path = Path(script).resolve()
    if not path.is_file():
        raise ValueError(f"{script} does not exist; name a script of a Megatron-LM checkout, such as pretrain_gpt.py")
    given = [argument.split("=")[0] for argument in arguments]
    if "--spec" in given:
        raise ValueError(
            f"--spec got a layer of your own; expected none, since {' '.join(SPEC)} is added: leave it out"
        )
    flags = [name for name in given if name.startswith("--seqpar-")]
    if "--yaml-cfg" in given and flags:
        raise ValueError(
            f"{flags[0]} got --yaml-cfg too, beside which Megatron reads no other arguments; expected it in the YAML "
            f"file: write {flags[0][2:].replace('-', '_')}: ... there, and spec: [{', '.join(SPEC[1:])}]"
        )
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    put_in_place(path)
    # Megatron reads nothing else where it reads a YAML file, which then says what layer it wants.
    sys.argv = [script, *arguments, *([] if "--yaml-cfg" in given else SPEC)]
    return path


def run(script: Path) -> None:
    """Run a script that was prepared; what it raises is its own."""
    runpy.run_path(str(script), run_name="__main__")


def put_in_place(script: Path) -> None:
    """Let Megatron-LM's parser know seqpar's flags, and let no model be trained without seqpar's attention.

    Raises ValueError where there is no Megatron-LM to import.
    """
    try:
        import megatron.training.arguments as parsing
        import megatron.training.training as training

        from seqpar.integrations import megatron as ours
    except ImportError as error:
        raise ValueError(
            f"{script}: Megatron-LM can't be imported beside it ({error}); expected a script of its checkout, "
            "and what that requires: see its README"
        ) from error
    ours.check_version()
    arguments, models = parsing.add_megatron_arguments, training.get_model

    def checked(*args: Any, **kwargs: Any) -> Any:
        built = models(*args, **kwargs)
        check_models(built)
        return built

    parsing.add_megatron_arguments = lambda parser: ours.add_arguments(arguments(parser))
    training.get_model = checked


def check_models(models: Iterable[Module]) -> None:
    """Raise ValueError for models with transformer layers of which none has seqpar's attention."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from seqpar.integrations.megatron import CoreAttention

    kinds = {type(module) for model in models for module in model.modules()}
    if any(issubclass(kind, TransformerLayer) for kind in kinds) and CoreAttention not in kinds:
        raise ValueError(
            f"the script built a model of other layers than {' '.join(SPEC)} names; expected one that reads --spec, as "
            "pretrain_gpt.py does"
        )
