"""What an installed seqpar ships, exposes and imports, seen from fresh processes and fresh environments."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
from build import ProjectBuilder

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))

# Folder at the top of the repository -> its import name.
PACKAGES = {
    "comm": "seqpar.comm",
    "integrations": "seqpar.integrations",
    "kernels": "seqpar.kernels",
    "launch": "seqpar.launch",
    "offload": "seqpar.offload",
    "seqpar": "seqpar",
}
# Import name -> the packages that its modules may not import.
MAY_NOT_IMPORT = {
    "seqpar.comm": {"seqpar", "seqpar.kernels", "seqpar.integrations", "seqpar.launch", "seqpar.offload"},
    "seqpar.kernels": {"seqpar", "seqpar.comm", "seqpar.integrations", "seqpar.launch", "seqpar.offload"},
    "seqpar": {"seqpar.integrations", "seqpar.launch", "seqpar.offload"},
    "seqpar.offload": {"seqpar.integrations", "seqpar.launch"},
    "seqpar.integrations": {"seqpar.launch"},
    "seqpar.launch": set(),
}
HEAVY = {
    "accelerate",
    "deepspeed",
    "flash_attn",
    "matplotlib",
    "megatron",
    "numba",
    "rich",
    "safetensors",
    "transformers",
    "triton",
    "tyro",
}


def run_python(*args: str | Path, cwd: Path, interpreter: str | Path = sys.executable, stdin: str = "") -> str:
    """The standard output of `interpreter args` in `cwd`, with no PYTHON variables set."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [interpreter, *args], cwd=cwd, env=env, input=stdin, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    for folder in [*PACKAGES, "tests"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session", params=["wheel", "sdist", "editable"])
def wheel(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip installs: built from the sources, from a source distribution, or for an editable install."""
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "sdist":
        with tarfile.open(ProjectBuilder(source).build("sdist", out)) as archive:
            archive.extractall(out, filter="data")
        (source,) = (path for path in out.iterdir() if path.is_dir())
    return Path(ProjectBuilder(source).build("editable" if request.param == "editable" else "wheel", out))


@pytest.mark.parametrize("wheel", ["wheel", "sdist"], indirect=True)
def test_every_file_ships(wheel: Path, source: Path) -> None:
    expected = {
        f"{name.replace('.', '/')}/{path.relative_to(source / folder).as_posix()}"
        for folder, name in PACKAGES.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    with ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "seqpar/py.typed" in shipped
    assert shipped == expected


@pytest.mark.filterwarnings("ignore:Editable installation")
def test_installs_under_one_import_root(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    interpreter = tmp_path / "env" / "bin" / "python"
    run_python("-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    # The environment holds seqpar alone at first, so that whatever is found under a bare name is ours.
    probe = """
import importlib, importlib.util, json, sys
bare, names, dependencies = json.loads(sys.argv[1])
found = [name for name in bare if importlib.util.find_spec(name)]
sys.path.append(dependencies)
print(json.dumps([found, [importlib.import_module(name).__file__ for name in names]]))
"""
    bare = [folder for folder in [*PACKAGES, "tests"] if folder != "seqpar"]
    question = json.dumps([bare, list(PACKAGES.values()), str(SITE_PACKAGES)])
    found, files = json.loads(run_python("-c", probe, question, cwd=tmp_path, interpreter=interpreter))
    assert found == []
    assert not [file for file in files if Path(file).is_relative_to(ROOT)], "the checkout answered for the installation"
    assert (tmp_path / "env" / "bin" / "seqpar").exists()


def test_import_brings_torch_and_nothing_heavier(tmp_path: Path) -> None:
    loaded = set(run_python("-c", "import seqpar, sys; print(*sys.modules)", cwd=tmp_path).split())
    assert {"seqpar", "seqpar.comm", "seqpar.kernels", "torch"} <= loaded
    assert loaded & HEAVY == set()


def test_command_in_the_checkout_leaves_foreign_names_alone() -> None:
    """`seqpar`, started in the repository root, still finds Jupyter's `comm` and Hugging Face's `kernels`."""
    # -i: once the command has ended, its own process goes on with what stands on standard input.
    script = Path(sysconfig.get_path("scripts")) / "seqpar"
    statements = """
import comm, json, kernels, transformers.integrations.hub_kernels
print(); print(json.dumps([comm.__file__, kernels.__file__]))
"""
    last_line = run_python("-i", script, "--help", cwd=ROOT, stdin=statements).splitlines()[-1]
    assert json.loads(last_line) == [str(SITE_PACKAGES / name / "__init__.py") for name in ("comm", "kernels")]


def test_python_in_the_checkout_does_shadow_them() -> None:
    """The hazard that the test above guards against is real: drop both once this fails."""
    statement = "import importlib.util as u; print(u.find_spec('comm').origin, u.find_spec('kernels').origin)"
    origins = run_python("-c", statement, cwd=ROOT).split()
    assert origins == [str(ROOT / name / "__init__.py") for name in ("comm", "kernels")]


@pytest.mark.parametrize("name", ["comm", "kernels"])
def test_pytest_leaves_foreign_names_alone(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(SITE_PACKAGES / name / "__init__.py")


def imported_names(path: Path, package: str) -> Iterator[str]:
    """Every name that the module at `path`, of `package`, imports, made absolute: `a.b.c` for `from a.b import c`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def owner(name: str) -> str | None:
    """The package of ours that an absolute name belongs to."""
    return max((p for p in PACKAGES.values() if f"{name}.".startswith(f"{p}.")), key=len, default=None)


@pytest.mark.parametrize("folder", PACKAGES)
def test_folder_imports_only_what_it_may(folder: str) -> None:
    forbidden = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).parent.parts
        for name in imported_names(path, ".".join([PACKAGES[folder], *parts])):
            bare = name.split(".")[0] in PACKAGES.keys() - {"seqpar"}
            if bare or owner(name) in MAY_NOT_IMPORT[PACKAGES[folder]]:
                forbidden.append(f"{path.relative_to(ROOT)}: {name}")
    assert forbidden == []
