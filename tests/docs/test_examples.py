"""Every example in the documents runs, and prints what the documents say it prints.

A document's Python blocks run in order, in one namespace and an empty folder. A `text` block right after one is what it
prints; numbers with a point may differ by 1 %, as instruction sets round differently. A block with a title is a file.
"""

import contextlib
import copy
import io
import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch
import transformers
import typer
import yaml
from documents import ROOT, blocks, documents, named

from corrsteer import SparseEncoder, demo
from corrsteer.cli import app, settings

GEMMA_LAYERS = 26  # of Gemma 2 2B
SUMS = [{"prompt": f"{a}+{b}={'?AB'[b % 3]}", "answer": a + b} for a in range(15, 60, 2) for b in range(16, 60, 3)]
COMMANDS = typer.main.get_command(app).commands
PYTHON = [path for path in documents() if any(block.language == "python" for block in blocks(path))]


@pytest.fixture(scope="module")
def gemma():
    """What the hub would give for Gemma 2: the demo's model with as many layers, those above its own idle, its
    tokenizer with a chat template that wraps nothing, and its last SAE at any layer."""
    model, tokenizer, encoders = demo.load()
    layers = model.model.layers
    for at in range(len(layers), GEMMA_LAYERS):
        idle = copy.deepcopy(layers[-1])
        idle.self_attn.layer_idx = at
        for parameter in (idle.self_attn.o_proj.weight, idle.mlp.down_proj.weight):
            torch.nn.init.zeros_(parameter)
        layers.append(idle)
    model.config.num_hidden_layers = GEMMA_LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[0]] * GEMMA_LAYERS
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    return model, tokenizer, encoders[max(encoders)]


@pytest.fixture
def hub(gemma, monkeypatch, tmp_path):
    """Stands in for the hub, and for the task file that a reader is to have; asked for anything else it fails."""
    model, tokenizer, encoder = gemma

    def given(what, load):
        def from_pretrained(name, *args, **kwargs):
            if name == "google/gemma-2-2b-it":
                return what
            return load(name, *args, **kwargs)  # the demo's own folder, or there is no network

        return from_pretrained

    def sae(release, sae_id, **_):
        layer = re.fullmatch(r"layer_(\d+)/width_16k/canonical", sae_id)[1]
        assert release == "gemma-scope-2b-pt-res-canonical"
        return replace(encoder, hook_name=f"blocks.{layer}.hook_resid_post")

    for kind, what in ((transformers.AutoModelForCausalLM, model), (transformers.AutoTokenizer, tokenizer)):
        monkeypatch.setattr(kind, "from_pretrained", given(what, kind.from_pretrained))
    monkeypatch.setattr(SparseEncoder, "from_pretrained", sae)
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))


def run(path, folder):
    """Run a document's blocks in a folder; each with an output block as (line, what was printed, what should be)."""
    found, namespace, compared = blocks(path), {"__name__": "__main__"}, []
    for at, block in enumerate(found):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)
        elif block.language == "python":
            printed = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            if at + 1 < len(found) and found[at + 1].language == "text":
                compared.append((block.line, printed.getvalue(), found[at + 1].text))
    return compared


def same(printed, said):
    """Whether two texts are equal, but for numbers with a point, which may differ by 1 % or 0.011."""
    number = re.compile(r"-?\d+\.\d+")
    if number.sub("#", printed) != number.sub("#", said):
        return False
    pairs = zip(number.findall(printed), number.findall(said))
    return all(float(a) == pytest.approx(float(b), rel=0.01, abs=0.011) for a, b in pairs)


@pytest.mark.parametrize("path", PYTHON, ids=named)
def test_a_documents_python_runs_and_prints_what_it_says(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    compared = run(path, tmp_path)
    for name in set(sys.modules) - before:  # the files that were written
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    for line, printed, said in compared:
        assert same(printed, said), f"line {line} prints:\n{printed}\nand the document says:\n{said}"


def test_numbers_may_differ_by_rounding_and_words_may_not():
    assert same("r 0.667 of 7", "r 0.668 of 7") and same("-0.10", "-0.11")
    assert not same("r 0.667", "r 0.60") and not same("7 samples", "8 samples") and not same("a", "b")


# The command line


def commands(path):
    """Every `corrsteer` command in a document's shell blocks, by whatever launcher, as (line, words)."""
    for block in blocks(path):
        if block.language == "sh":
            lines = block.text.replace("\\\n", " " * 2).splitlines()
            for at, line in enumerate(lines):
                words = shlex.split(line, comments=True)
                launched = words[words.index("-m") + 1 :] if words and "-m" in words else words
                if launched and launched[0].split("/")[-1] == "corrsteer":
                    yield block.line + at, launched[1:]


SHELL = [pytest.param(words, id=f"{named(path)}:{line}") for path in documents() for line, words in commands(path)]


@pytest.mark.parametrize("words", SHELL)
def test_a_command_in_the_documents_exists_and_takes_its_options(words):
    assert words[0] in COMMANDS, f"there is no corrsteer {words[0]}"
    COMMANDS[words[0]].make_context(words[0], list(words[1:]))  # which reads and checks all options, and runs nothing


@pytest.mark.parametrize("path", documents(), ids=named)
def test_commands_and_options_named_in_the_text_exist(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    options = {option for command in COMMANDS.values() for p in command.params for option in p.opts}
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        if words[0] == "corrsteer" and len(words) > 1:
            assert words[1] in COMMANDS, code
        if words[0] == "corrsteer" or words[0].startswith("--"):
            for word in words:
                assert not word.startswith("--") or word in options, f"no command takes {word}: `{code}`"


@pytest.mark.parametrize("path", documents(), ids=named)
def test_settings_in_the_documents_are_settings(path, tmp_path):
    for block in blocks(path):
        if block.language == "yaml":
            (tmp_path / "settings.yaml").write_text(block.text)
            given = settings.read(settings.CollectSettings, tmp_path / "settings.yaml", {"out": tmp_path})
            assert given.model == yaml.safe_load(block.text)["model"]


@pytest.mark.parametrize("path", documents(), ids=named)
def test_make_targets_and_modules_named_in_the_documents_exist(path):
    text = path.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shell = "\n".join([*(b.text for b in blocks(path) if b.language == "sh"), *re.findall(r"`([^`\n]+)`", text)])
    for target in re.findall(r"^make ([\w-]+)", shell, re.MULTILINE):
        assert target in targets, f"there is no make {target}"
    for module in re.findall(r"python -m ((?:bench|corrsteer)[\w.]*)", shell):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module


def test_an_option_that_a_command_does_not_take_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["plan"].make_context("plan", ["--nothing"])
