"""The documents as a site: it builds without a warning, fetches nothing, and leaves no public name out."""

import os
import re
import subprocess
import sys
from urllib.parse import urlparse

import pytest
import yaml
from documents import ROOT, documents, named

import corrsteer


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    # the theme's own notice, which is about its future and not about these pages, is left out
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    return out


def test_the_site_builds_without_a_warning_and_has_every_page_and_chart(site):
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    for page in [*pages, "contributing.html", "changelog.html"]:
        assert (site / page).is_file(), page
    charts = {path.name for path in (ROOT / "bench" / "results").rglob("*.svg")}
    assert {path.name for path in (site / "charts").iterdir()} == charts


def test_every_link_and_picture_of_the_site_is_there(site):
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            url = urlparse(target)
            if page.name != "404.html" and not url.scheme and url.path:
                assert (page.parent / url.path).exists(), f"{page.relative_to(site)} links to {target}"


def test_a_page_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', page.read_text()
        )
        assert fetched == [], page.name


def test_every_public_name_is_in_the_api_reference(site):
    pages = "".join(path.read_text() for path in (site / "api").iterdir())
    modules = {"demo", "inference", "planning", "scores", "stability"}
    for name in set(corrsteer.__all__) - modules - {"__version__"}:
        assert f'id="corrsteer.{name}"' in pages, name
    for name in modules:
        assert f"corrsteer.{name}" in pages, name


@pytest.mark.parametrize("path", documents(), ids=named)
def test_a_document_links_to_files_that_are_there(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", path.read_text()):
        if not urlparse(target).scheme:
            assert (path.parent / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 165


def test_the_citation_names_this_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == corrsteer.__version__
    assert cited["references"][0]["identifiers"][0]["value"] == "arXiv:2508.12535"
