"""Features: correlation against activation frequency, the best of each layer, and where they are active."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from corrsteer.errors import CorrSteerError
from corrsteer.experiments.ranking import Ranking
from corrsteer.report.chance import largest_by_chance
from corrsteer.report.page.blocks import (
    Block,
    Cell,
    Fold,
    Missing,
    Paragraph,
    Part,
    Plot,
    Sample,
    Section,
    Table,
    Variant,
    interval,
    number,
    words,
)
from corrsteer.report.page.found import Material
from corrsteer.runs.peaks import Extreme, extremes
from corrsteer.runs.run import Run
from corrsteer.steering.features import CHANCE, Feature

BINS = 64  # of the activation frequency, and of r
POINTS = 300  # survivors that are drawn and listed, those of the highest |r|
TOP = 5  # features of each layer
WITH_COMPLETIONS = 12  # features whose completions are shown
COMPLETIONS = 3  # at each end
NEURONPEDIA = re.compile(r"[\w.-]+/[\w.-]+")
TOKENS = "corrsteer report RUN --tokens --out report.html"
COLLECT = "corrsteer collect ... --keep-activations always --out RUN"

Place = tuple[int, int]  # layer and number of a feature


@dataclass(frozen=True)
class Surveyed:
    """What a run's features look like.

    Attributes
    ----------
    bound, how : |r| that chance gives, see `largest_by_chance`.
    survivors : features that chance does not explain, the highest |r| first.
    n_features : of all layers.
    """

    bound: float
    how: str
    survivors: list[tuple[int, int, float, float]]
    n_features: int


def survey(run: Run) -> Surveyed:
    """Survivors: by adjusted p-values where the run has permutations, and otherwise by the bound."""
    bound, how = largest_by_chance(run)
    tested = run.significance() if run.testable() else None
    found = []
    for layer in sorted(run.points):
        r = run.correlation(layer).cpu()
        frequency = run.moments[layer][run.pool].frequency().cpu()
        passed = r.abs() > bound if tested is None else tested[layer].p_adjusted.cpu() <= CHANCE
        for at in passed.nonzero()[:, 0].tolist():
            found.append((layer, at, float(r[at]), float(frequency[at])))
    return Surveyed(bound, how, sorted(found, key=lambda one: -abs(one[2])), run.n_features)


def correlations(material: Material, surveyed: dict[str, Surveyed]) -> Section:
    """r against activation frequency of every layer, with the band that chance explains."""
    blocks: list[Block] = []
    for name, run in material.runs.items():
        blocks.append(_density(name, run, surveyed[name], _selected(material, run)))
    return Section("features", "Correlation and activation frequency", blocks)


def top_features(material: Material) -> Section:
    """The best features of each layer, and the completions in which those that matter are most and least active."""
    blocks: list[Block] = []
    for name, run in material.runs.items():
        ranking, chosen = Ranking(run), _selected(material, run)
        best = [feature for layer in sorted(run.points) for feature in ranking.top(layer, "both", TOP)]
        blocks.append(_feature_table(name, run, best, chosen))
        if run.activations is None or not run.rollouts:
            blocks.append(
                Missing("The run holds no activations of its samples, so completions cannot be shown.", COLLECT)
            )
            continue
        strongest = sorted(best, key=lambda feature: -abs(feature.ranked_by))
        places = dict.fromkeys([*chosen, *(place for f in strongest if (place := place_of(f)) is not None)])
        shown = [place for place in places if place[0] in run.points][:WITH_COMPLETIONS]
        blocks += [_completions(material, run, *place, opened=at == 0) for at, place in enumerate(shown)]
    if material.read_again is None:
        blocks.append(Missing("The tokens at which features are active are not shown.", TOKENS))
    return Section("top-features", "Top features", blocks)


def place_of(feature: Feature) -> Place | None:
    """Layer and number; None of a vector that is no feature."""
    return None if feature.layer is None or feature.index is None else (feature.layer, feature.index)


def link(run: Run, layer: int, index: int) -> str | None:
    """Neuronpedia's page of a feature, where its SAE has one."""
    metadata = run.provenance.get("saes", {}).get(str(layer), {}).get("metadata") or {}
    known = str(metadata.get("neuronpedia_id") or "")
    return f"https://www.neuronpedia.org/{known}/{index}" if NEURONPEDIA.fullmatch(known) else None


def _selected(material: Material, run: Run) -> dict[Place, list[str]]:
    """Features of a run's layers that steerings are along, and which."""
    found: dict[Place, list[str]] = {}
    for name, steering in material.steerings.items():
        for feature in steering.features:
            place = place_of(feature)
            if place is not None and place[0] in run.points and str(run.points[place[0]]) == feature.hook_point:
                found.setdefault(place, []).append(name)
    return found


def _density(name: str, run: Run, surveyed: Surveyed, chosen: dict[Place, list[str]]) -> Plot:
    layers = sorted(run.points)
    r = {layer: run.correlation(layer).cpu().numpy() for layer in layers}
    frequency = {layer: run.moments[layer][run.pool].frequency().cpu().numpy() for layer in layers}
    high = 1.08 * max(surveyed.bound, *(float(np.abs(of_layer).max(initial=0)) for of_layer in r.values()), 0.01)
    x = np.linspace(math.log10(1 / max(run.n, 2)) - 0.05, 0.02, BINS + 1)
    y = np.linspace(-high, high, BINS + 1)
    counts = {layer: _histogram(frequency[layer], r[layer], x, y) for layer in layers}
    variants = []
    for label, of in [("all layers", layers), *((f"layer {layer}", [layer]) for layer in layers)]:
        if label == "all layers" and len(layers) == 1:
            continue
        here = set(of)
        points = [one for one in surveyed.survivors if one[0] in here][:POINTS]
        marked = [
            (layer, at, float(r[layer][at]), float(frequency[layer][at]))
            for layer, at in chosen
            if layer in here and at < len(r[layer])
        ]
        traces = [_heat(np.sum([counts[layer] for layer in of], 0), x, y)]
        traces += [_points(points, "more than chance", "--c2", "circle", 7)] if points else []
        traces += [_points(marked, "steered along", "--c3", "diamond", 13)] if marked else []
        variants.append(Variant(label, traces, _axes(surveyed.bound, x, high)))
    never = sum(int((of_layer == 0).sum()) for of_layer in frequency.values())
    said = (
        f"{surveyed.n_features} features of {len(layers)} layer(s) and {run.n} samples, as density; {never} that are "
        f"never active are left out. |r| up to {surveyed.bound:.3f} is what chance gives the largest of them, by "
        f"{surveyed.how} (the band). {len(surveyed.survivors)} features have more than chance explains."
    )
    table = Table(
        f"The {min(len(surveyed.survivors), POINTS)} features of the highest |r| that chance does not explain",
        ("feature", "layer", "r", "active in"),
        [
            [
                Cell(f"{layer}/{at}", href=link(run, layer, at)),
                number(layer, "d"),
                number(value, "+.3f"),
                number(f, ".1%"),
            ]
            for layer, at, value, f in surveyed.survivors[:POINTS]
        ],
    )
    return Plot(f"r with the reward {run.reward!r} against activation frequency, {name}", said, variants, table)


def _histogram(frequency: np.ndarray[Any, Any], r: np.ndarray[Any, Any], x: Any, y: Any) -> np.ndarray[Any, Any]:
    active = frequency > 0
    return np.histogram2d(np.log10(frequency[active]), r[active], (x, y))[0].T.astype(int)


def _heat(counts: np.ndarray[Any, Any], x: Any, y: Any) -> dict[str, Any]:
    """Counts as colour, on a scale of their logarithm; where there is no feature, nothing."""
    top = max(int(counts.max(initial=1)), 1)
    ticks = [10**k for k in range(int(math.log10(top)) + 1)]
    return {
        "type": "heatmap", "x": _rounded((x[:-1] + x[1:]) / 2), "y": _rounded((y[:-1] + y[1:]) / 2),
        "z": [[round(math.log10(n), 2) if n else None for n in row] for row in counts.tolist()],
        "zmin": 0, "zmax": max(math.log10(top), 1), "colorscale": [[0, "--d0"], [0.5, "--d1"], [1, "--d2"]],
        "colorbar": {"title": {"text": "features"}, "tickvals": [math.log10(n) for n in ticks],
                     "ticktext": [f"{n:,}" for n in ticks], "thickness": 12, "len": 0.8},
        "hoverinfo": "skip",
    }  # fmt: skip


def _points(points: Sequence[tuple[int, int, float, float]], name: str, colour: str, symbol: str, size: int) -> Any:
    return {
        "type": "scatter", "mode": "markers", "name": name,
        "x": [round(math.log10(f), 4) if f else None for *_, f in points], "y": [round(r, 4) for _, _, r, _ in points],
        "text": [f"layer {layer} feature {at}: r {r:+.3f}, active in {f:.1%}" for layer, at, r, f in points],
        "marker": {"color": colour, "symbol": symbol, "size": size, "line": {"width": 1, "color": "--back"}},
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _axes(bound: float, x: Any, high: float) -> dict[str, Any]:
    ticks = [k for k in range(math.ceil(x[0]), 1)]
    return {
        "height": 460,
        "xaxis": {"title": {"text": "samples in which the feature is active"}, "tickvals": ticks,
                  "ticktext": [f"{100 * 10.0**k:g}%" for k in ticks],
                  "range": [float(x[0]), float(x[-1])]},
        "yaxis": {"title": {"text": "r with the reward"}, "range": [-high, high]},
        "shapes": [
            {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": -bound, "y1": bound, "layer": "below",
             "fillcolor": "--band", "line": {"width": 0}},
            *({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at,
               "line": {"color": "--muted", "width": 1, "dash": "dash"}} for at in (-bound, bound)),
        ],
        "annotations": [{"xref": "paper", "x": 0.01, "y": bound, "text": "chance", "showarrow": False,
                         "yanchor": "bottom", "xanchor": "left", "font": {"color": "--muted"}}],
    }  # fmt: skip


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


def _feature_table(name: str, run: Run, features: list[Feature], chosen: dict[Place, list[str]]) -> Table:
    rows = []
    for feature in features:
        s, place = feature.statistics, place_of(feature)
        assert s is not None and place is not None, "a run's features have both"
        by_chance = "yes" if feature.by_chance else "–" if feature.p_adjusted is None else "no"
        rows.append([
            Cell(f"{place[0]}/{place[1]}", href=link(run, *place)), number(place[0], "d"),
            number(s.correlation, "+.3f"), interval((s.low, s.high), "+.3f"), number(s.p_adjusted, ".4f"),
            words(by_chance), number(feature.coefficient, "+.3f"), number(s.frequency, ".1%"),
            number(s.frequency_positive, ".1%"), number(s.frequency_negative, ".1%"),
            words("yes" if place in chosen else "no"),
        ])  # fmt: skip
    return Table(
        f"The {TOP} features of the highest |r| of each layer, {name}",
        ("feature", "layer", "r", "95 % interval", "adjusted p", "by chance?", "coefficient", "active in", "if right",
         "if wrong", "steered along"),
        rows,
    )  # fmt: skip


def _completions(material: Material, run: Run, layer: int, index: int, opened: bool) -> Block:
    title = f"Layer {layer} feature {index}: completions in which it is most and least active"
    try:
        highest, lowest = extremes(run, layer, index, COMPLETIONS)
        if material.read_again is not None:
            highest, lowest = (material.read_again(run, layer, index, ends) for ends in (highest, lowest))
    except CorrSteerError as error:  # such as a steering along a feature of another SAE
        return Fold(title, [Paragraph(f"They cannot be shown: {error}.")])
    blocks: list[Block] = [Paragraph("Most active in"), *_samples(highest)]
    return Fold(title, [*blocks, Paragraph("Least active in"), *_samples(lowest)], opened)


def _samples(found: Sequence[Extreme]) -> Iterator[Sample]:
    for one in found:
        rewards = ", ".join(f"{name} {value:g}" for name, value in one.rollout.rewards.items())
        completion = one.rollout.completion
        texts = [
            ("Prompt", [Part(one.rollout.prompt_text or "(known as tokens alone)")]),
            ("Completion", [Part("(known as tokens alone)" if completion is None else completion)]),
        ]
        if one.tokens:
            texts = [("As read", coloured(one))]
        yield Sample(f"activation {one.activation:.4g}, {rewards}, sample {one.rollout.id}", texts)


def coloured(one: Extreme) -> list[Part]:
    """The tokens of a sample by the feature's activation, the largest of which are marked."""
    most = max((value for _, value in one.tokens if value is not None), default=0.0)
    return [
        Part(text, 0 < most == value, 0.0 if value is None or most <= 0 else max(value, 0.0) / most)
        for text, value in one.tokens
    ]
