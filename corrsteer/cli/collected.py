"""What `collect` and `regrade` leave: a run's directory, and what is said of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from corrsteer.cli.app import emit
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from corrsteer.runs.run import Run


def prepare(out: Path, force: bool) -> None:
    """See that a run can be written before it is made."""
    from corrsteer.cli import inputs

    if (out / "run.json").exists() and not force:
        raise CorrSteerError(f"out {out} already holds a run; give another directory, or --force to replace it")
    inputs.check_folder(out)


def save(run: Run, out: Path) -> None:
    """Write a run, or to another directory where that fails."""
    try:
        run.save(out)
    except CorrSteerError as error:  # what took hours is not lost to a full disk
        elsewhere = Path(tempfile.mkdtemp(prefix="corrsteer-run-"))
        run.save(elsewhere)
        raise CorrSteerError(f"{error}; the run was saved to {elsewhere} instead") from None


def emit_run(run: Run, out: Path, json: bool) -> None:
    """Print mean rewards, and the top feature of each layer."""
    from corrsteer.stats.stability import settled_at

    means = {name: rewards.nanmean().item() for name, rewards in run.all_rewards().items()}
    tops = {layer: run.correlation(layer).max(0) for layer in run.moments}
    tested = run.significance() if run.testable() else {}
    p = {layer: float(of_layer.p_adjusted[tops[layer].indices]) for layer, of_layer in tested.items()}
    settled = settled_at(run.snapshots)
    result = {
        "out": str(out),
        "samples": run.n,
        "reward": means[run.reward],
        "rewards": means,
        "notes": run.notes,
        "layers": {
            str(layer): {
                "feature": int(top.indices),
                "r": float(top.values),
                "p_adjusted": p.get(layer),
                "settled_at": settled.get(layer),
            }
            for layer, top in tops.items()
        },
    }
    best = [
        f"  layer {layer}: top feature {int(top.indices)}, r = {float(top.values):+.3f}"
        + (f", adjusted p {p[layer]:.4f}" if layer in p else "")
        + (f", in front since {settled[layer]} samples" if len(run.snapshots) > 2 else "")
        for layer, top in tops.items()
    ]
    named = len(means) > 1 or run.reward != "reward"
    said = ", ".join(f"mean {name if named else 'reward'} {mean:.3f}" for name, mean in means.items())
    emit(result, json, "\n".join([f"{run.n} samples, {said}, written to {out}", *best]), run.notes)
