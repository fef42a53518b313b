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
    """One feature a row; with `selected_by`, which selections hold it."""
    selected_by = selected_by or {}
    header = ("layer", "feature", "r", "coefficient", "active", "if right", "if wrong", *selected_by)
    rows = [
        (
            str(f.layer),
            str(f.index),
            f"{f.correlation:+.3f}",
            f"{f.coefficient:+.3f}",
            f"{f.frequency:.1%}",
            f"{f.frequency_positive:.1%}",
            f"{f.frequency_negative:.1%}",
            *("yes" if f in chosen else "-" for chosen in selected_by.values()),
        )
        for f in features
    ]
    return table(header, rows)
