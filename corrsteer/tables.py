"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from corrsteer.moments import COEFFICIENTS
from corrsteer.steering import Feature


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
    header = ["layer", "feature", "r", "95 % interval", "adjusted p", "coefficient", "active", "if right", "if wrong"]
    scored = any(f.score is not None for f in features)
    kinds = COEFFICIENTS if every_coefficient else ()
    header[6:6] = kinds
    rows = [
        (
            str(f.layer),
            str(f.index),
            *([f"{f.score:+.3f}" if f.score is not None else "-"] if scored else []),
            f"{f.correlation:+.3f}",
            "-" if f.low is None else f"{f.low:+.3f} to {f.high:+.3f}",
            "-" if f.p_adjusted is None else f"{f.p_adjusted:.4f}" + " chance" * f.by_chance,
            _with_error(f.coefficient, f.coefficient_error),
            *(_with_error(*(f.coefficients or {}).get(kind, (None, None))) for kind in kinds),
            f"{f.frequency:.1%}",
            f"{f.frequency_positive:.1%}",
            f"{f.frequency_negative:.1%}",
            *("yes" if f in chosen else "-" for chosen in selected_by.values()),
        )
        for f in features
    ]
    if scored:
        header.insert(2, "score")
    return table([*header, *selected_by], rows)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.3f}" + ("" if error is None else f" ± {error:.3f}")
