"""Every recipe from its first step to its last, without a network.

A tiny model of the same architecture and layers, SAEs in the format that they are published in, and the dataset in its
real schema, all laid out as the hub lays them out.
"""

import json
import re
from pathlib import Path

import benchmark_files as files
import pytest
import tiny_models
import tiny_text
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from bench import formats
from corrsteer import load_benchmark
from corrsteer.cli import app
from corrsteer.cli.inputs import parse_saes
from corrsteer.sae.releases import check_names

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
# of the recipes' models: the architecture in tiny_models, and how many layers it has
MODELS = {
    "google/gemma-2-2b-it": ("gemma2", 26),
    "meta-llama/Llama-3.1-8B": ("llama", 32),
    "google/gemma-3-1b-it": ("gemma3", 26),
    "Qwen/Qwen3-1.7B-Base": ("qwen3", 28),
    "Qwen/Qwen3.5-2B-Base": ("qwen3_5_text", 24),
}
WRITERS = {
    "gemma-scope-2b": formats.write_gemma_scope, "llama_scope": formats.write_llama_scope,
    "gemma-scope-2-": formats.write_gemma_scope_2, "qwen-scope": formats.write_qwen_scope,
}  # fmt: skip
LIMIT = 40
# What keeps a trial on a tiny model short. It is right by chance alone, so where there are no options to choose from,
# another reward stands for the benchmark's own.
TRIAL = {
    "layer": [3, 9], "baselines": False, "permutations": 19, "candidates": 1, "most_features": 1, "max_new_tokens": 3,
    "dtype": "float32",
}  # fmt: skip


def odd(completion, example):
    """A reward that half of the samples have, whatever the model writes."""
    return sum((example.prompt + completion).encode()) % 2


def build(architecture, layers):
    arguments = {"vocab_size": len(tiny_text.tokenizer()), "max_position_embeddings": 4096,
                 "hidden_size": formats.D_IN, "num_hidden_layers": layers}  # fmt: skip
    if architecture == "qwen3_5_text":
        import transformers

        arguments |= {
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        }  # fmt: skip
        return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**arguments)).eval()
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    return tiny_models.build(architecture, **arguments, **({"layer_types": kinds} if "gemma" in architecture else {}))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A hub's cache that is empty, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def lay_out(recipe, home):
    """Model and dataset in the hub's cache, and SAEs in a folder that stands for it."""
    model = build(*MODELS[recipe["model"]])

    def write(folder):
        model.save_pretrained(folder)
        tiny_text.tokenizer().save_pretrained(folder)

    files.hub_cache(home / "hf", recipe["model"], write, "models")
    benchmark = load_benchmark(recipe["task"])
    files.hub_cache(home / "hf", benchmark.hub, lambda folder: files.COPIES[benchmark.name][0](folder, times=60))
    import sae_lens.loading.pretrained_saes_directory as directory

    for layer, source in parse_saes([recipe["sae"]]).items():
        release, sae_id = source.split(":", 1)
        found = directory.get_pretrained_saes_directory()[release]
        write_sae = next(writer for name, writer in WRITERS.items() if release.startswith(name))
        path = home / "saes" / found.repo_id / found.saes_map[sae_id]
        write_sae(path)
        for config in path.glob("*.json"):  # which says of what layer it is
            text = config.read_text()
            config.write_text(re.sub(r"(blocks|layers)\.\d+\.", rf"\1.{layer}.", text))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_from_its_prompts_to_its_report(path, offline):
    recipe = yaml.safe_load(path.read_text())
    lay_out(recipe, offline)
    changed = TRIAL | ({} if recipe.get("options_only") else {"grader": "test_recipes:odd"})
    trial = offline / "trial.yaml"
    trial.write_text(yaml.safe_dump(recipe | changed))
    with formats.hub(offline / "saes"):
        result = CliRunner().invoke(
            app, ["run", str(trial), "--out", str(offline / "run"), "--limit", str(LIMIT), "--json"]
        )
    assert result.exit_code == 0, result.output
    stages = json.loads((offline / "run" / "stages.json").read_text())
    strategies = recipe.get("strategies", ["single", "all", "pruned", "search"])
    assert list(stages) == ["collect", *strategies, "evaluate", "report"]
    evaluated = json.loads((offline / "run" / "evaluation.json").read_text())
    assert {"single", "all"} <= {Path(name).stem for name in evaluated["steerings"]}
    assert all(one["n"] == LIMIT for one in evaluated["steerings"].values())
    assert "<dt>As read</dt>" in (offline / "run" / "report.html").read_text()
    run = json.loads((offline / "run" / "run.json").read_text())["provenance"]
    assert set(run["saes"]) == set(map(str, range(1, MODELS[recipe["model"]][1])))
    assert run["settings"]["task"] == recipe["task"] and run["model"] == recipe["model"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_names_is_published(path):
    recipe = yaml.safe_load(path.read_text())
    for source in parse_saes([recipe["sae"]]).values():
        check_names(*source.split(":", 1))
    assert load_benchmark(recipe["task"]).hub and recipe["model"] in MODELS


def test_every_benchmark_of_the_paper_has_a_recipe_for_both_of_its_models():
    found = {(recipe["task"], recipe["model"]) for recipe in (yaml.safe_load(path.read_text()) for path in RECIPES)}
    tasks = ("mmlu", "mmlu_pro", "bbq:ambig", "bbq:disambig", "gsm8k", "simpleqa", "harmbench", "xstest")
    assert {(task, model) for task in tasks for model in list(MODELS)[:2]} <= found
