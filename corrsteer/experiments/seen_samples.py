"""Which samples a steering was selected and validated on, and whether others are among them.

A steering's provenance lists both: `selected_on`, the samples that features were correlated on, and `validated_on`,
those by whose score features or a scale were chosen. Each entry is what `Task.samples` gives.
"""

from __future__ import annotations

from typing import Any

from corrsteer.runs.run import BEGUN
from corrsteer.tasks import Task
from corrsteer.tasks.identity import count_seen

SELECTED, VALIDATED = "selected_on", "validated_on"
USES = {SELECTED: "features were selected on", VALIDATED: "the steering was validated on"}


def selected(provenance: dict[str, Any]) -> dict[str, Any]:
    """A run's provenance as that of a steering, which was selected on the run's samples."""
    seen = [provenance["samples"]] if "samples" in provenance else []
    return {name: value for name, value in provenance.items() if name not in ("samples", BEGUN)} | {SELECTED: seen}


def validated(provenance: dict[str, Any], validation: Task) -> dict[str, Any]:
    """The same provenance, with one more task that was validated on."""
    return provenance | {VALIDATED: [*provenance.get(VALIDATED, []), validation.samples()]}


def overlap_notes(task: Task, provenance: dict[str, Any], uses: tuple[str, ...] = (SELECTED, VALIDATED)) -> list[str]:
    """A note for each use of samples that the task has too, whose score says little of others."""
    prompts = [example.prompt for example in task.examples]
    seen = {use: count_seen(prompts, provenance.get(use, [])) for use in uses}
    return [
        f"{n} of the {len(task)} samples of {task.identity} are among those that {USES[use]}, so the score flatters; "
        f"take samples that were left out of those"
        for use, n in seen.items()
        if n
    ]


def repetition_notes(task: Task) -> list[str]:
    """A note where samples repeat a prompt, as intervals and p-values suppose that they are independent."""
    repeated = len(task) - len({example.prompt for example in task.examples})
    return [
        f"{repeated} of the {len(task)} samples repeat a prompt, but intervals and p-values take samples to be "
        f"independent and are too sure; give each prompt once"
    ] * bool(repeated)
