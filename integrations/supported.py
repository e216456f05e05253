"""Which versions of the frameworks the adapters are tested with."""

from __future__ import annotations

from importlib.metadata import version as installed_version


def require(package: str, at_least: str, below: str, got: str | None = None) -> None:
    """Raise ValueError unless a version of the package in [at_least, below) is installed; `got`, where it says so."""
    from packaging.version import Version  # which every framework brings

    got = got or installed_version(package)
    if not Version(at_least) <= Version(Version(got).base_version) < Version(below):
        raise ValueError(
            f"{package}: got version {got}, expected >={at_least},<{below}, which seqpar's adapter is tested with; "
            f"run: pip install '{package}>={at_least},<{below}'"
        )
