"""Runs, steerings and evaluations made up for pages: one as large as an open model's, and one that means harm."""

import numpy as np
import torch

from corrsteer import Evidence, Moments, Run, Steering, update_moments
from corrsteer.experiments.evaluation import CategoryEvaluation, Evaluation
from corrsteer.lm.hook_points import HookPoint
from corrsteer.ops.rows import SparseRows
from corrsteer.report.page.found import Compared, Material
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs.activations import Activations, Block
from corrsteer.stats.stability import Leader, Snapshot
from corrsteer.steering.features import Feature

ATTACK = "</script><img src=x onerror=\"window.broken='{where}'\"><b onclick=window.broken=1>bold</b>"


def run(layers=2, d_sae=64, n=200, permutations=39, seed=0, label=str, kept=True):
    """A run of sparse features, of which feature 3 of each layer goes with the reward; `label` makes every text."""
    rng = np.random.default_rng(seed)
    y = torch.from_numpy((rng.random(n) < 0.4).astype(np.float64))
    share = rng.uniform(-3.5, -0.1, d_sae)
    moments, evidence, rows = {}, {}, {}
    for layer in range(1, layers + 1):
        z = torch.from_numpy(
            ((rng.random((n, d_sae)) < 10**share) * rng.exponential(size=(n, d_sae))).astype(np.float32)
        )
        z[:, 3] = (y + 0.3 * torch.from_numpy(rng.random(n))).float()
        moments[layer] = {"max": Moments(d_sae)}
        evidence[layer] = {"max": Evidence(d_sae, permutations=permutations)}
        update_moments(z, y.float(), moments[layer]["max"])
        evidence[layer]["max"].update(z, y.float(), 0)
        rows[layer, "max"] = SparseRows.from_dense(z)
    rollouts = [
        Rollout(
            str(at), label(f"prompt {at}"), (1, 2), label(f"completion {at}"), (3,) * (1 + at % 7), "stop",
            {label("reward"): float(y[at])},
        )
        for at in range(n)
    ]  # fmt: skip
    activations = Activations([Block.of_rows(0, list(range(n)), rows)], permutations) if kept else None
    snapshots = [
        Snapshot(
            count, {layer: (Leader(3, 0.5 + 0.01 * layer, 0.4, 0.6), Leader(5, 0.1, None, None)) for layer in moments}
        )
        for count in (n // 2, n)
    ]
    return Run(
        moments=moments, points={layer: HookPoint.parse(f"blocks.{layer}.hook_resid_post") for layer in moments},
        decoders={}, rewards=y, pool="max", coefficient_pool="max", evidence=evidence, reward=label("reward"),
        rollouts=rollouts, activations=activations, snapshots=snapshots, notes=[label("a note")],
        provenance={
            "model": label("model"), "engine": [label("engine")], "versions": {label("package"): label("1")},
            "task": {"name": label("task"), "part": "train", "grader": label("exact")},
            "saes": {str(layer): {"encoder": label("topk"), "source": {label("kind"): label("hub")},
                                  "metadata": {"neuronpedia_id": label("gemma-2-2b/20-res")}} for layer in moments},
            "samples": {"n": n, "prompt_hashes": "aGFzaA=="},
        },
    )  # fmt: skip


def evaluation(label=str, n=40, shift=0.3):
    """An evaluation in which some samples rose, one fell and some changed for nothing."""
    kinds = [("improved", 0.0, 1.0)] * 12 + [("worsened", 1.0, 0.0)] + [("changed_equal", 0.0, 0.0)] * 7
    kinds += [("none", 1.0, 1.0)] * (n - len(kinds))
    examples = [
        {"prompt": label(f"question {at}"), "answer": label("12"), "category": label("hard"),
         "before": label(f"one {at}"), "after": label(f"two {at}"), "reward_before": a, "reward_after": b,
         "change": kind}
        for at, (kind, a, b) in enumerate(kinds)
    ]  # fmt: skip
    category = CategoryEvaluation(n, 0.4, (0.3, 0.5), 0.4 + shift, (0.5, 0.8), shift, (0.1, 0.5))
    return Evaluation(
        n=n, unsteered=0.4, unsteered_interval=(0.3, 0.5), steered=0.4 + shift, steered_interval=(0.5, 0.8),
        difference=shift, difference_interval=(0.1, 0.5), improved=12, worsened=1, changed_equal=7,
        side_effect_ratio=1 / 13, transitions={"right_to_right": 15, "right_to_wrong": 1, "wrong_to_right": 12,
                                               "wrong_to_wrong": 12},
        p_value=0.003, p_holm=0.006, unsteered_tokens_per_second=100.0, steered_tokens_per_second=90.0,
        categories={label("hard"): category}, examples=examples, notes=[label("a note of the evaluation")],
    )  # fmt: skip


def steering(label=str):
    """A steering along feature 3 of layer 1, with the record of a search."""
    feature = Feature("blocks.1.hook_resid_post", 2.0, 1, 3)
    curve = [{"scale": scale, "score": score, "n": 32, "left": left}
             for scale, score, left in ((0.5, 0.5, "leader"), (1.0, 0.7, None), (2.0, 0.6, "budget"))]  # fmt: skip
    round_ = {"samples": 16, "entered": 9, "running": 4, "worse_than_unsteered": 2, "worse_than_leader": 3,
              "over_budget": 0, "unsteered": 0.4, "leader": 0.6}  # fmt: skip
    named = {"layer": 1, "index": 3, "coefficient": 2.0}
    record = {
        "options": {}, "candidates": 3, "samples": 32, "unsteered": 0.4, "trials": 9, "in_full": 320,
        "completions": 150,
        "grid": {"scales": [0.5, 1.0, 2.0], "completions": 500},
        "rounds": [round_, round_ | {"samples": 32, "running": 1, "worse_than_leader": 6, "leader": 0.7}],
        "finalists": [{"feature": named, "positions": label("generated"), "curve": curve}],
        "joined": [{"feature": named, "trials": 4, "score": 0.7, "n": 32, "gain": 0.01, "error": 0.02, "kept": False}],
        "confirmation": {"n": 30, "unsteered": 0.4, "steered": 0.7, "difference": 0.3, "low": 0.1, "high": 0.5,
                         "improved": 10, "worsened": 1, "p_value": 0.01, "confirmed": True},
    }  # fmt: skip
    provenance = {"search": record, "selection": {"strategy": "search", "score": "pearson"}}
    direction = torch.ones(1, 8, dtype=torch.float32, device="cpu")
    return Steering([feature], direction, notes=[label("a note of the steering")], provenance=provenance)


def material(label=str, **options):
    """A page's material of one run, a steering and its evaluation beside a baseline."""
    name = label("search.safetensors")
    compared = Compared(
        {name: evaluation(label), label("random feature"): evaluation(label, shift=0.0)},
        {label("random feature"): {}}, {name: steering(label).digest},
    )  # fmt: skip
    return Material({label("run"): run(label=label, **options)}, {name: steering(label)}, {label("e.json"): compared})


def hostile(where):
    """A text that runs something where it is taken for markup."""
    return f"{ATTACK.replace('{where}', where.replace(' ', '_'))} {where}"


def many_scripts(text):
    """Right-to-left, CJK and combining characters."""
    return f"{text} مرحبا بالعالم 你好，世界 e\u0301 👩🏽\u200d🔬"


def large():
    """26 layers of 16 384 features."""
    return material(layers=26, d_sae=16384, n=160, permutations=19, kept=False)
