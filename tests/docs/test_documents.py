"""The documents: their examples run, the commands in them exist, and the site builds without a warning."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from corrsteer.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What a page asks of the hub comes from the demo instead: the same calls, with nothing but names that differ.
STAND_INS = """
import json, pathlib, transformers, corrsteer
from corrsteer import demo
model, tokenizer, encoders = demo.load()
tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
transformers.AutoModelForCausalLM.from_pretrained = lambda name, **options: model
transformers.AutoTokenizer.from_pretrained = lambda name: tokenizer
corrsteer.SparseEncoder.from_pretrained = lambda release, sae_id: encoders[1]
rows = [{"prompt": f"{i}? A) yes B) no", "answer": "A"} for i in range(20)]
pathlib.Path("task.jsonl").write_text("\\n".join(map(json.dumps, rows)))
"""


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=name)
def test_every_python_example_of_a_page_runs_as_it_stands(path, tmp_path):
    """One after the other, as a reader would; those that name a model on the hub with stand-ins for it."""
    parts = [(STAND_INS if "google/gemma" in block else "") + block for block in blocks(path, "python")]
    (tmp_path / "page.py").write_text("\n".join(parts))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_command_and_option_in_the_documents_exists():
    commands = typer.main.get_command(app).commands
    seen = set()
    for path in DOCUMENTS:
        for block in blocks(path, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if not words or not words[0].endswith("corrsteer"):
                    continue
                seen.add(words[1])
                known = {option for parameter in commands[words[1]].params for option in parameter.opts}
                used = {word for word in words[2:] if word.startswith("--")}
                assert used <= known, f"{name(path)}: {line.strip()}"
    assert seen == set(commands), "every command is shown somewhere"


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's own announcement
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    pages = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {path.stem for path in (ROOT / "docs").rglob("*.md")} - {"index"} <= pages
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "corrsteer.runs.collect.collect" in reference and "<strong>Parameters</strong>" in reference
    assert len(list((tmp_path / "site" / "charts").glob("*.svg"))) == len(list((ROOT / "bench").rglob("*.svg")))


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    for path in DOCUMENTS[:2]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (ROOT / link).is_file(), link
