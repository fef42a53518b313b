"""What a page is made of: data that any test can read, and that `markup` writes as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is read, what it is sorted by where that is a number, and where it leads."""

    text: str
    sort: float | None = None
    href: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows under a header. A column whose cells have numbers to sort by stands on the right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Variant:
    """One of the pictures of a plot: traces and layout as Plotly takes them.

    A string that begins with `--` is a colour of the style sheet. Text comes from `plot_text`.
    """

    label: str
    traces: Sequence[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """A picture, or several to choose from, with what they show in words and the numbers in a table."""

    title: str
    alternative: str
    variants: Sequence[Variant]
    table: Table


@dataclass(frozen=True)
class Paragraph:
    """A sentence or more."""

    text: str


@dataclass(frozen=True)
class Missing:
    """What the inputs do not hold, and the command that gives it."""

    what: str
    command: str


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    notes: Sequence[str]


@dataclass(frozen=True)
class Part:
    """A piece of a text: marked where it differs from another text or a feature peaks; coloured by a share of 1."""

    text: str
    marked: bool = False
    strength: float = 0.0


@dataclass(frozen=True)
class Sample:
    """A sample: a heading, and texts by name."""

    heading: str
    texts: Sequence[tuple[str, Sequence[Part]]]


@dataclass(frozen=True)
class Source:
    """Text that is shown as it stands, such as JSON."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks under a title that opens them."""

    title: str
    blocks: Sequence[Block]
    opened: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page: its place in the address, its title, and blocks."""

    id: str
    title: str
    blocks: Sequence[Block]


Block = Paragraph | Missing | Notes | Table | Plot | Sample | Source | Fold


def words(text: object) -> Cell:
    """A cell of text."""
    return Cell(str(text))


def number(value: float | None, form: str = ".3f") -> Cell:
    """A cell of a number; a dash where there is none."""
    return Cell("–") if value is None or math.isnan(value) else Cell(format(value, form), float(value))


def interval(ends: Sequence[float | None] | None, form: str = ".3f") -> Cell:
    """A cell of an interval, which is sorted by its lower end."""
    if ends is None or ends[0] is None or ends[1] is None:
        return Cell("–")
    return Cell(f"{ends[0]:{form}} to {ends[1]:{form}}", float(ends[0]))


def shortened(text: str, most: int) -> str:
    """The beginning of a text that is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def plot_text(text: str) -> str:
    """Text for a plot, whose library reads some markup: this is shown as it stands."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, entity)
    return " ".join(text.split())
