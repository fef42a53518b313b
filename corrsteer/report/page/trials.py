"""How steerings were chosen: the search's race, its finalists, its confirmation, and scales that were calibrated."""

from __future__ import annotations

from typing import Any

from corrsteer.report.page.blocks import (
    Block,
    Cell,
    Missing,
    Paragraph,
    Plot,
    Section,
    Table,
    Variant,
    number,
    words,
)
from corrsteer.report.page.collection import COLOURS, DASHES
from corrsteer.report.page.found import Material
from corrsteer.report.page.outcome import named_shortly

SEARCH = "corrsteer select RUN --strategy search --out RUN/searched.safetensors"
FINALISTS = 8  # whose curves are drawn
FATES = (("running", "--c1", "still in"), ("worse_than_leader", "--c2", "worse than the leader"),
         ("worse_than_unsteered", "--c4", "worse than no steering"),
         ("over_budget", "--faint", "over budget"))  # fmt: skip


def race(material: Material) -> Section:
    """Of each steering that was searched or calibrated."""
    blocks: list[Block] = []
    for path, steering in material.steerings.items():
        name, searched = named_shortly(path), steering.provenance.get("search")
        if searched:
            blocks += _search(name, searched)
        calibrated = steering.provenance.get("calibration")
        if calibrated:
            curve = [
                {"scale": p["scale"], "score": p["score"], "n": calibrated["validation"]["n"]}
                for p in calibrated["curve"]
            ]
            title = f"Scales of {name}, calibrated on validation samples"
            blocks.append(_curves(title, [(name, curve)], curve[0]["score"]))
    return Section("search", "The search", blocks or [Missing("No steering here was searched.", SEARCH)])


def _search(name: str, searched: dict[str, Any]) -> list[Block]:
    grid = searched["grid"]
    blocks: list[Block] = [
        Paragraph(
            f"{name}: {searched['trials']} trials of {searched['candidates']} features took {searched['completions']} "
            f"completions; a grid of all features and scales would have taken {grid['completions']}."
        )
    ]
    if searched["rounds"]:
        blocks.append(_rounds(name, searched["rounds"]))
    if searched["finalists"]:
        curves = [
            (f"layer {one['feature']['layer']} feature {one['feature']['index']} ({one['positions']})", one["curve"])
            for one in searched["finalists"]
        ]
        blocks.append(_curves(f"Scales of the finalists of {name}", curves, searched["unsteered"]))
    if searched["joined"]:
        rows = [
            [words(f"layer {step['feature']['layer']} feature {step['feature']['index']}"), number(step["score"]),
             number(step["gain"], "+.3f"), number(step["error"]), number(step["trials"], "d"),
             words("joined" if step["kept"] else "not joined")]
            for step in searched["joined"]
        ]  # fmt: skip
        header = ("tried together with", "score", "gain", "its standard error", "best of trials", "verdict")
        blocks.append(Table(f"Features tried together, {name}", header, rows))
    c = searched.get("confirmation")
    if c:
        between = "" if c["low"] is None else f" (95 % interval {c['low']:+.3f} to {c['high']:+.3f})"
        blocks.append(
            Paragraph(
                f"{'Confirmed' if c['confirmed'] else 'Not confirmed'} on {c['n']} samples that nothing was chosen by: "
                f"{c['unsteered']:.3f} unsteered, {c['steered']:.3f} steered, a difference of {c['difference']:+.3f}"
                f"{between}, p = {c['p_value']:.2g}."
            )
        )
    return blocks


def _rounds(name: str, rounds: list[dict[str, Any]]) -> Plot:
    traces = [
        {"type": "bar", "name": label, "x": [str(r["samples"]) for r in rounds], "y": [r[key] for r in rounds],
         "marker": {"color": colour}, "hovertemplate": f"%{{y}} {label} after %{{x}} samples<extra></extra>"}
        for key, colour, label in FATES
    ]  # fmt: skip
    layout = {"barmode": "stack", "height": 340, "xaxis": {"title": {"text": "samples seen"}, "type": "category"},
              "yaxis": {"title": {"text": "trials"}}}  # fmt: skip
    last = rounds[-1]
    said = (
        f"Of {last['entered']} trials {last['running']} were still in after {last['samples']} samples; "
        f"{last['worse_than_leader']} fell behind the leader, {last['worse_than_unsteered']} behind no steering, and "
        f"{last['over_budget']} left for the budget."
    )
    header = ("samples", "trials", "still in", "worse than the leader", "worse than no steering", "over budget",
              "unsteered", "leader")  # fmt: skip
    keys = ("entered", "running", "worse_than_leader", "worse_than_unsteered", "over_budget")
    rows = [
        [Cell(str(r["samples"]), r["samples"]), *(number(r[key], "d") for key in keys), number(r["unsteered"]),
         number(r["leader"])]
        for r in rounds
    ]  # fmt: skip
    return Plot(f"The race of {name}", said, [Variant("all", traces, layout)], Table(f"Rounds of {name}", header, rows))


def _curves(title: str, curves: list[tuple[str, list[dict[str, Any]]]], unsteered: float) -> Plot:
    traces = [
        {"type": "scatter", "mode": "lines+markers", "name": label, "x": [p["scale"] for p in curve],
         "y": [round(p["score"], 4) for p in curve],
         "line": {"color": COLOURS[at % len(COLOURS)], "dash": DASHES[at % len(DASHES)]},
         "marker": {"symbol": at // len(COLOURS), "size": 8},
         "hovertemplate": f"{label}, scale %{{x:.3g}}: %{{y:.3f}}<extra></extra>"}
        for at, (label, curve) in enumerate(curves[:FINALISTS])
    ]  # fmt: skip
    layout = {
        "height": 380, "xaxis": {"title": {"text": "scale"}}, "yaxis": {"title": {"text": "mean reward"}},
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": unsteered, "y1": unsteered,
                    "line": {"color": "--muted", "dash": "dot", "width": 1.5}}],
    }  # fmt: skip
    points = [(label, point) for label, curve in curves for point in curve]
    label, best = max(points, key=lambda one: one[1]["score"])
    said = (
        f"The highest score is {best['score']:.3f}, of {label} at scale {best['scale']:g}; unsteered it is "
        f"{unsteered:.3f}."
    )
    rows = [
        [words(of), number(point["scale"], "g"), number(point["score"]), number(point["n"], "d"),
         words(f"left for {point['left']}" if point.get("left") else "–")]
        for of, point in points
    ]  # fmt: skip
    header = ("steering", "scale", "score", "samples", "race")
    return Plot(title, said, [Variant("all", traces, layout)], Table(title, header, rows))
