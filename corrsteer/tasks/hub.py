"""Files of a dataset on the Hugging Face hub: fetched as files, so that no code of a dataset ever runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corrsteer.tasks.graders import TaskError, one_line


def fetch(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder in the hub's cache with those of a dataset's files that match; those that are there are not fetched.

    Raises
    ------
    TaskError : where the dataset cannot be had, with what to do.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # the library, and what it sends requests with, raise many kinds
        gated = isinstance(error, GatedRepoError)
        first = "accept its terms on its page and run `hf auth login`, or " if gated else ""
        raise TaskError(
            f"dataset {repository} cannot be had from the hub: {one_line(error)}; {first}give a copy of your own: "
            f"--data PATH, or data=PATH in Python"
        ) from error
    return Path(folder)
