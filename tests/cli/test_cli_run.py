"""`corrsteer run`: a recipe in one directory, gone on with where it was not finished."""

import json
import random

import pytest
import tiny_pipeline
import yaml
from command_line import run

from corrsteer import Run, Steering
from corrsteer.cli import evaluate

MADE = {"run.json", "single.safetensors", "all.safetensors", "evaluation.json", "report.html", "stages.json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, SAEs, a task, and a recipe for them."""
    from sae_lens import StandardSAE, StandardSAEConfig

    home = tmp_path_factory.mktemp("recipes")
    tiny_pipeline.model().save_pretrained(home / "model")
    tiny_pipeline.tokenizer().save_pretrained(home / "model")
    for layer in (1, 2):
        sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=40))
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        sae.save_model(home / f"sae{layer}")
    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randrange(100)}+{rng.randrange(1000)}=", "answer": "."} for _ in range(400)]
    (home / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": str(home / "model"), "sae": f"1-2={home}/sae{{layer}}", "task": str(home / "task.jsonl"),
        "grader": "regex:[02468]", "max_new_tokens": 4, "permutations": 20, "candidates": 1, "most_features": 1,
        "completions": 600,
    }  # fmt: skip
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return home


def test_every_step_of_a_recipe_leaves_its_result_in_one_directory(world, tmp_path):
    out = tmp_path / "run"
    result = run("run", world / "recipe.yaml", "--out", out, "--limit", 40, "--json")

    found = json.loads(result.stdout)
    assert {path.name for path in out.iterdir()} >= MADE
    assert Run.load(out).n == 40 and found["report"] == str(out / "report.html")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert set(found["steerings"]) <= set(evaluation["steerings"]) and evaluation["baselines"]
    assert all(one["n"] == 40 for one in evaluation["steerings"].values())
    assert [len(Steering.load(path).features) for path in found["steerings"][:2]] == [1, 2]
    stages = json.loads((out / "stages.json").read_text())
    assert list(stages) == ["collect", "single", "all", "pruned", "search", "evaluate", "report"]
    assert all(seconds > 0 for seconds in stages.values())


def test_a_recipe_goes_on_where_it_ended(world, tmp_path, monkeypatch):
    out, options = tmp_path / "run", ("--limit", 40)
    undisturbed = tmp_path / "undisturbed"
    run("run", world / "recipe.yaml", "--out", undisturbed, *options)

    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(evaluate.evaluate, "__wrapped__", fails)
        assert run("run", world / "recipe.yaml", "--out", out, *options, ok=False).exit_code == 130
    assert not (out / "evaluation.json").exists()
    before = (out / "run.json").read_bytes()
    run("run", world / "recipe.yaml", "--out", out, *options)
    assert (out / "run.json").read_bytes() == before
    here, there = (json.loads((each / "evaluation.json").read_text())["steerings"] for each in (out, undisturbed))
    scores = [[(one["unsteered"], one["steered"]) for one in each.values()] for each in (here, there)]
    assert scores[0] == scores[1]


def test_a_model_is_loaded_once(world, tmp_path, monkeypatch):
    from corrsteer.cli import inputs

    loaded, load = [], inputs._load_model
    monkeypatch.setattr(inputs, "_load_model", lambda given: loaded.append(given.model) or load(given))
    monkeypatch.chdir(world)  # where its name is shorter than the one that is recorded
    run("run", world / "recipe.yaml", "--model", "./model", "--out", tmp_path / "run", "--limit", 40)
    assert loaded == ["./model"]


def test_what_a_recipe_cannot_mean_is_refused_before_anything_is_done(world, tmp_path):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    for changed, reason in (
        ({"strategies": ["best"]}, "strategies.0: Input should be 'single', 'all', 'pruned' or 'search'"),
        ({"strategies": []}, "strategies"),
        ({"stratgies": ["all"]}, "unknown setting 'stratgies'; did you mean strategies?"),
        ({"scale": 0.5}, "has scale, which no step of a run takes; leave it out"),
        ({"sae": None, "model": None}, "must have model and sae, and does not say; add it"),
        ({"sae": "2-1=x{layer}"}, "sae must name layers from the first to the last"),
        ({"sae": "1-2=x"}, "sae must name layers from the first to the last and have {layer}"),
        ({"sae": ["1-2=x{layer}", "2=x"]}, "sae gives layer 2 twice"),
    ):
        written = {name: value for name, value in (recipe | changed).items() if value is not None}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(written))
        result = run("run", tmp_path / "r.yaml", "--out", tmp_path / "run", ok=False)
        assert reason in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "run").exists()


