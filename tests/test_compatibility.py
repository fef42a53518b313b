"""Dependencies that are newer than what corrsteer was tested with: they are said once, and by doctor."""

import importlib.metadata
import json
import re

import pytest
import tiny_pipeline
from typer.testing import CliRunner

from corrsteer import Decoding, Steering, collect
from corrsteer.cli import app
from corrsteer.compatibility import TESTED, installed, minor, newer_than_tested, warn_once
from corrsteer.rollouts.grading import grade


@pytest.fixture
def versions(monkeypatch):
    """Versions that stand for the installed ones."""
    given, real = {}, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: given.get(name) or real(name))
    warn_once.cache_clear()
    yield given
    warn_once.cache_clear()


def test_the_table_holds_what_the_tests_run_on_and_no_less_than_is_required(request):
    minimums = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (request.config.rootpath / "pyproject.toml").read_text()))
    for package, tested in TESTED.items():
        assert minor(tested) >= minor(minimums[package]), package
        if installed(package):
            assert minor(installed(package)) <= minor(tested), f"the tests run on {package} {installed(package)} too"


@pytest.mark.parametrize(
    ("version", "newer"),
    (("5.24.0", False), ("5.24.99", False), ("5.23", False), ("4.99", False), ("5.24.0+cpu", False), ("5", False),
     ("5.25.0", True), ("5.25.0.dev0", True), ("5.100", True), ("6.0", True), ("6", True), ("main", False)),
)  # fmt: skip
def test_only_a_newer_minor_release_counts(versions, version, newer):
    versions["transformers"] = version
    said = newer_than_tested()
    assert len(said) == newer and all(f"transformers {version} is newer than 5.24" in sentence for sentence in said)


def test_the_first_use_says_once_what_is_newer(versions, caplog):
    versions |= {"torch": "2.14.0", "sae-lens": "7.1.0"}
    world = tiny_pipeline.model(), tiny_pipeline.tokenizer()
    steering = Steering.from_vectors({"blocks.1.hook_resid_post": world[0].lm_head.weight[4].detach()})
    uses = (
        lambda: collect(*world, tiny_pipeline.encoders(), tiny_pipeline.task(2), permutations=0, progress=False),
        lambda: steering.apply(world[0]).__enter__(),
        lambda: grade(*world, tiny_pipeline.task(2), Decoding(1), progress=False),
    )
    for use in uses:
        caplog.clear()
        warn_once.cache_clear()
        for _ in range(2):
            use()
        said = [record.getMessage() for record in caplog.records if record.name == "corrsteer.compatibility"]
        assert [sentence.split(", which")[0] for sentence in said] == [
            "torch 2.14.0 is newer than 2.13", "sae-lens 7.1.0 is newer than 6.54",
        ]  # fmt: skip
        assert said[1].endswith("should something fail, try pip install 'sae-lens==6.54.*'")


def test_doctor_says_what_is_newer_than_tested(versions):
    assert "was tested with" not in CliRunner().invoke(app, ["doctor"]).stdout
    versions["triton"] = "4.0.0"
    assert "\ntriton 4.0.0 is newer than 3.9, which corrsteer " in CliRunner().invoke(app, ["doctor"]).stdout
    (sentence,) = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["newer_than_tested"]
    assert sentence.startswith("triton 4.0.0 is newer than 3.9")
