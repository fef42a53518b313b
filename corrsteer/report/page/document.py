"""`page`: the whole page as one HTML document that asks for nothing from anywhere.

The plotting library is plotly.js, as the Python package `plotly` carries it. Its traces cover all of the page's
pictures. It draws them as SVG without compiling code, so that the page's Content-Security-Policy can allow exactly two
scripts, each by its hash. Vega-Lite is smaller and marks its SVG for screen readers, but compiles expressions by
`Function`, which such a policy forbids. A picture cannot be read by ear in either, so every plot has its statement in
words, and its numbers as a table.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata, resources

from corrsteer.errors import CorrSteerError
from corrsteer.files import write_utf8
from corrsteer.report.page import collection, features, outcome, trials
from corrsteer.report.page.blocks import Section
from corrsteer.report.page.found import Material
from corrsteer.report.page.markup import Markup, escaped
from corrsteer.types import PathLike
from corrsteer.version import __version__

INSTALL = "pip install 'corrsteer[report]'"


def write(path: PathLike, material: Material, title: str = "corrsteer report") -> None:
    """Write the page.

    Raises
    ------
    CorrSteerError : without the plotting library, and where the file cannot be written.
    """
    write_utf8(path, page(material, title))


def page(material: Material, title: str = "corrsteer report") -> str:
    """The page as HTML.

    Raises
    ------
    CorrSteerError : without the plotting library.
    """
    sentence, sections = contents(material)
    markup = Markup()
    body = "\n".join(map(markup.section, sections))
    index = "".join(f'<li><a href="#{section.id}">{escaped(section.title)}</a></li>' for section in sections)
    scripts = [_plotly(), _own("script.js")]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_allowed, scripts))}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="corrsteer {__version__}">
<title>{escaped(title)}</title>
<style>{_own("style.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header><p class="name">{escaped(title)}</p><button type="button" id="theme" hidden>Dark</button></header>
<nav aria-label="Sections"><ul>{index}</ul></nav>
<main id="main" tabindex="-1">
<h1 dir="auto">{escaped(sentence)}</h1>
<noscript><p>Without scripts there are no pictures; their numbers are in the tables below each.</p></noscript>
{body}
</main>
<footer><p>corrsteer {__version__}</p></footer>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def contents(material: Material) -> tuple[str, list[Section]]:
    """What the page shows: the sentence at its top, and its sections in order."""
    surveyed = {name: features.survey(run) for name, run in material.runs.items()}
    survivors = sum(len(of_run.survivors) for of_run in surveyed.values())
    sentence = outcome.sentence(material, survivors, sum(of_run.n_features for of_run in surveyed.values()))
    return sentence, [
        outcome.scores(material),
        outcome.transitions(material),
        outcome.side_effects(material),
        collection.runs(material, surveyed),
        features.correlations(material, surveyed),
        features.top_features(material),
        collection.progress(material),
        trials.race(material),
        collection.distributions(material),
        collection.cost(material),
        collection.provenance(material),
        collection.notes(material),
    ]


def check_plotly() -> None:
    """Raise where the library that draws the plots is not installed."""
    _plotly()


def _plotly() -> str:
    try:
        metadata.version("plotly")
        script = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, ModuleNotFoundError, FileNotFoundError):
        raise CorrSteerError(f"a report needs plotly, whose script draws its plots; {INSTALL}") from None
    return _as_parsed(script)


def _own(name: str) -> str:
    return _as_parsed((resources.files("corrsteer.report.page") / name).read_text(encoding="utf-8"))


def _as_parsed(script: str) -> str:
    """With the line ends that HTML's parser makes of any, of which the hash is taken."""
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in script.lower() or "<!--" in script:
        raise CorrSteerError("plotly's script cannot be embedded, as it would end the element that holds it")
    return script


def _allowed(script: str) -> str:
    """A script as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
