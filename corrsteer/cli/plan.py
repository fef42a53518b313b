"""`corrsteer plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.plan_memory import plan_memory
from corrsteer.cli.settings import MemorySettings
from corrsteer.errors import CorrSteerError

FOR_BOTH = ("samples", "memory", "json")


@command
def plan(
    context: typer.Context,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Instead, say what a collection takes, of memory and disk, and whether a machine has it."
        ),
    ] = False,
    frequency: Annotated[float, typer.Option(help="Share of samples in which the feature is active.")] = 0.01,
    activations: Annotated[int, typer.Option(help="Samples in which it should be seen active.")] = 10,
    confidence: Annotated[float, typer.Option(help="Of seeing it that often, and of the intervals.")] = 0.95,
    features: Annotated[int, typer.Option(help="Features of each SAE.")] = 16384,
    layers: Annotated[int, typer.Option(help="Number of layers with an SAE.")] = 1,
    samples: Annotated[int, typer.Option(help="Samples that the run has.")] = 4000,
    alpha: Annotated[float, typer.Option(help="Accepted chance of any false discovery among all features.")] = 0.05,
    power: Annotated[float, typer.Option(help="Chance with which a true correlation should be found.")] = 0.8,
    correlation: Annotated[float, typer.Option(help="Correlation to be found and known well.")] = 0.1,
    reward_rate: Annotated[float, typer.Option(help="Share of samples that are rewarded.")] = 0.5,
    *,
    given: Given[MemorySettings],
    json: Json = False,
) -> None:
    """Say how many samples a run needs, and what it can tell with those it has; no model is run.

    With --memory, say what a collection takes of a model and SAEs, whose weights are not read. Its options, from
    --config on, are those of `corrsteer collect`, and some that tell what it is of and where it runs.
    """
    from corrsteer.report.tables import table
    from corrsteer.stats import planning

    if memory:
        own = [name for name in context.params if name not in (*FOR_BOTH, "config", *MemorySettings.model_fields)]
        asked = [name for name in own if _is_given(context, name)]
        if asked:
            raise CorrSteerError(f"{', '.join(map(_flag, asked))} cannot be used with --memory, which plans no samples")
        plan_memory(given.read(), samples, json)
        return
    if given.names:
        raise CorrSteerError(f"{', '.join(given.names)} can only be used with --memory")
    if not 0 < confidence < 1:
        raise CorrSteerError(f"confidence must be between 0 and 1, got {confidence:g}")
    needed = planning.samples_to_see(activations, frequency, 1 - confidence)
    missed = {n: planning.miss_probability(n, activations, frequency) for n in (samples, needed.as_published)}
    low, high = planning.correlation_bounds(frequency, reward_rate)
    binary = (correlation, samples, frequency, reward_rate, confidence)
    result = {
        "see": {
            **vars(needed),
            "confidence_as_published": 1 - missed[needed.as_published],
            "confidence_with_samples": 1 - missed[samples],
        },
        "detect": {
            "chance_correlation": planning.chance_correlation(samples, features, layers),
            "detectable_correlation": planning.detectable_correlation(samples, features, layers, alpha, power),
            "samples_to_detect": planning.samples_to_detect(correlation, features, layers, alpha, power),
        },
        "know": {
            "interval_width": planning.interval_width(correlation, samples, confidence),
            "interval_width_sparse": planning.interval_width_sparse(*binary) if low <= correlation <= high else None,
            "lowest_possible": low,
            "highest_possible": high,
        },
    }
    see, detect, know = result.values()
    sparse = "r is impossible" if know["interval_width_sparse"] is None else f"{know['interval_width_sparse']:.3f}"
    blocks = {
        f"To see a feature of frequency {frequency:g} active in {activations} samples or more, {confidence:g} sure": [
            ("samples needed", str(needed.exact)),
            ("enough by Chernoff's bound", str(needed.chernoff)),
            ("enough by Hoeffding's bound", str(needed.hoeffding)),
            (f"the paper's formula, {see['confidence_as_published']:.2f} sure", str(needed.as_published)),
            (f"confidence with {samples} samples", f"{see['confidence_with_samples']:.4f}"),
        ],
        f"To tell r from chance, {features} features x {layers} layer(s), alpha {alpha:g}, power {power:g}": [
            (f"largest |r| by chance, {samples} samples", f"{detect['chance_correlation']:.3f}"),
            (f"smallest |r| that is detected, {samples} samples", f"{detect['detectable_correlation']:.3f}"),
            (f"samples needed to detect r = {correlation:g}", str(detect["samples_to_detect"])),
        ],
        f"To know r = {correlation:g}, width of a {confidence:g} interval with {samples} samples": [
            ("activation and reward normal", f"{know['interval_width']:.3f}"),
            (f"feature on in {frequency:g}, reward 1 in {reward_rate:g}", sparse),
            ("r that these two rates allow", f"{low:+.3f} to {high:+.3f}"),
        ],
    }
    emit(result, json, "\n".join(f"{title}\n{table(rows[0], rows[1:])}" for title, rows in blocks.items()))


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
