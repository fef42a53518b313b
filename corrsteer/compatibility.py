"""Which versions of its dependencies corrsteer was tested with, and a word about installed ones that are newer."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re

from corrsteer.version import __version__

log: logging.Logger = logging.getLogger(__name__)

# The newest minor release of each that the test suite has run on; the tests see to it that this is kept up.
TESTED = {"torch": "2.13", "triton": "3.9", "transformers": "5.24", "sae-lens": "6.54"}


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def newer_than_tested() -> list[str]:
    """A sentence for each dependency of a newer minor release than corrsteer was tested with."""
    found = {package: installed(package) for package in TESTED}
    return [
        f"{package} {version} is newer than {TESTED[package]}, which corrsteer {__version__} was tested with; should "
        f"something fail, try pip install '{package}=={TESTED[package]}.*'"
        for package, version in found.items()
        if version is not None and minor(version) > minor(TESTED[package])
    ]


def minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, which compare: of 5.24.1 (5, 24)."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return tuple(int(number or 0) for number in found.groups()) if found else ()


@functools.cache
def warn_once() -> None:
    """At the first use of what the dependencies do, warn of those that are newer than tested."""
    for sentence in newer_than_tested():
        log.warning("%s", sentence)
