"""Which checkpoints are whole: read without torch, by the ranks and by the launcher that reports on them.

A checkpoint is a folder `step-00000040` with a manifest.json, written last, that lists the size of every other file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def name_of(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint's folder has behind it."""
    return int(path.name.removeprefix("step-"))


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `content` and the sizes of the folder's files, to the disk, as the folder's manifest."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    with open(folder / MANIFEST, "w") as stream:
        json.dump({**content, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises ValueError saying what is missing or of the wrong size."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is missing or broken; expected a list of files and sizes") from error
    for name, size in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{file} {state}; expected {size} bytes")
    return manifest


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, whole or not, newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def whole_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory that are whole, newest first."""
    return [path for path in checkpoints(directory) if _is_whole(path)]


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ValueError:
        return False
    return True


def last_whole(directory: Path, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest whole checkpoint, or None; `report` gets a line about each newer one that isn't whole."""
    for path in checkpoints(directory):
        try:
            read_manifest(path)
        except ValueError as error:
            report(f"checkpoint {path} is not whole and is passed over: {error}")
        else:
            return path
    return None
