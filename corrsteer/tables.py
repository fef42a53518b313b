"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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


def feature_table(features: Iterable[Feature], selected_by: Mapping[str, Sequence[Feature]] | None = None) -> str:
    """One feature a row, what chance explains marked; with `selected_by`, which selections hold it."""
    features, selected_by = list(features), selected_by or {}
    header = ["layer", "feature", "r", "95 % interval", "adjusted p", "coefficient", "active", "if right", "if wrong"]
    scored = any(f.score is not None for f in features)
    rows = [
        (
            str(f.layer),
            str(f.index),
            *([f"{f.score:+.3f}" if f.score is not None else "-"] if scored else []),
            f"{f.correlation:+.3f}",
            "-" if f.low is None else f"{f.low:+.3f} to {f.high:+.3f}",
            "-" if f.p_adjusted is None else f"{f.p_adjusted:.4f}" + " chance" * f.by_chance,
            f"{f.coefficient:+.3f}" + ("" if f.coefficient_error is None else f" ± {f.coefficient_error:.3f}"),
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
