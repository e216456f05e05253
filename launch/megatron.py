"""`seqpar megatron SCRIPT ...`: a Megatron-LM script as it is, with seqpar's attention and seqpar's flags in place."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

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
    add_flags(path)
    # Megatron reads nothing else where it reads a YAML file, which then says what layer it wants.
    sys.argv = [script, *arguments, *([] if "--yaml-cfg" in given else SPEC)]
    return path


def run(script: Path) -> None:
    """Run a script that was prepared; what it raises is its own."""
    runpy.run_path(str(script), run_name="__main__")


def add_flags(script: Path) -> None:
    """Let Megatron-LM's parser know seqpar's flags. Raises ValueError where there is no Megatron-LM to import."""
    try:
        import megatron.training.arguments as theirs

        from seqpar.integrations import megatron as ours
    except ImportError as error:
        raise ValueError(
            f"{script}: Megatron-LM can't be imported beside it ({error}); expected a script of its checkout, "
            "and what that requires: see its README"
        ) from error
    ours.check_version()
    own = theirs.add_megatron_arguments
    theirs.add_megatron_arguments = lambda parser: ours.add_arguments(own(parser))
