"""What a user should know of a run's statistics, which other rewards or another part of its samples have others of."""

from __future__ import annotations

from corrsteer.ops import Moments
from corrsteer.stats.evidence import Evidence

FEW_FIXED = 0.1  # share of samples that no permutation moves, above which it is noted


def statistics_notes(moments: Moments, evidence: Evidence | None) -> list[str]:
    """What limits statistics, of any layer: a reward that never varies, and prompts with several samples."""
    notes = []
    if moments.n and not bool(moments.label_varies()[0]):
        notes.append(
            f"every one of the {moments.n} rewards was {float(moments.y_mean[0]):g}, so nothing correlates with them "
            f"and no feature can be selected; use a task that the model solves sometimes"
        )
    if evidence is None or not evidence.clustered:
        return notes
    if evidence.rows is None:
        notes.append(
            f"{evidence.n} samples of {int(evidence.n_groups)} prompts are not independent, so without activations "
            f"there are no delta intervals; keep them, or collect with bootstrap=500"
        )
    if evidence.within:
        notes.append(
            f"rewards differ within {int(evidence.n_informative[0])} of {int(evidence.n_groups)} prompts, and only "
            f"these say something of what tells good from bad answers to one prompt"
        )
    elif evidence.fixed > FEW_FIXED * moments.n:
        notes.append(
            f"{evidence.fixed} of {moments.n} samples cannot change places in permutations, as no other prompt of "
            f"their block has as many samples; take as many of each prompt, or larger blocks"
        )
    return notes
