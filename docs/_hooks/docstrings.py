"""A griffe extension: our docstrings as its numpy parser wants them.

Ours put a parameter's meaning behind its name, `x : [T, d_in] residuals`, where numpydoc has a type and the meaning in
the next line. Types are in the signatures, so the text moves to the next line. A "Returns" section is one description,
and prose that follows a section belongs to the text before it.
"""

import re
import textwrap
from typing import Any

import griffe

NAMED = ("Parameters", "Attributes", "Raises")
ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*) : (?P<text>.+)")


class OurDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(docstring: str) -> str:
    """The docstring with its sections in numpydoc's form."""
    lines = docstring.splitlines()
    starts = [at for at in range(len(lines) - 1) if lines[at].strip() and re.fullmatch("-{3,}", lines[at + 1])]
    text, sections = lines[: starts[0]] if starts else lines, []
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        title, body = lines[start], lines[start + 2 : end]
        if title in NAMED:
            entries, prose = named(body)
            sections += ["", title, lines[start + 1], *entries]
            text += ["", *prose] if prose else []
        elif title == "Returns":
            sections += ["", title, lines[start + 1], ":", *(textwrap.indent(line, "    ") for line in body)]
        else:
            raise ValueError(f"section must be one of {', '.join(NAMED)} or Returns, got {title!r}")
    return "\n".join([*text, *sections])


def named(body: list[str]) -> tuple[list[str], list[str]]:
    """The entries of a section, each with its text below it, and the prose that comes after them."""
    entries: list[str] = []
    starts = [at for at, line in enumerate(body) if line.strip() and not line.startswith(" ")]
    for start, end in zip(starts, [*starts[1:], len(body)]):
        found, text = ENTRY.fullmatch(body[start]), body[start + 1 : end]
        if found:  # each name by itself, with the type that the signature gives it
            for name in found["names"].split(", "):
                entries += [name, f"    {found['text']}", *text]
        elif re.fullmatch(r"\w+", body[start]):  # numpydoc's own form
            entries += [body[start], *text]
        else:
            return entries, body[start:]
    return entries, []
