"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from corrsteer.ops.moments import COEFFICIENTS
from corrsteer.steering.features import Feature

SHOWN = 8  # finalists of a search


def table(header: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "   ") -> str:
    """Columns aligned on the right, but the first on the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        (
            indent + "  ".join(c.ljust(w) if at == 0 else c.rjust(w) for at, (c, w) in enumerate(zip(line, widths)))
        ).rstrip()
        for line in lines
    )


def feature_table(
    features: Iterable[Feature],
    selected_by: Mapping[str, Sequence[Feature]] | None = None,
    every_coefficient: bool = False,
) -> str:
    """One feature a row, marked where chance could explain it; with `selected_by`, which selections hold it.

    `every_coefficient` adds those that were not chosen, with their standard errors.
    """
    features, selected_by = list(features), selected_by or {}
    scored = any(f.statistics is not None and f.statistics.score is not None for f in features)
    kinds = COEFFICIENTS if every_coefficient else ()
    header = ["layer", "feature", *["score"] * scored, "r", "95 % interval", "adjusted p", "coefficient", *kinds,
              "active", "if right", "if wrong", *selected_by]  # fmt: skip
    return table(
        header,
        [
            (
                "-" if f.layer is None else str(f.layer),
                f.hook_point if f.index is None else str(f.index),
                *_statistics(f, scored, kinds),
                *("yes" if f in chosen else "-" for chosen in selected_by.values()),
            )
            for f in features
        ],
    )


def search_tables(searched: Mapping[str, Any]) -> str:
    """What a search did: its race, the curves of its finalists, what was joined, and what it cost.

    `searched` is `Steering.provenance["search"]`.
    """
    rounds = table(
        ("samples", "trials", "left", "below unsteered", "below leader", "over budget", "unsteered", "leader"),
        [
            (
                *(str(r[key]) for key in ("samples", "entered", "running", "worse_than_unsteered")),
                *(str(r[key]) for key in ("worse_than_leader", "over_budget")),
                f"{r['unsteered']:.3f}",
                f"{r['leader']:.3f}",
            )
            for r in searched["rounds"]
        ],
        indent="",
    )
    parts = ["The race", rounds]
    if searched["finalists"]:
        best = searched["finalists"][:SHOWN]
        parts += [
            "",
            f"The best {len(best)} of {len(searched['finalists'])} finalists: scores by scale (of so many samples)",
        ]
        parts += [
            f"{_of(one['feature'])} ({one['positions']}): " + ", ".join(_point(p) for p in one["curve"]) for one in best
        ]
    for step in searched["joined"]:
        verdict = "joined" if step["kept"] else "not joined, as it does no better than its standard error"
        parts.append(
            f"with {_of(step['feature'])}: {step['score']:.3f}, a gain of {step['gain']:+.3f} ± {step['error']:.3f}; "
            f"{verdict}"
        )
    grid = searched["grid"]
    parts += [
        "",
        f"{searched['trials']} trials of {searched['candidates']} features took {searched['completions']} completions; "
        f"all of them at {len(grid['scales'])} scales on all {searched['samples']} samples would take "
        f"{grid['completions']}",
    ]
    return "\n".join(parts)


def _of(feature: Mapping[str, Any]) -> str:
    return f"layer {feature['layer']} feature {feature['index']}"


def _point(point: Mapping[str, Any]) -> str:
    return f"{point['scale']:g} {point['score']:.3f} ({point['n']})"


def _statistics(f: Feature, scored: bool, kinds: Sequence[str]) -> list[str]:
    """The cells from the score to the frequencies."""
    s = f.statistics
    if s is None:
        return ["-"] * (scored + 3) + [_signed(f.coefficient)] + ["-"] * (len(kinds) + 3)
    return [
        *([_signed(s.score)] if scored else []),
        _signed(s.correlation),
        "-" if s.low is None else f"{_signed(s.low)} to {_signed(s.high)}",
        "-" if s.p_adjusted is None else f"{s.p_adjusted:.4f}" + " chance" * f.by_chance,
        _with_error(f.coefficient, s.coefficient_error),
        *(_with_error(*(s.coefficients or {}).get(kind, (None, None))) for kind in kinds),
        f"{s.frequency:.1%}",
        f"{s.frequency_positive:.1%}",
        f"{s.frequency_negative:.1%}",
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _with_error(value: float | None, error: float | None) -> str:
    return _signed(value) + ("" if error is None else f" ± {error:.3f}")
