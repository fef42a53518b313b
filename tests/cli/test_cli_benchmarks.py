"""Benchmarks on the command line: their defaults, their parts and the restriction to their options, from collect to
evaluate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark_files as files
import pytest
import tiny_text
import yaml
from command_line import run

from corrsteer import Steering, read_rollouts
from corrsteer.cli.names import task_from_anywhere
from corrsteer.cli.settings import EvaluateSettings
from corrsteer.cli.task_defaults import defaults


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that reads any text, and copies of benchmarks."""
    home = tmp_path_factory.mktemp("world")
    tiny_text.model().save_pretrained(home / "model")
    tiny_text.tokenizer().save_pretrained(home / "model")
    files.mmlu_csv(home / "mmlu")
    files.gsm8k_jsonl(home / "gsm8k")
    files.bbq_jsonl(home / "bbq")
    return home


def model(world):
    return ("--model", world / "model", "--batch-size", 16)


SAES = ("--sae", "1=identity", "--permutations", 20)


def settings(out):
    return json.loads((out / "run.json").read_text())["provenance"]["settings"]


@pytest.fixture(scope="module")
def collected(world):
    out = world / "run"
    run("collect", *model(world), *SAES, "--task", "mmlu", "--data", world / "mmlu", "--options-only", "--shots", 1,
        "--out", out, "--json")  # fmt: skip
    return out


def test_a_benchmarks_settings_are_defaults(world, collected):
    given = settings(collected)
    expected = {
        "task": "mmlu", "data": str((world / "mmlu").resolve()), "shots": 1, "grader": ["choice"], "chat": False,
        "category_field": "category", "max_new_tokens": 1, "pool": "max", "option": ["A", "B", "C", "D"],
        "options_only": True, "split_seed": 42, "limit": 4000, "part": "train",
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    rollouts = [json.loads(line) for line in (collected / "rollouts.jsonl").read_text().splitlines()]
    assert {rollout["completion"].strip() for rollout in rollouts} <= set("ABCD")
    assert all(rollout["prompt"].startswith("How often, shots 0, is geology") for rollout in rollouts)


def test_what_was_collected_is_evaluated_on_the_benchmarks_own_test_part_by_category(world, collected, tmp_path):
    steering = tmp_path / "s.safetensors"
    run("select", collected, "--out", steering)
    result = json.loads(run("evaluate", "--steering", steering, "--scale", 40, "--json").stdout)
    assert result["n"] == 16 and {name: of["n"] for name, of in result["categories"].items()} == {
        "geology": 8, "us_history": 8
    }  # fmt: skip
    said = {example[side].strip() for example in result["examples"] for side in ("before", "after")}
    assert said <= set("ABCD")
    pairs = json.loads(run("generate", "--steering", steering, "--prompt", "A or B?", "--json").stdout)["completions"]
    assert {pairs[0]["unsteered"].strip(), pairs[0]["steered"].strip()} <= set("ABCD")
    free = json.loads(
        run("evaluate", "--steering", steering, "--no-options-only", "--max-new-tokens", 3, "--json").stdout
    )
    assert not {example["before"].strip() for example in free["examples"]} <= set("ABCD")


def test_a_scale_is_chosen_on_its_own_validation_part_with_the_restriction(world, collected, tmp_path):
    steering, scaled = tmp_path / "s.safetensors", tmp_path / "scaled.safetensors"
    run("select", collected, "--out", steering)
    run("calibrate", "--steering", steering, "--try-scale", 1, "--out", scaled)
    begun = Steering.load(scaled).provenance["begun"]
    assert begun["decoding"]["first_token_among"] == list("ABCD")
    assert {name: begun["tasks"]["validation"][name] for name in ("name", "part", "samples")} == {
        "name": "mmlu", "part": "validation", "samples": 10,
    }  # fmt: skip


def test_what_was_begun_with_the_restriction_is_no_job_without_it(world, collected, tmp_path):
    steering, out = tmp_path / "s.safetensors", tmp_path / "e.json"
    run("select", collected, "--out", steering)
    run("evaluate", "--steering", steering, "--out", out)
    assert "holds what is asked for" in run("evaluate", "--steering", steering, "--out", out).output
    refused = run("evaluate", "--steering", steering, "--out", out, "--no-options-only", ok=False)
    assert "first_token_among" in refused.output


def test_another_benchmark_is_evaluated_with_its_own_settings(world, collected, tmp_path):
    steering = tmp_path / "s.safetensors"
    run("select", collected, "--out", steering)
    others = ("--task", "bbq:ambig", "--data", world / "bbq", "--options-only")
    result = json.loads(run("evaluate", "--steering", steering, *others, "--json").stdout)
    assert result["n"] == 14 and set(result["categories"]) == {"Age", "Religion"}
    said = {example["before"].strip() for example in result["examples"]}
    assert said <= set("ABC"), "its options, and not those of the collection"


def test_nothing_that_was_said_of_a_benchmark_holds_for_another_task(world, collected, tmp_path):
    steering = tmp_path / "s.safetensors"
    run("select", collected, "--out", steering)
    files.jsonl(tmp_path / "my.jsonl", [{"prompt": f"What is {n}?", "answer": "a"} for n in range(30)])
    words = ("evaluate", "--steering", steering, "--json", "--task")
    own = json.loads(run(*words, tmp_path / "my.jsonl").stdout)
    assert own["n"] == 3 and not own["categories"]
    assert any(len(example["before"].strip()) > 1 for example in own["examples"]), "more tokens, and any"
    assert json.loads(run(*words, "gsm8k", "--data", world / "gsm8k", "--max-new-tokens", 2).stdout)["n"] > 0


class Asked:
    """What a command was given, as its settings' defaults ask for it."""

    kind = EvaluateSettings

    def __init__(self, **given):
        self.asked = given.get


def test_a_task_of_the_harness_starts_from_its_own_settings_unless_it_is_the_recorded_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mmlu = {"task": "mmlu", "data": "D", "shots": 5, "options_only": True, "chat": True, "seed": 3, "split": "train"}
    assert defaults(Asked(task="lm-eval:arc"), mmlu) == {"task": "mmlu", "seed": 3, "grader": ["own"]}
    (tmp_path / "my.yaml").touch()
    theirs = {"task": task_from_anywhere("lm-eval:my.yaml,split=train"), "chat": True, "grader": ["number"]}
    assert theirs["task"] == f"lm-eval:{tmp_path.resolve() / 'my.yaml'},split=train"
    assert defaults(Asked(task="lm-eval:my.yaml"), theirs) == theirs
    assert "chat" not in defaults(Asked(task="my.jsonl"), theirs)


def test_between_files_what_was_said_of_the_first_holds():
    recorded = {"task": "/home/train.jsonl", "grader": ["number"], "chat": True}
    assert defaults(Asked(task="test.jsonl"), recorded) == recorded


def test_a_benchmark_is_itself_where_a_folder_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "mmlu").mkdir()
    monkeypatch.chdir(tmp_path)
    assert task_from_anywhere("mmlu") == "mmlu"


def test_yaml_and_flags_override_a_benchmarks_settings(world, tmp_path):
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"task": "gsm8k", "data": str(world / "gsm8k"), "grader": "regex:.", "max_new_tokens": 5})
    )
    out = tmp_path / "r.jsonl"
    run("rollouts", *model(world), "--config", tmp_path / "c.yaml", "--max-new-tokens", 2, "--limit", 7, "--chat",
        "--out", out)  # fmt: skip
    made = read_rollouts(out)
    assert len(made) == 7 and made[0].decoding["max_new_tokens"] == 2 and made[0].rewards == {"reward": 1.0}
    assert made[0].prompt[-1]["content"].startswith("Q: In a field, how many pears")
    assert made[0].meta["category"] == "none"


def test_a_benchmark_of_ones_own_is_found_from_another_folder_too(world, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letters.py").write_text(
        "from corrsteer import Benchmark\n"
        "from corrsteer.tasks import Question\n\n\n"
        "def even(completion, example):\n    return float(len(completion.encode()) % 2)\n\n\n"
        "LETTERS = Benchmark(\n"
        "    'letters', 'letters', lambda row: Question(row['q'], 'A', row['kind']), '{question}=', even,\n"
        "    max_new_tokens=2, pool='mean',\n)\n"
    )
    files.jsonl(tmp_path / "own" / "data.jsonl", [{"q": f"letter {n}", "kind": "ab"[n % 2]} for n in range(50)])
    monkeypatch.chdir(tmp_path / "own")
    run("collect", *model(world), *SAES, "--task", "letters.py:LETTERS", "--data", "data.jsonl", "--out", "run")
    given = settings(Path("run"))
    assert (given["grader"], given["pool"], given["max_new_tokens"], given["option"]) == (["own"], "mean", 2, [])
    monkeypatch.chdir(tmp_path)
    run("select", "own/run", "--out", "s.safetensors")
    result = json.loads(run("evaluate", "--steering", "s.safetensors", "--json").stdout)
    assert result["n"] == 5 and set(result["categories"]) <= {"a", "b"}
    again = ("--task", "own/letters.py:LETTERS")  # whose data are as recorded
    assert json.loads(run("evaluate", "--steering", "s.safetensors", *again, "--json").stdout)["n"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--task", "mmlu", "--split", "test"),
            "split is of JSONL files and datasets on the hub, and mmlu is a benchmark",
        ),
        (("--task", "task.jsonl", "--data", "x"), "data is of benchmarks, which are mmlu, "),
        (("--task", "task.jsonl", "--shots", 1), "shots is of benchmarks, which are mmlu, "),
        (("--task", "mmul"), "did you mean the benchmark mmlu?"),
        (("--task", "mmlu", "--data", "nowhere"), "data must be a file or a folder that is there, got 'nowhere'"),
        (("--task", "task.jsonl", "--options-only"), "options_only needs the labels of the options"),
        (("--task", "none.py:NAME"), "is in a file that is not there"),
        (("--task", "lm-eval:arc", "--split", "train"), "write --task lm-eval:arc,split=train"),
        (("--task", "lm-eval:arc,split=test", "--shots", 2), "write --task lm-eval:arc,shots=2"),
        (("--task", "lm-eval:arc", "--data", "x"), "data is not of lm-eval:arc, which lm-evaluation-harness reads by"),
        (("--task", "lm-eval:arc", "--prompt-field", "q"), "prompt_field is not of lm-eval:arc"),
        (("--task", "lm-eval:arc", "--answer-field", "a"), "answer_field is not of lm-eval:arc"),
    ],
)
def test_mistakes_are_answered_in_a_line(world, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files.jsonl(tmp_path / "task.jsonl", [{"prompt": "p", "answer": "a"}] * 20)
    result = run("rollouts", *model(world), *arguments, "--out", "r.jsonl", ok=False)
    assert message in " ".join(result.output.split()), result.output


def test_without_a_network_a_benchmark_comes_from_the_hubs_cache(world, tmp_path):
    files.hub_cache(tmp_path / "hf", "cais/mmlu", files.mmlu_hub)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = ["rollouts", *model(world), "--task", "mmlu", "--part", "test", "--options-only", "--json",
               "--out", tmp_path / "r.jsonl"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "corrsteer", *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompts"] == 16
    made = read_rollouts(tmp_path / "r.jsonl")
    assert {rollout.completion.strip() for rollout in made} <= set("ABCD")
    assert made[0].id.startswith("all/test-00000-of-00001.parquet:")
