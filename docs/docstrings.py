"""An extension of Griffe: the sections of our docstrings as Markdown.

Ours are numpydoc's, but what follows a name is a sentence and not a type, as the signature has the types.
"""

import re

import griffe

SECTION = re.compile(r"^(\w+)\n-{3,}\n", re.MULTILINE)
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*) : ", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring with its sections' titles in bold and their entries as lists."""
    parts = SECTION.split(text)
    out = [parts[0]]
    for title, body in zip(parts[1::2], parts[2::2]):
        entries, prose = [], []
        for paragraph in body.split("\n\n"):
            named = ENTRY.search(paragraph) is not None and not prose
            (entries if named else prose).append(paragraph)
        listed = re.sub(r"\n    (?=\S)", " ", "\n".join(entries))
        listed = ENTRY.sub(lambda m: "- " + ", ".join(f"`{name}`" for name in m[1].split(", ")) + ": ", listed)
        out += [f"**{title}**", listed, "\n\n".join(prose)]
    return "\n\n".join(part.strip("\n") for part in out if part.strip())


class Docstrings(griffe.Extension):
    """Rewrites docstrings when they are loaded."""

    def on_object(self, *, obj, **_):
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
