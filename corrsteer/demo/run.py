"""The demo: collect, select, steer and evaluate on the small model that ships with the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from corrsteer.arguments import whole
from corrsteer.demo import sums
from corrsteer.experiments.baselines import baselines
from corrsteer.experiments.evaluation import evaluate
from corrsteer.experiments.scaling import calibrate_best
from corrsteer.experiments.selection import STRATEGIES, select
from corrsteer.lm.decoding import Decoding
from corrsteer.report.tables import evaluation_table, feature_table
from corrsteer.rollouts.grading import grade
from corrsteer.runs.collect import collect
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.steering.features import CHANCE
from corrsteer.tasks import Task, with_shuffled_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).parent
NAMES = {"single": "CorrSteer-S", "all": "CorrSteer-A", "pruned": "CorrSteer-P", "search": "search"}
EXAMPLES_SHOWN = 5
PERMUTATIONS = 1000
ALPHA = 0.05
# The mean over samples in which the feature is active. Zeros included, the default, it would be weaker, for no better
# reason than that two thirds of the training prompts are not signed by the careful author. (Chosen on validation.)
COEFFICIENT = "mean_positive_active"


def load() -> tuple[nn.Module, PreTrainedTokenizerBase, dict[int, SparseEncoder]]:
    """The demo's model, tokenizer and encoders by layer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(HERE / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    layers = range(model.config.num_hidden_layers)
    return model, tokenizer, {layer: SparseEncoder.load(HERE / "sae" / f"layer_{layer}") for layer in layers}


def tasks(seed: int = 0) -> tuple[Task, Task, Task]:
    """The demo's train, validation and test sums, none of which is in two of them."""
    splits = sums.splits(whole("seed", seed, 0))
    train = Task.from_rows(splits.train, grader="exact", name="train")
    validation = Task.from_rows(splits.validation, grader="exact", name="validation")
    return train, validation, Task.from_rows(splits.test, grader="exact", name="test")


def run_demo(
    seed: int = 0, say: Callable[[str], None] = print, progress: bool = True, shuffle_rewards: bool = False
) -> dict[str, Any]:
    """Run the main job, telling `say` as it goes, and return every number of it.

    With `shuffle_rewards` it is a negative control: rewards go to other sums, and no feature should survive.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one gains nothing on so small a model, and costs much on a busy machine
    try:
        return (_control if shuffle_rewards else _run)(seed, say, progress)
    finally:
        torch.set_num_threads(threads)


def _run(seed: int, say: Callable[[str], None], progress: bool) -> dict[str, Any]:
    started = time.monotonic()
    say("Loading a 0.86-million-parameter language model and the SAE of each of its layers ...")
    train, validation, test = tasks(seed)
    model, tokenizer, encoders = load()
    decoding = Decoding(max_new_tokens=4)
    say(
        f"It learnt to write sums like two authors: {sums.CAREFUL}, who is right, and {sums.SLOPPY}, who forgets "
        f"the carry. Where a sum is\nunsigned it cannot know which of the two it is. We look for features that go "
        f"with right answers, and steer along them.\n"
    )

    say(
        f"1. Collect: complete {len(train)} sums with a carry, some signed, and correlate every feature with the "
        f"reward."
    )
    run = _collect(model, tokenizer, encoders, train, decoding, progress)
    backends = run.provenance["backends"]
    say(f"   The reward was {run.rewards.mean():.3f} on average. Activations: {', '.join(backends)} backend.\n")

    say(
        f"2. Select: the best feature of each layer; by {len(validation)} unsigned sums, which of them help when "
        f"steered alone; and what\n   does best there of many features and scales."
    )
    of_model: dict[str, Any] = {
        "model": model, "tokenizer": tokenizer, "validation": validation, "decoding": decoding, "progress": progress
    }  # fmt: skip
    steerings = {strategy: select(run, strategy, coefficient=COEFFICIENT, **of_model) for strategy in STRATEGIES}
    best = {layer: rows[0] for layer, rows in steerings["all"].table.items() if rows}
    searched = steerings["search"]
    shown = [*best.values(), *(feature for feature in searched.features if feature not in best.values())]
    say(feature_table(shown, {NAMES[s]: steering.features for s, steering in steerings.items()}))
    say(
        f"   Adjusted p: how often any of all {run.n_features} features correlates as well when rewards are permuted "
        f"({PERMUTATIONS} times);\n   `chance` stands beside those above {CHANCE}.\n"
    )
    record = searched.provenance["search"]
    say(
        f"   Search: {record['trials']} trials of {record['candidates']} features took {record['completions']} "
        f"completions; a grid of them would have taken {record['grid']['completions']}.\n   Its scale is "
        f"{searched.scale:g}. {searched.notes[0]}.\n"
    )

    say(
        f"3. Steer and evaluate: {len(test)} unsigned sums that nothing was selected on, unsteered and steered. Below "
        f"are baselines,\n   each the best of its candidates and scales on the {len(validation)} sums of before."
    )
    others = calibrate_best(
        model, tokenizer, baselines(run, searched, seed=seed), validation, decoding=decoding, progress=progress
    )
    compared = {**{NAMES[s]: steering for s, steering in steerings.items()}, **others}
    evaluated = evaluate(model, tokenizer, test, compared, decoding=decoding, progress=progress)
    evaluations = {strategy: evaluated[NAMES[strategy]] for strategy in STRATEGIES}
    say(evaluation_table(evaluated, indent="   ") + "\n")

    best_strategy = max(evaluations, key=lambda s: evaluations[s].steered)
    changed = [e for e in evaluations[best_strategy].examples if e["before"] != e["after"]]
    say(f"Some answers before and after {NAMES[best_strategy]}:")
    for example in changed[:EXAMPLES_SHOWN]:
        verdict = "right" if example["reward_after"] else "wrong"
        say(
            f"   {example['prompt']}{example['before']:<5} ->  {example['after']:<5} "
            f"({verdict}; the sum is {example['answer']})"
        )
    seconds = time.monotonic() - started
    say(f"\nDone in {seconds:.0f} s.")
    return {
        "seed": seed,
        "seconds": seconds,
        "backends": backends,
        "reward": float(run.rewards.mean()),
        "samples": {"train": len(train), "validation": len(validation), "test": len(test)},
        "features": {str(layer): asdict(feature) for layer, feature in best.items()},
        "strategies": {
            s: e.to_dict(examples=False)
            | {"features": [asdict(f) for f in steerings[s].features], "notes": steerings[s].notes + e.notes}
            for s, e in evaluations.items()
        },
        "search": record | {"scale": searched.scale, "positions": searched.positions},
        "baselines": {
            name: evaluated[name].to_dict(examples=False) | {"scale": other.scale, "notes": other.notes}
            for name, other in others.items()
        },
        "examples": changed[:EXAMPLES_SHOWN],
    }


def _collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoders: Mapping[int, SparseEncoder],
    task: Task,
    decoding: Decoding,
    progress: bool,
) -> Run:
    return collect(
        model, tokenizer, encoders, task,
        pool="max", decoding=decoding, permutations=PERMUTATIONS, progress=progress,
    )  # fmt: skip


def _control(seed: int, say: Callable[[str], None], progress: bool) -> dict[str, Any]:
    started = time.monotonic()
    train, _, _ = tasks(seed)
    model, tokenizer, encoders = load()
    decoding = Decoding(max_new_tokens=4)
    say(f"A negative control: {len(train)} sums are completed, and their rewards shuffled among them (seed {seed}).")
    graded = grade(model, tokenizer, train, decoding, progress=progress)
    control = with_shuffled_rewards(train, graded.rewards, seed)
    run = _collect(model, tokenizer, encoders, control, decoding, progress)
    steering = select(run, "all", coefficient=COEFFICIENT, alpha=ALPHA)
    best = {layer: rows[0] for layer, rows in steering.table.items() if rows}
    say(feature_table(best.values(), {f"p <= {ALPHA}": steering.features}))
    if steering.features:
        say(
            f"{len(steering.features)} feature(s) survived alpha = {ALPHA}, though there is nothing to find here: "
            f"that is to happen with one seed in {round(1 / ALPHA)}."
        )
    else:
        say(
            f"No feature survives alpha = {ALPHA}: the largest of {run.n_features} correlations is what chance gives.\n"
            f"There is nothing to find here, and nothing was found."
        )
    return {
        "seed": seed,
        "seconds": time.monotonic() - started,
        "shuffled": True,
        "samples": run.n,
        "reward": float(run.rewards.mean()),
        "features": {str(layer): asdict(feature) for layer, feature in best.items()},
        "survivors": [asdict(feature) for feature in steering.features],
        "notes": steering.notes,
    }
