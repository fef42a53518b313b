"""`corrsteer rollouts`, and several graders on the command line."""

import json
import os
import sys

import pytest
import tiny_pipeline
import yaml
from command_line import run

from corrsteer import CorrSteerError, Decoding, Task, generate_rollouts, read_rollouts
from corrsteer.cli import inputs, settings
from corrsteer.lm import vllm_engine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and a task in a directory, and settings that name them."""
    home = tmp_path_factory.mktemp("world")
    tiny_pipeline.model().save_pretrained(home / "model")
    tiny_pipeline.tokenizer().save_pretrained(home / "model")
    rows = [{"prompt": f"{n}+{n * 7}=", "answer": str(n), "size": n} for n in range(30)]
    (home / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "grading.py").write_text("def length(completion, example):\n    return {'n': len(completion), 'one': 1}\n")
    given = {"model": str(home / "model"), "task": str(home / "task.jsonl"), "max_new_tokens": 3, "batch_size": 7}
    (home / "rollouts.yaml").write_text(yaml.safe_dump(given))
    return home


GRADERS = ("--grader", "even=regex:^[02468]", "--grader", "grading:length")


def test_rollouts_writes_the_train_parts_completions_with_every_reward(world, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(world)
    out = tmp_path / "r.jsonl"
    arguments = ("rollouts", "--config", world / "rollouts.yaml", *GRADERS, "--out", out)
    result = json.loads(run(*arguments, "--json").stdout)
    rollouts = read_rollouts(out)
    assert result["rollouts"] == result["prompts"] == len(rollouts) == 24
    assert list(result["rewards"]) == list(rollouts[0].rewards) == ["even", "length.n", "length.one"]
    assert result["rewards"]["even"] == sum(each.rewards["even"] for each in rollouts) / 24
    assert result["tokens"] == sum(len(each.completion_ids) for each in rollouts)
    assert result["finished_by_length"] == sum(each.finish == "length" for each in rollouts)
    assert {each.model for each in rollouts} == {str(world / "model")}
    assert all(each.meta["size"] == int(each.answer) for each in rollouts)
    task = Task.from_jsonl(world / "task.jsonl", "regex:^[02468]").split()[0]
    model, tokenizer = tiny_pipeline.model(), tiny_pipeline.tokenizer()
    batches = generate_rollouts(model, tokenizer, task, Decoding(3), progress=False)
    alone = {each.id: each.completion for batch in batches for each in batch}
    assert {each.id: each.completion for each in rollouts} == alone

    before = out.read_bytes()
    assert json.loads(run(*arguments, "--json").stdout) == result, "what is finished is told again"
    assert "already there, with others" in run(*arguments, "--max-new-tokens", 2, ok=False).stderr
    assert out.read_bytes() == before
    text = run(*arguments, "--force", "--reward", "length.n", "--part", "all", "--limit", 5).stdout
    assert "5 rollouts of 5 prompts written to" in text and "mean length.n" in text
    assert list(read_rollouts(out)[0].rewards) == ["length.n", "even", "length.one"]


def test_rollouts_samples_several_of_each_prompt(world, tmp_path):
    arguments = ("rollouts", "--config", world / "rollouts.yaml", "--grader", "none", "--samples-per-prompt", 2)
    result = json.loads(run(*arguments, "--temperature", 1, "--out", tmp_path / "r", "--json").stdout)
    assert (result["rollouts"], result["prompts"], result["rewards"]) == (48, 24, {})
    assert {each.sample for each in read_rollouts(tmp_path / "r")} == {0, 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples-per-prompt", 2], "samples_per_prompt must be 1 at temperature 0"),
        (["--reward", "beauty"], "reward must be one of those that the task's graders give, reward, got 'beauty'"),
        (["--grader", "none", "--grader", "exact"], "grader none is for a task without rewards"),
        (["--grader", "exact", "--grader", "exact"], "grader gives the reward 'exact' twice"),
        (["--grader", "a=fair"], "grader must be one of .*got 'fair'"),
        (["--engine", "llama"], "engine: Input should be 'hf' or 'vllm'"),
        (["--engine", "vllm"], r"needs vLLM, which cannot be imported .*pip install 'corrsteer\[vllm\]'"),
        (["--engine", "vllm", "--device", "cpu"], "device must be left out with --engine vllm"),
        (["--engine-option", "seed=1"], "engine_option must be left out unless with --engine vllm, got seed=1"),
        (["--engine", "vllm", "--engine-option", "eager"], "engine_option must be NAME=VALUE, .*got 'eager'"),
        (["--engine", "vllm", "--engine-option", "dtype=auto"], "engine_option dtype is what --dtype says"),
        (["--engine", "vllm", "--engine-option", "a=1", "--engine-option", "a=2"], "engine_option a is given twice"),
        (["--engine", "vllm", "--engine-option", "a=[1"], r"engine_option a must have a value that is YAML, got '\[1'"),
    ],
)
def test_what_rollouts_cannot_do_ends_in_one_line_and_no_file(world, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "vllm", None)
    out = tmp_path / "r"
    result = run("rollouts", "--config", world / "rollouts.yaml", "--out", out, *arguments, ok=False)
    import re

    assert re.search(message, result.stderr) and len(result.stderr.strip().splitlines()[-1]) > 10
    assert "Traceback" not in result.output and not out.exists()


@pytest.mark.parametrize(
    "given, expected",
    [
        ("number", "number"),
        (["number"], "number"),
        (["regex:^a=b"], "regex:^a=b"),
        (["pattern=regex:^a=b"], {"pattern": "regex:^a=b"}),
        (["number", "my.graders:Close.of"], {"number": "number", "Close.of": "my.graders:Close.of"}),
        ({"correct": "number", "close": "my:close"}, {"correct": "number", "close": "my:close"}),
        ("none", None),
    ],
)
def test_graders_are_one_a_list_or_a_mapping(given, expected, tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"grader": given, "task": "t"}))
    read = settings.read(settings.TaskSettings, tmp_path / "s.yaml", {})
    assert inputs.parse_graders(read.grader) == expected


def test_the_name_of_a_reward_is_there_once():
    with pytest.raises(CorrSteerError, match="grader gives the reward 'a' twice"):
        inputs.parse_graders(["a=exact", "a=number"])


def test_engine_options_are_given_to_vllm_as_yaml_says_and_its_log_leaves_standard_output(world, tmp_path, monkeypatch):
    given = {}

    def load(model, **options):
        given.update(options, stream=os.environ["VLLM_LOGGING_STREAM"])
        return tiny_pipeline.model()

    monkeypatch.setenv("VLLM_LOGGING_STREAM", "")  # so that it is left as it was
    monkeypatch.delenv("VLLM_LOGGING_STREAM")
    monkeypatch.setattr(vllm_engine, "load_vllm", load)
    arguments = ("rollouts", "--config", world / "rollouts.yaml", "--engine", "vllm", "--limit", 2)
    flags = ("--engine-option", "max_model_len=256", "--engine-option", "enforce_eager=true")
    run(*arguments, *flags, "--out", tmp_path / "a")
    assert given == {"dtype": "auto", "max_model_len": 256, "enforce_eager": True, "stream": "ext://sys.stderr"}
    in_yaml = yaml.safe_load((world / "rollouts.yaml").read_text()) | {"engine_option": {"tokenizer": None, "seed": 3}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(in_yaml))
    given.clear()
    run("rollouts", "--config", tmp_path / "r.yaml", *arguments[3:], "--out", tmp_path / "b")
    assert given == {"dtype": "auto", "tokenizer": None, "seed": 3, "stream": "ext://sys.stderr"}
