"""The paper's two figures, sized for a column of a two-column page: progress over samples, and activation frequency."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corrsteer.arguments import as_path
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.ranking import Ranking
from corrsteer.files import write_whole
from corrsteer.runs.run import Run
from corrsteer.steering.features import Feature
from corrsteer.types import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def progress(runs: Mapping[str, Run], out: PathLike) -> None:
    """Draw the highest correlation with the reward over the samples collected, a line a run, with 95 % intervals.

    Parameters
    ----------
    runs : by the name that the legend shows.
    out : a pdf, svg or png file.

    Raises
    ------
    CorrSteerError : for a run without snapshots, another kind of file, and without matplotlib.
    """

    def draw(axes: Axes) -> None:
        for at, (name, run) in enumerate(runs.items()):
            points = leaders(name, run)
            colour, line = COLOURS[at % len(COLOURS)], LINES[at // len(COLOURS) % len(LINES)]
            n, r, *_ = zip(*points)
            axes.plot(n, r, color=colour, linestyle=line, marker=MARKERS[at % len(MARKERS)], label=name)
            known = [point for point in points if point[2] is not None]
            if known:
                x, _, low, high = zip(*known)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("samples")
        axes.set_ylabel("highest r with the reward")
        if len(runs) > 1:
            axes.legend(frameon=False)

    _figure(draw, out)


def leaders(name: str, run: Run) -> list[tuple[int, float, float | None, float | None]]:
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
