"""The command line: the whole way through, what it prints, and how it speaks of mistakes."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import tiny_pipeline
import torch
import yaml
from command_line import run
from typer.testing import CliRunner

import corrsteer
from corrsteer import Run, Steering, Task
from corrsteer.cli import app, settings

COMMANDS = ("demo", "run", "rollouts", "collect", "select", "calibrate", "evaluate", "generate", "export",
            "import", "report", "figure", "plan", "doctor")  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, SAEs in SAELens' format and a task, in a directory."""
    from sae_lens import StandardSAE, StandardSAEConfig

    home = tmp_path_factory.mktemp("world")
    tiny_pipeline.model().save_pretrained(home / "model")
    tiny_pipeline.tokenizer().save_pretrained(home / "model")
    for layer in (1, 2):
        torch.manual_seed(layer)
        sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=40))
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        sae.save_model(home / f"sae{layer}")
    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randrange(100)}+{rng.randrange(1000)}=", "answer": "."} for _ in range(120)]
    rows = [row | {"size": "long" if len(row["prompt"]) > 6 else "short"} for row in rows]
    (home / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": str(home / "model"),
        "sae": [f"1={home / 'sae1'}", f"2={home / 'sae2'}"],
        "task": str(home / "task.jsonl"),
        "grader": "regex:^[02468]",
        "max_new_tokens": 3,
        "category_field": "size",
    }
    (home / "collect.yaml").write_text(yaml.safe_dump(settings))
    return home


@pytest.fixture(scope="module")
def collected(world):
    result = run("collect", "--config", world / "collect.yaml", "--out", world / "run", "--json")
    return json.loads(result.stdout)


def test_help_names_every_command_and_explains_every_option():
    text = run("--help").output
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        lines = [line for line in run(command, "--help").output.splitlines() if line.strip().startswith("--")]
        assert lines and all(len(line.split()) > 2 for line in lines), command


def test_collect_select_evaluate_and_generate_hand_over_to_each_other(world, collected):
    assert collected["samples"] == round(0.8 * 120) and set(collected["layers"]) == {"1", "2"}
    steering = world / "s.safetensors"
    selected = json.loads(run("select", world / "run", "--out", steering, "--json").stdout)
    best = {str(f["layer"]): (f["index"], f["statistics"]["correlation"]) for f in selected["features"]}
    assert best == {layer: (top["feature"], top["r"]) for layer, top in collected["layers"].items()}
    p = {str(f["layer"]): f["statistics"]["p_adjusted"] for f in selected["features"]}
    assert p == {layer: top["p_adjusted"] for layer, top in collected["layers"].items()}
    assert all(0 < top["settled_at"] <= 96 for top in collected["layers"].values())

    evaluated = json.loads(run("evaluate", "--steering", steering, "--json").stdout)
    assert evaluated["n"] == 12, "by default the test part of the same task"
    parts = Task.from_jsonl(world / "task.jsonl").split()
    assert sorted(e["prompt"] for e in evaluated["examples"]) == sorted(e.prompt for e in parts[2].examples)
    other = world / "other.safetensors"
    run("select", world / "run", "--strategy", "single", "--out", other)
    both = json.loads(run("evaluate", "--steering", steering, "--steering", other, "--json").stdout)["steerings"]
    assert list(both) == [str(steering), str(other)]
    alone = {"p_holm", "unsteered_tokens_per_second", "steered_tokens_per_second"}
    assert {k: v for k, v in both[str(steering)].items() if k not in alone} == {
        k: v for k, v in evaluated.items() if k not in alone
    }
    table = run("evaluate", "--steering", steering, "--steering", other).stdout
    for path in (steering, other):
        result = both[str(path)]
        low, high = result["steered_interval"]
        row = re.search(rf"^{path.stem} +{result['steered']:.3f} \[{low:.3f}, {high:.3f}\] .*", table, re.M)
        assert row and row[0].split()[-7:-3] == [str(n) for n in result["transitions"].values()]
    strong = json.loads(run("evaluate", "--steering", steering, "--scale", 50, "--part", "all", "--json").stdout)
    assert strong["n"] == 120 and strong["improved"] + strong["worsened"] + strong["changed_equal"] > 0

    pairs = json.loads(
        run("generate", "--steering", steering, "--prompt", "1+2=", "--prompt", "3+", "--scale", 50, "--json").stdout
    )["completions"]
    assert [p["prompt"] for p in pairs] == ["1+2=", "3+"] and any(p["steered"] != p["unsteered"] for p in pairs)


def test_evaluate_prints_the_categories_that_collect_was_told_of(world, collected, tmp_path):
    steering = tmp_path / "s.safetensors"
    run("select", world / "run", "--out", steering)
    of = json.loads(run("evaluate", "--steering", steering, "--json").stdout)["categories"]
    assert list(of) == ["long", "short"] and sum(category["n"] for category in of.values()) == 12
    table = run("evaluate", "--steering", steering).stdout
    for name, category in of.items():
        low, high = category["difference_interval"]
        difference = f"{category['difference']:+.3f} \\[{low:+.3f}, {high:+.3f}\\]".replace("+", "\\+")
        assert re.search(rf"^{name} +{category['n']} .* {difference}$", table, re.M)
    without = json.loads(run("evaluate", "--steering", steering, "--category-field", "", "--json").stdout)
    assert without["categories"] == {}
    missing = run("evaluate", "--steering", steering, "--category-field", "subject", ok=False).output
    assert "task.jsonl:1: no category: field 'subject' is missing or null among prompt, answer, size" in missing


def test_alpha_drops_what_chance_explains_and_says_so_in_words(world, collected):
    p = min(top["p_adjusted"] for top in collected["layers"].values())
    result = run("select", world / "run", "--out", world / "none.safetensors", "--alpha", p - 1e-4, ok=False)
    assert (
        f"no feature survives alpha={p - 1e-4:g} (maxT)" in result.output and not (world / "none.safetensors").exists()
    )
    arguments = ("--alpha", 0.999, "--correction", "bh", "--interval", "fisher", "--score", "contrastive", "--json")
    kept = json.loads(run("select", world / "run", "--out", world / "s2.safetensors", *arguments).stdout)["features"]
    assert kept and all(f["statistics"]["q_value"] <= 0.999 and f["statistics"]["score"] is not None for f in kept)


def test_scores_permutations_and_bootstrap_are_collected_as_asked(world, tmp_path):
    arguments = (
        "--score",
        "contrastive",
        "--permutations",
        19,
        "--bootstrap",
        30,
        "--block-size",
        32,
        "--shuffle-seed",
        7,
        "--keep-activations",
        "never",
    )
    run("collect", "--config", world / "collect.yaml", "--out", tmp_path / "run", "--pool", "last_prompt", *arguments)
    kept = Run.load(tmp_path / "run")
    assert (kept.pool, kept.coefficient_pool, list(kept.moments[1])) == ("last_prompt", "last_prompt", ["last_prompt"])
    evidence = kept.evidence[1]["last_prompt"]
    assert (evidence.permutations, evidence.bootstrap, evidence.seed) == (19, 30, 7)
    assert evidence.scores == ("pearson", "contrastive") and evidence.blocks == {0, 1, 2}
    arguments = ("--score", "contrastive", "--interval", "bootstrap", "--json")
    rows = json.loads(run("select", tmp_path / "run", "--out", tmp_path / "s", *arguments).stdout)["table"]["1"]
    twentieths = [20 * row["statistics"]["p_value"] for row in rows]
    assert twentieths == pytest.approx([round(value) for value in twentieths])


@pytest.mark.parametrize(("layers", "waited_for"), [((0, 1), [1]), ((0,), [0])])
def test_patience_waits_for_the_layers_that_select_considers(layers, waited_for, world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("corrsteer.stats.stability.stable", lambda snapshots, patience, of: asked.append(list(of)))
    saes = [argument for layer in layers for argument in ("--sae", f"{layer}=identity")]
    arguments = ("--permutations", 0, "--block-size", 32, "--patience", 1)
    run("collect", "--config", world / "collect.yaml", "--out", tmp_path / "run", *saes, *arguments)
    assert asked == [waited_for] * 2


def test_calibrate_writes_the_best_scale(world, collected):
    steering, scaled = world / "s.safetensors", world / "scaled.safetensors"
    run("select", world / "run", "--out", steering, "--strategy", "single")
    arguments = ("--steering", steering, "--out", scaled, "--try-scale", 2, "--try-scale", 50)
    found = json.loads(run("calibrate", *arguments, "--json").stdout)
    assert [point["scale"] for point in found["curve"]] == [0, 2, 50]
    before, after = (Steering.load(path) for path in (steering, scaled))
    assert after.scale == found["scale"] and after.features == before.features
    assert found["validation"]["n"] == 12 and Steering.load(scaled).provenance["calibration"]["curve"] == found["curve"]
    assert f"scale {found['scale']:g}, written to" in run("calibrate", *arguments).stdout


def test_select_pruned_validates_on_the_runs_own_task(world, collected):
    alone, pruned, strong = world / "alone.safetensors", world / "pruned.safetensors", ("--scale", 300)
    (feature,) = json.loads(run("select", world / "run", "--strategy", "single", "--out", alone, "--json").stdout)[
        "features"
    ]
    answers = run("generate", "--steering", alone, "--prompt", "1+2=", *strong, "--json").stdout
    grader = "regex:^" + re.escape(
        json.loads(answers)["completions"][0]["steered"][0]
    )  # what that feature makes it say
    arguments = ["--strategy", "pruned", "--grader", grader, *strong, "--out", pruned, "--json"]
    features = json.loads(run("select", world / "run", *arguments).stdout)["features"]
    assert feature in features

    selection = Steering.load(pruned).provenance["selection"]
    assert selection["validation"] == {"task": "task", "n": 12, "positions": "generated", "scale": 300.0}
    assert features == [e["feature"] for e in selection["score_alone"] if e["score"] > selection["unsteered_score"]]


def test_select_searches_and_what_follows_uses_the_scale_and_the_positions_that_it_found(world, collected):
    out = world / "searched.safetensors"
    arguments = ("--strategy", "search", "--part", "all", "--candidates", 1, "--also-all")
    result = json.loads(run("select", world / "run", *arguments, "--out", out, "--json").stdout)
    steering, record = Steering.load(out), result["search"]
    assert (result["scale"], result["positions"]) == (steering.scale, steering.positions)
    assert record == steering.provenance["search"] and record["confirmation"]["n"] == 60
    text = run("select", world / "run", *arguments, "--out", out).stdout
    cost = f"{record['trials']} trials of {record['candidates']} features took {record['completions']} completions"
    assert cost in text and f"scale {steering.scale:g}, positions {steering.positions}" in text
    assert text.count(steering.notes[0]) == 1
    asked = ("generate", "--steering", out, "--prompt", "1+2=", "--json")
    own = run(*asked).stdout
    assert own == run(*asked, "--scale", steering.scale, "--positions", steering.positions).stdout

    nothing = run("select", world / "run", *arguments, "--grader", "regex:^", "--out", world / "none", ok=False)
    assert "The race" in nothing.stdout and "no trial did better than no steering on 60" in nothing.stderr
    assert not (world / "none").exists()

    short = run("select", world / "run", *arguments, "--completions", 10, ok=False)
    assert "completions must be at least" in short.stderr


def test_evaluate_compares_with_baselines_each_at_its_best_scale_on_the_validation_part(world, collected):
    steering = world / "single.safetensors"
    run("select", world / "run", "--strategy", "single", "--out", steering)
    arguments = ("evaluate", "--steering", steering, "--grader", "regex:^[02468]", "--baselines", world / "run")
    found = json.loads(run(*arguments, "--json").stdout)
    assert set(found["steerings"]) == {str(steering), *found["baselines"]}
    assert {"difference of means", "random feature 1", "residual dimension"} <= set(found["baselines"])
    for record in found["baselines"].values():
        assert record["validation"]["n"] == 12 and len(record["curve"]) >= 5
    means = found["baselines"]["difference of means"]
    assert means["candidates"] == 4, "two layers and two poolings"
    text = run(*arguments)
    assert "random feature" in text.stdout
    assert f"scale {means['scale']:g}, the best of 4 on validation" in text.output


def test_options_of_the_search_are_refused_without_it(world, collected):
    result = run("select", world / "run", "--strategy", "pruned", "--candidates", 2, ok=False)
    assert "--candidates can only be used with --strategy search" in result.stderr


def test_without_json_results_are_text_on_stdout_and_progress_is_on_stderr(world, collected):
    result = run("select", world / "run", "--out", world / "s.safetensors", "--top-k", 3)
    assert "mean_positive_active" in result.stdout and "2 features written to" in result.stdout
    assert "contrastive" in result.stdout and " ± " in result.stdout and " to " in result.stdout


@pytest.mark.parametrize(("arguments", "seen"), (((), 0), (("--part", "all"), 96), (("--part", "train"), 96),
                                                 (("--split-seed", 3), None)))  # fmt: skip
def test_evaluate_says_how_many_of_its_samples_features_were_selected_on(arguments, seen, world, collected, tmp_path):
    run("select", world / "run", "--out", tmp_path / "s")
    result = run("evaluate", "--steering", tmp_path / "s", *arguments, "--json")
    notes = json.loads(result.stdout)["notes"]
    if seen is None:
        other = Task.from_jsonl(world / "task.jsonl").split(seed=3)[2].examples
        trained = {e.prompt for e in Task.from_jsonl(world / "task.jsonl").split()[0].examples}
        seen = sum(e.prompt in trained for e in other)
    assert bool(notes) == bool(seen) and all(note.startswith(f"{seen} of the ") for note in notes)
    text = run("evaluate", "--steering", tmp_path / "s", *arguments).stdout
    assert (f"note: {seen} of the " in text) == bool(seen)


def test_one_yaml_file_serves_every_command_and_takes_hyphens_and_a_mapping_of_saes(world, collected, tmp_path):
    settings = yaml.safe_load((world / "collect.yaml").read_text()) | {"sae": {1: str(world / "sae1")}, "limit": 9}
    settings["max-new-tokens"] = settings.pop("max_new_tokens")
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(settings))
    arguments = ("--config", tmp_path / "all.yaml", "--json")
    assert set(json.loads(run("collect", "--out", tmp_path / "run", *arguments).stdout)["layers"]) == {"1"}
    run("select", tmp_path / "run", "--out", tmp_path / "s")
    assert json.loads(run("evaluate", "--steering", tmp_path / "s", *arguments).stdout)["n"] == 9


def test_doctor_says_that_a_forced_backend_is_none(monkeypatch):
    monkeypatch.setenv("CORRSTEER_BACKEND", "foo")
    assert "asks for 'foo', which is no backend" in run("doctor").stdout


def test_version_is_printed():
    assert run("--version").stdout.strip() == corrsteer.__version__


def test_an_option_wins_over_the_yaml_file_and_force_replaces_a_run(world):
    for limit, force in ((5, ()), (7, ("--force",))):
        arguments = ["--config", world / "collect.yaml", "--out", world / "few", "--limit", limit, "--json", *force]
        assert json.loads(run("collect", *arguments).stdout)["samples"] == limit
        for name in (".writable", "layer_10.safetensors"):  # the user's own
            (world / "few" / name).touch()
    assert (world / "few" / ".writable").exists() and (world / "few" / "layer_10.safetensors").exists()
    assert Run.load(world / "few").n == 7


def test_identity_collects_residual_dimensions(world):
    arguments = [
        "--config",
        world / "collect.yaml",
        "--sae",
        "2=identity",
        "--out",
        world / "raw",
        "--limit",
        30,
        "--json",
    ]
    assert set(json.loads(run("collect", *arguments).stdout)["layers"]) == {"2"}
    run("select", world / "raw", "--out", world / "raw.safetensors")


def test_collect_takes_the_precision_of_the_encoders_and_the_run_keeps_it(world, tmp_path):
    run("collect", "--config", world / "collect.yaml", "--out", tmp_path / "run", "--precision", "bf16x2")
    described = [layer["encoder"] for layer in Run.load(tmp_path / "run").provenance["saes"].values()]
    assert all("in bf16x2" in text for text in described) and len(described) == 2


def test_doctor_prints_versions_and_every_backend():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["packages"]["torch"] == torch.__version__
    verdicts = {(b["backend"], b["device"], b["operation"]): b["ok"] and b["automatic"] for b in report["backends"]}
    assert verdicts["reference", "cpu", "encode"] and not verdicts["triton", "cpu", "encode"]
    assert "reference" in run("doctor").stdout


COLLECT = ("collect", "--config", "{world}/collect.yaml", "--out", "o")
MISTAKES = {
    "a steering file has no folder": (["select", "{world}/run", "--out", "{world}/none/s"], "there is no folder"),
    "a steering file is a folder": (["select", "{world}/run", "--out", "{world}"], "it is no file; give the path"),
    "another run is already there": (
        ["collect", "--config", "{world}/collect.yaml", "--limit", "9", "--out", "{world}/run"], "begin anew (--force)"
    ),
    "out cannot be written to": (
        ["collect", "--config", "{world}/collect.yaml", "--out", "{world}/task.jsonl/run"],
        "cannot be written to",
    ),
    "a setting is missing": (["collect"], "model is missing: give --model or put it in the YAML file"),
    "the yaml file is not there": (["collect", "--config", "no.yaml"], "config no.yaml cannot be read"),
    "a value is not allowed": ([*COLLECT, "--pool", "sum"], "pool: Input should be"),
    "the model is not there": (
        [*COLLECT, "--model", "{world}/nobody"],
        "nobody",
    ),
    "the device is not there": ([*COLLECT, "--device", "cuda:7"], "cannot be loaded on device 'cuda:7'"),
    "the task is not there": (
        [*COLLECT, "--task", "no.jsonl"],
        "no.jsonl",
    ),
    "an sae has no layer": (
        [*COLLECT, "--sae", "sae1"],
        "sae must be LAYER=SOURCE, got 'sae1'",
    ),
    "a layer has two saes": (
        [*COLLECT, "--sae", "1={world}/sae1", "--sae", "1={world}/sae1"],
        "sae gives layer 1 twice",
    ),
    "an sae is given for another layer": (
        [*COLLECT, "--sae", "2={world}/sae1"],
        "trained at blocks.1",
    ),
    "the grader is unknown": (
        [*COLLECT, "--grader", "fair"],
        "fair",
    ),
    "the run is not there": (["select", "{world}/nothing"], "is not a saved run"),
    "an option goes with pruned only": (
        ["select", "{world}/run", "--scale", "2"],
        "--scale can only be used with --strategy pruned or search",
    ),
    "the steering file is not there": (
        ["evaluate", "--steering", "no.safetensors"],
        "there is no steering file at no.safetensors",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_one_line_and_status_1(name, world, collected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    result = run(*(a.format(world=world) for a in arguments), ok=False)
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert message in line and "Traceback" not in result.stderr


EVALUATE = ("evaluate", "--steering", "{world}/s.safetensors")
CALIBRATE = ("calibrate", "--steering", "{world}/s.safetensors", "--out", "o")
TOO_EARLY = {
    "a scale is not a number": ([*EVALUATE, "--scale", "nan"], "scale: Input should be a finite number, got nan"),
    "a scale is infinite": ([*EVALUATE, "--scale", "inf"], "scale: Input should be a finite number, got inf"),
    "a scale to generate by": (["generate", *EVALUATE[1:], "--prompt", "1", "--scale", "nan"], "a finite number"),
    "a scale to prune by": (["select", "{world}/run", "--strategy", "pruned", "--scale=-inf"], "a finite number"),
    "a scale to try": ([*CALIBRATE, "--try-scale", "nan"], "scales must be a sequence of finite numbers, got [nan]"),
    "a temperature": ([*EVALUATE, "--temperature", "nan"], "temperature: Input should be"),
    "top_p": ([*COLLECT, "--top-p", "nan"], "top_p: Input should be"),
    "a negative seed": ([*EVALUATE, "--seed", "-1"], "seed: Input should be greater than or equal to 0, got -1"),
    "alpha": (["select", "{world}/run", "--strategy", "pruned", "--alpha", "nan"], "alpha must be between 0 and 1"),
    "too few permutations": ([*COLLECT, "--permutations", "5"], "permutations must be 0 or at least 19"),
    "an unknown backend": ([*COLLECT, "--backend", "magic"], "backend must be one of"),
    "an unknown score": ([*COLLECT, "--score", "kendall"], "scores must be among"),
    "an sae without a layer": ([*COLLECT, "--sae", "sae1"], "sae must be LAYER=SOURCE, got 'sae1'"),
    "a layer in superscript": ([*COLLECT, "--sae", "²=sae1"], "sae must be LAYER=SOURCE, got '²=sae1'"),
    "an sae by its hub repository": (
        [*COLLECT, "--sae", "8=google/gemma-scope-2b-pt-res:layer_8/width_16k/canonical"],
        "use gemma-scope-2b-pt-res-canonical",
    ),
    "an sae that is not there": ([*COLLECT, "--sae", "1=nothing"], "got 'nothing'; there is no such directory"),
    "a release without an id": ([*COLLECT, "--sae", "1=gpt2-small-res-jb"], "RELEASE:SAE_ID or identity, got 'gpt2"),
    "an id with a slip of the pen": (
        [*COLLECT, "--sae", "1=gpt2-small-res-jb:blocks.8.hook_resid_per"],
        "did you mean blocks.8.hook_resid_pre",
    ),
    "no prompt": (["generate", *EVALUATE[1:], "--prompt", " "], "must be a non-empty string"),
    "samples to plan": (["plan", "--alpha", "nan"], "alpha must be between 0 and 1, got nan"),
    "a frequency to plan": (["plan", "--frequency", "nan"], "s (frequency) must be a finite number, got nan"),
    "a seed of the demo": (["demo", "--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
}


@pytest.mark.parametrize("name", TOO_EARLY)
def test_an_option_that_cannot_be_right_ends_before_a_model_is_loaded(name, world, collected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("select", world / "run", "--out", world / "s.safetensors")
    monkeypatch.setattr("corrsteer.cli.inputs.load_model", lambda *_: pytest.fail("a model was loaded"))
    arguments, message = TOO_EARLY[name]
    result = run(*(a.format(world=world) for a in arguments), ok=False)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and message in result.stderr, result.stderr


def test_a_run_that_cannot_be_saved_where_it_should_is_saved_elsewhere_and_the_command_says_where(
    world, tmp_path, monkeypatch
):
    save = Run.save

    def full(self, directory):
        if directory == tmp_path / "run":
            raise corrsteer.CorrSteerError(f"{directory} cannot be written (No space left on device)")
        save(self, directory)

    monkeypatch.setattr(Run, "save", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    result = run("regrade", world / "run", "--grader", "contains", "--out", tmp_path / "run", ok=False)
    (elsewhere,) = (tmp_path / "scratch").iterdir()
    assert f"No space left on device); the run was saved to {elsewhere} instead" in result.stderr
    assert result.exit_code == 1 and Run.load(elsewhere).n == 96


def test_a_yes_in_yaml_is_no_number(world, tmp_path):
    (tmp_path / "a.yaml").write_text("max_new_tokens: yes\nscale: .nan\n")
    stderr = run("evaluate", "--steering", "none", "--config", tmp_path / "a.yaml", ok=False).stderr
    assert "there is no steering file" in stderr
    stderr = run("collect", "--config", tmp_path / "a.yaml", ok=False).stderr
    assert "max_new_tokens: must be a number, got True" in stderr


def test_the_traceback_is_shown_when_asked_for():
    result = CliRunner().invoke(app, ["--traceback", "evaluate", "--steering", "no.safetensors"])
    assert result.exit_code == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: there is no steering file")
    assert "Traceback" not in run("evaluate", "--steering", "no.safetensors", ok=False).stderr


@pytest.mark.parametrize("shown", ([], ["--traceback"]))
def test_what_an_interrupt_ends_exits_as_shells_expect(monkeypatch, shown):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("corrsteer.steering.steering.Steering.load", interrupted)
    result = CliRunner().invoke(app, [*shown, "evaluate", "--steering", "s"])
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == "error: interrupted"
    assert ("Traceback" in result.stderr) == bool(shown)


def test_an_evaluation_that_is_there_is_told_again_where_it_is_the_one_that_is_asked_for(world, collected, tmp_path):
    run("select", world / "run", "--out", tmp_path / "s.safetensors")
    command = ("evaluate", "--steering", tmp_path / "s.safetensors", "--out", tmp_path / "e.json")
    run(*command)
    assert "holds what is asked for" in run(*command).stderr
    other = run(*command, "--category-field", "", ok=False).stderr
    assert 'category_field was "size", is null' in other
    (tmp_path / "e.json").write_text('{"mine": 1}')
    assert "already there, and no evaluation that says what it is of" in run(*command, ok=False).stderr
    assert (tmp_path / "e.json").read_text() == '{"mine": 1}' and len(list(tmp_path.iterdir())) == 2
    run(*command, "--force")
    assert json.loads((tmp_path / "e.json").read_text())["steerings"]


def test_yaml_with_an_unknown_setting_or_no_mapping_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("modle: x\n")
    message = run("collect", "--config", tmp_path / "a.yaml", ok=False).stderr
    assert "unknown setting 'modle'; did you mean model?" in message
    (tmp_path / "b.yaml").write_text("- x\n")
    assert "must be a mapping of settings, got list" in run("collect", "--config", tmp_path / "b.yaml", ok=False).stderr
    (tmp_path / "c.yaml").write_text("a: [\n")
    assert "is not YAML" in run("collect", "--config", tmp_path / "c.yaml", ok=False).stderr


def test_a_setting_given_twice_in_yaml_is_refused(world, tmp_path):
    twice = (world / "collect.yaml").read_text() + "\npool: max\npool: mean\n"
    (tmp_path / "twice.yaml").write_text(twice)
    result = run("collect", "--config", tmp_path / "twice.yaml", "--out", tmp_path / "run", ok=False)
    assert "is not YAML: it has 'pool' twice" in result.stderr


def test_a_mapping_taken_into_another_in_yaml_may_be_overridden(tmp_path):
    (tmp_path / "merged.yaml").write_text("sae: &one\n  1: identity\n  2: identity\ntask:\n  <<: *one\n  2: other\n")
    assert settings._yaml(tmp_path / "merged.yaml")["task"] == {1: "identity", 2: "other"}


def test_keeping_the_bos_token_of_prompts_that_are_not_read_is_refused(world, tmp_path):
    result = run("collect", "--config", world / "collect.yaml", "--keep-bos", "--out", tmp_path / "run", ok=False)
    assert "keep_bos is of prompts, which positions 'all' reads" in result.stderr


def test_a_yaml_file_may_have_a_byte_order_mark_but_must_be_utf_8(world, tmp_path):
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfmodel: m\ntask: t\nsae: 1=\xc3\xa9\n")
    stderr = run("collect", "--config", tmp_path / "marked.yaml", ok=False).stderr
    assert stderr.startswith("error: out is missing") and stderr.count("missing") == 1
    (tmp_path / "latin.yaml").write_bytes("model: é\n".encode("latin-1"))
    stderr = run("collect", "--config", tmp_path / "latin.yaml", ok=False).stderr
    assert "latin.yaml is not UTF-8 (byte 0xe9 at position 7); save it as UTF-8" in stderr
    (tmp_path / "date.yaml").write_text("seed: 2024-13-45\n", encoding="utf-8")
    assert "date.yaml is not YAML: month must be" in run("collect", "--config", tmp_path / "date.yaml", ok=False).stderr


def cli(*arguments, **environment):
    """Start the command as a shell would, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "corrsteer", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", (["doctor"], ["plan", "--json"], ["--help"], ["plan", "--help"]), ids=str)
def test_a_reader_that_leaves_early_ends_a_command_without_a_word(arguments):
    process = cli(*arguments)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() in (0, 1)


def test_where_the_terminal_is_not_utf_8_what_it_lacks_is_written_as_an_escape(world, collected, tmp_path):
    process = cli("select", world / "run", "--out", tmp_path / "s", PYTHONIOENCODING="iso8859-11")  # Thai, without ±
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.count(rb"\xb1 ") > 4 and b"features written to" in out, out
    process = cli("evaluate", "--steering", "café", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    _, error = process.communicate()
    assert process.returncode == 1 and error.startswith(b"error: there is no steering file at caf")


def test_a_collection_that_must_stop_goes_on_or_is_made_a_run_as_far_as_it_came(world, tmp_path, monkeypatch):
    (tmp_path / "moody.py").write_text(
        "calls = []\ndef grade(completion, example):\n"
        "    calls.append(1)\n    return float('nan') if len(calls) == 30 else float(len(calls) % 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    command = ["collect", "--config", world / "collect.yaml", "--grader", "moody:grade", "--batch-size", 8,
               "--out", tmp_path / "partial"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["/bin/corrsteer", *map(str, command), "--force"])
    said = run(*command, "--force", ok=False).stderr
    assert f"what was done is kept in {tmp_path}/partial/collecting. Go on with: corrsteer collect --config" in said
    assert "--force" not in said, "which would throw it away"
    shutil.copytree(tmp_path / "partial", tmp_path / "finished")
    assert json.loads(run(*command[:-1], tmp_path / "finished", "--finish", "--json").stdout)["samples"] == 24
    again = run(*command[:-1], tmp_path / "finished")
    assert "note: finished after 24 of 96 samples, as was asked for" in again.stdout
    assert Run.load(tmp_path / "finished").n == 24 and not (tmp_path / "finished" / "collecting").exists()
    assert json.loads(run(*command, "--json").stdout)["samples"] == 96
    again = run(*command)
    assert "96 samples" in again.stdout, "what is finished is told again"
    selected = json.loads(run("select", tmp_path / "partial", "--out", tmp_path / "s", "--json").stdout)
    assert selected["features"]


@pytest.mark.parametrize("arguments", (["--help"], ["doctor"]))
def test_the_installed_command_runs(arguments):
    done = subprocess.run([sys.executable, "-m", "corrsteer", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and "Traceback" not in done.stderr
