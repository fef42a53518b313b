"""The whole way in environments that are not a developer's: warnings as errors, nothing writable but `out`, no home."""

import ctypes
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipeline
import torch

TESTS = Path(__file__).parent
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1

# With Python's warnings as errors, but for those that others raise while they are imported.
API = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sae_lens, scipy.stats, torch, transformers
warnings.simplefilter("error")
import importlib, pathlib, pkgutil, sys

import corrsteer

for module in pkgutil.walk_packages(corrsteer.__path__, "corrsteer."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name, module in list(sys.modules.items()):  # as compiled afresh, which a cache of bytecode hides
    if name.split(".")[0] == "corrsteer" and str(module.__file__).endswith(".py"):
        compile(pathlib.Path(module.__file__).read_text(encoding="utf-8"), module.__file__, "exec")

import tiny_pipeline
from corrsteer import Decoding, Run, Steering, calibrate_scale, collect, evaluate, select

model, tokenizer, encoders = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders()
train, validation, test = tiny_pipeline.task(40).split()
quiet = {"decoding": Decoding(3, batch_size=8), "progress": False}
run = collect(model, tokenizer, encoders, train, scores=("squared_ratio",), bootstrap=30, block_size=8, **quiet)
run.save(sys.argv[1] + "/run")
run = Run.load(sys.argv[1] + "/run")
world = {"model": model, "tokenizer": tokenizer, "encoders": encoders}
for options in ({"interval": "bootstrap"}, {"strategy": "pruned", "validation": validation, **world, **quiet}):
    steering = select(run, **{"encoders": encoders, **options})
steering = select(run, encoders=encoders, score="squared_ratio")
steering.save(sys.argv[1] + "/s.safetensors")
steering = Steering.load(sys.argv[1] + "/s.safetensors", model)
steering = calibrate_scale(model, tokenizer, steering, validation, scales=(1, 2), **quiet)
with steering.apply(model, positions="all"):
    model.generate(**tokenizer("1+2=", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2)
result = evaluate(model, tokenizer, test, steering, **quiet)
print("reached the end with", result.n, "samples and", run.n)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, an SAE and a task with characters beyond ASCII, in a directory."""
    from sae_lens import StandardSAE, StandardSAEConfig

    home = tmp_path_factory.mktemp("world")
    tiny_pipeline.model().save_pretrained(home / "model")
    tiny_pipeline.tokenizer().save_pretrained(home / "model")
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=40))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(home / "sae")
    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randrange(100)}+{rng.randrange(1000)}=", "answer": "é"} for _ in range(60)]
    (home / "tâche.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return home


def bound_by_modes():
    """Root may write everywhere. Without this capability it is bound by the modes of files like anybody else."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.fixture
def elsewhere(tmp_path):
    """A directory to run in that nothing can be written to."""
    (tmp_path / "read only").mkdir()
    (tmp_path / "read only").chmod(0o555)
    probe = [sys.executable, "-c", "import os; print(os.access('.', os.W_OK))"]
    options = {"cwd": tmp_path / "read only", "preexec_fn": bound_by_modes if sys.platform == "linux" else None}
    if subprocess.run(probe, capture_output=True, text=True, **options).stdout.strip() != "False":
        pytest.skip("this user may write to every directory")
    return options


def python(elsewhere, *arguments, **environment):
    """Run Python there; None as an environment variable leaves it out."""
    environment = {"PYTHONPATH": TESTS, "HF_HUB_OFFLINE": "1"} | environment
    kept = {name: value for name, value in os.environ.items() if name not in environment}
    given = {name: str(value) for name, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, env=kept | given, **elsewhere)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert list(Path(elsewhere["cwd"]).iterdir()) == []
    return done


# Python takes UTF-8 for the locale C unless told not to.
ENVIRONMENTS = {
    "without a home, in the locale C": {"HOME": None, "LC_ALL": "C"},
    "with a home that is read-only, in plain ASCII": {
        "HOME": "/proc", "LC_ALL": "C", "PYTHONUTF8": 0, "PYTHONCOERCECLOCALE": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_way_from_python_raises_no_warning_and_writes_nothing_but_where_told(name, elsewhere, tmp_path):
    done = python(elsewhere, "-X", "dev", "-c", API, tmp_path, **ENVIRONMENTS[name])
    assert b"Warning" not in done.stderr, "such as of a file that is left open: " + done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == "reached the end with 4 samples and 32"
    assert {path.name for path in tmp_path.iterdir()} == {"read only", "run", "s.safetensors"}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_way_by_the_command_line_ends_with_an_evaluation(name, world, elsewhere, tmp_path):
    def cli(*arguments):
        done = python(elsewhere, "-m", "corrsteer", *arguments, **ENVIRONMENTS[name])
        assert b"Warning" not in done.stderr and b"Traceback" not in done.stderr, done.stderr.decode()
        return done.stdout.decode()

    cli(
        "collect", "--model", world / "model", "--sae", f"1={world / 'sae'}", "--task", world / "tâche.jsonl",
        "--grader", "regex:^[02468é]", "--max-new-tokens", "2", "--permutations", "19", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "1 features written to" in cli("select", tmp_path / "run", "--out", tmp_path / "s.safetensors")
    result = json.loads(cli("evaluate", "--steering", tmp_path / "s.safetensors", "--json"))
    assert result["n"] == 6 and result["examples"][0]["answer"] == "é" and result["notes"] == []
