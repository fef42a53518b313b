"""Results as text: lines and listings, plain where they are piped, and set in columns that fit where a terminal can."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True)
class Listing:
    """Rows under a header, of which the first column is a name."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    indent: str = ""

    def __str__(self) -> str:
        """Columns aligned on the right, but the first on the left."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            (
                self.indent
                + "  ".join(c.ljust(w) if at == 0 else c.rjust(w) for at, (c, w) in enumerate(zip(line, widths)))
            ).rstrip()
            for line in lines
        )


Part = str | Listing


def plain(parts: Iterable[Part]) -> str:
    """Parts one below the other, the same wherever it is read."""
    return "\n".join(map(str, parts))


def rich_terminal() -> bool:
    """Whether standard output is a terminal that can move and colour, which `TERM=dumb` says it cannot."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    return sys.stdout.isatty() and not console.is_dumb_terminal


def print_rich(parts: Iterable[Part], file: IO[str], width: int | None = None) -> None:
    """Write parts for a terminal: cells wrap within their column, and what is text stays text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, force_terminal=True, width=width, highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(Text(part))
            continue
        numbers = [all(_numeric(row[at]) for row in part.rows) for at in range(len(part.header))]
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for name, numeric in zip(part.header, numbers):
            table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
        for row in part.rows:
            table.add_row(*map(Text, row))
        console.print(table)


def rich_text(parts: Iterable[Part], width: int) -> str:
    """What `print_rich` writes to a terminal of that width."""
    written = io.StringIO()
    print_rich(parts, written, width)
    return written.getvalue()


def _numeric(text: str) -> bool:
    """Whether a cell begins as a number does; a dash stands for one that is missing."""
    return text == "-" or text.lstrip("+-")[:1].isdigit()
