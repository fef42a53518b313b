"""Graders with models by their names, wherever the command line and YAML take a grader."""

import json

import pytest
import yaml
from command_line import run
from judge_server import right, serving
from tiny_classifiers import save_roberta

from corrsteer import demo
from corrsteer.cli import inputs
from corrsteer.cli.settings import EvaluateSettings
from corrsteer.rollouts import spending
from corrsteer.rollouts.model_graders import Refusal


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(spending, "_SPENT", {})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graders")
    model, tokenizer, _ = demo.load()
    model.save_pretrained(folder / "model"), tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+38=A", "answer": str(a + 38 * (a % 2))} for a in range(15, 39)]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_roberta(folder / "roberta")
    return folder


@pytest.fixture
def options(world):
    return ["--model", world / "model", "--task", world / "task.jsonl", "--max-new-tokens", 3]


def test_rollouts_are_collected_regraded_and_evaluated_by_graders_with_models(world, options, tmp_path):
    refusal = f"refusal:model={world / 'roberta'},threshold=none"
    with serving(right) as server:
        judge = f"judge:{server.url},model=m,cache={tmp_path / 'cache'},prompt_price=1,completion_price=1"
        graders = ["--grader", "exact", "--grader", refusal, "--grader", judge, "--grader", "length"]
        made = run("rollouts", *options, *graders, "--part", "all", "--out", tmp_path / "r.jsonl", "--json")
        means = json.loads(made.stdout)["rewards"]
        assert list(means) == ["exact", "refusal", "judge", "length"] and means["judge"] == means["exact"]
        assert "24 requests and 0 replies from the cache, 240 tokens in, 72 out, cost 0.0003" in made.stderr
        config = tmp_path / "c.yaml"
        config.write_text(yaml.safe_dump({"grader": {"correct": judge, "refusal": refusal, "length": "length"}}))
        sae = ["--sae", "2=identity", "--permutations", 0]
        run("collect", *options, "--config", config, *sae, "--part", "all", "--out", tmp_path / "run")
        run("regrade", tmp_path / "run", "--grader", refusal, "--grader", "exact", "--out", tmp_path / "run2")
        run("select", tmp_path / "run", "--strategy", "single", "--out", tmp_path / "s.json")
        found = run("evaluate", "--steering", tmp_path / "s.json", "--part", "all", "--limit", 4, "--json")
    assert json.loads(found.stdout)["grader"].startswith("correct=judge:http://127.0.0.1:")


def test_a_grader_with_a_model_runs_on_the_runs_device(world):
    settings = EvaluateSettings(
        model="m", device="cpu", task=str(world / "task.jsonl"), grader=[f"refusal:model={world / 'roberta'}"]
    )
    (grader,) = inputs.load_task(settings).grading.graders
    assert grader.grade == Refusal(str(world / "roberta"), device="cpu")


def test_a_model_that_is_not_there_is_found_out_before_another_is_loaded(world, options, tmp_path, monkeypatch):
    monkeypatch.setattr("corrsteer.cli.inputs.load_model", lambda *_: pytest.fail("a model was loaded"))
    failed = run("rollouts", *options, "--grader", f"refusal:model={tmp_path}/no", "--out", tmp_path / "r", ok=False)
    assert "the grader's model" in failed.output and "refusal_phrases" in failed.output


def test_a_grader_that_stands_in_for_a_model_is_named_in_every_result(world, options, tmp_path):
    run("collect", *options, "--grader", "token_f1", "--sae", "2=identity", "--permutations", 0, "--part", "all",
        "--out", tmp_path / "run")  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["provenance"]["task"]["grader"] == "token_f1"
    run("select", tmp_path / "run", "--strategy", "single", "--out", tmp_path / "s.json")
    found = json.loads(run("evaluate", "--steering", tmp_path / "s.json", "--part", "all", "--json").stdout)
    assert found["grader"] == "token_f1"
    assert "graded by token_f1, which needs no model and stands in for similarity" in found["notes"]
