"""A hook of MkDocs: documents and charts of the repository that lie outside docs/, where they stay.

A link from one document to another is the path between the two files, so that it works wherever the repository is read.
This hook adds the files that lie outside to the site, and points links to where they are there.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # here -> on the site
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def outside() -> dict[str, str]:
    """Path in the repository -> path on the site."""
    charts = sorted((ROOT / "bench" / "results").rglob("*.svg"))
    return PAGES | {path.relative_to(ROOT).as_posix(): f"charts/{path.name}" for path in charts}


def on_files(files, config):
    """Add what lies outside."""
    for here, there in outside().items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files as links to pages."""
    places = outside()
    here = next((name for name, there in places.items() if there == page.file.src_uri), f"docs/{page.file.src_uri}")

    def moved(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[2]))
        place = places.get(target, target.removeprefix("docs/"))
        if place == target:  # neither outside nor in docs/
            return link[0]
        return f"{link[1]}{os.path.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)
