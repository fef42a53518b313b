"""`corrsteer demo`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit, say


@command
def demo(
    json: Json = False,
    seed: Annotated[int, typer.Option(help="Seed of the division into train, validation and test.")] = 0,
    shuffle_rewards: Annotated[
        bool, typer.Option("--shuffle-rewards", help="A negative control: rewards go to other sums.")
    ] = False,
) -> None:
    """Run the whole job on a small model that ships with corrsteer; no network, under a minute."""
    from corrsteer.demo.run import run_demo

    tell = say if json else typer.echo
    result = run_demo(seed, say=tell, progress=sys.stderr.isatty(), shuffle_rewards=shuffle_rewards)
    if json:
        emit(result, True, "")
