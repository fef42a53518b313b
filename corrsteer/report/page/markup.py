"""Blocks as HTML. Every text is escaped here, and nowhere else."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterator, Sequence

from corrsteer.files import to_json
from corrsteer.report.page.blocks import (
    Block,
    Cell,
    Missing,
    Notes,
    Paragraph,
    Part,
    Plot,
    Sample,
    Section,
    Source,
    Table,
)

FOLDED = 320  # characters of a text, above which it is folded
FILTERED = 8  # rows of a table, above which it has a filter
IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def escaped(text: str) -> str:
    """Text as HTML shows it: markup in it is text, and half of a surrogate pair a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode())


def embedded(value: object) -> str:
    """JSON that may stand in a script element: nothing in it ends the element."""
    text = json.dumps(json.loads(to_json(value)), ensure_ascii=False, separators=(",", ":"))
    return "".join(IN_SCRIPT.get(character, character) for character in text)


class Markup:
    """Writes blocks, and numbers what has to be referred to."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = itertools.count(1)

    def section(self, section: Section) -> str:
        """A section with its heading."""
        body = self.blocks(section.blocks)
        title = escaped(section.title)
        at = section.id
        return f'<section id="{at}" aria-labelledby="{at}-h"><h2 id="{at}-h">{title}</h2>{body}</section>'

    def blocks(self, blocks: Sequence[Block]) -> str:
        """Blocks, one after the other."""
        return "\n".join(map(self.block, blocks))

    def block(self, block: Block) -> str:
        """A block."""
        if isinstance(block, Paragraph):
            return f'<p dir="auto">{escaped(block.text)}</p>'
        if isinstance(block, Missing):
            command = f'<code dir="ltr">{escaped(block.command)}</code>'
            return f'<p class="missing">{escaped(block.what)} This gives it: {command}</p>'
        if isinstance(block, Notes):
            items = "".join(f'<li dir="auto">{escaped(note)}</li>' for note in block.notes)
            return f"<ul>{items}</ul>"
        if isinstance(block, Table):
            return self.table(block)
        if isinstance(block, Plot):
            return self.plot(block)
        if isinstance(block, Sample):
            texts = "".join(f"<dt>{escaped(name)}</dt><dd>{_text(parts)}</dd>" for name, parts in block.texts)
            heading = f'<p class="heading" dir="auto">{escaped(block.heading)}</p>'
            return f'<article class="sample">{heading}<dl>{texts}</dl></article>'
        if isinstance(block, Source):
            return f'<pre tabindex="0" dir="ltr">{escaped(block.text)}</pre>'
        opened = " open" if block.opened else ""
        title = f'<summary dir="auto">{escaped(block.title)}</summary>'
        return f"<details{opened}>{title}{self.blocks(block.blocks)}</details>"

    def table(self, table: Table) -> str:
        """A table that can be sorted by its header, and filtered where it is long."""
        numeric = [any(row[at].sort is not None for row in table.rows) for at in range(len(table.header))]
        classes = [' class="number"' if of_column else "" for of_column in numeric]
        header = "".join(
            f'<th scope="col"{kind}><button type="button">{escaped(name) or "name"}</button></th>'
            for name, kind in zip(table.header, classes)
        )
        rows = "".join(
            "<tr>" + "".join(_cell(cell, kind, at) for at, (cell, kind) in enumerate(zip(row, classes))) + "</tr>"
            for row in table.rows
        )
        found, caption = "", escaped(table.caption)
        if len(table.rows) > FILTERED:
            at = next(self._numbers)
            found = (
                f'<p class="filter"><label for="filter-{at}">Filter</label> '
                f'<input id="filter-{at}" type="search" autocomplete="off"> <output for="filter-{at}"></output></p>'
            )
        return (
            f'<div class="table">{found}<div class="scroll" tabindex="0" role="group" aria-label="{caption}"><table>'
            f"<caption>{caption}</caption><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div></div>"
        )

    def plot(self, plot: Plot) -> str:
        """A figure that the script draws, its description, and its numbers."""
        at = next(self._numbers)
        variants = [vars(variant) for variant in plot.variants]
        chooser = ""
        if len(variants) > 1:
            options = "".join(f'<option value="{i}">{escaped(v["label"])}</option>' for i, v in enumerate(variants))
            chooser = f'<p><label for="choose-{at}">Show</label> <select id="choose-{at}">{options}</select></p>'
        return (
            f'<figure class="plot"><figcaption id="title-{at}">{escaped(plot.title)}</figcaption>{chooser}'
            f'<div class="canvas" role="img" aria-labelledby="title-{at}" aria-describedby="says-{at}"></div>'
            f'<output class="named" dir="auto"></output>'
            f'<p id="says-{at}" class="says" dir="auto">{escaped(plot.alternative)}</p>'
            f"<details><summary>The numbers: {escaped(plot.title)}</summary>{self.table(plot.table)}</details>"
            f'<script type="application/json">{embedded(variants)}</script></figure>'
        )


def _cell(cell: Cell, kind: str, at: int) -> str:
    text = f"<bdi>{escaped(cell.text)}</bdi>"
    if cell.href is not None:
        text = f'<a href="{escaped(cell.href)}" rel="noreferrer noopener">{text}</a>'
    sort = "" if cell.sort is None else f' data-sort="{cell.sort!r}"'
    return f'<th scope="row"{kind}{sort}>{text}</th>' if at == 0 else f"<td{kind}{sort}>{text}</td>"


def _part(part: Part) -> str:
    text = f"<mark>{escaped(part.text)}</mark>" if part.marked else escaped(part.text)
    return f'<span class="token" style="--share: {part.strength:.2f}">{text}</span>' if part.strength > 0 else text


def _text(parts: Sequence[Part]) -> str:
    whole = "".join(part.text for part in parts)
    body = "".join(_part(part) for part in parts if part.text)
    if len(whole) <= FOLDED:
        return f'<span class="text" dir="auto">{body or "(empty)"}</span>'
    begins = escaped(whole[: FOLDED // 2])
    return (
        f'<details><summary><span class="text" dir="auto">{begins}…</span> <span>({len(whole)} characters)</span>'
        f'</summary><span class="text" dir="auto">{body}</span></details>'
    )
