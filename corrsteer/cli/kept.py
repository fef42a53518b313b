"""What a command has done so far, kept beside the file that it writes, so that the same command goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from corrsteer.cli.app import say
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from torch import nn

    from corrsteer.lm.decoding import Decoding
    from corrsteer.rollouts.journal import Journal
    from corrsteer.steering.steering import Steering
    from corrsteer.tasks import Task

EVALUATIONS = "corrsteer.evaluations/1"
BEGUN = "begun"  # in a result: what it is the result of


class Job(NamedTuple):
    """What a command's result depends on, and what is noted where it changes, see `Journal`."""

    begun: dict[str, Any]
    made_with: dict[str, Any]


def job(
    command: str,
    model: nn.Module,
    tasks: Mapping[str, Task],
    decoding: Decoding,
    steerings: Mapping[str, Steering],
    **options: Any,
) -> Job:
    """A command's job."""
    from corrsteer.lm.identity import computed_on, described

    begun = {
        "command": command,
        "model": described(model),
        "tasks": {name: asdict(task.identity) for name, task in tasks.items()},
        "decoding": asdict(decoding),
        "steerings": {
            name: {"digest": one.digest, "positions": one.positions, "scale": one.scale}
            for name, one in steerings.items()
        },
        **options,
    }
    graders = [task.grading.source for task in tasks.values()]
    return Job(begun, computed_on(model) | {"graders of source": graders})


def steering(out: Path, job: Job, force: bool, make: Callable[[Journal], Steering]) -> Steering:
    """What `make` gives, in a file: gone on with where it was not finished, and read where it was."""
    from corrsteer.files import remove_parts
    from corrsteer.rollouts.journal import Journal, beside

    with Journal(beside(out), job.begun, made_with=job.made_with, anew=force) as journal:
        known = _steering_at(out)
        if known is not None and not force and known.provenance.get(BEGUN) == journal.begun:
            say(f"{out} holds what is asked for; give --force to make it again")
            journal.leave()
            return known
        made = make(journal)
        made.provenance[BEGUN] = journal.begun
        made.notes += journal.notes

        def write() -> None:
            remove_parts(out)
            made.save(out)

        journal.settle(write if made.features else lambda: None)
        return made


def evaluations(out: Path, job: Job, force: bool, make: Callable[[Journal], dict[str, Any]]) -> dict[str, Any]:
    """The same of what is written as JSON. A file that is there and holds another result is refused."""
    from corrsteer.files import remove_parts, to_json, write_utf8
    from corrsteer.rollouts.journal import Journal, beside, check_same

    with Journal(beside(out), job.begun, made_with=job.made_with, anew=force) as journal:
        known = None if force else _json_at(out)
        if known is not None and known.get(BEGUN) == journal.begun:
            say(f"{out} holds what is asked for; give --force to make it again")
            journal.leave()
            return known
        if known is not None and not journal.resumed:
            if not isinstance(known.get(BEGUN), dict):
                raise CorrSteerError(
                    f"out {out} is already there, and no evaluation that says what it is of; give another path, or "
                    f"--force to replace it"
                )
            check_same(known[BEGUN], journal.begun, f"the result that is there in {out}")
        made = {"format": EVALUATIONS, BEGUN: journal.begun, **make(journal), "notes": journal.notes}

        def write() -> None:
            remove_parts(out)
            write_utf8(out, to_json(made, indent=1) + "\n")

        journal.settle(write)
        return made


def digest_of(path: Path) -> str:
    """What tells a file's contents from others."""
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _json_at(out: Path) -> dict[str, Any] | None:
    from corrsteer.files import from_json

    try:
        found = from_json(out.read_bytes())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _steering_at(out: Path) -> Steering | None:
    from corrsteer.steering.steering import Steering

    try:
        return Steering.load(out) if out.exists() else None
    except CorrSteerError:
        return None
