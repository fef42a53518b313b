"""Settings of the test session."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch

import bench  # noqa: F401 (it finds the kernels of a checkout that is not installed)
import corrsteer

# Extensions built for the tests alone, with sanitizers, are imported rather than those installed.
if "CORRSTEER_EXTENSIONS" in os.environ:
    corrsteer.__path__.insert(0, os.environ["CORRSTEER_EXTENSIONS"])

HERE = Path(__file__).parent

# The models and matrices here are tiny: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)

# Without a GPU the Triton kernels are interpreted, which Triton decides when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A GPU machine may have little more than torch, triton and pytest; these files run there, the others need all of it.
RUN_ANYWHERE = (
    "ops/test_operations.py", "kernels/test_kernels.py", "ops/test_registry.py",
    "vllm/test_vllm.py", "neighbours/test_formats_of_neighbours.py",  # in environments of their own
)  # fmt: skip
NEEDED = ("transformers", "sae_lens", "hypothesis", "scipy", "sklearn", "pydantic", "typer", "yaml", "tqdm",
          "pytest_benchmark", "plotly", "peft", "matplotlib", "build", "pybind11", "mkdocs",
          "mkdocstrings")  # fmt: skip
if any(importlib.util.find_spec(package) is None for package in NEEDED):
    files = [path.relative_to(HERE).as_posix() for path in HERE.rglob("test_*.py")]
    collect_ignore = [path for path in files if path not in RUN_ANYWHERE]

COMPILED = "test_resources.py"


def pytest_collection_modifyitems(items):
    """The compilers' tests last: they wait for what runs beside the others."""
    items.sort(key=lambda item: item.path.name == COMPILED)


def pytest_collection_finish(session):
    """Start the compilers where their results will be asked for."""
    wanted = any(item.path.name == COMPILED and "compiles" in item.name for item in session.items)
    if wanted and not session.config.option.collectonly:
        import test_resources

        test_resources.start()


@pytest.fixture
def poisoned():
    """Memory that torch.empty gives is full of NaN, and has margins around it that nobody may write to."""
    from memory import poison

    with poison():
        yield


@pytest.fixture
def interruptible():
    """Python's own handling of an interrupt, which a shell takes from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def instruction_set(request, monkeypatch):
    """At a place (see `places.py`) that names an instruction set, that one is used."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if name := getattr(parameters.get("place"), "instruction_set", ""):
        monkeypatch.setenv("CORRSTEER_INSTRUCTION_SET", name)


# Small ones, so that small tests cross their edges; on a GPU the blocks are those that are compiled ahead of time.
PANEL = {"cpu": {"panel_features": 64, "panel_tokens": 64}, "cuda": {"panel_features": 2048, "panel_tokens": 1024}}


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    """At a place that names a way, launch configurations name it, where they may."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if not (name := getattr(parameters.get("place"), "way", "")):
        return
    from bench.resources import PANEL_BLOCKS
    from corrsteer.kernels import launch

    config = launch.config

    def going_that_way(device, kernel, kind, *more):
        entry = config(device, kernel, kind, *more)
        if kind not in launch.PANEL_KINDS.get(kernel, ()):
            return entry
        if name == "flattened":
            return entry | {"BF16_SPLITS": 0, "flatten": 1}
        return (PANEL_BLOCKS if device.type == "cuda" else entry) | {"way": name} | PANEL[device.type]

    monkeypatch.setattr(launch, "config", going_that_way)
