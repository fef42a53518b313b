"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corrsteer.ops.moments import COEFFICIENTS
from corrsteer.report.listing import Listing
from corrsteer.steering.features import Feature

if TYPE_CHECKING:
    from corrsteer.experiments.evaluation import CategoryEvaluation, Evaluation, Interval

SHOWN = 8  # finalists of a search


def table(header: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "   ") -> str:
    """Columns aligned on the right, but the first on the left."""
    return str(Listing(header, list(rows), indent))


def feature_table(
    features: Iterable[Feature],
    selected_by: Mapping[str, Sequence[Feature]] | None = None,
    every_coefficient: bool = False,
) -> str:
    """`feature_listing`, plain and indented."""
    return str(replace(feature_listing(features, selected_by, every_coefficient), indent="   "))


def feature_listing(
    features: Iterable[Feature],
    selected_by: Mapping[str, Sequence[Feature]] | None = None,
    every_coefficient: bool = False,
) -> Listing:
    """One feature a row, marked where chance could explain it; with `selected_by`, which selections hold it.

    `every_coefficient` adds those that were not chosen, with their standard errors.
    """
    features, selected_by = list(features), selected_by or {}
    scored = any(f.statistics is not None and f.statistics.score is not None for f in features)
    kinds = COEFFICIENTS if every_coefficient else ()
    known = [f.statistics.correlations or {} for f in features if f.statistics is not None]
    others = list(dict.fromkeys(name for correlations in known for name in correlations))
    header = ["layer", "feature", *["score"] * scored, "r", *(f"r of {name}" for name in others), "95 % interval",
              "adjusted p", "coefficient", *kinds, "active", "if right", "if wrong", *selected_by]  # fmt: skip
    return Listing(
        header,
        [
            (
                "-" if f.layer is None else str(f.layer),
                f.hook_point if f.index is None else str(f.index),
                *_statistics(f, scored, others, kinds),
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
        verdict = "joined" if step["kept"] else f"not joined, as chance may gain as much among {step['trials']} trials"
        parts.append(
            f"with {_of(step['feature'])}: {step['score']:.3f}, a gain of {step['gain']:+.3f} ± {step['error']:.3f}; "
            f"{verdict}"
        )
    grid = searched["grid"]
    parts += [
        "",
        f"{searched['trials']} trials of {searched['candidates']} features took {searched['completions']} completions. "
        f"On all {searched['samples']} samples\nthey would take {searched['in_full']}, and a grid of all features at "
        f"all {len(grid['scales'])} scales {grid['completions']}",
    ]
    return "\n".join(parts)


def _of(feature: Mapping[str, Any]) -> str:
    return f"layer {feature['layer']} feature {feature['index']}"


def _point(point: Mapping[str, Any]) -> str:
    return f"{point['scale']:g} {point['score']:.3f} ({point['n']})"


def evaluation_table(evaluations: Mapping[str, Evaluation], indent: str = "") -> str:
    """Steerings that were evaluated together, one a row, and a table of categories for each, where there are any."""
    several = len(evaluations) > 1
    first = next(iter(evaluations.values()))
    header = ("", "reward", "difference", "p", *["Holm p"] * several, "r-r", "r-w", "w-r", "w-w", "ratio",
              "equal", "tokens/s")  # fmt: skip
    unsteered = ("unsteered", _with_interval(first.unsteered, first.unsteered_interval), *["-"] * (len(header) - 3),
                 f"{first.unsteered_tokens_per_second:.0f}")  # fmt: skip
    rows = [
        (
            name,
            _with_interval(e.steered, e.steered_interval),
            _with_interval(e.difference, e.difference_interval, "+"),
            f"{e.p_value:.2g}",
            *[f"{e.p_holm:.2g}"] * several,
            *map(str, e.transitions.values()),
            "-" if e.side_effect_ratio is None else f"{e.side_effect_ratio:.3f}",
            str(e.changed_equal),
            f"{e.steered_tokens_per_second:.0f}",
        )
        for name, e in evaluations.items()
    ]
    legend = (
        f"{first.n} samples; 95 % intervals; p: exact McNemar or permutations; r-w: right unsteered, wrong steered;\n"
        f"ratio: side-effect ratio, the share of changed rewards that fell; equal: changed completions of equal reward"
    )
    legend = "\n".join(indent + line for line in legend.splitlines())
    categories = [_category_table(name, e.categories, indent) for name, e in evaluations.items() if e.categories]
    return "\n\n".join((table(header, [unsteered, *rows], indent) + "\n" + legend, *categories))


def _category_table(name: str, categories: Mapping[str, CategoryEvaluation], indent: str) -> str:
    header = (f"{name}, by category", "samples", "unsteered", "steered", "difference")
    rows = [
        (
            category,
            str(e.n),
            _with_interval(e.unsteered, e.unsteered_interval),
            _with_interval(e.steered, e.steered_interval),
            _with_interval(e.difference, e.difference_interval, "+"),
        )
        for category, e in categories.items()
    ]
    return table(header, rows, indent)


def _with_interval(value: float, interval: Interval, sign: str = "") -> str:
    shown = "no interval" if interval is None else "[{1:{0}.3f}, {2:{0}.3f}]".format(sign, *interval)
    return f"{value:{sign}.3f} {shown}"


def _statistics(f: Feature, scored: bool, others: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The cells from the score to the frequencies."""
    s = f.statistics
    if s is None:
        return ["-"] * (scored + 3 + len(others)) + [_signed(f.coefficient)] + ["-"] * (len(kinds) + 3)
    return [
        *([_signed(s.score)] if scored else []),
        _signed(s.correlation),
        *(_signed((s.correlations or {}).get(name)) for name in others),
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
