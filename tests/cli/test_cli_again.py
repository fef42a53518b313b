"""The command line on runs that are there: regrade, show, and collections from rollouts."""

import json
import random
import shutil

import pytest
import tiny_pipeline
import torch
import yaml
from command_line import run

from corrsteer import Run, Steering
from corrsteer.rollouts.rollout_file import read_rollouts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, an SAE and a task with two rewards, and a run of them."""
    from sae_lens import StandardSAE, StandardSAEConfig

    home = tmp_path_factory.mktemp("again")
    tiny_pipeline.model().save_pretrained(home / "model")
    tiny_pipeline.tokenizer().save_pretrained(home / "model")
    torch.manual_seed(1)
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=40))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(home / "sae1")
    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randrange(100)}+{rng.randrange(1000)}=", "answer": "."} for _ in range(60)]
    (home / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": str(home / "model"), "sae": {1: str(home / "sae1")}, "task": str(home / "task.jsonl"), "part": "all",
        "grader": {"even": "regex:^[02468]", "small": "regex:^[0-4]"}, "max_new_tokens": 3, "permutations": 99,
    }  # fmt: skip
    (home / "collect.yaml").write_text(yaml.safe_dump(settings))
    run("collect", "--config", home / "collect.yaml", "--out", home / "run")
    return home


def result(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


def test_regrade_gives_what_a_collection_with_that_grader_gives_without_a_model(world, tmp_path, monkeypatch):
    graded = ("--grader", "regex:^[0-4]", "--out")
    expected = result("collect", "--config", world / "collect.yaml", *graded, tmp_path / "new")
    monkeypatch.setattr("corrsteer.cli.inputs.load_model", lambda *a: pytest.fail("a model"))
    found = result("regrade", world / "run", *graded, tmp_path / "again")
    assert found["layers"]["1"].pop("settled_at") is None and expected["layers"]["1"].pop("settled_at")
    for key in ("samples", "reward", "layers"):
        assert found[key] == expected[key]
    other = result("regrade", world / "run", "--grader", "a=regex:^[0-4]", "--grader", "b=regex:[579]", "--reward", "b",
                   "--out", tmp_path / "two")  # fmt: skip
    assert set(other["rewards"]) == {"a", "b"} and Run.load(tmp_path / "two").reward == "b"
    run("select", tmp_path / "again", "--out", tmp_path / "s.safetensors")
    recorded = Run.load(tmp_path / "again").provenance["settings"]
    assert recorded["grader"] == ["regex:^[0-4]"], "evaluate grades as the run was graded"


def test_rewards_come_from_a_file_by_id(world, tmp_path):
    there = Run.load(world / "run").rollouts
    lines = ["id,quality", *(f"{rollout.id},{len(rollout.completion)}" for rollout in reversed(there))]
    (tmp_path / "rewards.csv").write_text("\n".join(lines) + "\n")
    run("regrade", world / "run", "--rewards", tmp_path / "rewards.csv", "--out", tmp_path / "joined")
    joined = Run.load(tmp_path / "joined")
    assert joined.reward == "quality" and joined.rewards.tolist() == [len(rollout.completion) for rollout in there]
    assert joined.provenance["settings"]["grader"] == ["none"]
    (tmp_path / "rewards.csv").write_text("\n".join(lines[:-1]) + "\n")
    asked = ("--rewards", tmp_path / "rewards.csv", "--out", tmp_path / "x")
    said = run("regrade", world / "run", *asked, ok=False).output
    assert "rewards.csv must have rewards of every rollout, but has none of" in said
    for wrong in ((), ("--grader", "exact", "--rewards", tmp_path / "rewards.csv")):
        said = run("regrade", world / "run", *wrong, "--out", tmp_path / "x", ok=False).output
        assert "grader or rewards must be given, and not both" in said
    assert "out must be another directory" in run(
        "regrade", world / "run", "--grader", "exact", "--out", world / "run", ok=False
    ).output  # fmt: skip


def test_without_activations_completions_are_read_again(world, tmp_path):
    run("collect", "--config", world / "collect.yaml", "--keep-activations", "never", "--out", tmp_path / "bare")
    assert Run.load(tmp_path / "bare").activations is None
    kept = result("regrade", world / "run", "--grader", "regex:^[0-4]", "--out", tmp_path / "a")
    read = result("regrade", tmp_path / "bare", "--grader", "regex:^[0-4]", "--out", tmp_path / "b")
    assert read["layers"]["1"]["feature"] == kept["layers"]["1"]["feature"]
    assert read["layers"]["1"]["r"] == pytest.approx(kept["layers"]["1"]["r"], abs=1e-5)
    assert read["reward"] == kept["reward"]


def test_rollouts_of_a_task_are_collected_from_as_if_generated_there(world, tmp_path):
    config = yaml.safe_load((world / "collect.yaml").read_text())
    rollouts = tmp_path / "rollouts.jsonl"
    settings = {name: value for name, value in config.items() if name not in ("sae", "permutations")}
    (tmp_path / "rollouts.yaml").write_text(yaml.safe_dump(settings))
    run("rollouts", "--config", tmp_path / "rollouts.yaml", "--out", rollouts)
    assert [one.rewards for one in read_rollouts(rollouts)] == [one.rewards for one in Run.load(world / "run").rollouts]
    common = ("--model", world / "model", "--sae", f"1={world / 'sae1'}", "--rollouts", rollouts, "--permutations", 99)
    run("collect", *common, "--out", tmp_path / "read")
    read, there = Run.load(tmp_path / "read"), Run.load(world / "run")
    torch.testing.assert_close(read.correlation(1), there.correlation(1), rtol=0, atol=1e-5)
    assert list(read.all_rewards()) == ["even", "small"] and read.provenance["settings"]["grader"] == ["none"]
    run("collect", *common, "--reward", "small", "--limit", 30, "--out", tmp_path / "small")
    small = Run.load(tmp_path / "small")
    assert small.reward == "small" and small.n == 30
    assert small.provenance["settings"]["max_new_tokens"] == 3, "as the rollouts were generated"
    run("collect", *common, "--grader", "regex:^[579]", "--out", tmp_path / "graded")
    assert Run.load(tmp_path / "graded").provenance["settings"]["grader"] == ["regex:^[579]"]
    said = run("collect", *common, "--part", "test", "--task", "t.jsonl", "--out", tmp_path / "x", ok=False).output
    assert "part, task cannot be used with rollouts" in said
    said = run("evaluate", "--model", world / "model", "--steering", tmp_path / "s", ok=False).output
    assert "error" in said


def test_select_takes_any_of_a_runs_rewards(world, tmp_path):
    by_small = result("select", world / "run", "--reward", "small", "--out", tmp_path / "s.safetensors")
    (feature,) = by_small["features"]
    there = Run.load(world / "run").statistics("small")
    assert feature["statistics"]["correlation"] == pytest.approx(float(there.correlation(1).max()))
    assert set(feature["statistics"]["correlations"]) == {"even"}
    table = run("select", world / "run", "--out", tmp_path / "s.safetensors").stdout
    assert "r of small" in table
    said = run("select", world / "run", "--reward", "size", "--out", tmp_path / "s.safetensors", ok=False).output
    assert "reward must be one of even, small, got 'size'" in said


def test_select_on_the_first_samples_is_that_of_them_and_progress_is_drawn_of_several(world, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(world / "run", again)
    for n in (30, 60):
        found = result("select", again, "--samples", n, "--out", again / f"{n}.safetensors")
        there = Run.load(again).statistics(samples=range(n))
        assert found["features"][0]["statistics"]["correlation"] == pytest.approx(float(there.correlation(1).max()))
        assert Steering.load(again / f"{n}.safetensors").provenance["n"] == n
    both = [option for n in (30, 60) for option in ("--steering", again / f"{n}.safetensors")]
    run("evaluate", *both, "--part", "all", "--out", again / "e.json")
    run("figure", "progress", again, "--out", tmp_path / "f.svg")
    assert ">samples selected on<" in (tmp_path / "f.svg").read_text(encoding="utf-8")
    said = run("select", again, "--samples", 61, "--out", tmp_path / "s.safetensors", ok=False).output
    assert "samples must" in said


def test_show_says_what_a_run_holds(world):
    text = run("show", world / "run").stdout
    for part in ("60 samples, 40 features of layers 1", "reward 'even'", "reward 'small'", "completion tokens"):
        assert part in text, part
    assert "r of small" in text
    found = result("show", world / "run", "--reward", "small", "--count", 2)
    assert found["samples"] == 60 and len(found["top"]["1"]) == 2 and found["activation_bytes"] > 0
    assert found["rewards"]["even"]["mean"] == pytest.approx(float(Run.load(world / "run").rewards.mean()))


def test_show_finds_the_completions_of_a_feature_and_where_it_peaks(world):
    feature = result("show", world / "run")["top"]["1"][0]["feature"]
    found = result("show", world / "run", "--feature", f"1/{feature}", "--count", 2)
    first = found["highest"][0]
    values = [value for _, value in Run.load(world / "run").activations.of_feature(1, "max", feature)]
    assert first["activation"] == max(values)
    assert first["peak"]["activation"] == pytest.approx(first["activation"], rel=1e-4)
    text = run("show", world / "run", "--feature", f"1/{feature}").stdout
    assert f"Layer 1 feature {feature}" in text and f"<{first['peak']['token']}>" in text
    quick = result("show", world / "run", "--feature", f"1/{feature}", "--no-peaks")
    assert all(one["peak"] is None for one in quick["highest"])
    assert "feature must be LAYER/FEATURE" in run("show", world / "run", "--feature", "12", ok=False).output


def test_several_completions_of_a_prompt_are_collected_and_compared_within_it(world, tmp_path):
    flags = ("--samples-per-prompt", 3, "--temperature", 1.5, "--within-prompt")
    run("collect", "--config", world / "collect.yaml", *flags, "--out", tmp_path / "several")
    several = Run.load(tmp_path / "several")
    assert several.n == 180 and several.evidence[1]["max"].within
    greedy = ("--samples-per-prompt", 3, "--out", tmp_path / "x")
    said = run("collect", "--config", world / "collect.yaml", *greedy, ok=False).output
    assert "samples_per_prompt must be 1 at temperature 0" in said


def test_what_is_read_again_is_compared_as_it_was_collected(world, tmp_path):
    flags = ("--samples-per-prompt", 3, "--temperature", 1.5, "--within-prompt", "--keep-activations", "never",
             "--bootstrap", 20, "--permutations", 49)  # fmt: skip
    run("collect", "--config", world / "collect.yaml", *flags, "--out", tmp_path / "bare")
    graders = ("--grader", "a=regex:^[0-4]", "--grader", "b=regex:[579]", "--reward", "b")
    run("regrade", tmp_path / "bare", *graders, "--out", tmp_path / "again")
    again = Run.load(tmp_path / "again")
    evidence = again.evidence[1]["max"]
    assert evidence.within and (evidence.permutations, evidence.bootstrap) == (49, 20)
    assert again.reward == "b" and again.testable() and list(again.rollouts[0].rewards) == ["b", "a"]


def test_completions_are_not_removed_by_a_collection_that_reads_them(world, tmp_path):
    folder = tmp_path / "run" / "collecting"
    folder.mkdir(parents=True)
    (folder / "rollouts.jsonl").write_text("".join(one.to_line() for one in Run.load(world / "run").rollouts))
    common = ("--model", world / "model", "--sae", f"1={world / 'sae1'}", "--rollouts", folder / "rollouts.jsonl")
    said = run("collect", *common, "--out", tmp_path / "run", "--force", ok=False).output
    assert "would be removed" in said and len(read_rollouts(folder / "rollouts.jsonl")) == 60
    run("collect", *common, "--out", tmp_path / "elsewhere", "--permutations", 0)


def test_a_collection_without_a_grader_is_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr("corrsteer.cli.inputs.load_model", lambda *a: pytest.fail("a model"))
    said = run("collect", "--config", world / "collect.yaml", "--grader", "none", "--out", tmp_path, ok=False).output
    assert "grader must be one or more" in said
    flags = ("--samples-per-prompt", 3, "--out", tmp_path)
    said = run("collect", "--config", world / "collect.yaml", *flags, ok=False).output
    assert "samples_per_prompt must be 1 at temperature 0" in said


def test_rewards_that_do_not_vary_are_the_reason_that_nothing_is_selected(world, tmp_path):
    run("regrade", world / "run", "--grader", "regex:.*", "--out", tmp_path / "flat")
    said = run("select", tmp_path / "flat", "--out", tmp_path / "s", ok=False).output
    assert "every one of the 60 rewards was" in said
