"""`corrsteer collect`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import CollectSettings
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from corrsteer.runs.run import Run


@command
def collect(
    given: Given[CollectSettings],
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is already there.")] = False,
    json: Json = False,
) -> None:
    """Generate and grade a task's completions, and correlate every SAE feature with the reward."""
    settings = given.read()
    from corrsteer.cli import inputs
    from corrsteer.experiments.selection import selectable
    from corrsteer.runs.collect import CollectionStopped
    from corrsteer.runs.collect import collect as collect_
    from corrsteer.runs.options import Options

    same = ("pool", "positions", "permutations", "bootstrap", "block_size", "shuffle_seed", "patience",
            "statistics_bytes", "buffer_bytes", "backend")  # fmt: skip
    asked = {name: getattr(settings, name) for name in same} | {
        "coefficient_pool": settings.coefficient_pool or settings.pool,
        "scores": tuple(dict.fromkeys(("pearson", *settings.score))),
    }
    Options(**asked, patience_layers=None)  # refuses what it must before a model is loaded
    if settings.keep_bos and settings.positions != "all":
        raise CorrSteerError("keep_bos is of prompts, which positions 'all' reads; give --positions all too")
    sources = inputs.parse_saes(settings.sae)
    inputs.check_saes(sources)
    _prepare(settings.out, force)
    task = inputs.load_task(settings)
    model, tokenizer = inputs.load_model(settings)
    encoders = inputs.load_encoders(sources, model)
    if settings.precision:
        encoders = {layer: encoder.to(precision=settings.precision) for layer, encoder in encoders.items()}
    try:
        run = collect_(
            model,
            tokenizer,
            encoders,
            task,
            decoding=inputs.decoding(settings),
            exclude_tokens=() if settings.keep_bos else None,
            hook_offset=settings.hook_offset,
            patience_layers=selectable(encoders) or None,
            **asked,
        )
    except CollectionStopped as stopped:
        if stopped.run.n == 0:
            raise
        _save(stopped.run, settings)
        raise CorrSteerError(
            f"{stopped.message}; the {stopped.run.n} samples before are in {settings.out}, which select takes as it is"
        ) from None
    _save(run, settings)
    _print(run, settings.out, json)


def _print(run: Run, out: Path, json: bool) -> None:
    """The mean reward, and the top feature of each layer."""
    from corrsteer.stats.stability import settled_at

    reward = run.rewards.nanmean().item()
    tops = {layer: run.correlation(layer).max(0) for layer in run.moments}
    tested = run.significance() if run.testable() else {}
    p = {layer: float(of_layer.p_adjusted[tops[layer].indices]) for layer, of_layer in tested.items()}
    settled = settled_at(run.snapshots)
    result = {
        "out": str(out),
        "samples": run.n,
        "reward": reward,
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
    text = "\n".join([f"{run.n} samples, mean reward {reward:.3f}, written to {out}", *best])
    emit(result, json, text, run.notes)


def _prepare(out: Path, force: bool) -> None:
    """See that a run can be written before it is collected."""
    from corrsteer.cli import inputs

    if (out / "run.json").exists() and not force:
        raise CorrSteerError(f"out {out} already holds a run; give another directory, or --force to replace it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorrSteerError(f"out {out} cannot be written to ({error.strerror}); give another directory") from None
    inputs.check_writable(out)


def _save(run: Run, settings: CollectSettings) -> None:
    """Write the run, with the settings that it takes to evaluate on the same task with the same model."""
    recorded = settings.model_dump(mode="json", exclude={"out", "sae"})
    for name in ("task", "model"):
        if Path(recorded[name]).exists():
            recorded[name] = str(Path(recorded[name]).resolve())
    run.provenance["settings"] = recorded
    try:
        run.save(settings.out)
    except CorrSteerError as error:  # what took hours is not lost to a full disk
        elsewhere = Path(tempfile.mkdtemp(prefix="corrsteer-run-"))
        run.save(elsewhere)
        raise CorrSteerError(f"{error}; the run was saved to {elsewhere} instead") from None
