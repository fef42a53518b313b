"""Whether this process works alone or as one of several, as a launcher such as `torchrun` says in the environment."""

from __future__ import annotations

import os


def among_others() -> bool:
    """Whether it was launched as one of several that share a job; their number may change while it runs."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Its number among all, from 0; 0 where it works alone."""
    return int(os.environ["RANK"]) if among_others() else 0


def world_size() -> int:
    """How many processes were launched."""
    return int(os.environ["WORLD_SIZE"]) if among_others() else 1


def local_rank() -> int | None:
    """Its number among those of its machine, which says which GPU is its own; None where it works alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) if among_others() else None
