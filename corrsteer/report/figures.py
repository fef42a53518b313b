"""Figures of the paper, sized for a column of a two-column page: score and r over samples, and activation frequency."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corrsteer.arguments import as_path
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.ranking import Ranking
from corrsteer.files import write_whole
from corrsteer.report.page.found import Material
from corrsteer.runs.run import Run
from corrsteer.steering.features import Feature
from corrsteer.types import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, float, float | None, float | None]  # samples, a value, and the ends of its interval

COLUMN = 3.25  # inches, a column's width in the usual two-column styles
HEIGHT = 2.2
FORMATS = ("pdf", "svg", "png")
INSTALL = "pip install 'corrsteer[report]'"
# Okabe & Ito's colours, which colour-blind readers tell apart; lines and marks differ otherwise too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
LINES = ("-", "--", "-.", ":")
STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.4, "grid.alpha": 0.4,
    "pdf.fonttype": 42, "ps.fonttype": 42,  # TrueType, which publishers ask for
    "svg.fonttype": "none", "svg.hashsalt": "corrsteer", "text.parse_math": False,
    "axes.prop_cycle": "cycler('color', " + repr(list(COLOURS)) + ")",
}  # fmt: skip


def progress(materials: Mapping[str, Material], out: PathLike) -> None:
    """Draw the score of steerings over the samples that they were selected on, with 95 % intervals.

    A line for each strategy of each run, and a dotted one for its unsteered score.

    Parameters
    ----------
    materials : a run, steerings that were selected on its first samples and on more, and evaluations of these
        together, by the name that the legend shows.
    out : a pdf, svg or png file.

    Raises
    ------
    CorrSteerError : for a run without such evaluations, another kind of file, and without matplotlib.
    """
    of_runs = {name: scores(name, material) for name, material in materials.items()}

    def draw(axes: Axes) -> None:
        lines = itertools.count()
        for name, (unsteered, curves) in of_runs.items():
            of_run = f", {name}" if len(of_runs) > 1 else ""
            grey = str(0.3 * (list(of_runs).index(name) % 3))
            axes.axhline(unsteered, color=grey, linestyle=":", label=f"unsteered{of_run}")
            for strategy, points in curves.items():
                _line(axes, next(lines), f"{strategy}{of_run}", points)
        axes.set_xlabel("samples selected on")
        axes.set_ylabel("mean reward")
        axes.legend(frameon=False)

    _figure(draw, out)


def scores(name: str, material: Material) -> tuple[float, dict[str, list[Point]]]:
    """The unsteered score, and by strategy: samples selected on, the steered score, and the ends of its interval."""
    found: dict[str, dict[int, Point]] = {}
    unsteered: list[float] = []
    for compared in material.compared.values():
        for path, evaluation in compared.evaluations.items():
            steering = material.steering_of(compared, path)
            if path in compared.baselines or steering is None or "n" not in steering.provenance:
                continue
            n, strategy = steering.provenance["n"], steering.provenance["selection"]["strategy"]
            low, high = evaluation.steered_interval or (None, None)
            point = (n, evaluation.steered, low, high)
            if found.setdefault(strategy, {}).setdefault(n, point) != point:
                raise CorrSteerError(
                    f"run {name} must lie beside one steering for each strategy and number of samples, has several for "
                    f"{strategy} on {n} samples; move the others elsewhere"
                )
            unsteered.append(evaluation.unsteered)
    counts = sorted({n for points in found.values() for n in points})
    if len(counts) < 2:
        raise CorrSteerError(
            f"run {name} must lie beside evaluations of steerings that were selected on several numbers of samples, "
            f"has {', '.join(map(str, counts)) or 'none'}; corrsteer select RUN --samples N --out RUN/S.safetensors, "
            f"then corrsteer evaluate them together into RUN as well, or draw corrsteer figure correlation"
        )
    if len(set(unsteered)) > 1:
        raise CorrSteerError(
            f"run {name} must lie beside evaluations of the same samples, but unsteered their scores are "
            f"{', '.join(f'{one:g}' for one in sorted(set(unsteered)))}; evaluate all of its steerings together"
        )
    return unsteered[0], {strategy: [points[n] for n in sorted(points)] for strategy, points in found.items()}


def correlation(runs: Mapping[str, Run], out: PathLike) -> None:
    """Draw the highest correlation with the reward over the samples collected, a line a run, with 95 % intervals.

    Parameters
    ----------
    runs : by the name that the legend shows.
    out : a pdf, svg or png file.

    Raises
    ------
    CorrSteerError : for a run without snapshots, another kind of file, and without matplotlib.
    """
    of_runs = {name: leaders(name, run) for name, run in runs.items()}

    def draw(axes: Axes) -> None:
        for at, (name, points) in enumerate(of_runs.items()):
            _line(axes, at, name, points)
        axes.set_xlabel("samples")
        axes.set_ylabel("highest r with the reward")
        if len(runs) > 1:
            axes.legend(frameon=False)

    _figure(draw, out)


def leaders(name: str, run: Run) -> list[Point]:
    """Of each snapshot: samples, the highest r of any layer, and the ends of its interval."""
    if not run.snapshots:
        raise CorrSteerError(f"run {name} holds no snapshots, as those that were regraded; give one that was collected")
    found = []
    for snapshot in run.snapshots:
        best = max((rows[0] for rows in snapshot.leaders.values() if rows), key=lambda leader: leader.r)
        found.append((snapshot.n, best.r, best.low, best.high))
    return found


def frequency(runs: Mapping[str, Run], out: PathLike, selected: Mapping[str, list[Feature]] | None = None) -> None:
    """Draw how often selected features are active, a box a run with a dot for each feature.

    Parameters
    ----------
    runs : by the name that the axis shows, such as its task.
    out : a pdf, svg or png file.
    selected : features by the run's name; by default the best of each layer, as `select` takes them.

    Raises
    ------
    CorrSteerError : for another kind of file, and without matplotlib.
    """
    shares = {name: frequencies(run, (selected or {}).get(name)) for name, run in runs.items()}

    def draw(axes: Axes) -> None:
        places = range(1, len(shares) + 1)
        axes.boxplot(list(shares.values()), positions=list(places), showfliers=False, widths=0.5,
                     medianprops={"color": "black"}, boxprops={"linewidth": 0.7})  # fmt: skip
        for at, (place, values) in enumerate(zip(places, shares.values())):
            beside = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(len(values))
            axes.plot(place + beside, values, MARKERS[at % len(MARKERS)], color=COLOURS[at % len(COLOURS)], alpha=0.8)
        turned = max(map(len, shares)) * len(shares) > 40
        axes.set_xticks(list(places), list(shares), rotation=30 if turned else 0, ha="right" if turned else "center")
        axes.set_ylim(-3, 103)
        axes.set_ylabel("active in samples (%)")

    _figure(draw, out)


def frequencies(run: Run, features: list[Feature] | None = None) -> list[float]:
    """Percent of a run's samples in which features are active; by default in which the best of each layer is."""
    if features is None:
        ranking = Ranking(run)
        features = [feature for layer in sorted(run.points) if layer for feature in ranking.top(layer, "positive", 1)]
    found = []
    for feature in features:
        if feature.layer in run.moments and feature.index is not None:
            share = run.moments[feature.layer][run.pool].frequency()[feature.index]
            found.append(100 * float(share))
    return found


def by_task(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The same by the name of their task, where these differ, and otherwise by their folder's name or path."""
    for names in (
        [str(run.provenance.get("task", {}).get("name", name)) for name, run in runs.items()],
        [Path(name).name for name in runs],
    ):
        if len(set(names)) == len(names):
            return dict(zip(names, runs.values()))
    return dict(runs)


def _line(axes: Axes, at: int, name: str, points: list[Point]) -> None:
    """Points of a curve, the `at`th of a figure, and a band between those ends of intervals that are known."""
    colour, line = COLOURS[at % len(COLOURS)], LINES[at // len(COLOURS) % len(LINES)]
    n, value, *_ = zip(*points)
    axes.plot(n, value, color=colour, linestyle=line, marker=MARKERS[at % len(MARKERS)], label=name)
    known = [point for point in points if point[2] is not None]
    if known:
        x, _, low, high = zip(*known)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _figure(draw: Any, out: PathLike) -> None:
    path = as_path("out", out)
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise CorrSteerError(f"out must end with .{', .'.join(FORMATS)}, got {path}")
    if find_spec("matplotlib") is None:
        raise CorrSteerError(f"a figure needs matplotlib; {INSTALL}")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, HEIGHT), layout="constrained")
        draw(figure.subplots())
        written = io.BytesIO()
        dates: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
        figure.savefig(written, format=kind, dpi=300, metadata=dates[kind])
    write_whole(path, lambda part: part.write_bytes(written.getvalue()))
