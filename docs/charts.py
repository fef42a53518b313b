"""A hook of MkDocs: the charts of the committed results are files of the site, under `charts/`."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def on_files(files, config):
    """Add the charts."""
    for path in sorted(RESULTS.rglob("*.svg")):
        files.append(File.generated(config, f"charts/{path.name}", abs_src_path=str(path)))
    return files
